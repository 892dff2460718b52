"""The tasks on files, on small ones that the test makes in the formats of the real ones."""

from __future__ import annotations

import copy
import hashlib
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.study.spec import RunSpec
from benchmarks.tasks import TASKS
from benchmarks.tasks import images as module
from benchmarks.tasks.images import PADDING, shifted
from benchmarks.training import run
from benchmarks.vision import allow_torchvision_import

allow_torchvision_import()
torchvision = pytest.importorskip("torchvision")


@pytest.fixture(autouse=True)
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An empty data folder, the CPU, and one thread."""
    monkeypatch.setenv(module.VARIABLE, str(tmp_path))
    monkeypatch.setattr(module, "_device", lambda: "cpu")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    module._cifar.cache_clear()
    module._imagenet.cache_clear()


def write_cifar(root: Path, kind: type, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """Batches of 10 images in CIFAR's format; torchvision is told their checksums, as it knows the originals'."""
    draws, written = np.random.default_rng(0), {}
    (root / kind.base_folder).mkdir(parents=True)

    def save(name: str, content: object) -> str:
        blob = pickle.dumps(content)
        (root / kind.base_folder / name).write_bytes(blob)
        return hashlib.md5(blob).hexdigest()

    classes = 100 if kind.__name__ == "CIFAR100" else 10
    for listed in ("train_list", "test_list"):
        files = []
        for name, _ in getattr(kind, listed):
            pixels, labels = draws.integers(0, 256, (10, 3072), np.uint8), draws.integers(0, classes, 10).tolist()
            written[name] = pixels
            key = "fine_labels" if classes == 100 else "labels"
            files.append([name, save(name, {"data": pixels, key: labels})])
        monkeypatch.setattr(kind, listed, files)
    key = kind.meta["key"]
    checksum = save(kind.meta["filename"], {key: [str(i) for i in range(classes)]})
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": checksum})
    return written


@pytest.mark.parametrize(("name", "kind"), [("cifar10-vgg11", "CIFAR10"), ("cifar100-vgg11", "CIFAR100")])
def test_cifar_is_read_from_its_own_files(tmp_path, monkeypatch, name, kind):
    written = write_cifar(tmp_path, getattr(torchvision.datasets, kind), monkeypatch)
    splits = TASKS[name].load()
    total = 10 * (len(written) - 1)
    assert len(splits.validation[0]) == total // 10
    assert len(splits.train[0]) == total - total // 10
    assert torch.equal(splits.test[0].flatten(1), torch.from_numpy(list(written.values())[-1]))
    rows = {row.numpy().tobytes() for part in (splits.train, splits.validation) for row in part[0]}
    assert rows == {row.tobytes() for pixels in list(written.values())[:-1] for row in pixels}
    pixels = splits.fetch(splits.test[0][:4], None).double().numpy()
    mean, deviation = module._CIFAR_CHANNELS[TASKS[name].classes]
    for c in range(3):
        raw = splits.test[0][:4, c].double().numpy()
        np.testing.assert_allclose(pixels[:, c], (raw / 255 - mean[c]) / deviation[c], rtol=1e-4, atol=1e-6)
    record = run(RunSpec(task=name, optimizer="sgd", settings={"lr": 0.01}, seed=1, epochs=1, batch_size=total // 2))
    assert not record.diverged
    assert record.curve[0].steps == 2


@pytest.mark.parametrize("name", ["data_batch_1", "batches.meta"])
def test_a_file_that_is_not_the_original_is_refused_and_one_that_is_not_there_is_named(tmp_path, monkeypatch, name):
    kind = torchvision.datasets.CIFAR10
    write_cifar(tmp_path, kind, monkeypatch)
    file = tmp_path / kind.base_folder / name
    file.write_bytes(b"cut off")
    with pytest.raises(OSError, match=f"a file of CIFAR-10 in {file.parent} is damaged: unpack {kind.url}") as error:
        TASKS["cifar10-resnet18"].load()
    assert not isinstance(error.value, FileNotFoundError)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=f"expected cifar-10-batches-py/ with the files .*{name}"):
        TASKS["cifar10-resnet18"].load()


def test_batches_drawn_ahead_by_many_threads_are_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SIDE", 32)
    write_imagenet(tmp_path)
    write_cifar(tmp_path, torchvision.datasets.CIFAR10, monkeypatch)
    for name in ("imagenet-resnet18", "cifar10-vgg11"):
        small = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 10))
        monkeypatch.setattr(type(TASKS[name]), "build", lambda self, small=small: copy.deepcopy(small))
        of = RunSpec(task=name, optimizer="sgd", settings={"lr": 0.01}, seed=1, epochs=2, batch_size=5)
        plain = run(of)
        with monkeypatch.context() as patch:
            patch.setattr(module, "_placed", lambda: {"ahead": 2})
            module._cifar.cache_clear()
            module._imagenet.cache_clear()
            found = run(of)
        assert found.curve == plain.curve
        assert found.test_loss == plain.test_loss


def test_crops_are_drawn_as_torchvision_draws_them(monkeypatch):
    from PIL import Image
    from scipy.stats import ks_2samp

    found: list[tuple[int, ...]] = []
    functional = torchvision.transforms.functional
    monkeypatch.setattr(functional, "resized_crop", lambda image, *place: (found.append(place[:4]), image)[1])
    flips: list[int] = []
    monkeypatch.setattr(functional, "hflip", lambda image: (flips.append(1), image)[1])
    kind = torchvision.transforms.RandomResizedCrop
    image = Image.new("RGB", (300, 200))
    for seed in range(1000):
        module._cut_out(image, seed)
    assert 420 < len(flips) < 580
    torch.manual_seed(0)
    theirs = [kind.get_params(image, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(1000)]
    for mine, other in zip(zip(*found, strict=True), zip(*theirs, strict=True), strict=True):
        assert ks_2samp(mine, other).pvalue > 1e-3
    for size in ((1000, 10), (10, 1000)):
        found.clear()
        narrow = Image.new("RGB", size)
        module._cut_out(narrow, 0)
        assert found == [kind.get_params(narrow, (0.08, 1.0), (3 / 4, 4 / 3))]


def test_augmentation_shifts_and_flips_whole_images():
    images = torch.randint(0, 256, (64, 3, 32, 32), dtype=torch.uint8)
    moved = shifted(images, torch.Generator().manual_seed(0))
    assert torch.equal(moved, shifted(images, torch.Generator().manual_seed(0)))
    seen = set()
    for image, found in zip(images, moved, strict=True):
        padded = np.pad(image.numpy(), ((0, 0), (PADDING, PADDING), (PADDING, PADDING)))
        ways = [
            (down, right, flip)
            for down in range(2 * PADDING + 1)
            for right in range(2 * PADDING + 1)
            for flip in (False, True)
            if np.array_equal(padded[:, down : down + 32, right : right + 32][..., :: -1 if flip else 1], found.numpy())
        ]
        assert len(ways) == 1
        seen.add(ways[0])
    assert len(seen) > 40
    assert 15 < sum(flip for *_, flip in seen) < 49


def write_imagenet(root: Path) -> None:
    """Two classes of PNG and JPEG images, one bright and one dark."""
    from PIL import Image

    draws = np.random.default_rng(0)
    for part, count in (("train", 12), ("val", 3)):
        for name, base in (("n01440764", 40), ("n01443537", 200)):
            folder = root / "imagenet" / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = draws.integers(base, base + 30, (20 + i, 30, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{i:02}.{'png' if i % 2 else 'JPEG'}")


def test_imagenet_is_read_from_folders(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SIDE", 32)
    write_imagenet(tmp_path)
    task = TASKS["imagenet-resnet18"]
    splits = task.load()
    # Two of twelve in each class, numbers 0 and 10, are held out.
    assert [int(i) for i in splits.validation[0]] == [0, 10, 12, 22]
    assert len(splits.train[0]) == 20
    assert splits.test[1].tolist() == [0] * 3 + [1] * 3
    state = torch.random.get_rng_state()
    first = splits.fetch(splits.train[0][:3], torch.Generator().manual_seed(0))
    assert torch.equal(torch.random.get_rng_state(), state)  # the model's own draws are left alone
    assert torch.equal(first, splits.fetch(splits.train[0][:3], torch.Generator().manual_seed(0)))
    assert not torch.equal(first, splits.fetch(splits.train[0][:3], torch.Generator().manual_seed(1)))
    plain = splits.fetch(splits.test[0], None)
    assert plain.shape == (6, 3, 32, 32)
    assert plain[:3].max() < 0 < plain[3:].min()
    settings = dict(settings={"lr": 0.01}, seed=1, epochs=1, batch_size=10)
    record = run(RunSpec(task=task.name, optimizer="sgd", **settings))
    assert not record.diverged
    assert record.curve[0].steps == 2
    assert task.build().fc.out_features == 2


@pytest.mark.parametrize("name", [task.name for task in module.TASKS])
def test_missing_files_are_named_with_where_they_are_expected(tmp_path, name):
    with pytest.raises(FileNotFoundError) as error:
        TASKS[name].load()
    words = str(error.value)
    assert str(tmp_path) in words
    assert module.VARIABLE in words
    expected = {"cifar10-": "data_batch_5", "cifar100": "cifar-100-python/", "imagenet": "imagenet/val/"}
    assert expected[name[:8]] in words
    sources = {"cifar10-": "cifar-10-python.tar.gz", "cifar100": "cifar-100-python.tar.gz", "imagenet": "ILSVRC2012"}
    assert sources[name[:8]] in words
    assert "\n" not in words


def test_folders_that_are_no_imagenet_are_refused_in_a_line(tmp_path):
    write_imagenet(tmp_path)
    task, val = TASKS["imagenet-resnet18"], tmp_path / "imagenet/val"
    (val / "n01443537").rename(val / "n01440765")
    with pytest.raises(FileNotFoundError, match="2 are in one of them alone: n01440765, n01443537"):
        task.load()
    for file in (val / "n01440765").iterdir():
        file.unlink()
    with pytest.raises(FileNotFoundError, match="in either a folder for each class with its images") as error:
        task.load()
    assert "\n" not in str(error.value)


def test_without_torchvision_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ModuleNotFoundError, match="needs torchvision, in the version that fits"):
        TASKS["cifar10-resnet18"].build()
