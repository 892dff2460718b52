"""The steepest-descent direction of tensors that lie in parts on many ranks: what a norm needs, met on a placement."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from normopt._checks import equals
from normopt.norms import scales
from normopt.norms.base import Norm, Scale
from normopt.norms.lp import Lp
from normopt.norms.matrices import MatrixNorm
from normopt.norms.scales import NormPair
from normopt.sharding.exchange import Layouts, Walk, combined, pieces
from normopt.sharding.layout import Layout
from normopt.sharding.matrices import gathered_whole, part_of, shared_out

Way = Literal["local", "sums", "rows", "whole"]


def way_of(norm: Norm, scale: Scale, layout: Layout | None) -> Way:
    """How a norm's needs are met for a tensor that lies so.

    ::

        "local"   nothing is needed of other ranks: elementwise directions, and tensors that are here whole
        "sums"    partial sums, gathered: norms that need a "tensor"
        "rows"    every row is here: norms that need "rows", of tensors that are cut between rows
        "whole"   the whole tensor, on one rank: all others
    """
    needs = norm.needs(scale)
    if layout is None or norm.is_identity(scale) or needs == "none":
        return "local"
    if needs == "tensor":
        # At p = 1 the first of equal entries moves. The order of the ranks is that of the entries along dim 0 only.
        return "whole" if isinstance(norm, Lp) and equals(norm.p, 1) and layout.dim != 0 else "sums"
    if needs == "rows" and isinstance(norm, MatrixNorm) and norm.rows_are_whole(len(layout.shape), layout.dim):
        return "rows"
    return "whole"


def direction(
    norm: Norm, c: list[Tensor], layouts: Layouts, scale: Scale, whole_group: bool, eps: float
) -> Walk[tuple[list[Tensor], NormPair | None]]:
    """As `normopt.norms.scales.direction`, of tensors of which ``c`` is what is here.

    Args:
        norm, scale, whole_group, eps: as there.
        c: the parts of n tensors that are here.
        layouts: how they lie: those that are cut, over the same ranks, and unless ``whole_group`` all in the same way.
    """
    cut = [lay for lay in layouts if lay is not None]
    way = next((w for lay in cut if (w := way_of(norm, scale, lay)) != "local"), "local")
    if way == "local":
        return scales.direction(norm, c, scale, whole_group, eps)
    if whole_group and any(way_of(norm, scale, lay) != "sums" for lay in cut):
        return _gathered(norm, c, layouts, scale)
    if way == "whole":
        return _of_shares(norm, c, cut, scale, eps)
    if way == "rows":
        return (yield from _of_rows(norm, c, cut))
    return (yield from _of_sums(norm, c, layouts, scale, whole_group))


def _of_sums(
    norm: Norm, c: list[Tensor], layouts: Layouts, scale: Scale, whole_group: bool
) -> Walk[tuple[list[Tensor], NormPair | None]]:
    """Measured here, combined from all ranks, applied here."""
    # Pieces are counted through, rank by rank, where a norm keeps their places.
    begins = [0 if lay is None else lay.rank * len(c) for lay in layouts]
    partials = norm.numbered(norm.measure(c), begins)
    if whole_group:
        found = yield from pieces(partials, layouts)
        scalars = norm.combine(torch.cat(found)).expand(len(c), -1)
    else:
        scalars = yield from combined(partials, layouts, norm.combine)
    kappa = norm.power_exponent if scale == "power" else 1 if scale == "dual" else 0
    assert kappa is not None  # the plan has refused it
    u = norm.apply(c, norm.numbered(scalars, [-b for b in begins]), kappa)
    dual = scalars[:, 0]
    if scale == "power":
        return u, None
    if scale == "dual":
        return u, NormPair(dual, dual)
    if scale == "unit":
        return u, scales.unit_pair(dual)
    l2 = Lp(2.0)
    lengths = yield from combined(l2.measure([*c, *u]), [*layouts, *layouts], l2.combine)
    u, factors = scales.rescale_to_norm(u, *lengths.tensor_split(2))
    return u, NormPair(factors.to(dual), dual)


def _of_rows(norm: Norm, c: list[Tensor], layouts: Sequence[Layout]) -> Walk[tuple[list[Tensor], NormPair | None]]:
    """Mapped here row by row; only the dual norm, their sum, has to be put together."""
    assert isinstance(norm, MatrixNorm)
    pairs = norm.bare().pairs(c)
    factors = [norm.factor(lay.shape) for lay in layouts]
    sums = torch.stack([f * n for f, (n, _) in zip(factors, pairs, strict=True)])[:, None]
    dual = (yield from combined(sums, layouts, norm.combine))[:, 0]
    u = [f * d for f, (_, d) in zip(factors, pairs, strict=True)]
    return u, scales.unit_pair(dual)


def _of_shares(
    norm: Norm, c: list[Tensor], layouts: Sequence[Layout], scale: Scale, eps: float
) -> tuple[list[Tensor], NormPair | None]:
    """Whole tensors, each on the rank that maps it."""

    def mapped(whole: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        u, pair = scales.direction(norm, whole, scale, False, eps)
        return u, whole[0].new_empty(len(u), 0) if pair is None else torch.stack([x.to(whole[0]) for x in pair], 1)

    measured = scale != "power"
    u, numbers = shared_out(c, layouts, mapped, 2 if measured else 0)
    return u, NormPair(*numbers.unbind(1)) if measured else None


def _gathered(norm: Norm, c: list[Tensor], layouts: Layouts, scale: Scale) -> tuple[list[Tensor], NormPair | None]:
    """The whole group as one vector of a norm that needs whole tensors: all ranks get all."""
    whole = [x if lay is None else gathered_whole(x, lay) for x, lay in zip(c, layouts, strict=True)]
    u, pair = scales.direction(norm, whole, scale, True, 0.0)
    return [x if lay is None else part_of(x, lay) for x, lay in zip(u, layouts, strict=True)], pair
