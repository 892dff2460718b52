"""The arms of the ablation: a name → an optimizer and, where it has one, its schedule of p."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer

import normopt
from benchmarks.spec import RunSpec
from normopt.schedules import AdaptiveP, CosineP, LinearP, PSchedule

Make = Callable[..., Optimizer]


@dataclass(frozen=True)
class Arm:
    """One optimizer of the comparison.

    Args:
        name: what the report calls it.
        make: parameters or param groups, lr and settings → the optimizer.
        lr: the middle of its grid of learning rates.
        rule: one line for the report.
        schedule: what moves p: "cosine" over the epochs, as the paper has it, "linear" over them, or "adaptive", after
            every step; without one it stays.
        ours: takes normopt's regularizers.
        sign_step: nothing but the signs of the gradient reach the step.
        preset: the preset of `normopt.param_groups` that gives each layer its norm; without one, all have the same.
    """

    name: str
    make: Make
    lr: float
    rule: str
    schedule: Literal["cosine", "linear", "adaptive"] | None = None
    ours: bool = True
    sign_step: bool = False
    preset: str | None = None


_ARMS = (
    Arm("SGD", partial(normopt.SGD, momentum=0.9), 0.1, "ℓ2, heavy-ball momentum 0.9"),
    Arm(
        "SGD-EMA",
        partial(normopt.SteepestDescent, norm="l2", momentum=0.9, momentum_rule="ema"),
        1.0,
        "ℓ2, averaged momentum 0.9: a heavy-ball step with a tenth of the learning rate",
    ),
    Arm("SignSGD", normopt.SignSGD, 3e-3, "the sign of the gradient, no momentum", sign_step=True),
    Arm("Signum", normopt.Signum, 3e-3, "the sign of the averaged momentum 0.9"),
    Arm(
        "AdamW",
        torch.optim.AdamW,
        1e-2,
        "torch.optim.AdamW at its defaults, its own weight decay 0.01 included",
        ours=False,
    ),
    Arm("LPSGD", normopt.LPSGD, 1e-2, "power map of the gradient, p from 8 to 2", schedule="cosine"),
    Arm("LPSGDM", normopt.LPSGDM, 1e-2, "power map of the averaged momentum 0.9, p from 8 to 2", schedule="cosine"),
    Arm("LPSGDM-constant", normopt.LPSGDM, 1e-2, "LPSGDM whose p stays at 8"),
    Arm(
        "LPSGDM-matched",
        partial(normopt.LPSGDM, scale="matched"),
        1.0,
        "LPSGDM with the length of SGD's step at every p: only the direction differs",
        schedule="cosine",
    ),
    Arm("LPSGDM-linear", normopt.LPSGDM, 1e-2, "LPSGDM whose p goes in a straight line", schedule="linear"),
    Arm(
        "LPSGDM-adaptive",
        normopt.LPSGDM,
        0.3,  # a sparse gradient leads to a p near 2, whose steps are shorter
        "LPSGDM whose p follows from the density of the gradient, between 8 and 2",
        schedule="adaptive",
    ),
    Arm(
        "LPSGDM-matched-linear",
        partial(normopt.LPSGDM, scale="matched"),
        1.0,
        "LPSGDM-matched whose p goes in a straight line",
        schedule="linear",
    ),
    Arm(
        "LPSGDM-matched-constant",
        partial(normopt.LPSGDM, scale="matched"),
        1.0,
        "LPSGDM-matched whose p stays at 8",
    ),
    Arm(
        "LPSGDM-matched-adaptive",
        partial(normopt.LPSGDM, scale="matched"),
        1.0,
        "LPSGDM-matched whose p follows from the density of the gradient, between 8 and 2",
        schedule="adaptive",
    ),
    Arm(
        "Muon",
        normopt.Muon,
        0.1,
        "the averaged momentum 0.95, Nesterov's, with all singular values 1",
        preset="muon",
    ),
    Arm(
        "Scion",
        normopt.Scion,
        3e-4,
        "unit steps of the averaged momentum 0.9 inside each layer's norm ball, its own weight decay 1 included",
        preset="scion",
    ),
    Arm(
        "SCALE",
        normopt.SCALE,
        3e-2,
        "the gradient of every output unit at RMS 1, momentum in the last layer alone",
        preset="scale",
    ),
    Arm(
        "Modular",
        partial(normopt.SteepestDescent, scale="unit", momentum=0.9, momentum_rule="ema"),
        0.3,
        "unit steps of the averaged momentum 0.9 under the modular norm of the whole network",
        preset="modular",
    ),
)

ARMS: dict[str, Arm] = {arm.name: arm for arm in _ARMS}


def grouped(preset: str, model: nn.Module, residual_depth: int | None) -> normopt.ParamGroups:
    """The param groups of an arm with a preset."""
    return normopt.param_groups(model, preset, residual_depth=residual_depth if preset == "modular" else None)


def make_optimizer(spec: RunSpec, model: nn.Module, residual_depth: int | None) -> tuple[Optimizer, PSchedule | None]:
    """The optimizer of a run and its schedule of p: an adaptive one is stepped after every step, others every epoch."""
    arm = ARMS[spec.arm]
    # On a model this small the calls cost more than the arithmetic, and multi-tensor ones are fewer.
    settings: dict[str, Any] = {"foreach": True}
    if spec.agr:
        settings["agr"] = True
    if spec.weight_decay:
        settings |= {"weight_decay": spec.weight_decay, "decay": "lp", "decay_p": spec.decay_p}
    params = grouped(arm.preset, model, residual_depth) if arm.preset else model.parameters()
    optimizer = arm.make(params, spec.lr, **settings)
    match arm.schedule:
        case "cosine":
            return optimizer, CosineP(optimizer, total_steps=spec.epochs)
        case "linear":
            return optimizer, LinearP(optimizer, total_steps=spec.epochs)
        case "adaptive":
            return optimizer, AdaptiveP(optimizer)
    return optimizer, None
