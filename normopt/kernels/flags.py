"""What a plan means to a kernel: the choices that are compiled into it, and the numbers that it is given.

Every scale of every ℓp norm is one form, ``u = factor · sign(c) · (|c|/size)^exponent`` with exponent 1/(p−1) and a
size and a factor for each tensor, which the elementwise directions do without. How the power is computed is the
mode: four exponents have a way of their own, and those above 1, ABOVE, are too small of a denormal to be looked at.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from normopt.norms.lp import Lp

if TYPE_CHECKING:
    from normopt.plan import Plan

Number = float | Tensor

SIGN, LINEAR, SQRT, SQUARE, GENERAL, ABOVE = range(6)
NONE, HEAVY, EMA, LION = range(4)
DECOUPLED, LP = 1, 2
NEAREST, STOCHASTIC, KAHAN = range(3)
MODES = {0.0: SIGN, 0.5: SQRT, 1.0: LINEAR, 2.0: SQUARE}


class Flags(NamedTuple):
    """The choices that a kernel is compiled for.

    Attributes:
        mode: how ``|c|^exponent`` is computed.
        smoothed: the power scale with ε > 0, ``c·(|c| + ε)^exponent`` with the exponent −ρ, −1 under SIGN.
        scaled: u has a size and a factor for each tensor, from sums over it.
        matched: those sums include what the factor of "matched" is made of.
        momentum: NONE, HEAVY, EMA or LION.
        nesterov: c looks ahead.
        agr: the gradient is regularized, by sums over its tensor.
        coupled: λw is added to the gradient.
        decay: NONE, DECOUPLED or LP.
        decay_mode: how ``|w|^|2−p|`` is computed.
        decay_steep: the ℓp decay has p ≥ 2, and so the other form of its factor.
        maximize: the gradient is negated.
        rounding: NEAREST, STOCHASTIC or KAHAN, of 16-bit weights.
        weight, gradient, state: the dtypes of the weights, the gradients and the momentum.
    """

    mode: int
    smoothed: bool
    scaled: bool
    matched: bool
    momentum: int
    nesterov: bool
    agr: bool
    coupled: bool
    decay: int
    decay_mode: int
    decay_steep: bool
    maximize: bool
    rounding: int
    weight: torch.dtype
    gradient: torch.dtype
    state: torch.dtype


class Numbers(NamedTuple):
    """What a kernel is told beside its flags; a tensor is never read on the host.

    Attributes:
        reach: ηr.
        mu, new, beta2: the weights of the old momentum, of the gradient, and Lion's β₂.
        coupled: λ of the coupled decay.
        shrink: 1 − ηλ, of the decoupled decay.
        pull: pηλ, of the ℓp decay.
        exponent: 1/(p−1), or −ρ if smoothed.
        eps: ε.
        decay_exponent: ``|2−p|`` of the ℓp decay.
    """

    reach: Number
    mu: float
    new: float
    beta2: float
    coupled: Number
    shrink: Number
    pull: Number
    exponent: Number
    eps: float
    decay_exponent: float


def flags_of(plan: Plan, weight: torch.dtype, gradient: torch.dtype, state: torch.dtype) -> Flags:
    """The flags of a plan whose norm is an Lp, for tensors of these dtypes."""
    norm = plan.norm
    assert isinstance(norm, Lp)
    smoothed = plan.scale == "power" and plan.eps != 0
    # A tensor p may be any: the general way, which is told where p is 2 or ∞.
    mode = GENERAL if isinstance(norm.p, Tensor) else _mode(1 / (norm.p - 1))
    if smoothed and mode != SIGN:
        smoothed, mode = (False, LINEAR) if mode == LINEAR else (True, GENERAL)
    scaled = norm.needs(plan.scale) == "tensor"
    low = weight in (torch.bfloat16, torch.float16)
    return Flags(
        mode=mode,
        smoothed=smoothed,
        scaled=scaled,
        matched=scaled and plan.scale == "matched",
        momentum=NONE if plan.momentum == 0 else {"heavy": HEAVY, "ema": EMA, "lion": LION}[plan.momentum_rule],
        nesterov=plan.nesterov,
        agr=plan.agr,
        coupled=plan.decays == "coupled",
        decay={"decoupled": DECOUPLED, "lp": LP}.get(str(plan.decays), NONE),
        decay_mode=_mode(abs(2 - plan.decay_p)) if plan.decays == "lp" else LINEAR,
        decay_steep=plan.decays == "lp" and plan.decay_p >= 2,
        maximize=plan.maximize,
        rounding={"nearest": NEAREST, "stochastic": STOCHASTIC, "kahan": KAHAN}[plan.rounding] if low else NEAREST,
        weight=weight,
        gradient=gradient,
        state=state,
    )


def _mode(exponent: float) -> int:
    return MODES.get(exponent, ABOVE if exponent > 1 else GENERAL)


def numbers_of(plan: Plan) -> Numbers:
    """The numbers of a plan whose norm is an Lp."""
    norm = plan.norm
    assert isinstance(norm, Lp)
    # Tensors too are computed with in float64, of whatever dtype they are: 1 − ηλ is 1 in 16 bits.
    lr, weight_decay = _wide(plan.lr), _wide(plan.weight_decay)
    exponent = math.inf if norm.power_exponent is None else norm.power_exponent
    new = 1 - (plan.dampening if plan.momentum_rule == "heavy" else plan.momentum)
    return Numbers(
        reach=lr * plan.radius,
        mu=plan.momentum,
        new=new,
        beta2=plan.beta2,
        coupled=weight_decay,
        shrink=1 - lr * weight_decay,
        pull=plan.decay_p * lr * weight_decay,
        exponent=exponent - 1 if plan.scale == "power" and plan.eps != 0 else exponent,
        eps=plan.eps,
        decay_exponent=abs(2 - plan.decay_p),
    )


def _wide(value: Number) -> Number:
    return value.double() if isinstance(value, Tensor) else value
