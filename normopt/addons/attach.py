"""Base class of add-ons: hooks, settings in the param groups, and checks of the optimizer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.optim import LBFGS, Optimizer

from normopt.hooks import OutermostStep

Closure = Callable[..., Any]
Hooks = OrderedDict[int, Any]
HookResult = tuple[tuple[Any, ...], dict[str, Any]]


class AddOn(ABC):
    """Base class of add-ons: hooks around an optimizer's ``step``, and settings in its param groups.

    Attaching adds the add-on's settings to each param group that lacks them. A group may set its own beforehand,
    and a schedule may write them. The optimizer's ``state_dict`` saves and restores them; a checkpoint without them
    leaves them unchanged. Groups added later get them at the next step.

    Add-on hooks always run before other hooks, so monitors see the modified gradients and weights.

    ``copy.deepcopy`` and ``pickle`` copy the param groups but not the hooks, as in torch.optim: attach the add-on
    again to a copy, which keeps the same settings.

    Attributes:
        optimizer: the optimizer that it is, or before ``detach()`` was, attached to.
    """

    def __init__(self, optimizer: Optimizer, settings: Mapping[str, Any]) -> None:
        self._check_optimizer(optimizer, settings)
        self.optimizer = optimizer
        self._settings = dict(settings)
        self._outermost = OutermostStep()
        self._fill_defaults()
        enter = optimizer.register_step_pre_hook(self._pre_hook)
        leave = optimizer.register_step_post_hook(self._post_hook)
        # Run before a monitor's hooks, so that it sees the gradients that the step reads and the final weights.
        cast(Hooks, optimizer._optimizer_step_pre_hooks).move_to_end(enter.id, last=False)
        cast(Hooks, optimizer._optimizer_step_post_hooks).move_to_end(leave.id, last=False)
        load = optimizer.register_load_state_dict_pre_hook(self._fill_checkpoint)
        self._handles = [enter, leave, load]

    def detach(self) -> None:
        """Remove the hooks and the settings in the param groups; further calls do nothing.

        The optimizer then behaves as if the add-on had never been attached, and another can be attached.
        """
        if not self._handles:
            return
        self._abort()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        for group in self.optimizer.param_groups:
            for key in self._settings:
                group.pop(key, None)

    def __repr__(self) -> str:
        """Return the optimizer's type and the settings; a list per setting where the groups differ."""
        kind, groups = f"{type(self).__name__}({_name(self.optimizer)}", self.optimizer.param_groups
        if not self._handles:
            return f"{kind}, detached)"
        settings = []
        for key, default in self._settings.items():
            values = [repr(group.get(key, default)) for group in groups]
            shown = values[0] if len(set(values)) == 1 else f"[{', '.join(values)}]"
            settings.append(f"{key}={shown}")
        return f"{kind}, {', '.join(settings)}, attached)"

    @abstractmethod
    def _check(self, where: str, group: Mapping[str, Any]) -> None:
        """Raise if the settings of a group, called ``where`` in messages, are invalid."""

    def _warn_new_group(self, group: Mapping[str, Any]) -> None:  # noqa: B027
        """Warn about a group that is new to the add-on, where its settings may surprise."""

    def _pre_step(self, closure: Closure | None) -> Closure | None:
        """Act before a step; given a closure, return its replacement."""
        if closure is None:
            self._on_gradients()
            return None

        def replacement(*args: Any, **kwargs: Any) -> Any:
            self._restore()
            loss = closure(*args, **kwargs)
            self._on_gradients()
            return loss

        return replacement

    @abstractmethod
    def _on_gradients(self) -> None:
        """Act on a step's gradients: before the step, or after each call of its closure."""

    def _restore(self) -> None:  # noqa: B027
        """Undo `_on_gradients`, before the closure computes new gradients and after the step. Default: nothing."""

    def _post_step(self, closure: Closure | None) -> None:
        """Act after a step."""
        self._restore()

    @abstractmethod
    def _abort(self) -> None:
        """Discard what an earlier step left behind if it raised."""

    def _check_optimizer(self, optimizer: object, settings: Mapping[str, Any]) -> None:
        name = type(self).__name__
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"{name} needs a torch.optim.Optimizer, but was given a {_name(optimizer)}")
        if not hasattr(optimizer, "_optimizer_step_pre_hooks"):
            raise TypeError(f"{_name(optimizer)} is a wrapper without step hooks: attach {name} before you wrap it")
        hooks = optimizer._optimizer_step_pre_hooks.values()  # an attached add-on's are its methods
        if type(self) in {type(getattr(hook, "__self__", None)) for hook in hooks}:
            raise ValueError(f"this {_name(optimizer)} has an {name} already: detach() that one first")
        if isinstance(optimizer, LBFGS):
            raise ValueError(
                f"{name} does not work with LBFGS, whose line search and curvature pairs need unmodified gradients and "
                "weights: use it with a first-order optimizer"
            )
        if taken := [f"{key}={value!r}" for key, value in settings.items() if key in optimizer.defaults]:
            raise ValueError(f"{_name(optimizer)} has settings of its own: use {', '.join(taken)} instead of {name}")
        if any(group.get("differentiable") for group in optimizer.param_groups):
            raise ValueError(f"{name} is not differentiable: set differentiable=False, or use an optimizer of normopt")

    def _fill_defaults(self) -> None:
        """Fill in missing settings in all groups, after checking every group, so that an error changes nothing."""
        groups = self.optimizer.param_groups
        complete = [{**self._settings, **group} for group in groups]
        for i, group in enumerate(complete):
            self._check(f"group {i}", group)
        new = [(group, old) for group, old in zip(complete, groups, strict=True) if len(group) > len(old)]
        for group, _ in new:
            self._warn_new_group(group)
        for group, old in new:
            old.update(group)

    @_disable_dynamo
    def _pre_hook(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> HookResult | None:
        if not self._outermost.enter(optimizer, args, kwargs):
            return None
        self._abort()
        self._fill_defaults()
        instead = self._pre_step(_closure(args, kwargs))
        if instead is None:
            return None
        if "closure" in kwargs:
            return args, {**kwargs, "closure": instead}
        return (args[0], instead, *args[2:]), kwargs

    @_disable_dynamo
    def _post_hook(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._outermost.leave():
            self._post_step(_closure(args, kwargs))

    def _fill_checkpoint(self, optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return a checkpoint with missing add-on settings filled in from the current groups."""
        kept = [{k: group[k] for k in self._settings if k in group} for group in optimizer.param_groups]
        saved = state_dict["param_groups"]
        kept += [{}] * (len(saved) - len(kept))  # torch reports a mismatch
        return {**state_dict, "param_groups": [{**k, **group} for k, group in zip(kept, saved, strict=False)]}


def check_dense_grads(params: Iterable[Tensor], name: str) -> None:
    """Raise a RuntimeError if a parameter has a sparse gradient."""
    for p in params:
        if p.grad is not None and p.grad.layout != torch.strided:
            raise RuntimeError(
                f"a gradient of shape {tuple(p.grad.shape)} is sparse, but {name} needs dense ones: use "
                "Embedding(sparse=False), or give these parameters to an optimizer without the add-on"
            )


def _name(thing: object) -> str:
    return type(thing).__name__


def _closure(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Closure | None:
    """Return the closure among a step's arguments, whose first is the optimizer; None without one."""
    given = kwargs.get("closure", args[1] if len(args) > 1 else None)
    return cast(Closure, given) if callable(given) else None
