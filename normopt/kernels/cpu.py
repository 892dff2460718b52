"""The fused step on CPUs: tables for Numba's kernels, the sums put together, and the work shared out among threads."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from normopt.kernels import numba as kernels
from normopt.kernels.flags import EMA, GENERAL, HEAVY, LINEAR, NONE, Flags, Numbers
from normopt.kernels.pool import share_out
from normopt.kernels.tables import Array, Batch, Block, Chunks
from normopt.norms.base import Scale

F = np.float32
TINY = np.finfo(F).tiny
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
) -> tuple[Tensor, Tensor] | None:
    """One step of a batch, in place; where it needs sums, ``‖c‖⋆`` and the factor of D(c) of each tensor, float64 [n].

    Args:
        flags, numbers: what the plan means.
        scale: the plan's, where its direction needs sums.
        whole_group: all tensors are one vector of the norm.
        batch: the tensors.
        unscale: what gradients are multiplied by, for a GradScaler.
        found_inf: where it is not 0, nothing is written.
        seed: of stochastic rounding.
    """
    if found_inf is not None and float(found_inf) != 0:
        return None
    chunks, kept = batch.chunks, batch.kept
    if "rows" not in kept:
        kept |= {"rows": np.zeros((len(chunks.sizes), COLUMNS), F), "none": np.zeros(len(chunks.sizes), np.int64)}
    rows: Array = kept["rows"]
    values = _values(numbers, 1.0 if unscale is None else float(unscale))
    rows[:, kernels.KEPT], rows[:, kernels.NEW] = numbers.mu, numbers.new
    if flags.momentum == HEAVY:
        rows[batch.new, kernels.KEPT], rows[batch.new, kernels.NEW] = 0, 1
    rows[:, kernels.WIDE] = chunks.wide
    states, lost = (kept["none"] if x is None else x for x in (batch.states, batch.compensations))
    tensors = batch.weights, batch.gradients, states, lost
    table = (chunks.tensor, chunks.start, chunks.count)
    exponents = [exponent_of(float(e)) for e in (numbers.exponent, numbers.decay_exponent)]
    n = len(chunks.sizes)
    blocks = [Block(0, n, 0, len(chunks))]
    exponent = float(numbers.exponent)
    # Powers that have a way of their own are cheaper to take twice than to keep; those above 1 may overflow.
    spared = flags.scaled and flags.mode == GENERAL and exponent <= 1 and not whole_group and chunks.sizes.max() <= ROOM
    if spared:
        blocks = chunks.blocks(BLOCK)
        if "powers" not in kept:
            kept["powers"] = np.empty(max(chunks.before[b.chunks] - chunks.before[b.chunk] for b in blocks), F)
    powers: Array = kept["powers"] if spared else np.empty(0, F)
    early = flags.scaled and flags.momentum in (HEAVY, EMA) and not flags.nesterov and flags.state == torch.float32
    sums, partials = np.empty((len(chunks), 2)), np.empty((len(chunks), 4))
    duals, factors = np.empty(n), np.empty(n)
    agr = kernels.agr_kernel(flags.gradient == torch.bfloat16)
    norms = kernels.norm_kernel(flags._replace(decay=NONE, decay_mode=LINEAR, decay_steep=False), early, spared)
    update = kernels.update_kernel(flags._replace(matched=False), early, spared)
    for block in blocks:
        t, c = slice(block.tensor, block.tensors), slice(block.chunk, block.chunks)
        place = chunks.before[:-1] - chunks.before[block.chunk]

        def everywhere(kernel: kernels.Kernel, *more: object, block: Block = block) -> None:
            share_out(lambda a, b: kernel(*tensors, *table, a, b, *more), chunks, block.chunk, block.chunks)

        if flags.agr:
            everywhere(agr, values[kernels.UNSCALE], sums)
            rows[t, :4] = _regularizers(sums[c], chunks, block)
        if flags.scaled:
            everywhere(norms, rows, values, exponents[0], partials, powers, place)
            with np.errstate(over="ignore", invalid="ignore"):
                duals[t], factors[t] = _duals(partials[c], chunks, block, exponent, scale, whole_group)
                rows[t, kernels.SIZE] = 1 / np.maximum(duals[t], TINY)
                rows[t, kernels.FACTOR] = factors[t] / (np.maximum(duals[t], TINY) ** exponent if spared else 1)
        everywhere(update, rows, values, *exponents, int(seed), powers, place)
    return (torch.from_numpy(duals), torch.from_numpy(factors)) if flags.scaled else None


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
    return kernels.Exponent(F(high), F(e - high), F(e), floor, ceiling)


def _regularizers(partials: Array, chunks: Chunks, block: Block) -> Array:
    """(scale, largest, others, 1/sum) of each tensor's |g|, the last three scaled; scale 0 where AGR leaves it alone.

    The scale is a power of two, so that no sum overflows and none is lost below the smallest float32.
    """
    first, owner = _of(chunks, block)
    tops = np.maximum.reduceat(partials[:, 0], first)
    at_top = np.flatnonzero(partials[:, 0] == tops[owner])
    winners = at_top[np.unique(owner[at_top], return_index=True)[1]]  # one of each tensor
    rest = partials.sum(1)
    rest[winners] = partials[winners, 1]
    others = np.add.reduceat(rest, first)
    totals = tops + others
    usable = (chunks.sizes[block.tensor : block.tensors] > 1) & (totals != 0)  # so is NaN
    scale = np.where(usable, np.exp2(-np.frexp(np.where(np.isfinite(totals), totals, 1))[1].clip(-126, 126)), 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.stack([scale, tops * scale, others * scale, 1 / (totals * scale)], axis=1).astype(F)


def _duals(
    partials: Array, chunks: Chunks, block: Block, exponent: float, scale: Scale, whole_group: bool
) -> tuple[Array, Array]:
    """The dual norm of each tensor of a block, and by what its D(c) is multiplied; one of each for a whole group."""
    first, owner = (np.zeros(k, np.int64) for k in (1, len(chunks))) if whole_group else _of(chunks, block)
    tops = np.maximum.reduceat(partials[:, 0], first)
    ratio = partials[:, 0] / tops[owner]
    q = 1 + exponent
    sums, squares, powers = (
        np.add.reduceat(partials[:, i] * ratio**order, first) for i, order in ((1, q), (2, 2), (3, 2 * exponent))
    )
    norms = tops * sums ** (1 / q)
    factors = np.ones_like(norms)
    if scale == "dual":
        factors = norms
    elif scale == "matched":
        lengths = (tops / np.where(norms > 0, norms, 1)) ** exponent * np.sqrt(powers)
        factors = np.where(norms > 0, tops * np.sqrt(squares) / np.where(lengths > 0, lengths, 1), norms)
    return norms, factors


def _of(chunks: Chunks, block: Block) -> tuple[Array, Array]:
    """The first chunk of each tensor of a block, and the tensor of each chunk, both counted from its first."""
    return (
        chunks.first[block.tensor : block.tensors] - block.chunk,
        chunks.tensor[block.chunk : block.chunks] - block.tensor,
    )
