"""The size of a step in its norm, and rescaling of directions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from normopt.norms.lp import safe_divide, unbind_like


class NormPair(NamedTuple):
    """The size of a step in its norm, and of its gradient in the dual norm.

    Attributes:
        update: the norm ``‖u‖`` of the update per unit of the learning rate. It is the exact rule's value; an
            iterative method such as Newton–Schulz meets it within its own error.
        dual: the dual norm ``‖c‖⋆`` of the gradient after AGR, coupled decay and momentum.
    """

    update: Tensor
    dual: Tensor


def unit_pair(dual: Tensor) -> NormPair:
    """Return the pair of a unit step: norm 1, except that a dual norm of 0 or NaN is kept."""
    return NormPair(torch.where(dual > 0, 1, dual), dual)


def group_norms(pairs: list[NormPair | None], whole_group: bool, radius: float) -> NormPair | None:
    """Reduce the pairs of a group's batches to one pair of 0-d tensors; None if any is missing or there are none."""
    known = [pair for pair in pairs if pair is not None]
    if not known or len(known) < len(pairs):
        return None
    device = known[0].dual.device
    updates, duals = (torch.cat([x.detach().to(device) for x in column]) for column in zip(*known, strict=True))
    return NormPair(updates.amax() * radius, duals[0] if whole_group else duals.sum())


def rescale_to_norm(d: list[Tensor], target: Tensor, current: Tensor) -> tuple[list[Tensor], Tensor]:
    """Rescale each d from ``current`` to ``target``, its ℓ2 scalars of shape [n, 3]; also return the factors."""
    _, lengths, shifts = target.unbind(-1)
    own = current[:, 0] * shifts
    u = torch._foreach_mul(safe_divide(d, own), unbind_like(lengths, d))
    return list(u), lengths / own.clamp_min(torch.finfo(own.dtype).tiny)


def normalize_to(d: list[Tensor], lengths: Tensor, current: Tensor) -> tuple[list[Tensor], Tensor]:
    """Rescale each d to an ℓ2 length, shape [n], given its own ℓ2 scalars, shape [n, 3]; also return the factors."""
    norms, safe, shifts = current.unbind(-1)
    u = safe_divide(d, safe, shifts)
    torch._foreach_mul_(u, unbind_like(lengths, d))
    return u, lengths / norms.clamp_min(torch.finfo(norms.dtype).tiny)
