"""MNIST-1D (Greydanus and Kobak, arXiv:2011.14439), made by the package mnist1d. Nothing is downloaded."""

from __future__ import annotations

import hashlib
import random
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.tasks.base import Splits
from benchmarks.tasks.common import SPLIT_SEED, Classification, held_out


class MNIST1D(Classification):
    """A small convolutional network on one-dimensional digits: an epoch takes a fraction of a second."""

    name = "mnist1d"
    epochs, batch_size = 50, 128
    target = 0.8
    description = (
        "MNIST-1D (5,000 made signals of 40 places in ten classes, the package's own seed, 1,000 of them for test), a "
        f"tenth of the training signals, drawn at random (split seed {SPLIT_SEED}), kept for validation; convolutions "
        "of width 5, 3 and 3 with stride 2 and padding 1, 1 → 25 → 25 → 25 channels, each with ReLU, then linear "
        "125 → 10, with biases, PyTorch's own initialisation (5,125 weights in matrices and kernels, 85 in biases), "
        "cross-entropy"
    )

    def load(self) -> Splits:
        """The three splits, made once a process.

        Raises:
            ModuleNotFoundError: the package mnist1d is not installed.
        """
        return _load()

    def build(self) -> nn.Module:
        """The network."""
        kinds = ((1, 5), (25, 3), (25, 3))
        layers = (layer for ins, wide in kinds for layer in (nn.Conv1d(ins, 25, wide, stride=2, padding=1), nn.ReLU()))
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(125, 10))

    def fingerprint(self) -> str:
        """Of all signals and labels: another version of the package or of NumPy may make others."""
        splits, digest = self.load(), hashlib.sha256()
        for part in (splits.train, splits.validation, splits.test):
            for tensor in part:
                digest.update(tensor.numpy().tobytes())
        return digest.hexdigest()


@cache
def _load() -> Splits:
    try:
        from mnist1d.data import get_dataset_args, make_dataset
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the task mnist1d needs the package mnist1d: pip install mnist1d") from error
    before = np.random.get_state(), random.getstate()  # noqa: NPY002
    try:
        data = make_dataset(get_dataset_args())
    finally:  # it seeds the generators of the whole process
        np.random.set_state(before[0])  # noqa: NPY002
        random.setstate(before[1])

    def part(x: str, y: str) -> tuple[Tensor, Tensor]:
        return torch.from_numpy(data[x]).float()[:, None], torch.from_numpy(data[y]).long()

    return held_out(part("x", "y"), part("x_test", "y_test"))
