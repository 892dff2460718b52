"""Weight decay: coupled (ℓ2, in the gradient), decoupled (ℓ2, on the weight), and ℓp, which sparsifies."""

from __future__ import annotations

import torch
from torch import Tensor

Number = float | Tensor


def coupled(g: list[Tensor], w: list[Tensor], weight_decay: Number) -> list[Tensor]:
    """Return ``g + λw``, the gradient before momentum. Source: torch.optim.SGD."""
    if isinstance(weight_decay, Tensor):
        decayed = zip(torch._foreach_mul(w, weight_decay), g, strict=True)
        return list(torch._foreach_add(g, [x.to(y.dtype) for x, y in decayed]))  # 0-d tensors may have been promoted
    return list(torch._foreach_add(g, w, alpha=weight_decay))


def decoupled_(w: list[Tensor], lr_times_decay: Number) -> None:
    """Apply ``w ← (1 − ηλ)w``, separately from the step. Source: AdamW, arXiv:1711.05101."""
    torch._foreach_mul_(w, 1 - lr_times_decay)


def lp_factors(w: list[Tensor], p: float, lr_times_decay: Number) -> list[Tensor]:
    """Return the factors of ℓp decay (pWD): ``w ← (w − ηu) · X/(X + pηλ)`` with X = |w_old|^(2−p).

    For p < 2, smaller weights shrink faster and reach exactly 0 in finite time. Zero is then absorbing: a
    weight that starts at 0 never trains. For p ≥ 2 the factor is computed as ``1/(1 + pηλ|w_old|^(p−2))``,
    which avoids 0/0. ηλ = 0 gives the factor 1.

    Without a gradient, a weight w₀ reaches 0 after about ``|w₀|^(2−p) / ((2−p)·pηλ)`` steps. Only the product
    ηλ matters, so a larger learning rate sparsifies as a larger λ does.

    Source: Decoupled weight decay for any p norm, arXiv:2404.10824.
    """
    k = p * lr_times_decay
    if p >= 2:
        return [1 / (1 + k * x.abs().pow(p - 2)) for x in w]
    # Clamped to finite, so that a huge weight gives a factor of 1 and not ∞/∞.
    sizes = [x.abs().pow(2 - p).clamp(max=torch.finfo(x.dtype).max) for x in w]
    factors = [x / (x + k) for x in sizes]
    if isinstance(k, Tensor):
        return [torch.where(k == 0, 1, f) for f in factors]
    return factors if k != 0 else [torch.ones_like(x) for x in sizes]
