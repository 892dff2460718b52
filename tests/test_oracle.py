"""Every optimizer against the NumPy oracle, one step at a time, from the oracle's own state.

Two trajectories left to run free drift apart wherever a sign, an arg-max or a high p jumps, so each of
the 20 steps starts from the oracle's weights and buffers, with gradients recorded from a real network.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import normopt
from tests.oracle import Rule, direction

BUFFER = "momentum_buffer"

PS = [1.0, 1.5, 2.0, 3.0, 4.0, 8.0, 64.0, math.inf]
SCALES = ["power", "dual", "unit", "matched"]
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 2e-6,
    torch.bfloat16: 2**-7,
}  # bfloat16: one rounding of up to twice the scale
STEPS = 20

MOMENTA = {
    "sgd": dict(momentum=0.9, momentum_rule="heavy"),
    "normalizedsgd": dict(momentum=0.9, momentum_rule="ema"),
    "signsgd": dict(momentum=0.0, momentum_rule="heavy"),
    "signum": dict(momentum=0.9, momentum_rule="ema"),
    "lion": dict(momentum=0.9, momentum_rule="lion", beta2=0.99),
    "powerstep": dict(momentum=0.9, momentum_rule="heavy"),
    "lpsgd": dict(momentum=0.0, momentum_rule="heavy"),
    "lpsgdm": dict(momentum=0.9, momentum_rule="ema"),
}
EPS = {"lpsgd": 1e-8, "lpsgdm": 1e-8}
FIXED = {"l2": 2.0, "linf": math.inf}
REGULARIZERS = {
    "plain": dict(),
    "agr": dict(agr=True),
    "coupled": dict(weight_decay=0.03, decay="coupled"),
    "decoupled": dict(weight_decay=0.3, decay="decoupled"),
    "lp": dict(weight_decay=0.03, decay="lp", decay_p=0.8),
    "agr+lp": dict(agr=True, weight_decay=0.03, decay="lp", decay_p=1.0),
    "lp3": dict(weight_decay=0.3, decay="lp", decay_p=3.0),
}


@pytest.fixture(scope="module")
def recorded() -> tuple[list[np.ndarray], list[list[np.ndarray]]]:
    """Weights and 20 steps of gradients of a small convolutional network, a 0-d and an empty parameter."""
    torch.manual_seed(7)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(1, 2, 3), torch.nn.Tanh(), torch.nn.Flatten(), torch.nn.Linear(72, 15), torch.nn.Tanh()
    ).double()
    scale = torch.nn.Parameter(torch.tensor(1.5, dtype=torch.float64))
    empty = torch.nn.Parameter(torch.zeros(0, 3, dtype=torch.float64))
    params = [*net.parameters(), scale, empty]
    opt = torch.optim.SGD(params, lr=0.05)
    grads = []
    for _ in range(STEPS):
        opt.zero_grad()
        (scale * net(torch.randn(16, 1, 8, 8, dtype=torch.float64)) + 0.3).square().mean().backward()
        empty.grad = torch.zeros_like(empty)
        grads.append([p.grad.numpy().copy() for p in params])
        opt.step()
    return [p.detach().numpy().copy() for p in params], grads


def check(optimizer_class, settings: dict, rule: Rule, recorded, dtype: torch.dtype) -> tuple[int, int]:
    """Compare 20 steps; returns how many entries were left out, and of how many."""
    start, grads = recorded

    def as_given(xs):
        return [None if x is None else torch.tensor(x).to(dtype).double().numpy() for x in xs]

    ws, ms = as_given(start), [None] * len(start)
    left_out = total = 0
    for gs in grads:
        ws, gs, ms = as_given(ws), as_given(gs), as_given(ms)
        params = [torch.nn.Parameter(torch.tensor(w, dtype=dtype)) for w in ws]
        opt = optimizer_class([{"params": params, **settings}], lr=rule.lr)
        for p, g, m in zip(params, gs, ms, strict=True):
            p.grad = torch.tensor(g, dtype=dtype)
            if m is not None:
                opt.state[p][BUFFER] = torch.tensor(m, dtype=dtype)
        opt.step()
        new_ws, new_ms = rule.step(ws, gs, ms)
        for i, (p, w, new_w) in enumerate(zip(params, ws, new_ws, strict=True)):
            # A sign flips where c cancels to nothing: those entries say nothing about correctness.
            m = np.zeros_like(gs[i]) if ms[i] is None else ms[i]
            unsure = np.abs(rule.c[i]) < 1e-5 * (rule.momentum * np.abs(m) + np.abs(gs[i]))
            scale = np.maximum(np.abs(w), rule.lr * rule.radius * np.abs(rule.u[i]))
            error = np.abs(p.detach().double().numpy() - new_w) / np.maximum(scale, 1e-30)
            assert np.all(error[~unsure] <= TOLERANCE[dtype]), (i, error[~unsure].max())
            left_out, total = left_out + int(unsure.sum()), total + unsure.size
            if new_ms[i] is not None:
                buffer = opt.state[p][BUFFER].double().numpy()
                largest = rule.momentum * np.abs(m) + np.abs(gs[i]) + np.abs(w)
                assert np.all(np.abs(buffer - new_ms[i]) <= TOLERANCE[dtype] * largest)
        ws, ms = new_ws, new_ms
    return left_out, total


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", sorted(MOMENTA))
def test_every_optimizer_scale_and_p(name, scale, dtype, recorded):
    for p in PS:
        if p == 1 and scale == "power":
            continue  # undefined, and refused: test_engine.py
        settings = dict(norm="lp", p=p, scale=scale, **MOMENTA[name])
        rule = Rule(p=p, scale=scale, eps=EPS.get(name, 0.0), **MOMENTA[name])
        left_out, total = check(normopt.get_optimizer(name), settings, rule, recorded, dtype)
        assert left_out < 1e-3 * total


# In pairs: each stage reads what the one before it made, and its own settings alone.
@pytest.mark.pairs
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=["fp64", "fp32", "bf16"])
@pytest.mark.parametrize("regularizer", REGULARIZERS)
@pytest.mark.parametrize("name", sorted(MOMENTA))
def test_every_optimizer_as_it_comes_wears_every_regularizer(name, regularizer, dtype, recorded):
    cls = normopt.get_optimizer(name)
    fresh = cls([torch.nn.Parameter(torch.zeros(1))]).param_groups[0]
    settings = {**MOMENTA[name], **REGULARIZERS[regularizer]}
    p = FIXED.get(fresh["norm"], fresh["p"])
    assert fresh["eps"] == EPS.get(name, 0.0)
    rule = Rule(p=p, scale=fresh["scale"], eps=fresh["eps"], **settings)
    left_out, total = check(cls, settings, rule, recorded, dtype)
    assert left_out < 1e-3 * total


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
@pytest.mark.parametrize("scale", SCALES)
def test_direction_alone_to_full_precision(scale, dtype, recorded):
    """From w = 0 with lr = 1 and no momentum the new weight IS −u: nothing is left out, nothing hides."""
    for p in PS[1 if scale == "power" else 0 :]:
        for gs in recorded[1]:
            gs = [torch.tensor(g).to(dtype) for g in gs]
            params = [torch.nn.Parameter(torch.zeros_like(g)) for g in gs]
            for param, g in zip(params, gs, strict=True):
                param.grad = g
            normopt.SteepestDescent(params, lr=1.0, norm="lp", p=p, scale=scale).step()
            us = direction([g.double().numpy() for g in gs], p, scale)
            for param, u in zip(params, us, strict=True):
                np.testing.assert_allclose(param.detach().double().numpy(), -u, rtol=TOLERANCE[dtype], atol=0)


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("scale", ["dual", "unit"])
@pytest.mark.parametrize("p", PS)
def test_norm_over_the_whole_group(p, scale, foreach, recorded):
    rule = Rule(p=p, scale=scale, scope="group", momentum=0.9, momentum_rule="ema")
    settings = dict(norm="lp", p=p, scale=scale, scope="group", momentum=0.9, momentum_rule="ema", foreach=foreach)
    left_out, total = check(normopt.SteepestDescent, settings, rule, recorded, torch.float64)
    assert left_out < 1e-3 * total


@pytest.mark.parametrize("p", [1.5, 2.0, 3.0, 8.0, math.inf])
def test_eps_of_the_power_scale(p, recorded):
    settings = dict(p=p, eps=1e-3)
    check(normopt.LPSGD, settings, Rule(scale="power", **settings), recorded, torch.float64)


@pytest.mark.parametrize(
    "settings",
    [
        dict(momentum=0.9, momentum_rule="heavy", nesterov=True),
        dict(momentum=0.9, momentum_rule="heavy", dampening=0.5),
        dict(momentum=0.9, momentum_rule="ema", nesterov=True),
        dict(momentum=0.5, momentum_rule="lion", beta2=0.9, maximize=True),
    ],
    ids=str,
)
def test_rules_of_momentum(settings, recorded):
    settings = dict(p=3.0, scale="power", **settings)
    check(normopt.SteepestDescent, dict(norm="lp", **settings), Rule(**settings), recorded, torch.float64)


@pytest.mark.parametrize("regularizer", REGULARIZERS)
@pytest.mark.parametrize("scale", SCALES)
def test_the_radius_scales_the_step_and_not_the_decay(scale, regularizer, recorded):
    settings = dict(p=3.0, scale=scale, radius=0.3, momentum=0.9, momentum_rule="ema", **REGULARIZERS[regularizer])
    check(normopt.SteepestDescent, dict(norm="lp", **settings), Rule(**settings), recorded, torch.float64)


def test_a_wrong_rule_is_caught(recorded):
    """The comparison itself can fail: an oracle with another p, or without its decay, must not agree."""
    for wrong in (dict(p=3.01), dict(weight_decay=0.0), dict(agr=False), dict(momentum=0.91), dict(radius=0.99)):
        right = dict(p=3.0, scale="power", momentum=0.9, momentum_rule="ema", agr=True, weight_decay=0.1, decay="lp")
        with pytest.raises(AssertionError):
            check(normopt.SteepestDescent, dict(norm="lp", **right), Rule(**(right | wrong)), recorded, torch.float32)
