"""Schedules of p that are known beforehand: p follows from the number of the step."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Literal

from torch.optim import Optimizer

from normopt._checks import check_choice, check_number
from normopt.schedules.base import PSchedule, interpolate_exponent


class AnnealedP(PSchedule):
    """From the group's p to ``p_end`` along a curve that falls from 1 to 0."""

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        p_end: float = 2.0,
        space: Literal["p", "exponent"] = "p",
    ) -> None:
        if isinstance(total_steps, bool) or not isinstance(total_steps, int):
            raise TypeError(f"total_steps must be an integer, but is {total_steps!r} ({type(total_steps).__name__})")
        if total_steps < 1:
            raise ValueError(f"total_steps must be at least 1, but is {total_steps}: count optimizer steps or epochs")
        check_number("p_end", p_end, low=1)
        check_choice("space", space, ("p", "exponent"))
        self.total_steps = total_steps
        self.p_end = float(p_end)
        self.space = space
        super().__init__(optimizer)
        if self.p_end == 1 and any(group.get("scale") == "power" for group in optimizer.param_groups):
            raise ValueError('p_end = 1 is where scale="power" diverges: end above 1, or use another scale')

    def p_at(self, start: float, s: int) -> float:
        """p at step s; refused, before any group is touched, where the curve cannot leave or reach its ends.

        Args:
            start: p of the group when the schedule was made.
            s: the step, 1, 2, …

        Raises:
            ValueError: an end is ∞ in the space "p", or 1 in the space "exponent".
        """
        if self.space == "p" and math.inf in (start, self.p_end):
            raise ValueError('p = ∞ cannot be annealed in p itself: use space="exponent", which anneals 1/(p−1)')
        if self.space == "exponent" and 1 in (start, self.p_end):
            raise ValueError('1/(p−1) has no value at p = 1: use space="p"')
        if self.total_steps == 1:
            return start
        weight = self.curve(min(s - 1, self.total_steps - 1) / (self.total_steps - 1))
        if weight == 1:
            return start
        if self.space == "p":
            return self.p_end + (start - self.p_end) * weight
        return interpolate_exponent(start, self.p_end, weight)

    @abstractmethod
    def curve(self, t: float) -> float:
        """A number that is 1 at t = 0 and 0 at t = 1.

        Args:
            t: how much of the way is done, from 0 to 1.
        """


class CosineP(AnnealedP):
    """The paper's schedule: p falls from its start to 2 along half a cosine.

    ::

        p_s = p_end + (p_start − p_end)·(1 + cos(π(s−1)/(S−1)))/2          s = 1 … S, then p_end

    S = 1 keeps p at its start. The paper counts S in epochs; counting optimizer steps is as good.

    Args:
        optimizer: any optimizer with a p in its param groups; where they stand is p_start (p_max there).
        total_steps: S ≥ 1, in optimizer steps or in epochs, as ``step()`` is called.
        p_end: where p ends. Default 2 (SGD), the paper's.
        space: anneal "p", as the paper does and by default, or the "exponent" 1/(p−1), which can start at p = ∞.

    Raises:
        ValueError: S < 1, p_end < 1, an unknown space; p = ∞ in the space "p", p = 1 in the space "exponent", or
            p_end = 1 under scale="power"; no group of the optimizer has a p.
        TypeError: S is no integer, p_end no number, or the optimizer none.

    Source: arXiv:2606.02078.

    Example:
        >>> opt = normopt.LPSGDM(model.parameters(), lr=0.01, p=8.0)
        >>> sched = normopt.schedules.CosineP(opt, total_steps=3)
        >>> for _ in range(3):
        ...     print(opt.param_groups[0]["p"])
        ...     opt.step()
        ...     sched.step()
        8.0
        5.0
        2.0
    """

    def curve(self, t: float) -> float:
        return 0.0 if t == 1 else (1 + math.cos(math.pi * t)) / 2


class LinearP(AnnealedP):
    """p goes from its start to ``p_end`` in a straight line.

    ::

        p_s = p_start + (p_end − p_start)·(s−1)/(S−1)                      s = 1 … S, then p_end

    Args:
        optimizer: any optimizer with a p in its param groups; where they stand is p_start.
        total_steps: S ≥ 1, in optimizer steps or in epochs, as ``step()`` is called. S = 1 keeps p at its start.
        p_end: where p ends. Default 2 (SGD), as `CosineP`'s.
        space: anneal "p" (the default) or the "exponent" 1/(p−1), which can start at p = ∞.

    Raises:
        ValueError: as `CosineP`.
        TypeError: as `CosineP`.

    Source: ours, to compare with `CosineP`.
    """

    def curve(self, t: float) -> float:
        return 1 - t


class ConstantP(PSchedule):
    """p stays where it is: the control of the others, with the same calls.

    Args:
        optimizer: any optimizer with a p in its param groups.

    Raises:
        TypeError: what is given is not an optimizer.
        ValueError: no group of the optimizer has a p.

    Source: ours.
    """

    def p_at(self, start: float, s: int) -> float:
        return start


class PiecewiseP(PSchedule):
    """p jumps to given values at given steps.

    ::

        p_s = values[i] from the step after milestones[i] on, its start before the first

    Args:
        optimizer: any optimizer with a p in its param groups.
        milestones: how many ``step()`` calls until each jump: increasing integers ≥ 1, as in torch's MultiStepLR.
        values: p from each milestone on, as many as there are milestones; ∞ is allowed.

    Raises:
        ValueError: no milestones, not increasing, not as many values, or a value below 1; no group of the optimizer
            has a p.
        TypeError: a milestone is no integer, a value no number, or the optimizer none.

    Source: ours; the milestones are torch.optim.lr_scheduler.MultiStepLR's.
    """

    def __init__(self, optimizer: Optimizer, milestones: Sequence[int], values: Sequence[float]) -> None:
        for m in milestones:
            if isinstance(m, bool) or not isinstance(m, int):
                raise TypeError(f"milestones must be integers, but one is {m!r} ({type(m).__name__})")
        self.milestones = [int(m) for m in milestones]
        if not self.milestones or self.milestones[0] < 1 or sorted(set(self.milestones)) != self.milestones:
            raise ValueError(f"milestones must be increasing integers ≥ 1, at least one, but are {list(milestones)}")
        if len(values) != len(self.milestones):
            raise ValueError(f"{len(self.milestones)} milestones need as many values, but there are {len(values)}")
        for value in values:
            check_number("each value", value, low=1)
        self.values = [float(v) for v in values]
        super().__init__(optimizer)

    def p_at(self, start: float, s: int) -> float:
        passed = sum(m <= s - 1 for m in self.milestones)
        return self.values[passed - 1] if passed else start
