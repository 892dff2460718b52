"""Matrix views: conversion of a tensor to a stack of matrices and back, and the base class of matrix norms."""

from __future__ import annotations

import dataclasses
import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Self, cast

import torch
from torch import Tensor

from normopt._checks import check_choice, check_integer, plain
from normopt.norms.base import Needs, Norm, Scale, stack, to_compute_dtype
from normopt.norms.lp import mul_norm_power, shift

MATRIX_VIEWS = ("flatten", "batch", "transposed", "batch-transposed", "patches")
# The dims of a tensor that these views swap first.
SWAPPED = {"transposed": (0, 1), "batch-transposed": (-2, -1)}

Blocks = int | tuple[int, ...]

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


def to_matrices(x: Tensor, view: str, blocks: Blocks) -> list[Tensor]:
    """Reshape a tensor to stacks of matrices, shape [stack, rows, columns]: one, or as many as there are row counts.

    ::

        "flatten"           dim 0 × the rest: linear layers and convolutions
        "batch"             leading dims are a stack of matrices: experts, out × in
        "transposed"        dims 0 and 1 are swapped first: embeddings (vocabulary × features), transposed convolutions
        "batch-transposed"  the last two dims are swapped first, then as "batch": experts, in × out
        "patches"           as "flatten", of a convolution whose taps are inputs, since its patches do not overlap

    A vector is one column. ``blocks`` splits the rows, see `split_rows`.
    """
    if x.dim() <= 1:
        return split_rows(x.reshape(1, -1, 1), blocks)
    x = x.transpose(*SWAPPED[view]) if view in SWAPPED else x
    stacked = view.startswith("batch")
    # Not −1, which is ambiguous for an empty shard.
    return split_rows(x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:]) if stacked else x.flatten(1)[None], blocks)


def split_rows(y: Tensor, blocks: Blocks) -> list[Tensor]:
    """Split the rows of a stack of matrices: into so many equal matrices of one stack, or into stacks of so many rows.

    Args:
        y: the stack, shape [stack, rows, columns].
        blocks: a number that divides the rows, or a tuple that adds up to them.
    """
    if isinstance(blocks, tuple):
        return list(torch.split(y, list(blocks), 1))
    if blocks == 1:
        return [y]
    stack, rows, columns = y.shape
    return [y.reshape(stack * blocks, rows // blocks, columns)]


def from_matrices(parts: list[Tensor], like: Tensor, view: str) -> Tensor:
    """Reshape stacks of matrices to the shape of ``like``: the inverse of ``to_matrices``."""
    y = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
    if view in SWAPPED and like.dim() >= 2:
        return y.reshape(like.transpose(*SWAPPED[view]).shape).transpose(*SWAPPED[view])
    return y.reshape(like.shape)


def total(norms: list[Tensor]) -> Tensor:
    """Return the sum of 0-d tensors, at least one: the dual norm of several stacks of matrices."""
    return norms[0] if len(norms) == 1 else torch.stack(norms).sum()


def row_dims(view: str, dims: int) -> list[int]:
    """Return the dims of a tensor that number the rows of its matrices, after those that number the matrices."""
    if dims <= 1:
        return [*range(dims)]
    if view.startswith("batch"):
        return [*range(dims - 2), dims - 1 if view in SWAPPED else dims - 2]
    return [1 if view in SWAPPED else 0]


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


def matrix_dims(shape: torch.Size, view: str) -> tuple[int, int, int]:
    """Return (rows, columns, taps) of the matrices that a tensor of this shape is read as, before blocks."""
    if len(shape) <= 1:
        return math.prod(shape), 1, 1
    out, into = shape[-2:] if view.startswith("batch") else shape[:2]
    out, into = (into, out) if view in SWAPPED else (out, into)
    taps = 1 if view.startswith("batch") else math.prod(shape[2:])
    return out, into * taps, 1 if view == "patches" else taps


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
        matrix_view: how a tensor is read as matrices: "flatten" (dim 0 × the rest), "batch" (the last two dims,
            stacked over the others), "transposed" or "batch-transposed" (the two dims are swapped first), or "patches"
            (as "flatten", but of one tap: the linear layer of in·k inputs that a convolution with stride = kernel is).
        blocks: the matrices the rows are split into, such as a fused projection's q, k and v: a number of equal ones,
            or a tuple of row counts, such as (64, 16, 16). Each has the factor f of its own shape.

    Source: the framework is arXiv:2409.20325; Scion's factors are from arXiv:2502.07529.
    """

    aspect: str
    matrix_view: str
    blocks: int | tuple[int, ...]

    def needs(self, scale: Scale) -> Needs:
        return "matrix"

    def _largest_norm(self, x: Tensor, norms: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the largest norm over the matrices of x, 0-d, given the norms of a stack without the factor f."""
        ys = to_matrices(to_compute_dtype(x), self.matrix_view, self.blocks)
        if x.numel() == 0:
            return x.new_zeros(())
        return torch.stack([norms(y).amax() / f for y, f in zip(ys, self.factors(x.shape), strict=True)]).amax()

    @abstractmethod
    def pairs(self, c: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Return (‖c‖⋆, D(c)) of each tensor from one pass: a 0-d tensor, and one with the tensor's shape and dtype.

        Args:
            c: n real floating-point tensors of any shapes, with 32 bits or more.
        """

    def check_view(self) -> None:
        """Check the fields common to all matrix norms; call it in ``__post_init__``.

        Raises:
            ValueError: an unknown aspect or matrix_view, or blocks that are none or of no rows.
            TypeError: blocks is neither an integer nor a tuple or list of integers.
        """
        check_choice("aspect", self.aspect, ASPECTS)
        check_choice("matrix_view", self.matrix_view, MATRIX_VIEWS)
        blocks: object = plain(self.blocks)
        if blocks == ():
            raise ValueError("blocks must be a number of equal blocks, or a tuple of their row counts, but is empty")
        if not isinstance(blocks, (int, tuple)):
            raise TypeError(f"blocks must be an integer or a tuple of integers, but is {blocks!r}")
        for rows in blocks if isinstance(blocks, tuple) else (blocks,):
            check_integer("blocks" if rows is blocks else f"each of blocks = {blocks}", rows)
        object.__setattr__(self, "blocks", blocks)

    def factors(self, shape: torch.Size) -> list[float]:
        """Return f for each stack of matrices of a tensor, of one shape each; 1 if they are empty.

        Args:
            shape: the tensor's shape.
        """
        rows, columns, taps = matrix_dims(shape, self.matrix_view)
        counts = self.blocks if isinstance(self.blocks, tuple) else (rows // self.blocks,)
        return [ASPECTS[self.aspect](n, columns, taps) if n * columns else 1.0 for n in counts]

    def row_factors(self, shape: torch.Size, like: Tensor) -> float | Tensor:
        """Return f as a factor of a tensor: a number, or one for each row if unequal blocks differ in it.

        Args:
            shape: the tensor's shape.
            like: has the dtype and device to return.
        """
        factors = self.factors(shape)
        if len(set(factors)) == 1 or not isinstance(self.blocks, tuple):
            return factors[0]
        rows = torch.cat([like.new_full((n,), f) for n, f in zip(self.blocks, factors, strict=True)])
        (*_, dim) = row_dims(self.matrix_view, len(shape))
        return rows.reshape([-1 if i == dim else 1 for i in range(len(shape))])

    def bare(self) -> Self:
        """Return this norm without aspect factor and blocks, so that it does not depend on the number of rows."""
        return dataclasses.replace(cast(Any, self), aspect="none", blocks=1)  # type: ignore[no-any-return]

    def rows_are_whole(self, dims: int, cut: int) -> bool:
        """Return whether shards of a tensor consist of whole matrix rows.

        Args:
            dims: the tensor's number of dims.
            cut: the dim that is sharded.
        """
        return dims <= 1 or cut in row_dims(self.matrix_view, dims)

    def check(self, scale: Scale, params: list[Tensor]) -> None:
        """Raise on complex matrices and on row counts that ``blocks`` does not divide or add up to.

        Args:
            scale: "power", "dual", "unit" or "matched".
            params: the group's parameters, of any shapes.

        Raises:
            ValueError: a parameter is complex, or ``blocks`` does not divide its rows or add up to them.
        """
        view, blocks = self.matrix_view, self.blocks
        for x in params:
            if x.is_complex():
                raise ValueError(f"{type(self).__name__} takes real matrices, but a parameter is {x.dtype}")
            rows, _, _ = matrix_dims(x.shape, view)
            if sum(blocks) != rows if isinstance(blocks, tuple) else rows % blocks:
                what = f"adds up to {sum(blocks)}, not to" if isinstance(blocks, tuple) else "does not divide"
                raise ValueError(
                    f"blocks = {blocks} {what} the {rows} rows of a tensor of shape {tuple(x.shape)} under "
                    f'matrix_view="{view}": put the tensors that it fits into a param group of their own'
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
