"""The protocol of a stage: its settings, its state, its arithmetic, and what a kernel needs to know of it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field, fields
from operator import is_
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Self, TypeVar, cast

import torch
from torch import Tensor

from normopt._checks import check_choice, check_number, is_low_precision, plain
from normopt.kernels.flags import Number
from normopt.norms.base import as_real, to_compute_dtype
from normopt.norms.lp import unbind_like
from normopt.sharding.layout import gradient_of, layout_of, to_dtensor_like, to_local

if TYPE_CHECKING:
    from normopt.norms.scales import NormPair
    from normopt.recipe import Recipe
    from normopt.sharding.layout import Layout

Place = Literal["gradient", "momentum", "coordinates", "direction", "length", "update", "weights", "rounding", "none"]
PLACES: tuple[Place, ...] = (
    *("gradient", "momentum", "coordinates", "direction", "length", "update", "weights", "rounding"),
)
Check = Callable[[str, object], None]


class Setting(NamedTuple):
    """A declared setting.

    Attributes:
        default: its default value.
        check: raises a TypeError or ValueError, given the setting's name and a value that is not allowed.
        doc: one line.
        type: its type hint.
    """

    default: Any
    check: Check
    doc: str
    type: str


def setting(default: Any, check: Check, doc: str) -> Any:
    """Declare a setting: a field of a stage, and a key of every param group.

    Args:
        default: its default value; if it is None, None is always allowed.
        check: raises a TypeError or ValueError, given the setting's name and a value that is not allowed.
        doc: one line, for the signature's help and the docs.
    """
    return field(default=default, metadata={"check": check, "doc": doc})


def number(**limits: Any) -> Check:
    """Return a check that accepts numbers within the limits of `check_number`."""
    return lambda name, value: check_number(name, value, **limits)


def one_of(choices: Iterable[str]) -> Check:
    """Return a check that accepts the given strings."""
    return lambda name, value: check_choice(name, value, choices)


class Slot(NamedTuple):
    """State of a stage: one tensor per parameter, which the engine allocates, casts, checks and shards.

    Attributes:
        name: its key in ``optimizer.state[p]``.
        dtype: its dtype by name; None is the parameter's own, and "compute" too, but for 16-bit parameters, of which it
            is float32.
        only_16_bit: whether only 16-bit parameters have it.
        shape: its shape, a function of the parameter's; None (the default) is the parameter's own. A state with a
            shape is a plain tensor, the same on all ranks.
        starts_as_weight: whether kernels make it as a copy of the weight, not of zeros.
    """

    name: str
    dtype: str | None = None
    only_16_bit: bool = False
    shape: Callable[[torch.Size], torch.Size] | None = None
    starts_as_weight: bool = False

    def exists(self, p: Tensor) -> bool:
        """Return whether a parameter has this state."""
        return not self.only_16_bit or is_low_precision(p)

    def dtype_of(self, p: Tensor) -> torch.dtype:
        """Return the dtype for a parameter; complex parameters have complex state of their own dtype."""
        if self.dtype == "compute":
            real = p.dtype.to_real() if self.shape is not None and p.is_complex() else p.dtype
            return torch.float32 if is_low_precision(p) else real
        if self.dtype is None or (p.is_complex() and self.shape is None):
            return p.dtype
        return cast(torch.dtype, getattr(torch, self.dtype))

    @property
    def is_plain(self) -> bool:
        """True if the state of 32- and 64-bit parameters has their dtype, or a shape of its own."""
        return self.shape is not None or self.dtype in (None, "compute")


class Op(NamedTuple):
    """A stage's part of a fused step: fields of `Flags`, compiled into the kernel, and of `Numbers`, read by it."""

    flags: Mapping[str, Any] = MappingProxyType({})
    numbers: Mapping[str, Any] = MappingProxyType({})


@dataclass
class Stage:
    """One stage of a step. The fields that `setting` declares are settings of every param group.

    A stage sees a list of tensors at a time (`Batch`) and runs in two phases, with a reduction in between::

        partials = stage.measure(batch)          [n, w], one row per tensor or local shard; None: no reduction
        scalars  = stage.reduce(partials)        [n, s], over the shards of each tensor
        stage.apply(batch, scalars)              reads and writes batch.g, c, u, w and its slots

    Subclasses override ``apply``, and where they need them ``runs``, ``slots``, ``measure``, ``combine``, ``lower``,
    ``check`` and ``describe``.

    Attributes:
        place: where it runs: "gradient", "momentum", "coordinates", "direction", "length", "update", "weights" (on the
            updated weights) or "rounding"; within a place stages run in the order of their registration.
        state: the names of all slots that it may have.
        lowers_others: whether ``lower`` depends on numbers of other stages.
        settings: its settings by name; `register_stage` sets it.
    """

    place: ClassVar[Place] = "none"
    state: ClassVar[tuple[str, ...]] = ()
    lowers_others: ClassVar[bool] = False
    settings: ClassVar[dict[str, Setting]] = {}

    @classmethod
    def of(cls, group: Mapping[str, Any]) -> Self:
        """Return the stage that a param group describes."""
        return cls(**{name: plain(group[name]) for name in cls.settings if name in group})

    def runs(self) -> bool:
        """Return whether the stage does anything under its settings. Default: True."""
        return True

    def slots(self) -> tuple[Slot, ...]:
        """Return the state that it keeps. Default: none."""
        return ()

    def check(self) -> None:
        """Raise a ValueError if its settings contradict each other."""

    def measure(self, batch: Batch) -> Tensor | None:
        """Return one row of partial sums per tensor, shape [n, w]; None (the default) if it needs none."""
        return None

    def combine(self, partials: Tensor) -> Tensor:
        """Reduce the partial sums of the k shards of each tensor, shape [n, k, w], to shape [n, s]."""
        raise NotImplementedError(f"{type(self).__name__} measures, but has no combine()")

    def reduce(self, pieces: Sequence[Tensor]) -> Tensor:
        """Return `combine` of the partial sums of n tensors, shape [k, w] each, where k may differ."""
        if len({len(x) for x in pieces}) == 1:
            return self.combine(torch.stack(list(pieces)))
        return torch.cat([self.combine(x[None]) for x in pieces])

    def apply(self, batch: Batch, scalars: Tensor | None) -> None:
        """Compute the stage's result, given the result of `combine` if `measure` returned anything."""
        raise NotImplementedError(f"{type(self).__name__} has no apply()")

    def lower(self) -> Op | str:
        """Return the stage's part of a fused step, or the reason why it has none, as the end of a sentence."""
        return f"the stage {type(self).__name__} has no kernel"

    def structure(self) -> object:
        """Return what a recipe depends on: equal structures differ in numbers only. Default: every setting."""
        return tuple(vars(self).values())

    def describe(self) -> str:
        """Return the stage in a few words, for ``backend()`` and ``print(optimizer)``; "" leaves it out."""
        return type(self).__name__


S = TypeVar("S", bound=type[Stage])
T = TypeVar("T")
_stages: list[type[Stage]] = []  # in the order in which they run; those without a place come last
_owners: dict[str, type[Stage]] = {}  # of every setting, the stage that declares it
_registrations = [0]


def register_stage(cls: S) -> S:
    """Register a stage: its settings become settings of every optimizer, and it runs in its place. A decorator.

    A class that is redefined under its own name replaces its old version.

    Raises:
        ValueError: its place does not exist, or one of its settings or slots is another stage's.
    """
    if cls.place not in (*PLACES, "none"):
        raise ValueError(f"the place of {cls.__name__} must be one of {PLACES}, but is {cls.place!r}")
    declared = [f for f in fields(cls) if "check" in f.metadata]
    cls.settings = {
        f.name: Setting(f.default, f.metadata["check"], f.metadata["doc"], str(f.type).replace("'", '"'))
        for f in declared
    }
    others = [s for s in _stages if (s.__module__, s.__qualname__) != (cls.__module__, cls.__qualname__)]
    for other in others:
        for kind, ours, theirs in ("setting", cls.settings, other.settings), ("slot", cls.state, other.state):
            if taken := set(ours) & set(theirs):
                raise ValueError(
                    f"{other.__name__} has a {kind} {min(taken)!r} already: give {cls.__name__}'s another name"
                )
    order = (*PLACES, "none")
    _stages[:] = sorted([*others, cast(type[Stage], cls)], key=lambda stage: order.index(stage.place))
    _registrations[0] += 1
    _owners.clear()
    _owners.update({name: stage for stage in _stages for name in stage.settings})
    return cls


def registrations() -> int:
    """Return how often a stage, a momentum rule or a decay has been registered: older recipes are outdated."""
    return _registrations[0]


def register(registry: dict[str, T], name: str, entry: T) -> None:
    """Add a rule to a registry; one that is redefined under its own name replaces its old version.

    Raises:
        ValueError: the name is one of normopt's own.
    """
    if name in registry and _is_ours(registry[name]) and not _is_ours(entry):
        raise ValueError(f"the name {name!r} is one of normopt's own: choose another")
    registry[name] = entry
    _registrations[0] += 1


def _is_ours(entry: object) -> bool:
    return str(entry.__module__).startswith("normopt.")


def stages_in_order() -> list[type[Stage]]:
    """Return all registered stages in the order in which they run; those without a place come last."""
    return _stages


def owners() -> dict[str, type[Stage]]:
    """Return which registered stage declares each setting."""
    return _owners


def default_settings() -> dict[str, Any]:
    """Return every declared setting with its default."""
    return {name: stage.settings[name].default for name, stage in _owners.items()}


def check_setting(name: str, value: object) -> None:
    """Raise a ValueError or TypeError if a setting is out of range, not among its choices or of the wrong type."""
    declared = _owners[name].settings[name]
    if value is not None or declared.default is not None:
        declared.check(name, value)


class Batch:
    """Tensors that go through the stages together: parameters of one group, and what the stages make of them.

    Attributes:
        params: n parameters.
        layouts: how each is sharded, None for an unsharded one; empty if none is sharded.
        weights: the local shards of the parameters, as real tensors.
        w: the same in the dtype of the arithmetic: float32 for 16-bit weights, else the weights themselves.
        old: w, where autograd records the step a copy: what a stage may keep after w is written.
        g: the gradient, which stages before the momentum replace.
        s: the gradient as the metric sees it, None if that is g.
        c: what the norm is applied to: the momentum, or the gradient without one.
        owns_c: whether c is no other's memory, such as the gradient's, so that the direction may overwrite it.
        u: the update per unit of the learning rate.
        lr, weight_decay: as in the param group, lr times lr_ratio; a tensor is cast to the dtype and device of w.
        step_size: lr times the radius.
        root: the square root of the metric, or the metric itself where the direction is c.
        pull: what a coupling adds to the updated weights.
        step: the number of the step of each parameter, as floats on CPU, else float64 [n]; None if it is not counted.
        pair: ``‖u‖`` and ``‖c‖⋆`` of each tensor, None where the step needs no norm.
        phases: the stages, or the kernels that replace them.
    """

    lr: Number
    weight_decay: Number
    step_size: Number
    phases: Sequence[Any]
    root: list[Tensor]
    pull: list[Tensor]
    s: list[Tensor] | None
    step: list[float] | Tensor | None

    def __init__(
        self,
        recipe: Recipe,
        params: list[Tensor],
        state: MutableMapping[Tensor, Any],
        gradients: list[Tensor] | None = None,
        states: Mapping[str, list[Tensor]] | None = None,
    ) -> None:
        """Take parameters with their state.

        Args:
            recipe: the group's.
            params: parameters that have gradients.
            state: the optimizer's.
            gradients: theirs, if all tensors `are_plain`.
            states: then also the state, a list for each slot by its name.
        """
        self.recipe, self.params, self.state, self.phases = recipe, params, state, recipe.stages
        self.differentiable = recipe.differentiable
        self.layouts: list[Layout | None] = []
        self.pair: NormPair | None = None
        self._gradients, self._states = gradients, states or {}
        self._kept: dict[str, Sequence[Tensor | None]] = {}

    def load(self) -> None:
        """Read weights and gradients."""
        params, write, decay = self.params, self.recipe.write, self.recipe.decay
        if self._gradients is not None:
            self.weights = self.w = params
            self.g = self._gradients
        else:
            layouts = [layout_of(p) for p in params]
            self.layouts = layouts if any(layouts) else []
            self.weights = [as_real(to_local(p)) for p in params]
            self.w = [to_compute_dtype(x) for x in self.weights]
            self.g = [as_real(gradient_of(p)).to(x.dtype) for p, x in zip(params, self.w, strict=True)]
            self.recipe.round.widen(self)
        self.lr, self.weight_decay = like(write.lr, self.w), like(decay.weight_decay, self.w)
        self.lr = self.lr if write.lr_ratio == 1 else self.lr * write.lr_ratio
        self.step_size = self.lr if write.radius == 1 else self.lr * write.radius
        self.old = [x.clone() for x in self.w] if self.differentiable else self.w
        self.c = self.u = self.g
        self.owns_c, self.step, self.s = False, None, None

    def release(self) -> None:
        """Drop what the stages made, so that its memory is free before the next batch."""
        self.weights = self.w = self.old = self.g = self.c = self.u = self.root = self.pull = []
        self._gradients, self._kept, self._states, self.s = None, {}, {}, None

    def norm_pair(self) -> NormPair | None:
        """Return ``‖u‖`` and ``‖c‖⋆`` of each tensor, after the step; None where it needs no norm."""
        return self.pair

    def state_in_place(self, name: str) -> list[Tensor] | None:
        """Return a slot's tensors, to be updated in place; None unless all are there in the dtype of the arithmetic."""
        return self._states.get(name)

    def read(self, slot: Slot) -> list[Tensor | None]:
        """Return a slot's tensors, local and real, in the dtype of the arithmetic; None where there is none yet.

        Those with a shape of their own are as they are stored.
        """
        if slot.name in self._states:
            return list(self._states[slot.name])
        stored = [self.state[p].get(slot.name) if slot.exists(p) else None for p in self.params]
        kept = [None if x is None else as_real(to_local(x)) for x in stored]
        self._kept[slot.name] = kept
        if slot.shape is not None:
            return kept
        found = [None if x is None else x.to(w.dtype) for x, w in zip(kept, self.w, strict=True)]
        return [None if x is None else x.clone() for x in found] if self.differentiable else found

    def read_or_zeros(self, slot: Slot) -> list[Tensor]:
        """Return a slot's tensors as `read` does, with zeros where there is none yet."""
        return [torch.zeros_like(w) if x is None else x for x, w in zip(self.read(slot), self.w, strict=True)]

    def store(self, slot: Slot, values: Sequence[Tensor]) -> None:
        """Write a slot that was read: into its tensors where they fit, else, or under autograd, as new ones."""
        known = self._states.get(slot.name)
        if known is not None and all(map(is_, known, values)):  # updated in place
            return
        self._kept.setdefault(slot.name, known or ())
        for p, x, kept in zip(self.params, values, self._kept[slot.name], strict=True):
            if not slot.exists(p):
                continue
            dtype = slot.dtype_of(p)
            if kept is None or self.differentiable or self.state[p][slot.name].dtype != dtype:  # p's may have changed
                x = (torch.view_as_complex(x) if p.is_complex() and slot.shape is None else x).to(dtype)
                self.state[p][slot.name] = to_dtensor_like(x, p) if slot.shape is None else x
            elif kept is not x:
                kept.copy_(x)

    def of_steps(self, function: Callable[[Any], Any], xs: list[Tensor]) -> list[Any]:
        """Return a function of each parameter's step number, as floats or as 0-d tensors like xs."""
        if isinstance(self.step, list):
            return [function(t) for t in self.step]
        return unbind_like(function(cast(Tensor, self.step)), xs)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.params)


def like(value: Number, w: list[Tensor]) -> Number:
    """Return a tensor on the device and in the widest dtype of w, so that 1 − ηλ loses nothing; a number as it is."""
    if not isinstance(value, Tensor):
        return value
    return value.reshape(()).to(w[0].device, functools.reduce(torch.promote_types, [x.dtype for x in w]))
