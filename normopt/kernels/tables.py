"""Tables for kernels: the addresses of a group's tensors, and the chunks into which they are split."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch

from normopt.sharding.layout import Layout

Array = np.ndarray

CHUNK = 4096  # entries: 16 KB of float32, so that what a chunk reads twice it finds in the nearest cache


class Phase(NamedTuple):
    """A phase of a fused step, with the methods of a `Stage`; ``measure`` returns None if no rank has to be asked."""

    measure: Callable[[Any], torch.Tensor | None]
    apply: Callable[[Any, torch.Tensor | None], None]

    def reduce(self, pieces: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return the partial sums of all ranks, shape [n, k, w]: kernels combine them."""
        return torch.stack(list(pieces))


def nothing(batch: Any) -> None:
    """Measure nothing."""


class Block(NamedTuple):
    """A range of tensors, and the range of their chunks."""

    tensor: int
    tensors: int
    chunk: int
    chunks: int


class Chunks:
    """The chunks of tensors of given shapes, none of them empty.

    Attributes:
        sizes: the number of entries of each tensor, shape [n].
        wide: which tensors have two dims or more, shape [n]; the others are not ℓp-decayed.
        tensor, start, count: of each chunk its tensor, its first entry and its number of entries, shape [chunks].
        first, ends: the first chunk of each tensor, and that after its last, shape [n].
        before: the number of entries before each chunk, and of all at the end, shape [chunks + 1].
        total: the number of all entries.
    """

    def __init__(self, shapes: Sequence[torch.Size], chunk: int = CHUNK) -> None:
        self.sizes = np.array([shape.numel() for shape in shapes], dtype=np.int64)
        self.wide = np.array([len(shape) >= 2 for shape in shapes], dtype=np.bool_)
        each = -(-self.sizes // chunk)
        self.ends = np.cumsum(each)
        self.first = self.ends - each
        self.tensor = np.repeat(np.arange(len(each)), each)
        self.start = (np.arange(each.sum()) - np.repeat(self.first, each)) * chunk
        self.count = np.minimum(chunk, self.sizes[self.tensor] - self.start)
        self.before = np.concatenate(([0], np.cumsum(self.count)))
        self.total = int(self.before[-1])

    def blocks(self, entries: int) -> list[Block]:
        """Return blocks of consecutive tensors of at most so many entries together, or of single larger ones."""
        ends = np.cumsum(self.sizes)
        found, t = [], 0
        while t < len(self.sizes):
            before = ends[t] - self.sizes[t]
            after = max(t + 1, int(np.searchsorted(ends, before + entries, side="right")))
            chunks = np.append(self.first, len(self))[[t, after]].tolist()
            found.append(Block(t, after, *chunks))
            t = after
        return found

    def __len__(self) -> int:
        return len(self.tensor)

    def shared(self, parts: int, begin: int, end: int) -> list[tuple[int, int]]:
        """Split the chunks ``begin`` to ``end`` into at most so many ranges of about the same number of entries."""
        goals = np.linspace(self.before[begin], self.before[end], parts + 1)
        ends = np.searchsorted(self.before, goals).clip(begin, end).tolist()
        return [(a, b) for a, b in pairwise(ends) if a < b]


@dataclass
class Tables:
    """The addresses of n tensors of one group, one device and one dtype each, none of them empty and all contiguous.

    Attributes:
        chunks: the chunks into which they are split.
        device: where they are.
        weights, gradients: the addresses of their memory, shape [n], int64.
        states: those of the momentum, None without one.
        compensations: those of what Kahan's rounding keeps, None without it.
        buffers: those of further float32 state, by the names in `BUFFERS`. If it is the dict of the step before, all
            arrays of addresses are those of the step before, with other entries at most in the gradients'.
        shares: what c, √v and d of each tensor are multiplied by, [n, 3] on the device; None without bias corrections.
        new: of each slot the indices of what was made in this step.
        cache: what a backend keeps from step to step, such as tables on its device. A "step" in it is asked to
            ``renew(flags, numbers, tables)`` before another is made.
        unscale: what gradients are multiplied by, for a GradScaler; one element on the device.
        found_inf: where it is not 0, nothing is written; likewise.
        seed: of stochastic rounding. In a captured graph an int is the same at every replay.
        radii: of the spheres that the weights are kept on, NaN where that is yet to be measured, and then it is
            written here, [n] on the device; None without a sphere.
        layouts: how the tensors are sharded, if they are local shards.
    """

    chunks: Chunks
    device: torch.device
    weights: Array
    gradients: Array
    states: Array | None
    compensations: Array | None
    new: dict[str, list[int]]
    cache: dict[str, Any] = field(default_factory=dict)
    unscale: torch.Tensor | None = None
    found_inf: torch.Tensor | None = None
    seed: torch.Tensor | int = 0
    radii: torch.Tensor | None = None
    layouts: Sequence[Layout] = ()
    buffers: dict[str, Array] = field(default_factory=dict)
    shares: torch.Tensor | None = None
