"""The top singular pair by Golub–Kahan–Lanczos bidiagonalisation: products with a few vectors instead of an SVD."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from normopt.norms.matrices import mul_pow2, normalize_exponent


def top_pair(y: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """About (σ₁, u₁v₁ᵀ) of each matrix of a stack, shape [stack, rows, columns]; NaN where one is not finite.

    ::

        v₁ ∝ Gᵀz                                       z the same for all matrices of so many rows
        α_j u_j     ∝ G v_j,  less its part along u_1 … u_(j−1)
        β_j v_(j+1) ∝ Gᵀu_j,  less its part along v_1 … v_j
        B = UᵀGV, with the α on its diagonal and the β above
        u = Ux, x the top left singular vector of B;   σ = ‖Gᵀu‖,   v = Gᵀu/σ

    u and v are unit vectors, so that σ ≤ σ₁, and σ is ⟨G, uvᵀ⟩ to roundoff, however far from σ₁. After as
    many steps as the matrix has distinct singular values above 0 the pair is exact. Before, no gap between
    them is needed: for z uniform on the sphere the relative error of σ² after k ≥ 4 steps is on average at
    most 0.103·(ln(n(k−1)⁴)/(k−1))² for n columns, n ≥ 8, and mostly far less.

    It starts afresh in every step of training, where the literature starts from the last step's pair: a
    norm is a function of its argument, state belongs to the optimizer, and what resumes goes on bit for bit.
    So z is fixed. No fixed z serves every matrix there is, but one has to be made against it to fail.

    Source: Golub and Kahan, "Calculating the singular values and pseudo-inverse of a matrix", 1965; the bound
    is of Kuczyński and Woźniakowski, "Estimating the largest eigenvalue by the power and Lanczos algorithms
    with a random start", 1992.
    """
    g, power, fine = normalize_exponent(y)
    (count, rows, columns), k = g.shape, min(steps, *g.shape[-2:])
    us, vs, b = (g.new_zeros(count, k, size) for size in (rows, columns, k))
    # Vectors are rows here: the batched product vᵀGᵀ is ten times as fast on a CPU as Gv.
    # Gᵀz lies in the row space, which no later step can leave. Nothing of G itself would do for z: a row of a
    # block-diagonal matrix never leaves its block.
    _, v = orthogonalize(vs[:, :0], fixed_start(rows, g).expand(count, 1, rows) @ g)
    for j in range(k):
        vs[:, j : j + 1] = v
        b[:, j, j], u = orthogonalize(us[:, :j], v @ g.mT)
        us[:, j : j + 1] = u
        if j + 1 < k:
            b[:, j, j + 1], v = orthogonalize(vs[:, : j + 1], u @ g)
    u = torch.linalg.svd(b)[0][..., :1].mT @ us
    sigma, v = orthogonalize(vs[:, :0], u @ g)
    sigma = torch.where(fine[:, 0, 0], mul_pow2(sigma, power[:, 0, 0]), math.nan)
    return sigma, torch.where(fine, u, math.nan).mT @ v


def orthogonalize(basis: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """What r adds to an orthonormal basis, as (length, unit vector); both 0 where it adds nothing but rounding.

    Shapes: basis [count, k, size], r [count, 1, size], length [count].
    """
    before = torch.linalg.vector_norm(r, dim=(-2, -1))
    for _ in range(2):  # the first pass leaves rounding of the size of what it took away; the second takes that
        r = r - (r @ basis.mT) @ basis
    length = torch.linalg.vector_norm(r, dim=(-2, -1))
    new = length > torch.finfo(r.dtype).eps * before
    safe = torch.where(new, length, 1)
    return torch.where(new, length, 0), torch.where(new[:, None, None], r / safe[:, None, None], 0)


def fixed_start(n: int, like: Tensor) -> Tensor:
    """n numbers that look random, the same every time: signs of a hash, sizes from ½ to 3/2.

    Made on the device by integer arithmetic, from no generator. None is near 0, so that no axis is missed.
    """
    x = torch.arange(1, n + 1, device=like.device)
    for _ in range(2):
        x = ((x ^ (x >> 15)) * 0x2C1B3C6D) & 0x7FFFFFFF  # products of 31 bits by 30 do not overflow
    x = x ^ (x >> 15)
    return (1 - 2 * (x & 1)) * (0.5 + x.to(like.dtype) / 2**31)
