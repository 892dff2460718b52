"""Fashion-MNIST, on small files in the formats of the real ones, and on the real ones where they are."""

from __future__ import annotations

import gzip
import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.study.spec import RunSpec
from benchmarks.tasks import TASKS, fashion
from benchmarks.tasks.images import VARIABLE
from benchmarks.training import run

pytestmark = pytest.mark.usefixtures("one_thread")
TASK = TASKS["fashion-cnn"]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty data folder on a machine without Debian's package."""
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    monkeypatch.setattr(fashion, "DEBIAN", tmp_path / "none")
    return tmp_path


def write(place: Path, end: str) -> dict[str, np.ndarray]:
    """40 training images and 10 test images in the idx format."""
    place.mkdir(parents=True)
    draws, written = np.random.default_rng(0), {}
    for name in fashion._FILES:
        n = 40 if name.startswith("train") else 10
        shape = (n, 28, 28) if "images" in name else (n,)
        values = draws.integers(0, 256 if "images" in name else 10, shape, np.uint8)
        data = bytes((0, 0, 8, values.ndim)) + np.array(shape, ">i4").tobytes() + values.tobytes()
        (place / f"{name}-ubyte{end}").write_bytes(gzip.compress(data) if end else data)
        written[name] = values
    return written


@pytest.mark.parametrize("debian", [False, True])
def test_fashion_mnist_is_read_from_its_own_files(root, debian):
    written = write(fashion.DEBIAN if debian else root / "FashionMNIST/raw", ".gz" if debian else "")
    splits = TASK.load()
    assert [len(part[0]) for part in (splits.train, splits.validation, splits.test)] == [36, 4, 10]
    images, labels, tested, classes = written.values()
    assert torch.equal(splits.test[0].squeeze(1), torch.from_numpy(tested))
    assert splits.test[1].tolist() == classes.tolist()
    found = {
        (x.numpy().tobytes(), int(y)) for part in (splits.train, splits.validation) for x, y in zip(*part, strict=True)
    }
    assert found == {(x.tobytes(), y) for x, y in zip(images, labels.tolist(), strict=True)}
    pixels = splits.fetch(splits.test[0], None).double().numpy()
    np.testing.assert_allclose(pixels[:, 0], (tested / 255 - fashion.MEAN) / fashion.DEVIATION, rtol=1e-4, atol=1e-6)
    assert TASK.fingerprint() == hashlib.sha256(b"".join(part.tobytes() for part in written.values())).hexdigest()
    record = run(RunSpec(task=TASK.name, optimizer="sgd", settings={"lr": 0.01}, seed=1, epochs=1, batch_size=18))
    assert not record.diverged
    assert record.curve[0].steps == 2


def test_missing_files_are_named_with_the_ways_to_get_them(root):
    with pytest.raises(FileNotFoundError, match="t10k-labels-idx1-ubyte") as error:
        TASK.load()
    for word in (str(root), VARIABLE, "FashionMNIST/raw/", f"apt install {fashion.PACKAGE}"):
        assert word in str(error.value)


@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: b"cut", lambda data: b"\1" + data[1:]])
def test_damaged_files_are_refused(root, damage):
    write(root / "FashionMNIST/raw", "")
    file = root / "FashionMNIST/raw/train-labels-idx1-ubyte"
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match="labels-idx1-ubyte is damaged"):
        TASK.load()


KINDS = [name for name in TASKS if name.startswith("fashion-")]


@pytest.mark.parametrize("name", KINDS)
def test_every_network_learns_the_images_that_it_is_shown(root, name):
    write(root / "FashionMNIST/raw", "")
    epochs, batch = 30, 12
    kept = {"task": name, "optimizer": "adamw", "seed": 1, "epochs": epochs, "batch_size": batch}
    record = run(RunSpec(settings={"lr": 3e-3}, **kept))
    assert not record.diverged
    assert record.curve[-1].train_loss < 0.95 * record.curve[0].train_loss
    assert ("median cosine" in record.measures) == TASKS[name].trajectory == name.startswith("fashion-deep")


def test_the_trajectory_of_a_run_is_measured_and_changes_nothing(root, monkeypatch):
    write(root / "FashionMNIST/raw", "")
    name = "fashion-deep-bn-relu"
    spec = RunSpec(task=name, optimizer="sgd-torch", settings={"lr": 0.01}, seed=1, epochs=2, batch_size=12)
    measured = run(spec)
    # Of 6 steps the sketch is exact to a few percent: 1 for the last cosine, and all between −1 and 1.
    assert 0 < measured.measures["straightness"] <= 1
    assert -1 <= measured.measures["median cosine"] <= 1
    monkeypatch.setattr(TASKS[name], "trajectory", False)
    plain = run(spec)
    assert plain.curve == measured.curve
    assert plain.measures == {"zeros": 0.0}


def test_the_deep_networks_differ_in_what_their_names_say():
    torch.manual_seed(0)
    for task in fashion.DEEP:
        kinds = [type(module).__name__ for module in task.build().modules()]
        assert kinds.count("BatchNorm1d") == 8 * ("-bn-" in task.name)
        assert kinds.count("ReLU" if task.name.endswith("relu") else "Sigmoid") == 8
    x = torch.randn(4, 1, 28, 28)
    skip, plain = (TASKS[f"fashion-deep-{word}sigmoid"].build() for word in ("skip-", ""))
    plain.load_state_dict(skip.state_dict())
    assert not torch.allclose(skip(x), plain(x))


@pytest.mark.skipif(not fashion.DEBIAN.is_dir(), reason=f"needs Debian's package {fashion.PACKAGE}")
def test_the_real_images_are_balanced_and_standardised(monkeypatch, tmp_path):
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    splits = TASK.load()
    assert [len(part[0]) for part in (splits.train, splits.validation, splits.test)] == [54_000, 6_000, 10_000]
    assert torch.bincount(splits.test[1]).tolist() == [1000] * 10
    sample = splits.fetch(splits.train[0][::20], None)
    assert abs(float(sample.mean())) < 0.02
    assert float(sample.std()) == pytest.approx(1, abs=0.02)
