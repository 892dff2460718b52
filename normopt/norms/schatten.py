"""The Schatten norms, ℓp of the singular values: spectral (Muon), Frobenius (SGD), nuclear, and those between."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from normopt._checks import check_choice, check_integer, check_number
from normopt.norms.base import Scale, indices_by, without_autocast
from normopt.norms.lanczos import top_pair
from normopt.norms.lp import nonzero, norm_and_shift, norm_last_dim, shift, top_and_root_last_dim
from normopt.norms.matrices import MatrixNorm, from_matrices, mul_pow2, normalize_exponent, to_matrices, total
from normopt.norms.polar import iteration_dtype, polar
from normopt.norms.registry import register

# What each iterative method computes, and the p whose dual map that is; "svd" works for every p.
COMPUTES = {"newton-schulz": ("UVᵀ", math.inf), "polar-express": ("UVᵀ", math.inf), "lanczos": ("u₁v₁ᵀ", 1.0)}


@register("nuclear", p=1.0)
@register("frobenius", p=2.0)
@register("spectral", p=math.inf)
@register("schatten")
@dataclass(frozen=True, repr=False)
class Schatten(MatrixNorm):
    """The Schatten-p norm: ℓp of the singular values. Names: schatten, nuclear, frobenius, spectral.

    With G = UΣVᵀ, 1/p + 1/q = 1, and f the aspect factor of the matrix::

        ‖G‖⋆  = f · ‖σ‖_q
        D(G)  = f · U diag((σ/‖σ‖_q)^(q−1)) Vᵀ       p = ∞: f·UVᵀ     p = 2: f·G/‖G‖_F
        p = 1:  f · u₁v₁ᵀ, the top singular pair
        power = f · U diag(σ^(1/(p−1))) Vᵀ

    An ``exponent`` takes the place of q − 1 = 1/(p−1) everywhere, and so of p. A negative one, as in Freon, is the map
    of no norm. As long as q > 0, D(G) still does not depend on the length of G, and ⟨G, D(G)⟩ = ‖G‖⋆. For q ≤ 0 both
    are NaN, and only "power" is left.

    Singular values up to ε·max(rows, columns)·σ₁ count as zero. The norm of several matrices (a stack, blocks,
    or a group under ``scope="group"``) is the largest of their norms. Their dual norm is therefore the sum,
    and their dual map acts on each matrix separately.

    Args:
        p: the order, 1 ≤ p ≤ ∞.
        method: Default "svd", which is exact. For p = ∞, two methods use only matrix products. "newton-schulz" is
            Keller Jordan's polynomial: 5 steps map σ ≥ 1.5e-3·‖G‖_F into [0.68, 1.21] and multiply smaller σ
            by 485/‖G‖_F at most, so that large square Gaussian matrices keep some near 0. "polar-express" has an
            error that falls with the steps: 8 reach roundoff of ``dtype`` unless σ is below 1e-3·‖G‖_F. For p = 1,
            "lanczos" uses two matrix–vector products a step: on 256 × 256 Gaussian matrices the dual norm is within
            0.3 % after 24 steps, and from min(rows, columns) steps on it is as exact as "svd".
        steps: the number of iterations. Default 5, meant for p = ∞; use about 24 for "lanczos".
        dtype: the dtype of the iteration for p = ∞, "bfloat16", "float32", or "auto": float32 on a CPU without
            instructions for bfloat16, else bfloat16. Default "float32".
        aspect: the factor f: "none" (the default), "rms" (the RMS → RMS operator norm), "original" (Keller Jordan's),
            "match_rms_adamw" (Moonlight's), or another; see [`MatrixNorm`][normopt.norms.MatrixNorm].
        exponent: the exponent of the singular values, in place of 1/(p−1); above −1, except under scale="power". None
            (the default) means 1/(p−1).
        matrix_view: how a tensor is read as matrices: "flatten" (the default), "batch", "transposed",
            "batch-transposed" or "patches"; see [`MatrixNorm`][normopt.norms.MatrixNorm].
        blocks: the number of matrices the rows are split into, or a tuple of their row counts. Default 1.

    Raises:
        ValueError: a setting out of range, or an iterative method with a p it does not support or with an exponent.
        TypeError: a setting of the wrong type.

    Source: the dual map as in "Old Optimizer, New Norm", arXiv:2409.20325; HTMuon (arXiv:2603.10067) uses
    exponent 0.125, Freon (arXiv:2605.11181) negative ones.
    """

    # The derivative of an SVD diverges at equal singular values; that of an iteration is not the dual map's.
    differentiable: ClassVar[bool] = False
    batches: ClassVar[bool] = True

    p: float
    method: str = "svd"
    steps: int = 5
    dtype: str = "float32"
    aspect: str = "none"
    exponent: float | None = None
    matrix_view: str = "flatten"
    blocks: int | tuple[int, ...] = 1

    def __post_init__(self) -> None:
        check_number("p", self.p, low=1)
        object.__setattr__(self, "p", float(self.p))
        check_choice("method", self.method, ("svd", *COMPUTES))
        check_choice("dtype", self.dtype, ("auto", "bfloat16", "float32"))
        check_integer("steps", self.steps, high=100)
        self.check_view()
        if self.exponent is not None:
            check_number("exponent", self.exponent, open_low=True, open_high=True)
        what, p = COMPUTES.get(self.method, ("", self.p))
        if self.p != p or (what and self.exponent is not None):
            at = "∞" if p == math.inf else f"{p:g}"
            raise ValueError(
                f'method="{self.method}" computes {what}, the dual map at p = {at} without an exponent, but '
                f'p = {self.p:g} and exponent = {self.exponent}: use method="svd"'
            )

    @property
    def unread(self) -> tuple[str, ...]:
        """The fields that the method ignores."""
        return {"svd": ("steps", "dtype"), "lanczos": ("dtype",)}.get(self.method, ())

    @property
    def power_exponent(self) -> float | None:
        """The exponent q − 1 of the singular values; None at p = 1, where it diverges."""
        if self.exponent is not None:
            return self.exponent
        return None if self.p == 1 else 1 / (self.p - 1)

    def check(self, scale: Scale, params: list[Tensor]) -> None:
        e = self.exponent
        if e is not None and e <= -1 and scale != "power":
            raise ValueError(
                f"exponent = {e:g} means q = 1 + exponent = {1 + e:g} ≤ 0, for which there is no ‖σ‖_q to divide by: "
                'use an exponent above −1, or scale="power"'
            )
        super().check(scale, params)

    def norm(self, x: Tensor) -> Tensor:
        """Return the largest ‖X‖_Sp / f over the matrices of x, 0-d.

        Args:
            x: a real floating-point tensor of any shape.

        Raises:
            TypeError: x is complex or integer.
            NotImplementedError: the exponent is negative, which is the map of no norm.
        """
        p, e = self.p, self.exponent
        if e is not None:
            if e < 0:
                raise NotImplementedError(f"exponent = {e:g} is negative: that is the map of no norm")
            p = 1 + 1 / e if e else math.inf
        return self._largest_norm(x, lambda y: norm_last_dim(torch.linalg.svdvals(y), p))

    def power(self, c: list[Tensor], eps: float = 0.0) -> list[Tensor]:
        """Return ``f · U diag(σ^exponent) Vᵀ``; singular values that count as zero stay zero.

        Args:
            c: n real floating-point tensors of any shapes, with 32 bits or more.
            eps: ignored, because this power map has no form with ε > 0. Default 0.

        Returns:
            n new tensors with the shapes and dtypes of c.

        Raises:
            ValueError: p = 1 without an exponent.
        """
        exponent = self.power_exponent
        if exponent is None:
            raise ValueError('scale="power" is not defined at p = 1, where the exponent 1/(p−1) diverges: use p > 1')
        if exponent == 1:
            return [self.row_factors(x.shape, x) * x for x in c]
        if exponent == 0 and self.exponent is None:
            return [d for _, d in self.pairs(c)]
        return [d for _, d in self._map(c, lambda y, _: (None, powers(y, exponent)))]

    def pairs(self, c: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        linear = self.power_exponent == 1
        # A vector is its own singular vector: no iteration or SVD is needed.
        return self._map(c, lambda y, vectors: normalize(y) if vectors or linear else self._dual(y))

    def _dual(self, y: Tensor) -> tuple[Tensor | None, Tensor]:
        """Return the dual norms (None means: use ⟨c, map⟩) and the map, in any dtype."""
        if self.method == "lanczos":
            return top_pair(y, self.steps)
        if self.method != "svd":
            return None, polar(y, self.method, self.steps, iteration_dtype(self.dtype, y.device))
        u, s, vt, power = singular(y)
        exponent = self.power_exponent
        if exponent is None:
            top = (s[:, :1] > 0).to(s)[:, :, None]
            return mul_pow2(s, power)[:, 0], u[:, :, :1] * top * vt[:, :1]
        norms = norm_last_dim(s, 1 + exponent)[:, None] if exponent > -1 else s.new_full((len(s), 1), math.nan)
        r = torch.where(s == 0, 0, (s / nonzero(norms)).pow(exponent))
        return mul_pow2(norms, power)[:, 0], (u * r[:, None]) @ vt

    def _map(
        self, c: list[Tensor], function: Callable[[Tensor, bool], tuple[Tensor | None, Tensor]]
    ) -> list[tuple[Tensor, Tensor]]:
        """Apply a function of a stack of matrices to tensors, batching matrices of equal shape into one call.

        Its second argument says whether the tensors are vectors. If it returns None for norms, ``⟨c, map⟩`` is used.
        """
        views = [to_matrices(x, self.matrix_view, self.blocks) for x in c]
        # Every stack of every tensor: there are several of one only if its blocks are unequal.
        stacks = [
            (x, y, f) for x, ys in zip(c, views, strict=True) for y, f in zip(ys, self.factors(x.shape), strict=True)
        ]
        found: dict[int, tuple[Tensor | None, Tensor]] = {}
        keys = ((x.numel() == 0, x.dim() <= 1, y.shape[1:], y.dtype, y.device) for x, y, _ in stacks)
        for (empty, vectors, *_), members in indices_by(keys).items():
            if empty:
                found |= {i: (None, torch.zeros_like(stacks[i][1])) for i in members}
                continue
            y = torch.cat([stacks[i][1] for i in members])
            n, d = without_autocast([y.device.type], function, y, vectors)
            counts = [len(stacks[i][1]) for i in members]
            sums = None if n is None else torch.split(n, counts)
            for j, (i, part) in enumerate(zip(members, torch.split(d, counts), strict=True)):
                x, _, f = stacks[i]
                # Cast one by one: a small one is then still in cache when it is scaled.
                u = part * f if part.dtype == x.dtype else part.to(x.dtype).mul_(f)
                found[i] = None if sums is None else f * sums[j].sum(), u
        pairs, rest = [], iter(found[i] for i in range(len(stacks)))
        for x, ys in zip(c, views, strict=True):
            parts = [next(rest) for _ in ys]
            u = from_matrices([d for _, d in parts], x, self.matrix_view)
            norms = [n for n, _ in parts if n is not None]
            pairs.append((total(norms) if norms else torch.dot(x.reshape(-1), u.reshape(-1)), u))
        return pairs


def normalize(y: Tensor) -> tuple[Tensor, Tensor]:
    """Return (‖y‖₂, y/‖y‖₂) of each matrix; 0 stays 0."""
    norms, safe, s = (x[:, None, None] for x in norm_and_shift(*top_and_root_last_dim(y.flatten(1), 2.0)))
    return norms[:, 0, 0], y / safe.clamp_min(torch.finfo(y.dtype).tiny) * s


def singular(y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return U, σ·2^−e, Vᵀ and e (shape [stack, 1]) of each matrix, all NaN if it is not finite.

    σ below the rounding error are set to 0.
    """
    x, power, finite = normalize_exponent(y)
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    s = torch.where(s > torch.finfo(s.dtype).eps * max(y.shape[-2:]) * s[:, :1], s, 0)
    s = torch.where(finite[:, 0], s, math.nan)
    return torch.where(finite, u, math.nan), s, torch.where(finite, vt, math.nan), power[:, 0]


def powers(y: Tensor, exponent: float) -> Tensor:
    """Return ``U diag(σ^exponent) Vᵀ`` of each matrix, 0 where σ is 0."""
    u, s, vt, power = singular(y)
    t = shift(mul_pow2(s, power)[:, :1])  # σ₁ may over- or underflow although its power does not
    s = mul_pow2(s, power + torch.frexp(t).exponent - 1)
    return (u * torch.where(s == 0, 0, s.pow(exponent))[:, None]) @ vt * t.pow(-exponent)[:, None]
