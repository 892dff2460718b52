"""The control of LPSGDM that says how much of it is nothing but another learning rate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from normopt._checks import check_number


class LengthOfLPSGDM(Optimizer):
    """SGD with averaged momentum at LPSGDM's step lengths: its direction is SGD's, only how far it goes is LPSGDM's.

    ::

        m ← μm + (1−μ)g  (first m = 0)
        w ← (1 − ηλ)w − η_t·m,   η_t = η·RMS(u)/RMS(m) for each tensor, 0 where m = 0,   u = sign(m)·|m|^(1/(p−1))

    u is the step that LPSGDM with ε = 0 would take from here. Annealing p makes LPSGDM's step change by orders of
    magnitude, which is a learning-rate schedule: what is better than SGD in this control is due to that schedule, and
    what is better in LPSGDM than in this control is due to its direction. p = 2 is SGD with averaged momentum.

    Args:
        params: parameters or param groups.
        lr: η.
        p: 1 < p ≤ ∞, which a schedule of p may set. Default 8, as LPSGDM's.
        momentum: μ. Default 0.9, as LPSGDM's.
        weight_decay: λ. Default 0.

    State: one buffer per parameter.

    Raises:
        TypeError, ValueError: a setting that is no number, or out of range.
    """

    def __init__(
        self, params: ParamsT, lr: float = 1e-2, p: float = 8.0, momentum: float = 0.9, weight_decay: float = 0.0
    ) -> None:
        check_number("lr", lr, low=0, open_high=True)
        check_number("p", p, low=1, open_low=True)
        check_number("momentum", momentum, low=0, high=1, open_high=True)
        check_number("weight_decay", weight_decay, low=0)
        super().__init__(params, dict(lr=lr, p=p, momentum=momentum, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for w in group["params"]:
                if w.grad is not None:
                    self._descend(w, w.grad, self.state[w], group)
        return loss

    def _descend(self, w: Tensor, g: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(w)
        m = state["momentum_buffer"].lerp_(g, 1 - group["momentum"])
        size = m.abs()
        longest = size.amax()
        # In units of the largest entry, so that no square underflows.
        share = size / longest
        ratio = share.pow(1 / (group["p"] - 1)).mul_(m != 0).norm() / share.norm() * longest.pow(1 / (group["p"] - 1))
        w.mul_(1 - group["lr"] * group["weight_decay"])
        w.addcmul_(torch.where(longest == 0, 0, ratio / longest), m, value=-group["lr"])
