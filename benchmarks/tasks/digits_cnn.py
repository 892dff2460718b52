"""The digits for a convolutional network, with wrong labels among those it learns from: something to overfit."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from benchmarks.tasks.base import Splits
from benchmarks.tasks.common import Classification
from benchmarks.tasks.digits import Digits, images

NOISE = 0.3  # the share of training labels that are drawn anew
NOISE_SEED = 0


class DigitsCNN(Classification):
    """Three convolutions with batch norm on the digits, of whose training labels a share is drawn at random."""

    name = "digits-cnn"
    epochs, batch_size = 40, 64
    target = 0.93
    description = (
        f"scikit-learn's handwritten digits as images of 8 × 8, split as in the task “{Digits.name}”; {NOISE:.0%} of "
        f"the training labels, chosen with seed {NOISE_SEED}, are drawn anew from all ten classes, so that about a "
        "tenth of those stay right, while validation and test labels are the true ones; convolutions of 3 × 3 with "
        "padding 1, 1 → 16 → 32 → 32 channels, each with batch norm and ReLU, the last two with 2 × 2 max pooling, "
        "then linear 128 → 10 (15,248 weights in matrices and kernels, 170 in biases and gains), PyTorch's own "
        "initialisation, cross-entropy"
    )

    def load(self) -> Splits:
        """The splits of the digits as [examples, 1, 8, 8], the training labels with noise."""
        digits = Digits().load().each(images)
        x, y = digits.train
        return replace(digits, train=(x, noisy(y)))

    def build(self) -> nn.Module:
        """The network; the convolutions have no biases, since batch norm has them."""
        return nn.Sequential(
            *_block(1, 16),
            *(*_block(16, 32), nn.MaxPool2d(2)),
            *(*_block(32, 32), nn.MaxPool2d(2)),
            nn.Flatten(),
            nn.Linear(128, 10),
        )


def noisy(classes: Tensor) -> Tensor:
    """The labels with a share of them, always the same ones, drawn anew."""
    generator = torch.Generator().manual_seed(NOISE_SEED)
    chosen = torch.randperm(len(classes), generator=generator)[: round(NOISE * len(classes))]
    result = classes.clone()
    result[chosen] = torch.randint(10, (len(chosen),), generator=generator)
    return result


def _block(ins: int, outs: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(ins, outs, 3, padding=1, bias=False), nn.BatchNorm2d(outs), nn.ReLU()
