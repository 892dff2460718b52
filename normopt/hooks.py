"""Step hooks for any torch.optim optimizer that act once per training step, however steps are nested."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from traceback import walk_stack
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from normopt.sharding.layout import full_tensor

_TORCH_FILE = Optimizer.profile_hook_step.__code__.co_filename


class OutermostStep:
    """Decide whether a step hook acts: only in the outermost step, and not in one that only creates state.

    A ``step`` that calls the hooked ``step`` of its base class runs the hooks twice, nested; only the outer pair acts.
    A step that raised never ran its post-hook, so a counter alone would stay wrong. Such a step is recognized because
    its frame is no longer on the stack.

    Before it saves or loads an optimizer without state, torch.distributed.checkpoint calls ``step(closure=None)`` with
    zero gradients and an lr of 0. That is not a training step: no hook acts in it.
    """

    def __init__(self) -> None:
        self._frame: FrameType | None = None
        self._depth = 0
        self._active = True

    def enter(self, optimizer: Optimizer, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Return whether a step pre-hook should act: True unless the step is nested or only creates state.

        Args:
            optimizer, args, kwargs: the hook's arguments.
        """
        if self._frame is not None and any(frame is self._frame for frame, _ in walk_stack(sys._getframe())):
            self._depth += 1
            return False
        self._frame, self._depth = _step_frame(), 1
        self._active = not _creates_state(optimizer, args, kwargs)
        return self._active

    def leave(self) -> bool:
        """Return whether a step post-hook should act: at the end of the outermost step, if its pre-hook acted."""
        self._depth -= 1
        # The depth is wrong if a nested step raised and was caught; the frame differs if a graph break split the step.
        if self._depth != 0 and _step_frame() is not self._frame:
            return False
        self._frame = None
        return self._active

    def reset(self) -> None:
        """Forget any step in progress."""
        self._frame, self._depth = None, 0


@torch.no_grad()
def _creates_state(optimizer: Optimizer, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Return whether a step only creates state: closure=None was passed, state is empty, lr and gradients are zero.

    A training step may have an lr of 0 (start of a warm-up) or zero gradients, but hardly both in the first step.
    Tensor values are read last, and only if None was passed, so that an ordinary step never syncs with the device.
    """
    given = [*args[1:], *kwargs.values()]
    if len(given) != 1 or given[0] is not None or optimizer.state:
        return False
    params = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    if any(p.grad is None or p.grad.layout != torch.strided for p in params):
        return False
    lrs = [group.get("lr", 0) for group in optimizer.param_groups]
    if not all(isinstance(lr, (int, float, Tensor)) and float(lr) == 0 for lr in lrs):
        return False
    # With DTensors all ranks must agree: a sum of magnitudes reduces correctly under every placement.
    return all(float(full_tensor(torch.linalg.vector_norm(p.grad, 1))) == 0 for p in params)


def _step_frame() -> FrameType | None:
    """Return the frame of torch.optim's ``step`` wrapper that called this hook, if any."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code.co_filename != _TORCH_FILE:
        frame = frame.f_back
    return frame
