"""Schatten norms: duality on every kind of matrix, the stated errors of the fast paths, and torch's Muon."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import normopt
from normopt.norms import Lp, Schatten
from tests.versions import NEEDS_MUON

PS = [1.0, 1.5, 2.0, 3.0, 8.0, math.inf]


def matrices(dtype):
    """Random, rank-deficient, zero, tall, wide, 1×n, n×1, badly scaled and badly conditioned matrices."""
    rng = np.random.default_rng(5)
    wide = rng.standard_normal((6, 11))
    deficient = rng.standard_normal((8, 3)) @ rng.standard_normal((3, 7))
    conditioned = np.linalg.qr(rng.standard_normal((6, 6)))[0] * 10.0 ** -np.arange(6)
    cases = {
        "wide": wide,
        "tall": wide.T.copy(),
        "square": rng.standard_normal((7, 7)),
        "rank-deficient": deficient,
        "zero": np.zeros((4, 5)),
        "row": rng.standard_normal((1, 9)),
        "column": rng.standard_normal((9, 1)),
        "vector": rng.standard_normal(9),
        "scalar": np.array(-2.5),
        "empty": np.zeros((0, 3)),
        "conditioned": conditioned,
    }
    for exponent in (-30, -10, 10, 30):
        cases[f"1e{exponent}"] = wide * 10.0**exponent
    return {name: torch.tensor(x).to(dtype) for name, x in cases.items()}


def oracle(x: np.ndarray, p: float) -> tuple[float, np.ndarray]:
    """Dual norm and dual map from NumPy's SVD, in the formula's own form."""
    if x.size == 0 or not x.any():
        return 0.0, np.zeros_like(x)
    y = x.reshape(len(x), -1) if x.ndim > 1 else x.reshape(-1, 1)
    u, s, vt = np.linalg.svd(y, full_matrices=False)
    s = np.where(s > np.finfo(np.float64).eps * max(y.shape) * s[0], s, 0)
    if p == 1:
        return s[0], (u[:, :1] @ vt[:1]).reshape(x.shape)
    q = 1.0 if p == math.inf else p / (p - 1)
    n = s[0] * ((s / s[0]) ** q).sum() ** (1 / q)
    r = (s > 0) * (s / n) ** (q - 1)
    return n, ((u * r) @ vt).reshape(x.shape)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("p", PS)
def test_duality_identities(p, dtype):
    tol = 1e-10 if dtype == torch.float64 else 1e-5
    n = Schatten(p)
    for name, x in matrices(dtype).items():
        before = x.clone()
        d, dual = n.dual_map(x), n.dual_norm(x)
        assert torch.equal(x, before), name
        assert d.shape == x.shape
        assert d.dtype == dtype
        inner = float((x.double() * d.double()).sum())
        assert inner == pytest.approx(float(dual), rel=tol), name
        assert float(n.norm(d)) == pytest.approx(1.0 if x.any() else 0.0, rel=tol, abs=tol), name
        assert float(dual) == pytest.approx(float(oracle(x.double().numpy(), p)[0]), rel=tol), name
        # Homogeneous: powers of two change no bit.
        assert torch.equal(n.dual_map(x * 4), d), name


@pytest.mark.parametrize("p", PS)
def test_the_map_is_the_oracles(p):
    for name, x in matrices(torch.float64).items():
        d = Schatten(p).dual_map(x).numpy()
        np.testing.assert_allclose(d, oracle(x.numpy(), p)[1], rtol=1e-8, atol=1e-10, err_msg=name)


def test_frobenius_is_l2_bit_for_bit():
    for x in matrices(torch.float32).values():
        assert torch.equal(Schatten(2.0).dual_map(x), Lp(2.0).dual_map(x))
        assert torch.equal(Schatten(2.0).dual_norm(x), Lp(2.0).dual_norm(x))


def test_nan_is_never_hidden_and_one_bad_matrix_spoils_no_other():
    good, bad = torch.randn(4, 5), torch.randn(4, 5)
    bad[1, 1] = math.nan
    for p in PS:
        n = Schatten(p)
        first, second = n.dual_map([bad, good])
        assert first.isnan().any()
        assert torch.equal(second, n.dual_map(good))
        assert n.dual_norm(bad).isnan()


def test_batches_equal_singles():
    torch.manual_seed(0)
    xs = [torch.randn(6, 4) for _ in range(3)] + [torch.randn(4, 6), torch.randn(5, 2, 3), torch.randn(7)]
    for n in (Schatten(3.0), Schatten(math.inf), Schatten(math.inf, method="polar-express")):
        for scale in ("unit", "dual", "matched"):
            ps = [torch.nn.Parameter(torch.zeros_like(x)) for x in xs]
            for foreach in (False, True):
                for p, x in zip(ps, xs, strict=True):
                    p.data.zero_()
                    p.grad = x
                normopt.SteepestDescent(ps, lr=1.0, norm=n, scale=scale, foreach=foreach).step()
                for p, x in zip(ps, xs, strict=True):
                    d = n.dual_map(x)
                    factor = {"unit": 1, "dual": n.dual_norm(x), "matched": x.norm() / d.norm()}[scale]
                    torch.testing.assert_close(-p.detach(), d * factor, rtol=1e-4, atol=1e-5)


def test_views_and_blocks():
    torch.manual_seed(0)
    spectral = Schatten(math.inf)
    conv = torch.randn(6, 3, 2, 2)
    torch.testing.assert_close(spectral.dual_map(conv), spectral.dual_map(conv.flatten(1)).reshape(conv.shape))
    experts = torch.randn(4, 5, 3)
    batch = Schatten(math.inf, matrix_view="batch")
    for i in range(4):
        torch.testing.assert_close(batch.dual_map(experts)[i], spectral.dual_map(experts[i]))
    assert float(batch.dual_norm(experts)) == pytest.approx(
        sum(float(spectral.dual_norm(e)) for e in experts), rel=1e-5
    )
    assert float(batch.norm(experts)) == pytest.approx(max(float(spectral.norm(e)) for e in experts), rel=1e-5)
    table = torch.randn(10, 4)
    turned = Schatten(math.inf, matrix_view="transposed", aspect="rms")
    torch.testing.assert_close(turned.dual_map(table), spectral.dual_map(table) * (4 / 10) ** 0.5)
    kernel = torch.randn(3, 5, 2, 2)  # a transposed convolution: in × out × k × k
    as_conv = spectral.dual_map(kernel.transpose(0, 1)).transpose(0, 1)
    torch.testing.assert_close(Schatten(math.inf, matrix_view="transposed").dual_map(kernel), as_conv)
    fused = torch.randn(12, 5)
    q, k, v = fused.chunk(3)
    split = Schatten(math.inf, blocks=3).dual_map(fused)
    torch.testing.assert_close(split, torch.cat([spectral.dual_map(b) for b in (q, k, v)]))


@pytest.mark.parametrize("aspect", ["none", "rms", "original", "match_rms_adamw"])
def test_aspect_factors_keep_duality(aspect):
    x = torch.randn(9, 4, dtype=torch.float64)
    n = Schatten(math.inf, aspect=aspect)
    d = n.dual_map(x)
    assert float((x * d).sum()) == pytest.approx(float(n.dual_norm(x)))
    assert float(n.norm(d)) == pytest.approx(1.0)
    factor = {"none": 1, "rms": 1.5, "original": 1.5, "match_rms_adamw": 0.6}[aspect]
    assert float(torch.linalg.svdvals(d)[0]) == pytest.approx(factor)


@pytest.mark.parametrize("exponent", [0.125, -0.5, 0.0, 1.0, 2.0])
def test_power_raises_the_singular_values(exponent):
    for x in (torch.randn(5, 8, dtype=torch.float64), torch.zeros(3, 3, dtype=torch.float64)):
        u, s, vt = torch.linalg.svd(x, full_matrices=False)
        expected = (u * torch.where(s > 0, s**exponent, 0)) @ vt
        (ours,) = Schatten(math.inf, exponent=exponent).power([x])
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)
    (by_p,) = Schatten(5.0).power([x])
    torch.testing.assert_close(by_p, Schatten(math.inf, exponent=0.25).power([x])[0])


def test_an_exponent_takes_the_place_of_p():
    """1/(p−1) as an exponent is that norm; a negative one keeps ⟨x, D(x)⟩ = ‖x‖⋆, homogeneity and every scale."""
    for x in matrices(torch.float64).values():
        for exponent, p in ((0.0, math.inf), (0.25, 5.0), (1.0, 2.0)):
            n, same = Schatten(math.inf, exponent=exponent), Schatten(p)
            torch.testing.assert_close(n.dual_map(x), same.dual_map(x), rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(n.dual_norm(x), same.dual_norm(x))
            torch.testing.assert_close(n.norm(x), same.norm(x))
        beyond = Schatten(math.inf, exponent=-0.25)
        d, dual = beyond.dual_map(x), beyond.dual_norm(x)
        torch.testing.assert_close((x * d).sum(), dual)
        assert torch.equal(beyond.dual_map(4 * x), d)
        (by_power,), _ = beyond.scaled([x], -0.25, whole_group=False)
        if 0 < float(x.abs().sum()) < 1e20:
            torch.testing.assert_close(by_power, beyond.power([x])[0])
    assert Schatten(math.inf, exponent=-1.0).dual_norm(torch.ones(4, 3)).isnan()


# The stated errors, relative in the Frobenius norm, on Gaussian matrices, which have few small singular values.
FAST = [
    ("newton-schulz", 5, "float32", 0.3),
    ("newton-schulz", 5, "bfloat16", 0.3),
    ("polar-express", 5, "float32", 0.15),
    ("polar-express", 8, "float32", 1e-4),
    ("polar-express", 8, "bfloat16", 0.02),
]


@pytest.mark.parametrize(("method", "steps", "dtype", "error"), FAST)
def test_fast_paths_keep_their_stated_error(method, steps, dtype, error):
    torch.manual_seed(1)
    fast = Schatten(math.inf, method=method, steps=steps, dtype=dtype)
    for shape in ((128, 256), (256, 128), (64, 64), (32, 512)):
        x = torch.randn(shape)
        exact = Schatten(math.inf).dual_map(x)
        assert float((fast.dual_map(x) - exact).norm()) <= error * float(exact.norm())
        assert float(fast.dual_norm(x)) == pytest.approx(float(Schatten(math.inf).dual_norm(x)), rel=error)
        for magnitude in (2.0**-90, 2.0**90):
            torch.testing.assert_close(fast.dual_map(x * magnitude), fast.dual_map(x), rtol=0, atol=0)
    assert not fast.dual_map(torch.zeros(4, 3)).any()
    assert fast.dual_map(torch.full((4, 3), math.nan)).isnan().all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_five_steps_of_newton_schulz_leave_singular_values_where_they_are_stated(dtype):
    torch.manual_seed(0)
    fast = Schatten(math.inf, method="newton-schulz", dtype=dtype)
    u, v = (torch.linalg.qr(torch.randn(n, 64, dtype=torch.float64))[0] for n in (128, 64))
    s = torch.logspace(-5, 0, 64, dtype=torch.float64)
    s /= s.norm()
    found = (u.T @ fast.dual_map(((u * s) @ v.T).float()).double() @ v).diagonal()
    large = s >= 1.5e-3
    assert 0.675 < found[large].min() < 0.7
    assert 1.15 < found[large].max() < 1.21
    if dtype == "float32":  # bfloat16 rounds smaller ones away
        assert (found[~large] / s[~large]).max() < 486
        expected = s
        for _ in range(5):
            expected = 3.4445 * expected - 4.7750 * expected**3 + 2.0315 * expected**5
        torch.testing.assert_close(found, expected, rtol=5e-3, atol=0)
    square = torch.linalg.svdvals(fast.dual_map(torch.randn(256, 256)).double())
    assert square.min() < 0.2
    assert square.max() < 1.21


@pytest.mark.parametrize(("dtype", "tol"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_lanczos_with_as_many_steps_as_rows_or_columns_is_the_svd(dtype, tol):
    n = Schatten(1.0, method="lanczos", steps=11)
    for name, x in matrices(dtype).items():
        dual, d = n.dual_norm(x), n.dual_map(x)
        expected, expected_d = oracle(x.double().numpy(), 1.0)
        assert d.dtype == dtype
        assert float(dual) == pytest.approx(expected, rel=tol), name
        np.testing.assert_allclose(d.double().numpy(), expected_d, rtol=0, atol=10 * tol, err_msg=name)
        assert float((x.double() * d.double()).sum()) == pytest.approx(float(dual), rel=tol), name
        assert float(n.norm(d)) == pytest.approx(1.0 if x.any() else 0.0, rel=tol), name
        assert torch.equal(n.dual_map(x * 4), d), name


def test_lanczos_keeps_its_stated_error_and_its_dual_norm_is_that_of_its_map():
    torch.manual_seed(1)
    fast = Schatten(1.0, method="lanczos", steps=24)
    few = Schatten(1.0, method="lanczos", steps=3)  # far from σ₁, and as consistent
    for shape in ((256, 256), (128, 512), (512, 128)):
        xs = [torch.randn(shape) for _ in range(8)]
        top = torch.stack([torch.linalg.svdvals(x.double())[0] for x in xs])
        error = 1 - torch.stack(fast.dual_norm(xs)) / top
        assert float(error.min()) > -3e-6  # roundoff of either
        assert float(error.max()) < 3e-3
        for n in (fast, few):
            for x in xs[:2]:
                d = n.dual_map(x)
                assert float((x.double() * d.double()).sum()) == pytest.approx(float(n.dual_norm(x)), rel=1e-6)
                assert float(torch.linalg.matrix_norm(d.double())) == pytest.approx(1.0, rel=1e-6)
                assert float(torch.linalg.svdvals(d.double())[1]) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_lanczos_is_not_trapped_and_ends_early_without_a_nan(dtype):
    """Few steps suffice where there are few distinct singular values, whatever the rank, and wherever they are."""
    tol = 1e-10 if dtype == torch.float64 else 1e-5
    rng = np.random.default_rng(0)
    blocks = np.zeros((30, 30))
    blocks[:10, :10], blocks[10:, 10:] = np.eye(10), 3 * np.linalg.qr(rng.standard_normal((20, 20)))[0]
    one_hot = np.zeros((40, 30))
    one_hot[37, 11] = -2.0
    cases = {
        "rank one": (np.outer(rng.standard_normal(30), rng.standard_normal(50)), 1),
        "integers of rank one": (np.outer(np.arange(30) - 7.0, np.arange(20) - 3.0), 1),
        "one entry": (one_hot, 1),
        "ones": (np.ones((30, 30)), 1),
        "identity": (np.eye(30), 1),
        "blocks": (blocks, 2),
        "rank three": (rng.standard_normal((30, 3)) @ rng.standard_normal((3, 20)), 3),
    }
    for name, (x, distinct) in cases.items():
        x = torch.tensor(x).to(dtype)
        for steps in (distinct, 16, 100):
            n = Schatten(1.0, method="lanczos", steps=steps)
            d = n.dual_map(x)
            assert float(n.dual_norm(x)) == pytest.approx(np.linalg.norm(x.double().numpy(), 2), rel=tol), name
            assert float((x * d).sum()) == pytest.approx(float(n.dual_norm(x)), rel=tol), name
            assert float(n.norm(d)) == pytest.approx(1.0, rel=tol), name


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_lanczos_spoils_no_other_matrix_and_draws_no_random_number(bad):
    torch.manual_seed(0)
    stack = torch.randn(3, 20, 30)
    n = Schatten(1.0, method="lanczos", steps=4, matrix_view="batch")
    before, generator = n.dual_map(stack), torch.get_rng_state()
    stack[1, 19, 29] = bad
    after = n.dual_map(stack)
    assert torch.equal(torch.get_rng_state(), generator)
    assert after[1].isnan().all()
    assert torch.equal(after[[0, 2]], before[[0, 2]])
    assert n.dual_norm(stack).isnan()
    assert not n.dual_map(torch.zeros(2, 4, 3)).any()


@NEEDS_MUON
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64, 32), (32, 64), (48, 48)])
@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
def test_the_step_of_torchs_muon(shape, dtype, adjust):
    """From the same state, 20 recorded steps, within 2^-7 of the step's own length (fp32: far closer)."""
    torch.manual_seed(2)
    settings = dict(lr=0.02, momentum=0.95, weight_decay=0.1)
    for _ in range(20):
        w, g, m = (torch.randn(shape).to(dtype) for _ in range(3))
        theirs, ours = (torch.nn.Parameter(w.clone()) for _ in range(2))
        muon = torch.optim.Muon([theirs], adjust_lr_fn=adjust, nesterov=True, **settings)
        opt = normopt.SteepestDescent(
            [ours],
            norm=Schatten(math.inf, method="newton-schulz", dtype="bfloat16", aspect=adjust),
            scale="unit",
            momentum_rule="ema",
            nesterov=True,
            **settings,
        )
        for p, o in ((theirs, muon), (ours, opt)):
            p.grad = g.clone()
            o.state[p]["momentum_buffer"] = m.clone()
            o.step()
        step = (theirs.detach() - w).float()
        difference = float((ours.detach() - theirs.detach()).float().norm())
        # Both round their result to bfloat16: half a unit in the last place of the weights is no one's error.
        rounding = float(w.float().norm()) * 2**-8 if dtype == torch.bfloat16 else 0
        assert difference <= 2**-7 * float(step.norm()) + rounding
        torch.testing.assert_close(opt.state[ours]["momentum_buffer"], muon.state[theirs]["momentum_buffer"])


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_and_momentum_are_never_aliased(dtype, foreach):
    for nesterov in (False, True):
        w = torch.nn.Parameter(torch.randn(6, 4).to(dtype))
        opt = normopt.SteepestDescent(
            [w], norm="spectral", norm_method="newton-schulz", norm_dtype="bfloat16", scale="unit",
            momentum=0.9, momentum_rule="ema", nesterov=nesterov, foreach=foreach,
        )  # fmt: skip
        m = torch.zeros(6, 4)
        for _ in range(3):
            w.grad = torch.randn(6, 4).to(dtype)
            g = w.grad.clone()
            opt.step()
            assert torch.equal(w.grad, g)
            m = m.to(dtype).float().lerp(g.float(), 0.1)
            torch.testing.assert_close(opt.state[w]["momentum_buffer"], m.to(dtype))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Schatten(0.5), ValueError, "p must be in"),
        (lambda: Schatten(3.0, method="newton-schulz"), ValueError, "p = ∞"),
        (lambda: Schatten(1.0, method="polar-express"), ValueError, "p = ∞"),
        (lambda: Schatten(math.inf, method="lanczos"), ValueError, 'p = 1 .*use method="svd"'),
        (lambda: Schatten(1.0, method="lanczos", exponent=0.5), ValueError, "without an exponent"),
        (lambda: normopt.NucGD([w_of(torch.ones(2, 2))], method="newton-schulz"), ValueError, "p = ∞"),
        (lambda: Schatten(math.inf, method="qr"), ValueError, "method must be one of"),
        (lambda: Schatten(math.inf, steps=0), ValueError, "steps"),
        (lambda: Schatten(math.inf, steps=2.5), TypeError, "steps must be an integer"),
        (lambda: Schatten(math.inf, aspect="square"), ValueError, "aspect"),
        (lambda: Schatten(math.inf, matrix_view="rows"), ValueError, "matrix_view"),
        (lambda: spectral(torch.ones(4, 3), norm_blocks=3), ValueError, "does not divide the 4 rows"),
        (lambda: spectral(torch.ones(4, 3, dtype=torch.complex64)), ValueError, "real matrices"),
        (lambda: spectral(torch.ones(4, 3), norm_exponent=-1.0, scale="unit"), ValueError, "above −1"),
        (lambda: Schatten(math.inf, exponent=-0.5).norm(torch.ones(4, 3)), NotImplementedError, "no norm"),
        (lambda: spectral(torch.ones(4, 3), norm_methd="svd"), TypeError, "norm_method"),
        (lambda: normopt.SteepestDescent([w_of(torch.ones(2))], norm="nuclear", scale="power"), ValueError, "power"),
    ],
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()


def w_of(x):
    return torch.nn.Parameter(x)


def spectral(x, **settings):
    return normopt.SteepestDescent([w_of(x)], norm="spectral", **settings)


def test_whole_group_and_resume():
    """Over a group the norm is the largest tensor's, so the dual norm is the sum; settings survive a checkpoint."""
    torch.manual_seed(0)
    ps = [torch.nn.Parameter(torch.zeros(s)) for s in ((4, 3), (3, 4), (5,))]
    for p in ps:
        p.grad = torch.randn_like(p)
    opt = normopt.SteepestDescent(ps, lr=1.0, norm="schatten", p=3.0, scale="dual", scope="group")
    opt.step()
    n = Schatten(3.0)
    total = sum(float(n.dual_norm(p.grad)) for p in ps)
    for p in ps:
        torch.testing.assert_close(-p.detach(), n.dual_map(p.grad) * total, rtol=1e-4, atol=1e-5)
    other = normopt.SteepestDescent([torch.nn.Parameter(torch.zeros_like(p)) for p in ps], norm="schatten", p=2.0)
    other.load_state_dict(opt.state_dict())
    assert other.param_groups[0]["p"] == 3.0


@pytest.mark.parametrize("empty_first", [False, True])
def test_an_empty_stack_beside_one_of_the_same_matrices(empty_first):
    torch.manual_seed(0)
    full, empty = torch.randn(2, 3, 4), torch.zeros(0, 3, 4)
    n = Schatten(math.inf, matrix_view="batch")
    maps, norms = n.scaled([empty, full] if empty_first else [full, empty], 0, whole_group=False)
    torch.testing.assert_close(maps[int(empty_first)], n.dual_map(full))
    torch.testing.assert_close(norms[int(empty_first)], n.dual_norm(full))
    assert maps[1 - int(empty_first)].shape == empty.shape
    assert norms[1 - int(empty_first)] == 0


@pytest.mark.parametrize("supported", [True, False])
def test_auto_is_the_dtype_that_the_processor_multiplies(supported, monkeypatch):
    monkeypatch.setattr("normopt.norms.polar.CPU_MULTIPLIES_BFLOAT16", supported)
    c = [torch.randn(8, 6, generator=torch.Generator().manual_seed(0))]
    norms = [Schatten(math.inf, method="newton-schulz", dtype=x) for x in ("auto", "bfloat16", "float32")]
    auto, low, high = (norm.pairs(c)[0][1] for norm in norms)
    assert torch.equal(auto, low if supported else high)
    assert not torch.equal(low, high)
