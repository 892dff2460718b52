"""Which matrix a tensor is: every matrix norm reads a tensor as a stack of matrices, and writes it back."""

from __future__ import annotations

import math
from abc import abstractmethod

import torch
from torch import Tensor

from normopt._checks import check_choice, check_number
from normopt.norms.base import Norm, Scale, stack

MATRIX_VIEWS = ("flatten", "batch", "transposed")


def to_matrices(x: Tensor, view: str, blocks: int) -> Tensor:
    """A tensor as a stack of matrices, shape [stack, rows, columns].

    ::

        "flatten"      out × everything else: linear layers and convolutions
        "batch"        leading dims are a stack of matrices: experts
        "transposed"   dims 0 and 1 change places first: embeddings (vocabulary × features), transposed convolutions

    A vector is one column. ``blocks`` cuts the rows into that many equal matrices (fused q, k, v; heads).
    """
    if x.dim() <= 1:
        x = x.reshape(1, -1, 1)
    elif view == "batch":
        x = x.reshape(-1, *x.shape[-2:])
    else:
        x = (x.transpose(0, 1) if view == "transposed" else x).flatten(1)[None]
    stack, rows, columns = x.shape
    return x.reshape(stack * blocks, rows // blocks, columns)


def from_matrices(y: Tensor, like: Tensor, view: str) -> Tensor:
    """The inverse of ``to_matrices``: a stack of matrices in the shape of the tensor that it came from."""
    if view == "transposed" and like.dim() >= 2:
        return y.reshape(like.transpose(0, 1).shape).transpose(0, 1)
    return y.reshape(like.shape)


def check_matrix(shape: torch.Size, view: str, blocks: int) -> None:
    """Raise a ValueError where a tensor of this shape cannot be cut into ``blocks``."""
    rows = math.prod(shape) if len(shape) <= 1 else shape[{"flatten": 0, "batch": -2, "transposed": 1}[view]]
    if rows % blocks:
        raise ValueError(
            f"blocks = {blocks} does not divide the {rows} rows of a tensor of shape {tuple(shape)} under "
            f'matrix_view="{view}": give the tensors it does divide a param group of their own'
        )


class MatrixNorm(Norm):
    """What all norms of matrices share. Subclasses are dataclasses with the fields below, and define ``pairs``.

    A tensor that is several matrices (a stack, or blocks), and a group under ``scope="group"``, is
    measured by the largest of them: the dual norm is their sum, the dual map theirs, one by one.
    """

    matrix_view: str
    blocks: int

    @abstractmethod
    def pairs(self, c: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """(‖c‖⋆, D(c)) of each tensor, both from one pass."""

    def check_view(self) -> None:
        """Check the fields that all matrix norms have; for ``__post_init__``."""
        check_choice("matrix_view", self.matrix_view, MATRIX_VIEWS)
        check_integer("blocks", self.blocks, math.inf)

    def check(self, scale: Scale, params: list[Tensor]) -> None:
        """Refuse complex matrices, and rows that ``blocks`` does not divide."""
        for x in params:
            if x.is_complex():
                raise ValueError(f"{type(self).__name__} takes real matrices, but a parameter is {x.dtype}")
            check_matrix(x.shape, self.matrix_view, self.blocks)

    def measure(self, c: list[Tensor]) -> Tensor:
        return stack([n for n, _ in self.pairs(c)])[:, None]

    def combine(self, partials: Tensor) -> Tensor:
        return partials.sum(-2)

    def apply(self, c: list[Tensor], scalars: Tensor, kappa: float | Tensor) -> list[Tensor]:
        return [d * n.to(d) ** kappa for (_, d), n in zip(self.pairs(c), scalars[:, 0], strict=True)]

    def scaled(self, c: list[Tensor], kappa: float | Tensor, whole_group: bool) -> list[Tensor]:
        """``‖c‖⋆^kappa · D(c)``; measure and apply would each take the matrices apart anew."""
        pairs = self.pairs(c)
        if kappa == 0:
            return [d for _, d in pairs]
        norms = stack([n for n, _ in pairs])
        totals = norms.sum().expand(len(c)) if whole_group else norms
        return [d * n.to(d) ** kappa for (_, d), n in zip(pairs, totals, strict=True)]


def check_integer(name: str, value: object, high: float) -> None:
    """Raise unless ``value`` is an integer from 1 to ``high``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, but is {value!r}")
    check_number(name, value, low=1, high=high)
