"""The stages of a direction, run on bare tensors."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from torch import Tensor

from normopt.norms import Norm
from normopt.norms.base import Scale
from normopt.norms.scales import NormPair
from normopt.sharding.exchange import run_together
from normopt.stages import Direction, Rescale


def direction(
    norm: Norm, c: list[Tensor], scale: Scale, whole_group: bool, eps: float, layouts: Any = ()
) -> tuple[list[Tensor], NormPair | None]:
    """The direction u of c, and ‖u‖ and ‖c‖⋆ of each tensor; with layouts, of local shards."""
    stage = Direction(scale=scale, scope="group" if whole_group else "tensor", eps=eps)
    stage.map = norm
    stages = [stage, Rescale(to="matched")] if scale == "matched" and not norm.is_identity(scale) else [stage]
    batch = cast(Any, SimpleNamespace(c=c, u=c, w=c, params=c, layouts=list(layouts), pair=None, phases=stages))
    if layouts:
        run_together([batch])
        return batch.u, batch.pair
    for one in stages:
        partials = one.measure(batch)
        one.apply(batch, None if partials is None else one.combine(partials[:, None]))
    return batch.u, batch.pair
