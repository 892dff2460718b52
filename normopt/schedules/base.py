"""Base class of schedules of p and other settings: where the value is stored, when it changes, how it is saved."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from typing import Any, NoReturn, Self

from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from normopt._checks import check_integer, check_number, near, warn
from normopt.hooks import OutermostStep
from normopt.loading import SCHEDULES

UNSAVED = {"optimizer", "_known", "_step_count"}


class PSchedule(LRScheduler, ABC):
    """Base class of schedules of p. It sets p in the param groups on construction and after every ``step()``.

    A schedule with S steps visits s = 1 … S: s = 1 on construction, and the next s with every ``step()``.
    Call ``step()`` once per optimizer step or once per epoch, whichever S counts. After S, p keeps its last
    value. p is stored in the param group (``group["p"]``), where it is visible and saved with the optimizer.
    Groups whose norm has no p are skipped.

    ``setting`` names another number of the param groups to move in place of p, such as "momentum" or "norm_exponent".
    Groups where it is missing or None are skipped. Everything said here of p applies to it, too.

    A schedule is a ``torch.optim.lr_scheduler.LRScheduler``, so that trainers take it as one. It does not change lr:
    ``get_lr()`` and ``get_last_lr()`` return the optimizer's. Where there is one place for a scheduler and lr has to
    move too, use torch's ``ChainedScheduler([lr_scheduler, schedule])``. torch's ``SequentialLR`` and ignite's
    ``LRScheduler``, which do not call ``step()`` alone, are refused.

    Each group keeps its initial p as ``group["initial_p"]`` and the number of steps made as
    ``group["last_epoch_of_p"]``, as torch keeps ``initial_lr``. Both are saved with the optimizer, and a schedule
    continues from there: at its next ``step()`` if it was made before ``optimizer.load_state_dict()``, at once if
    after. So the optimizer's state is enough to resume; ``state_dict()`` is for trainers that save schedulers. If both
    the optimizer's state and the schedule's are loaded, the one loaded last is used.

    Subclasses define p at step s, given the group's initial p (``p_at``).

    Args:
        optimizer: any optimizer with a p in its param groups.
        setting: the name of the setting. Default "p".
        last_epoch: None (default) continues from the step that the groups keep, if any, or starts; −1 starts at
            the current p in any case; n ≥ 0 is the last step done, as in torch, and needs ``initial_p`` in the groups.

    Attributes:
        optimizer: the optimizer.
        base_ps: each param group's initial p; None for a group without p.
        last_epoch: the number of steps made, s − 1.

    Raises:
        TypeError: ``optimizer`` is not an optimizer, or a group's p is not a number.
        ValueError: no group of the optimizer has a p, or last_epoch ≥ 0 and none an ``initial_p``.

    Warns:
        UserWarning: in ``step()``, if p is not what the schedule set last: something else changed it.

    Source: the paper that schedules p is arXiv:2606.02078; the interface is torch.optim.lr_scheduler's.
    """

    _step_count = 0  # Accelerate adds to it in steps that only accumulate gradients; nothing here reads it

    def __init__(self, optimizer: Optimizer, setting: str = "p", last_epoch: int | None = None) -> None:
        # Not torch's __init__, which would wrap optimizer.step, keep an initial_lr and write lr.
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"a schedule takes an optimizer, but was given {type(optimizer).__name__}")
        if last_epoch is not None:
            check_integer("last_epoch", last_epoch, low=-1)
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
        self.last_epoch = 0
        self._known: list[tuple[dict[str, Any] | None, object]] = []  # each group and the p that it was given last
        keep = [i for i, group in enumerate(groups) if self._initial in group]
        if keep and last_epoch != -1:
            self._recall()
            del self.base_ps[keep[-1] + 1 :]  # groups that were added after that schedule was made
        if last_epoch is not None and last_epoch >= 0:
            if not keep:
                raise ValueError(
                    f"last_epoch = {last_epoch} needs the {setting} that the schedule began with, which no group has: "
                    f'load the state of an optimizer that had a schedule, or set group["{self._initial}"]'
                )
            self.last_epoch = last_epoch + 1
        for value in self._planned():
            self._check_value(value)
        self._set()

    @property
    def _initial(self) -> str:
        return f"initial_{self.setting}"

    @property
    def _done(self) -> str:
        return f"last_epoch_of_{self.setting}"

    def _planned(self) -> list[float]:
        """Return the values, known in advance, to check before anything is set."""
        return []

    def _check_value(self, value: float) -> None:
        """Refuse a value that a normopt optimizer would refuse when the schedule arrives there."""
        make = getattr(self.optimizer, "_make_recipe", None)
        for start, group in zip(self.base_ps, self.optimizer.param_groups, strict=False):
            if make is not None and start is not None:
                make({**group, self.setting: value}, group["params"])

    @abstractmethod
    def p_at(self, start: float, s: int) -> float:
        """Return a group's p at step s.

        Args:
            start: the group's p when the schedule began.
            s: the step, 1, 2, …
        """

    def _p_of(self, i: int, start: float, s: int) -> float:
        """Return p at step s of group i; overridden by schedules that treat groups differently."""
        return self.p_at(start, s)

    def step(self, epoch: int | None = None) -> None:
        """Advance every group's p by one step.

        Args:
            epoch: the number of steps made, to go there instead; as in torch.

        Warns:
            UserWarning: p is not what the schedule set last.
        """
        self._recall()
        self._go_to(self.last_epoch + 1 if epoch is None else epoch)

    def step_with_optimizer(self) -> Self:
        """Call ``step()`` after every step of the optimizer, for scripts that have no place for a second scheduler.

        Then do not call it yourself, nor give the schedule to a trainer. A step that a GradScaler skips, if it does not
        call ``optimizer.step()``, is not counted. ``copy.deepcopy`` and ``pickle`` of an optimizer drop its hooks.

        Returns:
            The schedule.

        Raises:
            TypeError: the optimizer is a wrapper without step hooks.

        Example:
            >>> opt = normopt.LPSGDM(model.parameters(), lr=0.01, p=8.0)
            >>> sched = normopt.schedules.CosineP(opt, total_steps=1000).step_with_optimizer()
        """
        hooks = getattr(self.optimizer, "_optimizer_step_post_hooks", None)
        if hooks is None:
            name = type(self.optimizer).__name__
            raise TypeError(f"{name} is a wrapper without step hooks: make the schedule before you wrap the optimizer")
        if not any(getattr(hook, "schedule", None) is self for hook in hooks.values()):
            outermost = OutermostStep()

            @_disable_dynamo
            def leave(*_: Any) -> None:
                if outermost.leave():
                    self.step()

            leave.schedule = self  # type: ignore[attr-defined]
            self.optimizer.register_step_pre_hook(_disable_dynamo(lambda *call: (outermost.enter(*call), None)[1]))
            self.optimizer.register_step_post_hook(leave)
        return self

    def get_last_p(self) -> list[float | Tensor | None]:
        """Return the current p of each param group; None for a group without p."""
        return [group.get(self.setting) for group in self.optimizer.param_groups]

    def get_lr(self) -> list[float | Tensor]:
        """Return the optimizer's learning rates, which a schedule of p leaves as they are.

        Raises:
            TypeError: a wrapper asks for them to set lr, as ignite's ``LRScheduler`` does, and never calls ``step()``.
        """
        if self._get_lr_called_within_step:
            raise TypeError(
                f"{type(self).__name__} moves {self.setting} in step(), which a wrapper that sets lr from get_lr() "
                "does not call: in ignite, trainer.add_event_handler(Events.ITERATION_COMPLETED, lambda: sched.step())"
            )
        return self.get_last_lr()

    def get_last_lr(self) -> list[float | Tensor]:
        """Return the optimizer's learning rates."""
        lrs = [group["lr"] for group in self.optimizer.param_groups]
        return [lr.clone() if isinstance(lr, Tensor) else lr for lr in lrs]

    def _initial_step(self) -> NoReturn:
        raise TypeError(
            f"SequentialLR starts its schedulers again, which {type(self).__name__} does not: use ChainedScheduler for "
            "a schedule of p beside one of lr, and PiecewiseP or a PSchedule of your own for one in several parts"
        )

    def _update_lr(self, epoch: int | None = None) -> NoReturn:
        self._initial_step()

    def state_dict(self) -> dict[str, Any]:
        """Return everything but the optimizer, as primitive values."""
        return {"schedule": type(self).__name__} | {k: v for k, v in self.__dict__.items() if k not in UNSAVED}

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
        trial._set()
        self.__dict__.update(trial.__dict__)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        SCHEDULES.add(self)

    def __repr__(self) -> str:
        state = ", ".join(f"{k}={v}" for k, v in self.state_dict().items() if k != "schedule")
        return f"{type(self).__name__}({state})"

    def _memory(self, i: int) -> dict[str, Any]:
        """Return what group i keeps of the schedule, beside p."""
        return {self._initial: self.base_ps[i], self._done: self.last_epoch}

    def _remember(self, i: int, group: dict[str, Any]) -> None:
        """Take over what group i, of a checkpoint of the optimizer, keeps of the schedule."""
        self.base_ps[i] = group[self._initial]
        self.last_epoch = group.get(self._done, self.last_epoch)

    def _recall(self) -> None:
        """Continue from the param groups, if a state of the optimizer was loaded; warn if something else changed p."""
        groups = self.optimizer.param_groups[: len(self.base_ps)]
        kept = [self._memory(i) for i in range(len(groups))]
        known = self._known or [(None, None)] * len(groups)
        for i, (group, ours, (seen, p)) in enumerate(zip(groups, kept, known, strict=False)):
            if self.base_ps[i] is None or group.get(self.setting) is None:
                continue
            moved = self._initial in group and any(group.get(key) != value for key, value in ours.items())
            now = group[self.setting]
            if self._known and (group is seen if moved else not isinstance(now, Tensor) and now != p):
                another = " and a checkpoint of an optimizer without a schedule" if group is not seen else ""
                warn(
                    f"the {self.setting} of group {i} is {now}, but {type(self).__name__} has set it to {p}: something "
                    f"else has changed it, such as another schedule{another}. It continues from step "
                    f"{group.get(self._done, self.last_epoch)}; for another step give last_epoch, or load the "
                    "schedule's state"
                )
            if moved:
                self._remember(i, group)

    def _go_to(self, epoch: int) -> None:
        before, self.last_epoch = self.last_epoch, epoch
        try:
            self._set()
        except Exception:
            self.last_epoch = before
            raise

    def _set(self) -> None:
        # Compute all before setting any, so that an error changes nothing.
        s = self.last_epoch + 1
        ps = [None if start is None else self._p_of(i, start, s) for i, start in enumerate(self.base_ps)]
        # Groups added after construction keep their own p, as with torch's LR schedulers.
        self._known = []
        SCHEDULES.add(self)
        for i, (group, p) in enumerate(zip(self.optimizer.param_groups, ps, strict=False)):
            self._known.append((group, p))
            if p is None:
                continue
            if isinstance(group[self.setting], Tensor):
                group[self.setting].fill_(p)  # in place, because a compiled or captured step reads this tensor
            else:
                group[self.setting] = p
            group.update(self._memory(i))


def interpolate_exponent(start: float, end: float, weight: float) -> float:
    """Interpolate p linearly in 1/(p−1): ``start`` at weight 1, ``end`` at weight 0; neither may be 1."""
    if weight == 1:
        return start
    e_start, e_end = 1 / (start - 1), 1 / (end - 1)
    exponent = e_end + (e_start - e_end) * weight
    if weight == 0 or exponent == 0:
        return end
    return 1 + 1 / exponent
