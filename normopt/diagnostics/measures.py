"""What a gradient and an update measure: sums of powers of many tensors as one vector, with no host sync."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from normopt._checks import equals
from normopt.norms.base import Norm, as_real, stack, to_compute_dtype
from normopt.norms.lp import Lp
from normopt.norms.matrices import MatrixNorm
from normopt.sharding.layout import resolved, whole

# Entries up to which tensors are measured together: small ones cost a call each otherwise, and a large one
# gains nothing but a copy of all.
TOGETHER = 1 << 20

Order = float | Tensor
Piece = tuple[list[int], Tensor]  # which of a group's tensors, and their entries as one vector


class Measure(NamedTuple):
    """What a group is measured in: a norm, and whether it is that of all its tensors as one vector."""

    norm: Norm
    whole: bool


def number(group: Mapping[str, Any], name: str) -> float | Tensor:
    """A param group's setting as a number or a 0-d tensor; NaN where it has none, or something else of that name."""
    value = group.get(name)
    if isinstance(value, Tensor):
        return value.detach().reshape(()) if value.numel() == 1 and not value.is_complex() else math.nan
    return float(value) if isinstance(value, numbers.Real) else math.nan


def entries(x: Tensor) -> Tensor:
    """The numbers of a tensor of any layout, dense and real, complex ones as pairs, conjugated if it is lazily so."""
    return as_real(resolved(x if x.layout == torch.strided else x.to_dense()))


def of_gradient(params: Sequence[Tensor], measure: Measure, scale: Tensor | None) -> Tensor | None:
    """grad_dual, grad_l2, density, density_q and anisotropy, shape [5]; None without entries.

    The gradients are those in ``.grad``, divided by a loss scale if there is one.
    """
    g = [to_compute_dtype(entries(whole(p.grad))) for p in params if p.grad is not None]
    d = sum(x.numel() for x in g)
    if d == 0:
        return None
    norm = measure.norm.on(g[0].device)
    q = norm.q if isinstance(norm, Lp) else 2.0
    dense = isinstance(q, Tensor) or q < 2
    # Up to q = 2, what vanishes of one tensor relative to the largest entry of all is no part of a sum of norms.
    known = q if isinstance(norm, Lp) and not isinstance(q, Tensor) and q <= 2 else None
    apart = None if measure.whole or known == 1 else known
    pieces = (([x.numel() for x in xs], flat(xs)) for xs in ([g[i] for i in which] for which in together(g)))
    peak, top, totals = sums(pieces, [1.0, 2.0, *([q] if dense else [])], apart)
    first, second = totals[1.0], totals[2.0].sum()
    l2 = top * second.sqrt()
    dual = (top * totals[known] ** (1 / known)).sum() if known else dual_norm(norm, g, measure.whole)
    kin = density(totals[q].sum(), second, d, q) if dense else torch.full_like(l2, math.nan)
    found = [dual, l2, density(first, second, d, 1.0), kin, peak * math.sqrt(d) / l2]
    if scale is not None:
        found[:2] = [x / scale.reshape(()).to(x.device) for x in found[:2]]
    return stack(found)


def of_update(params: Sequence[Tensor], before: list[Piece], measure: Measure) -> Tensor | None:
    """update_norm, update_ratio and zeros, shape [3], of what a step has added to weights; None without entries."""
    after = [entries(whole(p)) for p in params]
    d = sum(x.numel() for x in after)
    if d == 0:
        return None
    zeros: list[Tensor] = []

    def changes() -> Iterator[tuple[list[int], Tensor]]:
        for which, old in before:
            new = flat([after[i] for i in which])
            zeros.append(new.numel() - torch.count_nonzero(new))
            yield [after[i].numel() for i in which], to_compute_dtype(new) - to_compute_dtype(old)

    norm = measure.norm.on(after[0].device)
    known = norm.p if isinstance(norm, Lp) and not isinstance(norm.p, Tensor) else None
    if known == math.inf:
        size, top, totals = sums(changes(), [2.0], None)
    elif known is not None:
        _, top, totals = sums(changes(), [2.0, known], None if measure.whole else known)
        size = (top * totals[known] ** (1 / known)).amax()
    else:
        parts = [(which, n, x) for (which, _), (n, x) in zip(before, list(changes()), strict=True)]
        _, top, totals = sums(((n, x) for _, n, x in parts), [2.0], None)
        apart = {i: x for which, n, y in parts for i, x in zip(which, torch.split(y, n), strict=True)}
        size = primal_norm(norm, [apart[i].view(after[i].shape) for i in sorted(apart)], measure.whole)
    update = top * totals[2.0].sum().sqrt()
    _, top, totals = sums((([old.numel()], to_compute_dtype(old)) for _, old in before), [2.0], None)
    return stack([size, update / (top * totals[2.0].sqrt()), stack(zeros).sum() / d])


def together(xs: Sequence[Tensor]) -> list[list[int]]:
    """Which of the tensors are measured in one call: of one dtype and device, and small; empty ones are left out."""
    done: list[list[int]] = []
    growing: dict[tuple[torch.device, torch.dtype], tuple[list[int], int]] = {}
    for i, x in enumerate(xs):
        key, n = (x.device, x.dtype), x.numel()
        if n == 0:
            continue
        which, held = growing.get(key, ([], 0))
        if not which or held + n > TOGETHER:
            which, held = [], 0
            done.append(which)
        which.append(i)
        growing[key] = which, held + n
    return done


def flat(xs: Sequence[Tensor]) -> Tensor:
    """Tensors as one vector; of one tensor it may share the memory."""
    return torch.cat([x.reshape(-1) for x in xs]) if len(xs) > 1 else xs[0].reshape(-1)


def copied(xs: Sequence[Tensor]) -> list[Piece]:
    """A copy of the tensors, the small ones together."""
    pieces = ((which, [xs[i] for i in which]) for which in together(xs))
    return [(which, flat(some) if len(some) > 1 else some[0].reshape(-1).clone()) for which, some in pieces]


def sums(
    pieces: Iterable[tuple[list[int], Tensor]], orders: Iterable[Order], apart: float | None
) -> tuple[Tensor, Tensor, dict[Order, Tensor]]:
    """Of vectors as one: max|x|, a scale M near it, and for each order k the sum Σ(|x|/M)^k, 0-d.

    Relative to the largest entry, no power overflows, and no sum vanishes.

    Args:
        pieces: the lengths of tensors, and their entries one after the other.
        orders: of the sums.
        apart: the order whose sums are given for each tensor, shape [n].
    """
    orders = list(dict.fromkeys(orders))
    split = [k for k in orders if apart is not None and equals(k, apart)]
    found: list[tuple[Tensor, Tensor, dict[Order, Tensor]]] = []
    for sizes, x in pieces:
        a = x.abs()
        peak = a.amax()
        top = scale_near(peak)
        a.div_(top)
        powers = {k: a if equals(k, 1) else a.square() if equals(k, 2) else a.pow(k) for k in orders}
        each = {k: stack([t.sum() for t in torch.split(y, sizes)]) for k, y in powers.items() if k in split}
        found.append((peak, top, {k: y.sum() for k, y in powers.items() if k not in split} | each))
    if len(found) == 1:
        return found[0]
    peak = stack([peak for peak, _, _ in found]).amax()
    top, tops = scale_near(peak), stack([top for _, top, _ in found])
    totals = {}
    for k in orders:
        scaled = [(f[2][k].to(top.device) * (t / top) ** k).reshape(-1) for f, t in zip(found, tops, strict=True)]
        totals[k] = torch.cat(scaled) if k in split else torch.cat(scaled).sum()
    return peak, top, totals


def scale_near(peak: Tensor) -> Tensor:
    """The largest entry, kept off 0 and ∞, under which 0/0 and ∞/∞ would make NaN of what is none."""
    limits = torch.finfo(peak.dtype)
    return peak.clamp(limits.tiny, limits.max)


def density(total: Tensor, second: Tensor, d: int, q: Order) -> Tensor:
    """‖g‖_q²/(d^(2/q−1)‖g‖₂²) from Σ|g|^q and Σ|g|², each relative to the same; NaN where a tensor q is 2 or more."""
    q = q.to(second) if isinstance(q, Tensor) else q
    found = total ** (2 / q) / (d ** (2 / q - 1) * second)
    return torch.where(q < 2, found, math.nan) if isinstance(q, Tensor) else found


def dual_norm(norm: Norm, g: list[Tensor], whole: bool) -> Tensor:
    """The dual norm of a group: the sum over its tensors, or that of all as one vector."""
    partials = norm.measure(g)
    return norm.combine(partials)[..., 0] if whole else norm.combine(partials[:, None])[..., 0].sum()


def primal_norm(norm: Norm, xs: list[Tensor], whole: bool) -> Tensor:
    """The norm of a group: the largest over its tensors, or that of all as one vector; NaN if it defines none."""
    if whole and not isinstance(norm, MatrixNorm):  # whose norm of many matrices is the largest
        xs = [torch.cat([x.reshape(-1).to(xs[0].device) for x in xs])]
    try:
        return stack([norm.norm(x) for x in xs]).amax()
    except NotImplementedError:
        return xs[0].new_full((), math.nan)
