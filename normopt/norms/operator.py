"""Mixed norms of a matrix: an inner ℓp of each row or column, and an outer ℓp over the results."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from normopt._checks import check_choice, check_number
from normopt.norms.base import Needs, Scale
from normopt.norms.lp import norm_and_shift, norm_last_dim, shift, signed_power, top_and_root_last_dim
from normopt.norms.matrices import MatrixNorm, from_matrices, to_matrices, total
from normopt.norms.registry import register


@register("row", p_inner=2.0, p_outer=math.inf, lines="rows")
@register("column", p_inner=2.0, p_outer=math.inf, lines="columns")
@register("max-row", p_inner=1.0, p_outer=math.inf, lines="rows")
@register("max", p_inner=math.inf, p_outer=math.inf, lines="rows")
@register("mixed")
@dataclass(frozen=True, repr=False)
class Mixed(MatrixNorm):
    """The mixed norm over a matrix's rows or columns. Names: mixed, row, column, max-row, max.

    With x_i the rows or columns, q the conjugate orders and f the aspect factor::

        ‖X‖   = ‖ (‖x_1‖_inner, ‖x_2‖_inner, …) ‖_outer / f
        r_i   = ‖g_i‖_q(inner),   ‖G‖⋆ = f · ‖r‖_q(outer)
        D(G)  = f · (r_i/‖r‖_q(outer))^(q(outer)−1) · D_inner(g_i), for each i

    The named members are operator norms::

        "row"       2 inside, ∞ outside, rows      ℓ2 → ℓ∞; D makes every row a unit vector
        "column"    2 inside, ∞ outside, columns   ℓ1 → ℓ2; D makes every column a unit vector
        "max-row"   1 inside, ∞ outside, rows      ℓ∞ → ℓ∞, the largest absolute row sum; D has one entry per row
        "max"       ∞ inside, ∞ outside            ℓ1 → ℓ∞, the largest entry; D is the sign

    "max" is "linf" as a matrix norm, so it has an aspect. The norm of several matrices is their largest.

    Args:
        p_inner: the order within a row or column, 1 ≤ p ≤ ∞.
        p_outer: the order across rows or columns, 1 ≤ p ≤ ∞; at 1 only the first of the largest moves.
        lines: "rows" or "columns". Default "rows", a linear layer's output units.
        aspect: the factor f; see [`MatrixNorm`][normopt.norms.MatrixNorm]. Default "none".
        matrix_view: how a tensor is read as matrices: "flatten" (the default), "batch", "transposed",
            "batch-transposed" or "patches"; see [`MatrixNorm`][normopt.norms.MatrixNorm].
        blocks: the number of matrices the rows are split into, or a tuple of their row counts. Default 1.

    Raises:
        ValueError: an order below 1 or NaN, or another invalid setting.
        TypeError: an order is not a number, or blocks has other than integers.

    Source: arXiv:2409.20325 for the framework; the directions of SCALE and RowNorm are members.
    """

    p_inner: float
    p_outer: float
    lines: str = "rows"
    aspect: str = "none"
    matrix_view: str = "flatten"
    blocks: int | tuple[int, ...] = 1

    def __post_init__(self) -> None:
        for name in ("p_inner", "p_outer"):
            check_number(name, getattr(self, name), low=1)
            object.__setattr__(self, name, float(getattr(self, name)))
        check_choice("lines", self.lines, ("rows", "columns"))
        self.check_view()

    def needs(self, scale: Scale) -> Needs:
        return "rows" if self.lines == "rows" and self.p_outer == math.inf and scale == "unit" else "matrix"

    def norm(self, x: Tensor) -> Tensor:
        """Return the largest ‖X‖ over the matrices of x, 0-d.

        Args:
            x: a real floating-point tensor of any shape.

        Raises:
            TypeError: x is complex or integer.
        """
        return self._largest_norm(x, lambda y: norm_last_dim(norm_last_dim(self._lines(y), self.p_inner), self.p_outer))

    def pairs(self, c: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        return [self._pair(x) for x in c]

    def _lines(self, y: Tensor) -> Tensor:
        """Transpose a stack of matrices if the lines are columns; this is its own inverse."""
        return y.mT if self.lines == "columns" else y

    def _pair(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return (‖x‖⋆, D(x)) of one tensor."""
        if x.numel() == 0:
            return x.new_zeros(()), torch.zeros_like(x)
        stacks = zip(to_matrices(x, self.matrix_view, self.blocks), self.factors(x.shape), strict=True)
        pairs = [self._pair_of_stack(self._lines(y), f) for y, f in stacks]
        return total([n for n, _ in pairs]), from_matrices([self._lines(d) for _, d in pairs], x, self.matrix_view)

    def _pair_of_stack(self, y: Tensor, f: float) -> tuple[Tensor, Tensor]:
        """Return the sum of the dual norms and the maps of a stack of matrices, whose lines are the rows."""
        top, root = top_and_root_last_dim(y, conjugate(self.p_inner))
        r, s = top * root, None
        if self.p_outer < math.inf:  # at ∞ only the signs of r matter, and a shift could underflow small entries
            s = shift(r.amax(-1, keepdim=True))
            r = top * s * root
        outer = top_and_root_last_dim(r, conjugate(self.p_outer))
        d = dual_map(y, top, root, self.p_inner) * dual_map(r, *outer, self.p_outer)[..., None]
        totals = outer[0] * outer[1]
        totals = totals if s is None else totals / s[..., 0]
        return f * totals.sum(), f * d


def conjugate(p: float) -> float:
    """Return q with 1/p + 1/q = 1."""
    return math.inf if p == 1 else 1 + 1 / (p - 1)


def dual_map(x: Tensor, top: Tensor, root: Tensor, p: float) -> Tensor:
    """Return ℓp's dual map along the last dim, given the dual norms top·root."""
    if p == 1:
        first = x.abs().argmax(-1, keepdim=True)  # the first on ties
        return torch.zeros_like(x).scatter(-1, first, signed_power([x.gather(-1, first)], 0)[0])
    if p == math.inf:
        return signed_power([x], 0)[0]
    _, norms, s = norm_and_shift(top, root)
    safe = norms.clamp_min(torch.finfo(x.dtype).tiny)
    return signed_power([x / safe[..., None] * s[..., None]], 1 / (p - 1))[0]
