"""What an optimizer keeps of a parameter from step to step: its names, and its dtype."""

from __future__ import annotations

from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor

BUFFER = "momentum_buffer"  # torch.optim.SGD's name, so that its checkpoints load here and ours there
COMPENSATION = "kahan_compensation"


def state_dtype(asked: str | None, p: Tensor) -> torch.dtype:
    """The dtype of the momentum: the one asked for, else the parameter's; of a complex one always its own."""
    return p.dtype if asked is None or p.is_complex() else cast(torch.dtype, getattr(torch, asked))


def check_like(name: str, pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Refuse what has not the shape and the device of its parameter: it was made before ``.data`` became another.

    Args:
        name: what it is called.
        pairs: a tensor and its parameter each.

    Raises:
        RuntimeError: the shape or the device of one differs.
    """
    for x, p in pairs:
        if x.shape != p.shape or x.device != p.device:
            raise RuntimeError(
                f"the {name} of a parameter of shape {tuple(p.shape)} on {p.device} has the shape {tuple(x.shape)} on "
                f"{x.device}: cut, turn and move it with its parameter, or give the parameter to a new optimizer"
            )
