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


def check_writable(name: str, tensors: Iterable[Tensor]) -> None:
    """Refuse what cannot be written entry by entry, or not here.

    Args:
        name: what they are called.
        tensors: what a step is going to write.

    Raises:
        RuntimeError: one is expanded or negated lazily, or was made in inference mode, which this is not.
    """
    for x in tensors:
        if x.is_inference() and not torch.is_inference_mode_enabled():
            raise RuntimeError(
                f"the {name} of shape {tuple(x.shape)} was made in inference mode, and cannot be written outside of "
                "it: replace it by its clone()"
            )
        is_expanded = not x.is_contiguous() and any(n > 1 and s == 0 for n, s in zip(x.shape, x.stride(), strict=True))
        if is_expanded or x.is_neg():
            raise RuntimeError(
                f"the {name} of shape {tuple(x.shape)} cannot be written entry by entry: it is expanded or negated "
                "lazily. Give it memory of its own by clone() or resolve_neg()"
            )


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
