"""The four scales: from c to the update direction u, over tensors or over a whole group as one vector."""

from __future__ import annotations

from torch import Tensor

from normopt.norms.base import Norm, Scale
from normopt.norms.lp import Lp, divide


def direction(norm: Norm, c: list[Tensor], scale: Scale, whole_group: bool, eps: float) -> list[Tensor]:
    """The steepest-descent direction of c under a norm. It may be c itself: read it, never write it.

    ::

        unit      u = D(c)
        dual      u = ‖c‖⋆ · D(c)
        power     u = ‖c‖⋆^κ · D(c), κ = 1/(p−1): elementwise for ℓp
        matched   u = D(c) · RMS(c)/RMS(D(c)), per tensor: SGD's step length, another direction

    With ``whole_group``, ‖·‖⋆ and D are those of all the tensors as one vector.
    """
    if norm.is_identity(scale):
        return c
    if scale == "power" or norm.needs(scale) == "none":
        return norm.power(c, eps)
    u = norm.scaled(c, 1 if scale == "dual" else 0, whole_group)
    return matched(u, c) if scale == "matched" else u


def matched(d: list[Tensor], c: list[Tensor]) -> list[Tensor]:
    """Each d at the length of its c: ``d · ‖c‖₂/‖d‖₂``, and 0 where d is 0."""
    l2 = Lp(2.0)
    lengths = l2.combine(l2.measure([*c, *d])[:, None])[:, 0]
    return [u * n.to(u) for u, n in zip(divide(d, lengths[len(c) :]), lengths, strict=False)]
