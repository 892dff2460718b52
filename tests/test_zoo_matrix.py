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


def freon(c):
    def direction(m):
        u, s, vt = svd(m)
        return ((u * s ** (1 - 2 * c)) @ vt).reshape(m.shape)

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
    "freon, c = 0 is SGD": (dict(c=0.0), lambda m: m),
    "freon, c = 1/2 is Muon's direction": (dict(c=0.5), lambda m: oracle(m, math.inf)[1]),
    "freon, HTMuon's exponent": (dict(c=0.4375), freon(0.4375)),
    "freon, beyond every norm": (dict(c=0.75), freon(0.75)),
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
            u = direction(MU * m + (1 - MU) * g)
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


def test_c_is_a_number():
    for wrong, error in (("0.5", TypeError), (math.inf, ValueError)):
        with pytest.raises(error, match="c must"):
            normopt.Freon([torch.nn.Parameter(torch.ones(2, 2))], c=wrong)
