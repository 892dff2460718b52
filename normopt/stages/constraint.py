"""Constraints on the weights after an update: each tensor on the sphere of its initial norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from normopt.norms.lp import Lp, unbind_like
from normopt.stages.base import Batch, Op, Slot, Stage, one_of, register_stage, setting
from normopt.stages.momentum import scalar

RADIUS = Slot("sphere_radius", "compute", shape=scalar)


def radii_of(batch: Batch, lengths: Tensor) -> Tensor:
    """Return R of each tensor, shape [n], which is stored at the first step: the present length of the weights."""
    radii = [x.clone() if r is None else r for r, x in zip(batch.read(RADIUS), lengths.unbind(), strict=True)]
    batch.store(RADIUS, radii)
    return torch.stack([r.to(lengths) for r in radii])


@register_stage
@dataclass
class Sphere(Stage):
    """Keep the ℓ2 norm R of each tensor: ``w ← R·N(w − ηrR·N(u))``, N(x) = x/‖x‖₂; R is that of the first step.

    The direction is rescaled to R before the update, whatever the scale (`Rescale`).

    Source: hyperball, arXiv:2606.16899.
    """

    place = "weights"
    state = (RADIUS.name,)

    constraint: Literal["none", "sphere"] = setting(
        "none",
        one_of(("none", "sphere")),
        '"sphere" keeps the ℓ2 norm R that each tensor has at its first step: w ← R·N(w − ηrR·N(u)), N(x) = x/‖x‖₂',
    )

    def runs(self) -> bool:
        return self.constraint == "sphere"

    def slots(self) -> tuple[Slot, ...]:
        return (RADIUS,) if self.runs() else ()

    def measure(self, batch: Batch) -> Tensor | None:
        if batch.differentiable:  # autograd needs what is measured
            batch.w = [x.clone() for x in batch.w]
        return Lp(2.0).measure(batch.w)

    def combine(self, partials: Tensor) -> Tensor:
        return Lp(2.0).combine(partials)

    def apply(self, batch: Batch, scalars: Tensor | None) -> None:
        assert scalars is not None
        norms, safe, shifts = scalars.unbind(-1)
        factors = radii_of(batch, norms) * shifts / safe.clamp_min(torch.finfo(safe.dtype).tiny)
        # Within the rounding of a norm it is on the sphere, so that a step of no length changes nothing.
        there = (factors - 1).abs() <= 2 * torch.finfo(factors.dtype).eps
        factors = torch.where(there, 1, factors)
        if batch.differentiable:
            batch.w = list(torch._foreach_mul(batch.w, unbind_like(factors, batch.w)))
        else:
            torch._foreach_mul_(batch.w, unbind_like(factors, batch.w))

    def lower(self) -> Op | str:
        return Op()  # the rescaling lowers it

    def describe(self) -> str:
        return "sphere"
