"""Scion and SCALE against NumPy: the published rules, 20 recorded steps, each from the oracle's own state."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import normopt
from normopt.norms import registry

STEPS, LR = 20, 0.1
DTYPES = pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])


def rms(x, axis=None):
    return np.sqrt(np.mean(x**2, axis=axis, keepdims=True))


def spectral(g):
    """√(d_out/d_in)·UVᵀ, and 1/k² of it for the k × k kernel of a convolution."""
    u, _, vt = np.linalg.svd(g.reshape(len(g), -1), full_matrices=False)
    return math.sqrt(g.shape[0] / g.shape[1]) / math.prod(g.shape[2:]) * (u @ vt).reshape(g.shape)


def sign(g):
    return np.sign(g) / g.shape[1]


def col_norm(g):
    """Of the d_out × vocabulary matrix, which an embedding's table is the transpose of."""
    matrix = g.T
    return (matrix / rms(matrix, axis=0)).T


def bias_rms(g):
    return g / rms(g)


def unit_rms(g):
    """SCALE: the weights of each output unit by their RMS."""
    y = g.reshape(len(g), -1)
    return (y / rms(y, axis=1)).reshape(g.shape)


# Shape, radius, published lmo (up to its sign), and the settings that ask for it.
SCION = [
    ((6, 4), 3.0, spectral, dict()),
    ((4, 6), 8.0, spectral, dict()),
    ((5, 2, 3, 3), 8.0, spectral, dict()),
    ((3, 9), 128.0, sign, dict(norm="max", norm_aspect="fan-in")),
    ((10, 4), 2.0, col_norm, dict(norm="column", norm_aspect="rows", norm_matrix_view="transposed")),
    ((7,), 2.0, bias_rms, dict(norm="frobenius", norm_aspect="entries")),
]
# Shape, momentum, direction, settings.
SCALE = [
    ((6, 4), 0.0, unit_rms, dict()),
    ((5, 2, 3, 3), 0.0, unit_rms, dict()),
    ((10, 4), 0.0, lambda g: unit_rms(g.T).T, dict(norm_matrix_view="transposed")),
    ((3, 9), 0.9, unit_rms, dict(momentum=0.9)),
]


@pytest.fixture(scope="module")
def recorded():
    """20 gradients of every shape, of sizes from 1e-4 to 1e2."""
    rng = np.random.default_rng(6)
    shapes = {layer[0] for layer in SCION + SCALE}
    return {s: [10 ** rng.uniform(-4, 2) * rng.standard_normal(s) for _ in range(STEPS)] for s in sorted(shapes)}


def compare(make, layers, rule, recorded, dtype, tol):
    """``rule`` takes (layer, w, m, g) to (w, m, η·|u|); normopt must do the same, from the same state."""
    for layer in layers:
        shape, settings = layer[0], layer[3]
        w, m = np.random.default_rng(0).standard_normal(shape), np.zeros(shape)
        for g in recorded[shape]:
            w, m, g = (torch.tensor(x).to(dtype).double().numpy() for x in (w, m, g))
            p = torch.nn.Parameter(torch.tensor(w).to(dtype))
            p.grad = torch.tensor(g).to(dtype)
            opt = make([{"params": [p], **settings}], layer)
            if opt.param_groups[0]["momentum"]:
                opt.state[p]["momentum_buffer"] = torch.tensor(m).to(dtype)
            opt.step()
            new_w, new_m, step = rule(layer, w, m, g)
            error = np.abs(p.detach().double().numpy() - new_w).max()
            assert error <= tol * max(np.abs(w).max(), step), layer
            if opt.param_groups[0]["momentum"]:
                buffer = opt.state[p]["momentum_buffer"].double().numpy()
                np.testing.assert_allclose(buffer, new_m, rtol=0, atol=tol * np.abs(new_m).max())
            else:
                assert not opt.state
            w, m = new_w, new_m


@DTYPES
@pytest.mark.parametrize("constrained", [True, False])
@pytest.mark.parametrize("alpha", [0.1, 1.0])
def test_scion_is_the_published_rule(alpha, constrained, dtype, tol, recorded):
    def rule(layer, w, d, g):
        _, rho, lmo, _ = layer
        d = (1 - alpha) * d + alpha * g
        step = LR * rho * lmo(d)
        return ((1 - LR) * w if constrained else w) - step, d, np.abs(step).max()

    def make(groups, layer):
        decay = {} if constrained else {"weight_decay": 0.0}  # λ = 1 is the default
        return normopt.Scion(groups, lr=LR, momentum=1 - alpha, radius=layer[1], method="svd", **decay)

    compare(make, SCION, rule, recorded, dtype, tol)


@DTYPES
def test_scale_is_the_published_rule(dtype, tol, recorded):
    def rule(layer, w, m, g):
        m = layer[1] * m + (1 - layer[1]) * g
        step = LR * layer[2](m)
        return w - step, m, np.abs(step).max()

    compare(lambda groups, layer: normopt.SCALE(groups, lr=LR), SCALE, rule, recorded, dtype, tol)


@pytest.mark.parametrize("layer", SCION, ids=lambda layer: str(layer[0]))
@pytest.mark.parametrize("weight_decay", [1.0, 0.5])
def test_what_starts_in_the_ball_stays_in_it(layer, weight_decay):
    """‖w‖ ≤ r/λ: every step ends between the weights and a point of the ball's edge. Without the decay it leaves."""
    shape, radius, _, settings = layer
    torch.manual_seed(0)
    for lam, stays in ((weight_decay, True), (0.0, False)):
        p = torch.nn.Parameter(torch.randn(shape, dtype=torch.float64))
        opt = normopt.Scion([{"params": [p], **settings}], lr=0.3, radius=radius, weight_decay=lam, method="svd")
        norm = registry.build(opt.param_groups[0])
        ball = radius / weight_decay
        with torch.no_grad():
            p.mul_(ball / norm.norm(p))  # on its edge
        steady = torch.randn_like(p)  # pulls the weights to one point of the edge
        sizes = []
        for _ in range(40):
            p.grad = steady + torch.randn_like(p)
            opt.step()
            sizes.append(float(norm.norm(p.detach())))
        assert (max(sizes) <= ball * (1 + 1e-12)) == stays
        assert sizes[-1] > 0.5 * ball


def test_newton_schulz_may_leave_the_ball_by_the_error_of_its_polynomial():
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.zeros(64, 32))
    opt = normopt.Scion([p], lr=0.3)
    p.grad = torch.randn_like(p)
    for _ in range(40):
        opt.step()
    assert 1.0 < float(registry.build(opt.param_groups[0]).norm(p.detach())) / 50 < 1.2
