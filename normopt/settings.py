"""Types of the settings that optimizers take as ``**settings``.

Made by ``make generate`` from what the stages declare: change it there.
"""

from __future__ import annotations

from typing import Literal, TypedDict

import torch
from torch import Tensor

from normopt.norms.base import Norm


class Common(TypedDict, total=False):
    """Settings that every optimizer accepts as ``**settings``.

    Attributes:
        maximize: maximize the objective: negate the gradient. Default False.
        agr: adaptive gradient regularization. Default False.
        agr_scope: AGR's sums over each "tensor", as in the paper, or the param "group". Default "tensor".
        decay_p: p of decay="lp" and "cautious-lp", p > 0 (p < 1 too), which act on tensors of 2 or more dims.
            Default 1.
        state_dtype: the momentum's dtype; None is the parameter's own. Default None.
        lr_ratio: a factor of lr, in the step and in the decay: a group of another learning rate under one schedule.
            Default 1.
        constraint: "sphere" keeps the ℓ2 norm R that each tensor has at its first step: w ← R·N(w − ηrR·N(u)), N(x)
            = x/‖x‖₂. Default "none".
        rounding: how 16-bit weights are rounded: "nearest" (a step below half a unit in the last place is lost),
            "stochastic" (bfloat16; right on average) or "kahan" (the rounding error is kept, in one more buffer).
            Default "nearest".
        foreach: multi-tensor operations; None uses them where they are faster. Default None.
        fused: kernels that do the whole step of a group, Triton's on CUDA and Numba's on CPU (the extra "cpu"), for
            ℓp norms with p > 1; None uses them where they are installed and support the step, but for tiny groups on a
            CPU. Default None.
        differentiable: let autograd differentiate through the step. Default False.
    """

    maximize: bool
    agr: bool
    agr_scope: Literal["tensor", "group"]
    decay_p: float
    state_dtype: str | torch.dtype | None
    lr_ratio: float
    constraint: Literal["none", "sphere"]
    rounding: Literal["nearest", "stochastic", "kahan"]
    foreach: bool | None
    fused: bool | None
    differentiable: bool


class Coordinates(Common, total=False):
    """`Common` and adaptive coordinates, which Adam and similar optimizers fix.

    Attributes:
        bias_correction: divide the momentum ("ema", "lion") and the average of the metric by the sums of their
            weights. Default False.
        difference_beta: β of Adan's average of gradient differences; 0 keeps none. Default 0.
        metric: the coordinates of the norm: "none" or "diagonal", P = diag(√v̂ + ε). Default "none".
        metric_beta: β of v ← βv + (1−β)g², the weight of the OLD state. Default 0.999.
        metric_eps: ε > 0 of P. Default 1e-08.
        metric_rule: v is the "average" of g², their "sum" (Adagrad) or the "max" of the averages (AMSGrad). Default
            "average".
    """

    bias_correction: bool
    difference_beta: float
    metric: Literal["none", "diagonal"]
    metric_beta: float
    metric_eps: float
    metric_rule: Literal["average", "sum", "max"]


class Settings(Coordinates, total=False):
    """`Coordinates` and weight decay, where that is no own argument.

    Attributes:
        weight_decay: λ ≥ 0, a float or a one-element tensor. Default 0.
        decay: "coupled", "decoupled", "proximal", "inside", "lp", "cautious", "cautious-lp", or your own; runs if λ
            ≠ 0. Default "decoupled".
    """

    weight_decay: float | Tensor
    decay: Literal["coupled", "decoupled", "proximal", "inside", "lp", "cautious", "cautious-lp"] | str


class Arguments(Settings, total=False):
    """All settings of `SteepestDescent`, which documents them, and the fields of norms."""

    norm: str | Norm
    p: float | Tensor | None
    scale: Literal["power", "dual", "unit", "matched", "relative"]
    scope: Literal["tensor", "group"]
    eps: float
    radius: float
    momentum: float
    momentum_rule: Literal["heavy", "ema", "lion"] | str
    beta2: float
    dampening: float
    nesterov: bool
    row_beta: float
    coupling: float
    coupling_rate: float
    norm_aspect: str
    norm_blocks: int | tuple[int, ...]
    norm_dtype: str
    norm_exponent: float | None
    norm_lines: str
    norm_matrix_view: str
    norm_method: str
    norm_p_inner: float
    norm_p_outer: float
    norm_steps: int
