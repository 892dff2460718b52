"""Adan, LAMB, LARS, NorMuon, Stacey, the sphere and kinds of decay: the oracle's 50 steps, and refusals."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch

import normopt
from tests.oracle import Rule

SHAPES = [(13, 7), (40,), (5, 3, 2), (1,)]
EMA: dict[str, Any] = dict(momentum=0.9, momentum_rule="ema")
ADAM: dict[str, Any] = EMA | dict(bias_correction=True, metric="diagonal", metric_beta=0.99)
SPECTRAL: dict[str, Any] = dict(norm="spectral", norm_method="svd", scale="unit", momentum=0.9, momentum_rule="ema")
CASES: dict[str, dict[str, Any]] = {
    "adan": ADAM | dict(difference_beta=0.92, weight_decay=0.1, decay="proximal", agr=True),
    "adan without prox": ADAM | dict(difference_beta=0.92, weight_decay=0.1, maximize=True),
    "differences without correction": EMA | dict(difference_beta=0.5, weight_decay=0.1, decay="coupled"),
    "lamb": ADAM | dict(scale="relative", weight_decay=0.1, decay="inside"),
    "lars": EMA | dict(scale="relative", weight_decay=0.1, decay="coupled"),
    "relative signs": EMA | dict(norm="linf", p=None, scale="relative", weight_decay=0.1, radius=0.5),
    "relative lp": ADAM | dict(norm="lp", p=3.0, scale="relative", decay="lp", weight_decay=0.1, decay_p=0.8),
    "normuon": SPECTRAL | dict(row_beta=0.95, nesterov=True, weight_decay=0.1),
    "normuon on a sphere": SPECTRAL | dict(row_beta=0.9, constraint="sphere"),
    "hyperball": ADAM | dict(constraint="sphere"),
    "sphere with lp decay": EMA | dict(norm="lp", p=3.0, constraint="sphere", weight_decay=0.5, decay="lp", radius=0.5),
    "stacey": dict(
        **dict(norm="lp", p=3.0, scale="power", eps=1e-4, momentum=0.9, momentum_rule="lion", beta2=0.999),
        **dict(coupling=0.1, coupling_rate=0.02, weight_decay=0.1),
    ),
    "coupling with lp decay": EMA | dict(coupling=0.3, weight_decay=0.1, decay="lp", decay_p=1.5, radius=2.0),
    "cautious": ADAM | dict(weight_decay=0.5, decay="cautious"),
    "cautious lp": ADAM | dict(weight_decay=0.5, decay="cautious-lp", decay_p=0.8),
    "agr over the group": ADAM | dict(agr=True, agr_scope="group"),
}


def make(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return [torch.nn.Parameter(torch.randn(s, dtype=wide).to(dtype)) for s in SHAPES]


def give(params: list[torch.nn.Parameter], step: int) -> None:
    torch.manual_seed(1000 + step)
    for p in params:
        wide = torch.complex128 if p.is_complex() else torch.float64
        p.grad = (10.0 ** (step % 3 - 1) * torch.randn(p.shape, dtype=wide)).to(p.dtype)


def oracle_of(settings: dict[str, Any], lr: float) -> Rule:
    kept = {k: v for k, v in settings.items() if not k.startswith("norm") and v is not None}
    kept |= {"linf": dict(p=math.inf), "spectral": dict(spectral=True)}.get(settings.get("norm", ""), {})
    return Rule(lr=lr, **kept)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("how", [dict(foreach=False), dict(foreach=True)])
@pytest.mark.parametrize("name", CASES)
def test_fifty_steps_of_the_oracle(name, how, dtype):
    settings, lr = CASES[name], 0.01
    ours = make(dtype)
    opt = normopt.SteepestDescent(ours, lr=lr, **settings, **how)
    oracle, ws = oracle_of(settings, lr), [x.detach().double().numpy().copy() for x in ours]
    ms: list[Any] = [None] * len(ws)
    for step in range(50):
        give(ours, step)
        if dtype == torch.float32:  # from the oracle's weights, so that errors of rounding do not add up
            for x, w in zip(ours, ws, strict=True):
                x.data.copy_(torch.from_numpy(w))
        opt.step()
        ws, ms = oracle.step(ws, [x.grad.double().numpy() for x in ours], ms)
        bound = 1e-12 if dtype == torch.float64 else 2e-6
        for x, w, u in zip(ours, ws, oracle.u, strict=True):
            size = np.maximum(np.abs(w), lr * np.abs(u)).max()
            np.testing.assert_allclose(x.detach().double().numpy(), w, rtol=0, atol=bound * (1 + step) ** 0.5 * size)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("adan", torch.complex64),
        ("hyperball", torch.complex64),
        ("stacey", torch.complex64),
        *((name, dtype) for name in ("adan", "stacey") for dtype in (torch.float32, torch.bfloat16)),
        ("normuon on a sphere", torch.bfloat16),
    ],
)
def test_a_resumed_run_goes_on_bit_for_bit(name, dtype, tmp_path):
    settings = dict(lr=0.01, **CASES[name]) | (dict(rounding="kahan") if dtype == torch.bfloat16 else {})

    def go(params: list[torch.nn.Parameter], opt: normopt.SteepestDescent, first: int) -> None:
        for step in range(first, first + 3):
            give(params, step)
            opt.step()

    ours = make(dtype)
    opt = normopt.SteepestDescent(ours, **settings)
    go(ours, opt, 0)
    torch.save(opt.state_dict(), tmp_path / "state.pt")
    others = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    other = normopt.SteepestDescent(others, **settings)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    go(ours, opt, 3)
    go(others, other, 3)
    for p, q in zip(ours, others, strict=True):
        assert torch.equal(p, q)
        assert opt.state[p].keys() == other.state[q].keys()
        for key, x in opt.state[p].items():
            assert torch.equal(x, other.state[q][key])
            assert x.dtype == other.state[q][key].dtype


@pytest.mark.parametrize("steps", [200, pytest.param(10_000, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("rounding", ["nearest", "kahan", None])
@pytest.mark.parametrize("fused", [False, True])
def test_the_norm_stays_on_the_sphere(fused, rounding, steps):
    if fused:
        pytest.importorskip("numba")
    dtype = torch.float32 if rounding is None else torch.bfloat16
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(128, 64).to(dtype))
    length = float(p.detach().double().norm())
    how = dict(rounding=rounding or "nearest", fused=fused)
    opt = normopt.SteepestDescent([p], lr=0.02, constraint="sphere", **how, **ADAM)
    for _ in range(steps):
        p.grad = torch.randn_like(p)
        opt.step()
        whole = p.detach().double()
        if rounding == "kahan":
            whole = whole + opt.state[p]["kahan_compensation"].double()
        error = abs(float(whole.norm()) / length - 1)
        assert error <= (1e-6 if rounding in (None, "kahan") else 1e-3)  # a first step may round all entries one way


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_on_the_sphere_a_step_of_no_length_changes_nothing(dtype):
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(64, 64, dtype=dtype))
    opt = normopt.SteepestDescent([p], lr=0.0, constraint="sphere")
    for lr in (0.0, 0.1, 0.0, 0.1, 0.0):
        opt.param_groups[0]["lr"] = lr
        p.grad, before = torch.randn_like(p), p.detach().clone()
        opt.step()
        assert torch.equal(p, before) == (lr == 0)


def test_autograd_goes_through_the_sphere():
    w = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)

    def after(w: torch.Tensor) -> torch.Tensor:
        p = torch.nn.Parameter(torch.ones(3, 2, dtype=torch.float64))
        opt = normopt.SteepestDescent([p], lr=0.1, differentiable=True, constraint="sphere", **ADAM)
        q = p.clone()
        opt.param_groups[0]["params"] = [q]
        for k in range(2):
            q.grad = (1 + k) * w.sin()
            opt.step()
        return q

    assert torch.autograd.gradcheck(after, (w,))


def test_rows_of_several_dtypes_in_one_group():
    params = [torch.nn.Parameter(torch.randn(4, 5)), torch.nn.Parameter(torch.randn(3, 5).double())]
    opt = normopt.NorMuon(params, lr=0.1, agr=True, agr_scope="group")
    for _ in range(2):
        for p in params:
            p.grad = torch.randn_like(p)
        opt.step()
    assert [opt.state[p]["row_avg_sq"].dtype for p in params] == [torch.float32, torch.float64]


def test_what_a_sphere_refuses():
    model = torch.nn.Linear(3, 2)
    torch.nn.init.zeros_(model.bias)
    with pytest.raises(ValueError, match="all entries are zero in bias: initialise"):
        normopt.SGD(model.named_parameters(), lr=0.1, constraint="sphere")
    opt = normopt.SGD(model.parameters(), lr=0.1)
    opt.param_groups[0]["constraint"] = "sphere"
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = copy.deepcopy(list(model.parameters()))
    with pytest.raises(ValueError, match=r"all entries are zero in a parameter of shape \(2,\)"):
        opt.step()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    for settings, match in (
        (dict(weight_decay=0.1), "which weight decay would shrink"),
        (dict(norm="l1", scope="group"), "keeps the norm of each tensor"),
    ):
        with pytest.raises(ValueError, match=match):
            normopt.SteepestDescent([model.weight], lr=0.1, constraint="sphere", **settings)


def test_what_has_no_meaning_is_refused():
    p = torch.nn.Parameter(torch.ones(3, 2))
    for settings, match in (
        (dict(row_beta=0.9), "divides the rows of unit steps under a norm of matrices"),
        (dict(row_beta=0.9, norm="spectral", scale="dual"), "divides the rows of unit steps"),
        (dict(coupling=0.1, metric="diagonal"), "follows c in the plain coordinates"),
        (dict(scale="relative", scope="group"), 'scope="group" needs scale="dual" or "unit"'),
        (dict(scale="matched", weight_decay=0.1, decay="inside"), 'decay="inside" is added to a direction under'),
        (dict(agr_scope="group"), "agr_scope = 'group' does nothing"),
        (dict(coupling_rate=0.1), "coupling_rate = 0.1 does nothing"),
        (dict(decay="cautious-lp"), "decay = 'cautious-lp' does nothing"),
    ):
        with pytest.raises(ValueError, match=match):
            normopt.SteepestDescent([p], lr=0.1, **settings)


def test_a_correction_of_nothing_is_told():
    p = torch.nn.Parameter(torch.ones(3, 2))
    with pytest.warns(UserWarning, match="bias_correction = True does nothing without an average"):
        normopt.SteepestDescent([p], lr=0.1, bias_correction=True, metric="diagonal", metric_rule="sum")
    normopt.SteepestDescent([p], lr=0.1, bias_correction=True, difference_beta=0.5)


def test_relative_steps_of_zero_weights_are_those_of_dual():
    """Tiny gradients, too: the length of the step is that of the weights."""
    p, q = torch.nn.Parameter(torch.zeros(3, 2)), torch.nn.Parameter(torch.ones(3, 2))
    opt = normopt.SteepestDescent([p, q], lr=0.1, scale="relative")
    p.grad, q.grad = torch.full((3, 2), 2.0), torch.full((3, 2), 1e-41)
    opt.step()
    torch.testing.assert_close(p.detach(), torch.full((3, 2), -0.2))
    torch.testing.assert_close(q.detach(), torch.full((3, 2), 0.9))
    q.grad = torch.zeros(3, 2)
    opt.step()
    torch.testing.assert_close(q.detach(), torch.full((3, 2), 0.9))


def test_state_of_another_shape_is_refused():
    p = torch.nn.Parameter(torch.randn(4, 3))
    opt = normopt.SteepestDescent([p], lr=0.1, row_beta=0.9, **SPECTRAL)
    p.grad = torch.randn(4, 3)
    opt.step()
    assert opt.state[p]["row_avg_sq"].shape == (4, 1)
    saved = copy.deepcopy(opt.state_dict())
    saved["state"][0]["row_avg_sq"] = torch.zeros(3, 1)
    with pytest.raises(ValueError, match=r"row_avg_sq of parameter 0 has the shape \(3, 1\), not \(4, 1\)"):
        opt.load_state_dict(saved)
    opt.state[p]["row_avg_sq"] = torch.zeros(3, 1)
    with pytest.raises(RuntimeError, match="'row_avg_sq' of a parameter of shape"):
        opt.step()
