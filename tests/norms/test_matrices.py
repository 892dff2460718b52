"""What all matrix norms share: aspects and views, which operator norms they are, and that nothing is overwritten."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

import normopt
from normopt.norms import MatrixNorm, Mixed, Schatten, registry
from tests.norms.test_operator import by_lines
from tests.norms.test_schatten import matrices, oracle

# f of so many rows, columns and taps, written anew.
FACTORS = {
    "none": lambda m, n, taps: 1,
    "rms": lambda m, n, taps: (m / n / taps) ** 0.5,
    "rows": lambda m, n, taps: m**0.5,
    "columns": lambda m, n, taps: n**0.5,
    "entries": lambda m, n, taps: (m * n) ** 0.5,
    "fan-in": lambda m, n, taps: 1 / n,
    "original": lambda m, n, taps: max(1, m / n) ** 0.5,
    "match_rms_adamw": lambda m, n, taps: 0.2 * max(m, n) ** 0.5,
}
NAMED = {
    "nuclear": lambda x: oracle(x, 1.0),
    "frobenius": lambda x: oracle(x, 2.0),
    "spectral": lambda x: oracle(x, math.inf),
    "row": lambda x: by_lines(x, 2.0, math.inf, "rows"),
    "column": lambda x: by_lines(x, 2.0, math.inf, "columns"),
    "max-row": lambda x: by_lines(x, 1.0, math.inf, "rows"),
    "max": lambda x: (np.abs(x).sum(), np.sign(x)),
}


def test_a_matrix_norm_of_ones_own_is_given_whole_matrices():
    class Own(MatrixNorm):
        def norm(self, x):
            return x.norm()

        def pairs(self, c):
            return [(x.norm(), x / x.norm()) for x in c]

    assert {Own().needs(scale) for scale in ("power", "dual", "unit", "matched")} == {"matrix"}


def named(name, **fields):
    return registry.build({"norm": name} | {registry.setting_key(k): v for k, v in fields.items()})


@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("aspect", FACTORS)
@pytest.mark.parametrize("name", NAMED)
def test_duality_of_every_named_norm_under_every_aspect(name, aspect, dtype, tol):
    n = named(name, aspect=aspect)
    cases = matrices(dtype)
    cases["convolution"] = cases["square"].new_tensor(np.random.default_rng(1).standard_normal((6, 4, 3, 3)))
    for case, x in cases.items():
        y = x.double().numpy()
        rows = y.shape[0] if y.ndim > 1 else y.size
        f = FACTORS[aspect](rows, y.size // rows, math.prod(y.shape[2:])) if y.size else 1
        expected, expected_d = NAMED[name](y) if y.any() else (0.0, np.zeros_like(y))
        dual, d = n.dual_norm(x), n.dual_map(x)
        assert float(dual) == pytest.approx(f * expected, rel=tol), case
        # Where σ is small D turns by ε/σ, whoever computes it: float32 has no say there.
        if dtype == torch.float64 or case not in ("conditioned", "rank-deficient"):
            np.testing.assert_allclose(d.double().numpy(), f * expected_d, rtol=0, atol=10 * tol * f, err_msg=case)
        assert float((x.double() * d.double()).sum()) == pytest.approx(float(dual), rel=tol), case
        assert float(n.norm(d)) == pytest.approx(1.0 if y.any() else 0.0, rel=tol), case


@pytest.mark.parametrize("k", [1, 3, 5])
def test_the_factor_of_a_convolution_is_that_of_its_channels_over_its_taps(k):
    x = torch.randn(8, 2, k, k, dtype=torch.float64)
    u, _, vt = torch.linalg.svd(x.flatten(1), full_matrices=False)
    expected = math.sqrt(8 / 2) / k**2 * (u @ vt).reshape(x.shape)
    torch.testing.assert_close(named("spectral", aspect="rms").dual_map(x), expected)
    # Turned round, as a transposed convolution's in × out × k × k.
    turned = named("spectral", aspect="rms", matrix_view="transposed").dual_map(x.transpose(0, 1))
    torch.testing.assert_close(turned, expected.transpose(0, 1))
    # A stack of k matrices has no taps, and blocks are matrices of their own.
    stack = named("spectral", aspect="rms", matrix_view="batch").dual_map(x[0])
    torch.testing.assert_close(stack[0], named("spectral").dual_map(x[0, 0]))
    halves = named("spectral", aspect="rms", blocks=2).dual_map(x).chunk(2)
    for half, part in zip(halves, x.chunk(2), strict=True):
        torch.testing.assert_close(half, named("spectral", aspect="rms").dual_map(part))


def axes(n):
    return np.eye(n)  # the corners of the ℓ1 ball, up to their signs, which no norm sees


def signs(n):
    return np.array(list(itertools.product((-1.0, 1.0), repeat=n)))  # those of the ℓ∞ ball


def rms(y):
    return np.sqrt(np.mean(y**2, axis=0))


@pytest.mark.parametrize(
    ("norm", "corners", "size"),
    [
        (Mixed(2.0, math.inf, lines="columns"), axes, lambda y: np.linalg.norm(y, axis=0)),
        (Mixed(1.0, math.inf), signs, lambda y: np.abs(y).max(axis=0)),
        (Mixed(math.inf, math.inf), axes, lambda y: np.abs(y).max(axis=0)),
        (Mixed(2.0, math.inf, lines="columns", aspect="rows"), axes, rms),
    ],
    ids=["column: ℓ1 → ℓ2", "max-row: ℓ∞ → ℓ∞", "max: ℓ1 → ℓ∞", "column, rows: ℓ1 → RMS"],
)
def test_operator_norms_by_brute_force(norm, corners, size):
    """A convex function of x is largest at a corner of the ball: all of them are tried."""
    for w in np.random.default_rng(0).standard_normal((20, 5, 9)):
        largest = size(w @ corners(9).T).max()
        assert float(norm.norm(torch.tensor(w))) == pytest.approx(largest, rel=1e-12)


@pytest.mark.parametrize(
    ("norm", "size", "unit"),
    [
        (Mixed(2.0, math.inf), lambda y: np.abs(y).max(axis=0), lambda x: np.linalg.norm(x, axis=0)),
        (Schatten(math.inf), lambda y: np.linalg.norm(y, axis=0), lambda x: np.linalg.norm(x, axis=0)),
        (Schatten(math.inf, aspect="rms"), rms, rms),
    ],
    ids=["row: ℓ2 → ℓ∞", "spectral: ℓ2 → ℓ2", "spectral, rms: RMS → RMS"],
)
def test_operator_norms_of_a_round_ball(norm, size, unit):
    """No x of many beats it, and the best of them come close; rows and singular vectors reach it."""
    rng = np.random.default_rng(0)
    for w in rng.standard_normal((20, 5, 3)):
        xs = np.concatenate([rng.standard_normal((3, 20_000)), w.T, np.linalg.svd(w)[2].T], axis=1)
        assert float(norm.norm(torch.tensor(w))) == pytest.approx((size(w @ xs) / unit(xs)).max(), rel=1e-12)


# Each registered norm of this package, with every method.
EVERY_NORM = [
    *(named(name) for name in ("l1", "l2", "linf", "frobenius", "nuclear", "spectral")),
    *(named(name) for name in ("row", "column", "max-row", "max")),
    named("lp", p=3.0),
    named("schatten", p=3.0),
    named("mixed", p_inner=3.0, p_outer=1.5),
    named("nuclear", method="lanczos"),
    *(
        named("spectral", method=m, dtype=d)
        for m in ("newton-schulz", "polar-express")
        for d in ("float32", "bfloat16")
    ),
    named("frobenius", aspect="entries"),
    named("column", aspect="rows", matrix_view="transposed"),
]


def test_every_registered_norm_is_in_that_list():
    ours = {name for name in normopt.norms.list_norms() if registry.lookup(name).cls.__module__.startswith("normopt.")}
    for name in ours:
        entry = registry.lookup(name)
        assert any(
            type(n) is entry.cls and all(getattr(n, f) == value for f, value in entry.fixed.items()) for n in EVERY_NORM
        ), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", EVERY_NORM, ids=repr)
def test_no_map_writes_its_input_or_shares_its_memory(norm, dtype):
    torch.manual_seed(0)
    for shape in ((6, 4), (4, 6), (5, 5), (7,), (1, 1), (4, 2, 3, 3)):
        x = torch.randn(shape).to(dtype)
        before = x.clone()
        work = x.float()
        maps = [norm.dual_map(x), norm.dual_map([x])[0], norm.scaled([work], 0, False)[0][0]]
        maps += [norm.scaled([work], 1, False)[0][0]]
        norm.dual_norm(x)
        norm.norm(x)
        if norm.power_exponent is not None:
            maps.append(norm.power([work])[0])
        assert torch.equal(x, before)
        assert torch.equal(work, before.float())
        for d in maps:
            assert d.data_ptr() not in (x.data_ptr(), work.data_ptr())
            d.fill_(0)  # and so is every part of it its own
        assert torch.equal(x, before)
        assert torch.equal(work, before.float())


def test_only_matrix_norms_have_an_aspect():
    for norm in EVERY_NORM:
        assert hasattr(norm, "aspect") == isinstance(norm, MatrixNorm)
    for bad in ("spectral", "max"):
        with pytest.raises(ValueError, match="aspect must be one of"):
            named(bad, aspect="square")
