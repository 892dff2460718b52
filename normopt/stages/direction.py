"""The steepest-descent direction under a norm, on whole tensors and on shards, and its scales."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from torch import Tensor

from normopt._checks import check_number, equals
from normopt.kernels.flags import GENERAL, LINEAR, SIGN, SQRT, Number, mode_of
from normopt.norms import registry
from normopt.norms.base import Norm, Scale
from normopt.norms.lp import Lp
from normopt.norms.matrices import MatrixNorm
from normopt.norms.scales import NormPair, normalize_to, rescale_to_norm, unit_pair
from normopt.sharding.layout import Layout, rows_of_shard
from normopt.sharding.matrices import map_full_tensors
from normopt.stages.base import Batch, Op, Stage, number, one_of, register_stage, setting
from normopt.stages.constraint import radii_of

SCALES = ("power", "dual", "unit", "matched", "relative")
CommStrategy = Literal["local", "sums", "rows", "whole"]


def comm_strategy(norm: Norm, scale: Scale, layout: Layout | None) -> CommStrategy:
    """Return how the direction of a tensor with this sharding is computed.

    ::

        "local"   from the shard alone: elementwise directions, and unsharded tensors
        "sums"    from partial sums of all ranks: norms that need a "tensor"
        "rows"    row by row, on shards of whole rows: norms that need "rows"
        "whole"   from the whole tensor, on one rank: all others
    """
    needs = norm.needs(scale)
    if layout is None or norm.is_identity(scale) or needs == "none":
        return "local"
    if needs == "tensor":
        # At p = 1 the first of equal entries moves. The order of the ranks is that of the entries along dim 0 only.
        return "whole" if isinstance(norm, Lp) and equals(norm.p, 1) and layout.dim != 0 else "sums"
    if needs == "rows" and isinstance(norm, MatrixNorm) and norm.rows_are_whole(len(layout.shape), layout.dim):
        return "rows"
    return "whole"


def _check_norm(name: str, value: object) -> None:
    registry.entry_of(value)


def _check_eps(name: str, value: object) -> None:
    check_number(name, value, low=0, open_high=True)
    if 0 < cast(float, value) < torch.finfo(torch.float32).tiny:
        raise ValueError(f"eps must be 0 or at least {torch.finfo(torch.float32).tiny:g}, but is {value!r}")


@register_stage
@dataclass
class Direction(Stage):
    """The direction u of c under the norm::

        unit      u = D(c)
        dual      u = ‖c‖⋆ · D(c)
        power     u = ‖c‖⋆^κ · D(c), κ = 1/(p−1): elementwise for ℓp
        matched   u = D(c) · RMS(c)/RMS(D(c)), per tensor: SGD's step length, another direction
        relative  u = D(c) · ‖w‖₂/‖D(c)‖₂, per tensor: as long as the weights; where w = 0, as under "dual"

    With scope="group", ‖·‖⋆ and D are those of all tensors of the group as one vector. u may be c itself.
    """

    place = "direction"

    norm: str | Norm = setting(
        "l2",
        _check_norm,
        'a registered name ("lp", "l1", "l2", "linf", or your own) or a Norm object, which is unpacked into ``norm``, '
        "``p`` and ``norm_<field>``",
    )
    p: float | Tensor | None = setting(
        None,
        number(tensor=True),
        "the norm's order, for norms that have one; 1 ≤ p ≤ ∞, a float or a one-element tensor",
    )
    scale: Literal["power", "dual", "unit", "matched", "relative"] = setting(
        "dual",
        one_of(SCALES),
        '"power" (the un-normalised power map; needs p > 1), "dual" (true steepest descent), "unit" (the LMO step), '
        '"matched" (SGD\'s step length at every p) or "relative" (the length of the weights)',
    )
    scope: Literal["tensor", "group"] = setting(
        "tensor", one_of(("tensor", "group")), 'the norm over each "tensor", or over the param "group" as one vector'
    )
    eps: float = setting(0.0, _check_eps, 'ε of scale="power", ``c·(|c| + ε)^(−ρ)``; 0 is exact at p = 2 and ∞')
    map: Norm = field(default=cast(Any, None), init=False)  # the norm with its fields, which the recipe sets
    sees_c_alone: bool = field(default=False, init=False)  # no stage but the momentum does; likewise

    @property
    def base(self) -> Scale:
        """The scale of the norm's own map, before the direction is rescaled."""
        return "dual" if self.scale == "relative" else self.scale

    @property
    def whole_group(self) -> bool:
        """True if all tensors of the group are one vector of the norm."""
        return self.scope == "group"

    def check(self) -> None:
        norm, scale = self.map, self.scale
        if scale == "power" and norm.power_exponent is None:
            raise ValueError(
                f'scale="power" is not defined for {norm}: its exponent 1/(p−1) diverges or does not exist; '
                'use "dual", "unit" or "matched"'
            )
        if self.eps != 0 and scale != "power":
            raise ValueError(
                f'eps = {self.eps} belongs to scale="power", but the scale is {scale!r}: set eps=0. The ε of adaptive '
                "coordinates is metric_eps"
            )
        if self.eps != 0 and not norm.power_takes_eps:
            raise ValueError(f"eps = {self.eps} has no meaning for {norm!r}: set eps=0")
        if self.whole_group and not norm.spans_groups:
            raise ValueError(f'{norm!r} does not support scope="group": use scope="tensor"')
        if self.whole_group and scale not in ("dual", "unit"):
            raise ValueError(
                f'scope="group" needs scale="dual" or "unit", not "{scale}", which uses no norm over the group: '
                'use scope="tensor"'
            )

    def measure(self, batch: Batch) -> Tensor | None:
        way = self._strategy(batch)
        if way == "sums":
            return self.map.numbered(self.map.measure(batch.c), self._begins(batch))
        if way != "rows":
            return None
        # Each shard has whole rows, and only the dual norm, their sum, is reduced over the ranks.
        norm, maps, norms = cast(MatrixNorm, self.map), [], []
        for x, lay, (n, d) in zip(batch.c, cast(list[Layout], batch.layouts), norm.bare().pairs(batch.c), strict=True):
            f = norm.row_factors(lay.shape, x)
            maps.append(d * (rows_of_shard(f, lay) if isinstance(f, Tensor) else f))
            norms.append(torch.dot(x.reshape(-1), maps[-1].reshape(-1)) if isinstance(f, Tensor) else f * n)
        batch.u = maps
        return torch.stack(norms)[:, None]

    def reduce(self, pieces: Sequence[Tensor]) -> Tensor:
        if self.whole_group:
            return self.map.combine(torch.cat(list(pieces))).expand(len(pieces), -1)
        return super().reduce(pieces)

    def combine(self, partials: Tensor) -> Tensor:
        return self.map.combine(partials)

    def apply(self, batch: Batch, scalars: Tensor | None) -> None:
        norm, way = self.map, self._strategy(batch)
        if isinstance(self.p, Tensor):
            norm = norm.on(batch.w[0].device)
        if norm.is_identity(self.base):
            batch.u = batch.c
        elif (self.scale == "power" and way == "local") or norm.needs(self.base) == "none":
            may_overwrite = self.sees_c_alone and batch.owns_c
            batch.u = norm.power_(batch.c, self.eps) if may_overwrite else norm.power(batch.c, self.eps)
        else:
            self._map(batch, norm, way, scalars)

    def _map(self, batch: Batch, norm: Norm, way: CommStrategy, scalars: Tensor | None) -> None:
        """Compute directions that need more than their own entries."""
        scale, c = self.base, batch.c
        kappa = cast(Number, norm.power_exponent) if scale == "power" else 1 if scale == "dual" else 0

        def mapped(x: list[Tensor]) -> tuple[list[Tensor], Tensor]:
            if scale == "power":
                return norm.power(x, self.eps), x[0].new_zeros(len(x))
            return norm.scaled(x, kappa, whole_group=False)

        if way == "whole":
            batch.u, dual = map_full_tensors(c, cast(list[Layout], batch.layouts), mapped)
        elif scalars is None:
            batch.u, dual = norm.scaled(c, kappa, self.whole_group)
        else:
            dual = scalars[:, 0]
            if way == "sums":
                batch.u = norm.apply(c, norm.numbered(scalars, [-b for b in self._begins(batch)]), kappa)
        if scale != "power":
            batch.pair = NormPair(dual, dual) if scale == "dual" else unit_pair(dual)

    def _strategy(self, batch: Batch) -> CommStrategy:
        if not batch.layouts:
            return "local"
        ways = (comm_strategy(self.map, self.base, lay) for lay in batch.layouts)
        return next((way for way in ways if way != "local"), "local")

    def _begins(self, batch: Batch) -> list[int]:
        """Return the offset of each tensor's shards where a norm numbers them: they are counted rank by rank."""
        return [0 if lay is None else lay.rank * len(batch.c) for lay in batch.layouts]

    def lower(self) -> Op | str:
        norm, scale = self.map, self.base
        if not isinstance(norm, Lp):
            return f"{norm!r} does not work entry by entry"
        if equals(norm.p, 1):
            return "at p = 1 a single entry of each tensor moves"
        if self.whole_group:
            return 'scope="group" needs the sums of all tensors before any is updated'
        smoothed = scale == "power" and self.eps != 0
        # A tensor p may have any value: the general mode, which checks for 2 and ∞ in the kernel.
        mode = GENERAL if isinstance(norm.p, Tensor) else mode_of(1 / (norm.p - 1))
        if smoothed and mode not in (SIGN, SQRT):
            smoothed, mode = (False, LINEAR) if mode == LINEAR else (True, GENERAL)
        flags = dict(mode=mode, smoothed=smoothed, scaled=norm.needs(scale) == "tensor", dual=scale == "dual")
        exponent: Number = cast(Any, norm.power_exponent)
        exponent = exponent - 1 if scale == "power" and self.eps != 0 else exponent
        return Op(flags, {"exponent": exponent, "eps": self.eps})

    def structure(self) -> object:
        p = self.p
        kind = f"mode {mode_of(1 / (p - 1))}" if isinstance(p, float) and 1 < p < math.inf else p
        return type(self.map), self.norm, kind, self.scale, self.scope, self.eps == 0

    def describe(self) -> str:
        eps = f", ε = {self.eps:g}" if self.eps != 0 else ""
        return f"{self.map!r} {self.scale}{' over the group' if self.whole_group else ''}{eps}"


@register_stage
@dataclass
class Rescale(Stage):
    """``u ← u·L/‖u‖₂`` for each whole tensor, 0 where u is 0.

    ::

        scale "matched"         L = ‖c‖₂
        scale "relative"        L = ‖w‖₂, and ‖u‖₂ where that is 0. Source: LARS and LAMB, arXiv:1904.00962
        constraint "sphere"     L = R
    """

    place = "length"

    to: Literal["", "matched", "relative", "sphere"] = ""  # not a setting

    def runs(self) -> bool:
        return self.to != ""

    def measure(self, batch: Batch) -> Tensor | None:
        sums = Lp(2.0).measure([*(batch.c if self.to == "matched" else batch.old), *batch.u])
        return torch.cat(sums.tensor_split(2), 1)

    def combine(self, partials: Tensor) -> Tensor:
        return torch.cat([Lp(2.0).combine(x) for x in partials.tensor_split(2, -1)], -1)

    def apply(self, batch: Batch, scalars: Tensor | None) -> None:
        assert scalars is not None
        target, own = scalars.tensor_split(2, -1)
        if self.to == "matched":
            batch.u, factors = rescale_to_norm(batch.u, target, own)
        else:
            lengths = torch.where(target[:, 0] == 0, own[:, 0], target[:, 0])
            if self.to == "sphere":
                lengths = radii_of(batch, lengths)
            batch.u, factors = normalize_to(batch.u, lengths, own)
        if batch.pair is not None:
            batch.pair = NormPair(factors.to(batch.pair.dual) * batch.pair.update, batch.pair.dual)

    def lower(self) -> Op | str:
        return Op({self.to: True})

    def describe(self) -> str:
        return ""
