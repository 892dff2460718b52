"""What ranks have to know of each other in a step, brought together: one collective for all tensors, a phase.

A walk is a generator. Where it needs the partial sums of the other ranks it yields its own, and is sent all of them.
All walks of a step go in lockstep, so that what they ask for at the same time travels together.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import is_fake

from normopt.norms.base import Norm, as_real, to_compute_dtype
from normopt.sharding.layout import Layout, layout_of, local, resolved

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")


class Partials(NamedTuple):
    """What a walk asks with: the partial sums of n tensors on this rank, shape [n, w], and how one of them lies."""

    sums: Tensor
    layout: Layout


Walk = Generator[Partials, Tensor, T]
Layouts = Sequence[Layout | None]


def pieces(sums: Tensor, layouts: Layouts) -> Walk[list[Tensor]]:
    """The partial sums of n tensors from all ranks that have parts of them, in their order: n of shape [k, w].

    Args:
        sums: this rank's, shape [n, w].
        layouts: how the tensors lie; those that are cut, over the same ranks.
    """
    cut = next((lay for lay in layouts if lay is not None), None)
    if cut is None:
        return list(sums[:, None])
    found = yield Partials(sums, cut)
    return [x[:1] if lay is None else x for x, lay in zip(found, layouts, strict=True)]


def combined(sums: Tensor, layouts: Layouts, combine: Callable[[Tensor], Tensor]) -> Walk[Tensor]:
    """What the partial sums of each of n tensors come to, shape [n, s].

    Args:
        sums: this rank's, shape [n, w].
        layouts: how the tensors lie; those that are cut, over the same ranks.
        combine: from [n, k, w], of k ranks, to [n, s].
    """
    found = yield from pieces(sums, layouts)
    if len({len(x) for x in found}) == 1:
        return combine(torch.stack(found))
    return torch.cat([combine(x[None]) for x in found])


def alone(walk: Walk[T]) -> T:
    """The result of a walk that has nothing to ask.

    Raises:
        RuntimeError: it asks.
    """
    try:
        next(walk)
    except StopIteration as done:
        return done.value  # type: ignore[no-any-return]
    raise RuntimeError("a walk over whole tensors has asked for those of other ranks")


def lockstep(walks: Sequence[Walk[T]]) -> list[T]:
    """The results of walks that all ranks make in the same order: as many collectives as a walk has phases."""
    found: dict[int, T] = {}
    answers: dict[int, Tensor | None] = dict.fromkeys(range(len(walks)))
    while answers:
        asked: dict[int, Partials] = {}
        for i, answer in answers.items():
            try:
                asked[i] = next(walks[i]) if answer is None else walks[i].send(answer)
            except StopIteration as done:
                found[i] = done.value
        answers = dict(zip(asked, gathered(list(asked.values())), strict=True))
    return [found[i] for i in range(len(walks))]


def gathered(asked: Sequence[Partials]) -> list[Tensor]:
    """The partial sums [n, k, w] of all ranks for each that is asked: one collective for each process group.

    They travel in float64, in which every smaller float is exact.
    """
    found: dict[int, Tensor] = {}
    for members in by_group([a.layout for a in asked]):
        sums, layout = [asked[i].sums for i in members], asked[members[0]].layout
        mine = torch.cat([x.to(sums[0].device, torch.float64).reshape(-1) for x in sums])
        everyones = mine.new_empty(layout.ranks, len(mine))
        dist.all_gather(list(everyones), mine, group=layout.group)
        parts = torch.split(everyones, [x.numel() for x in sums], dim=1)
        for i, x, part in zip(members, sums, parts, strict=True):
            found[i] = part.reshape(layout.ranks, *x.shape).transpose(0, 1).to(x)
    return [found[i] for i in range(len(asked))]


def swapped(parts: Sequence[Tensor], sizes: Sequence[int], group: ProcessGroup) -> list[Tensor]:
    """What each rank has for this one, from what this one has for each: one all-to-all.

    Args:
        parts: a vector for each rank.
        sizes: how many numbers each rank has for this one.
        group: the ranks.
    """
    given = torch.cat([x.reshape(-1) for x in parts])
    got = given.new_empty(sum(sizes))
    dist.all_to_all_single(got, given, list(sizes), [x.numel() for x in parts], group=group)
    return list(torch.split(got, list(sizes)))


def by_group(layouts: Layouts) -> list[list[int]]:
    """Which tensors can be asked for together: those that are whole or cut over the same ranks."""
    found: dict[object, list[int]] = {}
    for i, lay in enumerate(layouts):
        found.setdefault(None if lay is None else lay.group, []).append(i)
    return list(found.values())


def of_each(
    xs: Sequence[Tensor], measure: Callable[[Tensor], Tensor], combine: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """What the partial sums of each tensor come to, wherever its parts lie: shape [s] each.

    Args:
        xs: tensors, of any layouts.
        measure: the partial sums of what is here of a tensor, shape [w].
        combine: from [n, k, w], of k ranks, to [n, s].
    """
    walks = [combined(measure(local(x))[None], [layout_of(x)], combine) for x in xs]
    return [scalars[0] for scalars in lockstep(walks)]


def nonzero(params: Sequence[Tensor]) -> list[bool]:
    """Return for each tensor whether an entry on any rank is not 0; True for fake tensors, which have no values."""
    if detect_fake_mode() is not None or any(map(is_fake, params)):
        return [True] * len(params)
    found = of_each(params, lambda x: x.any().reshape(1).to(torch.float32), lambda sums: sums.amax(1))
    return [bool(x) for x in found]


def summed(numbers: Tensor, layout: Layout) -> Tensor:
    """The sum of numbers over the ranks of a layout, in their order."""
    walk = combined(numbers.reshape(1, -1), [layout], lambda x: x.sum(1))
    return lockstep([walk])[0].view_as(numbers)


def as_one_vector(norm: Norm, xs: Sequence[Tensor]) -> Tensor:
    """The dual norm, 0-d, of tensors as one vector; those that are cut, over the same ranks.

    Args:
        norm: one that is of partial sums: of needs "tensor".
        xs: tensors of real floats of 32 bits or more, or parts of them.
    """
    layouts = [layout_of(x) for x in xs]
    sums = norm.measure([to_compute_dtype(as_real(resolved(local(x)))) for x in xs])
    return norm.combine(torch.cat(lockstep([pieces(sums, layouts)])[0]))[0]
