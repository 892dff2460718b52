"""Check that all ranks are about to make the same step; otherwise results would be wrong, or ranks would hang."""

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
        RuntimeError: on all ranks, if one differs from the others; the message names the difference.
    """
    groups = [[(p, layout_of(p)) for p in params] for _, params in work]
    sharded = [(p.device, lay) for group in groups for p, lay in group if lay is not None]
    if not sharded:
        return
    shapes = [[(tuple(p.shape), str(p.dtype), lay and lay.dim) for p, lay in group] for group in groups]
    settings = [(str(r), "a tensor" if isinstance(r.write.lr, Tensor) else r.write.lr) for r, _ in work]
    mine = torch.tensor([[sum(map(len, groups)), _hash(shapes), _hash(settings)]], dtype=torch.float64)
    layouts = {lay.group: lay for _, lay in sharded}
    for pieces in gather_pieces([(mine.to(sharded[0][0]), [lay]) for lay in layouts.values()]):
        for aspect, column in zip(ASPECTS, zip(*pieces[0].tolist(), strict=True), strict=True):
            if len(set(column)) > 1:
                odd = [r for r, value in enumerate(column) if value != column[0]]
                raise RuntimeError(
                    f"the ranks differ in {aspect}: rank {odd[0]} from rank 0. Norms of sharded parameters need every "
                    "rank to make the same step: the same param groups, in the same order and with the same settings, "
                    "and gradients for the same parameters"
                )


def _hash(x: object) -> float:
    """Return a hash of 48 bits, which a float64 holds."""
    return float(int.from_bytes(hashlib.sha256(repr(x).encode()).digest()[:6], "big"))
