"""Schedules of p: how the norm's order moves over training. Same habits as torch's LR schedulers."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

from torch import Tensor
from torch.optim import Optimizer

from normopt._checks import check_choice, check_number


class PSchedule(ABC):
    """What every schedule of p does: set p in the param groups, at once and after every ``step()``.

    A schedule with S steps visits s = 1 … S: s = 1 when it is made, and one further with every
    ``step()``, called once after each optimizer step or once after each epoch, as S counts. Past its
    end it stays at its last value. p lives in the param group (``group["p"]``), where it is visible
    and saved with the optimizer; groups whose norm has no p are passed over.

    Subclasses say what p is at step s, given where the group started (``p_at``).

    Raises:
        TypeError: what is given is not an optimizer.
        ValueError: no group of the optimizer has a p.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"a schedule of p takes an optimizer, but was given {type(optimizer).__name__}")
        self.optimizer = optimizer
        starts = [group.get("p") for group in optimizer.param_groups]
        self.base_ps: list[float | None] = [None if p is None else float(p) for p in starts]
        if all(p is None for p in self.base_ps):
            raise ValueError(
                "no param group of this optimizer has a p to schedule: use a norm that has one, such as "
                'normopt.LPSGDM or SteepestDescent(norm="lp", p=8.0)'
            )
        self.last_step = 1
        self._set(self.base_ps, self.last_step)

    @abstractmethod
    def p_at(self, start: float, s: int) -> float:
        """p at step s = 1, 2, …, of a group that started at ``start``."""

    def step(self) -> None:
        """Move every group's p one step on."""
        self._set(self.base_ps, self.last_step + 1)
        self.last_step += 1

    def get_last_p(self) -> list[float | Tensor | None]:
        """The p of each param group as it is now; None for a group without one."""
        return [group.get("p") for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """Everything but the optimizer, as primitive values."""
        return {"schedule": type(self).__name__} | {k: v for k, v in self.__dict__.items() if k != "optimizer"}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the saved schedule was, and set p in the param groups to what it was there.

        Raises:
            ValueError: the state is of another kind of schedule, or of more groups than there are.
        """
        if state_dict.get("schedule") != type(self).__name__:
            raise ValueError(
                f"this state is of {state_dict.get('schedule', 'no schedule of p')}, not of {type(self).__name__}: "
                "load it into the kind of schedule that saved it"
            )
        # Fewer is fine: the optimizer may have got groups after the schedule was made.
        groups, starts = self.optimizer.param_groups, state_dict["base_ps"]
        if len(starts) > len(groups):
            raise ValueError(
                f"this state is of {len(starts)} param groups, but the optimizer has only {len(groups)}: rebuild the "
                "groups as they were saved"
            )
        for i, (start, group) in enumerate(zip(starts, groups, strict=False)):
            if (start is None) != (group.get("p") is None):
                has = ("none", "one") if start is None else ("one", "none")
                raise ValueError(
                    f"group {i} has {has[1]} p here and {has[0]} in this state: rebuild the groups as saved"
                )
        trial = copy.copy(self)
        trial.__dict__.update({k: v for k, v in state_dict.items() if k != "schedule"})
        trial._set(trial.base_ps, trial.last_step)
        self.__dict__.update(trial.__dict__)

    def __repr__(self) -> str:
        state = ", ".join(f"{k}={v}" for k, v in self.state_dict().items() if k != "schedule")
        return f"{type(self).__name__}({state})"

    def _set(self, starts: list[float | None], s: int) -> None:
        ps = [None if start is None else self.p_at(start, s) for start in starts]  # all of them, or none is set
        # Groups added since the schedule was made keep their own p, as under torch's LR schedulers.
        for group, p in zip(self.optimizer.param_groups, ps, strict=False):
            if isinstance(group.get("p"), Tensor):
                group["p"].fill_(p)  # in place: a compiled or captured step reads this very tensor
            elif p is not None:
                group["p"] = p


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
        """p at step s; refused, before any group is touched, where the curve cannot leave or reach its ends."""
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
        e_start, e_end = 1 / (start - 1), 1 / (self.p_end - 1)
        exponent = e_end + (e_start - e_end) * weight
        if weight == 0 or exponent == 0:
            return self.p_end
        return 1 + 1 / exponent

    @abstractmethod
    def curve(self, t: float) -> float:
        """1 at t = 0 and 0 at t = 1."""


class CosineP(AnnealedP):
    """The paper's schedule: p falls from its start to 2 along half a cosine.

    ::

        p_s = p_end + (p_start − p_end)·(1 + cos(π(s−1)/(S−1)))/2          s = 1 … S, then p_end

    S = 1 keeps p at its start. The paper counts S in epochs; counting optimizer steps is as good.

    Args:
        optimizer: any optimizer with a p in its param groups; where they stand is p_start (p_max there).
        total_steps: S ≥ 1.
        p_end: where p ends. Default 2 (SGD), the paper's.
        space: anneal "p", as the paper does, or the "exponent" 1/(p−1), which can start at p = ∞.

    Raises:
        ValueError: S < 1, or p = ∞ in the space "p".

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
    """p goes from its start to ``p_end`` in a straight line; arguments and errors as for `CosineP`.

    ::

        p_s = p_start + (p_end − p_start)·(s−1)/(S−1)                      s = 1 … S, then p_end
    """

    def curve(self, t: float) -> float:
        return 1 - t


class ConstantP(PSchedule):
    """p stays where it is: the control of the others, with the same calls."""

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
        ValueError: no milestones, not increasing, not as many values, or a value below 1.
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


__all__ = ["ConstantP", "CosineP", "LinearP", "PSchedule", "PiecewiseP"]
