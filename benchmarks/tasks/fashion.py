"""Fashion-MNIST from your disk: torchvision's layout, or Debian's package. Nothing is downloaded."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import zlib
from functools import cache
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.tasks.base import Splits
from benchmarks.tasks.common import SPLIT_SEED, Classification, Deep, held_out
from benchmarks.tasks.images import folder, missing

PACKAGE = "dataset-fashion-mnist"
DEBIAN = Path("/usr/share/datasets/fashion-mnist")
MEAN, DEVIATION = 0.2860, 0.3530  # of the pixels of the training images
_FILES = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")


_DATA = (
    f"Fashion-MNIST (70,000 grey images of 28 × 28 pixels in ten classes), a tenth of the training images, drawn at "
    f"random (split seed {SPLIT_SEED}), kept for validation; pixels standardised, no augmentation; "
)


class _Fashion(Classification):
    epochs, batch_size = 10, 128
    target = 0.85

    def load(self) -> Splits:
        """The three splits, read once a process."""
        return _load(_place())

    def fingerprint(self) -> str:
        """Of all images and labels: the files are not compared with the originals."""
        digest = hashlib.sha256()
        for part in _arrays(_place()):
            digest.update(part)
        return digest.hexdigest()


class FashionCNN(_Fashion):
    """Three strided convolutions and a linear layer: an epoch takes four seconds on one core."""

    name = "fashion-cnn"
    description = (
        f"{_DATA}convolutions of 3 × 3 with stride 2 and padding 1, 1 → 16 → 32 → 64 channels, each with ReLU, then "
        "linear 1024 → 10, with biases, PyTorch's own initialisation (33,424 weights in matrices and kernels, 122 in "
        "biases), cross-entropy"
    )

    def build(self) -> nn.Module:
        """The network."""
        return nn.Sequential(*_block(1, 16), *_block(16, 32), *_block(32, 64), nn.Flatten(), nn.Linear(1024, 10))


class FashionMLP(_Fashion):
    """Two hidden layers: an epoch takes about a second on one core."""

    name = "fashion-mlp"
    description = (
        f"{_DATA}a ReLU network 784-256-128-10 with biases, PyTorch's own initialisation (234,752 weights in matrices, "
        "394 in biases), cross-entropy"
    )

    def build(self) -> nn.Module:
        """The network."""
        sizes = ((784, 256), (256, 128))
        layers = (layer for ins, outs in sizes for layer in (nn.Linear(ins, outs), nn.ReLU()))
        return nn.Sequential(nn.Flatten(), *layers, nn.Linear(128, 10))


class FashionResNet(_Fashion):
    """A small residual network with batch normalisation: an epoch takes seven seconds on one core."""

    name = "fashion-resnet"
    residual_depth: int | None = 3
    description = (
        f"{_DATA}a convolution of 5 × 5 with stride 4, 1 → 16 channels, then residual blocks of 16, 32 and 64 channels "
        "(two convolutions of 3 × 3, the second and third block of stride 2 with a 1 × 1 convolution beside), batch "
        "normalisation after every convolution, ReLU, the mean over the places, linear 64 → 10, PyTorch's own "
        "initialisation (77,328 weights in matrices and kernels, 682 in biases and gains), cross-entropy"
    )

    def build(self) -> nn.Module:
        """The network."""
        stem = nn.Sequential(nn.Conv2d(1, 16, 5, stride=4, padding=2, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        blocks = (_Residual(16, 16, 1), _Residual(16, 32, 2), _Residual(32, 64, 2))
        return nn.Sequential(stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


class _Residual(nn.Module):
    """Two convolutions with batch normalisation, added to their input."""

    def __init__(self, ins: int, outs: int, stride: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(ins, outs, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(outs),
            nn.ReLU(),
            nn.Conv2d(outs, outs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outs),
        )
        same = ins == outs and stride == 1
        self.beside = (
            nn.Identity()
            if same
            else nn.Sequential(nn.Conv2d(ins, outs, 1, stride=stride, bias=False), nn.BatchNorm2d(outs))
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.branch(x) + self.beside(x))


WIDTH, DEPTH = 64, 8
ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "sigmoid": nn.Sigmoid}


class FashionDeep(_Fashion):
    """A deep, narrow network with or without batch normalisation, skips and ReLU; its trajectory is measured.

    Args:
        batch_norm: after every hidden linear layer, whose bias then falls away.
        skip: every hidden layer is added to its input.
        activation: "relu" or "sigmoid".
    """

    epochs = 3
    target = 0.8
    trajectory = True

    def __init__(self, batch_norm: bool, skip: bool, activation: str) -> None:
        self.batch_norm, self.skip, self.activation = batch_norm, skip, activation
        self.name = "-".join(("fashion-deep", *["bn"] * batch_norm, *["skip"] * skip, activation))
        biases = 2 * WIDTH * DEPTH if batch_norm else WIDTH * DEPTH
        self.description = (
            f"{_DATA}a linear layer 784 → {WIDTH}, {DEPTH} hidden layers {WIDTH} → {WIDTH} "
            f"{'with batch normalisation' if batch_norm else 'without batch normalisation'}, the activation "
            f"{activation}, {'each added to its input' if skip else 'no skips'}, then {WIDTH} → 10, PyTorch's own "
            f"initialisation ({784 * WIDTH + DEPTH * WIDTH**2 + 10 * WIDTH:,} weights in matrices, "
            f"{biases + WIDTH + 10:,} in biases{' and gains' if batch_norm else ''}), cross-entropy"
        )

    def build(self) -> nn.Module:
        """The network."""
        kind = dict(batch_norm=self.batch_norm, skip=self.skip)
        return Deep(784, WIDTH, DEPTH, **kind, activation=ACTIVATIONS[self.activation])


DEEP = tuple(FashionDeep(*kind) for kind in product((True, False), (True, False), ACTIVATIONS))


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
            "https://github.com/zalandoresearch/fashion-mnist",
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
        data, dims = path.read_bytes(), int(name[-1])
        with contextlib.suppress(EOFError, zlib.error, gzip.BadGzipFile):  # what stays packed is found below
            data = gzip.decompress(data) if path.suffix == ".gz" else data
        shape = np.frombuffer(data, ">i4", dims, offset=4) if len(data) >= 4 + 4 * dims else np.zeros(1)
        if data[:4] != bytes((0, 0, 8, dims)) or len(data) != 4 + 4 * dims + int(shape.prod()):
            raise OSError(f"{path} is damaged, or no file of Fashion-MNIST: put the original in its place")
        found.append(data[4 + 4 * dims :])
    return tuple(found)


@cache
def _load(place: Path) -> Splits:
    parts = [torch.frombuffer(bytearray(part), dtype=torch.uint8) for part in _arrays(place)]
    (x, tested), (y, classes) = [part.view(-1, 1, 28, 28) for part in parts[::2]], [part.long() for part in parts[1::2]]
    return held_out((x, y), (tested, classes), fetch=_standardised)


def _standardised(images: Tensor, draws: torch.Generator | None) -> Tensor:
    return (images.float() / 255 - MEAN) / DEVIATION
