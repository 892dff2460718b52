"""The ℓp norms, p from 1 to ∞: SGD at p = 2, signSGD at p = ∞, and everything between and below."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from normopt._checks import check_number, equals
from normopt.norms.base import Needs, Norm, Scale, fast_scalar, stack, to_compute_dtype
from normopt.norms.registry import register


@register("l1", p=1.0)
@register("l2", p=2.0)
@register("linf", p=math.inf)
@register("lp")
@dataclass(frozen=True, repr=False)
class Lp(Norm):
    """The ℓp norm ``‖x‖_p = (Σ|x|^p)^(1/p)`` of a tensor taken as one vector. Names: lp, l1, l2, linf.

    With 1/p + 1/q = 1::

        ‖g‖⋆  = ‖g‖_q
        D(g)  = sign(g) · (|g| / ‖g‖_q)^(q−1)          p = 2: g/‖g‖₂     p = ∞: sign(g)
        p = 1:  sign(g_i) at i = the first index of the largest |g|, 0 elsewhere
        power = sign(g) · |g|^(1/(p−1))                p = 2: g          p = ∞: sign(g)
              = g · (|g| + ε)^(−ρ) for ε > 0,          ρ = 1 − 1/(p−1)

    All three use the exponent q − 1 = 1/(p−1). Sums are taken relative to the largest entry, so the map stays
    correct where the norm itself over- or underflows; entries below 1e-38·‖g‖_q (in float32) count as 0.
    NaN inputs give NaN outputs (torch.sign alone would return 0).

    Args:
        p: the norm's order, 1 ≤ p ≤ ∞. With a one-element tensor (1 < p ≤ ∞, never read on the host), a compiled
            or captured step stays valid while p changes. p = 2 and ∞ are then as exact as with a float, except
            under "matched", which matches SGD to roundoff. The tensor's dtype only rounds p itself.

    Raises:
        ValueError: p < 1 (not a norm: the triangle inequality fails) or NaN; a tensor with more than one element
            or an integer dtype.
        TypeError: p is not a number.

    Source: the framework is arXiv:2409.20325; "power" with a scheduled p, arXiv:2606.02078.

    Example:
        >>> n = normopt.norms.Lp(3.0)
        >>> g = torch.tensor([3.0, -4.0, 0.0])
        >>> n.dual_norm(g)                      # the ℓ1.5 norm
        tensor(5.5842)
        >>> n.dual_map(g)
        tensor([ 0.7330, -0.8463,  0.0000])
    """

    power_takes_eps: ClassVar[bool] = True

    p: float | Tensor

    def __post_init__(self) -> None:
        check_number("p", self.p, low=1, tensor=True)
        order = self.p.reshape(()) if isinstance(self.p, Tensor) else float(self.p)
        object.__setattr__(self, "p", order)

    def __repr__(self) -> str:
        return "Lp(p=a tensor)" if isinstance(self.p, Tensor) else super().__repr__()

    @property
    def q(self) -> float | Tensor:
        """The order of the dual norm, 1/p + 1/q = 1; 0-d if p is a tensor."""
        exponent = self.power_exponent
        return math.inf if exponent is None else 1 + exponent

    @property
    def power_exponent(self) -> float | Tensor | None:
        """κ = 1/(p−1), which makes ‖c‖⋆^κ·D(c) elementwise; 0-d if p is a tensor, None at p = 1, where it is ∞."""
        p = self.p
        if isinstance(p, Tensor):  # float64, as for a Python number; MPS has no float64
            p = p.to(torch.float32 if p.device.type == "mps" else torch.float64)
        return None if equals(p, 1) else 1 / (p - 1)

    def on(self, device: torch.device) -> Lp:
        """Return this norm with a tensor p moved to a device.

        Args:
            device: the target device.
        """
        return Lp(self.p.to(device)) if isinstance(self.p, Tensor) and self.p.device != device else self

    def needs(self, scale: Scale) -> Needs:
        elementwise = scale == "power" or (scale == "unit" and equals(self.p, math.inf)) or self.is_identity(scale)
        return "none" if elementwise else "tensor"

    def is_identity(self, scale: Scale) -> bool:
        return equals(self.p, 2) and scale != "unit"

    def norm(self, x: Tensor) -> Tensor:
        """Return ‖x‖_p, 0-d (float32 for 16-bit input).

        Args:
            x: a real floating-point tensor of any shape.

        Raises:
            TypeError: x is complex or integer.
        """
        return norm_from_partials(relative_sums([to_compute_dtype(x)], self.p)[:, None], self.p)[0]

    def measure(self, c: list[Tensor]) -> Tensor:
        """Return each tensor's partials, shape [n, 2]: its largest |entry| M and Σ(|x|/M)^q.

        At p = 1 they are M and the tensor's index in the list.

        Args:
            c: n real floating-point tensors of any shapes, with 32 bits or more.
        """
        return relative_sums(c, self.q)

    def combine(self, partials: Tensor) -> Tensor:
        """Return the dual norm n = ‖c‖_q, n·s and s, shape [..., 3]; the `shift` s keeps n·s a normal number.

        At p = 1 the shape is [..., 2]: the largest |entry| and the index of its tensor.

        Args:
            partials: results of ``measure``, shape [..., k, 2].
        """
        if equals(self.p, 1):
            winner = partials[..., 0].argmax(-1, keepdim=True)  # the first on ties
            return partials.gather(-2, winner[..., None].expand(*winner.shape, 2))[..., 0, :]
        return torch.stack(norm_and_shift(*top_and_root(partials, self.q)), -1)

    def numbered(self, partials: Tensor, by: list[int]) -> Tensor:
        """Return the partials or scalars; at p = 1 with offsets added to their indices.

        Args:
            partials: results of ``measure`` or ``combine``, shape [n, 2].
            by: the offset of each row, n integers.
        """
        if not equals(self.p, 1):
            return partials
        return torch.stack([torch.stack([x[0], x[1] + n]) for x, n in zip(partials, by, strict=True)])

    def apply(self, c: list[Tensor], scalars: Tensor, kappa: float | Tensor) -> list[Tensor]:
        if equals(kappa, 1) and equals(self.p, 2):
            return [x.clone() for x in c]
        exponent = self.power_exponent
        if exponent is None:  # p = 1
            d = [one_hot(x, s[1] == i) for i, (x, s) in enumerate(zip(c, scalars, strict=True))]
            return d if equals(kappa, 0) else mul_norm_power(d, scalars[:, 0], torch.ones_like(scalars[:, 0]), kappa)
        _, norms, shifts = scalars.unbind(-1)
        d = c if equals(self.p, math.inf) else self._exact_at(math.inf, c, safe_divide(c, norms, shifts))
        d = d if equals(self.p, 2) else signed_power(d, exponent)
        return d if equals(kappa, 0) else self._exact_at(2, c, mul_norm_power(d, norms, shifts, kappa))

    def _exact_at(self, end: float, c: list[Tensor], u: list[Tensor]) -> list[Tensor]:
        """Return u; for a tensor p equal to ``end`` return c, as a float p would."""
        if not isinstance(self.p, Tensor):
            return u
        at_end = self.p == end
        return [torch.where(at_end, x, y) for x, y in zip(c, u, strict=True)]

    def power(self, c: list[Tensor], eps: float = 0.0) -> list[Tensor]:
        """Return ``sign(c)·|c|^(1/(p−1))``, or ``c·(|c| + ε)^(−ρ)`` for ε > 0: elementwise, without a reduction.

        Args:
            c: n real floating-point tensors of any shapes, with 32 bits or more.
            eps: ε ≥ 0. Default 0, which is exact at p = 2 and ∞.

        Returns:
            n new tensors with the shapes and dtypes of c.

        Raises:
            ValueError: p = 1, where the exponent diverges.
        """
        exponent = self.power_exponent
        if exponent is None:
            raise ValueError('scale="power" is not defined at p = 1, where the exponent 1/(p−1) diverges: use p > 1')
        if eps == 0:
            return signed_power(c, exponent)
        rho = 1 - exponent  # not (p−2)/(p−1), which is NaN at p = ∞
        return [x * (x.abs() + eps).pow(match_dtype(-rho, x)) for x in c]

    def power_(self, c: list[Tensor], eps: float = 0.0) -> list[Tensor]:
        return signs(c, overwrite=True) if eps == 0 and equals(self.p, math.inf) else self.power(c, eps)


def match_dtype(value: float | Tensor, x: Tensor) -> float | Tensor:
    """Cast a tensor to the dtype of x, so that two 0-d tensors do not promote to the wider; pass a number through."""
    return value.to(x.dtype) if isinstance(value, Tensor) else value


def signed_power(c: list[Tensor], exponent: float | Tensor) -> list[Tensor]:
    """Return ``sign(c)·|c|^exponent`` elementwise, as new tensors; exponent ≥ 0, where 0 gives the sign."""
    if equals(exponent, 0):
        return signs(c)
    if equals(exponent, 1):
        return [x.clone() for x in c]
    magnitude = torch._foreach_abs(c)
    if equals(exponent, 2):  # p = 1.5
        return list(torch._foreach_mul(c, magnitude))
    if isinstance(exponent, Tensor):
        ends = zip(signed_power(c, 0), c, magnitude, strict=True)
        general = [(sign, x, a.pow_(match_dtype(exponent, x)).copysign_(x)) for sign, x, a in ends]
        return [torch.where(exponent == 0, s, torch.where(exponent == 1, x, u)) for s, x, u in general]
    # p = 3 is a square root, ten times as fast as a general power.
    if torch.is_grad_enabled():
        power = torch._foreach_sqrt(magnitude) if exponent == 0.5 else torch._foreach_pow(magnitude, exponent)
        return [a.copysign(x) for a, x in zip(power, c, strict=True)]
    if exponent == 0.5:
        torch._foreach_sqrt_(magnitude)
    else:
        torch._foreach_pow_(magnitude, exponent)
    return [a.copysign_(x) for a, x in zip(magnitude, c, strict=True)]


def signs(c: list[Tensor], overwrite: bool = False) -> list[Tensor]:
    """Return the signs; a NaN stays one, of which torch.sign would make 0.

    Args:
        c: n tensors.
        overwrite: whether the result may be c itself.
    """
    dtypes = {x.dtype for x in c}
    if torch.is_grad_enabled() or len(dtypes) > 1 or torch.float16 in dtypes:
        finite = torch._foreach_clamp_max(torch._foreach_abs(c), 1)
        return list(torch._foreach_lerp(torch._foreach_sign(c), finite, 0.0))
    large = fast_scalar(2.0**800 if torch.float64 in dtypes else 2.0**100, c)
    if overwrite:
        torch._foreach_mul_(c, large)
    u = c if overwrite else list(torch._foreach_mul(c, large))
    torch._foreach_mul_(u, large)  # at least 1, even of denormals
    torch._foreach_clamp_min_(u, -1)
    torch._foreach_clamp_max_(u, 1)
    return u


def relative_sums(c: list[Tensor], q: float | Tensor) -> Tensor:
    """Return [n, 2]: each tensor's largest |entry| M and Σ(|x|/M)^q, or at q = ∞ M and its index in c."""
    flat = (x.reshape(-1) if x.numel() else x.new_zeros(1) for x in c)
    return stack([torch.stack(relative_sum(x, q, i)) for i, x in enumerate(flat)])


def relative_sum(x: Tensor, q: float | Tensor, at_inf: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return the largest |entry| M and Σ(|x|/M)^q along the last dim, or at q = ∞ M and ``at_inf``.

    |x|/M ≤ 1, so no power overflows, and one term is 1, so the sum never vanishes. M is clamped away from 0
    and ∞ to avoid NaN from 0/0 and ∞/∞. For q ≤ 4 it is clamped to the smallest normal number: a subnormal is
    at least 2^−23 of that, so its power stays normal. A larger q needs the true M.
    """
    a = x.abs()
    if equals(q, math.inf):
        top = a.amax(-1)
        return top, torch.full_like(top, at_inf)
    limits = torch.finfo(a.dtype)
    small = not isinstance(q, Tensor) and q <= 4
    top = a.amax(-1).clamp(limits.tiny if small else 0, limits.max)
    safe = (top if small else nonzero(top))[..., None]
    # amax has kept a, if autograd records it.
    relative = a / safe if torch.is_grad_enabled() else a.div_(safe)
    return top, relative.pow_(match_dtype(q, a)).sum(-1)


def nonzero(x: Tensor) -> Tensor:
    """Replace 0 by 1, so that 0/0 becomes 0."""
    return x + (x == 0)


def top_and_root(partials: Tensor, q: float | Tensor) -> tuple[Tensor, Tensor]:
    """Return M and (Σ(|x|/M)^q)^(1/q), with product ‖x‖_q, from the `relative_sums` of x's k pieces, [..., k, 2]."""
    tops, sums = partials.unbind(-1)
    top = tops.amax(-1)
    if equals(q, math.inf):
        return top, torch.ones_like(top)
    if sums.shape[-1] == 1:
        total = sums[..., 0]
    else:
        total = (sums * (tops / nonzero(top)[..., None]).pow(match_dtype(q, sums))).sum(-1)
    return top, total.pow(match_dtype(1 / q, total))


def top_and_root_last_dim(x: Tensor, q: float) -> tuple[Tensor, Tensor]:
    """Return M and (Σ(|x|/M)^q)^(1/q) of each line along the last dim."""
    top, total = relative_sum(x, q)
    return top, total if q == math.inf else total.pow(1 / q)


def norm_from_partials(partials: Tensor, q: float | Tensor) -> Tensor:
    """Return ‖·‖_q from the `relative_sums` of a vector's k pieces: shape [..., k, 2] to [...]."""
    top, root = top_and_root(partials, q)
    return top * root


def norm_last_dim(x: Tensor, q: float) -> Tensor:
    """Return ‖·‖_q along the last dim."""
    top, root = top_and_root_last_dim(x, q)
    return top * root


def shift(norms: Tensor) -> Tensor:
    """Return a power of two s for each norm n: 1 if n is normal in float32, otherwise such that n·s is."""
    limits = torch.finfo(torch.float32)
    ones = torch.ones_like(norms)
    return ones.masked_fill_(norms < limits.tiny, 2.0**64).masked_fill_(norms > limits.max, 2.0**-64)


def norm_and_shift(top: Tensor, root: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the norm n = top·root, n·s and its `shift` s."""
    norms = top * root
    s = shift(norms)
    return norms, top * s * root, s


def safe_divide(c: list[Tensor], norms: Tensor, shifts: Tensor | None = None) -> list[Tensor]:
    """Divide each tensor by its norm n, given n·s and s (1 if None); norm 0 gives 0, since D(0) = 0."""
    safe = norms.clamp_min(max(torch.finfo(x.dtype).tiny for x in c))  # nonzero in every dtype of c
    u = torch._foreach_div(c, unbind_like(safe, c))
    if shifts is not None:
        torch._foreach_mul_(u, unbind_like(shifts, c))
    return list(u)


def mul_norm_power(d: list[Tensor], norms: Tensor, shifts: Tensor, kappa: float | Tensor) -> list[Tensor]:
    """Multiply each tensor by n^kappa, given n·s and s."""
    u = torch._foreach_mul(d, unbind_like(norms**kappa, d))
    torch._foreach_div_(u, unbind_like(shifts**kappa, d))
    return list(u)


def unbind_like(values: Tensor, xs: list[Tensor]) -> list[Tensor]:
    """Unbind a vector into 0-d tensors, each with the device and dtype of its counterpart in xs."""
    return [v.to(x) for v, x in zip(values.unbind(), xs, strict=True)]


def one_hot(x: Tensor, active: Tensor) -> Tensor:
    """Return sign(x) at the first index of the largest |x|, 0 elsewhere; all 0 unless ``active``, a 0-d bool."""
    if x.numel() == 0:
        return x.clone()
    flat = x.reshape(-1)
    first = flat.abs().argmax(keepdim=True)
    sign = signed_power([flat[first]], 0)[0]
    return torch.zeros_like(flat).scatter(0, first, sign * active.to(flat.device)).reshape(x.shape)
