"""An experimental schedule: p depends on the measured gradient, not on the step number."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from normopt._checks import check_number, names_arguments
from normopt.norms.base import num_reals, stack
from normopt.norms.lp import Lp
from normopt.schedules.base import PSchedule, interpolate_exponent
from normopt.sharding.exchange import global_dual_norm

GAUSSIAN = 2 / math.pi  # the density of a vector of independent Gaussian entries, as its size grows


class AdaptiveP(PSchedule):
    """Set p from the density of the gradient: near its initial value if dense, near ``p_end`` if sparse.

    An experiment, as an alternative to `CosineP`; the tutorial has an ablation and its result.

    ::

        φ = ‖g‖₁²/(d‖g‖₂²)                                   per group, with all its gradients as one vector
        φ̄ ← φ at first, then βφ̄ + (1−β)φ
        t = (φ̄ − low)/(high − low), clamped to [0, 1]
        1/(p−1) = 1/(p_end−1) + (1/(p_start−1) − 1/(p_end−1))·t

    g has d entries, and φ ranges from 1/d (one nonzero entry) to 1 (all of equal magnitude). Call ``step()`` after
    ``optimizer.step()`` and before ``zero_grad()``: it reads ``.grad``, and the next step uses a p set by this
    gradient and those before it. The first step uses p_end, since nothing is measured yet. A group without a
    gradient, or with one that is zero or not finite, keeps its φ̄.

    Why the density: signSGD's bound is on ‖g‖₁² and SGD's on ‖g‖₂² (arXiv:1802.04434), and ``‖g‖₁² = φ(g)d·‖g‖₂²``.
    Stated for ‖g‖₂² and up to constants, the curvature term of signSGD's bound is √φ(L)/φ(g) times SGD's, and the
    noise term φ(σ)/φ(g) times, where L are the coordinates' curvatures and σ their noise. So signs help while the
    gradient is denser than curvature and noise. They hurt while it is sparser, because they also take full steps in
    coordinates that hold only noise. φ(L) and φ(σ) are not measured: the experiment is to let φ(g) alone decide.

    Why these defaults: a vector with a fraction f of Gaussian entries and zeros elsewhere has density f·2/π, so with
    low = 0 and high = 2/π, t is the fraction of entries in use. The interpolation is in 1/(p−1), because a step raises
    the entries to that exponent and p = ∞ is allowed; interpolating p itself would keep steps near p_start's.

    Under scale="power" the step length changes with p by orders of magnitude: choose a learning rate that fits the
    resulting p, or use scale="matched". This is also why the first step uses p_end: at p_start = 8 it would be many
    times too long for the learning rate of the later steps, and on the digits the network did not recover from it.

    Args:
        optimizer: any optimizer with a p in its param groups; their p is p_start, which may be ∞.
        p_end: p for the sparsest gradients. Default 2, SGD.
        beta: β, the weight of the old average, 0 ≤ β < 1. Default 0.9, our choice, as for LPSGDM's momentum.
        low: the density at and below which p is p_end, 0 ≤ low < high. Default 0, see above.
        high: the density at and above which p is p_start, at most 1. Default 2/π, that of Gaussian entries.
        last_epoch: as for `PSchedule`; −1 also forgets φ̄, which each group keeps as ``group["density"]``.

    Attributes:
        densities: φ̄ of each param group, None before its first measurement; empty before the first ``step()``.

    Cost: each ``step()`` makes a few passes over the gradients and one host–device sync. Under data parallelism all
    ranks have the same gradients and hence the same p; for DTensors the ranks reduce their sums.

    Raises:
        ValueError: an argument out of range, or an order of 1, where 1/(p−1) is undefined; no group of the optimizer
            has a p.
        TypeError: an argument is not a number, or ``optimizer`` is not an optimizer.
        RuntimeError: in ``step()``, if no parameter with a p has a gradient; nothing is changed then.

    Source: ours; the density is that of signSGD's analysis, arXiv:1802.04434.

    Example:
        >>> opt = normopt.LPSGDM(model.parameters(), lr=0.01, p=8.0)
        >>> sched = normopt.schedules.AdaptiveP(opt)
        >>> for x, y in data:
        ...     opt.zero_grad()
        ...     loss(model(x), y).backward()
        ...     opt.step()
        ...     sched.step()
    """

    @names_arguments
    def __init__(
        self,
        optimizer: Optimizer,
        p_end: float = 2.0,
        beta: float = 0.9,
        low: float = 0.0,
        high: float = GAUSSIAN,
        *,
        last_epoch: int | None = None,
    ) -> None:
        check_number("p_end", p_end, low=1, open_low=True)
        check_number("beta", beta, low=0, high=1, open_high=True)
        check_number("high", high, low=0, high=1, open_low=True)
        check_number("low", low, low=0, high=high, open_high=True)
        self.p_end, self.beta, self.low, self.high = float(p_end), float(beta), float(low), float(high)
        # A new list at every step, because state_dict() returns it by reference.
        self.densities: list[float | None] = []
        super().__init__(optimizer, last_epoch=last_epoch)

    def step(self, epoch: int | None = None) -> None:
        """Measure the current gradients, and set every group's p from the averaged density.

        Args:
            epoch: the number of steps made, as in torch.

        Raises:
            RuntimeError: no parameter with a p has a gradient; nothing is changed then.
        """
        self._recall()
        self.densities = self._averages()
        self._go_to(self.last_epoch + 1 if epoch is None else epoch)

    def p_at(self, start: float, s: int) -> float:
        """Return p_end, the p of a group whose gradient was never measured.

        Args:
            start: the group's p when the schedule was created.
            s: the step, which is ignored.

        Raises:
            ValueError: the group started at p = 1.
        """
        if start == 1:
            raise ValueError("1/(p−1) is undefined at p = 1: use an initial p > 1")
        return self.p_end

    def _p_of(self, i: int, start: float, s: int) -> float:
        density = self.densities[i] if self.densities else None
        if density is None:
            return self.p_at(start, s)
        t = (density - self.low) / (self.high - self.low)
        return interpolate_exponent(start, self.p_end, min(max(t, 0.0), 1.0))

    def _memory(self, i: int) -> dict[str, Any]:
        return super()._memory(i) | {"density": self.densities[i] if self.densities else None}

    def _remember(self, i: int, group: dict[str, Any]) -> None:
        super()._remember(i, group)
        self.densities = list(self.densities) or [None] * len(self.base_ps)
        self.densities[i] = group.get("density")

    def _averages(self) -> list[float | None]:
        """Return each group's φ̄ updated with the current gradients; the only host–device sync."""
        measured = {}
        for i, (start, group) in enumerate(zip(self.base_ps, self.optimizer.param_groups, strict=False)):
            gradients = [p.grad for p in group["params"] if p.grad is not None and p.grad.numel()]
            if start is not None and gradients:
                measured[i] = density(gradients)
        if not measured:
            raise RuntimeError(
                "AdaptiveP measures gradients, but no parameter has one: call its step() after optimizer.step() and "
                "before optimizer.zero_grad()"
            )
        averages = list(self.densities) or [None] * len(self.base_ps)
        for i, found in zip(measured, stack(list(measured.values())).tolist(), strict=True):
            if math.isfinite(found):
                old = averages[i]
                averages[i] = found if old is None else self.beta * old + (1 - self.beta) * found
        return averages


@torch.no_grad()
def density(x: list[Tensor]) -> Tensor:
    """Return ``‖x‖₁²/(d‖x‖₂²)`` of tensors as one vector, 0-d; NaN if all are zero."""
    g = [t.to_dense() if t.layout != torch.strided else t for t in x]
    l1, l2 = (global_dual_norm(norm, g) for norm in (Lp(math.inf), Lp(2.0)))
    return (l1 / l2).square() / sum(map(num_reals, g))
