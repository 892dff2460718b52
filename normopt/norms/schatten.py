"""The Schatten norms: ℓp on singular values. Spectral (Muon), Frobenius (SGD), nuclear, and between."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from normopt._checks import check_choice, check_number
from normopt.norms.base import Needs, Scale, to_compute_dtype, without_autocast
from normopt.norms.lanczos import top_pair
from normopt.norms.lp import nonzero, norm_and_shift, norm_last_dim, shift, top_and_root_last_dim
from normopt.norms.matrices import MatrixNorm, check_integer, from_matrices, mul_pow2, normalize_exponent, to_matrices
from normopt.norms.polar import polar
from normopt.norms.registry import register

# What a method finds, and at which p that is the dual map; "svd" does for all.
FINDS = {"newton-schulz": ("UVᵀ", math.inf), "polar-express": ("UVᵀ", math.inf), "lanczos": ("u₁v₁ᵀ", 1.0)}


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
        power = f · U diag(σ^(1/(p−1))) Vᵀ           or diag(σ^exponent), where one is given

    Singular values up to ε·max(rows, columns)·σ₁ count as zero. A tensor that is several matrices
    (a stack, or blocks) is measured by the largest of them, so its dual norm is their sum and its dual
    map theirs, one by one; so is a group under ``scope="group"``.

    Args:
        p: the order, 1 ≤ p ≤ ∞.
        method: Default "svd", which is exact. "newton-schulz" (Keller Jordan's polynomial: 5 steps bring σ from
            1.5e-3·‖G‖_F up to between 0.68 and 1.21, and multiply smaller ones by 485/‖G‖_F at most, so that large
            square Gaussian matrices keep some near 0) and "polar-express" (the error falls with the steps: at 8 it is
            at roundoff of ``dtype`` unless σ is below 1e-3·‖G‖_F) are matrix products only, for p = ∞. "lanczos", for
            p = 1, is products with vectors only, two a step: on Gaussian matrices of 256 × 256 the dual norm
            is within 0.3 % at 24, and from min(rows, columns) steps on it is as exact as "svd".
        steps: of the iteration. Default 5, which is for p = ∞; give "lanczos" 24 or so.
        dtype: of the iteration for p = ∞, "bfloat16" or "float32". Default "float32".
        aspect: the factor f: "none" (the default), "rms" (the RMS → RMS operator norm), "original" (Keller Jordan's),
            "match_rms_adamw" (Moonlight's), or another; see [`MatrixNorm`][normopt.norms.MatrixNorm].
        exponent: of the power scale, instead of 1/(p−1), which None (the default) leaves. Below 0 it is no norm's any
            more: Freon's range.
        matrix_view: "flatten", "batch" or "transposed": which matrix a tensor of more than two dims is. Default
            "flatten".
        blocks: into how many matrices the rows are cut. Default 1.

    Raises:
        ValueError: a setting out of range, an iterative method with another p than its own, or with an exponent.
        TypeError: a setting of the wrong type.

    Source: the dual map as in "Old Optimizer, New Norm", arXiv:2409.20325; HTMuon (arXiv:2603.10067) is
    an exponent of 0.125, Freon (arXiv:2605.11181) goes below 0.
    """

    # The derivative of a decomposition blows up where singular values meet, and an iteration's is its own.
    differentiable: ClassVar[bool] = False
    batches: ClassVar[bool] = True

    p: float
    method: str = "svd"
    steps: int = 5
    dtype: str = "float32"
    aspect: str = "none"
    exponent: float | None = None
    matrix_view: str = "flatten"
    blocks: int = 1

    def __post_init__(self) -> None:
        check_number("p", self.p, low=1)
        object.__setattr__(self, "p", float(self.p))
        check_choice("method", self.method, ("svd", *FINDS))
        check_choice("dtype", self.dtype, ("bfloat16", "float32"))
        check_integer("steps", self.steps, 100)
        self.check_view()
        if self.exponent is not None:
            check_number("exponent", self.exponent, open_low=True, open_high=True)
        what, p = FINDS.get(self.method, ("", self.p))
        if self.p != p or (what and self.exponent is not None):
            at = "∞" if p == math.inf else f"{p:g}"
            raise ValueError(
                f'method="{self.method}" finds {what}, which is p = {at} without an exponent: use method="svd"'
            )

    @property
    def unread(self) -> tuple[str, ...]:
        """The fields that the method does not read."""
        return {"svd": ("steps", "dtype"), "lanczos": ("dtype",)}.get(self.method, ())

    @property
    def power_exponent(self) -> float | None:
        """The power of the singular values under the power scale; None at p = 1, where it diverges."""
        if self.exponent is not None:
            return self.exponent
        return None if self.p == 1 else 1 / (self.p - 1)

    def needs(self, scale: Scale) -> Needs:
        return "matrix"

    def check(self, scale: Scale, params: list[Tensor]) -> None:
        if self.exponent is not None and scale != "power":
            raise ValueError(f'exponent = {self.exponent} is of scale="power", but the scale is "{scale}"')
        super().check(scale, params)

    def norm(self, x: Tensor) -> Tensor:
        """The largest ‖X‖_Sp / f of the matrices of x, 0-d.

        Args:
            x: a tensor of any shape, of real floats.

        Raises:
            TypeError: x is complex, or of integers.
        """
        y = to_matrices(to_compute_dtype(x), self.matrix_view, self.blocks)
        if y.numel() == 0:
            return x.new_zeros(())
        norms = norm_last_dim(torch.linalg.svdvals(y), self.p)
        return norms.amax() / self.factor(x.shape)

    def power(self, c: list[Tensor], eps: float = 0.0) -> list[Tensor]:
        """``f · U diag(σ^exponent) Vᵀ``; singular values that count as zero stay zero.

        Args:
            c: n tensors of any shapes, of real floats of 32 bits or more.
            eps: not read: the power of singular values has no form with ε > 0. Default 0.

        Returns:
            n new tensors, shaped and typed like those of c.

        Raises:
            ValueError: p = 1 without an exponent.
        """
        exponent = self.power_exponent
        if exponent is None:
            raise ValueError('scale="power" is not defined at p = 1, where its exponent 1/(p−1) diverges: use p > 1')
        if exponent == 1:
            return [self.factor(x.shape) * x for x in c]
        if exponent == 0 and self.exponent is None:
            return [d for _, d in self.pairs(c)]
        return [d for _, d in self._map(c, lambda y, _: (None, powers(y, exponent)))]

    def pairs(self, c: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        # A vector is its own singular vector: nothing to iterate, nothing to decompose.
        return self._map(c, lambda y, vectors: normalize(y) if vectors or self.p == 2 else self._dual(y))

    def _dual(self, y: Tensor) -> tuple[Tensor | None, Tensor]:
        """The dual norms, None where they are the inner products with the map, and the map, in any dtype."""
        p = self.p
        if self.method == "lanczos":
            return top_pair(y, self.steps)
        if self.method != "svd":
            return None, polar(y, self.method, self.steps, getattr(torch, self.dtype))
        u, s, vt, power = singular(y)
        if p == 1:
            top = (s[:, :1] > 0).to(s)[:, :, None]
            return mul_pow2(s, power)[:, 0], u[:, :, :1] * top * vt[:, :1]
        q = 1 if p == math.inf else p / (p - 1)
        norms = norm_last_dim(s, q)[:, None]
        r = (s > 0).to(s) if p == math.inf else (s / nonzero(norms)).pow(q - 1)
        return mul_pow2(norms, power)[:, 0], (u * r[:, None]) @ vt

    def _map(
        self, c: list[Tensor], function: Callable[[Tensor, bool], tuple[Tensor | None, Tensor]]
    ) -> list[tuple[Tensor, Tensor]]:
        """A function of stacks of matrices over tensors: matrices of one shape, of all tensors, in one call.

        It is told whether the tensors are vectors. Where it gives no norms they are ``⟨c, map⟩``.
        """
        views = [to_matrices(x, self.matrix_view, self.blocks) for x in c]
        found: list[tuple[Tensor, Tensor]] = [(x.new_zeros(()), x) for x in c]
        batches: dict[tuple[bool, object], list[int]] = {}
        for i, (x, y) in enumerate(zip(c, views, strict=True)):
            if y.numel():
                batches.setdefault((x.dim() <= 1, (y.shape[1:], y.dtype, y.device)), []).append(i)
            else:
                found[i] = found[i][0], torch.zeros_like(x)
        for (vectors, _), members in batches.items():
            y = torch.cat([views[i] for i in members])
            n, d = without_autocast([y.device.type], function, y, vectors)
            counts = [len(views[i]) for i in members]
            sums = None if n is None else torch.split(n, counts)
            for j, (i, part) in enumerate(zip(members, torch.split(d, counts), strict=True)):
                x, f = c[i], self.factor(c[i].shape)
                u = from_matrices(part, x, self.matrix_view)
                # Cast tensor by tensor: what is small is still in the cache when it is scaled.
                u = u * f if u.dtype == x.dtype else u.to(x.dtype).mul_(f)
                found[i] = torch.dot(x.reshape(-1), u.reshape(-1)) if sums is None else f * sums[j].sum(), u
        return found


def normalize(y: Tensor) -> tuple[Tensor, Tensor]:
    """(‖y‖₂, y/‖y‖₂) of each matrix; 0 stays 0."""
    norms, safe, s = (x[:, None, None] for x in norm_and_shift(*top_and_root_last_dim(y.flatten(1), 2.0)))
    return norms[:, 0, 0], y / safe.clamp_min(torch.finfo(y.dtype).tiny) * s


def singular(y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """U, σ·2^−e, Vᵀ, e of each matrix, σ that are rounding set to 0; all NaN where the matrix is not finite.

    e has the shape [stack, 1].
    """
    x, power, fine = normalize_exponent(y)
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    s = torch.where(s > torch.finfo(s.dtype).eps * max(y.shape[-2:]) * s[:, :1], s, 0)
    s = torch.where(fine[:, 0], s, math.nan)
    return torch.where(fine, u, math.nan), s, torch.where(fine, vt, math.nan), power[:, 0]


def powers(y: Tensor, exponent: float) -> Tensor:
    """``U diag(σ^exponent) Vᵀ`` of each matrix, 0 where σ is 0."""
    u, s, vt, power = singular(y)
    t = shift(mul_pow2(s, power)[:, :1])  # σ₁ may over- or underflow where its power does not
    s = mul_pow2(s, power + torch.frexp(t).exponent - 1)
    return (u * torch.where(s == 0, 0, s.pow(exponent))[:, None]) @ vt * t.pow(-exponent)[:, None]
