"""ℓp norms: the duality identities by property test, and every magnitude against the oracle."""

from __future__ import annotations

import math

import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from normopt.norms import Lp
from tests.directions import direction
from tests.oracle import lp_dual_map, lp_dual_norm, lp_norm

PS = [1.0, 1.01, 1.5, 2.0, 3.0, 4.0, 8.0, 64.0, 128.0, math.inf]  # 1e-30 to the 128th is still a longdouble
MAGNITUDES = [10.0**k for k in range(-30, 31, 3)]

orders = st.one_of(st.sampled_from([*PS, 1e6]), st.floats(1.05, 100.0))
dtypes = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])
LAYOUTS = ["plain", "transposed", "strided", "channels_last"]


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Tensors of every dtype, shape (0-d, empty, up to 4-d), layout and magnitude, with zeros among them."""
    dtype = draw(dtypes)
    shape = draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5))
    values = draw(hnp.arrays(np.float64, shape, elements=st.floats(-1, 1, allow_subnormal=False)))
    exponent = draw(st.integers(-30, 30)) if dtype in (torch.float32, torch.float64, torch.bfloat16) else 0
    x = torch.tensor(values * 10.0**exponent).to(dtype)
    layout = draw(st.sampled_from(LAYOUTS))
    if layout == "transposed" and x.dim() >= 2:
        return x.transpose(0, -1)
    if layout == "strided" and x.dim() >= 1:
        return torch.stack([x, x + 1], -1)[..., 0]
    if layout == "channels_last" and x.dim() == 4:
        return x.contiguous(memory_format=torch.channels_last)
    return x


def tolerance(x: torch.Tensor, p: float) -> float:
    """Roundoff, times what the exponents of the norm and of its dual make of it."""
    eps = max(torch.finfo(x.dtype).eps, torch.finfo(torch.float32).eps * (x.dtype != torch.float64))
    exponents = 1 if p in (1, math.inf) else max(p, p / (p - 1))
    return 8 * eps * min(exponents, 200) + (5 * eps if x.dtype in (torch.float16, torch.bfloat16) else 0)


@given(tensors(), orders)
@settings(max_examples=400, deadline=None)
def test_duality_identities(x, p):
    n = Lp(p)
    before = x.clone()
    d, dual = n.dual_map(x), n.dual_norm(x)
    assert torch.equal(x, before)
    assert d.shape == x.shape
    assert d.dtype == x.dtype
    assert d.numel() == 0 or d.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
    tol = tolerance(x, p)
    inner = float((x.double() * d.double()).sum())
    # Subnormal results carry fewer bits than the identity is stated in.
    assert inner == pytest.approx(float(dual), rel=tol, abs=2e-37)
    assert float(n.norm(d.double())) <= 1 + tol
    assert torch.all(d[x == 0] == 0)
    if dual == 0:
        assert not d.any()


@given(tensors(), orders, st.sampled_from([0.5, 2.0, -4.0]))
@settings(max_examples=200, deadline=None)
def test_homogeneous_of_degree_one_and_zero(x, p, t):
    """Powers of two scale without rounding, so the dual map must not move at all under them."""
    if not (x * t / t == x).all():
        return  # a 16-bit value that left its range
    n = Lp(p)
    assert float(n.dual_norm(x * t)) == pytest.approx(abs(t) * float(n.dual_norm(x)), rel=1e-6, abs=2e-37)
    if x.numel() and x.dtype == torch.float64:
        torch.testing.assert_close(n.dual_map(x * t), math.copysign(1, t) * n.dual_map(x), rtol=1e-12, atol=0)


@given(tensors(), orders)
@settings(max_examples=100, deadline=None)
def test_nan_is_never_hidden(x, p):
    if x.numel() == 0:
        return
    x = x.clone()
    x[(-1,) * x.dim()] = math.nan
    n = Lp(p)
    assert n.dual_norm(x).isnan()
    assert n.norm(x).isnan()
    d = n.dual_map(x)
    assert d.isnan().any()
    if p > 1:
        assert n.power([x.float()])[0].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("p", PS)
def test_every_magnitude_against_the_oracle(p, dtype):
    rng = np.random.default_rng(3)
    rtol = (1e-12 if dtype == torch.float64 else 2e-6) * (1 if p in (1, math.inf) else max(1, min(1 / (p - 1), 100)))
    for magnitude in MAGNITUDES:
        for spread in (1, 1e4):  # entries of one size, and of many
            x = rng.standard_normal((20, 30)) * spread ** rng.uniform(-1, 1, (20, 30))
            x = torch.tensor(x / np.abs(x).max() * magnitude).to(dtype)
            if dtype == torch.float32 and magnitude <= 1e-30 and spread > 1:
                x = torch.where(x.abs() < 1e-36, 0, x)  # keep clear of float32's subnormals
            ref = x.double().numpy()
            n = Lp(p)
            assert float(n.norm(x)) == pytest.approx(float(lp_norm(ref, p)), rel=rtol)
            assert float(n.dual_norm(x)) == pytest.approx(float(lp_dual_norm(ref, p)), rel=rtol)
            d = n.dual_map(x).double().numpy()
            np.testing.assert_allclose(d, lp_dual_map(ref, p), rtol=rtol, atol=1e-37)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("p", [1.01, 1.1, 1.5, 3.0])
def test_the_dual_map_of_subnormals_is_that_of_what_they_are_multiples_of(p, dtype):
    whole = torch.tensor([3.0, -700.0, 0.0, 690.0, 41.0, 699.0], dtype=dtype)
    least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # the smallest positive number
    x = whole * least
    assert (x[whole != 0] != 0).all()
    rtol = (1e-14 if dtype == torch.float64 else 1e-6) * max(1, 1 / (p - 1))
    torch.testing.assert_close(Lp(p).dual_map(x), Lp(p).dual_map(whole), rtol=rtol, atol=1e-37)


def test_p_1_is_one_hot_at_the_first_of_equals():
    x = torch.tensor([[1.0, -3.0], [3.0, -3.0]])
    assert Lp(1).dual_map(x).tolist() == [[0, -1], [0, 0]]
    assert float(Lp(1).dual_norm(x)) == 3


@pytest.mark.parametrize("p", [1.5, 2.0, 3.0, 8.0, math.inf])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_tensor_p_gives_what_the_number_gives(p, dtype):
    """Exactly at p = 2 and ∞, where a number takes a path of its own; to roundoff elsewhere."""
    torch.manual_seed(0)
    x = torch.randn(30, 20, dtype=dtype) * torch.logspace(-20, 0, 20, dtype=dtype)
    x[0, 0], x[1] = 0, x[1] * 1e-18
    number, tensor = Lp(p), Lp(torch.tensor([p], dtype=torch.float64))
    tol = (
        dict(rtol=0, atol=0)
        if p in (2.0, math.inf)
        else dict(rtol=1e-12 if dtype == torch.float64 else 1e-5, atol=1e-37)
    )
    torch.testing.assert_close(
        tensor.dual_map(x), number.dual_map(x), **(tol if p == math.inf else tol | dict(rtol=1e-6))
    )
    torch.testing.assert_close(tensor.dual_norm(x), number.dual_norm(x), rtol=1e-6, atol=0)
    torch.testing.assert_close(tensor.power([x])[0], number.power([x])[0], **tol)
    for scale in ("dual", "matched"):
        ours, theirs = (direction(n, [x], scale, False, 0.0)[0][0] for n in (tensor, number))
        torch.testing.assert_close(ours, theirs, **(tol if scale == "dual" and p == 2 else dict(rtol=1e-5, atol=0)))
    x[2, 2] = math.nan
    assert tensor.power([x])[0].isnan().sum() == 1


def test_a_tensor_p_is_one_float():
    for wrong in (torch.ones(2), torch.tensor(3)):
        with pytest.raises(ValueError, match="1-element"):
            Lp(wrong)


def test_lists_are_batches():
    xs = [torch.randn(3, 4), torch.randn(5), torch.tensor(2.0), torch.empty(0)]
    n = Lp(3.0)
    assert [float(v) for v in n.dual_norm(xs)] == [float(n.dual_norm(x)) for x in xs]
    for d, x in zip(n.dual_map(xs), xs, strict=True):
        assert torch.equal(d, n.dual_map(x))


def test_infinite_entries_have_infinite_norm():
    x = torch.tensor([1.0, -math.inf])
    assert all(Lp(p).norm(x) == math.inf and Lp(p).dual_norm(x) == math.inf for p in PS)
    assert Lp(math.inf).dual_map(x).tolist() == [1, -1]


def test_16_bit_norms_do_not_overflow():
    x = torch.full((1000,), 6e4, dtype=torch.float16)
    assert float(Lp(1).norm(x)) == pytest.approx(6e7, rel=1e-3)


@pytest.mark.parametrize("p", [0.5, 0, -1, math.nan])
def test_no_norm_below_one(p):
    with pytest.raises(ValueError, match="p must be in"):
        Lp(p)


@pytest.mark.parametrize("p", ["3", None, True])
def test_p_is_a_number(p):
    with pytest.raises(TypeError, match="p must be a number"):
        Lp(p)


def test_only_real_floats():
    with pytest.raises(TypeError, match="real floating-point"):
        Lp(2).dual_map(torch.tensor([1, 2]))
    with pytest.raises(TypeError, match="real floating-point"):
        Lp(2).norm(torch.tensor([1j]))


def test_power_is_undefined_at_p_1():
    with pytest.raises(ValueError, match="not defined at p = 1"):
        Lp(1).power([torch.ones(2)])


@pytest.mark.parametrize("record", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_sign_is_that_of_every_number(dtype, record):
    """With and without autograd, for which the sign is computed differently."""
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    x = torch.tensor([0.0, smallest, -smallest, 1.0, -3.0, torch.inf, -torch.inf, torch.finfo(dtype).max], dtype=dtype)
    with torch.set_grad_enabled(record):
        (u,) = Lp(math.inf).power([x])
        (nan,) = Lp(math.inf).power([torch.tensor([torch.nan, 1.0], dtype=dtype)])
    assert u.tolist() == [0, 1, -1, 1, -1, 1, -1, 1]
    assert nan[0].isnan()
    assert nan[1] == 1
