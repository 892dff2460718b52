"""What all schedules of p share: where p lives, when it moves, how it is saved."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from normopt._checks import check_number


class PSchedule(ABC):
    """What every schedule of p does: set p in the param groups, at once and after every ``step()``.

    A schedule with S steps visits s = 1 … S: s = 1 when it is made, and one further with every
    ``step()``, called once after each optimizer step or once after each epoch, as S counts. Past its
    end it stays at its last value. p lives in the param group (``group["p"]``), where it is visible
    and saved with the optimizer; groups whose norm has no p are passed over.

    Subclasses say what p is at step s, given where the group started (``p_at``).

    Args:
        optimizer: any optimizer with a p in its param groups.

    Attributes:
        optimizer: the one that it was given.
        base_ps: p of each param group when the schedule was made; None for a group without one.
        last_step: s, 1 at first.

    Raises:
        TypeError: what is given is not an optimizer, or a group's p is no number.
        ValueError: no group of the optimizer has a p.

    Source: the paper that schedules p is arXiv:2606.02078; the habits are those of torch.optim.lr_scheduler.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"a schedule of p takes an optimizer, but was given {type(optimizer).__name__}")
        self.optimizer = optimizer
        starts = [group.get("p") for group in optimizer.param_groups]
        for i, p in enumerate(starts):
            if p is not None:
                check_number(f"p of group {i}", p, tensor=True)
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
        """p at step s of a group.

        Args:
            start: p of the group when the schedule was made.
            s: the step, 1, 2, …
        """

    def _p_of(self, i: int, start: float, s: int) -> float:
        """p at step s of group i, for a schedule that does not treat all groups alike."""
        return self.p_at(start, s)

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

        Args:
            state_dict: what ``state_dict()`` of a schedule of the same kind gave.

        Raises:
            ValueError: the state is of another kind of schedule, of more groups than there are, or of groups of
                which others have a p; nothing is changed then.
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
        # All of them, or none is set.
        ps = [None if start is None else self._p_of(i, start, s) for i, start in enumerate(starts)]
        # Groups added since the schedule was made keep their own p, as under torch's LR schedulers.
        for group, p in zip(self.optimizer.param_groups, ps, strict=False):
            if isinstance(group.get("p"), Tensor):
                group["p"].fill_(p)  # in place: a compiled or captured step reads this very tensor
            elif p is not None:
                group["p"] = p


def interpolate_exponent(start: float, end: float, weight: float) -> float:
    """p whose 1/(p−1) lies between those of two orders: ``start`` at weight 1, ``end`` at weight 0; neither is 1."""
    if weight == 1:
        return start
    e_start, e_end = 1 / (start - 1), 1 / (end - 1)
    exponent = e_end + (e_start - e_end) * weight
    if weight == 0 or exponent == 0:
        return end
    return 1 + 1 / exponent
