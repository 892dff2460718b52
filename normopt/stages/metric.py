"""Adaptive coordinates: a norm measured in coordinates that follow the gradients.

With P = diag(√v̂ + ε) and v an average (or sum, or running maximum) of squared gradients::

    ‖x‖_P = ‖P^½ x‖          ‖c‖_P⋆ = ‖P^−½ c‖⋆          D_P(c) = P^−½ D(P^−½ c)

So c is divided by P^½ (`Metric`), mapped as always, and the result divided by P^½ again (`Unwhiten`). Where the map
leaves c as it is, such as under ℓ2 with scale "dual", c is divided by P at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor

from normopt.kernels.flags import BOTH_SIDES, STRAIGHT
from normopt.stages.base import Batch, Op, Slot, Stage, number, one_of, register_stage, setting
from normopt.stages.direction import Direction

RULES = ("average", "sum", "max")
TINY = torch.finfo(torch.float32).tiny
SQUARES, LARGEST = Slot("exp_avg_sq", "compute"), Slot("max_exp_avg_sq", "compute")


@register_stage
@dataclass
class Metric(Stage):
    """The metric P of the norm: ``c ← P^−½ c`` before the direction; also updates v, from the gradient after AGR."""

    place = "coordinates"
    state = (SQUARES.name, LARGEST.name)

    metric: Literal["none", "diagonal"] = setting(
        "none", one_of(("none", "diagonal")), 'the coordinates of the norm: "none" or "diagonal", P = diag(√v̂ + ε)'
    )
    metric_beta: float = setting(
        0.999, number(low=0, high=1, open_high=True), "β of v ← βv + (1−β)g², the weight of the OLD state"
    )
    metric_eps: float = setting(1e-8, number(low=TINY, open_high=True), "ε > 0 of P")
    metric_rule: Literal["average", "sum", "max"] = setting(
        "average",
        one_of(RULES),
        'v is the "average" of g², their "sum" (Adagrad) or the "max" of the averages (AMSGrad)',
    )
    direction: Direction = field(default=cast(Any, None), init=False)  # which the recipe sets

    def runs(self) -> bool:
        return self.metric != "none"

    def slots(self) -> tuple[Slot, ...]:
        return () if self.metric == "none" else (SQUARES, LARGEST) if self.metric_rule == "max" else (SQUARES,)

    def apply(self, batch: Batch, scalars: Tensor | None) -> None:
        root = list(torch._foreach_sqrt(self._averages(batch)))
        if batch.differentiable:  # autograd needs the root itself
            root = [x.clone() for x in root]
        if batch.step is not None:
            torch._foreach_div_(root, batch.of_steps(lambda t: self.weight(t) ** 0.5, root))
        torch._foreach_add_(root, self.metric_eps)
        if not self.direction.map.is_identity(self.direction.base):
            torch._foreach_sqrt_(root)
            batch.c = list(torch._foreach_div(batch.c, root))
        batch.root = root

    def coefficients(self) -> tuple[float, float]:
        """Return a and b of v ← a·v + b·g²."""
        return (1.0, 1.0) if self.metric_rule == "sum" else (self.metric_beta, 1 - self.metric_beta)

    def weight(self, t: Any) -> Any:
        """Return the sum of the weights of the squares in v, at step t = 1, 2, …; 1 for a sum."""
        return 1 - self.metric_beta**t if self.metric_rule != "sum" else t**0

    def _averages(self, batch: Batch) -> list[Tensor]:
        """Update v and return it."""
        v = batch.read_or_zeros(SQUARES)
        keep, take = self.coefficients()
        if keep != 1:
            torch._foreach_mul_(v, keep)
        s = batch.g if batch.s is None else batch.s
        torch._foreach_addcmul_(v, s, s, take)
        batch.store(SQUARES, v)
        if self.metric_rule == "max":
            largest = batch.read_or_zeros(LARGEST)
            torch._foreach_maximum_(largest, v)
            batch.store(LARGEST, largest)
            return largest
        return v

    def structure(self) -> object:
        return self.metric, self.metric_rule

    def describe(self) -> str:
        beta = f", β = {self.metric_beta:g}" if self.metric_rule != "sum" else ""
        of = "largest average" if self.metric_rule == "max" else self.metric_rule
        return f"metric diag(√v + {self.metric_eps:g}), v the {of} of g²{beta}"

    def lower(self) -> Op | str:
        use = STRAIGHT if self.direction.map.is_identity(self.direction.base) else BOTH_SIDES
        keep, take = self.coefficients()
        numbers = dict(metric_keep=keep, metric_take=take, metric_eps=self.metric_eps)
        return Op({"metric": use, "metric_max": self.metric_rule == "max"}, numbers)


@register_stage
@dataclass
class Unwhiten(Stage):
    """The second half of the metric: ``u ← P^−½ u``; for the length of "matched" also ``c ← P^−½ c``, which is P⁻¹c."""

    place = "direction"

    metric: Metric = field(default=cast(Any, None), init=False)  # which the recipe sets

    def runs(self) -> bool:
        return self.metric.runs()

    def apply(self, batch: Batch, scalars: Tensor | None) -> None:
        if self.metric.direction.scale == "matched" and batch.u is not batch.c:
            batch.c = list(torch._foreach_div(batch.c, batch.root))
        batch.u = list(torch._foreach_div(batch.u, batch.root))

    def lower(self) -> Op | str:
        return Op()

    def describe(self) -> str:
        return ""
