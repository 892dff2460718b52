"""A fused step as data: the choices that are compiled into a kernel, and the numbers that it reads.

The stages make both (`Stage.lower`). Every scale of every ℓp norm is one form,
``u = factor · sign(c) · (|c|/size)^exponent`` with exponent 1/(p−1), and a size and a factor for each tensor unless
the direction is elementwise. The mode is how the power is computed: four exponents have an instruction of their own,
and those above 1 (ABOVE) give 0 for denormals.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

Number = float | Tensor

SIGN, LINEAR, SQRT, SQUARE, GENERAL, ABOVE = range(6)
MODES = {0.0: SIGN, 0.5: SQRT, 1.0: LINEAR, 2.0: SQUARE}
NEAREST, STOCHASTIC, KAHAN = range(3)
# How adaptive coordinates are used: u = c/P, or u = P^−½ D(P^−½ c).
STRAIGHT, BOTH_SIDES = 1, 2
# Bits of a momentum rule, m' = a·m + b·g and c = d·m + e·g + f·m': it runs; d, e, f are not 0; c is m'.
RUNS, OLD, GRADIENT, NEW, SAME = (1 << i for i in range(5))
# State beside the momentum: slots of float32, in the order in which kernels take them.
BUFFERS = "exp_avg_sq", "max_exp_avg_sq", "exp_avg_diff", "previous_grad", "dual_iterate"


def mode_of(exponent: float) -> int:
    """Return how a power with this exponent is computed."""
    return MODES.get(exponent, ABOVE if exponent > 1 else GENERAL)


class Flags(NamedTuple):
    """The choices that a kernel is compiled for.

    Attributes:
        mode: how ``|c|^exponent`` is computed.
        smoothed: the power scale with ε > 0, ``c·(|c| + ε)^exponent`` with the exponent −ρ, −1 under SIGN
            and −½ under SQRT.
        scaled: u has a size and a factor for each tensor, from sums over it.
        dual, matched: the factor is the dual norm, or the one of "matched", which needs more sums; else it is 1.
        relative, sphere: u is rescaled to the length of its weight, or to a radius, to which the updated weight is
            rescaled then.
        inside: λw is added to u, before it is rescaled.
        momentum: the bits of the momentum rule, 0 without one.
        corrected: c, the squares and d are divided by the sums of their weights, numbers of each tensor.
        metric: STRAIGHT, BOTH_SIDES or 0, the use of adaptive coordinates P = √v + ε.
        metric_max: v is the largest average so far, a buffer of its own.
        differs: an average d of the differences of gradients is added to c, and the metric sees g + β(g − g_prev).
        agr: the gradient is regularized, by sums over its tensor.
        coupled: λw is added to the gradient.
        scales_weight: the weight is multiplied by a number before the step.
        decay: the updated weight is multiplied by a factor of the old one, X/(X + k) or 1/(1 + kX), X = |w|^e.
        decay_mode: how X is computed.
        decay_inverse: the factor is 1/(1 + kX).
        decay_wide: only tensors of 2 or more dims have the factor.
        cautious: both only act on entries with u·w ≥ 0.
        coupling: the weight is coupled to a second iterate.
        maximize: the gradient is negated.
        rounding: NEAREST, STOCHASTIC or KAHAN, of 16-bit weights.
        weight, gradient, state: the dtypes of the weights, the gradients and the momentum.
    """

    mode: int = LINEAR
    smoothed: bool = False
    scaled: bool = False
    dual: bool = False
    matched: bool = False
    relative: bool = False
    sphere: bool = False
    inside: bool = False
    momentum: int = 0
    corrected: bool = False
    metric: int = 0
    metric_max: bool = False
    differs: bool = False
    agr: bool = False
    coupled: bool = False
    scales_weight: bool = False
    decay: bool = False
    decay_mode: int = LINEAR
    decay_inverse: bool = False
    decay_wide: bool = True
    cautious: bool = False
    coupling: bool = False
    maximize: bool = False
    rounding: int = NEAREST
    weight: torch.dtype = torch.float32
    gradient: torch.dtype = torch.float32
    state: torch.dtype = torch.float32

    @property
    def lengths(self) -> bool:
        """Whether u is rescaled to the length of a weight."""
        return self.relative or self.sphere

    @property
    def sums(self) -> bool:
        """Whether u has a size and a factor for each tensor, for any reason."""
        return self.scaled or self.lengths


class Numbers(NamedTuple):
    """The numbers that a kernel reads; a tensor is never read on the host, and is used in float64.

    Attributes:
        step_size: ηr.
        keep, take: a and b of the momentum rule.
        first: b of the first step.
        from_old, from_gradient, from_new: d, e and f of the momentum rule.
        coupled: λ of the coupled decay, or of that inside u.
        weight_factor: what the weight is multiplied by before the step.
        decay_strength: k of the factor of the updated weight.
        exponent: 1/(p−1), or −ρ if smoothed.
        eps: ε.
        decay_exponent: e of that factor.
        metric_keep, metric_take: a and b of v ← a·v + b·g².
        metric_eps: ε of P.
        difference_keep, difference_take: β and 1−β of d ← βd + (1−β)(g − g_prev).
        coupling, coupling_rate: τ and α of the second iterate.
    """

    step_size: Number
    keep: float = 0.0
    take: float = 1.0
    first: float = 1.0
    from_old: float = 0.0
    from_gradient: float = 0.0
    from_new: float = 1.0
    coupled: Number = 0.0
    weight_factor: Number = 1.0
    decay_strength: Number = 0.0
    exponent: Number = 1.0
    eps: float = 0.0
    decay_exponent: float = 1.0
    metric_keep: float = 0.0
    metric_take: float = 0.0
    metric_eps: float = 0.0
    difference_keep: float = 0.0
    difference_take: float = 0.0
    coupling: float = 0.0
    coupling_rate: float = 0.0


def wide(value: Number) -> Number:
    """Return a tensor as float64, so that 1 − ηλ loses nothing; a number as it is."""
    return value.double() if isinstance(value, Tensor) else value
