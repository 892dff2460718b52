"""Adaptive gradient regularization: damp the dominant entries of a gradient the most.

Like a norm, it is split into partials per piece of a tensor, their reduction, and an elementwise map::

    measure(g)         → partials [n, 3]        per piece: M, m/M and Σ|g|/M over all entries but one of size m,
                                                with m the largest |entry| and M = m clamped to normal numbers
    combine(partials)  → scalars [..., 3]       the same for a tensor, from its pieces
    apply(g, scalars)  → g·(1 − |g|/Σ|g|)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from normopt._checks import check_bool
from normopt.norms.base import num_reals
from normopt.stages.base import Batch, Op, Stage, one_of, register_stage, setting


def agr(g: list[Tensor]) -> list[Tensor]:
    """Return ``g·(1 − |g|/Σ|g|)`` with Σ over each tensor: an order-preserving soft cap on every entry.

    Computed as ``g·r/Σ|g|`` with r the sum of the OTHER magnitudes, because 1 − |g|/Σ|g| cancels if one
    entry dominates; r of the largest entry is summed without it. An all-zero tensor stays zero. A tensor
    of one element is left unchanged: the formula would erase it (a case the paper does not treat). In a
    larger tensor, a single nonzero entry is erased. Signs never change.

    Source: Adaptive Gradient Regularization, arXiv:2407.16944.
    """
    return apply(g, combine(measure(g)[:, None]), [x.numel() for x in g])


def measure(g: list[Tensor]) -> Tensor:
    """Return the partials of n pieces, shape [n, 3]: M, m/M, and the sum of the others relative to M."""
    rows = [_measure(x) for x in g]
    return torch.stack([row.to(rows[0].device) for row in rows])


def _measure(x: Tensor) -> Tensor:
    size = x.abs().reshape(-1) if x.numel() else x.new_zeros(1)
    first = _first_largest(size.detach(), len(x) if x.dim() else 1)
    largest = size[first]
    top = clamp_normal(largest)
    size = size.div_(top).index_fill_(0, first, 0)  # relative, so that the sum cannot overflow
    return torch.cat([top, largest / top, size.sum(0, keepdim=True)])


def _first_largest(size: Tensor, rows: int) -> Tensor:
    """Return the index of the largest entry, or of a NaN, of a vector of so many equal rows: shape [1]."""
    length = len(size) // max(rows, 1)
    if rows < 2 or length < 64:
        return size.argmax(0, keepdim=True)
    table = size.view(rows, length)
    row = table.amax(1).argmax(0, keepdim=True)  # amax is ten times as fast as argmax
    return row * length + table[row].argmax(1)


def combine(partials: Tensor) -> Tensor:
    """Reduce the partials of a tensor's k pieces, shape [..., k, 3], to its scalars, shape [..., 3]."""
    if partials.shape[-2] == 1:
        return partials[..., 0, :]
    tops, largest, others = partials.unbind(-1)
    first = tops.argmax(-1, keepdim=True)
    ratios = tops / tops.gather(-1, first)
    rest = (others * ratios).sum(-1) + (largest * ratios).scatter(-1, first, 0).sum(-1)
    return torch.stack([x.gather(-1, first)[..., 0] for x in (tops, largest)] + [rest], -1)


def apply(g: list[Tensor], scalars: Tensor, sizes: list[int]) -> list[Tensor]:
    """Return the regularized pieces as new tensors, given the scalars of their tensors, shape [n, 3].

    Args:
        g: the pieces.
        scalars: results of ``combine``, one row per piece.
        sizes: the tensors' numbers of entries; tensors of one entry are left unchanged.
    """
    return [regularized(x, s.to(x)) if size > 1 else x for x, s, size in zip(g, scalars, sizes, strict=True)]


def regularized(g: Tensor, scalars: Tensor, out: Tensor | None = None) -> Tensor:
    """Return one regularized piece of a tensor of more than one entry.

    Args:
        g: the piece.
        scalars: the tensor's result of ``combine``, shape [3], of g's dtype and device.
        out: the result's memory, of g's shape and dtype. Default None, a new tensor.
    """
    top, largest, others = scalars.unbind()
    total = others + largest
    r = g.abs() if out is None else torch.abs(g, out=out)
    # (largest − size) + others is without cancellation, and exactly others for the largest.
    r.div_(-top).add_(largest).add_(others)
    return r.div_(torch.where(total == 0, 1, total)).mul_(g)


def over_group(scalars: Tensor, sizes: list[int]) -> tuple[Tensor, list[int]]:
    """Return the scalars and sizes, as ``apply`` takes them, of n tensors that are regularized as one vector.

    Args:
        scalars: results of ``combine``, one row per tensor, shape [n, 3].
        sizes: the tensors' numbers of entries.
    """
    return combine(scalars).expand(len(sizes), -1), [sum(sizes)] * len(sizes)


def clamp_normal(x: Tensor) -> Tensor:
    """Clamp x ≥ 0 to the normal range of its dtype, so that dividing by it gives no 0/0 or ∞/∞."""
    limits = torch.finfo(x.dtype)
    return x.clamp(limits.tiny, limits.max)


@register_stage
@dataclass
class Maximize(Stage):
    """Negate the gradient, to maximize."""

    place = "gradient"

    maximize: bool = setting(False, check_bool, "maximize the objective: negate the gradient")

    def runs(self) -> bool:
        return self.maximize

    def apply(self, batch: Batch, scalars: Tensor | None) -> None:
        batch.c = batch.g = list(torch._foreach_neg(batch.g))

    def lower(self) -> Op | str:
        return Op({"maximize": True})

    def describe(self) -> str:
        return "−g"


@register_stage
@dataclass
class Regularization(Stage):
    """Adaptive gradient regularization, `agr`, with the sums taken over the shards of each tensor."""

    place = "gradient"

    agr: bool = setting(False, check_bool, "adaptive gradient regularization")
    agr_scope: Literal["tensor", "group"] = setting(
        "tensor", one_of(("tensor", "group")), 'AGR\'s sums over each "tensor", as in the paper, or the param "group"'
    )

    def runs(self) -> bool:
        return self.agr

    @property
    def whole_group(self) -> bool:
        """True if all gradients of the group are regularized as one vector."""
        return self.agr and self.agr_scope == "group"

    def measure(self, batch: Batch) -> Tensor | None:
        return measure(batch.g)

    def combine(self, partials: Tensor) -> Tensor:
        return combine(partials)

    def apply(self, batch: Batch, scalars: Tensor | None) -> None:
        assert scalars is not None
        sizes = [num_reals(p) for p in batch.params]
        if self.whole_group:
            scalars, sizes = over_group(scalars, sizes)
        batch.c = batch.g = apply(batch.g, scalars, sizes)

    def lower(self) -> Op | str:
        return 'agr_scope="group" needs the sums of all tensors first' if self.whole_group else Op({"agr": True})

    def describe(self) -> str:
        return "AGR over the group" if self.whole_group else "AGR"
