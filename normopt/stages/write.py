"""The last stage: the step itself, and how its result is rounded into weights that hold fewer bits."""

from __future__ import annotations

import torch
from torch import Tensor


def descend_(w: list[Tensor], u: list[Tensor], lr: float | Tensor) -> None:
    """``w ← w − ηu``; a tensor η is never read, so that nothing waits for the device."""
    if isinstance(lr, Tensor):
        torch._foreach_sub_(w, torch._foreach_mul(u, lr))
    else:
        torch._foreach_add_(w, u, alpha=-lr)


def scale_(w: list[Tensor], factors: list[Tensor]) -> None:
    """``w ← w · factor``, elementwise: what ℓp decay does after the step."""
    if w:
        torch._foreach_mul_(w, factors)


def nearest_(weights: list[Tensor], w: list[Tensor]) -> None:
    """Round working copies to the nearest weight; a weight that was its own working copy stays."""
    for p, x in zip(weights, w, strict=True):
        if x is not p:
            p.copy_(x)


def stochastic_(weights: list[Tensor], w: list[Tensor]) -> None:
    """Round float32 up or down to bfloat16 at random, so that the mean is the float32 value.

    bfloat16 is the upper half of a float32: adding 16 random bits to the lower half and cutting it off
    carries into the upper half with a probability equal to what is cut off. ∞ and NaN are copied.
    Draws from torch's generator of the device.
    """
    for p, x in zip(weights, w, strict=True):
        if x is p:
            continue
        noise = torch.randint_like(x, 0, 1 << 16, dtype=torch.int32)
        bits = (x.view(torch.int32) + noise) & -(1 << 16)
        p.copy_(torch.where(x.isfinite(), bits.view(torch.float32), x))


def kahan_(weights: list[Tensor], w: list[Tensor], compensations: list[Tensor]) -> None:
    """Round to nearest and keep what was lost: weight + compensation is w to twice the weight's bits.

    The next step reads that sum as its weight (Kahan summation across steps). Where the weight is not
    finite nothing is kept.
    """
    for p, x, lost in zip(weights, w, compensations, strict=True):
        p.copy_(x)
        lost.copy_(torch.where(p.isfinite(), x - p.to(x.dtype), 0))
