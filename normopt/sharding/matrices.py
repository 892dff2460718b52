"""Map sharded tensors as whole tensors: each rank gathers some of them, maps them, and sends the shards back.

All tensors of one shape take two all-to-alls.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from normopt.norms.base import indices_by
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
    buckets = indices_by((lay.shape, lay.dim, x.dtype, x.device) for x, lay in zip(shards, layouts, strict=True))
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
    """Tensors of one shape, and the indices of those that each rank maps."""

    def __init__(self, members: list[int], owners: list[int], layout: Layout, like: Tensor) -> None:
        self.layout, self.like = layout, like  # the local shard of any of them
        self.of = [[i for i in members if owners[i] == r] for r in range(layout.ranks)]
        self.mine = self.of[layout.rank]

    def gather(self, shards: list[Tensor]) -> dict[int, Tensor]:
        """Return the whole tensors that this rank maps."""
        given = [[shards[i] for i in members] for members in self.of]
        shapes = self.layout.shapes()
        got = self._all_to_all(given, [len(self.mine) * math.prod(s) for s in shapes])
        split = [x.view(len(self.mine), *s) for x, s in zip(got, shapes, strict=True)]
        return dict(zip(self.mine, torch.cat(split, self.layout.dim + 1), strict=True))

    def scatter(self, results: dict[int, tuple[Tensor, Tensor]]) -> dict[int, tuple[Tensor, Tensor]]:
        """Return the local shards of the results of all ranks, each with the number of its tensor."""
        lengths, dim, n = self.layout.lengths(), self.layout.dim, self.like.numel()
        # The shard and the number that each rank gets, for each tensor of this rank.
        parts = [[(x, results[i][1]) for x in torch.split(results[i][0], lengths, dim)] for i in self.mine]
        given = [[x for of_tensor in parts for x in of_tensor[r]] for r in range(self.layout.ranks)]
        found = {}
        sizes = [len(members) * (n + 1) for members in self.of]
        for members, got in zip(self.of, self._all_to_all(given, sizes), strict=True):
            for i, row in zip(members, got.view(len(members), n + 1), strict=True):
                found[i] = row[:n].view(self.like.shape), row[n]
        return found

    def _all_to_all(self, parts: list[list[Tensor]], sizes: list[int]) -> tuple[Tensor, ...]:
        """Send tensors to each rank and return a vector from each, of these sizes, in the dtype of the shards."""
        given = torch.cat([self.like.new_empty(0), *(x.to(self.like).reshape(-1) for xs in parts for x in xs)])
        got = given.new_empty(sum(sizes))
        dist.all_to_all_single(got, given, sizes, [sum(x.numel() for x in xs) for xs in parts], group=self.layout.group)
        return torch.split(got, sizes)


def owners_of(layouts: Sequence[Layout]) -> list[int]:
    """Return the rank that maps each tensor: the costliest are assigned first, each to the rank with the least load."""

    def cost(lay: Layout) -> int:
        n = lay.shape.numel()
        return n * min(lay.shape[0], n // max(lay.shape[0], 1)) if n else 0

    costs = [cost(lay) for lay in layouts]
    owners, load = [0] * len(layouts), [0] * layouts[0].ranks
    for i in sorted(range(len(layouts)), key=lambda i: -costs[i]):
        owners[i] = min(range(len(load)), key=load.__getitem__)
        load[owners[i]] += max(costs[i], 1)
    return owners
