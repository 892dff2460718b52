"""What every task must offer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

Fetch = Callable[[Tensor, torch.Generator | None], Tensor]
Part = tuple[Tensor, Tensor]


def as_they_are(inputs: Tensor, draws: torch.Generator | None) -> Tensor:
    """What a model reads, where that is what the data are."""
    return inputs


@dataclass(frozen=True)
class Splits:
    """A task's data in memory, as (inputs, targets) pairs, and how a batch of them is made ready.

    Attributes:
        train, validation, test: (inputs, targets), an example along the first dim of each.
        per_epoch: how many of the training examples an epoch draws at random; None is all of them.
        fetch: a batch of inputs → what the model reads, and the place for what is too large for memory (the inputs
            are then numbers of files) or differs from epoch to epoch (augmentation). It is given a generator to draw
            from when it is trained on, and None when it is not.
        device: where the model is trained.
        ahead: so many batches are made ready by a thread while the model is trained on an earlier one.
    """

    train: Part
    validation: Part
    test: Part
    per_epoch: int | None = None
    fetch: Fetch = as_they_are
    device: str = "cpu"
    ahead: int = 0

    def each(self, of: Callable[[Part], Part]) -> Splits:
        """Return the same with a function of each of the three."""
        return replace(self, train=of(self.train), validation=of(self.validation), test=of(self.test))


class Task(Protocol):
    """Something to be learned: data that never change, a model that is freshly drawn, a loss, and a budget.

    Attributes:
        name, description: what it is called, and what it is, whole sentences for the report.
        epochs, batch_size: the budget.
        score_name: what `score` is, as a column's title: "accuracy", "R²", "log₁₀ gap".
        higher_is_better: of the score.
        target: the score on the validation data by which steps to target are counted.
        residual_depth: the branches of a residual stream, None without one; the preset "modular" asks.
        trajectory: whether the regularity of a run's trajectory is among its measures.
    """

    name: str
    description: str
    epochs: int
    batch_size: int
    score_name: str
    higher_is_better: bool
    target: float
    residual_depth: int | None
    trajectory: bool

    def load(self) -> Splits:
        """The data: the same at every call."""

    def build(self) -> nn.Module:
        """A new model, its weights drawn from torch's global generator."""

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean loss, a 0-d tensor: what is trained, and what tuning makes small on the validation data."""

    def score(self, outputs: Tensor, targets: Tensor) -> float:
        """What people want of it."""

    def measures(self, model: nn.Module) -> Mapping[str, float]:
        """What else is worth knowing of a trained model, beside the exact zeros of its weights, which are always."""

    def fingerprint(self) -> str | None:
        """The sha256 of data that another machine may have in another version; else None."""
