"""How an add-on hangs on an optimizer: its hooks, its settings in the param groups, and what it refuses to hang on."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim import LBFGS, Optimizer

from normopt.hooks import OutermostStep

Closure = Callable[..., Any]
Group = dict[str, Any]
Call = tuple[tuple[Any, ...], dict[str, Any]]

# Which kinds of add-on an optimizer carries. Not the add-ons: they would keep it alive.
_carried: WeakKeyDictionary[Optimizer, set[type[AddOn]]] = WeakKeyDictionary()


class AddOn(ABC):
    """What every add-on is: hooks around an optimizer's ``step``, and settings in its param groups.

    Attaching gives each param group the settings that it lacks, under names of the add-on. There a group may set its
    own beforehand, a schedule may write them, and the optimizer's ``state_dict`` saves and restores them; a checkpoint
    that lacks them leaves them as they are. Groups that are added later get them at the next step.

    Its hooks run before those of others, whenever they were attached: what watches an optimizer sees what add-ons do.

    The hooks are not part of what ``copy.deepcopy`` and ``pickle`` copy, as torch.optim has it, while the param groups
    are: attach again to a copy, and it goes on with the same settings.

    Attributes:
        optimizer: what it is attached to, or was until ``detach()``.
    """

    def __init__(self, optimizer: Optimizer, settings: Mapping[str, Any]) -> None:
        self._refuse(optimizer, settings)
        self.optimizer = optimizer
        self._settings = dict(settings)
        self._outermost = OutermostStep()
        self._complete_groups()
        enter = optimizer.register_step_pre_hook(self._enter)
        leave = optimizer.register_step_post_hook(self._leave)
        # Before those of a monitor, which is to see the gradients that the step reads and the weights that it leaves.
        for hooks, handle in (
            (optimizer._optimizer_step_pre_hooks, enter),
            (optimizer._optimizer_step_post_hooks, leave),
        ):
            cast(OrderedDict[int, Any], hooks).move_to_end(handle.id, last=False)
        load = optimizer.register_load_state_dict_pre_hook(self._complete_checkpoint)
        self._handles = [enter, leave, load]
        _carried.setdefault(optimizer, set()).add(type(self))

    def detach(self) -> None:
        """Take the add-on off: its hooks, and its settings in the param groups; once is enough.

        The optimizer goes on as one that never carried it, and can be given another.
        """
        if not self._handles:
            return
        self._recover()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for group in self.optimizer.param_groups:
            for key in self._settings:
                group.pop(key, None)
        _carried[self.optimizer].discard(type(self))

    def __repr__(self) -> str:
        """What it is attached to and what it is set to: where the groups differ, the settings of all of them."""
        kind, groups = f"{type(self).__name__}({_name(self.optimizer)}", self.optimizer.param_groups
        if not self._handles:
            return f"{kind}, detached)"
        settings = []
        for key, default in self._settings.items():
            values = [repr(group.get(key, default)) for group in groups]
            shown = f"[{', '.join(values)}]" if len(set(values)) > 1 else values[0] if values else repr(default)
            settings.append(f"{key}={shown}")
        return f"{kind}, {', '.join(settings)}, attached)"

    @abstractmethod
    def _check(self, where: str, group: Mapping[str, Any]) -> None:
        """Raise unless the settings of a group, called ``where``, can be worked with."""

    def _greet(self, group: Mapping[str, Any]) -> None:  # noqa: B027
        """Warn of what may surprise in a group that is new to the add-on."""

    @abstractmethod
    def _before(self, closure: Closure | None) -> Closure | None:
        """What is done before a step; with a closure, the one to call in its place."""

    @abstractmethod
    def _after(self, closure: Closure | None) -> None:
        """What is done after a step."""

    @abstractmethod
    def _recover(self) -> None:
        """Forget a step that raised, if one did."""

    def _refuse(self, optimizer: object, settings: Mapping[str, Any]) -> None:
        name = type(self).__name__
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"{name} is attached to a torch.optim.Optimizer, but was given a {_name(optimizer)}")
        if not hasattr(optimizer, "_optimizer_step_pre_hooks"):
            raise TypeError(
                f"this {_name(optimizer)} wraps an optimizer and has no step hooks of its own: attach {name} to the "
                "optimizer before you wrap it"
            )
        if type(self) in _carried.get(optimizer, ()):
            raise ValueError(f"this {_name(optimizer)} carries an {name} already: detach() that one first")
        if isinstance(optimizer, LBFGS):
            raise ValueError(
                f"{name} has no meaning under LBFGS, whose line search and curvature pairs need the gradient of the "
                "function that it evaluates, at the weights that it left: use it with a first-order optimizer"
            )
        if taken := sorted(settings.keys() & optimizer.defaults.keys()):
            raise ValueError(f"{_name(optimizer)} has settings called {', '.join(taken)} of its own: use those")
        if any(group.get("differentiable") for group in optimizer.param_groups):
            raise ValueError(
                f"autograd does not see what {name} does: set differentiable=False, or use an optimizer of normopt"
            )

    def _complete_groups(self) -> None:
        """Give new groups the settings that they lack, once all of all groups are found to be good."""
        complete = [{**self._settings, **group} for group in self.optimizer.param_groups]
        for i, group in enumerate(complete):
            self._check(f"group {i}", group)
        for group, old in zip(complete, self.optimizer.param_groups, strict=True):
            if group.keys() != old.keys():
                self._greet(group)
        for group, old in zip(complete, self.optimizer.param_groups, strict=True):
            old.update(group)

    @_disable_dynamo
    def _enter(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        if not self._outermost.enter(optimizer, args, kwargs):
            return None
        self._recover()
        self._complete_groups()
        instead = self._before(_closure(args, kwargs))
        if instead is None:
            return None
        return (
            (args, {**kwargs, "closure": instead}) if "closure" in kwargs else ((args[0], instead, *args[2:]), kwargs)
        )

    @_disable_dynamo
    def _leave(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._outermost.leave():
            self._after(_closure(args, kwargs))

    def _complete_checkpoint(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        """A checkpoint with the settings that it lacks taken from the groups that it is loaded into."""
        kept = [{k: group[k] for k in self._settings if k in group} for group in optimizer.param_groups]
        saved = state_dict["param_groups"]
        kept += [{}] * (len(saved) - len(kept))  # a mismatch is torch's to report
        return {**state_dict, "param_groups": [{**k, **group} for k, group in zip(kept, saved, strict=False)]}


def refuse_sparse(params: Iterable[Tensor], name: str) -> None:
    """Raise a RuntimeError if one of the parameters has a sparse gradient."""
    for p in params:
        if p.grad is not None and p.grad.layout != torch.strided:
            raise RuntimeError(
                f"a gradient of shape {tuple(p.grad.shape)} is sparse, and {name} takes dense ones only: use "
                "Embedding(sparse=False), or give these parameters to an optimizer without it"
            )


def _name(thing: object) -> str:
    return type(thing).__name__


def _closure(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Closure | None:
    """The closure among the arguments of a step, of which the first is the optimizer."""
    given = kwargs.get("closure", args[1] if len(args) > 1 else None)
    return cast(Closure, given) if callable(given) else None
