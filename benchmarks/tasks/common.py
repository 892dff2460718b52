"""What several tasks share: classification, and the split 60/20/20."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.tasks.base import Part, Splits

SPLIT_SEED = 0
HELD_OUT = 10  # every so many training examples, one is for validation


class Plain:
    """A task whose data come with a package, and of which nothing is measured beside loss and score."""

    residual_depth: int | None = None
    trajectory: bool = False

    def measures(self, model: nn.Module) -> Mapping[str, float]:
        """Nothing more."""
        return {}

    def fingerprint(self) -> str | None:
        """The data are a package's, whose version is noted, or drawn from a seed."""
        return None


class Classification(Plain):
    """A class for every example, or for every place of it: cross-entropy over the last dim, and accuracy."""

    score_name = "accuracy"
    higher_is_better = True

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean cross-entropy, in nats."""
        return cross_entropy(outputs.flatten(0, -2), targets.flatten())

    def score(self, outputs: Tensor, targets: Tensor) -> float:
        """The part of all that is predicted that is right."""
        return int((outputs.argmax(-1) == targets).sum()) / targets.numel()


class Deep(nn.Module):
    """A stem, hidden layers of one width, each with or without batch norm and skip, and a head of ten classes."""

    def __init__(
        self, inputs: int, width: int, depth: int, *, batch_norm: bool, skip: bool, activation: type[nn.Module]
    ) -> None:
        super().__init__()
        self.skip = skip
        self.stem = nn.Linear(inputs, width)
        self.hidden = nn.ModuleList(
            nn.Sequential(
                nn.Linear(width, width, bias=not batch_norm),
                nn.BatchNorm1d(width) if batch_norm else nn.Identity(),
                activation(),
            )
            for _ in range(depth)
        )
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Examples of any shape → logits."""
        x = self.stem(x.flatten(1))
        for layer in self.hidden:
            x = x + layer(x) if self.skip else layer(x)
        logits: Tensor = self.head(x)
        return logits


def split(inputs: object, targets: object, dtype: torch.dtype, by_class: bool) -> Splits:
    """Arrays → training, validation and test, 60/20/20, inputs as float32 and targets as asked.

    Args:
        inputs, targets: arrays with an example a row.
        dtype: of the targets.
        by_class: keep the shares of the classes in every part.
    """

    from sklearn.model_selection import train_test_split  # half a second of imports, which a report does not need

    def two(x: object, y: object, share: float) -> tuple[object, object, object, object]:
        a, b, c, d = train_test_split(x, y, test_size=share, random_state=SPLIT_SEED, stratify=y if by_class else None)
        return a, b, c, d

    def tensors(x: object, y: object) -> tuple[Tensor, Tensor]:
        return torch.as_tensor(x, dtype=torch.float32), torch.as_tensor(y, dtype=dtype)

    x_train, x_rest, y_train, y_rest = two(inputs, targets, 0.4)
    x_val, x_test, y_val, y_test = two(x_rest, y_rest, 0.5)
    return Splits(train=tensors(x_train, y_train), validation=tensors(x_val, y_val), test=tensors(x_test, y_test))


def held_out(data: Part, test: Part, **more: Any) -> Splits:
    """Training data, of which one example of HELD_OUT, drawn at random, is kept for validation, and test data."""
    x, y = data
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(SPLIT_SEED))
    held, kept = order[: len(x) // HELD_OUT], order[len(x) // HELD_OUT :]
    return Splits(train=(x[kept], y[kept]), validation=(x[held], y[held]), test=test, **more)


def standardised(splits: Splits) -> Splits:
    """Every feature with the mean 0 and the deviation 1 of the training data, which alone may be looked at."""
    x = splits.train[0]
    mean, deviation = x.mean(0), x.std(0, correction=0)

    return splits.each(lambda data: ((data[0] - mean) / deviation, data[1]))
