"""The digits with wrong labels among those that are trained on: what robustness to noise is measured by."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import torch
from torch import Tensor, nn

from benchmarks.tasks.base import Splits
from benchmarks.tasks.common import Classification
from benchmarks.tasks.digits import Digits, images

NOISE_SEED = 0
WRONG = 0.25  # of the training labels
CLASSES = 10


class DigitsNoise(Classification):
    """A small convolutional network with batch normalisation; a quarter of the training labels is wrong."""

    name = "digits-noise"
    epochs, batch_size = 12, 64
    target = 0.93
    description = (
        f"scikit-learn's handwritten digits, split as in the task “{Digits.name}”, {WRONG:.0%} of the training labels, "
        f"drawn at random (seed {NOISE_SEED}), replaced by one of the nine others; the labels of validation and test "
        "are left as they are. A network of convolution 1 → 16, batch normalisation, ReLU, convolution 16 → 32 of "
        "stride 2, batch normalisation, ReLU, linear 512 → 10, PyTorch's own initialisation (9,872 weights in "
        "matrices and kernels, 106 in biases and gains), cross-entropy"
    )

    def load(self) -> Splits:
        """The splits of the digits as images, read once a process."""
        return _load()

    def build(self) -> nn.Module:
        """The network; a convolution has no bias where batch normalisation adds one."""
        return nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(512, CLASSES)),
        )


@cache
def _load() -> Splits:
    digits = Digits().load().each(images)
    x, y = digits.train
    return replace(digits, train=(x, mislabelled(y)))


def mislabelled(classes: Tensor) -> Tensor:
    """The labels, WRONG of them replaced, each by one of the nine others with the same probability."""
    draws = torch.Generator().manual_seed(NOISE_SEED)
    chosen = torch.randperm(len(classes), generator=draws)[: round(WRONG * len(classes))]
    away = torch.randint(1, CLASSES, (len(chosen),), generator=draws)
    return classes.scatter(0, chosen, (classes[chosen] + away) % CLASSES)
