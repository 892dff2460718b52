"""What every task must offer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn


@dataclass(frozen=True)
class Splits:
    """All of a task's data in memory, as (inputs, classes) pairs: a class for each example, or for each of its places.

    An epoch draws ``per_epoch`` of the training examples at random, or all of them.
    """

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    per_epoch: int | None = None


class Task(Protocol):
    """A classification problem: data that never change and a model that is freshly drawn."""

    name: str
    description: str
    residual_depth: int | None  # the branches of a residual stream, None without one; the preset "modular" asks

    def load(self) -> Splits:
        """The data: the same at every call."""

    def build(self) -> nn.Module:
        """A new model, its weights drawn from torch's global generator. Its last dim is the classes.

        Without a residual depth torch.fx can trace it: so the preset "modular" learns the order of its layers.
        """

    def fingerprint(self) -> str | None:
        """The sha256 of data that another machine may have in another version; else None."""
