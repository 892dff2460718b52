"""Check that all ranks are about to make the same step: another would be wrong, or leave the others waiting."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from normopt.sharding.exchange import gather_pieces
from normopt.sharding.layout import layout_of

if TYPE_CHECKING:
    from normopt.recipe import Recipe

ASPECTS = (
    "how many parameters have gradients",
    "the shapes and dtypes of the parameters, their order, or their groups",
    "the settings of their groups",
)


def check_agreement(work: Sequence[tuple[Recipe, list[Tensor]]]) -> None:
    """Compare the ranks' groups, parameters and settings, by one small collective for each process group.

    Args:
        work: the recipes of all groups, and their parameters that have gradients.

    Raises:
        RuntimeError: on all ranks, if one differs from the others; the message says in what.
    """
    layouts = {lay.group: lay for _, params in work for p in params if (lay := layout_of(p)) is not None}
    if not layouts:
        return
    device = next(p.device for _, params in work for p in params if layout_of(p) is not None)
    count = sum(len(params) for _, params in work)
    shapes = [[(tuple(p.shape), str(p.dtype), _sharded_dim(p)) for p in params] for _, params in work]
    settings = [(str(r), "a tensor" if isinstance(r.write.lr, Tensor) else r.write.lr) for r, _ in work]
    mine = torch.tensor([[float(count), _hash(shapes), _hash(settings)]], dtype=torch.float64)
    for pieces in gather_pieces([(mine.to(device), [lay]) for lay in layouts.values()]):
        for aspect, column in zip(ASPECTS, zip(*pieces[0].tolist(), strict=True), strict=True):
            if len(set(column)) > 1:
                odd = [r for r, value in enumerate(column) if value != column[0]]
                raise RuntimeError(
                    f"the ranks differ in {aspect}: rank {odd[0]} from rank 0. Norms of sharded parameters need every "
                    "rank to make the same step: the same param groups, in the same order and with the same settings, "
                    "and gradients for the same parameters"
                )


def _sharded_dim(p: Tensor) -> int | None:
    layout = layout_of(p)
    return None if layout is None else layout.dim


def _hash(x: object) -> float:
    """Return a hash of 48 bits, which a float64 holds."""
    return float(int.from_bytes(hashlib.sha256(repr(x).encode()).digest()[:6], "big"))
