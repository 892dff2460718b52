"""Norms by lines: duality against an oracle in the formula's own form, views, and what is refused."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import normopt
from normopt.norms import Lp, Mixed, Schatten
from tests import oracle
from tests.norms.test_schatten import matrices

ORDERS = [1.0, 1.5, 2.0, 3.0, math.inf]


def by_lines(x: np.ndarray, p_inner: float, p_outer: float, lines: str) -> tuple[float, np.ndarray]:
    """r_i = ‖g_i‖_q, ‖G‖⋆ = ‖r‖_q, D_i = D_outer(r)_i · D_inner(g_i), one line at a time."""
    y = x.reshape(len(x), -1) if x.ndim > 1 else x.reshape(-1, 1)
    y = y.T if lines == "columns" else y
    r = np.array([float(oracle.lp_dual_norm(row, p_inner)) for row in y])
    weights = oracle.lp_dual_map(r, p_outer)
    d = np.stack([w * oracle.lp_dual_map(row, p_inner) for w, row in zip(weights, y, strict=True)])
    d = d.T if lines == "columns" else d
    return float(oracle.lp_dual_norm(r, p_outer)), d.reshape(x.shape)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("lines", ["rows", "columns"])
@pytest.mark.parametrize("p_inner", ORDERS)
@pytest.mark.parametrize("p_outer", ORDERS)
def test_duality_and_the_oracle(p_inner, p_outer, lines, dtype):
    tol = 1e-10 if dtype == torch.float64 else 1e-5
    n = Mixed(p_inner, p_outer, lines=lines)
    for name, x in matrices(dtype).items():
        before = x.clone()
        d, dual = n.dual_map(x), n.dual_norm(x)
        assert torch.equal(x, before)
        assert d.shape == x.shape
        if not x.any():
            assert not d.any()
            assert dual == 0
            continue
        expected, by_line = by_lines(x.double().numpy(), p_inner, p_outer, lines)
        assert float(dual) == pytest.approx(expected, rel=tol), name
        np.testing.assert_allclose(d.double().numpy(), by_line, rtol=tol, atol=tol, err_msg=name)
        assert float((x.double() * d.double()).sum()) == pytest.approx(expected, rel=tol), name
        assert float(n.norm(d)) == pytest.approx(1.0, rel=tol), name


def test_special_cases_are_norms_known_by_other_names():
    x = torch.randn(6, 4, dtype=torch.float64)
    for p in ORDERS:  # the same order inside and outside is the ℓp norm of the whole
        torch.testing.assert_close(Mixed(p, p).dual_norm(x), Lp(p).dual_norm(x))
        torch.testing.assert_close(Mixed(p, p).dual_map(x), Lp(p).dual_map(x))
    rows = Mixed(2.0, math.inf).dual_map(x)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(6, dtype=torch.float64))
    torch.testing.assert_close(Mixed(2.0, math.inf, lines="columns").dual_map(x), Mixed(2.0, math.inf).dual_map(x.T).T)
    row = torch.randn(1, 5, dtype=torch.float64)  # one row: spectral, Frobenius and row agree
    torch.testing.assert_close(Mixed(2.0, math.inf).dual_map(row), Schatten(math.inf).dual_map(row))


def test_nan_stays_in_its_row_and_is_never_hidden():
    x = torch.randn(3, 4)
    x[1, 2] = math.nan
    d = Mixed(2.0, math.inf).dual_map(x)
    assert d[1].isnan().all()
    assert d[[0, 2]].isfinite().all()
    assert Mixed(2.0, math.inf).dual_norm(x).isnan()


def test_views_and_blocks():
    experts = torch.randn(3, 4, 5)
    n = Mixed(2.0, 3.0, matrix_view="batch")
    for i in range(3):
        torch.testing.assert_close(n.dual_map(experts)[i], Mixed(2.0, 3.0).dual_map(experts[i]))
    fused = torch.randn(6, 5)
    split = Mixed(2.0, 3.0, blocks=2).dual_map(fused)
    torch.testing.assert_close(split, torch.cat([Mixed(2.0, 3.0).dual_map(b) for b in fused.chunk(2)]))
    table = torch.randn(7, 3)
    turned = Mixed(2.0, math.inf, matrix_view="transposed").dual_map(table)
    torch.testing.assert_close(turned, Mixed(2.0, math.inf, lines="columns").dual_map(table))


@pytest.mark.parametrize("scale", ["unit", "dual", "matched"])
def test_in_the_engine(scale):
    torch.manual_seed(0)
    w = torch.nn.Parameter(torch.zeros(5, 4))
    w.grad = torch.randn(5, 4)
    normopt.SteepestDescent([w], lr=1.0, norm="row", scale=scale).step()
    n = Mixed(2.0, math.inf)
    d = n.dual_map(w.grad)
    factor = {"unit": 1.0, "dual": n.dual_norm(w.grad), "matched": w.grad.norm() / d.norm()}[scale]
    torch.testing.assert_close(-w.detach(), d * factor)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Mixed(0.5, 2.0), ValueError, "p_inner"),
        (lambda: Mixed(2.0, "2"), TypeError, "p_outer"),
        (lambda: Mixed(2.0, 2.0, lines="diagonals"), ValueError, "lines"),
        (lambda: Mixed(2.0, 2.0, blocks=0), ValueError, "blocks"),
        (lambda: normopt.RowNormSGD([torch.nn.Parameter(torch.ones(2, dtype=torch.cfloat))]), ValueError, "real"),
        (lambda: normopt.SteepestDescent([torch.nn.Parameter(torch.ones(2))], norm="mixed"), ValueError, "needs"),
        (lambda: normopt.SteepestDescent([torch.nn.Parameter(torch.ones(2))], norm="row", p=2.0), ValueError, "take p"),
    ],
)
def test_bad_input(make, error, message):
    with pytest.raises(error, match=message):
        make()
