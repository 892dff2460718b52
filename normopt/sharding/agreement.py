"""Whether all ranks are about to make the same step: one that differs would be wrong, or leave the others waiting."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from normopt.sharding.exchange import Partials, gathered
from normopt.sharding.layout import layout_of

if TYPE_CHECKING:
    from normopt.plan import Plan

ASPECTS = (
    "how many parameters have gradients",
    "the shapes and dtypes of the parameters, their order, or their groups",
    "the settings of their groups",
)


def check_agreement(work: Sequence[tuple[Plan, list[Tensor]]]) -> None:
    """One small collective for each process group.

    Args:
        work: the plans of all groups, and their parameters that have gradients.

    Raises:
        RuntimeError: on all ranks, if one differs from the others, with what it differs in.
    """
    layouts = {lay.group: lay for _, params in work for p in params if (lay := layout_of(p)) is not None}
    if not layouts:
        return
    device = next(p.device for _, params in work for p in params if layout_of(p) is not None)
    count = sum(len(params) for _, params in work)
    shapes = [[(tuple(p.shape), str(p.dtype), _cut(p)) for p in params] for _, params in work]
    settings = [(str(plan), "a tensor" if isinstance(plan.lr, Tensor) else plan.lr) for plan, _ in work]
    mine = torch.tensor([[float(count), _hash(shapes), _hash(settings)]], dtype=torch.float64)
    asked = [Partials(mine.to(device), lay) for lay in layouts.values()]
    for everyones in gathered(asked):
        told = everyones[0].tolist()
        for aspect, column in zip(ASPECTS, zip(*told, strict=True), strict=True):
            if len(set(column)) > 1:
                odd = [r for r, value in enumerate(column) if value != column[0]]
                raise RuntimeError(
                    f"the ranks differ in {aspect}: rank {odd[0]} from rank 0. Norms of parameters that lie on several "
                    "ranks need every rank to make the same step: the same param groups, in the same order and with "
                    "the same settings, and gradients for the same parameters"
                )


def _cut(p: Tensor) -> int | None:
    layout = layout_of(p)
    return None if layout is None else layout.dim


def _hash(x: object) -> float:
    """48 bits, which a float64 holds."""
    return float(int.from_bytes(hashlib.sha256(repr(x).encode()).digest()[:6], "big"))
