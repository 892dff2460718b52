"""The matrix half of the zoo against NumPy: each rule from its formula, 20 steps, each from the oracle's own state."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import normopt
from tests.norms.test_schatten import oracle

SHAPES = [(6, 4), (4, 6), (5, 2, 3), (7,), (3, 3)]
LR, MU, LAM = 0.05, 0.9, 0.1


def svd(m):
    y = m.reshape(len(m), -1) if m.ndim > 1 else m.reshape(-1, 1)
    return np.linalg.svd(y, full_matrices=False)


def freon(c, scale="unit"):
    """The paper's formula: (GGᵀ)^(−c) G with G = m/‖m‖_Sq, q = 2 − 2c; or without the division."""

    def direction(m):
        u, s, vt = svd(m)
        s = s * (s > np.finfo(float).eps * max(len(u), len(vt.T)) * s[0])
        positive = s[s > 0] / s[0]
        norm = s[0] * (positive ** (2 - 2 * c)).sum() ** (1 / (2 - 2 * c)) if positive.size and scale == "unit" else 1
        r = np.zeros_like(s)
        r[s > 0] = (s[s > 0] / norm) ** (1 - 2 * c)
        return ((u * r) @ vt).reshape(m.shape)

    return direction


def aspect(m):
    y = m.reshape(len(m), -1) if m.ndim > 1 else m.reshape(-1, 1)
    return math.sqrt(max(1, y.shape[0] / y.shape[1]))


def rows(m):
    y = m.reshape(len(m), -1) if m.ndim > 1 else m.reshape(-1, 1)
    return (y / np.linalg.norm(y, axis=1, keepdims=True)).reshape(m.shape)


RULES = {
    "muon": (dict(method="svd", nesterov=False), lambda m: aspect(m) * oracle(m, math.inf)[1]),
    "spectralsgd": (dict(), lambda m: oracle(m, math.inf)[0] * oracle(m, math.inf)[1]),
    "nucgd": (dict(), lambda m: oracle(m, 1.0)[1]),  # Lanczos, with more steps than there are rows or columns
    "nucgd, by SVD": (dict(method="svd"), lambda m: oracle(m, 1.0)[1]),
    "rownormsgd": (dict(), rows),
    "freon": (dict(c=0.25), freon(0.25)),
    "freon, c = 0 is normalized SGD": (dict(c=0.0), lambda m: m / np.linalg.norm(m)),
    "freon, c = 1/2 is Muon's direction": (dict(c=0.5), lambda m: oracle(m, math.inf)[1]),
    "freon, beyond every norm": (dict(c=0.75), freon(0.75)),
    "freon, not divided by its norm": (dict(c=0.25, scale="power"), freon(0.25, "power")),
    "freon, HTMuon's exponent": (dict(c=0.4375, scale="power"), freon(0.4375, "power")),
}


@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
@pytest.mark.parametrize("name", RULES)
def test_every_rule(name, dtype, tol):
    settings, direction = RULES[name]
    rng = np.random.default_rng(4)
    for _ in range(20):
        ws, gs, ms = ([rng.standard_normal(s) for s in SHAPES] for _ in range(3))
        params = [torch.nn.Parameter(torch.tensor(w).to(dtype)) for w in ws]
        opt = normopt.get_optimizer(name.split(",")[0])(
            params, lr=LR, momentum=MU, weight_decay=LAM, state_dtype=str(dtype)[6:], **settings
        )
        for p, g, m in zip(params, gs, ms, strict=True):
            p.grad = torch.tensor(g).to(dtype)
            opt.state[p]["momentum_buffer"] = torch.tensor(m).to(dtype)
        opt.step()
        for p, w, g, m in zip(params, ws, gs, ms, strict=True):
            heavy = opt.param_groups[0]["momentum_rule"] == "heavy"
            u = direction(MU * m + (1.0 if heavy else 1 - MU) * g)
            expected = (1 - LR * LAM) * w - LR * u
            error = np.abs(p.detach().double().numpy() - expected).max()
            assert error <= tol * max(np.abs(w).max(), LR * np.abs(u).max())


def test_muons_own_defaults_train_a_matrix():
    torch.manual_seed(0)
    w = torch.nn.Parameter(torch.zeros(12, 8))
    target = torch.randn(12, 8)
    opt = normopt.Muon([w], lr=0.05)
    for _ in range(200):
        opt.zero_grad()
        (w - target).square().sum().backward()
        opt.step()
    assert float((w.detach() - target).square().mean()) < 0.01
    assert "newton-schulz" in opt.backend()


MATRICES = {
    "tall": np.random.default_rng(0).standard_normal((7, 4)),
    "wide": np.random.default_rng(1).standard_normal((3, 8)),
    "rank-deficient": np.outer([1.0, -2, 3, 0], [1.0, 1, -1]) + np.outer([0.0, 1, 1, 5], [2.0, 0, 1]),
    "zero": np.zeros((4, 3)),
}


@pytest.mark.parametrize("c", [0.25, 0.5, 0.6, 2 / 3])
def test_the_length_of_freons_step_does_not_depend_on_the_gradients(c):
    """From a zero momentum and beyond the first step, a gradient of any size makes the step that the paper says."""
    for size in (1.0, 1e-3, 1e-305, 1e300):
        params = [torch.nn.Parameter(torch.zeros(m.shape, dtype=torch.float64)) for m in MATRICES.values()]
        opt = normopt.Freon(params, lr=1.0, c=c, momentum=0.5)
        for factor in (1.0, 3.0):  # m = g, then m = 0.5g + 3g
            for p, m in zip(params, MATRICES.values(), strict=True):
                p.data.zero_()
                p.grad = torch.tensor(m * factor * size)
            opt.step()
            for p, (name, m) in zip(params, MATRICES.items(), strict=True):
                expected = freon(c)(m)
                error = np.abs(-p.detach().numpy() - expected).max()
                assert error <= 1e-12 * np.abs(expected).max(), (name, size)
        (pair,) = opt.norm_pairs()
        assert float(pair.update) == 1
    ours = normopt.Freon(params[:1], lr=1.0, c=2 / 3, momentum=0.0, scale="power")
    steps = []
    for size in (1.0, 1e-3):
        params[0].data.zero_()
        params[0].grad = torch.tensor(MATRICES["tall"] * size)
        ours.step()
        steps.append(float(params[0].detach().norm()))
    assert steps[1] == pytest.approx(10 * steps[0])  # 1000^(2c−1)


def test_freons_c_is_a_number_below_one():
    w = [torch.nn.Parameter(torch.ones(2, 2))]
    for wrong, error in (("0.5", TypeError), (math.inf, ValueError)):
        with pytest.raises(error, match="c must"):
            normopt.Freon(w, c=wrong)
    with pytest.raises(ValueError, match="q = 2 − 2c = 0 ≤ 0"):
        normopt.Freon(w, c=1.0)
    assert normopt.Freon(w, c=1.0, scale="power").param_groups[0]["norm_exponent"] == -1
    with pytest.raises(ValueError, match="scale must be one of"):
        normopt.Freon(w, scale="dual")
    opt = normopt.Freon(w)
    opt.param_groups[0]["norm_exponent"] = -1.5  # as a schedule may
    with pytest.raises(ValueError, match="above −1"):
        opt.step()
