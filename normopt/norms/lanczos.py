"""Golub–Kahan–Lanczos bidiagonalisation: the top singular pair from a few matrix–vector products, without an SVD."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from normopt.norms.matrices import mul_pow2, normalize_exponent


def top_pair(y: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Approximate (σ₁, u₁v₁ᵀ) for each matrix of a stack, shape [stack, rows, columns]; NaN if it is not finite.

    ::

        v₁ ∝ Gᵀz                                       z fixed by the number of rows
        α_j u_j     ∝ G v_j,  less its part along u_1 … u_(j−1)
        β_j v_(j+1) ∝ Gᵀu_j,  less its part along v_1 … v_j
        B = UᵀGV, with the α on its diagonal and the β above
        u = Ux, x the top left singular vector of B;   σ = ‖Gᵀu‖,   v = Gᵀu/σ

    u and v are unit vectors, so σ ≤ σ₁, and σ = ⟨G, uvᵀ⟩ to roundoff at any distance from σ₁. The pair is exact
    once the steps reach the number of distinct nonzero singular values. Earlier, no spectral gap is needed:
    for z uniform on the sphere, the relative error of σ² after k ≥ 4 steps is on average at most
    0.103·(ln(n(k−1)⁴)/(k−1))² for n ≥ 8 columns, and usually far smaller.

    The iteration restarts in every training step, whereas the literature warm-starts from the previous pair.
    A norm here is a pure function, state belongs to the optimizer, and resuming is bit-identical. Hence z is
    fixed. No fixed z works for every matrix, but only a matrix constructed against it fails.

    Source: Golub and Kahan, "Calculating the singular values and pseudo-inverse of a matrix", 1965; the bound
    is from Kuczyński and Woźniakowski, "Estimating the largest eigenvalue by the power and Lanczos algorithms
    with a random start", 1992.
    """
    g, power, finite = normalize_exponent(y)
    (count, rows, columns), k = g.shape, min(steps, *g.shape[-2:])
    us, vs, b = (g.new_zeros(count, k, size) for size in (rows, columns, k))
    # Vectors are stored as rows: the batched product vᵀGᵀ is ten times as fast on a CPU as Gv.
    # Gᵀz is in the row space, and so are all later vectors. z must not be taken from G: the iterates of a row
    # of a block-diagonal matrix never leave its block.
    _, v = orthogonalize(vs[:, :0], fixed_start(rows, g).expand(count, 1, rows) @ g)
    for j in range(k):
        vs[:, j : j + 1] = v
        b[:, j, j], u = orthogonalize(us[:, :j], v @ g.mT)
        us[:, j : j + 1] = u
        if j + 1 < k:
            b[:, j, j + 1], v = orthogonalize(vs[:, : j + 1], u @ g)
    u = torch.linalg.svd(b)[0][..., :1].mT @ us
    sigma, v = orthogonalize(vs[:, :0], u @ g)
    sigma = torch.where(finite[:, 0, 0], mul_pow2(sigma, power[:, 0, 0]), math.nan)
    return sigma, torch.where(finite, u, math.nan).mT @ v


def orthogonalize(basis: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """Orthogonalise r against an orthonormal basis; return (length, unit vector), both 0 if only rounding is left.

    Shapes: basis [count, k, size], r [count, 1, size], length [count].
    """
    before = torch.linalg.vector_norm(r, dim=(-2, -1))
    for _ in range(2):  # the second pass removes the rounding error of the first, which scales with the removed part
        r = r - (r @ basis.mT) @ basis
    length = torch.linalg.vector_norm(r, dim=(-2, -1))
    new = length > torch.finfo(r.dtype).eps * before
    safe = torch.where(new, length, 1)
    return torch.where(new, length, 0), torch.where(new[:, None, None], r / safe[:, None, None], 0)


def fixed_start(n: int, like: Tensor) -> Tensor:
    """Return n fixed pseudo-random numbers: hashed signs, magnitudes from ½ to 3/2.

    Integer arithmetic on the device, without a generator. None is near 0, so that every axis contributes.
    """
    x = torch.arange(1, n + 1, device=like.device)
    for _ in range(2):
        x = ((x ^ (x >> 15)) * 0x2C1B3C6D) & 0x7FFFFFFF  # products of 31 bits by 30 do not overflow
    x = x ^ (x >> 15)
    return (1 - 2 * (x & 1)) * (0.5 + x.to(like.dtype) / 2**31)
