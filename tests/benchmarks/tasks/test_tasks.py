"""What every task must keep, and what each that comes without files is."""

from __future__ import annotations

import hashlib
import inspect
import math
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from sklearn.datasets import load_breast_cancer, load_diabetes

from benchmarks.study.spec import RunSpec
from benchmarks.tasks import TASKS as REGISTERED
from benchmarks.tasks import Task, mnist1d
from benchmarks.tasks import diabetes_sparse as sparse
from benchmarks.tasks.bytes import CONTEXT, CORPUS, HELD_OUT, PER_EPOCH, _load, parts
from benchmarks.tasks.digits_noise import WRONG
from benchmarks.tasks.images import TASKS as IMAGES
from benchmarks.training import evaluate, run

pytestmark = pytest.mark.usefixtures("one_thread")

ON_FILES = [name for name in REGISTERED if name.startswith("fashion-")] + [task.name for task in IMAGES]
ON_FILES += ["mnist1d"] if find_spec("mnist1d") is None else []
# Other tests register toys, whose workers find them so.
TASKS = {name: task for name, task in REGISTERED.items() if type(task).__module__.startswith("benchmarks.")}
ALWAYS = [name for name in TASKS if name not in ON_FILES]
# A learning rate of AdamW's at which every task gets somewhere in a tenth of its budget.
RATES = {"quadratic": 0.1, "quadratic-axes": 0.1, "rosenbrock": 0.05, "diabetes-sparse": 0.03, "bytes": 3e-3}


def spec(name: str, share: float = 0.25) -> RunSpec:
    task, settings = TASKS[name], {"lr": RATES.get(name, 1e-2)}
    epochs = 1 if name == "bytes" else max(2, round(share * task.epochs))
    return RunSpec(task=name, optimizer="adamw", settings=settings, seed=1, epochs=epochs, batch_size=task.batch_size)


def test_every_task_fits_the_protocol():
    wanted = [*inspect.get_annotations(Task), *(n for n in vars(Task) if not n.startswith("_"))]
    assert "measures" in wanted
    for name, task in TASKS.items():
        assert [attribute for attribute in wanted if not hasattr(task, attribute)] == [], name
        assert task.name == name
        assert task.epochs >= 1 <= task.batch_size


@pytest.mark.parametrize("name", ALWAYS)
def test_every_task_learns(name):
    task = TASKS[name]
    record = run(spec(name))
    torch.manual_seed(1)
    splits = task.load()
    before, _ = evaluate(task.build(), task, splits, splits.validation)
    assert not record.diverged
    assert record.last_loss < 0.75 * before
    assert {"zeros", *task.measures(task.build())} == set(record.measures)


@pytest.mark.parametrize("name", [name for name in ALWAYS if name != "bytes"])
def test_equal_specs_give_equal_records(name):
    kept = {"exclude": {"ms_per_step", "seconds"}}
    first = run(spec(name, 0.1))
    torch.rand(7)  # the state of torch's generator is no part of a run
    assert run(spec(name, 0.1)).model_dump(**kept) == first.model_dump(**kept)
    other = run(spec(name, 0.1).model_copy(update={"seed": 2}))
    assert other.curve != first.curve


@pytest.mark.parametrize("name", TASKS)
def test_a_description_counts_the_weights_right(name):
    with torch.device("meta" if name in ON_FILES else "cpu"):
        params = list(TASKS[name].build().parameters())
    for chosen in ([p for p in params if p.dim() > 1], [p for p in params if p.dim() <= 1]):
        assert f"{sum(p.numel() for p in chosen):,} " in TASKS[name].description.replace(")", " ")


@pytest.mark.parametrize("name", ALWAYS)
def test_the_data_are_the_same_at_every_call_and_no_input_is_in_two_parts(name):
    splits, again = TASKS[name].load(), TASKS[name].load()
    for part in ("train", "validation", "test"):
        for old, new in zip(getattr(splits, part), getattr(again, part), strict=True):
            assert torch.equal(old, new)
        assert len(getattr(splits, part)[0]) == len(getattr(splits, part)[1])
    if name.startswith(("quad", "rosen")):
        return
    seen = [{row.numpy().tobytes() for row in part[0]} for part in (splits.train, splits.validation, splits.test)]
    if name != "bytes":  # whole files are apart, but a window of 64 equal bytes can be in several
        assert len(seen[0] | seen[1] | seen[2]) == sum(map(len, seen))


def test_the_digits_are_whole_and_balanced():
    splits = TASKS["digits"].load()
    found = [splits.train, splits.validation, splits.test]
    assert [len(x) for x, _ in found] == [1078, 359, 360]
    for x, y in found:
        assert x.min() == 0
        assert x.max() == 1
        assert (torch.bincount(y, minlength=10) / len(y) - 0.1).abs().max() < 0.005


def test_a_quarter_of_the_training_labels_is_wrong_and_no_other():
    clean, noisy = TASKS["digits"].load(), TASKS["digits-noise"].load()
    wrong = noisy.train[1] != clean.train[1]
    assert int(wrong.sum()) == round(WRONG * len(wrong)) == 270
    # Away from the truth by each of 1 … 9 about as often: χ² of 8 degrees, its 99.9 % point.
    away = torch.bincount((noisy.train[1] - clean.train[1])[wrong] % 10, minlength=10).double()[1:]
    assert float(((away - 30) ** 2 / 30).sum()) < 26.1
    for part in ("validation", "test"):
        assert torch.equal(getattr(noisy, part)[1], getattr(clean, part)[1])
    assert torch.equal(noisy.train[0].flatten(1), clean.train[0])


def test_the_tables_are_standardised_by_the_training_data_alone():
    for name in ("breast-cancer", "diabetes-sparse"):
        splits = TASKS[name].load()
        x = splits.train[0].double()
        assert x.mean(0).abs().max() < 1e-5
        assert (x.std(0, correction=0) - 1).abs().max() < 1e-5
        assert (splits.test[0].double().mean(0).abs() > 1e-3).any()
    # An affine map of every column, and the same one in every part: undone, these are the real table's rows.
    table = load_breast_cancer(return_X_y=True)[0]
    splits = TASKS["breast-cancer"].load()
    x = torch.cat([splits.train[0], splits.validation[0], splits.test[0]]).double().numpy()
    for column in range(30):
        a, b = np.sort(x[:, column]), np.sort(table[:, column])
        np.testing.assert_allclose((a - a[0]) / (a[-1] - a[0]), (b - b[0]) / (b[-1] - b[0]), atol=1e-5)


def test_logistic_regression_agrees_with_numpy():
    task, splits = TASKS["breast-cancer"], TASKS["breast-cancer"].load()
    torch.manual_seed(0)
    model = task.build()
    loss, accuracy = evaluate(model, task, splits, splits.test)
    w, b = (p.detach().double().numpy() for p in model.parameters())
    z = splits.test[0].double().numpy() @ w[0] + b
    y = splits.test[1].double().numpy()
    assert loss == pytest.approx(np.mean(np.log1p(np.exp(-z)) * y + np.log1p(np.exp(z)) * (1 - y)), rel=1e-5)
    assert accuracy == np.mean((z > 0) == (y == 1))


def test_the_known_support_is_half_real_and_explains_what_it_is_said_to():
    w = sparse.coefficients().numpy()
    assert np.count_nonzero(w[: sparse.REAL]) == np.count_nonzero(w[sparse.REAL :]) == sparse.RELEVANT
    assert set(np.abs(w[w != 0]) // 0.5) <= {1.0, 2.0}  # between 0.5 and 1.5
    splits = TASKS["diabetes-sparse"].load()
    for x, y in (splits.train, splits.validation, splits.test):
        left = y.double().numpy() - x.double().numpy() @ w
        assert np.std(left) == pytest.approx(sparse.NOISE, rel=0.2)
    # The first ten columns are the real table's, whose first two moments the standardisation takes away.
    real = np.concatenate([part[0][:, 2].double().numpy() for part in (splits.train, splits.validation, splits.test)])
    table = np.sort(load_diabetes(return_X_y=True)[0][:, 2])
    real = np.sort(real)
    np.testing.assert_allclose((real - real[0]) / np.ptp(real), (table - table[0]) / np.ptp(table), atol=1e-5)


def test_support_and_coefficients_are_measured_as_an_oracle_does():
    task, known = TASKS["diabetes-sparse"], sparse.coefficients().numpy()
    model = task.build()
    draws = np.random.default_rng(0)
    w = known + 0.3 * draws.standard_normal(len(known))
    w[draws.permutation(len(w))[:120]] = 0
    with torch.no_grad():
        model.weight.copy_(torch.from_numpy(w[None]))
    w = model.weight.detach().double().numpy()[0]

    def oracle(found: set[int]) -> float:
        relevant = set(np.flatnonzero(known))
        precision, recall = len(found & relevant) / len(found), len(found & relevant) / len(relevant)
        return 2 * precision * recall / (precision + recall)

    measured = task.measures(model)
    assert measured["support F1"] == pytest.approx(oracle(set(np.flatnonzero(w))))
    assert measured["top support F1"] == pytest.approx(oracle(set(np.argsort(-np.abs(w))[:10])))
    expected = np.sqrt(((w - known) ** 2).sum() / (known**2).sum())
    assert measured["coefficient error"] == pytest.approx(expected)
    with torch.no_grad():
        model.weight.zero_()
    nothing = task.measures(model)
    assert nothing["support F1"] == 0
    assert nothing["coefficient error"] == 1


def test_r2_is_one_minus_the_unexplained_part():
    y, guess = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([[1.5], [2.0], [3.0]])
    assert TASKS["diabetes-sparse"].score(guess, y) == pytest.approx(1 - 1.25 / (42 / 9))


@pytest.mark.parametrize(("name", "rotated"), [("quadratic", True), ("quadratic-axes", False)])
def test_the_quadratic_has_its_condition_number_and_its_optimum(name, rotated):
    task = TASKS[name]
    model = task.build()
    splits = task.load()

    def f(w: torch.Tensor) -> torch.Tensor:
        weight = {"matrix.weight": w.view(16, 16)}
        return task.loss(torch.func.functional_call(model, weight, (splits.test[0],)), splits.test[1])

    best = model.optimum.flatten()
    assert f(best) == 0
    hessian = torch.func.hessian(f)(best).double()
    values = torch.linalg.eigvalsh(hessian)
    assert values[-1] / values[0] == pytest.approx(1e4, rel=1e-2)
    assert values[-1] == pytest.approx(1, rel=1e-5)
    ratios = values[1:] / values[:-1]
    assert ratios[100:].std() < 1e-3
    assert bool((hessian - hessian.diag().diag()).abs().max() > 1e-2) == rotated
    with torch.no_grad():
        model.matrix.weight.copy_(model.optimum + 1)
    assert task.measures(model)["distance"] == pytest.approx(16, rel=1e-6)
    assert evaluate(model, task, splits, splits.test)[1] == pytest.approx(math.log10(float(f(best + 1))), rel=1e-4)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_run_on_the_quadratic_ends_where_the_closed_form_does(momentum):
    """In the directions of the curvatures every error is multiplied by a known number in every step."""
    settings = {"lr": 1.0, "momentum": momentum}
    record = run(RunSpec(task="quadratic", optimizer="sgd", settings=settings, seed=5, epochs=20, batch_size=1))
    torch.manual_seed(5)
    model = TASKS["quadratic"].build()
    error = (model.matrix.weight.detach() - model.optimum).flatten().double().numpy()
    root = model.root.double().numpy()
    curvature = (root**2).sum(1)
    error = (root / np.sqrt(curvature)[:, None]) @ error
    velocity = np.zeros_like(error)
    for step in range(1000):
        velocity = momentum * velocity + curvature * error
        error = error - (1 + math.cos(math.pi * step / 1000)) / 2 * velocity
    assert record.test_loss == pytest.approx((curvature * error**2).sum() / 2, rel=1e-3)


def test_the_known_order_on_the_quadratic():
    """At a condition number of 1e4 momentum goes further than none, each at its largest stable learning rate."""
    plain = dict(task="quadratic", seed=5, epochs=20, batch_size=1)
    slow = run(RunSpec(optimizer="sgd", settings={"lr": 1.9, "momentum": 0.0}, **plain))
    fast = run(RunSpec(optimizer="sgd", settings={"lr": 3.6, "momentum": 0.9}, **plain))
    assert fast.test_score < slow.test_score - 1


def test_rosenbrocks_valley_agrees_with_numpy_and_ends_at_one():
    task, splits = TASKS["rosenbrock"], TASKS["rosenbrock"].load()
    torch.manual_seed(0)
    model = task.build()
    w = model.matrix.weight.detach().double().numpy().ravel()
    assert np.abs(w).max() <= 0.5
    expected = np.mean(100 * (w[1:] - w[:-1] ** 2) ** 2 + (1 - w[:-1]) ** 2)
    loss, score = evaluate(model, task, splits, splits.test)
    assert loss == pytest.approx(expected, rel=1e-5)
    assert score == pytest.approx(np.log10(expected), abs=1e-5)
    torch.nn.init.ones_(model.matrix.weight)
    assert evaluate(model, task, splits, splits.test) == (0, -16)
    assert task.measures(model)["distance"] == 0


def test_the_corpus_is_the_same_at_every_reading():
    task = TASKS["bytes"]
    first, data, files = task.fingerprint(), task.load(), parts()
    _load.cache_clear()
    parts.cache_clear()
    assert task.fingerprint() == first
    assert parts() == files
    assert torch.equal(task.load().train[0], data.train[0])


def test_the_corpus_is_split_by_whole_files():
    train, validation, test = parts()
    files = [*train, *validation, *test]
    assert len(set(files)) == len(files)
    whole = b"".join(file.read_bytes() for file in files)
    assert hashlib.sha256(whole).hexdigest() == TASKS["bytes"].fingerprint()
    shares = [sum(file.stat().st_size for file in part) / CORPUS for part in (train, validation, test)]
    assert shares == pytest.approx([0.8, 0.1, 0.1], abs=0.03)
    # What is trained on are the bytes of the training files, from the first on.
    x, y = TASKS["bytes"].load().train
    assert bytes(x.flatten().tolist()) == b"".join(file.read_bytes() for file in train)[: x.numel()]
    assert torch.equal(x.flatten()[1:], y.flatten()[:-1])
    assert len(x) > 20 * PER_EPOCH
    splits = TASKS["bytes"].load()
    assert all(part.shape == (HELD_OUT, CONTEXT) for part in (*splits.validation, *splits.test))


def test_only_data_that_differ_between_machines_have_a_fingerprint():
    assert [name for name in ALWAYS if TASKS[name].fingerprint() is not None] == [
        "bytes",
        *["mnist1d"] * ("mnist1d" in ALWAYS),
    ]


def test_no_byte_sees_the_ones_after_it():
    task = TASKS["bytes"]
    model, text = task.build(), task.load().test[0][:1].clone()
    before = model(text)
    text[0, 40] = (text[0, 40] + 1) % 256
    after = model(text)
    torch.testing.assert_close(after[0, :40], before[0, :40])
    assert not torch.equal(after[0, 40], before[0, 40])


@pytest.mark.skipif("mnist1d" in ON_FILES, reason="needs the package mnist1d")
def test_mnist1d_is_the_packages_and_leaves_the_generators_alone():
    from mnist1d.data import get_dataset_args, make_dataset

    theirs = make_dataset(get_dataset_args())
    mnist1d._load.cache_clear()
    state = np.random.get_state()[1].tolist()  # noqa: NPY002
    splits = TASKS["mnist1d"].load()
    assert np.random.get_state()[1].tolist() == state  # noqa: NPY002
    assert [len(part[0]) for part in (splits.train, splits.validation, splits.test)] == [3600, 400, 1000]
    np.testing.assert_allclose(splits.test[0].squeeze(1).numpy(), theirs["x_test"], rtol=1e-6)
    assert splits.test[1].tolist() == theirs["y_test"].tolist()


def test_without_its_package_mnist1d_says_what_to_install(monkeypatch):
    mnist1d._load.cache_clear()
    monkeypatch.setitem(sys.modules, "mnist1d.data", None)
    with pytest.raises(ModuleNotFoundError, match="pip install mnist1d"):
        TASKS["mnist1d"].load()
