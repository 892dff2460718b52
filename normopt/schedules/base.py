"""Base class of schedules of p and other settings: where the value is stored, when it changes, how it is saved."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from normopt._checks import check_number, near


class PSchedule(ABC):
    """Base class of schedules of p. It sets p in the param groups on construction and after every ``step()``.

    A schedule with S steps visits s = 1 … S: s = 1 on construction, and the next s with every ``step()``.
    Call ``step()`` once per optimizer step or once per epoch, whichever S counts. After S, p keeps its last
    value. p is stored in the param group (``group["p"]``), where it is visible and saved with the optimizer.
    Groups whose norm has no p are skipped.

    ``setting`` names another number of the param groups to move in place of p, such as "momentum" or "norm_exponent".
    Groups where it is missing or None are skipped, and what is said of p holds for it.

    Subclasses define p at step s, given the group's initial p (``p_at``).

    Args:
        optimizer: any optimizer with a p in its param groups.
        setting: the name of the setting. Default "p".

    Attributes:
        optimizer: the optimizer.
        base_ps: each param group's p when the schedule was created; None for a group without p.
        last_step: s, initially 1.

    Raises:
        TypeError: ``optimizer`` is not an optimizer, or a group's p is not a number.
        ValueError: no group of the optimizer has a p.

    Source: the paper that schedules p is arXiv:2606.02078; the interface follows torch.optim.lr_scheduler.
    """

    def __init__(self, optimizer: Optimizer, setting: str = "p") -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"a schedule takes an optimizer, but was given {type(optimizer).__name__}")
        self.optimizer, self.setting = optimizer, setting
        groups = optimizer.param_groups
        starts = [group.get(setting) for group in groups]
        for i, start in enumerate(starts):
            if start is not None:
                check_number(f"{setting} of group {i}", start, tensor=True)
        if all(start is None for start in starts):
            names = {name for group in groups for name in group}
            remedy = (
                'use a norm with a p, such as normopt.LPSGDM or SteepestDescent(norm="lp", p=8.0)'
                if setting == "p"
                else f"give its initial value to the optimizer or to a param group{near(setting, names - {setting})}"
            )
            raise ValueError(f"no param group of this optimizer has a {setting} to schedule: {remedy}")
        self.base_ps: list[float | None] = [None if start is None else float(start) for start in starts]
        self.last_step = 1
        self._set(self.last_step)

    def _check_planned(self, value: float) -> None:
        """Refuse a value that a normopt optimizer would refuse when the schedule arrives there."""
        make = getattr(self.optimizer, "_make_recipe", None)
        for start, group in zip(self.base_ps, self.optimizer.param_groups, strict=False):
            if make is not None and start is not None:
                make({**group, self.setting: value}, group["params"])

    @abstractmethod
    def p_at(self, start: float, s: int) -> float:
        """Return a group's p at step s.

        Args:
            start: the group's p when the schedule was created.
            s: the step, 1, 2, …
        """

    def _p_of(self, i: int, start: float, s: int) -> float:
        """Return p at step s of group i; overridden by schedules that treat groups differently."""
        return self.p_at(start, s)

    def step(self) -> None:
        """Advance every group's p by one step."""
        self._set(self.last_step + 1)
        self.last_step += 1

    def get_last_p(self) -> list[float | Tensor | None]:
        """Return the current p of each param group; None for a group without p."""
        return [group.get(self.setting) for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """Return everything but the optimizer, as primitive values."""
        return {"schedule": type(self).__name__} | {k: v for k, v in self.__dict__.items() if k != "optimizer"}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore a saved schedule, and set p in the param groups accordingly.

        Args:
            state_dict: the result of ``state_dict()`` of a schedule of the same class.

        Raises:
            ValueError: the state is from another schedule class, has more groups than the optimizer, or disagrees
                about which groups have a p. Nothing is changed then.
        """
        if state_dict.get("schedule") != type(self).__name__:
            raise ValueError(
                f"this state is from {state_dict.get('schedule', 'no schedule of p')}, not from {type(self).__name__}: "
                "load it into the class of schedule that saved it"
            )
        # Fewer is fine: groups may have been added to the optimizer after the schedule was created.
        trial = copy.copy(self)
        trial.__dict__.update({k: v for k, v in state_dict.items() if k != "schedule"})
        groups, starts, name = self.optimizer.param_groups, trial.base_ps, trial.setting
        remedy = "rebuild the groups that were saved"
        if len(starts) > len(groups):
            raise ValueError(f"this state has {len(starts)} param groups, the optimizer has {len(groups)}: {remedy}")
        for i, (start, group) in enumerate(zip(starts, groups, strict=False)):
            if (start is None) != (group.get(name) is None):
                ours, saved = ("a", "no") if start is None else ("no", "a")
                raise ValueError(f"group {i} has {ours} {name} here and {saved} {name} in this state: {remedy}")
        trial._set(trial.last_step)
        self.__dict__.update(trial.__dict__)

    def __repr__(self) -> str:
        state = ", ".join(f"{k}={v}" for k, v in self.state_dict().items() if k != "schedule")
        return f"{type(self).__name__}({state})"

    def _set(self, s: int) -> None:
        # Compute all before setting any, so that an error changes nothing.
        ps = [None if start is None else self._p_of(i, start, s) for i, start in enumerate(self.base_ps)]
        # Groups added after construction keep their own p, as with torch's LR schedulers.
        for group, p in zip(self.optimizer.param_groups, ps, strict=False):
            if p is not None and isinstance(group[self.setting], Tensor):
                group[self.setting].fill_(p)  # in place, because a compiled or captured step reads this tensor
            elif p is not None:
                group[self.setting] = p


def interpolate_exponent(start: float, end: float, weight: float) -> float:
    """Interpolate p linearly in 1/(p−1): ``start`` at weight 1, ``end`` at weight 0; neither may be 1."""
    if weight == 1:
        return start
    e_start, e_end = 1 / (start - 1), 1 / (end - 1)
    exponent = e_end + (e_start - e_end) * weight
    if weight == 0 or exponent == 0:
        return end
    return 1 + 1 / exponent
