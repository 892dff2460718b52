"""NorMuon: divide each row of a matrix's update by an average of its size."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self, cast

import torch
from torch import Tensor

from normopt.norms.matrices import MatrixNorm, from_matrices, row_dims, split_rows
from normopt.sharding.layout import rows_of_shard
from normopt.stages.base import Batch, Slot, Stage, number, register_stage, setting
from normopt.stages.direction import Direction

EPS = 1e-8


def row_shape(view: str, shape: torch.Size) -> torch.Size:
    """Return the shape of one number a row, which broadcasts with the tensor: its other dims are 1."""
    return torch.Size(n if i in row_dims(view, len(shape)) else 1 for i, n in enumerate(shape))


@register_stage
@dataclass
class RowAverage(Stage):
    """Divide the rows of the direction by the root of an average of their mean squares, at the same Frobenius norm::

        V ← βV + (1−β)·mean of U² over each row          β = row_beta, first V = 0, no bias correction
        u ← Û·‖U‖_F/‖Û‖_F,  Û = U/(√V + 1e-8)            for each matrix of a tensor

    U is the direction without the norm's aspect factor. Rows are those of the norm's ``matrix_view``, with all of a
    row's blocks apart.

    Source: Li et al., "NorMuon", arXiv:2510.05491.
    """

    place = "direction"
    state = ("row_avg_sq",)

    row_beta: float = setting(
        0.0,
        number(low=0, high=1, open_high=True),
        "β of the average of the direction's squares by rows, of NorMuon; 0 keeps none",
    )
    direction: Direction = field(default=cast(Any, None), init=False)  # which the recipe sets
    view: str = field(default="flatten", init=False)

    @classmethod
    def of(cls, group: Mapping[str, Any]) -> Self:
        stage = super().of(group)
        stage.view = group.get("norm_matrix_view") or "flatten"
        return stage

    def runs(self) -> bool:
        return self.row_beta != 0

    def check(self) -> None:
        if self.runs() and not (isinstance(self.direction.map, MatrixNorm) and self.direction.scale == "unit"):
            raise ValueError(
                f"row_beta = {self.row_beta} divides the rows of unit steps under a norm of matrices, such as "
                f'"spectral", but the norm is {self.direction.map!r} with scale="{self.direction.scale}": set it to 0'
            )

    def slots(self) -> tuple[Slot, ...]:
        return (Slot("row_avg_sq", "compute", shape=functools.partial(row_shape, self.view)),) if self.runs() else ()

    def measure(self, batch: Batch) -> Tensor | None:
        """Return the sums of squares of all rows of the whole tensors, 0 for those of other ranks; padded to [n, R]."""
        sums = []
        for x, p, layout in zip(batch.u, batch.params, batch.layouts or [None] * len(batch.u), strict=True):
            others = [i for i in range(x.dim()) if i not in row_dims(self.view, x.dim())]
            own = x.square().sum(others, keepdim=True) if others else x.square()
            whole = own.new_zeros(row_shape(self.view, p.shape))
            rows_of_shard(whole, layout).add_(own)
            sums.append(whole.reshape(-1))
        return torch.nn.utils.rnn.pad_sequence(sums, batch_first=True)

    def combine(self, partials: Tensor) -> Tensor:
        return partials.sum(-2)

    def apply(self, batch: Batch, scalars: Tensor | None) -> None:
        assert scalars is not None
        (slot,) = self.slots()
        norm = cast(MatrixNorm, self.direction.map)
        averages = batch.read(slot)
        stored, u = [], []
        layouts = batch.layouts or [None] * len(batch.u)
        for x, p, sums, v, layout in zip(batch.u, batch.params, scalars, averages, layouts, strict=True):
            shape = row_shape(self.view, p.shape)
            rows = sums[: math.prod(shape)].reshape(shape).to(x)
            mean = rows * (math.prod(shape) / max(p.numel(), 1) / norm.row_factors(p.shape, x) ** 2)
            v = torch.lerp(torch.zeros_like(mean) if v is None else v, mean, 1 - self.row_beta)
            stored.append(v)
            scale = 1 / (v.sqrt() + EPS)
            stack = p.shape[:-2].numel() if self.view.startswith("batch") else 1
            matrices = (stack, math.prod(shape) // max(stack, 1), 1)
            factors = []
            for s, old in zip(*(split_rows(y.reshape(matrices), norm.blocks) for y in (scale, rows)), strict=True):
                new = (old * s**2).sum(1, keepdim=True)
                ratio = torch.where(new > 0, old.sum(1, keepdim=True) / new, new).sqrt()  # a NaN stays one
                factors.append(s * ratio)
            u.append(x * rows_of_shard(from_matrices(factors, scale, "flatten"), layout))
        batch.store(slot, stored)
        batch.u, batch.pair = u, None

    def structure(self) -> object:
        return self.runs(), self.view

    def describe(self) -> str:
        return f"rows by their average, β = {self.row_beta:g}"

    def lower(self) -> str:
        return "averages of rows have no kernel"
