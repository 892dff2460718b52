"""The last stage: the step itself, and the weights."""

from __future__ import annotations

import torch
from torch import Tensor


def descend_(w: list[Tensor], u: list[Tensor], lr: float | Tensor) -> None:
    """``w ← w − ηu``; a tensor η is never read, so that nothing waits for the device."""
    if isinstance(lr, Tensor):
        torch._foreach_sub_(w, torch._foreach_mul(u, lr))
    else:
        torch._foreach_add_(w, u, alpha=-lr)


def write_(params: list[Tensor], w: list[Tensor]) -> None:
    """Round working copies into the parameters they were made from; a parameter that was its own stays."""
    for p, x in zip(params, w, strict=True):
        if x is not p:
            p.copy_(x)
