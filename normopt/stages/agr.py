"""Adaptive gradient regularization: the entries that dominate a gradient are held back the most.

Split as a norm is, into what each piece of a tensor adds, what that comes to, and what is done with it::

    measure(g)         → partials [n, 3]        of each piece: M, m/M and Σ|g|/M of all entries but one of size m,
                                                with m its largest |entry| and M = m kept off 0 and ∞
    combine(partials)  → scalars [..., 3]       the same of a tensor, from its pieces
    apply(g, scalars)  → g·(1 − |g|/Σ|g|)
"""

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
    return apply(g, combine(measure(g)[:, None]), [x.numel() for x in g])


def measure(g: list[Tensor]) -> Tensor:
    """What each of n pieces adds, shape [n, 3]: M, m/M, and the sum of the others relative to M."""
    rows = []
    for x in g:
        size = x.abs().reshape(-1) if x.numel() else x.new_zeros(1)
        first = size.argmax(keepdim=True)
        top = clamp_normal(size[first])
        size = size / top  # relative, so that the sum cannot overflow
        rows.append(torch.cat([top, size[first], size.scatter(0, first, 0).sum(0, keepdim=True)]))
    return torch.stack([row.to(rows[0].device) for row in rows])


def combine(partials: Tensor) -> Tensor:
    """The scalars of a tensor, shape [..., 3], from those of its k pieces, shape [..., k, 3]."""
    if partials.shape[-2] == 1:
        return partials[..., 0, :]
    tops, largest, others = partials.unbind(-1)
    first = tops.argmax(-1, keepdim=True)
    ratios = tops / tops.gather(-1, first)
    rest = (others * ratios).sum(-1) + (largest * ratios).scatter(-1, first, 0).sum(-1)
    return torch.stack([x.gather(-1, first)[..., 0] for x in (tops, largest)] + [rest], -1)


def apply(g: list[Tensor], scalars: Tensor, sizes: list[int]) -> list[Tensor]:
    """The regularized pieces, as new tensors, given the scalars of the tensors that they are of, shape [n, 3].

    Args:
        g: the pieces.
        scalars: what ``combine`` gave, a row a piece.
        sizes: how many entries the tensors have: those of one are left alone.
    """
    return [_apply(x, s.to(x)) if size > 1 else x for x, s, size in zip(g, scalars, sizes, strict=True)]


def _apply(g: Tensor, scalars: Tensor) -> Tensor:
    top, largest, others = scalars
    size = g.abs() / top
    total = others + largest
    r = torch.where(size == largest, others, total - size)
    return g * (r / torch.where(total == 0, 1, total))


def clamp_normal(x: Tensor) -> Tensor:
    """x ≥ 0 between the smallest normal number and the largest finite one, so that to divide by it makes no NaN."""
    limits = torch.finfo(x.dtype)
    return x.clamp(limits.tiny, limits.max)
