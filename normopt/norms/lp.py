"""The ℓp norms, p from 1 to ∞: SGD at p = 2, signSGD at p = ∞, and everything between and below."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from normopt._checks import check_number, equals
from normopt.norms.base import Needs, Norm, Scale, stack, to_compute_dtype
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

    q − 1 = 1/(p−1) is the one exponent of all three. Every sum is taken relative to the largest entry, and
    the map is right where the norm itself over- or underflows; entries below 1e-38·‖g‖_q (in float32)
    count as 0 in it. NaN in gives NaN out (torch.sign alone would turn it into 0).

    Args:
        p: the norm's order, 1 ≤ p ≤ ∞. A one-element tensor (1 < p ≤ ∞, never read on the host) keeps a
            compiled or captured step valid while p changes; p = 2 and ∞ are as exact as with a float, but
            for "matched", which is SGD to roundoff then. Its dtype only rounds p itself.

    Raises:
        ValueError: p < 1 (no norm: the triangle inequality fails) or NaN; a tensor of more than one element, or of
            integers.
        TypeError: p is not a number.

    Source: the frame is arXiv:2409.20325; "power" with a p that is scheduled, arXiv:2606.02078.

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
        """The order of the dual norm, 1/p + 1/q = 1; 0-d where p is a tensor."""
        return 1 + self._exponent

    @property
    def _exponent(self) -> float | Tensor:
        p = self.p
        if isinstance(p, Tensor):  # in float64, as a number's; MPS has none
            p = p.to(torch.float32 if p.device.type == "mps" else torch.float64)
        return math.inf if equals(p, 1) else 1 / (p - 1)

    @property
    def power_exponent(self) -> float | Tensor | None:
        """κ = 1/(p−1), which makes ‖c‖⋆^κ·D(c) elementwise: 0-d where p is a tensor, None at p = 1, where it is ∞."""
        return None if equals(self.p, 1) else self._exponent

    def on(self, device: torch.device) -> Lp:
        """The same norm with a tensor p on a device.

        Args:
            device: where p is needed.
        """
        return Lp(self.p.to(device)) if isinstance(self.p, Tensor) and self.p.device != device else self

    def needs(self, scale: Scale) -> Needs:
        elementwise = scale == "power" or (scale == "unit" and equals(self.p, math.inf)) or self.is_identity(scale)
        return "none" if elementwise else "tensor"

    def is_identity(self, scale: Scale) -> bool:
        return equals(self.p, 2) and scale != "unit"

    def norm(self, x: Tensor) -> Tensor:
        """‖x‖_p, 0-d (float32 for 16-bit input).

        Args:
            x: one tensor of any shape, of real floats.

        Raises:
            TypeError: x is complex, or of integers.
        """
        return norm_from_partials(relative_sums([to_compute_dtype(x)], self.p)[:, None], self.p)[0]

    def measure(self, c: list[Tensor]) -> Tensor:
        """What each tensor adds, shape [n, 2]: the largest entry M and Σ(|x|/M)^q.

        At p = 1 they are M and the tensor's place in the list.

        Args:
            c: n tensors of any shapes, of real floats of 32 bits or more.
        """
        return relative_sums(c, self.q)

    def combine(self, partials: Tensor) -> Tensor:
        """The dual norm n = ‖c‖_q, n·s and s, shape [..., 3]; s is the `shift` that keeps n·s a normal number.

        At p = 1 the shape is [..., 2]: the largest entry, and the place of the tensor that has it.

        Args:
            partials: what ``measure`` gave, shape [..., k, 2].
        """
        if equals(self.p, 1):
            winner = partials[..., 0].argmax(-1, keepdim=True)  # the first of equals
            return partials.gather(-2, winner[..., None].expand(*winner.shape, 2))[..., 0, :]
        return torch.stack(norm_and_shift(*top_and_root(partials, self.q)), -1)

    def numbered(self, partials: Tensor, by: list[int]) -> Tensor:
        """At p = 1 the places are raised.

        Args:
            partials: what ``measure`` or ``combine`` gave, shape [n, 2].
            by: by how much, for each of the n.
        """
        if not equals(self.p, 1):
            return partials
        return torch.stack([torch.stack([x[0], x[1] + n]) for x, n in zip(partials, by, strict=True)])

    def apply(self, c: list[Tensor], scalars: Tensor, kappa: float | Tensor) -> list[Tensor]:
        if equals(kappa, 1) and equals(self.p, 2):
            return [x.clone() for x in c]
        if equals(self.p, 1):
            d = [one_hot(x, s[1] == i) for i, (x, s) in enumerate(zip(c, scalars, strict=True))]
            return d if equals(kappa, 0) else mul_norm_power(d, scalars[:, 0], torch.ones_like(scalars[:, 0]), kappa)
        _, norms, shifts = scalars.unbind(-1)
        d = c if equals(self.p, math.inf) else self._exact_at(math.inf, c, safe_divide(c, norms, shifts))
        d = d if equals(self.p, 2) else signed_power(d, self._exponent)
        return d if equals(kappa, 0) else self._exact_at(2, c, mul_norm_power(d, norms, shifts, kappa))

    def _exact_at(self, end: float, c: list[Tensor], u: list[Tensor]) -> list[Tensor]:
        """u, but for a tensor p that is at an end: c, as on the path that a float p takes there."""
        if not isinstance(self.p, Tensor):
            return u
        here = self.p == end
        return [torch.where(here, x, y) for x, y in zip(c, u, strict=True)]

    def power(self, c: list[Tensor], eps: float = 0.0) -> list[Tensor]:
        """``sign(c)·|c|^(1/(p−1))``, or ``c·(|c| + ε)^(−ρ)`` for ε > 0: elementwise, nothing measured.

        Args:
            c: n tensors of any shapes, of real floats of 32 bits or more.
            eps: ε ≥ 0. Default 0, which is exact at p = 2 and ∞.

        Returns:
            n new tensors, shaped and typed like those of c.

        Raises:
            ValueError: p = 1, where the exponent diverges.
        """
        if equals(self.p, 1):
            raise ValueError('scale="power" is not defined at p = 1, where its exponent 1/(p−1) diverges: use p > 1')
        if eps == 0:
            return signed_power(c, self._exponent)
        rho = 1 - self._exponent  # never (p−2)/(p−1), which is NaN at p = ∞
        return [x * (x.abs() + eps).pow(match_dtype(-rho, x)) for x in c]


def match_dtype(value: float | Tensor, x: Tensor) -> float | Tensor:
    """A number as it is, a tensor in the dtype of x: 0-d tensors of two dtypes would make one of the wider."""
    return value.to(x.dtype) if isinstance(value, Tensor) else value


def signed_power(c: list[Tensor], exponent: float | Tensor) -> list[Tensor]:
    """``sign(c)·|c|^exponent``, elementwise, as new tensors; exponent ≥ 0, and 0 means the sign."""
    if equals(exponent, 0):
        return [torch.where(x.isnan(), x, x.sign()) for x in c]
    if equals(exponent, 1):
        return [x.clone() for x in c]
    magnitude = torch._foreach_abs(c)
    if equals(exponent, 2):  # p = 1.5
        return list(torch._foreach_mul(c, magnitude))
    if isinstance(exponent, Tensor):
        ends = zip(signed_power(c, 0), c, magnitude, strict=True)
        general = [(sign, x, a.pow(match_dtype(exponent, x)).copysign(x)) for sign, x, a in ends]
        return [torch.where(exponent == 0, s, torch.where(exponent == 1, x, u)) for s, x, u in general]
    # p = 3 is a square root, which costs a tenth of a general power.
    power = torch._foreach_sqrt(magnitude) if exponent == 0.5 else torch._foreach_pow(magnitude, exponent)
    return [a.copysign(x) for a, x in zip(power, c, strict=True)]


def relative_sums(c: list[Tensor], q: float | Tensor) -> Tensor:
    """[n, 2]: for each tensor its largest |entry| M and Σ(|x|/M)^q, or at q = ∞ M and its place in c."""
    rows = []
    for i, x in enumerate(c):
        flat = x.reshape(-1) if x.numel() else x.new_zeros(1)
        if equals(q, math.inf):
            top = flat.abs().amax()
            rows.append(torch.stack([top, torch.full_like(top, i)]))
        else:
            rows.append(torch.stack(relative_sum(flat, q)))
    return stack(rows)


def relative_sum(x: Tensor, q: float | Tensor) -> tuple[Tensor, Tensor]:
    """The largest |entry| M and Σ(|x|/M)^q, both along the last dim: what every finite ℓq here is made of.

    |x|/M ≤ 1, so that no power of it overflows, and one term is 1, so that the sum never vanishes. M is
    kept off 0 and ∞, under which 0/0 and ∞/∞ would make NaN of them. Relative to the smallest normal number
    a subnormal is 2^−23 or more, of which a small power is no subnormal; a large one needs the true M.
    """
    a = x.abs()
    limits = torch.finfo(a.dtype)
    small = not isinstance(q, Tensor) and q <= 4
    top = a.amax(-1).clamp(limits.tiny if small else 0, limits.max)
    return top, (a / (top if small else nonzero(top))[..., None]).pow(match_dtype(q, a)).sum(-1)


def nonzero(x: Tensor) -> Tensor:
    """x with 1 instead of 0, so that 0/0 is 0."""
    return x + (x == 0)


def top_and_root(partials: Tensor, q: float | Tensor) -> tuple[Tensor, Tensor]:
    """M and (Σ(|x|/M)^q)^(1/q), whose product is ‖x‖_q, from the relative sums of the k pieces of x, [..., k, 2]."""
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
    """The same of each line of the last dim."""
    if q == math.inf:
        top = x.abs().amax(-1)
        return top, torch.ones_like(top)
    top, total = relative_sum(x, q)
    return top, total.pow(1 / q)


def norm_from_partials(partials: Tensor, q: float | Tensor) -> Tensor:
    """‖·‖_q from the relative sums of the k pieces of a vector: shape [..., k, 2] to [...]."""
    top, root = top_and_root(partials, q)
    return top * root


def norm_last_dim(x: Tensor, q: float) -> Tensor:
    """‖·‖_q along the last dim."""
    top, root = top_and_root_last_dim(x, q)
    return top * root


def shift(norms: Tensor) -> Tensor:
    """For each norm n a power of two s, 1 where n is a normal number of float32: else n·s, computed from c·s, is."""
    limits = torch.finfo(torch.float32)
    ones = torch.ones_like(norms)
    return ones.masked_fill_(norms < limits.tiny, 2.0**64).masked_fill_(norms > limits.max, 2.0**-64)


def norm_and_shift(top: Tensor, root: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The norm n = top·root, n·s and its `shift` s."""
    norms = top * root
    s = shift(norms)
    return norms, top * s * root, s


def safe_divide(c: list[Tensor], norms: Tensor, shifts: Tensor | None = None) -> list[Tensor]:
    """Each tensor by its norm n, given n·s and s (1 if None); a tensor of norm 0 stays 0, as D(0) = 0 asks."""
    safe = norms.clamp_min(max(torch.finfo(x.dtype).tiny for x in c))  # 0 in no dtype
    u = torch._foreach_div(c, unbind_like(safe, c))
    if shifts is not None:
        torch._foreach_mul_(u, unbind_like(shifts, c))
    return list(u)


def mul_norm_power(d: list[Tensor], norms: Tensor, shifts: Tensor, kappa: float | Tensor) -> list[Tensor]:
    """Each tensor by n^kappa, given n·s and s."""
    u = torch._foreach_mul(d, unbind_like(norms**kappa, d))
    torch._foreach_div_(u, unbind_like(shifts**kappa, d))
    return list(u)


def unbind_like(numbers: Tensor, xs: list[Tensor]) -> list[Tensor]:
    """A vector of n numbers as a list of 0-d ones, each where and of what dtype its tensor is."""
    return [n.to(x) for n, x in zip(numbers.unbind(), xs, strict=True)]


def one_hot(x: Tensor, here: Tensor) -> Tensor:
    """sign(x) at the first index of the largest |x| if ``here`` (a 0-d bool on any device), 0 elsewhere."""
    if x.numel() == 0:
        return x.clone()
    flat = x.reshape(-1)
    first = flat.abs().argmax(keepdim=True)
    sign = signed_power([flat[first]], 0)[0]
    return torch.zeros_like(flat).scatter(0, first, sign * here.to(flat.device)).reshape(x.shape)
