from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic_core import to_jsonable_python

from benchmarks.programs import adaptive_norms
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
DATA_KEYS = {"environments", "epochs", "seeds", "seconds", "arms", "comparisons"}
ARM_KEYS = {"task", "arm", "p", "scale", "lr", "at_edge", "diverged", "tried", "score", "loss"}
HELD_KEYS = {"this", "that", "mean", "low", "high", "p_value", "task", "by"}


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


def test_what_the_documentation_shows_is_of_this_study():
    results = collect(Store.from_parquet(DATA / "adaptive-p.parquet"))
    assert results.study == STUDY
    assert results.whole
    assert not any(row.diverged or row.failed for row in results.rows)


@pytest.mark.exhaustive
def test_what_is_kept_of_the_norms_is_what_was_found(small, tmp_path):
    found = adaptive_norms.condensed(small)
    write(found, tmp_path / "kept.json")
    kept = json.loads((tmp_path / "kept.json").read_text(encoding="utf-8"))
    assert kept == to_jsonable_python(found)
    rows = small.tasks["digits"].rows
    for arm, row in zip(kept["arms"], rows, strict=True):
        assert arm["loss"] == pytest.approx([r.test_loss for r in row.runs], abs=1e-6)
        loss = row.trials[0].loss  # infinite where the one lr that is drawn diverges
        assert arm["tried"] == [[row.lr, None if loss == float("inf") else pytest.approx(loss, abs=1e-5)]]
    a, b = kept["arms"][1]["loss"], kept["arms"][0]["loss"]
    held = next(c for c in kept["comparisons"] if (c["this"], c["by"]) == (kept["arms"][1]["arm"], "loss"))
    assert held["that"] == STUDY.baseline
    assert held["mean"] == pytest.approx(sum(x - y for x, y in zip(a, b, strict=True)) / 2, abs=1e-5)
    assert len(kept["comparisons"]) == 2 * (len(rows) - 1)
    assert {*kept} == DATA_KEYS
    assert {*kept["arms"][0]} == ARM_KEYS
    assert {*held} == HELD_KEYS


@pytest.mark.parametrize("name", adaptive_norms.STUDIES)
def test_what_the_documentation_shows_of_the_norms_is_of_this_study(name):
    study = PRESETS[name]
    kept = json.loads((DATA / f"{name.replace('-', '_')}.json").read_text(encoding="utf-8"))
    assert {*kept} == DATA_KEYS
    assert all({*arm} == ARM_KEYS for arm in kept["arms"])
    assert all({*c} == HELD_KEYS for c in kept["comparisons"])
    assert [(a["task"], a["arm"]) for a in kept["arms"]] == [(t, arm.name) for t in study.tasks for arm in study.arms]
    assert tuple(kept["seeds"]) == study.seeds
    assert kept["epochs"] == {task: TASKS[task].epochs for task in study.tasks}
    assert all(len(arm["score"]) + arm["diverged"] == len(kept["seeds"]) for arm in kept["arms"])
    assert {len(arm["tried"]) for arm in kept["arms"]} <= {0, study.tuning.trials}
