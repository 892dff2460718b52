"""The last stages: the update itself, and rounding of its result to lower-precision weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor

from normopt._checks import is_low_precision
from normopt.kernels.flags import KAHAN, NEAREST, STOCHASTIC, wide
from normopt.stages.base import Batch, Op, Slot, Stage, number, one_of, register_stage, setting
from normopt.stages.decay import Decay

ROUNDINGS = {"nearest": NEAREST, "stochastic": STOCHASTIC, "kahan": KAHAN}
COMPENSATION = Slot("kahan_compensation", only_16_bit=True)


@register_stage
@dataclass
class Write(Stage):
    """``w ← w − ηru`` with the weight decay's change, in the dtype of the arithmetic."""

    place = "update"
    lowers_others = True  # the decay's

    lr: float | Tensor = setting(
        1e-3,
        number(low=0, open_high=True, tensor=True),
        "η, a float or a one-element tensor, which is never read on the host",
    )
    radius: float = setting(
        1.0,
        number(low=0, open_low=True, open_high=True),
        "r > 0, the radius of the norm's ball: it multiplies the step, and not the decay",
    )
    lr_ratio: float = setting(
        1.0,
        number(low=0, open_low=True, open_high=True),
        "a factor of lr, in the step and in the decay: a group of another learning rate under one schedule",
    )
    decaying: Decay = field(default=cast(Any, None), init=False)  # the weight decay, which the recipe sets

    def apply(self, batch: Batch, scalars: Tensor | None) -> None:
        self.decaying.rule.update(batch, self.decaying)

    def lower(self) -> Op | str:
        lr, decay = wide(self.lr), Op()
        lr = lr if self.lr_ratio == 1 else lr * self.lr_ratio
        if self._updates_with_decay():
            lowered = self.decaying.rule.lower(lr, self.decaying)
            if isinstance(lowered, str):
                return lowered
            decay = lowered
        return Op(decay.flags, {"step_size": lr * self.radius, **decay.numbers})

    def structure(self) -> object:
        return isinstance(self.lr, Tensor)

    def describe(self) -> str:
        decay = f"{self.decaying.words()} → " if self._updates_with_decay() else ""
        return f"{decay}write" + (f" at {self.lr_ratio:g} lr" if self.lr_ratio != 1 else "")

    def _updates_with_decay(self) -> bool:
        rule = self.decaying.rule
        return self.decaying.runs() and not rule.before_momentum and not rule.in_direction


@register_stage
@dataclass
class Round(Stage):
    """Round the result to the weights' dtype."""

    place = "rounding"
    state = (COMPENSATION.name,)

    rounding: Literal["nearest", "stochastic", "kahan"] = setting(
        "nearest",
        one_of(ROUNDINGS),
        'how 16-bit weights are rounded: "nearest" (a step below half a unit in the last place is lost), "stochastic" '
        '(bfloat16; right on average) or "kahan" (the rounding error is kept, in one more buffer)',
    )

    def slots(self) -> tuple[Slot, ...]:
        return (COMPENSATION,) if self.rounding == "kahan" else ()

    def widen(self, batch: Batch) -> None:
        """Add the stored rounding errors of 16-bit weights to their float32 copies."""
        if self.rounding == "kahan" and any(map(is_low_precision, batch.params)):
            lost = batch.read(COMPENSATION)
            for p, x, e in zip(batch.params, batch.w, lost, strict=True):
                if e is not None and is_low_precision(p):
                    x.add_(e)

    def apply(self, batch: Batch, scalars: Tensor | None) -> None:
        if not torch.compiler.is_compiling() and batch.w is batch.weights:  # which Dynamo of torch 2.6 cannot tell
            return
        if self.rounding == "stochastic":
            stochastic_(batch.weights, batch.w)
        elif self.rounding == "kahan" and any(map(is_low_precision, batch.params)):
            batch.store(COMPENSATION, kahan_(batch.weights, batch.w))
        else:
            nearest_(batch.weights, batch.w)

    def lower(self) -> Op | str:
        return Op({"rounding": ROUNDINGS[self.rounding]})

    def describe(self) -> str:
        return f"{self.rounding} rounding" if self.rounding != "nearest" else ""


def nearest_(weights: list[Tensor], w: list[Tensor]) -> None:
    """Round float32 copies to nearest into the weights; skip weights that were updated without a copy."""
    for p, x in zip(weights, w, strict=True):
        if x is not p:
            p.copy_(x)


def stochastic_(weights: list[Tensor], w: list[Tensor]) -> None:
    """Round float32 up or down to bfloat16 at random, so that the expected value is the float32 value.

    bfloat16 is the upper half of a float32. Adding 16 random bits to the lower half carries into the upper
    half with a probability equal to the fraction that is then truncated. ∞ and NaN are copied.
    Uses torch's generator of the device.
    """
    for p, x in zip(weights, w, strict=True):
        if x is p:
            continue
        noise = torch.randint_like(x, 0, 1 << 16, dtype=torch.int32)
        bits = (x.view(torch.int32) + noise) & -(1 << 16)
        p.copy_(torch.where(x.isfinite(), bits.view(torch.float32), x))


def kahan_(weights: list[Tensor], w: list[Tensor]) -> list[Tensor]:
    """Round to nearest and return the rounding errors: weight + error is w to twice the weight's bits.

    The next step uses that sum as its weight (Kahan summation across steps). The error is 0 where
    the weight is not finite.
    """
    nearest_(weights, w)
    return [torch.where(p.isfinite(), x - p.to(x.dtype), 0) for p, x in zip(weights, w, strict=True)]
