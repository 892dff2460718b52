"""An experiment: p follows from the gradient that is measured, not from the number of the step."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.optim import Optimizer

from normopt._checks import check_number
from normopt.norms.base import num_reals, stack
from normopt.norms.lp import Lp
from normopt.schedules.base import PSchedule, interpolate_exponent
from normopt.sharding.exchange import as_one_vector

GAUSSIAN = 2 / math.pi  # the density of a vector of independent Gaussian entries, as its length grows


class AdaptiveP(PSchedule):
    """p from the density of the gradient: near its start while the gradient is dense, near ``p_end`` while sparse.

    Documented as an experiment, beside `CosineP`: the tutorial has an ablation, and its result.

    ::

        φ = ‖g‖₁²/(d‖g‖₂²)                                   of each group, all its gradients as one vector
        φ̄ ← φ at first, then βφ̄ + (1−β)φ
        t = (φ̄ − low)/(high − low), kept in [0, 1]
        1/(p−1) = 1/(p_end−1) + (1/(p_start−1) − 1/(p_end−1))·t

    d entries, φ between 1/d (one of them is not zero) and 1 (all are as large). To be called after
    ``optimizer.step()`` and before ``zero_grad()``: it measures what is in ``.grad``, so that the next step is made
    with a p that this gradient and those before it have set. What is not measured yet counts as sparse: the first
    step is made at p_end. A group without a gradient, or with one that is zero or not finite, keeps its φ̄.

    Why the density: signSGD's bound is on ‖g‖₁² and SGD's on ‖g‖₂² (arXiv:1802.04434), and ``‖g‖₁² = φ(g)d·‖g‖₂²``.
    Written for ‖g‖₂², what curvature adds to signSGD's bound is √φ(L)/φ(g), and what noise adds φ(σ)/φ(g) times what
    they add to SGD's, but for constants, with L the curvatures and σ the noise of the coordinates. So signs pay while
    the gradient is denser than curvature and noise are, and cost while it is sparser: they make as much of coordinates
    in which there is nothing but noise. φ(L) and φ(σ) are not measured here: that φ(g) alone decides is the experiment.

    Why these ends: a vector with a fraction f of Gaussian entries and zeros elsewhere has the density f·2/π, so that
    with low = 0 and high = 2/π, t is the fraction of the entries that are in use. The exponent 1/(p−1) is what a step
    raises the entries to, and goes on to p = ∞; a p in between would be closer to its start than its steps are.

    Under scale="power" a step's length moves with p, over orders of magnitude: see that the learning rate fits the p
    that comes out, or use scale="matched". It is why the first step is made at p_end: at p_start = 8 it would be many
    times too long for the learning rate of what follows, and on the digits the network did not recover from it.

    Args:
        optimizer: any optimizer with a p in its param groups; where they stand is p_start, ∞ included.
        p_end: p of the sparsest gradients. Default 2, SGD.
        beta: β, the weight of the old average, 0 ≤ β < 1. Default 0.9, our choice: that of LPSGDM's momentum.
        low: the density at and below which p is p_end, 0 ≤ low < high. Default 0, see above.
        high: the density at and above which p is p_start, at most 1. Default 2/π, that of Gaussian entries.

    Attributes:
        densities: φ̄ of each param group, None before its first measurement; empty before the first ``step()``.

    Cost: each ``step()`` passes over the gradients a few times, and the host waits for the device once. Under data
    parallelism all ranks have the same gradients, and so the same p; of DTensors they put their sums together.

    Raises:
        ValueError: an argument out of range, or an order of 1, where 1/(p−1) has no value; no group of the optimizer
            has a p.
        TypeError: an argument is no number, or the optimizer none.
        RuntimeError: in ``step()``, if no parameter with a p has a gradient, or a gradient is sharded; nothing is
            changed then.

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

    def __init__(
        self,
        optimizer: Optimizer,
        p_end: float = 2.0,
        beta: float = 0.9,
        low: float = 0.0,
        high: float = GAUSSIAN,
    ) -> None:
        check_number("p_end", p_end, low=1, open_low=True)
        check_number("beta", beta, low=0, high=1, open_high=True)
        check_number("high", high, low=0, high=1, open_low=True)
        check_number("low", low, low=0, high=high, open_high=True)
        self.p_end, self.beta, self.low, self.high = float(p_end), float(beta), float(low), float(high)
        # φ̄ of each group, None before its first. A new list at every step: state_dict() hands it out.
        self.densities: list[float | None] = []
        super().__init__(optimizer)

    def step(self) -> None:
        """Measure the gradients that are there, and set every group's p by their averaged density.

        Raises:
            RuntimeError: no parameter with a p has a gradient; nothing is changed then.
        """
        self.densities = self._averaged()
        super().step()

    def p_at(self, start: float, s: int) -> float:
        """p of a group whose gradient was never measured: its end.

        Args:
            start: p of the group when the schedule was made.
            s: the step, which plays no part.

        Raises:
            ValueError: the group started at p = 1.
        """
        if start == 1:
            raise ValueError("1/(p−1) has no value at p = 1: start above 1")
        return self.p_end

    def _p_of(self, i: int, start: float, s: int) -> float:
        density = self.densities[i] if i < len(self.densities) else None
        if density is None:
            return self.p_at(start, s)
        t = (density - self.low) / (self.high - self.low)
        return interpolate_exponent(start, self.p_end, min(max(t, 0.0), 1.0))

    def _averaged(self) -> list[float | None]:
        """φ̄ of each group with what is in .grad now; the one place where the host waits for the device."""
        measured = {}
        for i, (start, group) in enumerate(zip(self.base_ps, self.optimizer.param_groups, strict=False)):
            gradients = [p.grad for p in group["params"] if p.grad is not None and p.grad.numel()]
            if start is not None and gradients:
                measured[i] = density(gradients)
        if not measured:
            raise RuntimeError(
                "AdaptiveP measures gradients, and there are none: call its step() after optimizer.step() and before "
                "optimizer.zero_grad()"
            )
        new = dict(zip(measured, stack(list(measured.values())).tolist(), strict=True))
        averages: list[float | None] = []
        for i in range(len(self.base_ps)):
            old = self.densities[i] if i < len(self.densities) else None
            found = new.get(i, math.nan)
            if not math.isfinite(found):
                averages.append(old)
            else:
                averages.append(found if old is None else self.beta * old + (1 - self.beta) * found)
        return averages


@torch.no_grad()
def density(x: list[Tensor]) -> Tensor:
    """``‖x‖₁²/(d‖x‖₂²)`` of tensors as one vector, 0-d; NaN where all are zero."""
    g = [t.to_dense() if t.layout != torch.strided else t for t in x]
    l1, l2 = (as_one_vector(norm, g) for norm in (Lp(math.inf), Lp(2.0)))
    return (l1 / l2).square() / sum(map(num_reals, g))
