"""One param group's settings, checked, as the stages of its step and the backend that runs them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import compress
from operator import is_, is_not, itemgetter
from typing import Any, Literal, cast

import torch
from torch import Tensor

from normopt._checks import check_bool, plain
from normopt.kernels import support
from normopt.kernels.flags import Numbers
from normopt.norms import registry
from normopt.norms.base import Norm
from normopt.norms.lp import Lp
from normopt.params import kinds_of
from normopt.sharding.layout import any_dtensor, layout_of
from normopt.stages import (
    Count,
    Coupling,
    Decay,
    DecayInside,
    Difference,
    Direction,
    Metric,
    Momentum,
    Pull,
    Regularization,
    Rescale,
    Round,
    RowAverage,
    Slot,
    Sphere,
    Stage,
    Unwhiten,
    Write,
    register_stage,
    setting,
)
from normopt.stages.base import Op, check_setting, owners, registrations, stages_in_order
from normopt.stages.direction import comm_strategy

Backend = Literal["for-loop", "foreach", "fused"]

# Entries of a group up to which a CPU's kernels save less than they cost at the start of a process, 0.5 s.
TINY = 1 << 13
# Entries of a tensor, on average, up to which a CPU does better with one call for all: beyond, a tensor that goes
# through all stages alone stays in the cache, which saves more.
SMALL = 1 << 14


@register_stage
@dataclass
class Run(Stage):
    """The settings of the backend, which belong to no stage."""

    foreach: bool | None = setting(None, check_bool, "multi-tensor operations; None uses them where they are faster")
    fused: bool | None = setting(
        None,
        check_bool,
        "kernels that do the whole step of a group, Triton's on CUDA and Numba's on CPU (the extra \"cpu\"), for ℓp "
        "norms with p > 1; None uses them where they are installed and support the step, but for tiny groups on a CPU",
    )
    differentiable: bool = setting(False, check_bool, "let autograd differentiate through the step")

    def check(self) -> None:
        if self.foreach and self.fused:
            raise ValueError(
                "foreach=True and fused=True are two ways of running a step: set one of them to None or False"
            )
        if self.foreach and self.differentiable:
            raise ValueError("foreach=True cannot be differentiated through: set foreach=None or differentiable=False")


class Recipe:
    """The stages of one param group's step with their numbers, and its backend.

    Made by [`make_recipe`][normopt.recipe.make_recipe] only, so that a Recipe is always valid. ``str(recipe)`` is its
    line in ``backend()``.

    Attributes:
        every: all registered stages, in order, by their class.
        stages: those that run.
        direction: the stage of the norm.
        metric: the stage of the coordinates.
        count: the stage that counts steps.
        difference: the stage of Adan's gradient differences.
        sphere: the stage of the constraint.
        coupling: the stage of Stacey's second iterate.
        momentum: the stage of the momentum.
        decay: the stage of the weight decay.
        write: the stage of the update.
        round: the stage of the rounding.
        whole_group: whether some stage sees all tensors of the group as one vector.
        run: the settings of how it is run.
        norm: the norm, with its fields.
        slots: the state that the stages keep.
        shaped: the names of those that are shaped like their parameter.
        counted: the names of those whose steps are counted together, the count first.
        backend: "for-loop", "foreach" or "fused".
        why: the reason for that backend, in words.
        differentiable: whether autograd records the step.
        version: how often its numbers have changed.
    """

    backend: Backend
    why: str

    def __init__(self, every: dict[type[Stage], Stage], norm: Norm) -> None:
        self.every, self.version = every, 0
        self.momentum, self.direction = cast(Momentum, every[Momentum]), cast(Direction, every[Direction])
        self.decay, self.write, self.run = cast(Decay, every[Decay]), cast(Write, every[Write]), cast(Run, every[Run])
        self.count, self.metric, self.round = (cast(Any, every[cls]) for cls in (Count, Metric, Round))
        self.difference, self.sphere = cast(Difference, every[Difference]), cast(Sphere, every[Sphere])
        # What stages need of each other and of the norm.
        self.metric.direction = cast(RowAverage, every[RowAverage]).direction = self.direction
        cast(Unwhiten, every[Unwhiten]).metric = self.metric
        self.coupling = cast(Pull, every[Pull]).coupling = cast(Coupling, every[Coupling])
        self.direction.map, self.write.decaying = norm, self.decay
        cast(DecayInside, every[DecayInside]).decay = self.decay
        scale, base = self.direction.scale, self.direction.base
        plain = scale == "matched" and (norm.is_identity(base) or norm.needs(base) == "none")
        rescaled = scale in ("matched", "relative") and not plain
        cast(Rescale, every[Rescale]).to = cast(Any, "sphere" if self.sphere.runs() else scale if rescaled else "")
        self.whole_group = self.direction.whole_group or cast(Regularization, every[Regularization]).whole_group
        self.stages = tuple(stage for stage in every.values() if stage.place != "none" and stage.runs())
        self.direction.sees_c_alone = [type(s) for s in self.stages[-4:]] == [Momentum, Direction, Write, Round]
        self.slots: tuple[Slot, ...] = tuple(slot for stage in self.stages for slot in stage.slots())
        self.shaped = [slot.name for slot in self.slots if slot.shape is None]
        averages = [stage for stage in (self.count, self.momentum, self.difference, self.metric) if stage.runs()]
        self.counted = [slot.name for stage in averages for slot in stage.slots()] if self.count.runs() else []
        self.differentiable: bool = self.run.differentiable
        # What the stages have lowered to, which of them have other numbers since, and what all have together.
        self._ops: dict[type[Stage], Op] = {}
        self._stale: set[type[Stage]] = set()
        self._flags: dict[str, Any] = {}
        self._numbers: dict[str, Any] = {}

    @property
    def norm(self) -> Norm:
        """The norm, with its fields."""
        return self.direction.map

    @property
    def has_tensors(self) -> bool:
        """True if some of its numbers are tensors, whose values may change between steps."""
        lr, strength, p = self.write.lr, self.decay.weight_decay, self.direction.p
        return isinstance(lr, Tensor) or isinstance(strength, Tensor) or isinstance(p, Tensor)

    def lower(self) -> tuple[dict[str, Any], Numbers] | str:
        """Return the fields of `Flags` that the stages set, and the numbers; or the reason why a stage has neither.

        As long as the flags stay the same, so does the object that is returned for them.
        """
        ops, same, has_tensors = self._ops, True, self.has_tensors
        for stage in self.stages:
            cls = type(stage)
            if cls in self._stale or cls not in ops or stage.lowers_others or has_tensors:
                op = stage.lower()
                if isinstance(op, str):
                    return op
                old = ops.get(cls)
                same &= old is not None and old.flags == op.flags and old.numbers.keys() == op.numbers.keys()
                ops[cls] = op
                self._numbers |= op.numbers
        self._stale.clear()
        if not same:
            self._flags, self._numbers = {}, {}
            for op in ops.values():
                self._flags |= op.flags
                self._numbers |= op.numbers
        return self._flags, Numbers(**self._numbers)

    def take_numbers(self, settings: Mapping[str, Any], changed: Iterable[str]) -> bool:
        """Take the new values of some settings in place; return False if more than numbers has changed.

        After False or an error the recipe must not be used.

        Args:
            settings: the param group.
            changed: the names of the settings whose values are new.

        Returns:
            Whether the recipe is right for the new values.

        Raises:
            ValueError: a setting is out of range.
            TypeError: a setting is of the wrong type.
        """
        stages = {}
        for name in changed:
            owner, value = owners().get(name), plain(settings[name])
            if owner is None:  # a field of the norm
                return False
            check_setting(name, value)
            stage = stages[owner] = self.every[owner]
            structure = stage.structure()
            setattr(stage, name, value)
            if stage.structure() != structure:
                return False
            if name == "p":
                if type(self.norm) is not Lp or isinstance(value, Tensor):
                    return False
                self.direction.map = Lp(value)
        for stage in stages.values():
            stage.check()
        self._stale |= stages.keys()
        self.version += 1
        return True

    def __str__(self) -> str:
        radius = f", radius {self.write.radius:g}" if self.write.radius != 1 else ""
        words = [stage.describe() + radius * (stage is self.direction) for stage in self.stages]
        return f"{' → '.join(filter(None, words))}, on {self.backend} ({self.why})"


def slots_of(group: Mapping[str, Any]) -> list[Slot]:
    """Return the state that a group's stages keep, those that do not run at present included."""
    return [slot for cls in stages_in_order() for slot in cls.of(group).slots()]


class CachedRecipe:
    """The recipe of a group's last step, for as long as nothing that it depends on has changed."""

    def __init__(self, group: Mapping[str, Any], recipe: Recipe) -> None:
        self.recipe = recipe
        fields = {registry.setting_key(field) for field in registry.lookup(group["norm"]).fields}
        self._registrations, self._keys = registrations(), list(group)
        self._names = tuple(name for name in group if name in owners() or name in fields)
        self._get = itemgetter(*self._names)
        self._values, self._params = self._get(group), list(group["params"])
        self.kinds = kinds_of(self._params)
        # Whether state has the dtype of its parameter, so that it can be updated in place.
        self.may_be_plain = recipe.backend == "foreach" and all(slot.is_plain for slot in recipe.slots)

    def current(self, group: Mapping[str, Any]) -> Recipe | None:
        """Return the recipe with the group's present numbers; None if it has to be remade.

        What kinds of tensors the parameters are is not looked at: see `still_fits`.

        Raises:
            ValueError: a number is out of range.
        """
        params = group["params"]
        if len(params) != len(self._params) or not all(map(is_, params, self._params)):
            return None
        if list(group) != self._keys or registrations() != self._registrations:
            return None
        values, changed = self._get(group), []
        for i in compress(range(len(values)), map(is_not, values, self._values)):
            x, old = values[i], self._values[i]
            if type(x) is not type(old):
                return None
            if isinstance(x, Tensor) or x != old:  # comparing tensors by value would wait for the device
                changed.append(self._names[i])
        if changed and not self.recipe.take_numbers(group, changed):
            return None
        self._values = values
        self.recipe.norm.check(self.recipe.direction.base, params)
        return self.recipe

    def still_fits(self, params: list[Tensor]) -> bool:
        """Return whether the parameters have the classes, devices and dtypes for which the recipe was made."""
        return kinds_of(params) == self.kinds


def make_recipe(settings: Mapping[str, Any], params: Iterable[Tensor] = ()) -> Recipe:
    """Check a param group's settings and choose its backend.

    Args:
        settings: a param group, or all of its settings by name, as an optimizer's ``defaults`` has them.
        params: the group's parameters, on which shapes, dtypes and devices the checks and the backend depend.
            Default: none.

    Returns:
        The recipe. It holds the settings, numbers of other libraries such as ``np.float32`` as Python's, and does not
        change when they do.

    Raises:
        ValueError: a setting is out of range, unknown, or contradicts another; the message names it.
        TypeError: a setting is of the wrong type; the message names it.
    """
    check_settings(settings)
    params = list(params)
    recipe = Recipe({cls: cls.of(settings) for cls in stages_in_order()}, registry.build(settings))
    for stage in recipe.every.values():
        stage.check()
    _check_together(recipe, params)
    recipe.norm.check(recipe.direction.base, params)
    recipe.backend, recipe.why = _choose_backend(recipe, params)
    return recipe


def check_settings(settings: Mapping[str, Any]) -> None:
    """Raise a ValueError or TypeError if a setting is out of range, not among its choices or of the wrong type."""
    for name in owners():
        if name in settings:
            check_setting(name, settings[name])


def _check_together(recipe: Recipe, params: list[Tensor]) -> None:
    """Check settings of several stages against each other and against the parameters."""
    if recipe.sphere.runs() and recipe.direction.whole_group:
        raise ValueError('constraint="sphere" keeps the norm of each tensor: use a scope of "tensor"')
    if recipe.sphere.runs() and recipe.decay.runs() and recipe.decay.decay in ("decoupled", "proximal", "cautious"):
        raise ValueError(
            'constraint="sphere" keeps the norm of every tensor, which weight decay would shrink, but weight_decay = '
            f"{recipe.decay.weight_decay} (some optimizers have a default): set weight_decay=0, "
            'or use decay="lp", which makes small weights smaller'
        )
    if recipe.decay.rule.in_direction and recipe.direction.scale == "matched":
        raise ValueError(
            f'decay="{recipe.decay.decay}" is added to a direction under scale="dual" or "relative", not "matched": '
            'use one of these, or decay="decoupled"'
        )
    if recipe.coupling.runs() and recipe.metric.runs():
        raise ValueError('coupling follows c in the plain coordinates: set coupling=0 or metric="none"')
    norm, rounding, whole_group = recipe.norm, recipe.round.rounding, recipe.whole_group
    if recipe.counted and recipe.momentum.runs():
        rule = recipe.momentum.momentum_rule
        if recipe.momentum.coefficients().first is not None:
            raise ValueError(
                f"bias_correction=True is for averages, but momentum_rule={rule!r} starts from the first gradient: use "
                'momentum_rule="ema" or "lion", or bias_correction=False'
            )
        if not recipe.momentum.weight(1) > 0:
            raise ValueError(
                "bias_correction=True divides by the sum of the gradients' weights, but in the first step it is "
                f"{recipe.momentum.weight(1):g} under momentum_rule={rule!r}: set bias_correction=False"
            )
    if recipe.differentiable and not norm.differentiable:
        raise ValueError(f"{norm!r} is not differentiable (it has no derivative): set differentiable=False")
    if recipe.differentiable and rounding == "stochastic":
        raise ValueError('rounding="stochastic" has no derivative: use "nearest" or "kahan" with differentiable=True')
    if rounding == "stochastic" and any(p.dtype == torch.float16 for p in params):
        raise ValueError('rounding="stochastic" is for bfloat16 weights, but some are float16: use "kahan"')
    if rounding != "nearest" and any(p.dtype == torch.complex32 for p in params):
        raise ValueError(f'rounding="{rounding}" is not for complex32 weights: use "nearest"')
    numbers = {"lr": recipe.write.lr, "p": recipe.direction.p, "weight_decay": recipe.decay.weight_decay}
    tensors = [name for name, value in numbers.items() if isinstance(value, Tensor)]
    if whole_group and tensors and len({p.device for p in params}) > 1:
        raise ValueError(
            f'a scope of "group" over several devices takes numbers, but {", ".join(tensors)} is a tensor: give '
            "floats, or a group for each device"
        )
    if not any_dtensor(params):
        return
    layouts = [layout for p in params if (layout := layout_of(p)) is not None]
    if recipe.differentiable:
        raise ValueError("differentiable=True steps unsharded tensors only, but some parameters are DTensors")
    if whole_group and len({layout.group for layout in layouts}) > 1:
        raise ValueError(
            'a scope of "group" is over one process group, but some parameters are sharded over others: give each a '
            "param group"
        )
    ways = {comm_strategy(norm, recipe.direction.base, layout) for layout in layouts}
    if recipe.direction.whole_group and not ways <= {"local", "sums"}:
        raise ValueError(
            f'scope="group" of DTensors needs a norm of partial sums, but {norm!r} needs whole tensors here: '
            'use scope="tensor"'
        )


def _why_not_fused(recipe: Recipe, params: list[Tensor]) -> str | None:
    """Return what prevents a fused step, as the end of a sentence; None if nothing."""
    if torch.compiler.is_compiling():
        return "torch.compile makes kernels of its own"
    lowered = recipe.lower()
    if isinstance(lowered, str):
        return lowered
    return support.why_not(recipe.differentiable, cast("str | None", recipe.momentum.state_dtype), params, lowered[0])


def _choose_backend(recipe: Recipe, params: list[Tensor]) -> tuple[Backend, str]:
    """Return how the step is run, and why."""
    foreach, fused = recipe.run.foreach, recipe.run.fused
    if foreach is not None and not fused:
        return ("foreach", "foreach=True") if foreach else ("for-loop", "foreach=False")
    devices, sharded = {p.device.type for p in params}, any_dtensor(params)
    cuda, cpu, size = devices == {"cuda"}, devices == {"cpu"}, sum(p.numel() for p in params)
    if fused or (fused is None and not sharded and (cuda or (cpu and size > TINY))):
        why_not = _why_not_fused(recipe, params)
        if why_not is None:
            why = "every parameter is a plain CUDA tensor" if cuda else "Numba is installed"
            return "fused", "fused=True" if fused else why
        if fused:
            raise ValueError(
                f"fused=True is not available here: {why_not}. Set fused=None or False; if a checkpoint has it, "
                "in the checkpoint's param_groups"
            )
    if recipe.differentiable:
        return "for-loop", "differentiable=True"
    if sharded:
        return "foreach", "shards go together"
    if recipe.norm.batches:
        return "foreach", "matrices of one shape go together"
    no_subclass = all(type(p) in (Tensor, torch.nn.Parameter) for p in params)
    if cuda and no_subclass:
        return "foreach", "every parameter is a plain CUDA tensor"
    if cpu and no_subclass and size <= SMALL * len(params):
        return "foreach", "small tensors on a CPU"
    return "for-loop", f"the default on {', '.join(sorted(devices)) or 'no device yet'}"
