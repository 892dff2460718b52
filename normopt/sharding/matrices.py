"""Map whole tensors that are sharded: each rank gathers its share of them, maps it, and sends every shard back.

Two all-to-alls for all tensors of one shape.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from normopt.sharding.exchange import all_to_all
from normopt.sharding.layout import Layout

# Maps whole tensors to tensors of their shapes, and to one number each, shape [n].
Map = Callable[[list[Tensor]], tuple[list[Tensor], Tensor]]


def map_full_tensors(shards: list[Tensor], layouts: Sequence[Layout], function: Map) -> tuple[list[Tensor], Tensor]:
    """Return the local shards of the mapped tensors, and the numbers of all tensors, shape [n].

    Args:
        shards: the local shards of n tensors.
        layouts: how they are sharded, all over the same ranks.
        function: maps each tensor by itself.
    """
    owners = owners_of(layouts)
    buckets: dict[object, list[int]] = {}
    for i, (x, lay) in enumerate(zip(shards, layouts, strict=True)):
        buckets.setdefault((lay.shape, lay.dim, x.dtype, x.device), []).append(i)
    shares = [_Share(bucket, owners, layouts[bucket[0]], shards[bucket[0]]) for bucket in buckets.values()]
    whole: dict[int, Tensor] = {}
    for share in shares:
        whole |= share.gather(shards)
    mapped, numbers = function(list(whole.values())) if whole else ([], shards[0].new_empty(0))
    results = dict(zip(whole, zip(mapped, numbers, strict=True), strict=True))
    back: dict[int, tuple[Tensor, Tensor]] = {}
    for share in shares:
        back |= share.scatter(results)
    return [back[i][0] for i in range(len(shards))], torch.stack([back[i][1] for i in range(len(shards))])


class _Share:
    """Tensors of one shape, and which rank maps which of them."""

    def __init__(self, members: list[int], owners: list[int], layout: Layout, like: Tensor) -> None:
        self.layout, self.like = layout, like  # the local shard of any of them
        self.of = [[i for i in members if owners[i] == r] for r in range(layout.ranks)]
        self.mine = self.of[layout.rank]

    def gather(self, shards: list[Tensor]) -> dict[int, Tensor]:
        """Return the tensors of this rank, whole."""
        given = [self._joined([shards[i] for i in members]) for members in self.of]
        shapes = self.layout.shapes()
        got = all_to_all(given, [len(self.mine) * math.prod(s) for s in shapes], self.layout.group)
        split = [x.view(len(self.mine), *s) for x, s in zip(got, shapes, strict=True)]
        return dict(zip(self.mine, torch.cat(split, self.layout.dim + 1), strict=True))

    def scatter(self, results: dict[int, tuple[Tensor, Tensor]]) -> dict[int, tuple[Tensor, Tensor]]:
        """Return the local shards of what all ranks made, each with the number of its tensor."""
        split = [torch.split(results[i][0], self.layout.lengths(), self.layout.dim) for i in self.mine]
        numbers = [results[i][1] for i in self.mine]
        given = [
            self._joined([x for shards, number in zip(split, numbers, strict=True) for x in (shards[r], number)])
            for r in range(self.layout.ranks)
        ]
        n = self.like.numel()
        found = {}
        sizes = [len(members) * (n + 1) for members in self.of]
        for members, got in zip(self.of, all_to_all(given, sizes, self.layout.group), strict=True):
            for i, row in zip(members, got.view(len(members), n + 1), strict=True):
                found[i] = row[:n].view(self.like.shape), row[n]
        return found

    def _joined(self, xs: list[Tensor]) -> Tensor:
        """Return tensors as one vector of the shards' dtype and device."""
        return torch.cat([self.like.new_empty(0), *(x.to(self.like).reshape(-1) for x in xs)])


def owners_of(layouts: Sequence[Layout]) -> list[int]:
    """Return the rank that maps each tensor: the costliest first, each to the rank that has the least to do."""

    def cost(lay: Layout) -> int:
        n = lay.shape.numel()
        return n * min(lay.shape[0], n // max(lay.shape[0], 1)) if n else 0

    costs = [cost(lay) for lay in layouts]
    owners, load = [0] * len(layouts), [0] * layouts[0].ranks
    for i in sorted(range(len(layouts)), key=lambda i: -costs[i]):
        owners[i] = min(range(len(load)), key=load.__getitem__)
        load[owners[i]] += max(costs[i], 1)
    return owners
