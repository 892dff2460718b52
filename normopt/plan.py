"""One param group's settings, checked, as one frozen Plan: what every backend executes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor

from normopt._checks import check_bool, check_choice, check_number, equals
from normopt.norms import registry
from normopt.norms.base import Norm, Scale

Scope = Literal["tensor", "group"]
MomentumRule = Literal["heavy", "ema", "lion"]
Decay = Literal["coupled", "decoupled", "lp"]
Rounding = Literal["nearest", "stochastic", "kahan"]

CHOICES = {
    "scale": ("power", "dual", "unit", "matched"),
    "scope": ("tensor", "group"),
    "momentum_rule": ("heavy", "ema", "lion"),
    "decay": ("coupled", "decoupled", "lp"),
    "rounding": ("nearest", "stochastic", "kahan"),
}
STATE_DTYPES = ("float32", "float64", "bfloat16", "float16")


class Common(TypedDict, total=False):
    """The settings that every optimizer of the zoo takes and none of them names; see `SteepestDescent`."""

    agr: bool
    decay_p: float
    state_dtype: str | torch.dtype | None
    rounding: Rounding
    maximize: bool
    foreach: bool | None
    differentiable: bool


class Settings(Common, total=False):
    """`Common` and the weight decay, for the optimizers that do not name theirs."""

    weight_decay: float | Tensor
    decay: Decay


@dataclass(frozen=True)
class Plan:
    """What one step of one param group does: its norm, its numbers, its stages and its backend.

    Made by [`make_plan`][normopt.plan.make_plan] and by nothing else, so that a Plan is always valid.
    ``str(plan)`` says it in one line.
    """

    norm: Norm
    scale: Scale
    scope: Scope
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
    backend: Literal["for-loop", "foreach"]
    why: str

    @property
    def decays(self) -> Decay | None:
        """The kind of decay that runs, None if none does."""
        return None if equals(self.weight_decay, 0) else self.decay

    def __str__(self) -> str:
        stages = ["AGR"] if self.agr else []
        stages += ["coupled decay"] if self.decays == "coupled" else []
        stages += [f"{self.momentum_rule} momentum {self.momentum:g}"] if self.momentum != 0 else []
        over = " over the group" if self.scope == "group" else ""
        stages += [f"{self.norm} {self.scale}{over}"]
        stages += ["decoupled decay"] if self.decays == "decoupled" else []
        stages += [f"ℓp decay (p = {self.decay_p:g})"] if self.decays == "lp" else []
        return f"{' → '.join(stages)} → write, on {self.backend} ({self.why})"


_TAKEN_AS_THEY_ARE = tuple(f.name for f in fields(Plan) if f.name not in ("norm", "backend", "why"))


def make_plan(settings: Mapping[str, Any], params: Iterable[Tensor] = ()) -> Plan:
    """Check a param group's settings and decide its backend. The one place that does either.

    Raises:
        ValueError: a setting is out of range, unknown, or contradicts another; the message names it.
        TypeError: a setting is of the wrong type; the message names it.
    """
    s = settings
    check_number("lr", s["lr"], low=0, open_high=True, tensor=True)
    check_number("eps", s["eps"], low=0, open_high=True)
    check_number("momentum", s["momentum"], low=0, high=1, open_high=s["momentum_rule"] != "heavy")
    check_number("beta2", s["beta2"], low=0, high=1, open_high=True)
    check_number("dampening", s["dampening"])
    check_number("weight_decay", s["weight_decay"], low=0, open_high=True, tensor=True)
    check_number("decay_p", s["decay_p"], low=0, open_low=True, open_high=True)
    for name, choices in CHOICES.items():
        check_choice(name, s[name], choices)
    if s["state_dtype"] is not None:
        check_choice("state_dtype", s["state_dtype"], STATE_DTYPES)
    for name in ("nesterov", "agr", "maximize", "differentiable"):
        check_bool(name, s[name])
    if s["foreach"] is not None:
        check_bool("foreach", s["foreach"])
    norm = registry.build(s)
    params = list(params)
    _check_combinations(s, norm)
    _check_rounding(s["rounding"], params)
    backend, why = _choose_backend(s["foreach"], s["differentiable"], params)
    return Plan(norm=norm, backend=backend, why=why, **{name: s[name] for name in _TAKEN_AS_THEY_ARE})


def _check_combinations(s: Mapping[str, Any], norm: Norm) -> None:
    if s["scale"] == "power" and norm.power_exponent is None:
        raise ValueError(
            f'scale="power" is not defined for {norm}: its exponent 1/(p−1) diverges or does not exist; '
            'use "dual", "unit" or "matched"'
        )
    if s["eps"] != 0 and s["scale"] != "power":
        raise ValueError(f'eps = {s["eps"]} belongs to scale="power", but the scale is {s["scale"]!r}: set eps=0')
    if s["scope"] == "group" and s["scale"] in ("power", "matched"):
        raise ValueError(
            f'scope="group" needs scale="dual" or "unit": "{s["scale"]}" takes no norm over the group; '
            'use scope="tensor"'
        )
    if s["nesterov"] and s["momentum_rule"] == "lion":
        raise ValueError('nesterov=True has no meaning under momentum_rule="lion": use "heavy" or "ema"')
    if s["nesterov"] and (s["momentum"] == 0 or s["dampening"] != 0):
        raise ValueError(
            "nesterov=True needs momentum > 0 and dampening = 0, but "
            f"momentum = {s['momentum']}, dampening = {s['dampening']}"
        )
    if s["dampening"] != 0 and s["momentum_rule"] != "heavy":
        raise ValueError(f'dampening belongs to momentum_rule="heavy", not {s["momentum_rule"]!r}: set dampening=0')


def _check_rounding(rounding: Rounding, params: list[Tensor]) -> None:
    if rounding == "stochastic" and any(p.dtype == torch.float16 for p in params):
        raise ValueError('rounding="stochastic" is for bfloat16 weights, but some are float16: use "kahan"')


def _choose_backend(
    foreach: bool | None, differentiable: bool, params: list[Tensor]
) -> tuple[Literal["for-loop", "foreach"], str]:
    if foreach is not None:
        if foreach and differentiable:
            raise ValueError("foreach=True cannot be differentiated through: set foreach=None or differentiable=False")
        return ("foreach", "foreach=True") if foreach else ("for-loop", "foreach=False")
    if differentiable:
        return "for-loop", "differentiable=True"
    devices = {p.device.type for p in params}
    if devices == {"cuda"} and all(type(p) in (Tensor, torch.nn.Parameter) for p in params):
        return "foreach", "every parameter is a plain CUDA tensor"
    return "for-loop", f"the default on {', '.join(sorted(devices)) or 'no device yet'}"
