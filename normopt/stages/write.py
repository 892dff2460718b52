"""The last stage: the update itself, and rounding of its result to lower-precision weights."""

from __future__ import annotations

import torch
from torch import Tensor


def descend_(w: list[Tensor], u: list[Tensor], lr: float | Tensor) -> None:
    """Apply ``w ← w − ηu``; a tensor η is not read on the host, which would sync."""
    if isinstance(lr, Tensor):
        torch._foreach_sub_(w, torch._foreach_mul(u, lr))
    else:
        torch._foreach_add_(w, u, alpha=-lr)


def scale_(w: list[Tensor], factors: list[Tensor]) -> None:
    """Apply ``w ← w · factor`` elementwise, as ℓp decay does after the step."""
    if w:
        torch._foreach_mul_(w, factors)


def nearest_(weights: list[Tensor], w: list[Tensor]) -> None:
    """Round float32 copies to nearest into the weights; skip weights that were updated without a copy."""
    for p, x in zip(weights, w, strict=True):
        if x is not p:
            p.copy_(x)


def stochastic_(weights: list[Tensor], w: list[Tensor]) -> None:
    """Round float32 up or down to bfloat16 at random, so that the expected value is the float32 value.

    bfloat16 is the upper half of a float32. Adding 16 random bits to the lower half carries into the upper
    half with a probability equal to the fraction that is then truncated. ∞ and NaN are copied.
    Uses torch's generator of the device.
    """
    for p, x in zip(weights, w, strict=True):
        if x is p:
            continue
        noise = torch.randint_like(x, 0, 1 << 16, dtype=torch.int32)
        bits = (x.view(torch.int32) + noise) & -(1 << 16)
        p.copy_(torch.where(x.isfinite(), bits.view(torch.float32), x))


def kahan_(weights: list[Tensor], w: list[Tensor], compensations: list[Tensor]) -> None:
    """Round to nearest and store the rounding error: weight + compensation is w to twice the weight's bits.

    The next step uses that sum as its weight (Kahan summation across steps). The compensation is 0 where
    the weight is not finite.
    """
    for p, x, lost in zip(weights, w, compensations, strict=True):
        p.copy_(x)
        lost.copy_(torch.where(p.isfinite(), x - p.to(x.dtype), 0))
