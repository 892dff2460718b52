"""The fused step on CPUs: tables for Numba's kernels, the sums put together, and the work shared out among threads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from normopt.kernels import numba as kernels
from normopt.kernels import totals
from normopt.kernels.compiling import ENTRIES, call_with_jit_lock
from normopt.kernels.flags import BUFFERS, GENERAL, LINEAR, SAME, Flags, Numbers, mode_of
from normopt.kernels.pool import share_out
from normopt.kernels.tables import Array, Block, Chunks, Phase, Tables, nothing

F = np.float32
Places = tuple[Array, Array, int, int]  # where the sums of each tensor begin and end, and which tensors are meant
COLUMNS = kernels.STRETCH + 1
LOGARITHM, LARGEST = list(map(float, kernels.LOGARITHM)), float(kernels.LARGEST)
EXPONENT, DECAY_EXPONENT = map(Numbers._fields.index, ("exponent", "decay_exponent"))
BLOCK = 1 << 21  # entries of tensors whose powers are kept, in 4 bytes each, from one pass to the next
ROOM = 1 << 24  # entries of a larger tensor up to which its powers are kept too


class Step:
    """The in-place step of a batch; `renew` prepares the next one, with other numbers or addresses.

    Its kernels, and the arrays that they use besides the tensors, depend on flags and chunks only.

    Args:
        flags, numbers: the stages' parts of the step.
        tables: the tensors, and what else the step is given.

    Attributes:
        measured: after the step ``‖c‖⋆`` and the factor of D(c) of each tensor, float64 [n]; None if it needs no sums.
    """

    def __init__(self, flags: Flags, numbers: Numbers, tables: Tables) -> None:
        chunks, cache = tables.chunks, tables.cache
        n = len(chunks.sizes)
        self.flags, self.chunks, self.sharded = flags, chunks, bool(tables.layouts)
        self.cuts = chunks.tensor, chunks.start, chunks.count
        self.rows = np.zeros((n, COLUMNS), F)
        self.rows[:, kernels.WIDE] = chunks.wide | (not flags.decay_wide)
        self.rows[:, [kernels.ROOT_SHARE, kernels.DIFFERENCE_SHARE]] = 1
        self.none = np.zeros(n, np.int64)
        self.sums, self.partials = np.empty((len(chunks), 2)), np.empty((len(chunks), 5))
        # Powers that have a way of their own are cheaper to take twice than to keep; those above 1 may overflow.
        self.below_1 = bool(numbers.exponent <= 1)
        general = flags.sums and flags.mode == GENERAL and self.below_1
        self.caches_powers = general and not self.sharded and bool(chunks.sizes.max() <= ROOM)
        blocks = chunks.blocks(BLOCK) if self.caches_powers else [Block(0, n, 0, len(chunks))]
        self.blocks = [(block, chunks.before[:-1] - chunks.before[block.chunk]) for block in blocks]
        if self.caches_powers and "powers" not in cache:
            cache["powers"] = np.empty(max(chunks.before[b.chunks] - chunks.before[b.chunk] for b in blocks), F)
        self.powers: Array = cache["powers"] if self.caches_powers else np.empty(0, F)
        momentum_written = bool(flags.sums and flags.momentum & SAME and flags.state == torch.float32)
        self.agr = kernels.agr_kernel(flags.gradient == torch.bfloat16)
        undecayed = flags._replace(decay=False, scales_weight=False, decay_mode=LINEAR, decay_inverse=False)
        plain = undecayed._replace(dual=False, cautious=False, coupling=False, inside=False)
        self.norms = kernels.norm_kernel(plain, momentum_written, self.caches_powers)
        one = flags._replace(matched=False, dual=False, decay_wide=True)  # other values change nothing in this kernel
        self.update, self.update_without_cache = (
            kernels.update_kernel(one, momentum_written, cached) for cached in (self.caches_powers, False)
        )
        self.values = np.empty(kernels.DECAY_EXPONENT + 12, F)
        self.numbers: Numbers = cast(Any, None)
        self.measured: tuple[Tensor, Tensor] | None = None
        self.unscale, self.exponents = 1.0, (math.nan, math.nan)
        self.same_rows: tuple[Any, Any] | None = None  # whose columns are the same for all tensors
        self.buffers: dict[str, Array] | None = None
        self.renew(flags, numbers, tables)
        cache["step"] = self

    def renew(self, flags: Flags, numbers: Numbers, tables: Tables) -> bool:
        """Prepare a step of tensors of the same shapes; return False if these flags need another Step."""
        factor = 1.0 if tables.unscale is None else float(tables.unscale)
        if self.numbers is not numbers or self.unscale != factor or flags is not self.flags:
            plain: Any = numbers
            if Tensor in set(map(type, numbers)):
                plain = [float(x) for x in numbers]
            exponent, decay_exponent = plain[EXPONENT], plain[DECAY_EXPONENT]
            if (flags is not self.flags and flags != self.flags) or (exponent <= 1) != self.below_1:
                return False
            self.flags, self.numbers, self.unscale = flags, numbers, factor
            self.values[: kernels.EXPONENT] = factor, *plain
            if (exponent, decay_exponent) != self.exponents:
                self.exponents = exponent, decay_exponent
                self.values[kernels.EXPONENT :] = *exponent_of(exponent), *exponent_of(decay_exponent)
        if bool(tables.layouts) != self.sharded:
            return False
        # By value: a tensor that was changed in place is the same object.
        if self.same_rows != (same := (numbers.take, float(self.values[kernels.COUPLED]))):
            self.same_rows = same
            self.rows[:, kernels.TAKE], self.rows[:, kernels.INSIDE] = same
        if flags.momentum and numbers.first != numbers.take and (new := tables.new.get("momentum_buffer")):
            self.rows[new, kernels.TAKE] = numbers.first
            self.same_rows = None  # the next step has the same weight for all
        if tables.shares is not None:
            self.rows[:, kernels.SHARE : kernels.BEGUN] = tables.shares.numpy()
        if flags.differs:
            self.rows[:, kernels.BEGUN] = 1
            self.rows[tables.new.get("previous_grad", []), kernels.BEGUN] = 0
        if tables.buffers is not self.buffers:  # other tables of addresses, all of them
            self.buffers, none = tables.buffers, self.none
            more = (none if x is None else x for x in (tables.states, tables.compensations))
            buffers = tuple(tables.buffers.get(name, none) for name in BUFFERS)
            self.tensors = (tables.weights, tables.gradients, *more), buffers, self.cuts
        self.layouts, self.seed, self.measured = tables.layouts, int(tables.seed), None
        self.powers_cached = self.caches_powers
        if flags.sums:
            n = len(self.rows)
            self.duals, self.factors = np.empty(n), np.empty(n)
            self.radii = np.empty(n) if tables.radii is None else tables.radii.numpy()
        return True

    def phases(self) -> list[Phase]:
        """Return the phases: for unsharded tensors one, which goes block by block, so that a block stays cached."""
        if not self.layouts:
            return [Phase(nothing, lambda _, __: self._run_blocks())]
        flags, (block, place) = self.flags, self.blocks[0]
        last = Phase(nothing, lambda _, __: self._update(block, place))
        norms = [Phase(lambda _: self._norms_of_shards(block, place), self._set_norms)] if flags.sums else []
        return ([Phase(lambda _: self._sums_of_shards(block), self._set_agr)] if flags.agr else []) + norms + [last]

    def _run_blocks(self) -> None:
        for block, place in self.blocks:
            where = self.chunks.first, self.chunks.ends, block.tensor, block.tensors
            if self.flags.agr:
                self._measure_agr(block)
                self._regularize(self.sums, where)
            if self.flags.sums:
                self._measure_norms(block, place)
                self._combine_norms(self.partials, where)
            self._update(block, place)

    def _everywhere(self, block: Block, kernel: kernels.Kernel, *more: object) -> None:
        """Run a kernel on the chunks of a block."""
        run(kernel, self.tensors, self.chunks, block.chunk, block.chunks, *more)

    def _measure_agr(self, block: Block) -> None:
        self._everywhere(block, self.agr, self.values[kernels.UNSCALE], self.sums)

    def _sums_of_shards(self, block: Block) -> Tensor:
        self._measure_agr(block)
        found, chunks = np.empty((len(self.layouts), 2)), self.chunks
        call_with_jit_lock(totals.largest_of_each, self.sums, chunks.first, chunks.ends, found)
        return torch.from_numpy(found)

    def _set_agr(self, _: Any, found: Tensor | None) -> None:
        self._regularize(*_all_ranks(found))

    def _regularize(self, sums: Array, where: Places) -> None:
        sizes = np.array([lay.shape.numel() for lay in self.layouts]) if self.layouts else self.chunks.sizes
        call_with_jit_lock(totals.regularizers, sums, sizes, *where, self.rows)

    def _measure_norms(self, block: Block, place: Array) -> None:
        self._everywhere(block, self.norms, self.rows, self.values, self.partials, self.powers, place)

    def _norms_of_shards(self, block: Block, place: Array) -> Tensor:
        self._measure_norms(block, place)
        found, chunks = np.empty((len(self.duals), 5)), self.chunks
        how = float(self.numbers.exponent), self.flags.matched or self.flags.lengths
        call_with_jit_lock(totals.merge_each, self.partials, chunks.first, chunks.ends, *how, found)
        return torch.from_numpy(found)

    def _set_norms(self, _: Any, found: Tensor | None) -> None:
        self._combine_norms(*_all_ranks(found))

    def _combine_norms(self, partials: Array, where: Places) -> None:
        flags = self.flags
        other = totals.UNIT if flags.scaled else totals.POWER
        scale = totals.MATCHED if flags.matched else totals.DUAL if flags.dual else other
        length = totals.SPHERE if flags.sphere else totals.RELATIVE if flags.relative else totals.NO_LENGTH
        how = length, float(self.numbers.coupled) * flags.inside, float(self.numbers.step_size)
        known = float(self.numbers.exponent), scale, self.caches_powers, how
        written = self.rows, self.duals, self.factors, self.radii
        self.powers_cached = call_with_jit_lock(totals.duals, partials, *where, *known, *written)
        if flags.scaled:
            self.measured = torch.from_numpy(self.duals), torch.from_numpy(self.factors)

    def _update(self, block: Block, place: Array) -> None:
        kernel = self.update if self.powers_cached == self.caches_powers else self.update_without_cache
        self._everywhere(block, kernel, self.rows, self.values, self.seed, self.powers, place)


def run(kernel: kernels.Kernel, tensors: tuple[Any, ...], chunks: Chunks, begin: int, end: int, *more: object) -> None:
    """Run a kernel on the chunks ``begin`` to ``end`` of its tensors, shared out among threads."""
    call = ENTRIES.get(kernel, kernel)

    def work(a: int, b: int) -> None:
        call(*tensors, a, b, *more)

    if call is kernel:
        call_with_jit_lock(share_out, work, chunks, begin, end, compiled=kernel)
    else:
        share_out(work, chunks, begin, end)


def lp_factors(w: Sequence[Tensor], p: float, strength: float) -> list[Tensor]:
    """Return the factors of ℓp decay, in float32, to 1e-6 of 1 − factor; see `normopt.stages.decay.lp_factors`.

    Args:
        w: contiguous tensors of one dtype, float32 or bfloat16, none of them empty.
        p: p > 0.
        strength: pηλ > 0.
    """
    exponent, chunks = abs(2 - p), Chunks([x.shape for x in w])
    kernel = kernels.factor_kernel(w[0].dtype == torch.bfloat16, mode_of(exponent), p >= 2)
    factors = [x.new_empty(x.shape, dtype=torch.float32) for x in w]
    addresses = tuple(np.array([x.data_ptr() for x in xs], dtype=np.int64) for xs in (w, factors))
    cuts = chunks.tensor, chunks.start, chunks.count
    run(kernel, (addresses, cuts), chunks, 0, len(chunks), F(strength), np.array(exponent_of(exponent), dtype=F))
    return factors


def _all_ranks(found: Tensor | None) -> tuple[Array, Places]:
    """Return the partial sums of all ranks, one row below the other, and where those of each tensor are."""
    assert found is not None
    n, ranks = found.shape[:2]
    first = np.arange(n) * ranks
    return found.reshape(n * ranks, -1).numpy(), (first, first + ranks, 0, n)


@lru_cache(maxsize=256)
def exponent_of(e: float) -> tuple[float, ...]:
    """Return an exponent as `kernels.exponent_at` reads it."""
    mantissa, place = math.frexp(e)
    high = math.ldexp(round(mantissa * 4096), place - 12)
    floor = 2.0 ** max(-126 / e, -160) if e > 0 else 0.0
    ceiling = 2.0 ** (128 / e) if e > 1 else math.inf
    logs = [max(min(e * x, LARGEST), -LARGEST) for x in LOGARITHM]
    return high, e - high, floor, ceiling, *logs
