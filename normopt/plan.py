"""One param group's settings, checked, as one frozen Plan: what every backend executes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor

from normopt._checks import equals, plain
from normopt.kernels import support
from normopt.norms import registry
from normopt.norms.base import Norm, Scale
from normopt.settings import Decay, MomentumRule, Rounding, Scope, check_combinations, check_settings
from normopt.sharding.layout import any_dtensor, layout_of

Backend = Literal["for-loop", "foreach", "fused"]

# Entries of a tensor, on average, up to which a CPU does better with one call for all: beyond, a tensor that goes
# through all stages alone stays in the cache, which saves more.
SMALL = 1 << 14


@dataclass(frozen=True)
class Plan:
    """What one step of one param group does: its norm, its numbers, its stages and its backend.

    Made by [`make_plan`][normopt.plan.make_plan] and by nothing else, so that a Plan is always valid.
    ``str(plan)`` says it in one line.

    Attributes:
        norm: the norm, with its fields.
        scale: how long the direction is: "power", "dual", "unit" or "matched".
        scope: whether the norm is over each "tensor" or the "group".
        radius: r, by which the step is multiplied beside the learning rate.
        eps: ε of the power scale.
        lr: η, a float or a one-element tensor.
        momentum: μ; 0 runs no momentum.
        momentum_rule: "heavy", "ema" or "lion".
        beta2: β₂ of "lion".
        dampening: τ of "heavy".
        nesterov: whether the momentum looks ahead.
        agr: whether the gradient is regularized first.
        weight_decay: λ, a float or a one-element tensor.
        decay: "coupled", "decoupled" or "lp"; ``decays`` says whether it runs.
        decay_p: p of the ℓp decay.
        state_dtype: the momentum's dtype by name, None for the parameter's own.
        rounding: how 16-bit weights take the step: "nearest", "stochastic" or "kahan".
        maximize: whether the gradient is turned round first.
        differentiable: whether autograd sees the step.
        backend: "for-loop", "foreach" or "fused".
        why: the reason for that backend, in words.
    """

    norm: Norm
    scale: Scale
    scope: Scope
    radius: float
    eps: float
    lr: float | Tensor
    momentum: float
    momentum_rule: MomentumRule
    beta2: float
    dampening: float
    nesterov: bool
    agr: bool
    weight_decay: float | Tensor
    decay: Decay
    decay_p: float
    state_dtype: str | None
    rounding: Rounding
    maximize: bool
    differentiable: bool
    backend: Backend
    why: str

    @property
    def decays(self) -> Decay | None:
        """The kind of decay that runs, None if none does."""
        return None if equals(self.weight_decay, 0) else self.decay

    @property
    def has_tensors(self) -> bool:
        """Whether some of its numbers are tensors, which may be others at every step."""
        norm_p = getattr(self.norm, "p", None)
        return any(isinstance(x, Tensor) for x in (self.lr, self.weight_decay, norm_p))

    def __str__(self) -> str:
        decay = f"λ = {_shown(self.weight_decay)}"
        stages = ["−g"] if self.maximize else []
        stages += ["AGR"] if self.agr else []
        stages += [f"coupled decay {decay}"] if self.decays == "coupled" else []
        stages += [self._momentum_in_words()] if self.momentum != 0 else []
        eps = f", ε = {self.eps:g}" if self.eps != 0 else ""
        radius = f", radius {self.radius:g}" if self.radius != 1 else ""
        stages += [f"{self.norm!r} {self.scale}{' over the group' if self.scope == 'group' else ''}{eps}{radius}"]
        stages += [f"decoupled decay {decay}"] if self.decays == "decoupled" else []
        stages += [f"ℓp decay {decay}, p = {self.decay_p:g}"] if self.decays == "lp" else []
        rounding = f" ({self.rounding})" if self.rounding != "nearest" else ""
        return f"{' → '.join(stages)} → write{rounding}, on {self.backend} ({self.why})"

    def _momentum_in_words(self) -> str:
        more = [f"β₂ = {self.beta2:g}"] if self.momentum_rule == "lion" else []
        more += [f"dampening {self.dampening:g}"] if self.dampening != 0 else []
        more += ["Nesterov"] if self.nesterov else []
        more += [f"in {self.state_dtype}"] if self.state_dtype else []
        return f"{self.momentum_rule} momentum {self.momentum:g}" + (f" ({', '.join(more)})" if more else "")


def _shown(value: float | Tensor) -> str:
    return "a tensor" if isinstance(value, Tensor) else f"{value:g}"


_TAKEN_AS_THEY_ARE = tuple(f.name for f in fields(Plan) if f.name not in ("norm", "backend", "why"))


def make_plan(settings: Mapping[str, Any], params: Iterable[Tensor] = ()) -> Plan:
    """Check a param group's settings and decide its backend. The one place that does either.

    Args:
        settings: a param group, or all of its settings by name, as an optimizer's ``defaults`` has them.
        params: the group's parameters, on which shapes, dtypes and devices the checks and the backend depend.
            Default: none.

    Returns:
        The plan, which holds the settings, numbers of other libraries such as ``np.float32`` as Python's; it does not
        change when they do.

    Raises:
        ValueError: a setting is out of range, unknown, or contradicts another; the message names it.
        TypeError: a setting is of the wrong type; the message names it.
    """
    check_settings(settings)
    norm = registry.build(settings)
    params = list(params)
    check_combinations(settings, norm)
    _check_rounding(settings["rounding"], params)
    _check_devices(settings, params)
    sharded = _check_shards(settings, params)
    norm.check(settings["scale"], params)
    backend, why = _choose_backend(settings, norm, params, sharded)
    return Plan(norm=norm, backend=backend, why=why, **{name: plain(settings[name]) for name in _TAKEN_AS_THEY_ARE})


def _check_rounding(rounding: Rounding, params: list[Tensor]) -> None:
    if rounding == "stochastic" and any(p.dtype == torch.float16 for p in params):
        raise ValueError('rounding="stochastic" is for bfloat16 weights, but some are float16: use "kahan"')
    if rounding != "nearest" and any(p.dtype == torch.complex32 for p in params):
        raise ValueError(f'rounding="{rounding}" is not for complex32 weights: use "nearest"')


def _check_devices(settings: Mapping[str, Any], params: list[Tensor]) -> None:
    tensors = [k for k in ("lr", "p", "weight_decay") if isinstance(settings[k], Tensor)]
    if settings["scope"] == "group" and tensors and len({p.device for p in params}) > 1:
        raise ValueError(
            f'scope="group" over several devices takes numbers, but {", ".join(tensors)} is a tensor: give floats, or '
            "a group for each device"
        )


def _check_shards(settings: Mapping[str, Any], params: list[Tensor]) -> bool:
    """Whether some parameters are DTensors; refuse those that lie as no stage can follow."""
    if not any_dtensor(params):
        return False
    layouts = [layout for p in params if (layout := layout_of(p)) is not None]
    if settings["differentiable"]:
        raise ValueError("differentiable=True steps whole tensors only, but some parameters are DTensors")
    if settings["scope"] == "group" and len({layout.group for layout in layouts}) > 1:
        raise ValueError(
            'scope="group" is over one process group, but some parameters are cut over others: give each a param group'
        )
    return True


def _choose_backend(
    settings: Mapping[str, Any], norm: Norm, params: list[Tensor], sharded: bool
) -> tuple[Backend, str]:
    """How the step is run, and why so."""
    foreach, fused, differentiable = settings["foreach"], settings["fused"], settings["differentiable"]
    if foreach and fused:
        raise ValueError("foreach=True and fused=True are two ways of running a step: set one of them to None or False")
    if foreach and differentiable:
        raise ValueError("foreach=True cannot be differentiated through: set foreach=None or differentiable=False")
    if foreach is not None and not fused:
        return ("foreach", "foreach=True") if foreach else ("for-loop", "foreach=False")
    cuda = {p.device.type for p in params} == {"cuda"}
    if fused or (fused is None and cuda and not sharded):
        why_not = support.why_not(
            norm, settings["scale"], settings["scope"], differentiable, settings["state_dtype"], params
        )
        if why_not is None:
            return "fused", "fused=True" if fused else "every parameter is a plain CUDA tensor"
        if fused:
            raise ValueError(
                f"fused=True cannot be had here: {why_not}. Set fused=None or False; where a checkpoint brings it, "
                "in the checkpoint's param_groups"
            )
    if differentiable:
        return "for-loop", "differentiable=True"
    if sharded:
        return "foreach", "shards go together"
    if norm.batches:
        return "foreach", "matrices of one shape go together"
    plain = all(type(p) in (Tensor, torch.nn.Parameter) for p in params)
    if cuda and plain:
        return "foreach", "every parameter is a plain CUDA tensor"
    devices = sorted({p.device.type for p in params})
    if devices == ["cpu"] and plain and sum(p.numel() for p in params) <= SMALL * len(params):
        return "foreach", "small tensors on a CPU"
    return "for-loop", f"the default on {', '.join(devices) or 'no device yet'}"
