from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.programs import adaptive, adaptive_norms, overhead
from benchmarks.programs.kept import write
from benchmarks.results import Results, collect
from benchmarks.store import Store
from benchmarks.study.clusters import connect
from benchmarks.study.execute import execute
from benchmarks.study.presets import PRESETS
from benchmarks.study.spec import Tuning
from benchmarks.tasks import TASKS

pytestmark = pytest.mark.usefixtures("one_thread")

DATA = Path(__file__).parents[2] / "docs/data"
STUDY = PRESETS["adaptive-p"]


def test_every_way_to_move_p_is_tried_at_both_lengths_of_step_beside_the_ends():
    pairs = adaptive.family([arm.name for arm in STUDY.arms])
    for arm in ("LPSGDM-matched", "LPSGDM"):
        for other in (arm, f"{arm}-linear", f"{arm}-constant", "SGD-EMA", "Signum"):
            assert (f"{arm}-adaptive", other) in pairs
    assert [other for arm, other in pairs if arm == "LPSGDM-matched-curvature"] == [
        *("LPSGDM-matched", "LPSGDM-matched-linear", "LPSGDM-matched-constant", "SGD-EMA", "Signum")
    ]
    assert len(pairs) == 15
    assert {name for pair in pairs for name in pair} == {arm.name for arm in STUDY.arms}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """The study with one setting for each arm, two seeds and two epochs."""
    folder = tmp_path_factory.mktemp("adaptive")
    study = STUDY.model_copy(update=dict(tuning=Tuning(trials=1, startup=1), seeds=(1, 2), budget=1 / 6))
    workers = connect(None, 2)
    try:
        execute(study, Store(folder), workers)
    finally:
        workers.close()
    return collect(Store(folder))


@pytest.mark.exhaustive
def test_what_is_kept_is_what_was_found(small, tmp_path):
    kept = adaptive.condensed(small)
    write(kept, tmp_path / "kept.json")
    assert adaptive.AdaptiveStudy.model_validate_json((tmp_path / "kept.json").read_text(encoding="utf-8")) == kept
    rows = small.tasks["digits"].rows
    for arm, row in zip(kept.arms, rows, strict=True):
        assert arm.accuracies == pytest.approx([r.test_score for r in row.runs], abs=1e-6)
        assert arm.losses[1] == pytest.approx(sum(r.curve[1].validation_loss for r in row.runs) / 2, abs=1e-5)
    by_name = {arm.arm: arm for arm in kept.arms}
    assert by_name["LPSGDM"].p == [8.0, 2.0]
    assert by_name["Signum"].p == [None, None]
    a, b = (by_name[name].accuracies for name in ("LPSGDM-adaptive", "LPSGDM"))
    found = next(c for c in kept.comparisons if (c.this, c.that) == ("LPSGDM-adaptive", "LPSGDM"))
    assert found.mean == pytest.approx(sum(x - y for x, y in zip(a, b, strict=True)) / 2, abs=1e-5)


def test_what_the_documentation_shows_is_of_this_study():
    kept = adaptive.AdaptiveStudy.model_validate_json((DATA / "adaptive_p.json").read_text(encoding="utf-8"))
    assert [arm.arm for arm in kept.arms] == [arm.name for arm in STUDY.arms]
    assert tuple(kept.seeds) == STUDY.seeds
    assert kept.epochs == TASKS["digits"].epochs
    assert all(len(arm.accuracies) + arm.diverged == len(kept.seeds) for arm in kept.arms)


@pytest.mark.exhaustive
def test_what_is_kept_of_the_norms_is_what_was_found(small):
    kept = adaptive_norms.condensed(small)
    rows = small.tasks["digits"].rows
    for arm, row in zip(kept.arms, rows, strict=True):
        assert arm.loss == pytest.approx([r.test_loss for r in row.runs], abs=1e-6)
        loss = row.trials[0].loss  # infinite where the one lr that is drawn diverges
        assert arm.tried == [(row.lr, None if loss == float("inf") else pytest.approx(loss, abs=1e-5))]
    a, b = kept.arms[1].loss, kept.arms[0].loss
    found = next(c for c in kept.comparisons if (c.this, c.by) == (kept.arms[1].arm, "loss"))
    assert found.that == STUDY.baseline
    assert found.mean == pytest.approx(sum(x - y for x, y in zip(a, b, strict=True)) / 2, abs=1e-5)
    assert len(kept.comparisons) == 2 * (len(rows) - 1)


@pytest.mark.parametrize("name", adaptive_norms.STUDIES)
def test_what_the_documentation_shows_of_the_norms_is_of_this_study(name):
    study = PRESETS[name]
    data = DATA / f"{name.replace('-', '_')}.json"
    kept = adaptive_norms.AdaptiveNorms.model_validate_json(data.read_text(encoding="utf-8"))
    assert [(a.task, a.arm) for a in kept.arms] == [(task, arm.name) for task in study.tasks for arm in study.arms]
    assert tuple(kept.seeds) == study.seeds
    assert kept.epochs == {task: TASKS[task].epochs for task in study.tasks}
    assert all(len(arm.score) + arm.diverged == len(kept.seeds) for arm in kept.arms)
    assert {len(arm.tried) for arm in kept.arms} <= {0, study.tuning.trials}


def test_the_overhead_is_measured_in_pairs(monkeypatch, tmp_path):
    monkeypatch.setattr(overhead, "BLOCK", 2)
    monkeypatch.setattr(overhead, "ROUNDS", 6)
    told = []
    result = overhead.measure(lambda phase, n: told.append(n))
    assert sum(told) == len(overhead.MAKERS) == overhead.count()
    assert [(c.optimizer, c.every) for c in result.costs] == [
        (name, every) for name in overhead.MAKERS for every in overhead.EVERY
    ]
    assert all(c.low <= c.median <= c.high for c in result.costs)
    assert len(overhead.lines(result)) == len(result.costs)
    write(result, tmp_path / "overhead.json")
    assert json.loads((tmp_path / "overhead.json").read_text(encoding="utf-8"))["default"] == overhead.DEFAULT_EVERY


def test_the_overhead_of_the_documentation_is_at_the_default_interval():
    kept = overhead.Overhead.model_validate_json((DATA / "overhead.json").read_text(encoding="utf-8"))
    assert kept.default == overhead.DEFAULT_EVERY
    assert {c.every for c in kept.costs} == set(overhead.EVERY)
    assert {c.optimizer for c in kept.costs} == set(overhead.MAKERS)
