"""Run the fused kernels for a param group, with what they were given last time kept for as long as it stays true.

A kernel reads and writes bare addresses. Tensors keep their identity, and often their address, while `.data`, a
resize or a change of dtype puts other memory behind them. So everything that a kernel relies on is compared for every
tensor at every step, in three passes that run in C (`FusedUpdate.check_unchanged`); only what has changed is looked at
closely (`Memory`).
"""

from __future__ import annotations

import importlib
from bisect import bisect_right
from collections.abc import Iterable, MutableMapping
from functools import cache
from operator import is_, itemgetter
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
from normopt.stages.momentum import STEP, on_host

if TYPE_CHECKING:
    from normopt.recipe import Recipe

try:
    from torch._C._dynamo.guards import TensorGuards
except ImportError:  # it is torch's own: without it, all is looked at closely at every step
    TensorGuards = None  # type: ignore[assignment, misc]

offset_of = cast(Any, Tensor.storage_offset)
State = MutableMapping[Tensor, Any]
FEW = 64  # tensors: for up to as many a Python loop is faster than NumPy


class Memory(NamedTuple):
    """The memory of n tensors, each field a list of n; ``room`` is the number of bytes of a tensor's storage.

    Devices are not among them: an address that is not 0 is of one device.
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
        list(map(offset_of, xs)),
        rooms_of(xs),
    )


def flags_of(chosen: dict[str, Any], dtypes: tuple[torch.dtype, ...]) -> Flags:
    """Return the flags of a step, of what the stages set and the dtypes of weights, gradients and momentum."""
    weight, gradient, state = dtypes
    if weight not in (torch.bfloat16, torch.float16):
        chosen = chosen | {"rounding": NEAREST}
    return Flags(**chosen, weight=weight, gradient=gradient, state=state)


@cache
def kernels_for(kind: str) -> Any:
    """Return the module of the kernels for a kind of device."""
    return importlib.import_module(KERNELS[kind].module)


def rooms_of(xs: Iterable[Tensor]) -> list[int]:
    """Return the sizes of the tensors' storages in bytes."""
    return list(map(torch.UntypedStorage.nbytes, map(Tensor.untyped_storage, xs)))


def guard_of(tensors: list[Tensor]) -> Any:
    """Return a guard whose ``check(*tensors)`` compares class, dtype, device, shape and strides; None without one.

    It is what torch.compile compares its inputs with, at 50 ns a tensor. It also tells lazily negated tensors, those of
    inference mode and sparse ones.
    """
    return None if TensorGuards is None else TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)


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
        self.sizes: list[int] = []  # in bytes
        self.has_moved = True  # or changed its shape, since somebody set this to False
        self._inference = False
        self._in_table: list[int] = []

    def look(self, tensors: list[Tensor]) -> None:
        """Read the tensors' memory, and check what may have changed.

        Args:
            tensors: dense ones.

        Raises:
            RuntimeError: a tensor has no memory, or less than its shape needs, or cannot be written.
        """
        memory, shapes = memory_of(tensors), list(map(Tensor.size, tensors))
        same = memory[1:] == self.memory[1:] and shapes == self.shapes
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
        self.tensors, self.memory, self.shapes = tensors, memory, shapes
        if not same:
            self.sizes = [x.numel() * x.element_size() for x in tensors]
            self._bytes = np.array(self.sizes, dtype=np.int64)

    def replace(self, tensors: list[Tensor], addresses: list[int]) -> bool:
        """Take the addresses of other tensors, whose storages have the same sizes; return whether their offsets agree.

        The table is changed in place.
        """
        if 0 in addresses or list(map(offset_of, tensors)) != self.memory.offset:
            return False
        self.memory.address[:], self.table[:], self._in_table = addresses, addresses, addresses
        self.has_moved = True
        return True

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
        self._chosen: object = None  # what the flags are made of
        self._flags = self._numbers = cast(Any, None)
        self.layouts: list[Any] = []  # of sharded parameters
        self._shapes: list[torch.Size] = []
        self._chunks = Chunks([])
        self._cache: dict[str, Any] = {}
        self.overlaps = False  # some of what is written shares memory
        self._guard: Any = None  # of parameters, gradients and all state; None if these must be looked at closely
        self._rooms: list[int] = []
        self._watched: tuple[Slot, ...] = ()  # the recipe's slots when it was made
        self._names: list[str] = []  # those of them that these parameters have, by name, first those that kernels read
        self._counts: list[Array] = []  # the steps of each parameter, sharing the memory of the state, on a CPU
        self._addresses: list[int] = []  # of parameters and all state
        self._end = 0  # of the parameters, gradients and state that kernels read, in a list of all these
        self._operands: list[Operand] = []
        self._written_to: list[Tensor] = []
        self._unchanged = False  # since the last step, but for addresses
        self._tables = cast(Tables, None)
        self._dtypes: tuple[torch.dtype, ...] = ()
        # Where it begins and ends, in order, and after all beginnings one that is nowhere.
        self._written = np.empty(0, np.int64), np.empty(0, np.int64)
        self._written_lists: tuple[list[int], list[int]] = [], []  # the same

    def check(self, recipe: Recipe, params: list[Tensor], state: State) -> None:
        """Check all memory that the kernels will read or write. Nothing is written.

        Args:
            recipe: a recipe whose backend is "fused".
            params: the parameters, which have dense gradients.
            state: the optimizer's.

        Raises:
            RuntimeError: a tensor has no memory, or not the shape or the device of its parameter.
        """
        self._params, self._unchanged, self._guard = list(params), False, None
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
        """Check as `check` does if only gradient tensors have changed since the last step; return whether that is so.

        Args:
            recipe, params, state: as in `check`.
            gradients: those of the parameters.
        """
        n, known, guard = len(params), self._params, self._guard
        if guard is None or recipe.slots != self._watched or n != len(known) or not all(map(is_, known, params)):
            return False
        # A state that belongs to these parameters alone, in their order: no need to hash them.
        in_order = len(state) == n and all(map(is_, state, params))
        own = state.values() if in_order else [state.get(p, {}) for p in params]
        tensors = params + gradients
        try:
            for name in self._names:
                tensors += map(itemgetter(name), own)
            if not guard.check(*tensors):
                return False
        except (KeyError, TypeError):  # a state is missing, or no tensor
            return False
        if rooms_of(tensors) != self._rooms:
            return False
        addresses = list(map(Tensor.data_ptr, tensors))
        fresh, addresses[n : 2 * n] = addresses[n : 2 * n], []
        if addresses != self._addresses:
            return False
        if fresh != self._gradients.memory.address:
            if not self._gradients.replace(gradients, fresh) or self._hits():
                return False
            self._gradients.has_moved = False
        self._unchanged, self._written_to = True, params + tensors[2 * n : self._end]
        return True

    def _watch(self, recipe: Recipe, state: State) -> None:
        """Guard the tensors of a step that has just been prepared, if they need no closer look at the next."""
        params, operands = self._params, self._operands
        gradients = [p.grad for p in params]
        # State that this step has made is written by the next one, so it counts for overlaps.
        plain = not (self.layouts or self._shared() or self.overlaps)
        plain = plain and all(map(is_, gradients, self._gradients.tensors))
        if not plain or not all(all(operand.memory.contiguous) for operand in operands):
            return
        self._watched = recipe.slots
        others = [slot.name for slot in recipe.slots if slot.exists(params[0]) and slot not in self._states]
        self._names = [slot.name for slot in self._states] + others
        read = [state[p][slot.name] for slot in self._states for p in params]
        unread = [state[p][name] for name in others for p in params]
        steps = [state[p][STEP.name] for p in params] if STEP.name in others else []
        self._counts = [x.numpy() for x in steps] if on_host(steps) else []
        self._guard = guard_of([*params, *self._gradients.tensors, *read, *unread])
        self._rooms = [room for operand in operands for room in operand.memory.room] + rooms_of(unread)
        self._addresses = list(map(Tensor.data_ptr, [*params, *read, *unread]))
        self._end = len(operands) * len(params)

    def _check_states(self, recipe: Recipe, state: State, weights: list[Tensor]) -> None:
        params = self._params
        slots = [slot for slot in recipe.slots if slot.exists(params[0]) and slot.shape is None]
        self._states = {slot: self._states.get(slot) or Operand(slot.name) for slot in slots}
        for slot, operand in self._states.items():
            stored = [state.get(p, {}).get(slot.name) for p in params]
            tensors = [to_local(x) for x in stored if x is not None]
            operand.look(tensors)
            check_like(slot.name, tensors, [w for w, x in zip(weights, stored, strict=True) if x is not None])

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
            self._written_lists = self._written[0].tolist(), ends.tolist()
        for operand in (*written, gradients):
            operand.has_moved = False
        weights = self._weights.tensors
        shared = [i for i in self._hits() if not weights[i].is_set_to(gradients.tensors[i])]
        gradients.has_moved = bool(shared)  # look again at the next step
        return shared

    def _hits(self) -> list[int]:
        """Return which gradients share memory with what is written, their own weights included."""
        gradients = self._gradients
        # Of what is written, the first that ends after a gradient begins: does it begin before that ends?
        if len(gradients.sizes) <= FEW and all(gradients.memory.contiguous):
            begin, end = self._written_lists
            places = zip(gradients.memory.address, gradients.sizes, strict=True)
            return [i for i, (a, size) in enumerate(places) if begin[bisect_right(end, a)] < a + size]
        begins, ends = gradients.extents()
        first, last = self._written
        hits: list[int] = np.flatnonzero(first[last.searchsorted(begins, side="right")] < ends).tolist()
        return hits

    def phases(self, batch: FusedBatch) -> list[Phase]:
        """Make the missing state, and return the phases of a step on the tensors that have just been checked."""
        recipe = batch.recipe
        copies = [] if self._unchanged else self._prepare(recipe, batch.state)
        tables = self._tables
        tables.shares = self._shares(batch) if recipe.count.runs() else None
        if not len(self._chunks) and not self.layouts:
            return []
        if self._made_for != (made_for := (recipe, recipe.version, self._dtypes)) or recipe.has_tensors:
            chosen, self._numbers = cast(tuple[dict[str, Any], Numbers], recipe.lower())
            if self._chosen != (chosen, self._dtypes):
                self._chosen, self._flags = (chosen, self._dtypes), flags_of(chosen, self._dtypes)
            self._made_for = made_for
        tables.unscale = tables.found_inf = tables.radii = None
        if batch.grad_scale is not None:
            tables.unscale = (1 / batch.grad_scale).to(tables.device, non_blocking=True)
        if batch.found_inf is not None:
            tables.found_inf = batch.found_inf.to(tables.device, non_blocking=True)
            if tables.device.type == "cpu" and tables.found_inf:
                return []
        if self._flags.rounding == STOCHASTIC:
            tables.seed = _seed(tables.device)
        radii = batch.read(RADIUS) if recipe.sphere.runs() else []
        if radii:
            unknown = torch.full((), torch.nan, device=tables.device)
            tables.radii = stack([unknown if r is None else r for r in radii]).double()
        step = self._cache.get("step")  # of a backend whose steps can be used again
        if step is None or not step.renew(self._flags, self._numbers, tables):
            step = kernels_for(tables.device.type).Step(self._flags, self._numbers, tables)

        def finish(batch: FusedBatch, _: Tensor | None) -> None:
            for operand, copy in copies:
                if operand is not self._gradients:
                    torch._foreach_copy_(operand.tensors, copy)
            # The kernels wrote unseen by autograd: a graph that still needs the old values must not use these.
            torch.autograd.graph.increment_version(self._written_to)
            if tables.radii is not None and any(r is None for r in radii):
                radii_of(batch, tables.radii)
            if not self._unchanged:
                self._watch(recipe, batch.state)
                tables.new = {}
            self._written_to = []  # may be freed
            for operand in self._operands:
                operand.tensors = []
            batch.measured = step.measured

        return [*step.phases(), Phase(nothing, finish)]

    def _prepare(self, recipe: Recipe, state: State) -> list[tuple[Operand, list[Tensor]]]:
        """Make the missing state and the tables; return the copies of tensors that are not contiguous."""
        new = {slot.name: self._complete(slot, operand, state) for slot, operand in self._states.items()}
        if self._shapes != (shapes := self._weights.shapes):
            self._shapes, self._chunks, self._cache = shapes, Chunks(shapes), {}
        self._operands = [self._weights, self._gradients, *self._states.values()]
        flat = [operand.flat() for operand in self._operands]
        self._written_to = [x for operand in self._operands if operand is not self._gradients for x in operand.tensors]
        momenta = next((x for slot, x in self._states.items() if slot.name == "momentum_buffer"), self._weights)
        self._dtypes = flat[0][0].dtype, flat[1][0].dtype, momenta.memory.dtype[0]
        addresses = self._weights.table, self._gradients.table, None, None
        self._tables = Tables(self._chunks, flat[0][0].device, *addresses, new, self._cache, layouts=self.layouts)
        self._tabulate()
        return [(operand, xs) for operand, xs in zip(self._operands, flat, strict=True) if xs is not operand.tensors]

    def _tabulate(self) -> None:
        """Give the tables the addresses, which may have changed."""
        tables, buffers = self._tables, {slot.name: operand.table for slot, operand in self._states.items()}
        tables.weights, tables.gradients, tables.buffers = self._weights.table, self._gradients.table, buffers
        tables.states, tables.compensations = buffers.get("momentum_buffer"), buffers.get("kahan_compensation")

    def _shares(self, batch: FusedBatch) -> Tensor:
        """Count the step, unless it is skipped; return 1/Σ of the weights in c and d, √(1/Σ) of those in v.

        All on the parameters' device, where a captured graph counts its replays.
        """
        recipe = batch.recipe
        found = batch.found_inf
        by = 1 if found is None else (found == 0).to(batch.params[0].device, torch.float32).reshape(())
        if self._unchanged and self._counts:
            more = int(by)
            for count in self._counts:
                count += more
            numbers = [count.item() for count in self._counts]
        else:
            steps = recipe.count.advance(batch, by)
            numbers = [x.item() for x in steps] if on_host(steps) else []
        stages = recipe.momentum, recipe.metric, recipe.difference

        def columns(t: Any) -> tuple[Any, Any, Any]:
            c, v, d = (stage.weight(t) if stage.runs() else t**0 for stage in stages)
            return 1 / c, v**-0.5, 1 / d

        if not numbers:
            return torch.stack(columns(stack(steps).double().clamp_(min=1)), 1)
        rows = {t: columns(max(1.0, t)) for t in set(numbers)}  # 0 at a first step that is skipped
        shares = np.empty((len(numbers), 3))
        shares[:] = [rows[t] for t in numbers] if len(rows) > 1 else [*rows.values()]
        return torch.from_numpy(shares)

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
        self.measured: tuple[Tensor, Tensor] | None = None  # ‖c‖⋆ and the factor of D(c)

    def norm_pair(self) -> NormPair | None:
        if self.measured is None:
            return None
        dual, factor = self.measured
        return NormPair(torch.where(dual > 0, factor, dual), dual)

    def load(self) -> None:
        self.phases = self.update.phases(self)

    def release(self) -> None:
        self.phases = []


def _seed(device: torch.device) -> Tensor | int:
    """Draw a seed from the device's generator; a tensor on CUDA, where a captured graph draws a new one per replay."""
    drawn = torch.randint(2**31, (1,), device=device)
    return drawn if device.type == "cuda" else int(drawn)
