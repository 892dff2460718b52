"""Photographs that you have on your disk: CIFAR-10, CIFAR-100 and ImageNet, through torchvision. Nothing is downloaded.

They are looked for in the folder that the environment variable NORMOPT_DATA names, or in ``data`` where you are.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.tasks.base import Splits
from benchmarks.tasks.common import HELD_OUT, SPLIT_SEED, Classification, held_out
from benchmarks.vision import allow_torchvision_import

VARIABLE = "NORMOPT_DATA"
PADDING = 4
SIDE = 224  # pixels of ImageNet's crops
AHEAD = 2  # batches that are made ready while a GPU trains on an earlier one
READERS = 16  # threads that read images: with more, Python's lock is what they wait for


def folder() -> Path:
    """Where the data are looked for."""
    return Path(os.environ.get(VARIABLE, "data"))


class Cifar(Classification):
    """A network on CIFAR-10 or CIFAR-100, with the usual augmentation: a shifted crop and, half the time, a flip.

    Args:
        classes: 10 or 100.
        model: "resnet18" or "vgg11".
        target: as of a task.
        weights: how the description counts the model's.
    """

    epochs, batch_size = 30, 128

    def __init__(self, classes: int, model: str, target: float, weights: str) -> None:
        self.name = f"cifar{classes}-{model}"
        self.target = target
        self.classes, self.model = classes, model
        self.description = (
            f"CIFAR-{classes} (60,000 images of 32 × 32 pixels), a tenth of the training images, drawn at random "
            f"(split seed {SPLIT_SEED}), kept for validation; pixels standardised by channel; in training, images are "
            f"padded by {PADDING} black pixels, cropped at random and flipped half the time. {_NETWORKS[model]} "
            f"({weights}), cross-entropy"
        )

    def load(self) -> Splits:
        """The three splits, read once a process."""
        return _cifar(self.classes, folder())

    def build(self) -> nn.Module:
        """The network, made for images of this size."""
        models = _torchvision().models
        if self.model == "vgg11":
            features = models.vgg11_bn(num_classes=self.classes).features  # 32 × 32 → 1 × 1
            return nn.Sequential(features, nn.Flatten(), nn.Linear(512, self.classes))
        network: Any = models.resnet18(num_classes=self.classes)
        network.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
        network.maxpool = nn.Identity()
        return network  # type: ignore[no-any-return]


class ImageNet(Classification):
    """A network of torchvision's on folders of images, a class each, with the usual augmentation.

    Args:
        model: the name of one of torchvision's classifiers.
        target: as of a task.
        weights: how the description counts the model's.
    """

    epochs, batch_size = 90, 256

    def __init__(self, model: str, target: float, weights: str) -> None:
        self.name = f"imagenet-{model}"
        self.target = target
        self.model = model
        self.description = (
            f"ImageNet-1K as folders of images, one of {HELD_OUT} training images of every class kept for validation, "
            "its own validation images as the test; in training, random crops of 8 to 100 per cent of an image, "
            f"scaled to {SIDE} × {SIDE} pixels and flipped half the time, else the middle of the image scaled to 256 "
            f"pixels; standardised by channel. torchvision's {model} ({weights}), cross-entropy"
        )

    def load(self) -> Splits:
        """The three splits as numbers of files, which are read when they are needed."""
        return _imagenet(folder())

    def build(self) -> nn.Module:
        """The network, with an output for each folder of training images."""
        classes = len(list((folder() / "imagenet" / "train").iterdir())) if _has_imagenet() else 1000
        network: nn.Module = getattr(_torchvision().models, self.model)(num_classes=classes)
        return network


_NETWORKS = {
    "resnet18": "torchvision's ResNet-18, its first convolution 3 × 3 with stride 1 and no pooling after it",
    "vgg11": "the convolutions of torchvision's VGG-11 with batch normalisation, and one linear layer",
}

TASKS = (
    Cifar(10, "resnet18", 0.9, "11,164,352 weights in matrices and kernels, 9,610 in biases and gains"),
    Cifar(10, "vgg11", 0.88, "9,222,848 weights in matrices and kernels, 8,266 in biases and gains"),
    Cifar(100, "resnet18", 0.65, "11,210,432 weights in matrices and kernels, 9,700 in biases and gains"),
    Cifar(100, "vgg11", 0.6, "9,268,928 weights in matrices and kernels, 8,356 in biases and gains"),
    ImageNet("resnet18", 0.65, "11,678,912 weights in matrices and kernels, 10,600 in biases and gains"),
    ImageNet("resnet50", 0.7, "25,502,912 weights in matrices and kernels, 54,120 in biases and gains"),
    ImageNet("vgg11", 0.65, "132,851,392 weights in matrices and kernels, 11,944 in biases and gains"),
)


def _torchvision() -> Any:
    allow_torchvision_import()
    try:
        import torchvision
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "this task needs torchvision, in the version that fits your torch (torchvision==0.28.0 to torch==2.13.0)"
        ) from error
    return torchvision


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _placed() -> dict[str, Any]:
    device = _device()
    return {"device": device, "ahead": 0 if device == "cpu" else AHEAD}


def missing(what: str, expected: str, source: str) -> FileNotFoundError:
    """Return the error that a data set is not in the folder of the data."""
    return FileNotFoundError(
        f"{what} is not in {folder().absolute()}: expected {expected} there; get it from {source}, or set {VARIABLE} "
        "to the folder that has it (nothing is downloaded)"
    )


# Mean and deviation of every channel of the training images.
_CIFAR_CHANNELS = {
    10: ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    100: ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
_IMAGENET_CHANNELS = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


@cache
def _cifar(classes: int, root: Path) -> Splits:
    datasets = _torchvision().datasets
    kind = {10: datasets.CIFAR10, 100: datasets.CIFAR100}[classes]
    files = [name for name, _ in [*kind.train_list, *kind.test_list, (kind.meta["filename"], "")]]
    if not all((root / kind.base_folder / name).is_file() for name in files):
        expected = f"{kind.base_folder}/ with the files {', '.join(files)}"
        raise missing(f"CIFAR-{classes}", expected, f"{kind.url}, unpacked")

    def images(train: bool) -> tuple[Tensor, Tensor]:
        try:
            # torchvision compares the files' checksums with those of the originals.
            data = kind(str(root), train=train, download=False)
        except RuntimeError:
            place = (root / kind.base_folder).absolute()
            raise OSError(f"a file of CIFAR-{classes} in {place} is damaged: unpack {kind.url} there again") from None
        return torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(data.targets)

    return held_out(images(train=True), images(train=False), fetch=_cropped(*_CIFAR_CHANNELS[classes]), **_placed())


def _cropped(
    mean: tuple[float, ...], deviation: tuple[float, ...]
) -> Callable[[Tensor, torch.Generator | None], Tensor]:
    """Bytes [batch, 3, h, w] → standardised floats, shifted and flipped in training."""
    m, d = torch.tensor(mean).view(-1, 1, 1), torch.tensor(deviation).view(-1, 1, 1)

    def fetch(images: Tensor, draws: torch.Generator | None) -> Tensor:
        return ((images if draws is None else shifted(images, draws)).float() / 255 - m) / d

    return fetch


def shifted(images: Tensor, draws: torch.Generator) -> Tensor:
    """Each image moved by up to PADDING pixels along either side, black coming in, and flipped half the time."""
    n, _, h, w = images.shape
    padded = nn.functional.pad(images, (PADDING,) * 4)
    down, right = torch.randint(2 * PADDING + 1, (2, n, 1), generator=draws)
    flip = torch.randint(2, (n, 1), generator=draws).bool()
    columns = torch.arange(w).expand(n, -1)
    columns = right + torch.where(flip, columns.flip(1), columns)
    rows = down + torch.arange(h)
    # Indices [n, 1, h, 1] and [n, 1, 1, w] beside the channels' [1, 3, 1, 1].
    chosen = torch.arange(n).view(-1, 1, 1, 1), torch.arange(images.shape[1]).view(1, -1, 1, 1)
    return padded[*chosen, rows.view(n, 1, h, 1), columns.view(n, 1, 1, w)]


def _has_imagenet() -> bool:
    return all((folder() / "imagenet" / part).is_dir() for part in ("train", "val"))


@cache
def _imagenet(root: Path) -> Splits:
    lost = missing(
        "ImageNet",
        "imagenet/train/ and imagenet/val/, in either a folder for each class with its images",
        "https://image-net.org (ILSVRC2012, its validation images sorted into the folders of their classes)",
    )
    if not _has_imagenet():
        raise lost
    torchvision = _torchvision()
    try:
        train, test = (torchvision.datasets.ImageFolder(str(root / "imagenet" / part)) for part in ("train", "val"))
    except FileNotFoundError:  # a folder without folders, or a class without images
        raise lost from None
    if train.classes != test.classes:
        other = sorted({*train.classes} ^ {*test.classes})
        raise FileNotFoundError(
            f"imagenet/train and imagenet/val in {root.absolute()} must have a folder for each class, but "
            f"{len(other)} are in one of them alone: {', '.join(other[:5])}"
        )
    transforms = torchvision.transforms
    whole = transforms.Compose([transforms.Resize(256), transforms.CenterCrop(SIDE)])
    last = transforms.Compose([transforms.ToTensor(), transforms.Normalize(*_IMAGENET_CHANNELS)])
    files = [*train.samples, *test.samples]

    def read(number: int, seed: int | None) -> Tensor:
        image = train.loader(files[number][0])
        return last(whole(image) if seed is None else _cut_out(image, seed))  # type: ignore[no-any-return]

    placed = _placed()
    readers = min(READERS, os.cpu_count() or 1)
    # On CPUs each has a worker of its own.
    over = ThreadPoolExecutor(readers, initializer=_alone).map if placed["ahead"] else map

    def fetch(numbers: Tensor, draws: torch.Generator | None) -> Tensor:
        # A seed an image, so that it does not matter which thread reads it, or when.
        n = len(numbers)
        seeds = [None] * n if draws is None else torch.randint(2**62, (n,), generator=draws).tolist()
        return torch.stack([*over(read, numbers.tolist(), seeds)])

    classes = torch.tensor([c for _, c in files])
    place = torch.tensor([i - train.targets.index(c) for i, c in enumerate(train.targets)])  # among those of its class
    held = (place % HELD_OUT == 0).nonzero().flatten()
    kept = (place % HELD_OUT != 0).nonzero().flatten()
    tested = torch.arange(len(train.samples), len(files))
    return Splits(
        train=(kept, classes[kept]),
        validation=(held, classes[held]),
        test=(tested, classes[tested]),
        fetch=fetch,
        **placed,
    )


def _alone() -> None:
    torch.set_num_threads(1)


def _cut_out(image: Any, seed: int) -> Any:
    """8 to 100 per cent of an image, ¾ to 4/3 as wide as high, scaled to SIDE × SIDE and flipped half the time.

    It is torchvision's RandomResizedCrop and RandomHorizontalFlip, which draw from the generator that all threads
    share.
    """
    functional = _torchvision().transforms.functional
    draws = torch.Generator().manual_seed(seed)

    def between(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=draws))

    for _ in range(10):
        area = between(0.08, 1.0) * image.width * image.height
        ratio = math.exp(between(-math.log(4 / 3), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= image.width and 0 < h <= image.height:
            top, left = int(between(0, image.height - h + 1)), int(between(0, image.width - w + 1))
            break
    else:  # of a long, narrow image, as much of its middle as the ratio allows
        w, h = min(image.width, round(image.height * 4 / 3)), min(image.height, round(image.width * 4 / 3))
        top, left = (image.height - h) // 2, (image.width - w) // 2
    cut = functional.resized_crop(image, top, left, h, w, [SIDE, SIDE])
    return functional.hflip(cut) if between(0, 1) < 0.5 else cut
