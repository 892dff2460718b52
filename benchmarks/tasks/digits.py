"""Handwritten digits: 1797 real images of 8 × 8 pixels that come with scikit-learn, so nothing is downloaded."""

from __future__ import annotations

from functools import cache

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from benchmarks.tasks.base import Splits

SPLIT_SEED = 0


class Digits:
    """A multilayer perceptron 64-128-128-10 on the digits, split 60/20/20 by class."""

    name = "digits"
    residual_depth: int | None = None
    description = (
        "scikit-learn's handwritten digits (1797 images of 8 × 8 pixels), split 60/20/20 into training, validation "
        f"and test with the classes balanced (split seed {SPLIT_SEED}), pixels scaled to [0, 1]; a ReLU network "
        "64-128-128-10 with PyTorch's own initialisation (25,856 weights in matrices, 266 biases), cross-entropy"
    )

    def load(self) -> Splits:
        """The three splits, read once a process."""
        return _load()

    def build(self) -> nn.Module:
        """The network, biases drawn away from zero as PyTorch does."""
        return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))

    def fingerprint(self) -> None:
        """The data are scikit-learn's, whose version is noted."""


@cache
def _load() -> Splits:
    x, y = load_digits(return_X_y=True)
    x_train, x_rest, y_train, y_rest = train_test_split(x, y, test_size=0.4, random_state=SPLIT_SEED, stratify=y)
    x_val, x_test, y_val, y_test = train_test_split(
        x_rest, y_rest, test_size=0.5, random_state=SPLIT_SEED, stratify=y_rest
    )

    def tensors(inputs: object, classes: object) -> tuple[Tensor, Tensor]:
        # Pixels are 0 … 16.
        return torch.as_tensor(inputs, dtype=torch.float32) / 16, torch.as_tensor(classes, dtype=torch.int64)

    return Splits(train=tensors(x_train, y_train), validation=tensors(x_val, y_val), test=tensors(x_test, y_test))
