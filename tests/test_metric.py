"""Norms in adaptive coordinates: against torch's Adam and its kin, the NumPy oracle, and what makes a norm a norm."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch

import normopt
from normopt.norms import registry
from tests.oracle import Rule

SHAPES = [(13, 7), (40,), (5, 3, 2), (1,)]
BACKENDS = [dict(foreach=False), dict(foreach=True)]
ADAM: dict[str, Any] = dict(momentum=0.9, momentum_rule="ema", bias_correction=True, metric="diagonal")


def make(dtype: torch.dtype = torch.float32, seed: int = 0) -> list[torch.nn.Parameter]:
    torch.manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(s, dtype=torch.float64).to(dtype)) for s in SHAPES]


def give(params: list[torch.nn.Parameter], step: int) -> None:
    torch.manual_seed(1000 + step)
    for p in params:
        p.grad = (10.0 ** (step % 5 - 2) * torch.randn(p.shape, dtype=torch.float64)).to(p.dtype)


TORCH: dict[str, tuple[Any, dict[str, Any]]] = {
    "adamw": (lambda ps, **k: torch.optim.AdamW(ps, **k, weight_decay=0.1), ADAM | dict(weight_decay=0.1)),
    "amsgrad": (
        lambda ps, **k: torch.optim.AdamW(ps, **k, weight_decay=0.1, amsgrad=True),
        ADAM | dict(weight_decay=0.1, metric_rule="max"),
    ),
    "adam": (
        lambda ps, **k: torch.optim.Adam(ps, **k, weight_decay=0.1),
        ADAM | dict(weight_decay=0.1, decay="coupled"),
    ),
    "adagrad": (
        lambda ps, **k: torch.optim.Adagrad(ps, **k, eps=1e-10),
        dict(metric="diagonal", metric_rule="sum", metric_eps=1e-10),
    ),
    "rmsprop": (
        lambda ps, **k: torch.optim.RMSprop(ps, **k, alpha=0.99),
        dict(metric="diagonal", metric_beta=0.99),
    ),
}
NAMES = {"momentum_buffer": "exp_avg", "exp_avg_sq": "exp_avg_sq", "max_exp_avg_sq": "max_exp_avg_sq", "step": "step"}
THEIRS = {"adagrad": {"exp_avg_sq": "sum"}, "rmsprop": {"exp_avg_sq": "square_avg"}}


@pytest.mark.parametrize("steps", [40, pytest.param(500, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("how", [*BACKENDS, dict(fused=True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", TORCH)
def test_single_steps_are_torchs(name, dtype, how, steps):
    """From torch's state at every step; relative to max(|w|, η|u|), but where the momentum cancels."""
    if how.get("fused"):
        pytest.importorskip("numba")
        if dtype == torch.float64:
            pytest.skip("no kernel")
    theirs_of, settings = TORCH[name]
    ours, theirs = make(dtype), make(dtype)
    opt, other = normopt.SteepestDescent(ours, lr=0.01, **how, **settings), theirs_of(theirs, lr=0.01, foreach=False)
    left_out, all_entries = 0, 0
    for step in range(steps):
        for p, q in zip(ours, theirs, strict=True):
            p.data.copy_(q.data)
            for key, x in opt.state[p].items():
                found = other.state[q][THEIRS.get(name, {}).get(key, NAMES[key])]
                x.copy_(found)
        give(ours, step)
        give(theirs, step)
        before = [q.detach().clone() for q in theirs]
        opt.step()
        other.step()
        for p, q, w in zip(ours, theirs, before, strict=True):
            counts = torch.ones_like(w, dtype=torch.bool)
            if "momentum_buffer" in opt.state[p]:
                m, g = opt.state[p]["momentum_buffer"], q.grad
                counts = m.abs() >= 1e-5 * ((m - 0.1 * g).abs() + g.abs())
            error = (p.detach() - q.detach()).abs() / torch.maximum(w.abs(), (q.detach() - w).abs())
            assert float(error[counts].max()) <= (
                2e-6 if how.get("fused") else 6e-7 if dtype == torch.float32 else 1e-13
            )
            left_out, all_entries = left_out + int((~counts).sum()), all_entries + counts.numel()
    assert left_out <= 1e-3 * all_entries


RULES: list[dict[str, Any]] = [
    dict(momentum=0.9, momentum_rule="ema", bias_correction=True),
    dict(momentum=0.9, momentum_rule="ema", nesterov=True, bias_correction=True, metric_rule="max"),
    dict(momentum=0.9, momentum_rule="lion", beta2=0.98, bias_correction=True),
    dict(momentum=0.9, momentum_rule="heavy", metric_rule="sum"),
    dict(bias_correction=True, agr=True, weight_decay=0.1, decay="lp", decay_p=0.8),
    dict(momentum=0.5, momentum_rule="ema", agr=True, weight_decay=0.1, decay="coupled"),
]


@pytest.mark.parametrize("how", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rule", range(len(RULES)))
@pytest.mark.parametrize(
    ("p", "scale", "scope"),
    [
        *((p, scale, "tensor") for p in (1.5, 2.0, 3.0, math.inf) for scale in ("power", "dual", "unit", "matched")),
        *((p, scale, "tensor") for p in (1.0,) for scale in ("dual", "unit", "matched")),
        *((p, scale, "group") for p in (1.0, 2.0, 3.0) for scale in ("dual", "unit")),
    ],
)
def test_fifty_steps_of_the_oracle(p, scale, scope, rule, dtype, how):
    settings = RULES[rule]
    if settings.get("metric_rule") != "sum":
        settings = settings | dict(metric_beta=0.9)
    ours = make(dtype)
    opt = normopt.SteepestDescent(
        ours, lr=0.01, norm="lp", p=p, scale=scale, scope=scope, metric="diagonal", **settings, **how
    )
    oracle = Rule(lr=0.01, p=p, scale=scale, scope=scope, metric="diagonal", **settings)
    ws = [x.detach().double().numpy().copy() for x in ours]
    ms: list[Any] = [None] * len(ws)
    for step in range(50):
        give(ours, step)
        # In float32 from the oracle's weights at every step, so that errors of rounding do not add up.
        if dtype == torch.float32:
            for x, w in zip(ours, ws, strict=True):
                x.data.copy_(torch.from_numpy(w))
        opt.step()
        ws, ms = oracle.step(ws, [x.grad.double().numpy() for x in ours], ms)
        for x, w, u in zip(ours, ws, oracle.u, strict=True):
            size = np.maximum(np.abs(w), 0.01 * np.abs(u)).max()
            bound = 1e-12 if dtype == torch.float64 else 2e-6
            np.testing.assert_allclose(x.detach().double().numpy(), w, rtol=0, atol=bound * (1 + step) ** 0.5 * size)


NORMS = [
    normopt.norms.Lp(1.0),
    normopt.norms.Lp(1.5),
    normopt.norms.Lp(2.0),
    normopt.norms.Lp(math.inf),
    normopt.norms.Mixed(1.5, 3.0),
    normopt.norms.Schatten(1.0, method="svd"),
    normopt.norms.Schatten(3.0, method="svd"),
    normopt.norms.Schatten(math.inf, method="svd"),
    *(registry.build({"norm": name}) for name in ("row", "column", "max", "max-row", "frobenius")),
    registry.build({"norm": "spectral", "norm_blocks": 2, "norm_aspect": "rms"}),
    registry.build({"norm": "spectral", "norm_blocks": (3, 2, 1), "norm_aspect": "rms"}),
]


@pytest.mark.parametrize("how", BACKENDS)
@pytest.mark.parametrize("norm", NORMS, ids=repr)
def test_duality_in_adaptive_coordinates(norm, how):
    """⟨c, u⟩ = ‖c‖_P⋆² and ‖u‖_P = ‖c‖_P⋆ under "dual"; ⟨c, u⟩ = ‖c‖_P⋆ and ‖u‖_P = 1 under "unit"."""
    torch.manual_seed(0)
    for scale in ("dual", "unit"):
        p = torch.nn.Parameter(torch.zeros(6, 5, dtype=torch.float64))
        settings = dict(norm=norm, scale=scale, metric="diagonal", bias_correction=True)
        opt = normopt.SteepestDescent([p], lr=1.0, **settings, **how)
        for _ in range(3):
            p.data.zero_()
            p.grad = torch.randn(6, 5, dtype=torch.float64)
            opt.step()
        u, root = -p.detach(), (opt.state[p]["exp_avg_sq"] / (1 - 0.999**3)).sqrt().add(1e-8).sqrt()
        dual, size, product = norm.dual_norm(p.grad / root), norm.norm(u * root), (p.grad * u).sum()
        one = torch.ones((), dtype=torch.float64)
        torch.testing.assert_close(size, dual if scale == "dual" else one, rtol=1e-9, atol=0)
        torch.testing.assert_close(product, dual**2 if scale == "dual" else dual, rtol=1e-9, atol=0)
        pair = opt.norm_pairs()[0]
        if pair is not None:
            torch.testing.assert_close(pair.dual, dual, rtol=1e-6, atol=0, check_dtype=False)
            torch.testing.assert_close(pair.update, size, rtol=1e-6, atol=0, check_dtype=False)


@pytest.mark.parametrize("how", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.complex64])
def test_state_and_its_dtypes(dtype, how, tmp_path):
    """The squares of 16-bit weights are float32, also loaded; a resumed run goes on bit for bit."""
    squares = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s).to(dtype)) for s in SHAPES]
    settings = ADAM | dict(lr=0.01, metric_rule="max", agr=True, weight_decay=0.1, decay="lp", decay_p=0.8)
    opt = normopt.SteepestDescent(params, **settings, **how)

    def go(params: list[torch.nn.Parameter], opt: normopt.SteepestDescent, first: int) -> None:
        for step in range(first, first + 3):
            torch.manual_seed(step)
            for p in params:
                p.grad = torch.randn(p.shape).to(dtype)
            opt.step()

    go(params, opt, 0)
    torch.save(opt.state_dict(), tmp_path / "state.pt")
    others = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = normopt.SteepestDescent(others, **settings, **how)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    go(params, opt, 3)
    go(others, other, 3)
    for p, q in zip(params, others, strict=True):
        assert torch.equal(p, q)
        state = other.state[q]
        assert state["step"] == 6
        assert state["step"].shape == ()
        assert state["exp_avg_sq"].dtype == state["max_exp_avg_sq"].dtype == squares
        assert state["momentum_buffer"].dtype == dtype
        for key, x in opt.state[p].items():
            assert torch.equal(x, state[key])


FUSED: list[dict[str, Any]] = [
    ADAM | dict(agr=True, weight_decay=0.1, decay="lp", decay_p=0.8),
    ADAM | dict(norm="linf", scale="unit", weight_decay=0.1, decay="cautious", maximize=True),
    ADAM | dict(norm="lp", p=2.7, scale="matched", agr=True, weight_decay=0.1, decay="cautious-lp", decay_p=0.8),
    ADAM | dict(norm="lp", p=1.4, scale="dual", metric_rule="max", nesterov=True, weight_decay=0.1, decay="coupled"),
    ADAM | dict(difference_beta=0.92, weight_decay=0.1, decay="proximal", agr=True),
    dict(norm="lp", p=2.7, scale="dual", coupling=0.1, coupling_rate=0.02, difference_beta=0.3, momentum=0.9),
    ADAM | dict(norm="lp", p=2.7, scale="relative", weight_decay=0.1, decay="inside"),
    ADAM | dict(norm="lp", p=3.0, scale="power", constraint="sphere", weight_decay=0.1, decay="inside"),
]
MORE_FUSED: list[dict[str, Any]] = [
    ADAM | dict(nesterov=True, norm="lp", p=3.0, scale="power", metric_rule="max"),
    ADAM | dict(momentum_rule="lion", beta2=0.98, norm="lp", p=2.7, scale="power", agr=True),
    dict(metric="diagonal", metric_rule="sum", momentum=0.9, weight_decay=0.1, decay="coupled"),
    dict(metric="diagonal", norm="lp", p=1.7, scale="power", eps=1e-3),
    *(
        dict(bias_correction=True, momentum=0.9, momentum_rule="ema", norm="lp", p=p, scale=scale, agr=True)
        for p, scale in ((2.7, "matched"), (1.4, "dual"))
    ),
    dict(metric="diagonal", metric_beta=0.9, norm="linf", scale="matched", state_dtype="bfloat16", momentum=0.9),
]


@pytest.mark.parametrize("rounding", ["nearest", "kahan", None])
@pytest.mark.parametrize(
    "settings", [*FUSED, *(pytest.param(x, marks=pytest.mark.exhaustive) for x in MORE_FUSED)], ids=str
)
def test_fused_steps_are_the_for_loops(settings, rounding):
    """From the for-loop's state at every step; float32 if there is no rounding."""
    pytest.importorskip("numba")
    dtype = torch.float32 if rounding is None else torch.bfloat16
    ours, theirs = make(dtype), make(dtype)
    how = dict(lr=0.01, rounding=rounding or "nearest", **settings)
    opt = normopt.SteepestDescent(ours, fused=True, **how)
    other = normopt.SteepestDescent(theirs, foreach=False, **how)
    for step in range(8):
        for p, q in zip(ours, theirs, strict=True):
            p.data.copy_(q.data)
            for key, x in opt.state[p].items():
                x.copy_(other.state[q][key])
        give(ours, step)
        give(theirs, step)
        opt.step()
        other.step()
        for p, q in zip(ours, theirs, strict=True):
            assert opt.state[p].keys() == other.state[q].keys()
            kept = {key: x.float() for key, x in opt.state[p].items() if key != "kahan_compensation"}
            for key, x in kept.items():
                torch.testing.assert_close(
                    x, other.state[q][key].float(), rtol=2**-7 if dtype != torch.float32 else 1e-5, atol=1e-6
                )
            whole = [
                a + b.get("kahan_compensation", 0) for a, b in ((p.float(), opt.state[p]), (q.float(), other.state[q]))
            ]
            loose = rounding == "nearest"
            torch.testing.assert_close(*whole, rtol=2**-7 if loose else 1e-5, atol=2e-5 if rounding else 2e-6)


def test_what_has_no_meaning_is_refused():
    p = torch.nn.Parameter(torch.zeros(3, 2))

    def refused(match: str, **settings: Any) -> None:
        with pytest.raises(ValueError, match=match):
            normopt.SteepestDescent([p], lr=0.1, **settings)

    refused("momentum_rule='heavy' starts from", bias_correction=True, momentum=0.9, momentum_rule="heavy")
    refused("did you mean 'diagonal'", metric="diag")
    refused(
        "the kernels for cpu do not have sphere with decay",
        **dict(constraint="sphere", weight_decay=0.1, decay="lp", fused=True),
    )
    for name, value in {"metric_beta": 0.9, "metric_eps": 1e-6, "metric_rule": "max"}.items():
        refused(f"{name} = .* does nothing", **{name: value})
    refused("metric_beta must be in", metric="diagonal", metric_beta=1.0)


def test_a_checkpoint_makes_no_other_optimizer():
    ours, others = make(), make()
    adam, sgd = (
        normopt.SteepestDescent(ours, **ADAM),
        normopt.SteepestDescent(others, momentum=0.9, momentum_rule="ema"),
    )
    for a, b in ((adam, sgd), (sgd, adam)):
        with pytest.raises(ValueError, match=r"would make SteepestDescent another optimizer: .*metric"):
            a.load_state_dict(b.state_dict())


@pytest.mark.parametrize("how", BACKENDS)
def test_settings_of_the_metric_follow_a_schedule(how):
    """Changed numbers are those of a new optimizer that takes over the state."""
    ours, others = make(), make()
    opt = normopt.SteepestDescent(ours, lr=0.01, **ADAM, **how)
    for step in range(3):
        give(ours, step)
        opt.step()
    new = dict(metric_beta=0.9, metric_eps=1e-3, momentum=0.5, lr=0.1)
    opt.param_groups[0].update(new)
    other = normopt.SteepestDescent(others, **(ADAM | new), **how)
    other.load_state_dict({**copy.deepcopy(opt.state_dict()), "param_groups": other.state_dict()["param_groups"]})
    for p, q in zip(ours, others, strict=True):
        q.data.copy_(p.data)
    give(ours, 3)
    give(others, 3)
    opt.step()
    other.step()
    for p, q in zip(ours, others, strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("how", [*BACKENDS, dict(fused=True)])
def test_empty_tensors_late_gradients_and_counts_of_their_own(how):
    if how.get("fused"):
        pytest.importorskip("numba")
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s)) for s in ((4, 3), (0,), (), (5,))]
    opt = normopt.SteepestDescent(params, lr=0.1, **ADAM, **how)
    for step in range(4):
        for i, p in enumerate(params):
            p.grad = torch.ones_like(p) if i <= step else None
        before = [p.detach().clone() for p in params]
        opt.step()
        for p, old in zip(params, before, strict=True):  # of a constant gradient every step is lr long
            torch.testing.assert_close(
                old - p.detach(), torch.full_like(old, 0.1 if p.grad is not None else 0.0), rtol=1e-5, atol=1e-6
            )
    assert [int(opt.state[p]["step"]) for p in params] == [4, 3, 2, 1]


def test_a_skipped_step_is_not_counted():
    pytest.importorskip("numba")
    p = torch.nn.Parameter(torch.ones(4, 3))
    opt = normopt.SteepestDescent([p], lr=0.1, **ADAM, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for factor in (1.0, math.inf, 1.0):
        opt.zero_grad()
        scaler.scale((factor * p).sum()).backward()
        scaler.step(opt)
        scaler.update()
    assert opt.state[p]["step"] == 2
    torch.testing.assert_close(p.detach(), torch.full((4, 3), 0.8))


def test_a_difference_from_a_skipped_gradient_is_left_to_the_scaler():
    pytest.importorskip("numba")
    p = torch.nn.Parameter(torch.ones(2))
    assert normopt.SteepestDescent([p], **ADAM, fused=True)._step_supports_amp_scaling
    assert not normopt.SteepestDescent([p], **ADAM, fused=True, difference_beta=0.9)._step_supports_amp_scaling


def test_autograd_goes_through_a_step():
    w = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)

    def after(w: torch.Tensor) -> torch.Tensor:
        p = torch.nn.Parameter(torch.zeros(3, 2, dtype=torch.float64))
        opt = normopt.SteepestDescent([p], lr=0.1, differentiable=True, norm="lp", p=3.0, **ADAM)
        q = p.clone()
        opt.param_groups[0]["params"] = [q]
        for k in range(2):
            q.grad = (1 + k) * w.sin()
            opt.step()
        return q

    assert torch.autograd.gradcheck(after, (w,))


@pytest.mark.parametrize("how", [*BACKENDS, pytest.param(dict(fused=True), marks=pytest.mark.exhaustive)])
def test_averages_that_did_not_begin_together_are_refused(how):
    """Nothing is written then: after a part was switched on, or a checkpoint without its count was loaded."""
    if how.get("fused"):
        pytest.importorskip("numba")
    lion = dict(momentum=0.9, momentum_rule="ema")
    cases: list[tuple[dict[str, Any], dict[str, Any]]] = [
        (lion | dict(bias_correction=True), dict(metric="diagonal")),
        (dict(metric="diagonal", bias_correction=True, momentum_rule="ema"), dict(momentum=0.9)),
        (lion | dict(metric="diagonal"), dict(bias_correction=True)),
        (lion, dict(bias_correction=True)),
    ]
    for settings, change in cases:
        p, q = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
        opt = normopt.SteepestDescent([{"params": [q]}, {"params": [p]}], lr=0.1, **settings, **how)
        for _ in range(2):
            p.grad, q.grad = torch.ones(3), torch.ones(3)
            opt.step()
        opt.param_groups[1].update(change)
        before = copy.deepcopy(([p, q], opt.state_dict()["state"]))
        with pytest.raises(RuntimeError, match="averages that began together"):
            opt.step()
        assert str(before) == str(([p, q], opt.state_dict()["state"]))
        opt.state[p].clear()
        opt.step()
        assert opt.state[p]["step"] == 1


@pytest.mark.parametrize("how", [dict(foreach=True), dict(fused=True)])
def test_the_count_is_float32_whatever_torchs_default(how):
    if how.get("fused"):
        pytest.importorskip("numba")
    torch.set_default_dtype(torch.bfloat16)
    try:
        p = torch.nn.Parameter(torch.ones(3, dtype=torch.float32))
        opt = normopt.SteepestDescent([p], lr=0.1, **ADAM, **how)
        for _ in range(300):
            p.grad = torch.ones(3, dtype=torch.float32)
            opt.step()
        assert opt.state[p]["step"] == 300
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("step", [3, 3.0, torch.tensor(3.0), torch.tensor(3)])
def test_counts_of_every_kind_load(step):
    p = torch.nn.Parameter(torch.ones(3))
    opt = normopt.SteepestDescent([p], lr=0.1, **ADAM)
    p.grad = torch.ones(3)
    opt.step()
    saved = opt.state_dict()
    saved["state"][0]["step"] = step
    opt.load_state_dict(saved)
    opt.step()
    assert opt.state[p]["step"] == 4
    assert opt.state[p]["step"].dtype == torch.float32
    for bad in (-1.0, math.nan, torch.ones(2)):
        saved["state"][0]["step"] = bad
        with pytest.raises(ValueError, match="the checkpoint's step of parameter 0"):
            opt.load_state_dict(saved)
        assert opt.state[p]["step"] == 4
