"""Reduce partial sums over the ranks that hold shards of a tensor: one collective a phase for all tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import is_fake

from normopt.norms.base import Norm, as_real, indices_by, to_compute_dtype
from normopt.sharding.layout import Layout, layout_of, resolved, to_local

Layouts = Sequence[Layout | None]


def run_together(batches: Sequence[Any]) -> None:
    """Run the phases of batches of sharded tensors, with one collective a phase for all batches.

    Args:
        batches: objects with ``layouts``, and ``phases`` with the ``measure``, ``reduce`` and ``apply`` of a `Stage`.
    """
    waiting: list[tuple[Any, Iterator[Any]]] = [(batch, iter(batch.phases)) for batch in batches]
    while waiting:
        asked = []
        for batch, phases in waiting:
            for phase in phases:
                partials = phase.measure(batch)
                if partials is not None:
                    asked.append((batch, phases, phase, partials))
                    break
                phase.apply(batch, None)
        found = gather_pieces([(partials, batch.layouts) for batch, _, _, partials in asked])
        for (batch, _, phase, _), pieces in zip(asked, found, strict=True):
            phase.apply(batch, phase.reduce(pieces))
        waiting = [(batch, phases) for batch, phases, _, _ in asked]


def gather_pieces(asked: Sequence[tuple[Tensor, Layouts]]) -> list[list[Tensor]]:
    """Return the partial sums of all ranks: for each entry of ``asked`` n tensors, shape [k, w], in the order of ranks.

    One collective for each process group. Sums are sent in float64, which holds every smaller float exactly.

    Args:
        asked: pairs of this rank's partial sums of n tensors, shape [n, w], and the layouts of the tensors. The
            sharded ones among the n are sharded over the same ranks.
    """
    shardings = [next((lay for lay in layouts if lay is not None), None) for _, layouts in asked]
    found: dict[int, list[Tensor]] = {}
    for members in indices_by(None if lay is None else lay.group for lay in shardings).values():
        sums, layout = [asked[i][0] for i in members], shardings[members[0]]
        if layout is None:
            found |= {i: list(x[:, None]) for i, x in zip(members, sums, strict=True)}
            continue
        mine = torch.cat([x.to(sums[0].device, torch.float64).reshape(-1) for x in sums])
        everyones = mine.new_empty(layout.ranks, len(mine))
        dist.all_gather(list(everyones), mine, group=layout.group)
        parts = torch.split(everyones, [x.numel() for x in sums], dim=1)
        for i, x, part in zip(members, sums, parts, strict=True):
            all_ranks = part.reshape(layout.ranks, *x.shape).transpose(0, 1).to(x)
            found[i] = [y[:1] if lay is None else y for y, lay in zip(all_ranks, asked[i][1], strict=True)]
    return [found[i] for i in range(len(asked))]


def of_each(
    xs: Sequence[Tensor], measure: Callable[[Tensor], Tensor], combine: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """Return the reduced partial sums of each tensor, sharded or not: shape [s] each.

    Args:
        xs: tensors of any layouts.
        measure: returns the partial sums of a local shard, shape [w].
        combine: reduces [n, k, w], of k ranks, to [n, s].
    """
    asked = [(measure(to_local(x))[None], [layout_of(x)]) for x in xs]
    return [combine(pieces[0][None])[0] for pieces in gather_pieces(asked)]


def nonzero(params: Sequence[Tensor]) -> list[bool]:
    """Return for each tensor whether any rank has a nonzero entry; True for fake tensors, which have no values."""
    if detect_fake_mode() is not None or any(map(is_fake, params)):
        return [True] * len(params)
    found = of_each(params, lambda x: x.any().reshape(1).to(torch.float32), lambda sums: sums.amax(1))
    return [bool(x) for x in found]


def sum_over_ranks(numbers: Tensor, layout: Layout) -> Tensor:
    """Return the sum of numbers over the ranks of a layout, in their order."""
    return gather_pieces([(numbers.reshape(1, -1), [layout])])[0][0].sum(0).view_as(numbers)


def global_dual_norm(norm: Norm, xs: Sequence[Tensor]) -> Tensor:
    """Return the dual norm, 0-d, of tensors as one vector.

    Args:
        norm: a norm that needs only partial sums ("tensor").
        xs: tensors; the sharded ones are sharded over the same ranks.
    """
    layouts = [layout_of(x) for x in xs]
    sums = norm.measure([to_compute_dtype(as_real(resolved(to_local(x)))) for x in xs])
    return norm.combine(torch.cat(gather_pieces([(sums, layouts)])[0]))[0]
