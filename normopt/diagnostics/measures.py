"""Metrics of gradients and updates: power sums of many tensors as one vector, without a host sync."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from normopt._checks import equals, is_quantized
from normopt.norms.base import Norm, as_real, stack, to_compute_dtype
from normopt.norms.lp import Lp
from normopt.norms.matrices import MatrixNorm
from normopt.sharding.layout import full_tensor, resolved
from normopt.stages.agr import clamp_normal

# Maximal number of entries of a bucket of tensors that are measured in one call. Bucketing saves calls for small
# tensors; for large ones it would only add a copy.
BUCKET_SIZE = 1 << 20

Order = float | Tensor


class GroupSnapshot:
    """A param group before a step: its settings and a copy of its weights, to measure the gradient and the update.

    Args:
        group: the param group.
        norm: the norm to measure in.
        over_group: whether to measure all tensors of the group as one vector.
    """

    @torch.no_grad()
    def __init__(self, group: Mapping[str, Any], norm: Norm, over_group: bool) -> None:
        self.params, self.norm, self.over_group = unquantized(group), norm, over_group
        self.lr, self.p = learning_rate(group), scalar_setting(group, "p")
        xs = [as_dense_real(full_tensor(p)) for p in self.params]
        # Indices of tensors, and a copy of their entries as one vector.
        self.weights = [(indices, torch.cat([xs[i].reshape(-1) for i in indices])) for indices in buckets(xs)]
        self.gradient: Tensor | None = None  # the last gradient's metrics

    @torch.no_grad()
    def gradient_metrics(self, scale: Tensor | None) -> Tensor | None:
        """Return grad_dual, grad_l2, density, density_q and anisotropy, shape [5]; None without entries.

        The gradients are read from ``.grad`` and divided by ``scale``, the loss scale, if there is one.
        """
        g = [to_compute_dtype(as_dense_real(full_tensor(p.grad))) for p in self.params if p.grad is not None]
        d = sum(x.numel() for x in g)
        if d == 0:
            return None
        norm = self.norm.on(g[0].device)
        q = norm.q if isinstance(norm, Lp) else 2.0
        dense = isinstance(q, Tensor) or q < 2
        # Up to q = 2, entries that underflow relative to the largest of the group do not change a sum of norms.
        order = q if isinstance(norm, Lp) and not isinstance(q, Tensor) and q <= 2 else None
        per_tensor_order = None if self.over_group or order == 1 else order
        pieces = (([g[i].numel() for i in indices], flatten([g[i] for i in indices])) for indices in buckets(g))
        peak, top, totals = power_sums(pieces, [1.0, 2.0, *([q] if dense else [])], per_tensor_order)
        first, second = totals[1.0], totals[2.0].sum()
        l2 = top * second.sqrt()
        dual = (top * totals[order] ** (1 / order)).sum() if order else dual_norm(norm, g, self.over_group)
        density_q = density(totals[q].sum(), second, d, q) if dense else torch.full_like(l2, math.nan)
        found = [dual, l2, density(first, second, d, 1.0), density_q, peak * math.sqrt(d) / l2]
        if scale is not None:
            found[:2] = [x / scale.reshape(()).to(x.device) for x in found[:2]]
        return stack(found)

    @torch.no_grad()
    def update_metrics(self) -> Tensor | None:
        """Return update_norm, update_ratio and zeros of the step, shape [3]; None without entries."""
        after = [as_dense_real(full_tensor(p)) for p in self.params]
        d = sum(x.numel() for x in after)
        if d == 0:
            return None
        zeros: list[Tensor] = []

        def changes() -> Iterator[tuple[list[int], Tensor]]:
            for indices, old in self.weights:
                new = flatten([after[i] for i in indices])
                zeros.append(new.numel() - torch.count_nonzero(new))
                yield [after[i].numel() for i in indices], to_compute_dtype(new) - to_compute_dtype(old)

        norm = self.norm.on(after[0].device)
        order = norm.p if isinstance(norm, Lp) and not isinstance(norm.p, Tensor) else None
        if order == math.inf:
            size, top, totals = power_sums(changes(), [2.0], None)
        elif order is not None:
            _, top, totals = power_sums(changes(), [2.0, order], None if self.over_group else order)
            size = (top * totals[order] ** (1 / order)).amax()
        else:
            pieces = list(changes())
            _, top, totals = power_sums(pieces, [2.0], None)
            places = [i for indices, _ in self.weights for i in indices]
            parts = [x for sizes, piece in pieces for x in torch.split(piece, sizes)]
            changed = dict(zip(places, parts, strict=True))
            size = primal_norm(norm, [changed[i].view(after[i].shape) for i in sorted(changed)], self.over_group)
        update = top * totals[2.0].sum().sqrt()
        _, top, totals = power_sums((([len(old)], to_compute_dtype(old)) for _, old in self.weights), [2.0], None)
        return stack([size, update / (top * totals[2.0].sqrt()), stack(zeros).sum() / d])


def unquantized(group: Mapping[str, Any]) -> list[Tensor]:
    """Return a group's parameters without quantized ones, whose values are codes."""
    return [p for p in group["params"] if not is_quantized(p)]


def scalar_setting(group: Mapping[str, Any], name: str) -> float | Tensor:
    """Return a setting of a param group as a number or a 0-d tensor; NaN if it is missing or not a scalar."""
    value = group.get(name)
    if isinstance(value, Tensor):
        return value.detach().reshape(()) if value.numel() == 1 and not value.is_complex() else math.nan
    return float(value) if isinstance(value, numbers.Real) else math.nan


def learning_rate(group: Mapping[str, Any]) -> float | Tensor:
    """Return the learning rate of a param group, lr times normopt's lr_ratio, as `scalar_setting` does."""
    return scalar_setting(group, "lr") * float(group.get("lr_ratio", 1.0))


def as_dense_real(x: Tensor) -> Tensor:
    """Return a dense real view or copy: sparse becomes dense, complex becomes pairs, lazy conjugation is resolved."""
    return as_real(resolved(x if x.layout == torch.strided else x.to_dense()))


def buckets(xs: Sequence[Tensor]) -> list[list[int]]:
    """Return index lists of tensors to measure in one call: same dtype and device, bounded size, no empty ones."""
    done: list[list[int]] = []
    growing: dict[tuple[torch.device, torch.dtype], tuple[list[int], int]] = {}
    for i, x in enumerate(xs):
        key, n = (x.device, x.dtype), x.numel()
        if n == 0:
            continue
        indices, held = growing.get(key, ([], 0))
        if not indices or held + n > BUCKET_SIZE:
            indices, held = [], 0
            done.append(indices)
        indices.append(i)
        growing[key] = indices, held + n
    return done


def flatten(xs: Sequence[Tensor]) -> Tensor:
    """Return the tensors as one vector; for a single tensor it may share memory."""
    return torch.cat([x.reshape(-1) for x in xs]) if len(xs) > 1 else xs[0].reshape(-1)


def power_sums(
    pieces: Iterable[tuple[list[int], Tensor]], orders: Iterable[Order], per_tensor_order: float | None
) -> tuple[Tensor, Tensor, dict[Order, Tensor]]:
    """Return max|x|, the scale M (max|x| clamped), and Σ(|x|/M)^k for each order k, 0-d, over all pieces.

    Scaled by the largest entry, no power overflows and no sum vanishes.

    Args:
        pieces: (sizes of the tensors, their concatenated entries).
        orders: the k of the sums.
        per_tensor_order: the order whose sums are returned per tensor, shape [n].
    """
    orders = list(dict.fromkeys(orders))
    split = [k for k in orders if per_tensor_order is not None and equals(k, per_tensor_order)]
    found: list[tuple[Tensor, Tensor, dict[Order, Tensor]]] = []
    for sizes, x in pieces:
        a = x.abs()
        peak = a.amax()
        top = clamp_normal(peak)
        a.div_(top)
        powers = {k: a if equals(k, 1) else a.square() if equals(k, 2) else a.pow(k) for k in orders}
        each = {k: stack([t.sum() for t in torch.split(y, sizes)]) for k, y in powers.items() if k in split}
        found.append((peak, top, {k: y.sum() for k, y in powers.items() if k not in split} | each))
    if len(found) == 1:
        return found[0]
    peak = stack([peak for peak, _, _ in found]).amax()
    top, tops = clamp_normal(peak), stack([top for _, top, _ in found])
    totals = {}
    for k in orders:
        scaled = [(f[2][k].to(top.device) * (t / top) ** k).reshape(-1) for f, t in zip(found, tops, strict=True)]
        totals[k] = torch.cat(scaled) if k in split else torch.cat(scaled).sum()
    return peak, top, totals


def density(total: Tensor, second: Tensor, d: int, q: Order) -> Tensor:
    """Return ‖g‖_q²/(d^(2/q−1)‖g‖₂²) from Σ|g|^q and Σ|g|² with the same scale; NaN if a tensor q is 2 or more."""
    q = q.to(second) if isinstance(q, Tensor) else q
    found = total ** (2 / q) / (d ** (2 / q - 1) * second)
    return torch.where(q < 2, found, math.nan) if isinstance(q, Tensor) else found


def dual_norm(norm: Norm, g: list[Tensor], over_group: bool) -> Tensor:
    """Return a group's dual norm: the sum over its tensors, or that of all as one vector."""
    partials = norm.measure(g)
    return norm.combine(partials if over_group else partials[:, None])[..., 0].sum()


def primal_norm(norm: Norm, xs: list[Tensor], over_group: bool) -> Tensor:
    """Return a group's norm: the maximum over its tensors, or that of all as one vector; NaN if not defined."""
    if over_group and not isinstance(norm, MatrixNorm):  # the group norm of matrices is the maximum in both cases
        xs = [torch.cat([x.reshape(-1).to(xs[0].device) for x in xs])]
    try:
        return stack([norm.norm(x) for x in xs]).amax()
    except NotImplementedError:
        return xs[0].new_full((), math.nan)
