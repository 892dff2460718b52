"""The fused step on CPUs: tables for Numba's kernels, the sums put together, and the work shared out among threads."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from normopt.kernels import numba as kernels
from normopt.kernels import totals
from normopt.kernels.compiling import call_with_jit_lock
from normopt.kernels.flags import BUFFERS, GENERAL, LINEAR, SAME, Flags, Numbers
from normopt.kernels.pool import share_out
from normopt.kernels.tables import Array, Block, Chunks, Phase, Tables, nothing

F = np.float32
Places = tuple[Array, Array, int, int]  # where the sums of each tensor begin and end, and which tensors are meant
COLUMNS = kernels.STRETCH + 1
# The numbers that all tensors share: of the others two are in the rows of tensors, exponents have another form.
SHARED = [name for name in Numbers._fields if name not in ("take", "first", "exponent", "decay_exponent")]
BLOCK = 1 << 21  # entries of tensors whose powers are kept, in 4 bytes each, from one pass to the next
ROOM = 1 << 24  # entries of a larger tensor up to which its powers are kept too


class Step:
    """One step of a batch, in place.

    Args:
        flags, numbers: the stages' parts of the step.
        tables: the tensors, and what else the step is given.

    Attributes:
        measured: after the step ``‖c‖⋆`` and the factor of D(c) of each tensor, float64 [n]; None if it needs no sums.
    """

    def __init__(self, flags: Flags, numbers: Numbers, tables: Tables) -> None:
        self.flags, self.numbers, self.layouts, self.seed = flags, numbers, tables.layouts, int(tables.seed)
        self.measured: tuple[Tensor, Tensor] | None = None
        chunks, cache = tables.chunks, tables.cache
        factor = 1.0 if tables.unscale is None else float(tables.unscale)
        ready: LaunchConfig | None = cache.get("ready")
        if ready is None or not ready.renew(flags, numbers, factor):
            ready = cache["ready"] = LaunchConfig(flags, numbers, bool(self.layouts), chunks, factor, cache)
        self.ready, self.chunks = ready, chunks
        if flags.momentum and numbers.first != numbers.take and (new := tables.new["momentum_buffer"]):
            ready.rows[new, kernels.TAKE] = numbers.first
            ready.numbers = None  # the next step has the same weight for all
        if tables.shares is not None:
            ready.rows[:, kernels.SHARE : kernels.BEGUN] = tables.shares
        if flags.differs:
            ready.rows[:, kernels.BEGUN] = 1
            ready.rows[tables.new["previous_grad"], kernels.BEGUN] = 0
        more = (ready.none if x is None else x for x in (tables.states, tables.compensations))
        buffers = tuple(tables.buffers.get(name, ready.none) for name in BUFFERS)
        self.tensors = (tables.weights, tables.gradients, *more), buffers, (chunks.tensor, chunks.start, chunks.count)
        n = len(chunks.sizes)
        self.sums, self.partials = np.empty((len(chunks), 2)), np.empty((len(chunks), 5))
        self.duals, self.factors = np.empty(n), np.empty(n)
        self.powers_cached = ready.powers_cached
        self.radii = np.empty(n) if tables.radii is None else tables.radii.numpy()

    def phases(self) -> list[Phase]:
        """Return the phases: for unsharded tensors one, which goes block by block, so that a block stays cached."""
        if not self.layouts:
            return [Phase(nothing, lambda _, __: self._run_blocks())]
        flags, (block, place) = self.flags, self.ready.blocks[0]
        last = Phase(nothing, lambda _, __: self._update(block, place))
        norms = [Phase(lambda _: self._norms_of_shards(block, place), self._set_norms)] if flags.sums else []
        return ([Phase(lambda _: self._sums_of_shards(block), self._set_agr)] if flags.agr else []) + norms + [last]

    def _run_blocks(self) -> None:
        for block, place in self.ready.blocks:
            where = self.chunks.first, self.chunks.ends, block.tensor, block.tensors
            if self.flags.agr:
                self._measure_agr(block)
                self._regularize(self.sums, where)
            if self.flags.sums:
                self._measure_norms(block, place)
                self._combine_norms(self.partials, where)
            self._update(block, place)

    def _everywhere(self, block: Block, kernel: kernels.Kernel, *more: object) -> None:
        """Run a kernel on the chunks of a block, shared out among threads."""

        def work(a: int, b: int) -> None:
            kernel(*self.tensors, a, b, *more)

        call_with_jit_lock(share_out, work, self.chunks, block.chunk, block.chunks, compiled=kernel)

    def _measure_agr(self, block: Block) -> None:
        self._everywhere(block, self.ready.agr, self.ready.values[kernels.UNSCALE], self.sums)

    def _sums_of_shards(self, block: Block) -> Tensor:
        self._measure_agr(block)
        found, chunks = np.empty((len(self.duals), 2)), self.chunks
        call_with_jit_lock(totals.largest_of_each, self.sums, chunks.first, chunks.ends, found)
        return torch.from_numpy(found)

    def _set_agr(self, _: Any, found: Tensor | None) -> None:
        self._regularize(*_all_ranks(found))

    def _regularize(self, sums: Array, where: Places) -> None:
        sizes = np.array([lay.shape.numel() for lay in self.layouts]) if self.layouts else self.chunks.sizes
        call_with_jit_lock(totals.regularizers, sums, sizes, *where, self.ready.rows)

    def _measure_norms(self, block: Block, place: Array) -> None:
        ready, sums = self.ready, self.partials
        self._everywhere(block, ready.norms, ready.rows, ready.values, ready.exponent, sums, ready.powers, place)

    def _norms_of_shards(self, block: Block, place: Array) -> Tensor:
        self._measure_norms(block, place)
        found, chunks = np.empty((len(self.duals), 5)), self.chunks
        how = float(self.numbers.exponent), self.flags.matched or self.flags.lengths
        call_with_jit_lock(totals.merge_each, self.partials, chunks.first, chunks.ends, *how, found)
        return torch.from_numpy(found)

    def _set_norms(self, _: Any, found: Tensor | None) -> None:
        self._combine_norms(*_all_ranks(found))

    def _combine_norms(self, partials: Array, where: Places) -> None:
        ready, flags = self.ready, self.flags
        other = totals.UNIT if flags.scaled else totals.POWER
        scale = totals.MATCHED if flags.matched else totals.DUAL if flags.dual else other
        length = totals.SPHERE if flags.sphere else totals.RELATIVE if flags.relative else totals.NO_LENGTH
        how = length, float(self.numbers.coupled) * flags.inside, float(self.numbers.step_size)
        known = float(self.numbers.exponent), scale, ready.powers_cached, how
        written = ready.rows, self.duals, self.factors, self.radii
        self.powers_cached = call_with_jit_lock(totals.duals, partials, *where, *known, *written)
        if flags.scaled:
            self.measured = torch.from_numpy(self.duals), torch.from_numpy(self.factors)

    def _update(self, block: Block, place: Array) -> None:
        ready = self.ready
        kernel = ready.update if self.powers_cached == ready.powers_cached else ready.update_without_cache
        exponents = ready.exponent, ready.decay_exponent
        self._everywhere(block, kernel, ready.rows, ready.values, *exponents, self.seed, ready.powers, place)


def _all_ranks(found: Tensor | None) -> tuple[Array, Places]:
    """Return the partial sums of all ranks, one row below the other, and where those of each tensor are."""
    assert found is not None
    n, ranks = found.shape[:2]
    first = np.arange(n) * ranks
    return found.reshape(n * ranks, -1).numpy(), (first, first + ranks, 0, n)


class LaunchConfig:
    """The kernels and tables that depend on flags, exponents and chunks only, kept while those stay the same."""

    def __init__(
        self, flags: Flags, numbers: Numbers, at_once: bool, chunks: Chunks, unscale: float, cache: dict[str, Any]
    ) -> None:
        n = len(chunks.sizes)
        self.flags, self.exponents = flags, _exponents(numbers)
        self.exponent, self.decay_exponent = map(exponent_of, self.exponents)
        self.rows = np.zeros((n, COLUMNS), F)
        self.rows[:, kernels.WIDE] = chunks.wide | (not flags.decay_wide)
        self.rows[:, [kernels.ROOT_SHARE, kernels.DIFFERENCE_SHARE]] = 1
        self.numbers: Numbers | None = None
        self.unscale = unscale
        self.renew(flags, numbers, unscale)
        self.none = np.zeros(n, np.int64)
        # Powers that have a way of their own are cheaper to take twice than to keep; those above 1 may overflow.
        general = flags.sums and flags.mode == GENERAL and float(numbers.exponent) <= 1
        self.powers_cached = general and not at_once and bool(chunks.sizes.max() <= ROOM)
        blocks = chunks.blocks(BLOCK) if self.powers_cached else [Block(0, n, 0, len(chunks))]
        self.blocks = [(block, chunks.before[:-1] - chunks.before[block.chunk]) for block in blocks]
        if self.powers_cached and "powers" not in cache:
            cache["powers"] = np.empty(max(chunks.before[b.chunks] - chunks.before[b.chunk] for b in blocks), F)
        self.powers: Array = cache["powers"] if self.powers_cached else np.empty(0, F)
        momentum_written = bool(flags.sums and flags.momentum & SAME and flags.state == torch.float32)
        self.agr = kernels.agr_kernel(flags.gradient == torch.bfloat16)
        undecayed = flags._replace(decay=False, scales_weight=False, decay_mode=LINEAR, decay_inverse=False)
        plain = undecayed._replace(dual=False, cautious=False, coupling=False, inside=False)
        self.norms = kernels.norm_kernel(plain, momentum_written, self.powers_cached)
        one = flags._replace(matched=False, dual=False, decay_wide=True)  # other values change nothing in this kernel
        self.update, self.update_without_cache = (
            kernels.update_kernel(one, momentum_written, powers_cached) for powers_cached in (self.powers_cached, False)
        )

    def renew(self, flags: Flags, numbers: Numbers, unscale: float) -> bool:
        """Take other numbers; return whether that suffices for these flags."""
        if flags != self.flags or self.exponents != _exponents(numbers):
            return False
        if self.numbers is not numbers or self.unscale != unscale:
            self.numbers, self.unscale, self.values = numbers, unscale, _values(numbers, unscale)
            self.rows[:, kernels.TAKE], self.rows[:, kernels.INSIDE] = numbers.take, self.values[kernels.COUPLED]
        return True


def _exponents(numbers: Numbers) -> tuple[float, float]:
    return float(numbers.exponent), float(numbers.decay_exponent)


def _values(numbers: Numbers, unscale: float) -> Array:
    """Return the table of the numbers that all tensors share, in float32."""
    return np.array([unscale, *(float(getattr(numbers, name)) for name in SHARED)], dtype=F)


def exponent_of(e: float) -> kernels.Exponent:
    """Return an exponent in the form that the kernels take."""
    mantissa, place = math.frexp(e)
    high = math.ldexp(round(mantissa * 4096), place - 12)
    with np.errstate(over="ignore"):
        floor = F(2.0 ** max(-126 / e, -160)) if e > 0 else F(0)
        ceiling = F(np.exp2(128 / e)) if e > 1 else F(np.inf)
    logs = tuple(F(e * float(x)) for x in kernels.LOGARITHM)
    return kernels.Exponent(F(high), F(e - high), logs, floor, ceiling)
