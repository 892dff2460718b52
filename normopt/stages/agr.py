"""Adaptive gradient regularization: the entries that dominate a gradient are held back the most."""

from __future__ import annotations

import torch
from torch import Tensor


def agr(g: list[Tensor]) -> list[Tensor]:
    """``g ← g·(1 − |g|/Σ|g|)`` with Σ over each tensor: an order-preserving soft cap on every entry.

    Computed as ``g·r/Σ|g|`` with r the sum of the OTHER magnitudes, because 1 − |g|/Σ|g| cancels where
    one entry dominates; that entry's r is summed without it. An all-zero tensor stays zero, and a
    tensor of one element is left alone: the formula would erase it (the paper does not treat it). It
    does erase an entry that is alone among zeros in a larger tensor. No sign ever changes.

    Source: Adaptive Gradient Regularization, arXiv:2407.16944.
    """
    return [_agr(x) if x.numel() > 1 else x for x in g]


def _agr(g: Tensor) -> Tensor:
    size = g.abs().reshape(-1)
    top = size.argmax(keepdim=True)
    limits = torch.finfo(g.dtype)
    size = size / size[top].clamp(limits.tiny, limits.max)  # relative, so that the sum cannot overflow
    others_than_top = size.scatter(0, top, 0).sum(0, keepdim=True)
    total = others_than_top + size[top]
    r = (total - size).scatter(0, top, others_than_top)
    return g * (r / torch.where(total == 0, 1, total)).reshape(g.shape)
