"""Fashion-MNIST from your disk: torchvision's layout, or Debian's package. Nothing is downloaded."""

from __future__ import annotations

import gzip
import hashlib
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.tasks.base import Splits
from benchmarks.tasks.common import SPLIT_SEED, Classification
from benchmarks.tasks.images import HELD_OUT, folder, missing

PACKAGE = "dataset-fashion-mnist"
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
MEAN, DEVIATION = 0.2860, 0.3530  # of the pixels of the training images
_FILES = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")


class FashionCNN(Classification):
    """Three strided convolutions and a linear layer: an epoch takes four seconds on one core."""

    name = "fashion-cnn"
    epochs, batch_size = 10, 128
    target = 0.85
    description = (
        f"Fashion-MNIST (70,000 grey images of 28 × 28 pixels in ten classes), a tenth of the training images, drawn "
        f"at random (split seed {SPLIT_SEED}), kept for validation; pixels standardised, no augmentation; convolutions "
        "of 3 × 3 with stride 2 and padding 1, 1 → 16 → 32 → 64 channels, each with ReLU, then linear 1024 → 10, with "
        "biases, PyTorch's own initialisation (33,424 weights in matrices and kernels, 122 in biases), cross-entropy"
    )

    def load(self) -> Splits:
        """The three splits, read once a process."""
        return _load(_place())

    def build(self) -> nn.Module:
        """The network."""
        return nn.Sequential(*_block(1, 16), *_block(16, 32), *_block(32, 64), nn.Flatten(), nn.Linear(1024, 10))

    def fingerprint(self) -> str:
        """Of all images and labels: the files are not compared with the originals."""
        digest = hashlib.sha256()
        for part in _arrays(_place()):
            digest.update(part)
        return digest.hexdigest()


def _block(ins: int, outs: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(ins, outs, 3, stride=2, padding=1), nn.ReLU()


def _place() -> Path:
    """Return the folder that has the files."""
    own = folder() / "FashionMNIST" / "raw"
    found = next((place for place in (own, DEBIAN) if all(_file(place, name) for name in _FILES)), None)
    if found is None:
        files = ", ".join(f"{name}-ubyte" for name in _FILES)
        raise missing(
            "Fashion-MNIST",
            f"FashionMNIST/raw/ with the files {files}, as they are or with .gz (on Debian and Ubuntu, "
            f"`apt install {PACKAGE}` also serves)",
        )
    return found


def _file(place: Path, name: str) -> Path | None:
    return next((path for end in ("", ".gz") if (path := place / f"{name}-ubyte{end}").is_file()), None)


@cache
def _arrays(place: Path) -> tuple[bytes, ...]:
    """Return the bytes of images and labels, without their headers.

    The format: two zeros, the code of uint8, the number of dims, each dim in four bytes, most significant first.
    """
    found = []
    for name in _FILES:
        path = _file(place, name)
        assert path is not None
        data = path.read_bytes()
        data = gzip.decompress(data) if path.suffix == ".gz" else data
        dims = int(name[-1])
        shape = np.frombuffer(data, ">i4", dims, offset=4) if len(data) >= 4 + 4 * dims else np.zeros(1)
        if data[:4] != bytes((0, 0, 8, dims)) or len(data) != 4 + 4 * dims + int(shape.prod()):
            raise ValueError(f"{path} is damaged, or no file of Fashion-MNIST: put the original in its place")
        found.append(data[4 + 4 * dims :])
    return tuple(found)


@cache
def _load(place: Path) -> Splits:
    parts = [torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in _arrays(place)]
    (x, tested), (y, classes) = [part.view(-1, 1, 28, 28) for part in parts[::2]], [part.long() for part in parts[1::2]]
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(SPLIT_SEED))
    held, kept = order[: len(x) // HELD_OUT], order[len(x) // HELD_OUT :]
    splits = (x[kept], y[kept]), (x[held], y[held]), (tested, classes)
    return Splits(*splits, fetch=_standardised)


def _standardised(images: Tensor, draws: torch.Generator | None) -> Tensor:
    return (images.float() / 255 - MEAN) / DEVIATION
