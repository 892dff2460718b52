"""Schedules of p: the paper's formula, their ends, and a life like a torch scheduler's."""

from __future__ import annotations

import math

import pytest
import torch

import normopt
from normopt.schedules import ConstantP, CosineP, LinearP, PiecewiseP


def optimizer(p=8.0, **kwargs):
    return normopt.LPSGDM([torch.nn.Parameter(torch.ones(2))], p=p, **kwargs)


def visited(schedule_class, steps, p=8.0, **kwargs):
    opt = optimizer(p)
    sched = schedule_class(opt, **kwargs)
    ps = [opt.param_groups[0]["p"]]
    for _ in range(steps - 1):
        opt.step()
        sched.step()
        ps.append(opt.param_groups[0]["p"])
    assert sched.get_last_p() == [ps[-1]]
    return ps


def test_cosine_is_the_papers_formula():
    total = 11
    expected = [2 + (8 - 2) * (1 + math.cos(math.pi * (s - 1) / (total - 1))) / 2 for s in range(1, total + 1)]
    assert visited(CosineP, total, total_steps=total) == pytest.approx(expected, abs=1e-12)


def test_the_ends_are_exact_and_the_last_value_stays():
    for cls in (CosineP, LinearP):
        for space in ("p", "exponent"):
            ps = visited(cls, 10, p=7.3, total_steps=5, space=space)
            assert ps[0] == 7.3
            assert ps[4:] == [2.0] * 6
            assert ps[:5] == sorted(ps[:5], reverse=True)


def test_one_step_keeps_the_start():
    for cls in (CosineP, LinearP):
        assert visited(cls, 4, total_steps=1) == [8.0] * 4


def test_from_infinity_through_the_exponent():
    ps = visited(CosineP, 5, p=math.inf, total_steps=5, space="exponent")
    assert ps[0] == math.inf
    assert ps[-1] == 2
    assert 1 / (ps[2] - 1) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="exponent"):
        CosineP(optimizer(math.inf), total_steps=5)


def test_linear_constant_piecewise():
    assert visited(LinearP, 4, total_steps=4) == pytest.approx([8, 6, 4, 2])
    assert visited(ConstantP, 3) == [8, 8, 8]
    assert visited(PiecewiseP, 6, milestones=[2, 4], values=[math.inf, 3]) == [8, 8, math.inf, math.inf, 3, 3]


def test_state_is_primitive_and_goes_on(tmp_path):
    opt = optimizer()
    sched = CosineP(opt, total_steps=10)
    for _ in range(4):
        sched.step()
    torch.save([opt.state_dict(), sched.state_dict()], tmp_path / "run.pt")
    p_saved = opt.param_groups[0]["p"]
    sched.step()
    p_next = opt.param_groups[0]["p"]

    opt2 = optimizer()
    sched2 = CosineP(opt2, total_steps=10)
    for state, target in zip(torch.load(tmp_path / "run.pt", weights_only=True), (opt2, sched2), strict=True):
        target.load_state_dict(state)
    assert opt2.param_groups[0]["p"] == p_saved
    sched2.step()
    assert opt2.param_groups[0]["p"] == p_next
    with pytest.raises(ValueError, match="not from ConstantP"):
        ConstantP(optimizer()).load_state_dict(sched.state_dict())


def test_groups_without_a_p_are_passed_over():
    @normopt.norms.register("p-less norm of a test")
    class PLess(normopt.norms.TensorNorm):
        def dual_norm(self, x):
            return x.norm()

        def dual_map(self, x):
            return x / x.norm()

    a, b = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    opt = normopt.SteepestDescent([{"params": [a], "norm": "lp", "p": 4.0}, {"params": [b]}], norm=PLess())
    sched = CosineP(opt, total_steps=3)
    sched.step()
    sched.step()
    assert sched.get_last_p() == [2.0, None]
    with pytest.raises(ValueError, match="no param group"):
        CosineP(torch.optim.SGD([a], lr=1), total_steps=3)


def test_a_name_that_fixes_p_has_none_to_schedule():
    for opt in (normopt.SGD([torch.nn.Parameter(torch.ones(2))]), normopt.Lion([torch.nn.Parameter(torch.ones(2))])):
        with pytest.raises(ValueError, match="no param group"):
            CosineP(opt, total_steps=3)
    a, b = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    mixed = normopt.LPSGDM([{"params": [a]}, {"params": [b], "norm": "linf"}], p=8.0)
    sched = CosineP(mixed, total_steps=2)
    sched.step()
    assert sched.get_last_p() == [2.0, None]
    assert "Lp(p=inf)" in mixed.backend()


def test_a_schedule_says_where_it_is():
    sched = CosineP(optimizer(), total_steps=3)
    sched.step()
    assert "CosineP(" in repr(sched)
    assert "last_epoch=1" in repr(sched)
    with pytest.raises(ValueError, match="not from CosineP"):
        sched.load_state_dict(LinearP(optimizer(), total_steps=3).state_dict())


def test_a_state_that_does_not_fit_changes_nothing():
    opt = normopt.LPSGDM(
        [
            {"params": [torch.nn.Parameter(torch.ones(2))]},
            {"params": [torch.nn.Parameter(torch.ones(2))], "norm": "linf"},
        ]
    )
    sched = CosineP(opt, total_steps=5)
    good = sched.state_dict()
    for wrong in ({"base_ps": [None, 6.0]}, {"base_ps": [math.inf, None]}, {"base_ps": [6.0, None, 3.0]}):
        with pytest.raises(ValueError):  # noqa: PT011
            sched.load_state_dict({**good, **wrong})
        assert sched.state_dict() == good
        assert sched.get_last_p() == [6.0, None]


def test_ends_that_have_no_exponent():
    assert visited(CosineP, 4, p=math.inf, total_steps=3, p_end=math.inf, space="exponent") == [math.inf] * 4
    with pytest.raises(ValueError, match="diverges"):
        CosineP(optimizer(), total_steps=3, p_end=1.0)
    assert visited(CosineP, 2, p=2.0, total_steps=3, p_end=2.0) == [2.0, 2.0]


def test_gsgd_raises_the_exponent_in_equal_steps():
    """Yuan, Liu and Nie: |g|^e with e from 0 (signSGD) to 1 (SGD) over the iterations."""
    w = torch.nn.Parameter(torch.zeros(2))
    opt = normopt.LPSGD([w], lr=1.0, p=math.inf)
    sched = LinearP(opt, total_steps=5, space="exponent")
    for e in (0.0, 0.25, 0.5, 0.75, 1.0, 1.0):
        w.data.zero_()
        w.grad = torch.tensor([0.01, -4.0])
        opt.step()
        torch.testing.assert_close(-w.detach(), w.grad.sign() * w.grad.abs() ** e)
        sched.step()


# (optimizer, setting, end): each number of a group, in a rule that reads it.
NUMBERS = [
    (lambda ps: normopt.Freon(ps, c=0.375), "norm_exponent", -0.25),  # DynMuon's
    (lambda ps: normopt.Muon(ps, method="svd", weight_decay=0.1), "momentum", 0.5),
    (lambda ps: normopt.Lion(ps, weight_decay=0.1), "weight_decay", 0.0),
    (lambda ps: normopt.Lion(ps), "beta2", 0.9),
    (lambda ps: normopt.Scion(ps, method="svd"), "radius", 1.0),
    (lambda ps: normopt.SteepestDescent(ps, metric="diagonal", metric_beta=0.9), "metric_beta", 0.99),
    (lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9), "momentum", 0.0),
]


@pytest.mark.parametrize(("make", "setting", "end"), NUMBERS)
def test_another_number_is_moved_and_saved_as_p_is(make, setting, end):
    def run(steps, resumed=False):
        torch.manual_seed(0)
        w = torch.nn.Parameter(torch.randn(4, 3))
        opt = make([w])
        start = opt.param_groups[0][setting]
        sched = LinearP(opt, total_steps=5, setting=setting, end=end)
        values = []
        for i in range(steps):
            if resumed and i == 2:
                saved, state = sched.state_dict(), opt.state_dict()
                opt = make([w])
                sched = LinearP(opt, total_steps=9, setting=setting, end=end)
                opt.load_state_dict(state)
                sched.load_state_dict(saved)
            values.append(opt.param_groups[0][setting])
            w.grad = torch.randn(4, 3)
            opt.step()
            sched.step()
        assert values == pytest.approx([start + (end - start) * min(i, 4) / 4 for i in range(steps)], abs=1e-12)
        assert values[0] == start
        assert values[4:] == [end] * len(values[4:])
        return w.detach()

    assert torch.equal(run(6), run(6, resumed=True))


def test_a_moved_number_is_the_one_that_the_step_uses():
    w, w2 = (torch.nn.Parameter(torch.randn(4, 3, generator=torch.Generator().manual_seed(0))) for _ in range(2))
    w.grad = w2.grad = torch.randn(4, 3)
    opt = normopt.Freon([w], c=0.375, momentum=0.0)
    PiecewiseP(opt, [1], [-0.25], setting="norm_exponent").step()
    opt.step()
    normopt.Freon([w2], c=0.625, momentum=0.0).step()
    assert torch.equal(w, w2)


def test_groups_that_lack_the_setting_are_passed_over():
    a, b = (torch.nn.Parameter(torch.ones(2, 2)) for _ in range(2))
    opt = normopt.Freon([{"params": [a]}, {"params": [b], "norm_exponent": None}], c=0.375)
    sched = CosineP(opt, total_steps=2, setting="norm_exponent", end=-0.25)
    sched.step()
    assert sched.get_last_p() == [-0.25, None]
    assert opt.param_groups[1]["norm_exponent"] is None  # Muon's direction still
    wrong = {**sched.state_dict(), "base_ps": [0.25, 0.25]}
    with pytest.raises(ValueError, match="no norm_exponent here and a norm_exponent in this state"):
        sched.load_state_dict(wrong)
    # Each group goes from its own value, also where that is a tensor.
    opt = normopt.SGD([{"params": [a], "weight_decay": torch.tensor(0.4)}, {"params": [b]}], weight_decay=0.2)
    held = opt.param_groups[0]["weight_decay"]
    LinearP(opt, total_steps=3, setting="weight_decay", end=0.0).step()
    assert opt.param_groups[0]["weight_decay"] is held
    assert [float(group["weight_decay"]) for group in opt.param_groups] == pytest.approx([0.2, 0.1])


def test_step_never_changes_p():
    opt = optimizer()
    for p in opt.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    opt.step()
    assert opt.param_groups[0]["p"] == 8.0


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: CosineP(optimizer(), total_steps=0), ValueError, r"total_steps must be in \[1,"),
        (lambda: CosineP(optimizer(), total_steps=2.5), TypeError, "integer"),
        (lambda: CosineP(optimizer(), total_steps=True), TypeError, "integer"),
        (lambda: CosineP(optimizer(), total_steps=3, p_end=0.5), ValueError, "p_end"),
        (lambda: CosineP(optimizer(), total_steps=3, space="log"), ValueError, "space"),
        (lambda: CosineP(optimizer(1.0, scale="matched"), total_steps=3, space="exponent"), ValueError, "p = 1"),
        (lambda: CosineP(object(), total_steps=3), TypeError, "optimizer"),
        (lambda: CosineP(optimizer(), T_max=3), TypeError, "CosineP got .* 'T_max'; it takes optimizer, total_steps,"),
        (lambda: PiecewiseP(optimizer(), [], []), ValueError, "milestones"),
        (lambda: PiecewiseP(optimizer(), [3, 2], [4, 2]), ValueError, "increasing"),
        (lambda: PiecewiseP(optimizer(), [3], [4, 2]), ValueError, "as many values"),
        (lambda: PiecewiseP(optimizer(), [3], [0.2]), ValueError, "value"),
        (lambda: PiecewiseP(optimizer(), ["3"], [2]), TypeError, "integers"),
        (lambda: of("momentun", 0.5), ValueError, "no param group .* did you mean 'momentum'"),
        (lambda: of("norm_exponent", 0.5), ValueError, "initial value"),
        (lambda: of("norm", 0.5), TypeError, "norm of group 0 must be a number .* but is 'lp'"),
        (lambda: of("nesterov", 0.5), TypeError, "nesterov of group 0 must be a number"),
        (lambda: of("momentum", 1.5), ValueError, "momentum must be in"),
        (lambda: of("momentum", None), ValueError, "takes its final value as end"),
        (lambda: of("momentum", 0.5, p_end=3.0), ValueError, "neither p_end nor space"),
        (lambda: of("momentum", math.inf), ValueError, "end must be in"),
        (lambda: of("p", 3.0), ValueError, "use p_end"),
        (lambda: PiecewiseP(optimizer(), [3], [1.5], setting="momentum"), ValueError, "momentum must be in"),
        (lambda: of("norm_steps", 3, opt=muon()), TypeError, "steps must be an integer"),
        (lambda: of("momentum", 0.5, opt=normopt.SignSGD(muon().param_groups[0]["params"])), ValueError, "fixes"),
        (lambda: of("norm_exponent", -1.5, opt=normopt.Freon(muon().param_groups[0]["params"])), ValueError, "above"),
    ],
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()


def of(setting, end, opt=None, **kwargs):
    return LinearP(optimizer() if opt is None else opt, total_steps=3, setting=setting, end=end, **kwargs)


def muon():
    return normopt.Muon([torch.nn.Parameter(torch.ones(2, 2))])


def test_a_refused_schedule_changes_nothing():
    opt = optimizer(math.inf)
    with pytest.raises(ValueError, match="annealed"):
        CosineP(opt, total_steps=5)
    assert opt.param_groups[0]["p"] == math.inf
