"""p, lr and weight_decay as tensors of any dtype: the step is that of their values given as numbers."""

from __future__ import annotations

import copy
import math

import pytest
import torch

import normopt

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(), (), (1,), (1,), (0,), (0, 3), (5,), (4, 3), (4, 3)]
# A few units in the last place of what is computed in, times the exponents; a bfloat16 weight may round the other way.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-7}
every_dtype = pytest.mark.parametrize("given", DTYPES, ids=str)
paths = pytest.mark.parametrize("foreach", [False, True])


def weights(dtypes):
    """One of each shape; every second gradient is all zero, so that every kind of norm meets a zero beside it."""
    rng = torch.Generator().manual_seed(0)
    params = []
    for dtype in dtypes:
        for i, shape in enumerate(SHAPES):
            p = torch.nn.Parameter(torch.randn(shape, generator=rng, dtype=torch.float64).to(dtype))
            p.grad = (torch.randn(shape, generator=rng, dtype=torch.float64) * (i % 2 == 0)).to(dtype)
            params.append(p)
    return params


def assert_same_steps(dtypes, tensors, **settings):
    """Two steps with the tensors, and two with their values."""
    params = weights(dtypes)
    twins = [copy.deepcopy(p) for p in params]
    for p, twin in zip(params, twins, strict=True):
        twin.grad = p.grad.clone()
    ours = normopt.SteepestDescent(params, **(settings | tensors))
    theirs = normopt.SteepestDescent(twins, **(settings | {k: float(v) for k, v in tensors.items()}))
    for _ in range(2):
        ours.step()
        theirs.step()
    for p, twin in zip(params, twins, strict=True):
        assert p.isfinite().all()
        # One norm of tensors of several dtypes is as exact as the sums of the narrowest.
        tolerance = max(TOLERANCES[p.dtype], 1e-5 if settings.get("scope") == "group" else 0)
        torch.testing.assert_close(p, twin, rtol=tolerance, atol=tolerance)
        for key, value in ours.state[p].items():
            assert value.dtype == p.dtype
            torch.testing.assert_close(value, theirs.state[twin][key], rtol=tolerance, atol=tolerance)


@paths
@every_dtype
@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize("scale", ["power", "dual", "unit", "matched"])
def test_p(scale, dtype, given, foreach):
    for p in (1.0625, 1.3, 1.5, 2.0, 2.7, 3.0, 9.1, math.inf):
        tensor = torch.tensor([p], dtype=given)
        assert_same_steps([dtype], {"p": tensor}, norm="lp", scale=scale, lr=0.1, foreach=foreach)
    if scale == "power":
        p = torch.tensor(4.3, dtype=given)
        assert_same_steps([dtype], {"p": p}, norm="lp", scale=scale, lr=0.1, eps=1e-3, foreach=foreach)


@paths
@every_dtype
@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize("decay", ["coupled", "decoupled", "lp"])
def test_lr_and_weight_decay(decay, dtype, given, foreach):
    settings = dict(norm="l2", decay=decay, momentum=0.9, radius=3.0, foreach=foreach)
    lr, weight_decay = torch.tensor([0.013], dtype=given), torch.tensor(0.0123, dtype=given)
    assert_same_steps([dtype], {"lr": lr, "weight_decay": weight_decay}, **settings)
    assert_same_steps([dtype], {"lr": lr}, weight_decay=0.0123, **settings)
    assert_same_steps([dtype], {"weight_decay": weight_decay}, lr=0.013, **settings)


@paths
@every_dtype
@pytest.mark.parametrize("scope", ["tensor", "group"])
@pytest.mark.parametrize("scale", ["dual", "unit"])
def test_groups_of_mixed_dtypes(scale, scope, given, foreach):
    numbers = {"p": 2.7, "lr": 0.013, "weight_decay": 0.0123}
    tensors = {k: torch.tensor(v, dtype=given) for k, v in numbers.items()}
    for dtypes in (list(TOLERANCES), list(TOLERANCES)[::-1]):
        for decay in ("coupled", "decoupled", "lp"):
            assert_same_steps(
                dtypes, tensors, norm="lp", scale=scale, scope=scope, decay=decay, momentum=0.9, foreach=foreach
            )


@paths
@pytest.mark.parametrize("p", [1.0, 1.5, 2.0, 3.0, math.inf])
@pytest.mark.parametrize("scale", ["dual", "unit"])
def test_a_group_of_mixed_dtypes_without_a_gradient_that_is_not_zero(scale, p, foreach):
    """A norm of 0 in float64 must not be divided by in float32; nor one that is 0 in float32 only."""
    for size in (0.0, 1e-300):
        low, high = (torch.nn.Parameter(torch.ones(3, dtype=d)) for d in (torch.float32, torch.float64))
        low.grad, high.grad = torch.zeros_like(low), torch.full_like(high, size)
        opt = normopt.SteepestDescent([high, low], lr=1.0, norm="lp", p=p, scale=scale, scope="group", foreach=foreach)
        opt.step()
        assert torch.all(low == 1)
        assert high.isfinite().all()


@every_dtype
@pytest.mark.parametrize("decay", ["coupled", "decoupled", "lp"])
@pytest.mark.parametrize("scale", ["power", "dual", "unit", "matched"])
def test_fused(scale, decay, given):
    tensors = {k: torch.tensor(v, dtype=given) for k, v in dict(p=2.7, lr=0.013, weight_decay=0.0123).items()}
    assert_same_steps([torch.float32], tensors, norm="lp", scale=scale, decay=decay, momentum=0.9, fused=True)


@every_dtype
@pytest.mark.parametrize("decay", ["inside", "coupled", "decoupled", "proximal", "lp", "cautious"])
@pytest.mark.parametrize("scale", ["dual", "relative"])
def test_fused_steps_read_what_was_changed_in_place(scale, decay, given):
    found = []
    for how in (dict(fused=True), dict(foreach=False)):
        torch.manual_seed(0)
        p, strength = torch.nn.Parameter(torch.randn(8, 8)), torch.tensor(0.1, dtype=given)
        settings = dict(norm="lp", p=3.0, scale=scale, momentum=0.9, weight_decay=strength, decay=decay)
        opt = normopt.SteepestDescent([p], lr=0.1, **settings, **how)
        for factor in (1, 20, 0):
            opt.param_groups[0]["weight_decay"].mul_(factor)
            for _ in range(2):
                p.grad = torch.randn(8, 8)
                opt.step()
        found.append(p.detach())
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
