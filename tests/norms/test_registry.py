"""A norm of the user's own joins every optimizer by its name."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

import normopt
from normopt.norms import Lp, Norm, TensorNorm, list_norms, register, registry


@pytest.fixture(autouse=True)
def _forget_test_norms(monkeypatch):
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))


def make_row_norm(name="rows-of-a-test"):
    @register(name)
    @dataclasses.dataclass(frozen=True)
    class Rows(TensorNorm):
        """Each row its own ℓ2 ball: the norm is the largest row, the dual norm the sum of the rows."""

        gain: float = 1.0

        def dual_norm(self, x):
            return self.gain * x.flatten(1).norm(dim=1).sum() if x.dim() > 1 else self.gain * x.norm()

        def dual_map(self, x):
            rows = x.flatten(1) if x.dim() > 1 else x[None]
            return (self.gain * rows / rows.norm(dim=1, keepdim=True).clamp_min(1e-30)).reshape(x.shape)

    return Rows


def params():
    torch.manual_seed(0)
    ps = [torch.nn.Parameter(torch.randn(3, 4)), torch.nn.Parameter(torch.randn(3))]
    for p in ps:
        p.grad = torch.randn_like(p)
    return ps


@pytest.mark.parametrize("scale", ["unit", "dual", "matched"])
def test_quick_start_norm_works_on_every_scale_it_has(scale):
    rows = make_row_norm()(gain=2.0)
    ps = params()
    old = [p.detach().clone() for p in ps]
    opt = normopt.SteepestDescent(ps, lr=0.1, norm=rows, scale=scale)
    assert opt.param_groups[0]["norm"] == "rows-of-a-test"
    assert opt.param_groups[0]["norm_gain"] == 2.0
    assert opt.param_groups[0]["p"] is None
    opt.step()
    for p, w in zip(ps, old, strict=True):
        d = rows.dual_map(p.grad)
        factor = {"unit": 1, "dual": rows.dual_norm(p.grad), "matched": p.grad.norm() / d.norm()}[scale]
        torch.testing.assert_close(p.detach(), w - 0.1 * factor * d)


def test_by_name_and_field_as_by_object():
    make_row_norm()
    by_name = normopt.SteepestDescent(params(), norm="rows-of-a-test", norm_gain=2.0)
    assert by_name.param_groups[0]["norm_gain"] == 2.0
    with pytest.raises(TypeError, match=r"norm_gian.*takes norm_gain"):
        normopt.SteepestDescent(params(), norm="rows-of-a-test", norm_gian=2.0)


def test_what_a_quick_start_norm_cannot_do_is_refused():
    rows = make_row_norm()()
    with pytest.raises(ValueError, match="power"):
        normopt.SteepestDescent(params(), norm=rows, scale="power")
    with pytest.raises(ValueError, match='scope="tensor"'):
        normopt.SteepestDescent(params(), norm=rows, scale="unit", scope="group")


def test_settings_survive_a_safe_checkpoint(tmp_path):
    opt = normopt.SteepestDescent(params(), norm=make_row_norm()(gain=3.0))
    torch.save(opt.state_dict(), tmp_path / "opt.pt")
    loaded = torch.load(tmp_path / "opt.pt", weights_only=True)
    assert loaded["param_groups"][0]["norm_gain"] == 3.0


def test_names_are_unique_but_a_cell_can_be_run_again():
    make_row_norm()
    make_row_norm()
    with pytest.raises(ValueError, match="taken by Lp"):
        make_row_norm("lp")
    with pytest.raises(TypeError, match="subclass of Norm"):
        register("x")(int)


def test_an_unknown_name_lists_the_near_ones():
    with pytest.raises(ValueError, match="unknown norm 'linff'; did you mean 'linf'"):
        normopt.SteepestDescent(params(), norm="linff")
    with pytest.raises(TypeError, match="registered name or a Norm object"):
        normopt.SteepestDescent(params(), norm=3)


def test_an_object_without_a_name_says_how_to_get_one():
    class Nameless(TensorNorm):
        pass

    with pytest.raises(ValueError, match="register"):
        normopt.SteepestDescent(params(), norm=Nameless())


@pytest.mark.parametrize(("alias", "p"), [("l1", 1.0), ("l2", 2.0), ("linf", math.inf)])
def test_aliases_are_lp_with_p_fixed(alias, p):
    """The group has no p under such a name: there is none to override or to schedule."""
    opt = normopt.SteepestDescent(params(), norm=alias)
    group = opt.param_groups[0]
    assert (group["norm"], group["p"]) == (alias, None)
    assert f"Lp(p={p:g})" in opt.backend()
    with pytest.raises(ValueError, match="leave one out"):
        normopt.SteepestDescent(params(), norm=alias, p=7.0)
    assert normopt.SteepestDescent(params(), norm=Lp(p)).param_groups[0]["p"] == p


def test_the_list_of_norms():
    assert {"l1", "l2", "linf", "lp"} <= set(list_norms())
    assert issubclass(Lp, Norm)


def test_what_a_norm_of_ones_own_gets_wrong_is_named():
    @register("returns nothing")
    class Nothing(TensorNorm):
        def dual_norm(self, x):
            return x.norm()

        def dual_map(self, x):
            x / x.norm()

    @register("returns a float")
    class Float(TensorNorm):
        def dual_norm(self, x):
            return 1.0

    for norm, message in ((Nothing(), r"Nothing\(\).dual_map must return"), (Float(), r"Float\(\).dual_norm must")):
        with pytest.raises(TypeError, match=message):
            normopt.SteepestDescent(params(), norm=norm).step()
    with pytest.raises(TypeError, match="dataclass"):

        @register("with an init")
        class WithInit(TensorNorm):
            def __init__(self, k):
                self.k = k

    with pytest.raises(TypeError, match="takes a name"):
        register(Nothing)


def test_a_field_never_leaks_into_another_norms_group():
    """Both norms have a gain; the second group gave none, so it has its own norm's default."""
    make_row_norm("first")

    @register("second")
    @dataclasses.dataclass(frozen=True)
    class Second(TensorNorm):
        gain: float = 1.0

    register("second, fixed", gain=2.0)(Second)
    a, b, c = (torch.nn.Parameter(torch.ones(2)) for _ in range(3))
    groups = [{"params": [a]}, {"params": [b], "norm": "second"}, {"params": [c], "norm": "second, fixed"}]
    said = normopt.SteepestDescent(groups, norm="first", norm_gain=5.0).backend().splitlines()
    for line, gain in zip(said, (5.0, 1.0, 2.0), strict=True):
        assert f"gain={gain}" in line
    with pytest.raises(ValueError, match="norm_gian"):
        normopt.SteepestDescent([{"params": [a], "norm_gian": 3.0}], norm="first")


def test_p_may_come_with_the_group_alone():
    opt = normopt.SteepestDescent([{"params": params(), "p": 3.0}], norm="lp")
    assert "Lp(p=3)" in opt.backend()


def test_a_power_exponent_of_ones_own():
    """A norm that declares κ gets the power scale from its dual norm and dual map, without an ε."""

    @register("l2 with a power of its own")
    class Power(TensorNorm):
        power_exponent = 0.5

        def dual_norm(self, x):
            return x.norm()

        def dual_map(self, x):
            return x / x.norm()

    ps = params()
    old = [p.detach().clone() for p in ps]
    normopt.SteepestDescent(ps, lr=0.1, norm=Power(), scale="power").step()
    for p, w in zip(ps, old, strict=True):
        torch.testing.assert_close(p.detach(), w - 0.1 * p.grad / p.grad.norm() ** 0.5)
    with pytest.raises(ValueError, match="eps"):
        normopt.SteepestDescent(ps, norm=Power(), scale="power", eps=1e-8)
