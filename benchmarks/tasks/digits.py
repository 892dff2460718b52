"""Handwritten digits: 1797 real images of 8 × 8 pixels that come with scikit-learn, so nothing is downloaded."""

from __future__ import annotations

from functools import cache

import torch
from torch import nn

from benchmarks.tasks.base import Part, Splits
from benchmarks.tasks.common import SPLIT_SEED, Classification, split


class Digits(Classification):
    """A multilayer perceptron 64-128-128-10 on the digits, split 60/20/20 by class."""

    name = "digits"
    epochs, batch_size = 12, 64
    target = 0.95
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


def images(data: Part) -> Part:
    """Digits as [examples, 1, 8, 8]."""
    return data[0].view(-1, 1, 8, 8), data[1]


@cache
def _load() -> Splits:
    from sklearn.datasets import load_digits  # as in `split`

    pixels, classes = load_digits(return_X_y=True)
    return split(pixels / 16, classes, torch.int64, by_class=True)  # pixels are 0 … 16
