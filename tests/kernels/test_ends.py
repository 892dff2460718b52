"""The fused step and the for-loop at the ends of floating point: p near 1, ∞, NaN, huge and denormal numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import normopt
from tests.oracle import direction, lp_decay_factor

BACKENDS = {"fused": dict(fused=True), "for-loop": dict(foreach=False), "foreach": dict(foreach=True)}
SCALES = ["power", "dual", "unit", "matched"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", ["dual", "unit", "matched"])
@pytest.mark.parametrize("p", [1.0005, 1.001, 1.005, 1.007, 1.01, 1.016, 1.02, 1.1])
def test_p_near_1(p, scale, backend):
    """q = p/(p−1) is 11 to 2001. Each rounding of a ratio, 2⁻²⁴, comes out q times as large."""
    for mantissa in (0.51, 1.0, 1.37, 1.99):
        torch.manual_seed(0)
        w = torch.nn.Parameter(torch.zeros(9000))
        w.grad = torch.randn(9000)
        w.grad[7] = 4.5 * mantissa
        normopt.SteepestDescent([w], lr=1.0, norm="lp", p=p, scale=scale, **BACKENDS[backend]).step()
        (u,) = direction([w.grad.double().numpy()], p, scale)
        error = np.abs(-w.detach().double().numpy() - u).max() / np.abs(u).max()
        assert error < 1e-7 + p / (p - 1) * 2**-24 * 3


def class_of(x):
    """0 for finite entries, 1 for ∞, 2 for −∞, 3 for NaN."""
    return x.isnan() * 3 + (x == math.inf) * 1 + (x == -math.inf) * 2


ODD = {
    "inf": [math.inf],
    "-inf": [-math.inf],
    "nan": [math.nan],
    "inf and -inf": [math.inf, -math.inf],
    "inf and nan": [math.inf, math.nan],
    "3e38": [3e38],
    "3e38 twice": [3e38, 3e38],
    "1e-42": [1e-42],
    "zeros": None,
}


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("agr", [False, True])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("p", [1.005, 1.5, 2.0, 2.7, 3.0, math.inf])
def test_backends_agree_entry_by_entry(p, scale, agr, momentum):
    for values in ODD.values():
        found = []
        for how in BACKENDS.values():
            torch.manual_seed(0)
            params = [torch.nn.Parameter(torch.randn(s)) for s in ((50,), (9000,), (60, 2))]
            for k, x in enumerate(params):
                x.grad = torch.randn_like(x)
                flat = x.grad.view(-1)
                if values is None and k == 1:
                    flat.zero_()
                elif values is not None and k < 2:
                    at = 7 if k == 0 else 5000  # in the second of three chunks
                    flat[at : at + len(values)] = torch.tensor(values)
                flat[3] = 0.0
            rule = dict(momentum=momentum, momentum_rule="ema" if momentum else "heavy")
            normopt.SteepestDescent(params, lr=0.01, norm="lp", p=p, scale=scale, agr=agr, **rule, **how).step()
            found.append([x.detach() for x in params])
        for others in found[:1] + found[2:]:
            for a, b in zip(others, found[1], strict=True):
                assert torch.equal(class_of(a), class_of(b))
                fine = b.isfinite()
                size = torch.maximum(b.abs(), b[fine].abs().max() * 1e-3) if fine.any() else b
                assert ((a - b).abs()[fine] <= 2e-4 * size[fine]).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("decay_p", [0.3, 0.5, 1.0, 1.5, 2.0, 3.0])
def test_lp_decay_of_huge_weights(decay_p, backend):
    """|w|^(2−p) overflows, its factor does not: they keep their place."""
    values = [1e25, -3e38, 1e38, 1e-3, -2.0, 0.0]
    w = torch.nn.Parameter(torch.tensor([values]))
    w.grad = torch.ones_like(w)
    how = BACKENDS[backend]
    normopt.SignSGD([w], lr=0.01, weight_decay=0.1, decay="lp", decay_p=decay_p, **how).step()
    old = w.grad.new_tensor(values).double().numpy()
    expected = (old - 0.01) * lp_decay_factor(old, decay_p, 0.01 * 0.1)
    np.testing.assert_allclose(w.detach()[0].double().numpy(), expected, rtol=2e-6)
    infinite = torch.nn.Parameter(torch.tensor([[math.inf, -math.inf, math.nan]]))
    infinite.grad = torch.ones_like(infinite)
    normopt.SignSGD([infinite], lr=0.01, weight_decay=0.1, decay="lp", decay_p=decay_p, **how).step()
    expected = [math.inf, -math.inf] if decay_p <= 2 else [math.nan, math.nan]  # ∞·0, beyond 2
    np.testing.assert_array_equal(infinite.detach()[0], [*expected, math.nan])
