"""Run the fused kernels for a param group, with what they were given last time kept for as long as it stays true.

A kernel reads and writes bare addresses. Tensors keep their identity, and often their address, while `.data`, a
resize or a change of dtype puts other memory behind them. So everything that a kernel relies on is read from every
tensor at every step (`Memory`), in a few passes that run in C; only what has changed is looked at closely.
"""

from __future__ import annotations

import importlib
from collections.abc import MutableMapping
from operator import eq, is_
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from normopt.kernels.flags import NEAREST, STOCHASTIC, Flags, Numbers
from normopt.kernels.support import KERNELS
from normopt.kernels.tables import Array, Chunks, Phase, Tables, nothing
from normopt.norms.base import stack
from normopt.norms.scales import NormPair
from normopt.params import check_like, check_writable, dtype_of
from normopt.sharding.layout import gradient_of, layout_of, to_dtensor_like, to_local
from normopt.stages.base import Batch, Slot
from normopt.stages.constraint import RADIUS, radii_of

if TYPE_CHECKING:
    from normopt.recipe import Recipe

State = MutableMapping[Tensor, Any]


class Memory(NamedTuple):
    """The memory of n tensors, each field a list of n; ``room`` is the number of bytes of a tensor's storage.

    Devices are not among them: an address that is not 0 is of one device. Shapes are compared as they are read,
    because a list of new ones at every step would set the garbage collector to work.
    """

    address: list[int]
    kind: list[type]
    contiguous: list[bool]
    negative: list[bool]
    dtype: list[torch.dtype]
    offset: list[int]
    room: list[int]


def memory_of(xs: list[Tensor]) -> Memory:
    """Read where tensors are. Every pass is a loop in C: 40 to 100 ns a tensor."""
    return Memory(
        list(map(Tensor.data_ptr, xs)),
        list(map(type, xs)),
        list(map(Tensor.is_contiguous, xs)),
        list(map(Tensor.is_neg, xs)),
        list(map(dtype_of, xs)),
        list(map(cast(Any, Tensor.storage_offset), xs)),
        list(map(torch.UntypedStorage.nbytes, map(Tensor.untyped_storage, xs))),
    )


def _last_entry(x: Tensor) -> int:
    """Return the distance in entries from the first entry of a tensor to its last in memory."""
    return sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))


class Operand:
    """A list of tensors that the kernels read or write, and the table of their addresses."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.tensors: list[Tensor] = []
        self.memory, self.shapes = memory_of([]), list[torch.Size]()
        self.table = self._bytes = np.empty(0, np.int64)
        self.has_moved = True  # or changed its shape, since somebody set this to False
        self._inference = False
        self._in_table: list[int] = []

    def look(self, tensors: list[Tensor], as_before: bool = False) -> bool:
        """Read the tensors' memory, and check what may have changed.

        Args:
            tensors: dense ones.
            as_before: whether to give up if anything but addresses is not what it was.

        Returns:
            Whether nothing but addresses has changed.

        Raises:
            RuntimeError: a tensor has no memory, or less than its shape needs, or cannot be written.
        """
        memory = memory_of(tensors)
        same = memory[1:] == self.memory[1:] and all(map(eq, map(Tensor.size, tensors), self.shapes))
        if as_before and not same:
            return False
        # Strides are not compared, so that what is not contiguous is checked at every step.
        if not same or 0 in memory.address or not all(memory.contiguous):
            for x, room in zip(tensors, memory.room, strict=True):
                if x.numel():
                    end = (x.storage_offset() + _last_entry(x) + 1) * x.element_size()
                    # A wrapper subclass has no memory either, but an address that is not 0 if it has an offset.
                    if not x.untyped_storage().data_ptr() or end > room:
                        raise RuntimeError(
                            f"the {self.name} of shape {tuple(x.shape)} on {x.device} has no memory of its own any "
                            f"more: its storage has {room} bytes. Bring it back before step()"
                        )
        self.has_moved |= not same or memory.address != self.memory.address
        if self.name != "gradient" and (self.has_moved or self._inference or not all(memory.contiguous)):
            check_writable(self.name, tensors)
            self._inference = any(map(Tensor.is_inference, tensors))
        self.tensors, self.memory = tensors, memory
        if not same:
            self.shapes = [x.shape for x in tensors]
            self._bytes = np.array([x.numel() * x.element_size() for x in tensors], dtype=np.int64)
        return same

    def extents(self) -> tuple[Array, Array]:
        """The first address of each tensor and the one after its last, shape [n] each; of an empty one the same."""
        sizes = self._bytes
        if not all(self.memory.contiguous):
            spans = [(1 + _last_entry(x)) * x.element_size() for x in self.tensors]
            sizes = np.where(sizes > 0, spans, 0)
        begins = self._tabled(self.memory.address)
        return begins, begins + sizes

    def flat(self) -> list[Tensor]:
        """The tensors, or contiguous copies if some are not contiguous, whose addresses are then in the table."""
        tensors, addresses = self.tensors, self.memory.address
        if not all(self.memory.contiguous):
            tensors = [x.contiguous() for x in tensors]
            addresses = list(map(Tensor.data_ptr, tensors))
        self._tabled(addresses)
        return tensors

    def _tabled(self, addresses: list[int]) -> Array:
        if addresses != self._in_table:
            self._in_table, self.table = addresses, np.array(addresses, dtype=np.int64)
        return self.table


class FusedUpdate:
    """The fused steps of parameters of one group, device and dtype, with gradients of one dtype.

    Tensors that are not contiguous are stepped as contiguous copies, and copied back.
    """

    def __init__(self) -> None:
        self._weights, self._gradients = Operand("parameter"), Operand("gradient")
        self._states: dict[Slot, Operand] = {}
        self._params: list[Tensor] = []
        self._made_for: object = None  # the recipe, its version and the dtypes of these
        self._flags = self._numbers = cast(Any, None)
        self.layouts: list[Any] = []  # of sharded parameters
        self._shapes: list[torch.Size] = []
        self._chunks = Chunks([])
        self._cache: dict[str, Any] = {}
        self.overlaps = False  # some of what is written shares memory
        # Where it begins and ends, in order, and after all beginnings one that is nowhere.
        self._written = np.empty(0, np.int64), np.empty(0, np.int64)

    def check(self, recipe: Recipe, params: list[Tensor], state: State) -> None:
        """Check all memory that the kernels will read or write. Nothing is written.

        Args:
            recipe: a recipe whose backend is "fused".
            params: the parameters, which have dense gradients.
            state: the optimizer's.

        Raises:
            RuntimeError: a tensor has no memory, or not the shape or the device of its parameter.
        """
        self._params = list(params)
        weights, gradients = [to_local(p) for p in params], [gradient_of(p) for p in params]
        self.layouts = [lay for p in params if (lay := layout_of(p)) is not None]
        self._weights.look(weights)
        self._gradients.look(gradients)
        check_like("gradient", gradients, weights)
        # What no kernel reads, or not together with the others, is cast as the other backends cast it.
        dtypes = set(self._gradients.memory.dtype)
        if any(g.is_complex() for g in gradients):
            raise RuntimeError("a gradient is complex, but its parameter is real: take its real part")
        if len(dtypes) > 1 or not dtypes <= {*KERNELS[weights[0].device.type].dtypes}:
            self._gradients.look([g.float() for g in gradients])
        self._check_states(recipe, state, weights)
        if len(shared := self._shared()):  # gradients are what they were before anything was written
            known = self._gradients.tensors
            self._gradients.look([g.clone() if i in shared else g for i, g in enumerate(known)])

    def check_unchanged(self, recipe: Recipe, params: list[Tensor], state: State, gradients: list[Tensor]) -> bool:
        """Do what `check` does where nothing but addresses has changed since the last step; return whether that is so.

        Args:
            recipe, params, state: as in `check`.
            gradients: those of the parameters.
        """
        known = self._params
        if self.overlaps or self.layouts or len(known) != len(params) or not all(map(is_, known, params)):
            return False
        try:
            return (
                self._weights.look(params, as_before=True)
                and self._gradients.look(gradients, as_before=True)
                and self._check_states(recipe, state, params, as_before=True)
                and not self._shared()
                and not self.overlaps
            )
        except RuntimeError:  # which `check` raises
            return False

    def _check_states(self, recipe: Recipe, state: State, weights: list[Tensor], as_before: bool = False) -> bool:
        params = self._params
        slots = [slot for slot in recipe.slots if slot.exists(params[0]) and slot.shape is None]
        self._states = {slot: self._states.get(slot) or Operand(slot.name) for slot in slots}
        # A state that belongs to these parameters alone, in their order: no need to hash them.
        in_order = as_before and len(state) == len(params) and all(map(is_, state, params))
        for slot, operand in self._states.items():
            own = state.values() if in_order else (state.get(p, {}) for p in params)
            stored = [x.get(slot.name) for x in own]
            tensors = [x if as_before else to_local(x) for x in stored if x is not None]
            if operand.look(tensors) and as_before:
                continue
            check_like(slot.name, tensors, [w for w, x in zip(weights, stored, strict=True) if x is not None])
        return True

    def _shared(self) -> list[int]:
        """Find out whether what is written overlaps, and return which gradients share memory with it.

        One that is its weight, entry by entry, is not among them.
        """
        written, gradients = [self._weights, *self._states.values()], self._gradients
        if not any(operand.has_moved for operand in (*written, gradients)):
            return []
        if any(operand.has_moved for operand in written):
            begins, ends = (np.concatenate(x) for x in zip(*(operand.extents() for operand in written), strict=True))
            order = np.argsort(begins, kind="stable")
            begins, ends = begins[order], np.maximum.accumulate(ends[order])
            self.overlaps = bool((begins[1:] < ends[:-1]).any())
            self._written = np.append(begins, np.iinfo(np.int64).max), ends
        begins, ends = gradients.extents()
        first, last = self._written
        there = np.searchsorted(last, begins, side="right")  # of what is written, the first that ends after they begin
        hit = first[there] < ends
        for operand in (*written, gradients):
            operand.has_moved = False
        if not hit.any():
            return []
        same = [w.is_set_to(g) for w, g in zip(self._weights.tensors, gradients.tensors, strict=True)]
        shared: list[int] = np.flatnonzero(hit & ~np.array(same)).tolist()
        gradients.has_moved = bool(shared)  # look again at the next step
        return shared

    def phases(self, batch: FusedBatch) -> list[Phase]:
        """Make the missing state, and return the phases of a step on the tensors that `check` has just checked."""
        recipe = batch.recipe
        new = {slot.name: self._complete(slot, operand, batch.state) for slot, operand in self._states.items()}
        shares = self._shares(batch) if recipe.count.runs() else None
        if self._shapes != (shapes := self._weights.shapes):
            self._shapes, self._chunks, self._cache = shapes, Chunks(shapes), {}
        if not len(self._chunks) and not self.layouts:
            return []
        operands = [self._weights, self._gradients, *self._states.values()]
        flat = [operand.flat() for operand in operands]
        device = flat[0][0].device
        kernels: Any = importlib.import_module(KERNELS[device.type].module)
        by_name = {slot.name: operand for slot, operand in self._states.items()}
        momenta, lost = by_name.get("momentum_buffer"), by_name.get("kahan_compensation")
        dtypes = flat[0][0].dtype, flat[1][0].dtype, (momenta or self._weights).memory.dtype[0]
        made_for = recipe, recipe.version, dtypes
        if self._made_for != made_for or recipe.has_tensors:
            flags, self._numbers = cast(tuple[dict[str, Any], Numbers], recipe.lower())
            weight, gradient, state = dtypes
            self._made_for, self._flags = made_for, Flags(**flags, weight=weight, gradient=gradient, state=state)
            if dtypes[0] not in (torch.bfloat16, torch.float16):
                self._flags = self._flags._replace(rounding=NEAREST)
        weights, gradients = self._weights.table, self._gradients.table
        states, compensations = (None if operand is None else operand.table for operand in (momenta, lost))
        tables = Tables(self._chunks, device, weights, gradients, states, compensations, new, self._cache)
        tables.layouts, tables.buffers = self.layouts, {name: x.table for name, x in by_name.items()}
        if batch.grad_scale is not None:
            tables.unscale = (1 / batch.grad_scale).to(device, non_blocking=True)
        if batch.found_inf is not None:
            tables.found_inf = batch.found_inf.to(device, non_blocking=True)
            if device.type == "cpu" and tables.found_inf:
                return []
        if self._flags.rounding == STOCHASTIC:
            tables.seed = _seed(device)
        tables.shares = shares
        radii = batch.read(RADIUS) if recipe.sphere.runs() else []
        if radii:
            unknown = torch.full((), torch.nan, device=device)
            tables.radii = stack([unknown if r is None else r for r in radii]).double()
        step = kernels.Step(self._flags, self._numbers, tables)

        def finish(batch: FusedBatch, _: Tensor | None) -> None:
            for operand, written in zip(operands, flat, strict=True):
                if operand is not self._gradients:
                    if written is not operand.tensors:
                        torch._foreach_copy_(operand.tensors, written)
                    # The kernels wrote unseen by autograd: a graph that still needs the old values must not use these.
                    torch.autograd.graph.increment_version(operand.tensors)
                operand.tensors = []  # may be freed
            if tables.radii is not None and any(r is None for r in radii):
                radii_of(batch, tables.radii)
            if step.measured is not None:
                dual, factor = step.measured
                batch.pair = NormPair(torch.where(dual > 0, factor, dual), dual)

        return [*step.phases(), Phase(nothing, finish)]

    def _shares(self, batch: FusedBatch) -> Tensor:
        """Count the step, unless it is skipped; return 1/Σ of the weights in c and d, √(1/Σ) of those in v.

        All on the parameters' device, where a captured graph counts its replays.
        """
        recipe = batch.recipe
        found = batch.found_inf
        by = 1 if found is None else (found == 0).to(batch.params[0].device, torch.float32).reshape(())
        t = stack(recipe.count.advance(batch, by)).double().clamp_(min=1)  # 0 at a first step that is skipped
        n: Any = t.numpy() if t.is_cpu else t  # whose operations take a fifth of the time
        stages = recipe.momentum, recipe.metric, recipe.difference
        c, v, d = (stage.weight(n) if stage.runs() else n**0 for stage in stages)
        columns = 1 / c, v**-0.5, 1 / d
        return torch.from_numpy(np.stack(columns, 1)) if t.is_cpu else torch.stack(columns, 1)

    def _complete(self, slot: Slot, operand: Operand, state: State) -> list[int]:
        """Make the state that is missing, or has another dtype than it should; return the indices of the new."""
        memory, params = operand.memory, self._params
        dtype = slot.dtype_of(params[0])
        if len(memory.dtype) == memory.dtype.count(dtype) == len(params):
            return []
        tensors, new = [], []
        for i, p in enumerate(params):
            x = state[p].get(slot.name)
            if x is None:
                first = torch.empty_like(to_local(p), dtype=dtype, memory_format=torch.contiguous_format)
                first = first.copy_(to_local(p)) if slot.starts_as_weight else first.zero_()
                state[p][slot.name] = x = to_dtensor_like(first, p)
                new.append(i)
            elif x.dtype != dtype:  # the parameter's has changed since
                state[p][slot.name] = x = x.to(dtype)
            tensors.append(to_local(x))
        operand.look(tensors)
        return new


class FusedBatch(Batch):
    """Tensors that fused kernels step, in the phases that other batches have of their stages."""

    def __init__(
        self,
        recipe: Recipe,
        params: list[Tensor],
        state: State,
        update: FusedUpdate,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        super().__init__(recipe, params, state)
        self.update, self.layouts, self.grad_scale, self.found_inf = update, update.layouts, grad_scale, found_inf

    def load(self) -> None:
        self.phases = self.update.phases(self)

    def release(self) -> None:
        self.phases = []


def _seed(device: torch.device) -> Tensor | int:
    """Draw a seed from the device's generator; a tensor on CUDA, where a captured graph draws a new one per replay."""
    drawn = torch.randint(2**31, (1,), device=device)
    return drawn if device.type == "cuda" else int(drawn)
