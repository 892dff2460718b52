"""Run the fused kernels for a param group, with what they were given last time kept for as long as it stays true.

A kernel reads and writes bare addresses. Tensors keep their identity, and often their address, while `.data`, a
resize or a change of dtype puts other memory behind them. So everything that a kernel relies on is read from every
tensor at every step (`Memory`), in a few passes that run in C; only what has changed is looked at closely.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from operator import eq, is_
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from normopt._checks import is_low_precision
from normopt.kernels.flags import Flags, Numbers, flags_of, numbers_of
from normopt.kernels.support import DTYPES
from normopt.kernels.tables import Array, Batch, Chunks
from normopt.norms.scales import NormPair
from normopt.sharding.exchange import Walk
from normopt.sharding.layout import Layout, gradient_of, layout_of, local, spread
from normopt.state import BUFFER, COMPENSATION, check_like, check_writable, state_dtype

if TYPE_CHECKING:
    from normopt.plan import Plan

State = MutableMapping[Tensor, dict[str, Any]]
Group = dict[str, Any]

_dtype, _grad = cast(Any, Tensor.dtype).__get__, cast(Any, Tensor.grad).__get__


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
        list(map(_dtype, xs)),
        list(map(cast(Any, Tensor.storage_offset), xs)),
        list(map(torch.UntypedStorage.nbytes, map(Tensor.untyped_storage, xs))),
    )


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
                    last = x.storage_offset() + sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
                    # A wrapper subclass has no memory either, but an address that is not 0 if it has an offset.
                    if not x.untyped_storage().data_ptr() or (last + 1) * x.element_size() > room:
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
            last = (sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True)) for x in self.tensors)
            spans = [(1 + k) * x.element_size() for k, x in zip(last, self.tensors, strict=True)]
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


class Stepper:
    """The fused steps of parameters of one group, device and dtype, with gradients of one dtype.

    Tensors that are not contiguous are stepped as contiguous copies, and copied back.
    """

    def __init__(self) -> None:
        self._weights, self._gradients = Operand("parameter"), Operand("gradient")
        self._momenta, self._lost = Operand(BUFFER), Operand(COMPENSATION)
        self._plan: Plan | None = None  # of which these are the flags and the numbers
        self._flags: Flags | None = None
        self._numbers: Numbers | None = None
        self.layouts: list[Layout] = []  # of parameters that are sharded
        self._shapes: list[torch.Size] = []
        self._chunks = Chunks([])
        self._kept: dict[str, Any] = {}
        self.overlaps = False  # what is written lies in part in the same memory
        # Where it begins and ends, in order, and after all beginnings one that is nowhere.
        self._written = np.empty(0, np.int64), np.empty(0, np.int64)

    def look(self, plan: Plan, params: list[Tensor], state: State, gradients: list[Tensor] | None = None) -> bool:
        """Check all memory that the kernels will read or write. Nothing is written.

        Args:
            plan: a plan whose backend is "fused".
            params: the parameters, which have dense gradients.
            state: the optimizer's.
            gradients: theirs, if the parameters are those of the last step and no DTensors; the look is then given up
                as soon as more than addresses has changed of them.

        Returns:
            False if it was given up.

        Raises:
            RuntimeError: a tensor has no memory, or not the shape or the device of its parameter.
        """
        again = gradients is not None
        weights = params if again else [local(p) for p in params]
        gradients = gradients or [gradient_of(p) for p in params]
        if not (self._weights.look(weights, again) and self._gradients.look(gradients, again)):
            if again:
                return False
            self.layouts = [lay for p in params if (lay := layout_of(p)) is not None]
            self._gradients.look(gradients)
            check_like("gradient", zip(gradients, weights, strict=True))
            # What no kernel reads, or not together with the others, is cast as the other backends cast it.
            dtypes = set(self._gradients.memory.dtype)
            if any(g.is_complex() for g in gradients):
                raise RuntimeError("a gradient is complex, but its parameter is real: take its real part")
            if len(dtypes) > 1 or not dtypes <= {*DTYPES[weights[0].device.type]}:
                self._gradients.look([g.float() for g in gradients])
        for operand in self._states_of(plan, weights):
            stored = self._stored(operand, params, state, again)
            tensors = [x for x in stored if x is not None]
            if not operand.look(tensors) or not again:
                like = (w for w, x in zip(weights, stored, strict=True) if x is not None)
                check_like(operand.name, zip(tensors, like, strict=True))
        shared = self._shared(self._states_of(plan, weights))
        if again and (self.overlaps or len(shared)):
            return False
        if len(shared):  # gradients are what they were before anything was written
            known = self._gradients.tensors
            self._gradients.look([g.clone() if i in shared else g for i, g in enumerate(known)])
        return True

    def _shared(self, states: list[Operand]) -> list[int]:
        """Find out whether what is written overlaps, and which gradients lie where something is written.

        One that is its weight, entry by entry, is not among them.
        """
        written, gradients = [self._weights, *states], self._gradients
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

    def step(
        self, plan: Plan, params: list[Tensor], state: State, unscale: Tensor | None, found_inf: Tensor | None
    ) -> Walk[NormPair | None]:
        """Run the kernels on the tensors that `look` has just checked.

        Args:
            plan, params, state: as in `look`; what is missing in the state is made.
            unscale: what their gradients are multiplied by, for a GradScaler.
            found_inf: where it is not 0, nothing is written.

        Returns:
            ``‖u‖`` and ``‖c‖⋆`` of each tensor, where the step needs them.
        """
        states = self._states_of(plan, self._weights.tensors)
        new: list[int] = []
        for operand in states:
            new = self._complete(operand, plan, params, state) or new
        if self._shapes != (shapes := self._weights.shapes):
            self._shapes, self._chunks, self._kept = shapes, Chunks(shapes), {}
        if not len(self._chunks) and not self.layouts:
            return None
        operands = [self._weights, self._gradients, *states]
        flat = [operand.flat() for operand in operands]
        device = flat[0][0].device
        if device.type == "cuda":
            from normopt.kernels.triton import run
        else:
            from normopt.kernels.cpu import run
        momentum = self._momenta if self._momenta in states else self._weights
        dtypes = flat[0][0].dtype, flat[1][0].dtype, momentum.memory.dtype[0]
        if self._plan is not plan or self._flags is None or self._flags[-3:] != dtypes or plan.has_tensors:
            self._plan, self._flags, self._numbers = plan, flags_of(plan, *dtypes), numbers_of(plan)
        measured = yield from run(
            self._flags,
            cast(Numbers, self._numbers),
            plan.scale,
            plan.scope == "group",
            Batch(
                self._chunks,
                device,
                self._weights.table,
                self._gradients.table,
                self._momenta.table if self._momenta in states else None,
                self._lost.table if self._lost in states else None,
                new,
                self._kept,
            ),
            unscale=unscale if unscale is None else unscale.to(device, non_blocking=True),
            found_inf=found_inf if found_inf is None else found_inf.to(device, non_blocking=True),
            seed=_seed(device) if plan.rounding == "stochastic" else 0,
            layouts=self.layouts,
        )
        for operand, written in zip(operands, flat, strict=True):
            if operand is not self._gradients:
                if written is not operand.tensors:
                    torch._foreach_copy_(operand.tensors, written)
                # The kernels wrote behind autograd's back: a graph that still needs the old values must not use these.
                torch.autograd.graph.increment_version(operand.tensors)
            operand.tensors = []  # theirs to free
        if measured is None:
            return None
        dual, factor = measured
        return NormPair(torch.where(dual > 0, factor, dual), dual)

    def _states_of(self, plan: Plan, weights: list[Tensor]) -> list[Operand]:
        """The operands that a plan keeps state in."""
        kahan = plan.rounding == "kahan" and is_low_precision(weights[0])
        return [x for x, is_kept in ((self._momenta, plan.momentum != 0), (self._lost, kahan)) if is_kept]

    def _stored(self, operand: Operand, params: list[Tensor], state: State, again: bool) -> list[Tensor | None]:
        """The local state of each parameter, None where there is none yet."""
        # A state that belongs to these parameters alone, in their order: no need to hash them.
        if again and len(state) == len(params) and all(map(is_, state, params)):
            return [own.get(operand.name) for own in state.values()]
        stored = [state.get(p, {}).get(operand.name) for p in params]
        return [x if x is None else local(x) for x in stored]

    def _complete(self, operand: Operand, plan: Plan, params: list[Tensor], state: State) -> list[int]:
        """Make the state that is missing, or was made for another dtype; the places where a momentum is new."""
        memory = operand.memory
        dtype = state_dtype(plan.state_dtype, params[0]) if operand is self._momenta else params[0].dtype
        if len(memory.dtype) == memory.dtype.count(dtype) == len(params):
            return []
        tensors, new = [], []
        for i, p in enumerate(params):
            x = state[p].get(operand.name)
            if x is None:
                zeros = torch.zeros_like(local(p), dtype=dtype, memory_format=torch.contiguous_format)
                state[p][operand.name] = x = spread(zeros, p)
                new.append(i)
            elif x.dtype != dtype:  # the parameter's has changed since
                state[p][operand.name] = x = x.to(dtype)
            tensors.append(local(x))
        operand.look(tensors)
        return new if operand is self._momenta else []


def _seed(device: torch.device) -> Tensor | int:
    """A seed from the device's generator; a tensor on CUDA, where a captured graph draws a new one at every replay."""
    drawn = torch.randint(2**31, (1,), device=device)
    return drawn if device.type == "cuda" else int(drawn)


class Remembered:
    """The plan of a group's last step and what it was stepped by, where all of its tensors are one batch."""

    def __init__(self, group: Group, plan: Plan, stepper: Stepper, names: list[str]) -> None:
        self.plan, self.stepper = plan, stepper
        self._names = names
        self._settings = self._settings_of(group)
        self._params = list(group["params"])

    def holds(self, group: Group, state: State) -> bool:
        """Return whether the plan is still valid: the settings are equal, and of the tensors only addresses differ."""
        params = group["params"]
        if len(params) != len(self._params) or not all(map(is_, params, self._params)):
            return False
        for old, value in zip(self._settings, self._settings_of(group), strict=True):
            if value is not old and (type(value) is not type(old) or isinstance(value, Tensor) or value != old):
                return False
        try:
            gradients = list(map(_grad, params))
            return self.stepper.look(self.plan, params, state, gradients)
        # A gradient is None or sparse, a state is no dict, or something is wrong, which the long way says.
        except (TypeError, AttributeError, RuntimeError):
            return False

    def _settings_of(self, group: Group) -> list[Any]:
        return [group.get(name) for name in self._names]
