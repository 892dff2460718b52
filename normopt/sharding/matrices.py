"""Whole matrices of parts: each rank is given its share of them, maps those, and sends every part back.

Two all-to-alls for all matrices of one shape. `gathered_whole` is the way that needs no thought: every rank gets all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from normopt.sharding.exchange import swapped
from normopt.sharding.layout import Layout

# Maps whole tensors to tensors of their shapes, and to so many numbers each: shape [n, numbers].
Map = Callable[[list[Tensor]], tuple[list[Tensor], Tensor]]


def shared_out(
    parts: list[Tensor], layouts: Sequence[Layout], function: Map, numbers: int
) -> tuple[list[Tensor], Tensor]:
    """The parts here of what a function makes of whole tensors, and its numbers, [n, numbers], on all ranks.

    Args:
        parts: of n tensors what is here.
        layouts: how they lie, all over the same ranks.
        function: works on each tensor by itself.
        numbers: how many numbers it gives of each.
    """
    owners = owners_of(layouts)
    buckets: dict[object, list[int]] = {}
    for i, (x, lay) in enumerate(zip(parts, layouts, strict=True)):
        buckets.setdefault((lay.shape, lay.dim, x.dtype, x.device), []).append(i)
    shares = [_Share(bucket, owners, layouts[bucket[0]], parts[bucket[0]]) for bucket in buckets.values()]
    whole: dict[int, Tensor] = {}
    for share in shares:
        whole |= share.bring(parts)
    made, said = function(list(whole.values())) if whole else ([], parts[0].new_empty(0, numbers))
    mapped = dict(zip(whole, zip(made, said, strict=True), strict=True))
    back: dict[int, tuple[Tensor, Tensor]] = {}
    for share in shares:
        back |= share.send_back(mapped, numbers)
    return [back[i][0] for i in range(len(parts))], torch.stack([back[i][1] for i in range(len(parts))])


class _Share:
    """Tensors of one shape, and who maps which of them."""

    def __init__(self, members: list[int], owners: list[int], layout: Layout, like: Tensor) -> None:
        self.layout, self.like = layout, like  # the part of any of them that is here
        self.of = [[i for i in members if owners[i] == r] for r in range(layout.ranks)]
        self.mine = self.of[layout.rank]

    def bring(self, parts: list[Tensor]) -> dict[int, Tensor]:
        """The tensors of this rank, whole."""
        given = [self._joined([parts[i] for i in members]) for members in self.of]
        shapes = self.layout.shapes()
        got = swapped(given, [len(self.mine) * math.prod(s) for s in shapes], self.layout.group)
        cut = [x.view(len(self.mine), *s) for x, s in zip(got, shapes, strict=True)]
        return dict(zip(self.mine, torch.cat(cut, self.layout.dim + 1), strict=True))

    def send_back(self, mapped: dict[int, tuple[Tensor, Tensor]], numbers: int) -> dict[int, tuple[Tensor, Tensor]]:
        """The parts here of what all ranks made, each with the numbers of its tensor."""
        cut = [torch.split(mapped[i][0], self.layout.lengths(), self.layout.dim) for i in self.mine]
        said = [mapped[i][1] for i in self.mine]
        given = [
            self._joined([x for part, s in zip(cut, said, strict=True) for x in (part[r], s)])
            for r in range(self.layout.ranks)
        ]
        n = self.like.numel()
        found = {}
        sizes = [len(members) * (n + numbers) for members in self.of]
        for members, got in zip(self.of, swapped(given, sizes, self.layout.group), strict=True):
            for i, row in zip(members, got.view(len(members), n + numbers), strict=True):
                found[i] = row[:n].view(self.like.shape), row[n:]
        return found

    def _joined(self, xs: list[Tensor]) -> Tensor:
        """Tensors as one vector, as those that are shared out."""
        return torch.cat([self.like.new_empty(0), *(x.to(self.like).reshape(-1) for x in xs)])


def owners_of(layouts: Sequence[Layout]) -> list[int]:
    """Who maps which tensor: the costliest first, each to the rank that has the least to do."""

    def cost(lay: Layout) -> int:
        n = lay.shape.numel()
        return n * min(lay.shape[0], n // max(lay.shape[0], 1)) if n else 0

    costs = [cost(lay) for lay in layouts]
    owners, load = [0] * len(layouts), [0] * layouts[0].ranks
    for i in sorted(range(len(layouts)), key=lambda i: -costs[i]):
        owners[i] = min(range(len(load)), key=load.__getitem__)
        load[owners[i]] += max(costs[i], 1)
    return owners


def gathered_whole(part: Tensor, layout: Layout) -> Tensor:
    """A whole tensor, on every rank, from its parts: one collective for each tensor."""
    sizes = [math.prod(shape) for shape in layout.shapes()]
    mine = torch.nn.functional.pad(part.reshape(-1), (0, max(sizes) - part.numel()))
    everyones = [torch.empty_like(mine) for _ in sizes]
    dist.all_gather(everyones, mine, group=layout.group)
    cut = [x[:n].view(shape) for x, n, shape in zip(everyones, sizes, layout.shapes(), strict=True)]
    return torch.cat(cut, layout.dim)


def part_of(whole: Tensor, layout: Layout) -> Tensor:
    """What of a whole tensor belongs here."""
    return torch.split(whole, layout.lengths(), layout.dim)[layout.rank].contiguous()
