"""Step hooks of any torch.optim optimizer, of which only the outermost act."""

from __future__ import annotations

import sys
from types import FrameType

from torch.optim import Optimizer

_TORCHS_FILE = Optimizer.profile_hook_step.__code__.co_filename


class OutermostStep:
    """Tells the hooks of a step from those of a step within it.

    A ``step`` that calls the hooked ``step`` of its base class runs the hooks twice, one pair within the other; the
    outer pair is to act. A step that raised never ran its post-hook: it is known by its frame, which is no longer on
    the stack, because a count alone would stay wrong from then on.
    """

    def __init__(self) -> None:
        self._frame: FrameType | None = None
        self._depth = 0

    def enter(self) -> bool:
        """For a step pre-hook: whether this step is no part of one that was entered already."""
        if self._frame is not None and _on_the_stack(self._frame):
            self._depth += 1
            return False
        self._frame, self._depth = _step_frame(), 1
        return True

    def leave(self) -> bool:
        """For a step post-hook: whether this is the end of the step that was entered."""
        self._depth -= 1
        # A step within may have raised and been caught, which leaves the depth wrong; a compiler may have cut the step
        # in two, which leaves the frame another.
        if self._depth != 0 and _step_frame() is not self._frame:
            return False
        self._frame = None
        return True

    def forget(self) -> None:
        """No step was entered."""
        self._frame, self._depth = None, 0


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
