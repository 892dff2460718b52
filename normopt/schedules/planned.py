"""Schedules of p, or of another setting, that depend only on the step number."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Literal

from torch.optim import Optimizer

from normopt._checks import check_choice, check_integer, check_number, names_arguments, warn
from normopt.schedules.base import PSchedule, interpolate_exponent


class AnnealedP(PSchedule):
    """Base class of schedules that anneal p from the group's p to ``p_end`` along a curve falling from 1 to 0.

    Attributes:
        steps: total_steps.
    """

    @names_arguments
    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        p_end: float = 2.0,
        space: Literal["p", "exponent"] = "p",
        *,
        setting: str = "p",
        end: float | None = None,
        last_epoch: int | None = None,
    ) -> None:
        check_integer("total_steps", total_steps)
        check_choice("space", space, ("p", "exponent"))
        if setting == "p" and end is not None:
            raise ValueError(f"end = {end} is the final value of another setting than p: use p_end")
        if setting != "p" and (space != "p" or p_end != 2 or end is None):
            raise ValueError(f"a schedule of {setting!r} takes its final value as end, and neither p_end nor space")
        if setting == "p":
            check_number("p_end", p_end, low=1)
        else:
            check_number("end", end, open_low=True, open_high=True)
        # Not as self.total_steps: of a scheduler that has it, Accelerate counts the steps, micro-batches too, and stops
        # after so many.
        self.steps, self.p_end, self.space = total_steps, float(p_end if end is None else end), space
        super().__init__(optimizer, setting, last_epoch)
        if last_epoch is None and 0 < self.last_epoch >= total_steps - 1:
            warn(
                f"{type(self).__name__} continues from step {self.last_epoch}, which the param groups keep: with "
                f"total_steps = {total_steps} nothing is left to do. To start at the current {setting}, give "
                "last_epoch=-1"
            )

    def _planned(self) -> list[float]:
        return [self.p_end]

    def p_at(self, start: float, s: int) -> float:
        """Return p at step s; raise, before any group is changed, if an endpoint is infinite in this space.

        Args:
            start: the group's p when the schedule was created.
            s: the step, 1, 2, …

        Raises:
            ValueError: an endpoint is ∞ in the space "p", or 1 in the space "exponent".
        """
        if self.space == "p" and math.inf in (start, self.p_end):
            raise ValueError('p = ∞ cannot be annealed in p itself: use space="exponent", which anneals 1/(p−1)')
        if self.space == "exponent" and 1 in (start, self.p_end):
            raise ValueError('1/(p−1) is undefined at p = 1: use space="p"')
        last = self.steps - 1
        weight = self.curve(min(s - 1, last) / last) if last else 1.0
        if self.space == "exponent":
            return interpolate_exponent(start, self.p_end, weight)
        return start if weight == 1 else self.p_end + (start - self.p_end) * weight

    @abstractmethod
    def curve(self, t: float) -> float:
        """Return the weight of the initial p, 1 at t = 0 and 0 at t = 1.

        Args:
            t: the fraction of the schedule that is done, from 0 to 1.
        """


class CosineP(AnnealedP):
    """The paper's schedule: anneal p from its initial value to 2 along half a cosine.

    ::

        p_s = p_end + (p_start − p_end)·(1 + cos(π(s−1)/(S−1)))/2          s = 1 … S, then p_end

    S = 1 keeps p at its initial value. The paper counts S in epochs; optimizer steps work as well.

    Args:
        optimizer: any optimizer with a p in its param groups; their p is p_start (the paper's p_max).
        total_steps: S ≥ 1, in optimizer steps or epochs: the unit in which ``step()`` is called.
        p_end: the final p. Default 2 (SGD), the paper's.
        space: anneal "p" (the default, as in the paper) or the "exponent" 1/(p−1), which can start at p = ∞.
        setting: another number of the param groups to move in place of p, from each group's own value. Default "p".
        end: the final value of that setting; None for p.
        last_epoch: the last step done, or None, to continue from the param groups; see `PSchedule`.

    Raises:
        ValueError: S < 1, p_end < 1, an unknown space; p = ∞ in the space "p", p = 1 in the space "exponent", or
            p_end = 1 under scale="power"; no group of the optimizer has a p, or the setting; another setting without
            end, or with p_end or space; a final value that the optimizer refuses.
        TypeError: S is not an integer, a final or initial value not a number, or ``optimizer`` not an optimizer.

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
    """Anneal p linearly from its initial value to ``p_end``.

    ::

        p_s = p_start + (p_end − p_start)·(s−1)/(S−1)                      s = 1 … S, then p_end

    Args:
        optimizer: any optimizer with a p in its param groups; their p is p_start.
        total_steps: S ≥ 1, in optimizer steps or epochs, as ``step()`` is called. S = 1 keeps p at its initial value.
        p_end: the final p. Default 2 (SGD), as for `CosineP`.
        space: anneal "p" (the default) or the "exponent" 1/(p−1), which can start at p = ∞.
        setting: another number of the param groups to move in place of p, from each group's own value. Default "p".
        end: the final value of that setting; None for p.
        last_epoch: the last step done, or None, to continue from the param groups; see `PSchedule`.

    From p = ∞ in the space "exponent", with a ``step()`` after every optimizer step, this is the schedule of gradual
    SGD (GSGD): `LPSGD` goes from signSGD, |g|⁰, to SGD, |g|¹.

    Raises:
        ValueError: as for `CosineP`.
        TypeError: as for `CosineP`.

    Source: Yuan, Liu and Nie, "Gradual Stochastic Gradient Descent: from signSGD to SGD via ℓp Norm", Sci4DL workshop,
    ICLR 2026, for the exponent from p = ∞; the rest is ours, for comparison with `CosineP`.

    Example:
        >>> opt = normopt.LPSGD(model.parameters(), lr=0.01, p=float("inf"))
        >>> gsgd = normopt.schedules.LinearP(opt, total_steps=1000, space="exponent")
    """

    def curve(self, t: float) -> float:
        return 1 - t


class ConstantP(PSchedule):
    """Keep p constant: the control for the other schedules, with the same interface.

    Args:
        optimizer: any optimizer with a p in its param groups.
        setting: another number of the param groups to keep in place of p. Default "p".
        last_epoch: the last step done, or None, to continue from the param groups; see `PSchedule`.

    Raises:
        TypeError: ``optimizer`` is not an optimizer.
        ValueError: no group of the optimizer has a p, or the setting.

    Source: ours.
    """

    def p_at(self, start: float, s: int) -> float:
        return start


class PiecewiseP(PSchedule):
    """Set p to given values at given steps.

    ::

        p_s = values[i] from the step after milestones[i] on; the initial p before the first

    Args:
        optimizer: any optimizer with a p in its param groups.
        milestones: the number of ``step()`` calls before each change: increasing integers ≥ 1, as in MultiStepLR.
        values: p from each milestone on, one value per milestone; ∞ is allowed.
        setting: another number of the param groups to set in place of p. Default "p".
        last_epoch: the last step done, or None, to continue from the param groups; see `PSchedule`.

    Raises:
        ValueError: milestones are missing or not increasing, their number differs from that of values, or a value is
            below 1 or refused by the optimizer; no group of the optimizer has a p, or the setting.
        TypeError: a milestone is not an integer, a value not a number, or ``optimizer`` not an optimizer.

    Source: ours; the milestones follow torch.optim.lr_scheduler.MultiStepLR.
    """

    @names_arguments
    def __init__(
        self,
        optimizer: Optimizer,
        milestones: Sequence[int],
        values: Sequence[float],
        *,
        setting: str = "p",
        last_epoch: int | None = None,
    ) -> None:
        for m in milestones:
            if isinstance(m, bool) or not isinstance(m, int):
                raise TypeError(f"milestones must be integers, but one is {m!r} ({type(m).__name__})")
        self.milestones = [int(m) for m in milestones]
        if not self.milestones or self.milestones[0] < 1 or sorted(set(self.milestones)) != self.milestones:
            raise ValueError(f"milestones must be one or more increasing integers ≥ 1, but are {list(milestones)}")
        if len(values) != len(self.milestones):
            raise ValueError(f"{len(self.milestones)} milestones need as many values, but got {len(values)}")
        for value in values:
            check_number("each value", value, low=1 if setting == "p" else -math.inf)
        self.values = [float(v) for v in values]
        super().__init__(optimizer, setting, last_epoch)

    def _planned(self) -> list[float]:
        return self.values

    def p_at(self, start: float, s: int) -> float:
        passed = sum(m <= s - 1 for m in self.milestones)
        return self.values[passed - 1] if passed else start
