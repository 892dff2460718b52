"""``norm_pairs()``: the norm of the last update and the dual norm of what it was made from, from the step itself."""

from __future__ import annotations

import math

import pytest
import torch

import normopt
from normopt import SteepestDescent
from normopt.norms import Lp, Mixed, Schatten, TensorNorm, register

NORMS = [
    Lp(1.0),
    Lp(3.0),
    Lp(math.inf),
    Schatten(1.0),
    Schatten(1.0, method="lanczos", steps=16),
    Schatten(3.0),
    Schatten(math.inf, aspect="rms"),
    Mixed(2.0, math.inf, aspect="columns"),
    Mixed(3.0, 1.5),
]
every_norm = pytest.mark.parametrize("norm", NORMS, ids=repr)
both_paths = pytest.mark.parametrize("foreach", [False, True])


def params_with_gradients(*shapes):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.zeros(s, dtype=torch.float64)) for s in shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    return params


def one_step(params, **settings):
    """From w = 0 with lr = 1 the new weight is −u."""
    opt = SteepestDescent(params, lr=1.0, **settings)
    opt.step()
    return opt.norm_pairs()


@both_paths
@every_norm
@pytest.mark.parametrize("radius", [1.0, 50.0])
@pytest.mark.parametrize("scale", ["unit", "dual", "matched"])
def test_they_are_the_norms_computed_anew(norm, scale, radius, foreach):
    params = params_with_gradients((5, 4), (4, 5), (3, 2, 2), (6,), (5, 4))
    settings = dict(norm=norm, scale=scale, radius=radius, momentum=0.9, momentum_rule="ema", foreach=foreach)
    (pair,) = one_step(params, **settings)
    if pair is None:
        assert isinstance(norm, Lp)
        assert norm.needs(scale) == "none"
        return
    assert pair.update.shape == pair.dual.shape == ()
    update = max(float(norm.norm(p.detach())) for p in params)
    dual = sum(float(norm.dual_norm(0.1 * p.grad)) for p in params)
    assert float(pair.update) == pytest.approx(update, rel=1e-10)
    assert float(pair.dual) == pytest.approx(dual, rel=1e-10)


@both_paths
@every_norm
@pytest.mark.parametrize("scale", ["unit", "dual"])
def test_over_a_group(norm, scale, foreach):
    params = params_with_gradients((5, 4), (4, 5), (6,))
    (pair,) = one_step(params, norm=norm, scale=scale, scope="group", radius=3.0, foreach=foreach)
    if pair is None:
        assert norm.needs(scale) == "none"
        return
    if isinstance(norm, Lp):  # one vector
        dual = norm.dual_norm(torch.cat([p.grad.flatten() for p in params]))
        update = norm.norm(torch.cat([p.detach().flatten() for p in params]))
    else:
        dual = sum(norm.dual_norm(p.grad) for p in params)
        update = max(norm.norm(p.detach()) for p in params)
    assert float(pair.dual) == pytest.approx(float(dual), rel=1e-10)
    assert float(pair.update) == pytest.approx(float(update), rel=1e-10)


@pytest.mark.parametrize("how", [dict(fused=True), dict(foreach=True), dict(foreach=False)], ids=str)
def test_tensors_without_entries_have_no_part_in_it(how):
    pairs = []
    for shapes in ([(5, 4)], [(5, 4), (0, 3)], [(0, 3)]):
        params = [torch.nn.Parameter(torch.zeros(s)) for s in shapes]
        for p in params:
            p.grad = torch.linspace(-1, 2, p.numel()).reshape(p.shape)
        pairs += one_step(params, norm="lp", p=3.0, scale="dual", **how)
    assert pairs[0] == pairs[1]
    assert pairs[2] is None


def test_none_where_a_step_needs_no_norm():
    for settings in (
        dict(norm="l2", scale="dual"),
        dict(norm="linf", scale="unit"),
        dict(norm="lp", p=3.0, scale="power"),
        dict(norm="schatten", p=3.0, scale="power"),
        dict(norm="spectral", scale="power"),
    ):
        assert one_step(params_with_gradients((5, 4)), **settings) == [None]


def test_one_a_group_in_their_order_and_none_without_a_gradient():
    a, b, c = params_with_gradients((5, 4), (4, 4), (3, 3))
    opt = SteepestDescent([{"params": [a]}, {"params": [b], "norm": "row"}], norm="spectral", scale="unit")
    assert opt.norm_pairs() == []
    opt.step()
    first, second = opt.norm_pairs()
    assert float(first.dual) == pytest.approx(float(Schatten(math.inf).dual_norm(a.grad)))
    assert float(second.dual) == pytest.approx(float(b.grad.norm(dim=1).sum()))
    opt.add_param_group({"params": [c]})
    assert opt.norm_pairs()[2] is None
    a.grad = None
    opt.step()
    first, second, third = opt.norm_pairs()
    assert first is None
    assert float(second.update) == pytest.approx(1.0)
    assert float(third.dual) == pytest.approx(float(Schatten(math.inf).dual_norm(c.grad)))
    opt.zero_grad()
    opt.step()
    assert opt.norm_pairs() == [None] * 3


def test_they_cost_no_second_computation():
    calls = []

    @register("counted")
    class Counted(TensorNorm):
        def dual_norm(self, x):
            calls.append("dual norm")
            return x.abs().sum()

        def dual_map(self, x):
            calls.append("dual map")
            return x.sign()

    params = params_with_gradients((5, 4), (4, 5))
    opt = SteepestDescent(params, norm="counted", scale="unit")
    opt.step()
    once = sorted(calls)
    assert once == ["dual map"] * 2 + ["dual norm"] * 2
    (pair,) = opt.norm_pairs()
    assert sorted(calls) == once
    assert float(pair.dual) == pytest.approx(sum(float(p.grad.abs().sum()) for p in params))


def test_a_matrix_is_taken_apart_once(monkeypatch):
    calls = []
    svd = torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda *args, **kwargs: calls.append(1) or svd(*args, **kwargs))
    for scale in ("unit", "dual", "matched"):
        opt = normopt.SteepestDescent(params_with_gradients((5, 4), (6, 3)), norm="spectral", scale=scale)
        opt.step()
        assert len(calls) == 2
        opt.norm_pairs()
        assert len(calls) == 2
        calls.clear()


@both_paths
@pytest.mark.parametrize("scope", ["tensor", "group"])
@pytest.mark.parametrize("norm", [Lp(3.0), Schatten(math.inf), Mixed(2.0, math.inf)], ids=repr)
@pytest.mark.parametrize("scale", ["unit", "dual", "matched"])
def test_nan_is_not_hidden_and_zero_is_zero(norm, scale, scope, foreach):
    if scale == "matched" and scope == "group":
        return
    params = params_with_gradients((5, 4), (5, 4))
    settings = dict(norm=norm, scale=scale, scope=scope, radius=2.0, foreach=foreach)
    params[1].grad[2, 3] = math.nan
    (pair,) = one_step(params, **settings)
    assert pair.update.isnan()
    assert pair.dual.isnan()
    for p in params:
        p.grad.zero_()
    (pair,) = one_step(params, **settings)
    assert float(pair.update) == float(pair.dual) == 0


def test_they_hold_on_to_no_graph():
    (w,) = params_with_gradients((5, 4))
    opt = SteepestDescent([w], norm="row", scale="dual", differentiable=True)
    opt.param_groups[0]["params"][0] = moved = w.clone()
    moved.grad = w.grad.clone().requires_grad_()
    opt.step()
    (pair,) = opt.norm_pairs()
    assert moved.requires_grad
    assert not pair.update.requires_grad
    assert not pair.dual.requires_grad
