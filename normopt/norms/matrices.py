"""Matrix views: conversion of a tensor to a stack of matrices and back, and the base class of matrix norms."""

from __future__ import annotations

import dataclasses
import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Self, cast

import torch
from torch import Tensor

from normopt._checks import check_choice, check_integer
from normopt.norms.base import Needs, Norm, Scale, stack, to_compute_dtype
from normopt.norms.lp import mul_norm_power, shift

MATRIX_VIEWS = ("flatten", "batch", "transposed")

# The factor f by shape; a convolution has k taps (kernel positions) per input channel, other layers one.
ASPECTS: dict[str, Callable[[int, int, int], float]] = {
    "none": lambda rows, columns, taps: 1.0,
    "rms": lambda rows, columns, taps: math.sqrt(rows / (columns * taps)),
    "rows": lambda rows, columns, taps: math.sqrt(rows),
    "columns": lambda rows, columns, taps: math.sqrt(columns),
    "entries": lambda rows, columns, taps: math.sqrt(rows * columns),
    "fan-in": lambda rows, columns, taps: 1 / columns,
    "original": lambda rows, columns, taps: math.sqrt(max(1.0, rows / columns)),
    "match_rms_adamw": lambda rows, columns, taps: 0.2 * math.sqrt(max(rows, columns)),
}


def to_matrices(x: Tensor, view: str, blocks: int) -> Tensor:
    """Reshape a tensor to a stack of matrices, shape [stack, rows, columns].

    ::

        "flatten"      dim 0 × the rest: linear layers and convolutions
        "batch"        leading dims are a stack of matrices: experts
        "transposed"   dims 0 and 1 are swapped first: embeddings (vocabulary × features), transposed convolutions

    A vector is one column. ``blocks`` splits the rows into that many equal matrices (fused q, k, v; heads).
    """
    if x.dim() <= 1:
        x = x.reshape(1, -1, 1)
    elif view == "batch":
        x = x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:])  # not −1, which is ambiguous for an empty shard
    else:
        x = (x.transpose(0, 1) if view == "transposed" else x).flatten(1)[None]
    stack, rows, columns = x.shape
    return x.reshape(stack * blocks, rows // blocks, columns)


def from_matrices(y: Tensor, like: Tensor, view: str) -> Tensor:
    """Reshape a stack of matrices to the shape of ``like``: the inverse of ``to_matrices``."""
    if view == "transposed" and like.dim() >= 2:
        return y.reshape(like.transpose(0, 1).shape).transpose(0, 1)
    return y.reshape(like.shape)


def normalize_exponent(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return (y·2^−e, e, isfinite) for each matrix of a stack, the last two of shape [stack, 1, 1].

    The scaling is exact and brings the largest entry into [½, 1), so that no square over- or underflows. A
    matrix that is not finite becomes 0.
    """
    top = max_abs(y)
    finite = top.isfinite()
    power = torch.frexp(torch.where(finite, top, 0)).exponent
    return torch.where(finite, mul_pow2(y, -power), 0), power, finite


def max_abs(y: Tensor) -> Tensor:
    """Return the largest |entry| of each matrix, shape [stack, 1, 1], NaN if one is NaN, without allocating |y|."""
    return torch.maximum(y.amax((-2, -1), keepdim=True), -y.amin((-2, -1), keepdim=True))


def mul_pow2(x: Tensor, power: Tensor) -> Tensor:
    """Return x·2^power exactly, in two steps because 2^power alone may over- or underflow.

    Five times as fast as torch.ldexp on all entries.
    """
    one, half = torch.ones_like(power, dtype=x.dtype), power // 2
    return (x * torch.ldexp(one, half)).mul_(torch.ldexp(one, power - half))


def matrix_dims(shape: torch.Size, view: str, blocks: int) -> tuple[int, int, int]:
    """Return (rows, columns, taps) of the matrices that `to_matrices` makes of a tensor of this shape."""
    if len(shape) <= 1:
        return math.prod(shape) // blocks, 1, 1
    if view == "batch":
        return shape[-2] // blocks, shape[-1], 1
    out, into = (shape[1], shape[0]) if view == "transposed" else (shape[0], shape[1])
    taps = math.prod(shape[2:])
    return out // blocks, into * taps, taps


class MatrixNorm(Norm):
    """The base class of matrix norms. Subclasses are dataclasses with the fields below, and define ``pairs``.

    The norm of several matrices (a stack, blocks, or a group under ``scope="group"``) is the largest of their
    norms. Their dual norm is therefore the sum, and their dual map acts on each matrix separately.

    ``aspect`` divides the norm by a factor f of the matrix's shape, which makes steps comparable across widths.
    Dual norm and dual map are f times as large::

        "none"              f = 1
        "rms"               √(rows/columns): with "spectral", the RMS → RMS operator norm. √(out/in)/k for a
                            convolution of k taps (9 for 3 × 3), whose columns are in·k
        "rows"              √rows: with "column", the ℓ1 → RMS operator norm, for one-hot inputs
        "columns"           √columns: with "row", every row gets RMS 1, as in SCALE
        "entries"           √(rows·columns): with "frobenius", the RMS of all entries, for biases
        "fan-in"            1/columns: with "max", Scion's sign/d_in for output layers
        "original"          √max(1, rows/columns), Keller Jordan's
        "match_rms_adamw"   0.2·√max(rows, columns), Moonlight's (arXiv:2502.16982)

    Attributes:
        aspect: the factor f, one of the above.
        matrix_view: how a tensor of more than two dims is read as matrices: "flatten" (dim 0 × the rest), "batch"
            (the last two dims, stacked over the others) or "transposed" (dims 0 and 1 are swapped first).
        blocks: the number of equal matrices the rows are split into, such as a fused projection's q, k and v.

    Source: the framework is arXiv:2409.20325; Scion's factors are from arXiv:2502.07529.
    """

    aspect: str
    matrix_view: str
    blocks: int

    def needs(self, scale: Scale) -> Needs:
        return "matrix"

    def _largest_norm(self, x: Tensor, norms: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the largest norm over the matrices of x, 0-d, given the norms of a stack without the factor f."""
        y = to_matrices(to_compute_dtype(x), self.matrix_view, self.blocks)
        return norms(y).amax() / self.factor(x.shape) if y.numel() else x.new_zeros(())

    @abstractmethod
    def pairs(self, c: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Return (‖c‖⋆, D(c)) of each tensor from one pass: a 0-d tensor, and one with the tensor's shape and dtype.

        Args:
            c: n real floating-point tensors of any shapes, with 32 bits or more.
        """

    def check_view(self) -> None:
        """Check the fields common to all matrix norms; call it in ``__post_init__``.

        Raises:
            ValueError: an unknown aspect or matrix_view, or blocks < 1.
            TypeError: blocks is not an integer.
        """
        check_choice("aspect", self.aspect, ASPECTS)
        check_choice("matrix_view", self.matrix_view, MATRIX_VIEWS)
        check_integer("blocks", self.blocks)

    def factor(self, shape: torch.Size) -> float:
        """Return f for the matrices of a tensor; 1 if they are empty.

        Args:
            shape: the tensor's shape.
        """
        rows, columns, taps = matrix_dims(shape, self.matrix_view, self.blocks)
        return ASPECTS[self.aspect](rows, columns, taps) if rows * columns else 1.0

    def bare(self) -> Self:
        """Return this norm without aspect factor and blocks, so that it does not depend on the number of rows."""
        return dataclasses.replace(cast(Any, self), aspect="none", blocks=1)  # type: ignore[no-any-return]

    def rows_are_whole(self, dims: int, cut: int) -> bool:
        """Return whether shards of a tensor consist of whole matrix rows.

        Args:
            dims: the tensor's number of dims.
            cut: the dim that is sharded.
        """
        if dims <= 1:
            return True
        if self.matrix_view == "batch":
            return cut != dims - 1
        return cut == (1 if self.matrix_view == "transposed" else 0)

    def check(self, scale: Scale, params: list[Tensor]) -> None:
        """Raise on complex matrices and on row counts that ``blocks`` does not divide.

        Args:
            scale: "power", "dual", "unit" or "matched".
            params: the group's parameters, of any shapes.

        Raises:
            ValueError: a parameter is complex, or ``blocks`` does not divide its rows.
        """
        view, blocks = self.matrix_view, self.blocks
        for x in params:
            if x.is_complex():
                raise ValueError(f"{type(self).__name__} takes real matrices, but a parameter is {x.dtype}")
            rows, _, _ = matrix_dims(x.shape, view, blocks=1)
            if rows % blocks:
                raise ValueError(
                    f"blocks = {blocks} does not divide the {rows} rows of a tensor of shape {tuple(x.shape)} under "
                    f'matrix_view="{view}": put the tensors that it does divide into a param group of their own'
                )

    def measure(self, c: list[Tensor]) -> Tensor:
        return stack([n for n, _ in self.pairs(c)])[:, None]

    def combine(self, partials: Tensor) -> Tensor:
        return partials.sum(-2)

    def apply(self, c: list[Tensor], scalars: Tensor, kappa: float | Tensor) -> list[Tensor]:
        return [d * n.to(d) ** kappa for (_, d), n in zip(self.pairs(c), scalars[:, 0], strict=True)]

    def scaled(self, c: list[Tensor], kappa: float | Tensor, whole_group: bool) -> tuple[list[Tensor], Tensor]:
        """Return what `Norm.scaled` does, but decompose each matrix once instead of in both measure and apply.

        Args:
            c: n real floating-point tensors of any shapes, with 32 bits or more.
            kappa: 0, 1 or ``power_exponent``, a number or 0-d.
            whole_group: whether to use the dual norm of all of them, which is their sum.

        Returns:
            The maps, with the shapes and dtypes of c, and the dual norms, shape [n].
        """
        pairs = self.pairs(c)
        maps, norms = [d for _, d in pairs], stack([n for n, _ in pairs])
        totals = norms.sum().expand(len(c)) if whole_group else norms
        if kappa == 0:
            return maps, totals
        # If a norm over- or underflows, compute it as ⟨c·s, D(c)⟩ instead, unless that is NaN (c is not finite).
        shifts = shift(totals.nan_to_num(math.inf, math.inf))
        inner = [torch.dot((x * s.to(x)).reshape(-1), d.reshape(-1)) for x, d, s in zip(c, maps, shifts, strict=True)]
        products = stack(inner)
        norms = torch.where((shifts == 1) | products.isnan(), norms, products)
        norms = norms.sum().expand(len(c)) if whole_group else norms
        return mul_norm_power(maps, norms, shifts, kappa), norms / shifts
