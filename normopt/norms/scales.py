"""The four scales: from c to the update direction u, over tensors or over a whole group as one vector."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from normopt.norms.base import Norm, Scale
from normopt.norms.lp import Lp, safe_divide, unbind_like


class NormPair(NamedTuple):
    """How large a step was in its own norm, and its gradient in the dual one.

    Attributes:
        update: the norm of the update per unit of the learning rate, ``‖u‖``: by the rule, which an iterative
            method such as Newton–Schulz meets within its own error.
        dual: the dual norm ``‖c‖⋆`` of what the norm was given: the gradient after AGR, coupled decay and momentum.
    """

    update: Tensor
    dual: Tensor


def direction(
    norm: Norm, c: list[Tensor], scale: Scale, whole_group: bool, eps: float
) -> tuple[list[Tensor], NormPair | None]:
    """The steepest-descent direction of c under a norm, which may be c itself: read it, never write it.

    ::

        unit      u = D(c)
        dual      u = ‖c‖⋆ · D(c)
        power     u = ‖c‖⋆^κ · D(c), κ = 1/(p−1): elementwise for ℓp
        matched   u = D(c) · RMS(c)/RMS(D(c)), per tensor: SGD's step length, another direction

    With ``whole_group``, ‖·‖⋆ and D are those of all the tensors as one vector.

    Beside it ``‖u‖`` and ``‖c‖⋆`` of each tensor, shape [n] each, where u could not be had without them: else None.
    """
    if norm.is_identity(scale):
        return c, None
    if scale == "power" or norm.needs(scale) == "none":
        return norm.power(c, eps), None
    u, dual = norm.scaled(c, 1 if scale == "dual" else 0, whole_group)
    if scale == "dual":
        return u, NormPair(dual, dual)
    if scale == "unit":
        return u, unit_pair(dual)
    u, factors = matched(u, c)
    return u, NormPair(factors.to(dual), dual)


def unit_pair(dual: Tensor) -> NormPair:
    """Of unit steps: 1, where the dual norm is neither 0 nor NaN, which stay."""
    return NormPair(torch.where(dual > 0, 1, dual), dual)


def group_norms(pairs: list[NormPair | None], whole_group: bool, radius: float) -> NormPair | None:
    """One pair of 0-d tensors from those of a group's batches; None if there are none, or one was not measured."""
    known = [pair for pair in pairs if pair is not None]
    if not known or len(known) < len(pairs):
        return None
    device = known[0].dual.device
    updates, duals = (torch.cat([x.detach().to(device) for x in column]) for column in zip(*known, strict=True))
    return NormPair(updates.amax() * radius, duals[0] if whole_group else duals.sum())


def matched(d: list[Tensor], c: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Each d at the length of its c, ``d · ‖c‖₂/‖d‖₂``, 0 where d is 0; and the factors ``‖c‖₂/‖d‖₂``, shape [n]."""
    l2 = Lp(2.0)
    return rescale_to_norm(d, *l2.combine(l2.measure([*c, *d])[:, None]).tensor_split(2))


def rescale_to_norm(d: list[Tensor], ours: Tensor, theirs: Tensor) -> tuple[list[Tensor], Tensor]:
    """Each d, whose lengths are ``theirs``, at the length ``ours``; and the factors: scalars of l2, shape [n, 3]."""
    _, lengths, shifts = ours.unbind(-1)
    own = theirs[:, 0] * shifts
    u = torch._foreach_mul(safe_divide(d, own), unbind_like(lengths, d))
    return list(u), lengths / own.clamp_min(torch.finfo(own.dtype).tiny)
