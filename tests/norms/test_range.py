"""Gradients whose entries float32 holds and whose norm it does not: the step is still that of the rule."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import normopt
from normopt.norms import Lp, Mixed, Schatten
from normopt.stages.agr import agr
from tests import oracle
from tests.directions import direction
from tests.norms import test_operator, test_schatten

PS = [1.0, 1.01, 1.3, 1.5, 2.0, 3.0, 8.0, 64.0, math.inf]
# Below the smallest normal number, 1.2e-38, entries are multiples of 1.4e-45.
SIZES = [3e38, 1e38, 1e-37, 1e-39, 1e-42, 3e-45]
MATRIX_NORMS = [
    *(Schatten(p) for p in (1.0, 1.5, 2.0, 3.0, math.inf)),
    Schatten(1.0, method="lanczos", steps=8),
    Schatten(math.inf, aspect="rms"),
    *(
        Mixed(a, b, lines=c)
        for a in (1.0, 1.5, 2.0, math.inf)
        for b in (1.0, 3.0, math.inf)
        for c in ("rows", "columns")
    ),
    Mixed(2.0, math.inf, aspect="fan-in"),
]
paths = pytest.mark.parametrize("path", [dict(foreach=False), dict(foreach=True)], ids=str)
PATHS = pytest.mark.parametrize("path", [dict(foreach=False), dict(foreach=True), dict(fused=True)], ids=str)  # of ℓp


def gradient(size, shape, seed=0):
    """Entries of up to ``size``, a tenth of them 0."""
    rng = np.random.default_rng(seed)
    x = size * rng.uniform(0.3, 1, shape) * rng.choice([-1, 1], shape) * (rng.random(shape) > 0.1)
    return torch.tensor(x, dtype=torch.float32)


def steps(gradients, **settings):
    """From w = 0 with lr = 1 the new weights are −u."""
    params = [torch.nn.Parameter(torch.zeros_like(g)) for g in gradients]
    for p, g in zip(params, gradients, strict=True):
        p.grad = g.clone()
    normopt.SteepestDescent(params, lr=1.0, **settings).step()
    return [-p.detach() for p in params]


def assert_is(u, expected, rtol, fused=False):
    """As float32 has it: what is beyond its range is ∞, and the last place of the smallest is absolute.

    A fused step takes a power, of |c|/‖c‖⋆, below the smallest normal number as 0.
    """
    limits = torch.finfo(torch.float32)
    u, expected = u.double().numpy(), np.asarray(expected, dtype=np.float64)
    clear = (np.abs(expected) < limits.max * (1 - rtol)) | (np.abs(expected) > limits.max * (1 + rtol))
    expected = in_float32(expected)
    # What is 1e-38 of the largest entry is nothing beside it.
    atol = max(2e-45, (100 if fused else 1) * limits.tiny * min(np.abs(expected).max(initial=0), limits.max))
    np.testing.assert_allclose(u[clear], expected[clear], rtol=rtol, atol=atol)


def in_float32(x):
    """x where float32 has it, ∞ beyond."""
    return np.where(np.abs(x) > torch.finfo(torch.float32).max, np.copysign(np.inf, x), x)


@PATHS
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scale", ["unit", "dual", "matched"])
@pytest.mark.parametrize("p", PS)
def test_lp(p, scale, size, path):
    if p == 1 and "fused" in path:
        pytest.skip("no kernel")
    gradients = [gradient(size, s, seed) for seed, s in enumerate([(40, 30), (7,), (), (1,), (3,)])]
    gradients[-1].zero_()
    found = steps(gradients, norm="lp", p=p, scale=scale, **path)
    expected = oracle.direction([g.double().numpy() for g in gradients], p, scale)
    for u, e in zip(found, expected, strict=True):
        assert_is(u, e, 3e-6 * (max(1, 1 / (p - 1)) if 1 < p < math.inf else 1), "fused" in path)


@pytest.mark.parametrize("path", [{"foreach": False}, {"foreach": True}], ids=str)
@pytest.mark.parametrize("sizes", [(3e38, 1e38), (1e38, 1e30), (1e-39, 1e-42), (3e-45, 3e-45)])
@pytest.mark.parametrize("scale", ["unit", "dual"])
@pytest.mark.parametrize("p", PS)
def test_lp_over_a_group_and_with_a_tensor_p(p, scale, sizes, path):
    rtol = 1e-5 * (max(1, 1 / (p - 1)) if 1 < p < math.inf else 1)
    gradients = [gradient(size, (20, 30), seed) for seed, size in enumerate(sizes)]
    expected = oracle.direction([g.double().numpy() for g in gradients], p, scale, scope="group")
    for order in (p,) if p == 1 else (p, torch.tensor(p, dtype=torch.float64)):
        found = steps(gradients, norm="lp", p=order, scale=scale, scope="group", **path)
        assert_is(torch.stack(found), np.stack(expected), rtol, False)


def by_rule(norm, x):
    """(‖x‖⋆, D(x)) in float64, which has the range."""
    x = x.double()
    if isinstance(norm, Schatten):
        dual, d = test_schatten.oracle(x.numpy(), norm.p)
    else:
        # One power of two for all, under which NumPy's float64 has room for every power.
        dual, d = test_operator.by_lines(x.numpy() * 2.0**64, norm.p_inner, norm.p_outer, norm.lines)
        dual *= 2.0**-64
    (f,) = norm.factors(x.shape)
    return f * dual, f * d


@paths
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scale", ["unit", "dual", "matched"])
@pytest.mark.parametrize("norm", MATRIX_NORMS, ids=repr)
def test_matrix_norms(norm, scale, size, path):
    gradients = [gradient(size, s, seed) for seed, s in enumerate([(8, 11), (11, 8), (8, 11), (7,)])]
    found = steps(gradients, norm=norm, scale=scale, **path)
    for u, g in zip(found, gradients, strict=True):
        dual, d = by_rule(norm, g)
        length = np.linalg.norm(g.double().numpy() * 2.0**64) * 2.0**-64 / np.linalg.norm(d)
        factor = {"unit": 1.0, "dual": dual, "matched": length}[scale]
        rounding = 3e-6 * np.abs(d).max() * factor  # of a decomposition, in every entry
        e = d * factor
        u = u.double().numpy()
        over = np.abs(e) > torch.finfo(torch.float32).max * (1 - 1e-5)
        assert np.all(np.abs(u[over]) > 3.4e38)
        np.testing.assert_allclose(u[~over], e[~over], rtol=1e-5, atol=rounding + 2e-45)


@paths
@pytest.mark.parametrize("size", [*SIZES, 1.0])
@pytest.mark.parametrize("scale", ["unit", "dual"])
@pytest.mark.parametrize("make", [lambda **k: Mixed(2.0, 3.0, **k), lambda **k: Schatten(3.0, **k)])
def test_stacks_of_matrices(make, scale, size, path):
    """The dual norm is the sum of theirs, the map theirs one by one."""
    g = torch.stack([gradient(size, (6, 5), seed) for seed in range(3)])
    each = [by_rule(make(), x) for x in g]
    factor = sum(n for n, _ in each) if scale == "dual" else 1
    expected = factor * np.stack([d for _, d in each])
    for norm, x in (
        (make(matrix_view="batch"), g),
        (make(blocks=3), g.reshape(18, 5)),
        (make(blocks=(6, 6, 6)), g.reshape(18, 5)),
    ):
        (u,) = steps([x], norm=norm, scale=scale, **path)
        tolerance = 1e-5 * min(np.abs(expected).max(), 1e38) + 2e-45
        np.testing.assert_allclose(u.double().numpy().reshape(3, 6, 5), in_float32(expected), rtol=1e-5, atol=tolerance)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("exponent", [-0.5, 0.125, 0.5])
def test_powers_of_singular_values(exponent, size):
    g = gradient(size, (8, 11))
    u, s, vt = np.linalg.svd(g.double().numpy(), full_matrices=False)
    expected = (u * s**exponent) @ vt
    (found,) = Schatten(math.inf, exponent=exponent).power([g])
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("method", ["newton-schulz", "polar-express"])
@pytest.mark.parametrize("scale", ["unit", "dual"])
def test_iterations(scale, method, dtype, size):
    """A power of two changes no bit of the direction; the dual step is ⟨c, D(c)⟩ long."""
    norm = Schatten(math.inf, method=method, dtype=dtype)
    g = gradient(size, (8, 11))
    middle = g * (2.0**-100 if size > 1 else 2.0**120)
    d = norm.dual_map(middle)
    (u,), _ = direction(norm, [g], scale, False, 0.0)
    if scale == "unit":
        torch.testing.assert_close(u, d, rtol=1e-5, atol=1e-6)
    else:
        assert_is(u, (d.double() * (g.double() * d.double()).sum()).numpy(), rtol=1e-5)


@paths
@pytest.mark.parametrize("scale", ["unit", "dual", "matched"])
@pytest.mark.parametrize("p_inner", [1.0, 1.5, 2.0, math.inf])
def test_every_line_has_a_norm_of_its_own(p_inner, scale, path):
    """Rows of 3e38, 1, 1e-39 and 1e-44 in one matrix; each is a unit vector of the direction."""
    sizes = (3e38, 1.0, 1e-39, 1e-44)
    g = torch.stack([gradient(size, (30,), seed) for seed, size in enumerate(sizes)])
    norm = Mixed(p_inner, math.inf)
    (u,) = steps([g], norm=norm, scale=scale, **path)
    rows = [row.double().numpy() for row in g]
    d = np.stack([oracle.lp_dual_map(row, p_inner) for row in rows])
    dual = float(sum(oracle.lp_dual_norm(row, p_inner) for row in rows))
    length = np.linalg.norm(g.double().numpy()) / np.linalg.norm(d)
    assert_is(u, d * {"unit": 1.0, "dual": dual, "matched": length}[scale], rtol=1e-5)


@PATHS
@pytest.mark.parametrize("size", SIZES)
def test_agr(size, path):
    gradients = [gradient(size, s, seed) for seed, s in enumerate([(40, 30), (2,), (7,)])]
    gradients[2][1:] *= 1e-3  # one entry dominates
    found = steps(gradients, norm="l2", agr=True, **path)
    for u, g in zip(found, gradients, strict=True):
        assert_is(u, oracle.agr(g.double().numpy()), rtol=3e-6)


def test_agr_of_pieces():
    from normopt.stages import agr as stage

    for size in SIZES:
        g = gradient(size, (60,))
        g[40] *= 3 if size < 1 else 1
        pieces = list(g.split(20))
        scalars = stage.combine(stage.measure(pieces)[None]).expand(3, -1)
        torch.testing.assert_close(
            torch.cat(stage.apply(pieces, scalars, [60] * 3)), agr([g])[0], rtol=1e-5, atol=2e-45
        )


@paths
@pytest.mark.parametrize("norm", [*map(Lp, PS), *MATRIX_NORMS], ids=repr)
def test_what_is_not_finite_stays_so(norm, path):
    for bad in (math.nan, math.inf):
        g = torch.ones(6, 7)
        g[2, 3] = bad
        for scale in ("unit", "dual", "matched"):
            (u,) = steps([g], norm=norm, scale=scale, **path)
            if math.isnan(bad) or scale == "dual":
                assert not u.isfinite().all()


@pytest.mark.parametrize("size", SIZES)
def test_the_measured_norms_are_right_where_float32_has_them(size):
    for norm in (Lp(3.0), Schatten(3.0), Schatten(1.0), Mixed(2.0, 3.0)):
        for scale in ("unit", "dual", "matched"):
            g = gradient(size, (8, 11))
            _, pair = direction(norm, [g], scale, False, 0.0)
            dual = float(oracle.lp_dual_norm(g.double().numpy(), 3.0)) if isinstance(norm, Lp) else by_rule(norm, g)[0]
            assert_is(pair.dual[0], dual, rtol=1e-5)
