"""Three momentum rules. μ always weights the OLD state. Each returns (c, m): the norm's input c, and the
buffer m, which is updated in place if it existed.
"""

from __future__ import annotations

import torch
from torch import Tensor

Buffers = list[Tensor | None]
Momentum = tuple[list[Tensor], list[Tensor]]


def heavy(m: Buffers, g: list[Tensor], mu: float, dampening: float, nesterov: bool) -> Momentum:
    """Update by heavy ball: ``m ← μm + (1−τ)g``, the first m = g; c = m, or with Nesterov c = g + μm.

    τ is the dampening. Source: torch.optim.SGD, reproduced bit for bit.
    """
    old = [(b, x) for b, x in zip(m, g, strict=True) if b is not None]
    if old:
        buffers, grads = [b for b, _ in old], [x for _, x in old]
        torch._foreach_mul_(buffers, mu)
        torch._foreach_add_(buffers, grads, alpha=1 - dampening)
    new = [x.clone() if b is None else b for b, x in zip(m, g, strict=True)]
    return (list(torch._foreach_add(g, new, alpha=mu)) if nesterov else new), new


def ema(m: Buffers, g: list[Tensor], mu: float, nesterov: bool) -> Momentum:
    """Update a moving average: ``m ← μm + (1−μ)g`` from m = 0; c = m, or with Nesterov c = (1−μ)g + μm.

    Source: LPSGDM, arXiv:2606.02078; Nesterov as in torch.optim.Muon. No bias correction, as in both.
    """
    new = _from_zero(m, g)
    torch._foreach_lerp_(new, g, 1 - mu)
    return (list(torch._foreach_lerp(g, new, mu)) if nesterov else new), new


def lion(m: Buffers, g: list[Tensor], mu: float, beta2: float) -> Momentum:
    """Update by Lion's rule: ``c = μm + (1−μ)g``, then ``m ← β₂m + (1−β₂)g``, from m = 0.

    Source: Lion, arXiv:2302.06675, whose β₁ is μ.
    """
    new = _from_zero(m, g)
    c = list(torch._foreach_lerp(new, g, 1 - mu))
    torch._foreach_lerp_(new, g, 1 - beta2)
    return c, new


def _from_zero(m: Buffers, g: list[Tensor]) -> list[Tensor]:
    return [torch.zeros_like(x) if b is None else b for b, x in zip(m, g, strict=True)]
