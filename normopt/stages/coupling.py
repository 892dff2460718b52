"""Stacey's coupling: weights that are pulled to an iterate of plain gradient steps."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from normopt.stages.base import Batch, Op, Slot, Stage, number, register_stage, setting

ITERATE = Slot("dual_iterate", "compute", starts_as_weight=True)


@register_stage
@dataclass
class Coupling(Stage):
    """Couple the weights to a second iterate z, which starts as the weights and takes plain steps along c::

        z ← z − αc                               α = coupling_rate
        w ← [update of w by (1−τ)u] + τ(z − w)   τ = coupling; w on the right is the old one

    Source: Luo et al., "Stacey", arXiv:2506.06606.
    """

    place = "length"
    state = (ITERATE.name,)

    coupling: float = setting(0.0, number(low=0, high=1), "τ of Stacey's coupling to a second iterate; 0 keeps none")
    coupling_rate: float = setting(1e-3, number(low=0, open_high=True), "α, the step size of Stacey's second iterate")

    def runs(self) -> bool:
        return self.coupling != 0

    def slots(self) -> tuple[Slot, ...]:
        return (ITERATE,) if self.runs() else ()

    def apply(self, batch: Batch, scalars: Tensor | None) -> None:
        z = [w.clone() if x is None else x for x, w in zip(batch.read(ITERATE), batch.old, strict=True)]
        torch._foreach_add_(z, batch.c, alpha=-self.coupling_rate)
        batch.store(ITERATE, z)
        batch.pull = list(torch._foreach_mul(torch._foreach_sub(z, batch.old), self.coupling))
        batch.u = list(torch._foreach_mul(batch.u, 1 - self.coupling))

    def structure(self) -> object:
        return self.runs()

    def describe(self) -> str:
        return f"coupling τ = {self.coupling:g}, α = {self.coupling_rate:g}"

    def lower(self) -> Op | str:
        return Op({"coupling": True}, {"coupling": self.coupling, "coupling_rate": self.coupling_rate})


@register_stage
@dataclass
class Pull(Stage):
    """The second half of the coupling: add τ(z − w) to the updated weights."""

    place = "update"  # after that of the write, and before constraints

    coupling: Coupling = field(default=cast(Any, None), init=False)  # which the recipe sets

    def runs(self) -> bool:
        return self.coupling.runs()

    def apply(self, batch: Batch, scalars: Tensor | None) -> None:
        torch._foreach_add_(batch.w, batch.pull)

    def lower(self) -> Op | str:
        return Op()

    def describe(self) -> str:
        return ""
