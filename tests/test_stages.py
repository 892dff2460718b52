"""The stages at their edges, where formulas that are right on paper go wrong in floating point."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import normopt
from normopt.stages.agr import agr
from normopt.stages.decay import lp_factors
from tests import oracle


def test_agr_where_one_entry_dominates():
    """1 − |g|/Σ|g| would be exactly 0 in float32 here; the entry's true factor is r/(x + r)."""
    g = torch.tensor([1.0, 1e-12, 2e-12])
    (out,) = agr([g])
    assert float(out[0]) == pytest.approx(3e-12, rel=1e-6)
    np.testing.assert_allclose(out.numpy(), oracle.agr(g.double().numpy()), rtol=1e-6)


@pytest.mark.parametrize("shape", [(40, 30), (7,), (2,), (3, 2, 2, 2)])
def test_agr_is_an_order_preserving_soft_cap(shape):
    g = torch.randn(shape, dtype=torch.float64) ** 5
    before = g.clone()
    (out,) = agr([g])
    assert torch.equal(g, before)
    np.testing.assert_allclose(out.numpy(), oracle.agr(g.numpy()), rtol=1e-12)
    assert torch.all(out.abs() <= g.abs())
    assert torch.all(torch.sign(out) == torch.sign(g))


def test_agr_leaves_alone_what_it_would_erase():
    one, nothing, zeros = torch.tensor(3.0), torch.empty(0, 2), torch.zeros(4)
    for x, y in zip((one, nothing, zeros), agr([one, nothing, zeros]), strict=True):
        assert torch.equal(x, y)
    assert agr([torch.tensor([1.0, math.nan])])[0].isnan().all()


def test_agr_at_magnitudes_whose_sum_overflows():
    g = torch.full((100_000,), 1e34)
    torch.testing.assert_close(agr([g])[0], g * (1 - 1e-5))
    alone = torch.tensor([0.0, 3.0, 0.0])
    assert not agr([alone])[0].any()  # the formula's own: 1 − 3/3


@pytest.mark.parametrize("p", [0.3, 0.8, 1.0, 1.5, 2.0, 3.0, 4.5])
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_lp_factors_against_the_oracle(p, tensor_lr):
    w = torch.cat([torch.zeros(3), torch.logspace(-12, 2, 50), -torch.logspace(-12, 2, 50)]).double()
    for lr_decay in (0.0, 1e-9, 1e-3, 10.0):
        k = torch.tensor(lr_decay, dtype=torch.float64) if tensor_lr else lr_decay
        (factor,) = lp_factors([w], p, k)
        np.testing.assert_allclose(factor.numpy(), oracle.lp_decay_factor(w.numpy(), p, lr_decay), rtol=1e-13)
        assert torch.all((factor >= 0) & (factor <= 1))
        if lr_decay == 0:
            assert torch.all(factor == 1)


def test_lp_factors_of_huge_weights_are_one():
    for p in (0.1, 0.3, 0.8, 1.5, 3.0):
        (factor,) = lp_factors([torch.tensor([1e25, 1e35, math.inf])], p, 1e-3)
        assert torch.all((factor == 1) | (torch.tensor(p) >= 2))


def weights_after(steps, w, **settings):
    w = torch.nn.Parameter(w.clone())
    opt = normopt.SGD([w], **settings)
    for _ in range(steps):
        w.grad = torch.zeros_like(w)
        opt.step()
    return w.detach()


def test_lp_decay_reaches_exact_zero_below_p_2_and_never_above():
    w = torch.full((3, 3), 1e-3)
    assert not weights_after(200, w, lr=0.1, weight_decay=0.1, decay="lp", decay_p=0.8).any()
    assert weights_after(200, w, lr=0.1, weight_decay=0.1, decay="lp", decay_p=3.0).all()


def test_lp_decay_at_p_2_is_decoupled_decay_of_twice_the_strength_to_first_order():
    w = torch.randn(4, 4, dtype=torch.float64)
    lp = weights_after(1, w, lr=0.1, weight_decay=1e-4, decay="lp", decay_p=2.0)
    decoupled = weights_after(1, w, lr=0.1, weight_decay=2e-4, decay="decoupled")
    torch.testing.assert_close(lp, decoupled, rtol=1e-9, atol=0)


def test_lp_decay_spares_vectors():
    for w in (torch.ones(5), torch.tensor(1.0)):
        assert torch.equal(weights_after(10, w, lr=0.1, weight_decay=0.5, decay="lp", decay_p=0.8), w)


def test_lp_decay_uses_the_old_weight():
    w = torch.nn.Parameter(torch.full((1, 2), 0.5, dtype=torch.float64))
    w.grad = torch.full_like(w, 4.0)
    normopt.SGD([w], lr=0.1, weight_decay=0.2, decay="lp", decay_p=1.0).step()
    assert w.detach().numpy() == pytest.approx((0.5 - 0.4) * 0.5 / (0.5 + 0.1 * 0.2))


def test_a_tensor_that_decay_would_hold_at_zero_warns():
    zero = torch.nn.Parameter(torch.zeros(2, 2))
    settings = dict(weight_decay=0.1, decay="lp")
    with pytest.warns(UserWarning, match="all zero"):
        normopt.SGD([zero], decay_p=0.8, **settings)
    normopt.SGD([zero], decay_p=2.0, **settings)
    normopt.SGD([torch.nn.Parameter(torch.zeros(2))], decay_p=0.8, **settings)
    other = torch.nn.Parameter(torch.ones(2, 2))
    normopt.SGD([{"params": [zero]}, {"params": [other], "weight_decay": 0.1}], decay_p=0.8, decay="lp")


@pytest.mark.parametrize("backend", [dict(foreach=False), dict(foreach=True), dict(fused=True)], ids=str)
def test_a_frozen_tensor_is_not_warned_of(backend):
    w, frozen = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.zeros(3, 5), requires_grad=False)
    settings = dict(lr=0.1, weight_decay=0.1, decay="lp", decay_p=0.8, **backend)
    w.grad = torch.ones_like(w)
    normopt.SGD([w, frozen], **settings).step()
    assert w.detach().numpy() == pytest.approx((1 - 0.1) / (1 + 0.1 * 0.8 * 0.1))
    assert not frozen.any()
    with pytest.warns(UserWarning, match=r"all zero: \[\(2, 2\)\]\."):
        normopt.SGD([w, torch.nn.Parameter(torch.zeros(2, 2)), frozen], **settings)
