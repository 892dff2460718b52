"""What every task must offer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn


@dataclass(frozen=True)
class Splits:
    """All of a task's data in memory, as (inputs, classes) pairs."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


class Task(Protocol):
    """A classification problem: data that never change and a model that is freshly drawn."""

    name: str
    description: str

    def load(self) -> Splits:
        """The data: the same at every call."""

    def build(self) -> nn.Module:
        """A new model, its weights drawn from torch's global generator."""
