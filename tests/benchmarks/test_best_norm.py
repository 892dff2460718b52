from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.utils import parameters_to_vector
from typer.testing import CliRunner

from benchmarks.cli import app
from benchmarks.programs import best_norm
from benchmarks.programs.best_norm import NORMS, PS, Checkpoint, Decreases, Plan, Setting
from benchmarks.stats import least_exact
from benchmarks.tasks import TASKS

pytestmark = pytest.mark.usefixtures("one_thread")

DATA = Path(__file__).parents[2] / "docs/data/best_norm.json"
TINY = Setting(plans={"digits": Plan(epochs=1, batches=1, large=32)}, times=(0.0, 1.0), lanczos=8)


@pytest.fixture
def tensors() -> list[torch.Tensor]:
    draws = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=draws, dtype=torch.float64) for shape in ((4, 3), (4,), (2, 3, 2))]


def dual_maps(parts: list[np.ndarray]) -> list[np.ndarray]:
    """The dual map of every norm of NORMS, up to its length, written from its definition."""
    flat = np.concatenate([x.ravel() for x in parts])
    found = []
    for p in PS:
        if p == 1:
            u = np.where(np.abs(flat) == np.abs(flat).max(), np.sign(flat), 0.0)
        else:
            u = np.sign(flat) * np.abs(flat) ** (1 / (p - 1))
        found.append(u)
    spectral, rows = [], []
    for x in parts:
        if x.ndim == 1:
            spectral.append(x / np.linalg.norm(x))
            rows.append(x / np.linalg.norm(x))
        else:
            matrix = x.reshape(len(x), -1)
            u, _, vt = np.linalg.svd(matrix, full_matrices=False)
            spectral.append((u @ vt).ravel())
            rows.append((matrix / np.linalg.norm(matrix, axis=1, keepdims=True)).ravel())
    return [*found, np.concatenate(spectral), np.concatenate(rows)]


def test_directions_are_the_dual_maps_and_in_adaptive_coordinates_those_between_two_whitenings(tensors):
    roots = [0.5 + torch.rand_like(x) for x in tensors]
    found = best_norm.directions(tensors, roots)
    c, r = [x.numpy() for x in tensors], [x.numpy() for x in roots]
    back = np.concatenate([x.ravel() for x in r])
    expected = [*dual_maps(c), *(u / back for u in dual_maps([x / y for x, y in zip(c, r, strict=True)]))]
    expected = [u / np.linalg.norm(u) for u in expected]
    assert len(expected) == 2 * len(NORMS)
    np.testing.assert_allclose(found.numpy(), np.stack(expected), rtol=1e-9, atol=1e-12)


def test_every_direction_is_of_descent_and_a_gradient_of_zero_has_none(tensors):
    roots = [0.5 + torch.rand_like(x) for x in tensors]
    assert (best_norm.directions(tensors, roots) @ parameters_to_vector(tensors) > 0).all()
    assert not best_norm.directions([torch.zeros_like(x) for x in tensors], roots).any()


def test_coordinates_and_step_are_those_of_adam():
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in ((5, 3), (3,))]
    optimizer = torch.optim.AdamW(params, lr=1e-2, weight_decay=0.0)
    v = [torch.zeros_like(p) for p in params]
    before = parameters_to_vector(params).detach()
    for _ in range(3):
        before = parameters_to_vector(params).detach().clone()
        for i, p in enumerate(params):
            p.grad = torch.randn_like(p)
            v[i] = 0.999 * v[i] + 0.001 * p.grad**2
        optimizer.step()
    roots, direction = best_norm.adam(optimizer)
    for root, square in zip(roots, v, strict=True):
        torch.testing.assert_close(root**2, (square / (1 - 0.999**3)).sqrt() + 1e-8)
    torch.testing.assert_close(1e-2 * direction, before - parameters_to_vector(params).detach(), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("start", [1e-4, 0.03, 1.9])
@pytest.mark.parametrize("best", [2e-4, 0.0371, 1.3])
def test_the_line_search_finds_the_best_step_on_a_quadratic(start, best):
    calls = []

    def decrease(t: float) -> float:
        calls.append(t)
        return 5.0 * (2 * best * t - t * t)

    found, length = best_norm.search(decrease, start)
    assert found == pytest.approx(5.0 * best**2, rel=1e-9)
    assert length == pytest.approx(best, rel=1e-5)
    assert len(calls) == len(set(calls)) <= 20


def test_the_line_search_is_near_the_best_step_of_a_loss_that_overflows_beyond_it():
    def decrease(t: float) -> float:
        return math.sqrt(t) - t if t < 0.4 else -math.inf

    found, length = best_norm.search(decrease, 0.3)
    assert found == pytest.approx(0.25, rel=1e-3)
    assert length == pytest.approx(0.25, rel=0.1)


@pytest.mark.parametrize("decrease", [lambda t: -t, lambda t: 0.0, lambda t: -math.inf], ids=["up", "flat", "overflow"])
def test_where_no_length_decreases_the_loss_the_best_step_is_none(decrease):
    assert best_norm.search(decrease, 0.01) == (0.0, 0.0)


def test_a_step_that_never_stops_helping_is_no_longer_than_the_longest():
    _, length = best_norm.search(lambda t: t, 0.01)
    assert best_norm.LONGEST <= length <= 4 * best_norm.LONGEST


def test_decreases_are_those_of_the_loss_and_the_weights_stay():
    torch.manual_seed(0)
    task = TASKS["digits"]
    model, splits = task.build(), task.load()
    data, held = (tuple(x[:64] for x in part) for part in (splits.train, splits.validation))
    before = [p.detach().clone() for p in model.parameters()]
    ones = [torch.ones_like(p) for p in before]
    found = best_norm.decreases(task, model, [data], held, ones, 0.01)
    assert all(torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))
    for by, near in (("best", 2e-3), ("held", 2e-3), ("equal", 2e-3), ("equal_held", 2e-3), ("length", 2e-2)):
        assert found.of(by, False) == pytest.approx(found.of(by, True), rel=near, abs=1e-6)  # P = 1
    two = PS.index(2.0)
    start, g = parameters_to_vector(before), parameters_to_vector(best_norm.gradient(task, model, data))
    loss = {id(part): float(task.loss(model(part[0]), part[1]).detach()) for part in (data, held)}
    for length, by, part in ((found.length[two], "best", data), (0.01, "equal", data), (0.01, "equal_held", held)):
        torch.nn.utils.vector_to_parameters(start - length * start.norm() * g / g.norm(), model.parameters())
        now = float(task.loss(model(part[0]), part[1]).detach())
        assert getattr(found, by)[two] == pytest.approx(loss[id(part)] - now, rel=1e-2)
    assert all(best >= equal for best, equal in zip(found.best, found.equal, strict=True))
    assert all(best >= equal for best, equal in zip(found.held, found.equal_held, strict=True))


def made(task: str, seed: int, time: float, best: float, six: float, anisotropy: float) -> Checkpoint:
    """A checkpoint at which ℓp with p = best decreases the loss most, and ℓ6 so many times as much as ℓ2."""
    values = [0.0] * len(NORMS)
    values[PS.index(2.0)], values[PS.index(6.0)], values[PS.index(best)] = 0.1, 0.1 * six, 1.0
    found = Decreases(**dict.fromkeys(Decreases.model_fields, values * 2))
    numbers = dict.fromkeys(("loss", "density", "largest", "smallest", "trace", "step"), 1.0)
    return Checkpoint(task=task, seed=seed, time=time, anisotropy=anisotropy, batch=found, large=found, **numbers)


def test_a_training_is_measured_at_its_checkpoints():
    found = best_norm.watch("digits", 1, TINY)
    assert [(c.seed, c.time) for c in found] == [(1, 0.0), (1, 1.0)]
    assert all(len(getattr(c, kind).best) == 2 * len(NORMS) for c in found for kind in ("batch", "large"))
    assert all(c.large.best[PS.index(2.0)] > 0 and c.anisotropy > 1 for c in found)
    first, last = (c.step for c in found)
    w = parameters_to_vector(TASKS["digits"].build().parameters()).detach()
    signs = TINY.lr * len(w) ** 0.5 / float(w.norm())  # Adam's first step, but where the gradient is exactly 0
    assert 0.7 * signs < first <= 1.05 * signs
    assert 0 < last < first


def test_the_command_measures_every_task_and_seed(monkeypatch, tmp_path):
    def watch(task: str, seed: int, setting: Setting) -> list[Checkpoint]:
        return [made(task, seed, time, 2.0, 1.0 + seed, 8.0 + seed) for time in setting.times]

    monkeypatch.setattr(best_norm, "watch", watch)
    monkeypatch.setattr(best_norm, "SEEDS", (1, 2))
    out = tmp_path / "best_norm.json"
    done = CliRunner().invoke(app, ["best-norm", "--out", str(out), "--workers", "1"])
    assert done.exit_code == 0, done.output
    found = json.loads(out.read_text(encoding="utf-8"))
    checkpoints = [Checkpoint.model_validate(c) for c in found["checkpoints"]]
    assert [(c.task, c.seed, c.time) for c in checkpoints] == [
        (task, seed, time) for task in best_norm.PLANS for seed in (1, 2) for time in Setting().times
    ]
    assert found["changes"] == best_norm.changes(checkpoints)
    assert [*tmp_path.iterdir()] == [out]


def test_changes_are_those_that_were_made():
    checkpoints = [
        made(task, seed, time, *at)
        for task, late in (("digits", (1.5, 0.5, 8.0)), ("bytes", (math.inf, 4.0, 32.0)))
        for seed in range(8)
        for time, at in ((0.0, (math.inf, 4.0, 32.0)), (0.1, (math.inf, 4.0, 32.0)), (0.6, late), (1.0, late))
    ]
    changes = [SimpleNamespace(**c) for c in best_norm.changes(checkpoints)]
    found = {(c.what, c.task): c for c in changes if (c.gradient, c.by) == ("large", "best")}
    three = {"1/p": (0.0, 0.6667, -1.0), "ℓ6/ℓ2": (2.0, -1.0, 1.0), "anisotropy": (5.0, 3.0, 1.0)}
    for what, (early, late, rank) in three.items():
        moved, same = found[what, "digits"], found[what, "bytes"]
        assert moved.early == [early] * 3
        assert moved.late == [late] * 3
        assert moved.difference == pytest.approx([late - early] * 3)
        assert moved.p_value == pytest.approx(2 * least_exact(8), rel=1e-3)  # Holm's, of two tasks
        assert moved.correlation == pytest.approx([rank] * 3)
        assert (same.difference, same.p_value, same.correlation) == ([0.0] * 3, 1.0, [0.0] * 3)


def test_a_checkpoint_at_which_nothing_helps_has_no_best_p_and_is_left_out():
    nothing = Decreases(**dict.fromkeys(Decreases.model_fields, [0.0] * 2 * len(NORMS)))
    assert math.isnan(best_norm.inverse(nothing, "held", False))
    times = (0.0, 0.1, 0.6, 1.0)
    checkpoints = [made("digits", seed, t, 4.0 - seed if t < 0.5 else 2.0, 1.0, 8.0) for seed in (0, 1) for t in times]
    checkpoints = [c.model_copy(update={"large": nothing}) if c.time in (0.1, 0.6) else c for c in checkpoints]
    wanted = ("1/p", "large", False, "held")
    names = ("what", "gradient", "adaptive", "by")
    (found,) = (c for c in best_norm.changes(checkpoints) if tuple(map(c.get, names)) == wanted)
    assert (found["early"][0], found["late"][0]) == pytest.approx(((1 / 4 + 1 / 3) / 2, 1 / 2), rel=1e-3)


@pytest.mark.parametrize(
    ("two", "six", "expected"), [(1.0, 2.0, 1.0), (1.0, 100.0, 3.0), (1.0, 0.0, -3.0), (0.0, 1e-9, 3.0), (0, 0, 0)]
)
def test_the_ratio_of_decreases_has_bounds(two, six, expected):
    values = [0.0] * len(NORMS)
    values[PS.index(2.0)], values[PS.index(6.0)] = two, six
    assert best_norm.ratio(Decreases(**dict.fromkeys(Decreases.model_fields, values * 2)), "best", True) == expected


def test_the_kept_changes_are_those_of_the_kept_checkpoints():
    kept = json.loads(DATA.read_text(encoding="utf-8"))
    assert tuple(kept["norms"]) == NORMS
    assert kept["changes"] == best_norm.changes([Checkpoint.model_validate(c) for c in kept["checkpoints"]])
    assert Setting.model_validate(kept["setting"]) == Setting()
    assert DATA.stat().st_size <= 500_000
