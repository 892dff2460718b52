"""Polynomial iterations for the polar factor UVᵀ of UΣVᵀ: matrix products instead of an SVD."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from normopt.norms.matrices import max_abs, mul_pow2

Coefficients = tuple[float, float, float]

# Keller Jordan, "Muon", 2024: the slope at zero is maximised. The price: singular values end in [0.68, 1.21], and
# five steps multiply those below 1.5e-3 of the Frobenius norm by 485 at most.
NEWTON_SCHULZ: Coefficients = (3.4445, -4.7750, 2.0315)

# Amsel et al., "The Polar Express", arXiv:2505.16932, Algorithm 1: the best polynomial for each step in turn.
POLAR_EXPRESS: tuple[Coefficients, ...] = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
)
LIMIT: Coefficients = (1.875, -1.25, 0.375)  # their limit; Newton–Schulz of degree 5
SAFETY = 1.01  # shrinks all but the limit polynomial, so that rounding errors stay in the interval


def coefficients(method: str, steps: int) -> list[Coefficients]:
    """Return the coefficients of the polynomial ``a x + b x³ + c x⁵`` of each step."""
    if method == "newton-schulz":
        return [NEWTON_SCHULZ] * steps
    safe = [(a / SAFETY, b / SAFETY**3, c / SAFETY**5) for a, b, c in POLAR_EXPRESS]
    return (safe + [LIMIT] * steps)[:steps]


# Without instructions for bfloat16 a CPU converts every product, which takes many times as long as float32.
CPU_MULTIPLIES_BFLOAT16 = bool(getattr(torch.cpu, "_is_avx512_bf16_supported", bool)())


def iteration_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of that name; of "auto", float32 on a CPU that does not multiply bfloat16, else bfloat16."""
    if name == "auto":
        name = "bfloat16" if device.type != "cpu" or CPU_MULTIPLIES_BFLOAT16 else "float32"
    return cast(torch.dtype, getattr(torch, name))


def polar(x: Tensor, method: str, steps: int, dtype: torch.dtype) -> Tensor:
    """Approximate UVᵀ of each matrix of a stack, shape [stack, rows, columns], in ``dtype``; 0 for a zero matrix.

    The operations and their order are those of torch.optim.Muon. The matrix is first scaled by a power of
    two, which changes no bit of the result but supports inputs of any magnitude.
    """
    y = mul_pow2(x, -torch.frexp(max_abs(x)).exponent).to(dtype)
    # A product of two matrices is faster than that of two stacks of one.
    product, sum_of = (torch.mm, torch.addmm) if len(y) == 1 else (torch.bmm, torch.baddbmm)
    y = y[0] if len(y) == 1 else y
    tall = x.shape[-2] > x.shape[-1]
    y = y.mT if tall else y
    norm = torch.linalg.vector_norm(y, dim=(-2, -1), keepdim=True)
    y = y / norm.clamp(min=1e-7) if method == "newton-schulz" else y / (norm * SAFETY + 1e-7)
    for a, b, c in coefficients(method, steps):
        gram = product(y, y.mT)
        y = sum_of(y, sum_of(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return (y.mT if tall else y).reshape(x.shape)
