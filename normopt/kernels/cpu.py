"""The fused step on CPUs: tables for Numba's kernels, the sums put together, and the work shared out among threads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from normopt.kernels import numba as kernels
from normopt.kernels import totals
from normopt.kernels.compiling import called
from normopt.kernels.flags import EMA, GENERAL, HEAVY, LINEAR, NONE, Flags, Numbers
from normopt.kernels.pool import share_out
from normopt.kernels.tables import Array, Batch, Block, Chunks
from normopt.norms.base import Scale
from normopt.sharding.exchange import Partials, Walk
from normopt.sharding.layout import Layout

F = np.float32
Places = tuple[Array, Array, int, int]  # where the sums of each tensor begin and end, and which tensors are meant
SCALES = {"dual": totals.DUAL, "unit": totals.UNIT, "matched": totals.MATCHED}
COLUMNS = kernels.WIDE + 1
BLOCK = 1 << 21  # entries of tensors whose powers are kept, in 4 bytes each, from one pass to the next
ROOM = 1 << 24  # entries of a larger tensor up to which its powers are kept too


def run(
    flags: Flags,
    numbers: Numbers,
    scale: Scale,
    whole_group: bool,
    batch: Batch,
    *,
    unscale: Tensor | None = None,
    found_inf: Tensor | None = None,
    seed: Tensor | int = 0,
    layouts: Sequence[Layout] = (),
) -> Walk[tuple[Tensor, Tensor] | None]:
    """One step of a batch, in place; where it needs sums, ``‖c‖⋆`` and the factor of D(c) of each tensor, float64 [n].

    Args:
        flags, numbers: what the plan means.
        scale: the plan's, where its direction needs sums.
        whole_group: all tensors are one vector of the norm.
        batch: the tensors.
        unscale: what gradients are multiplied by, for a GradScaler.
        found_inf: where it is not 0, nothing is written.
        seed: of stochastic rounding.
        layouts: how the tensors lie, if the batch is what is here of tensors that are cut over ranks.
    """
    if found_inf is not None and float(found_inf) != 0:
        return None
    chunks, kept = batch.chunks, batch.kept
    factor = 1.0 if unscale is None else float(unscale)
    ready: _Ready | None = kept.get("ready")
    if ready is None or ready.numbers is not numbers or ready.unscale != factor:
        ready = kept["ready"] = _Ready(flags, numbers, whole_group or bool(layouts), chunks, factor, kept)
    rows, values, powers = ready.rows, ready.values, ready.powers
    if flags.momentum == HEAVY and batch.new:
        rows[batch.new, kernels.KEPT], rows[batch.new, kernels.NEW] = 0, 1
        kept.pop("ready")  # the next step's weigh them all alike again
    states, lost = (ready.none if x is None else x for x in (batch.states, batch.compensations))
    tensors = batch.weights, batch.gradients, states, lost, chunks.tensor, chunks.start, chunks.count
    n = len(chunks.sizes)
    sums, partials = np.empty((len(chunks), 2)), np.empty((len(chunks), 4))
    duals, factors = np.empty(n), np.empty(n)
    for block, place in ready.blocks:

        def everywhere(kernel: kernels.Kernel, *more: object, block: Block = block) -> None:
            def work(a: int, b: int) -> None:
                kernel(*tensors, a, b, *more)

            called(share_out, work, chunks, block.chunk, block.chunks, compiled=kernel)

        where: Places = (chunks.first, chunks.ends, block.tensor, block.tensors)
        if flags.agr:
            everywhere(ready.agr, values[kernels.UNSCALE], sums)
            if layouts:
                called(totals.largest_of_each, sums, chunks.first, chunks.ends, here := np.empty((n, 2)))
                sums, where = yield from _of_all_ranks(here, layouts)
            sizes = np.array([lay.shape.numel() for lay in layouts]) if layouts else chunks.sizes
            called(totals.regularizers, sums, sizes, *where, rows)
        spared = ready.spared
        if flags.scaled:
            everywhere(ready.norms, rows, values, ready.exponent, partials, powers, place)
            exponent, how = float(numbers.exponent), SCALES[scale]
            if layouts:
                here = np.empty((n, 4))
                called(totals.merge_each, partials, chunks.first, chunks.ends, exponent, how == totals.MATCHED, here)
                partials, where = yield from _of_all_ranks(here, layouts)
            known = whole_group, exponent, how, ready.spared, rows, duals, factors
            spared = called(totals.duals, partials, *where, *known)
        update = ready.update if spared == ready.spared else ready.unspared
        everywhere(update, rows, values, ready.exponent, ready.decay_exponent, int(seed), powers, place)
    return (torch.from_numpy(duals), torch.from_numpy(factors)) if flags.scaled else None


def _of_all_ranks(here: Array, layouts: Sequence[Layout]) -> Walk[tuple[Array, Places]]:
    """The sums of each tensor from all ranks, one below the other, and where they are."""
    found = yield Partials(torch.from_numpy(here), layouts[0])
    n, ranks = len(layouts), layouts[0].ranks
    first = np.arange(n) * ranks
    return found.reshape(n * ranks, -1).numpy(), (first, first + ranks, 0, n)


class _Ready:
    """All that follows from a plan's flags and numbers and from the chunks: made once, for as long as they stay."""

    def __init__(
        self, flags: Flags, numbers: Numbers, at_once: bool, chunks: Chunks, unscale: float, kept: dict[str, Any]
    ) -> None:
        n = len(chunks.sizes)
        self.numbers, self.unscale = numbers, unscale
        self.values = _values(numbers, unscale)
        self.exponent, self.decay_exponent = (exponent_of(float(e)) for e in (numbers.exponent, numbers.decay_exponent))
        self.rows = np.zeros((n, COLUMNS), F)
        self.rows[:, kernels.KEPT], self.rows[:, kernels.NEW], self.rows[:, kernels.WIDE] = (
            numbers.mu,
            numbers.new,
            chunks.wide,
        )
        self.none = np.zeros(n, np.int64)
        # Powers that have a way of their own are cheaper to take twice than to keep; those above 1 may overflow.
        general = flags.scaled and flags.mode == GENERAL and float(numbers.exponent) <= 1
        self.spared = general and not at_once and bool(chunks.sizes.max() <= ROOM)
        blocks = chunks.blocks(BLOCK) if self.spared else [Block(0, n, 0, len(chunks))]
        self.blocks = [(block, chunks.before[:-1] - chunks.before[block.chunk]) for block in blocks]
        if self.spared and "powers" not in kept:
            kept["powers"] = np.empty(max(chunks.before[b.chunks] - chunks.before[b.chunk] for b in blocks), F)
        self.powers: Array = kept["powers"] if self.spared else np.empty(0, F)
        early = flags.scaled and flags.momentum in (HEAVY, EMA) and not flags.nesterov and flags.state == torch.float32
        self.agr = kernels.agr_kernel(flags.gradient == torch.bfloat16)
        undecayed = flags._replace(decay=NONE, decay_mode=LINEAR, decay_steep=False)
        self.norms = kernels.norm_kernel(undecayed, early, self.spared)
        self.update, self.unspared = (
            kernels.update_kernel(flags._replace(matched=False), early, spared) for spared in (self.spared, False)
        )


def _values(numbers: Numbers, unscale: float) -> Array:
    """The numbers that all tensors share, in float32."""
    n = Numbers(*map(float, numbers))
    return np.array([unscale, n.reach, n.mu, n.beta2, 1 - n.beta2, n.coupled, n.shrink, n.pull, n.eps], dtype=F)


def exponent_of(e: float) -> kernels.Exponent:
    """An exponent as the kernels take it."""
    mantissa, place = math.frexp(e)
    high = math.ldexp(round(mantissa * 4096), place - 12)
    with np.errstate(over="ignore"):
        floor = F(2.0 ** max(-126 / e, -160)) if e > 0 else F(0)
        ceiling = F(np.exp2(128 / e)) if e > 1 else F(np.inf)
    logs = tuple(F(e * float(x)) for x in kernels.LOGARITHM)
    return kernels.Exponent(F(high), F(e - high), logs, floor, ceiling)
