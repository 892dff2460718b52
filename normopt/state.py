"""What an optimizer keeps of a parameter from step to step: its names, and its dtype."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

BUFFER = "momentum_buffer"  # torch.optim.SGD's name, so that its checkpoints load here and ours there
COMPENSATION = "kahan_compensation"


def state_dtype(asked: str | None, p: Tensor) -> torch.dtype:
    """The dtype of the momentum: the one asked for, else the parameter's; of a complex one always its own."""
    return p.dtype if asked is None or p.is_complex() else cast(torch.dtype, getattr(torch, asked))
