"""Step hooks of any torch.optim optimizer, of which only the outermost act."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from normopt.sharding.layout import whole

_TORCHS_FILE = Optimizer.profile_hook_step.__code__.co_filename


class OutermostStep:
    """Tells the hooks of a step from those of a step within it, and of one that is there to create state alone.

    A ``step`` that calls the hooked ``step`` of its base class runs the hooks twice, one pair within the other; the
    outer pair is to act. A step that raised never ran its post-hook: it is known by its frame, which is no longer on
    the stack, because a count alone would stay wrong from then on.

    Before it saves or loads an optimizer without state, torch.distributed.checkpoint calls its ``step(closure=None)``
    with zero gradients and an lr of 0. That is no step of the training: no hook acts in it.
    """

    def __init__(self) -> None:
        self._frame: FrameType | None = None
        self._depth = 0
        self._acts = True

    def enter(self, optimizer: Optimizer, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """For a step pre-hook: whether it is to act. Not in a part of a step that was entered already.

        Args:
            optimizer, args, kwargs: what the hook was given.
        """
        if self._frame is not None and _on_the_stack(self._frame):
            self._depth += 1
            return False
        self._frame, self._depth = _step_frame(), 1
        self._acts = not _creates_state(optimizer, args, kwargs)
        return self._acts

    def leave(self) -> bool:
        """For a step post-hook: whether it is to act: at the end of the step that was entered, if that was to."""
        self._depth -= 1
        # A step within may have raised and been caught, which leaves the depth wrong; a compiler may have cut the step
        # in two, which leaves the frame another.
        if self._depth != 0 and _step_frame() is not self._frame:
            return False
        self._frame = None
        return self._acts

    def forget(self) -> None:
        """No step was entered."""
        self._frame, self._depth = None, 0


@torch.no_grad()
def _creates_state(optimizer: Optimizer, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Return whether a step only creates state: its closure is None, there is no state, and it cannot move a weight.

    A step of a training may have an lr of 0, as a warm-up begins, and zero gradients, but hardly both at its start.
    Values are read last and only where None was given: an ordinary step waits for no device.
    """
    given = [*args[1:], *kwargs.values()]
    if len(given) != 1 or given[0] is not None or optimizer.state:
        return False
    params = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    if any(p.grad is None or p.grad.layout != torch.strided for p in params):
        return False
    if not all(_is_zero(group.get("lr", 0)) for group in optimizer.param_groups):
        return False
    # Of DTensors all ranks must decide alike, and of a sum of magnitudes every layout knows the whole.
    return all(float(whole(torch.linalg.vector_norm(p.grad, 1))) == 0 for p in params)


def _is_zero(lr: object) -> bool:
    return isinstance(lr, (int, float, Tensor)) and float(lr) == 0


def _step_frame() -> FrameType | None:
    """The frame of torch.optim's wrapper of ``step`` that calls this hook."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code.co_filename != _TORCHS_FILE:
        frame = frame.f_back
    return frame


def _on_the_stack(wanted: FrameType) -> bool:
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame is not wanted:
        frame = frame.f_back
    return frame is not None
