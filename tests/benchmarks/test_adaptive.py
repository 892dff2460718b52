from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import adaptive, overhead
from benchmarks.arms import ARMS, make_optimizer
from benchmarks.presets import PRESETS
from benchmarks.report.figures import figures
from benchmarks.report.words import adaptive_family, findings
from benchmarks.results import Results, collect
from benchmarks.spec import ArmPlan
from benchmarks.store import Store
from benchmarks.study import execute
from benchmarks.tasks import TASKS
from benchmarks.training import run
from normopt.schedules import AdaptiveP, CosineP, LinearP
from tests.benchmarks.test_training import spec

DATA = Path(__file__).parents[2] / "docs/data"
STUDY = PRESETS["adaptive-p"]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_the_quick_study_has_the_arms_that_it_had():
    names = [arm.name for arm in PRESETS["quick"].arms]
    assert names == [
        *("SGD", "SGD-EMA", "SignSGD", "Signum", "AdamW", "LPSGD", "LPSGDM", "LPSGDM-constant", "LPSGDM-matched")
    ]


def test_every_way_to_move_p_is_tried_at_both_lengths_of_step_beside_the_ends():
    names = {arm.name for arm in STUDY.arms}
    for length in ("LPSGDM", "LPSGDM-matched"):
        assert {length, f"{length}-linear", f"{length}-constant", f"{length}-adaptive"} <= names
    assert {"SGD-EMA", "Signum"} <= names
    assert len(STUDY.final_seeds) >= 5
    assert STUDY.tuning_seed not in STUDY.final_seeds


@pytest.mark.parametrize("arm", [arm.name for arm in ARMS.values() if arm.schedule])
def test_an_arms_schedule_is_what_it_says(arm):
    kind = {"cosine": CosineP, "linear": LinearP, "adaptive": AdaptiveP}[ARMS[arm].schedule]
    settings = spec(arm=arm, agr=False, weight_decay=0.0)
    optimizer, schedule = make_optimizer(settings, TASKS["digits"].build(), None)
    assert type(schedule) is kind
    assert optimizer.param_groups[0]["p"] == (2.0 if kind is AdaptiveP else 8.0)


def test_an_adaptive_p_moves_after_every_step_and_others_after_every_epoch(monkeypatch):
    steps = {AdaptiveP: 0, CosineP: 0}
    for kind in steps:
        monkeypatch.setattr(kind, "step", counted(kind, steps))
    for arm in ("LPSGDM-matched", "LPSGDM-matched-adaptive"):
        record = run(spec(arm=arm, lr=1.0, agr=False, weight_decay=0.0, epochs=3))
    assert steps == {AdaptiveP: 3 * 17, CosineP: 3}
    first, *later = (epoch.p for epoch in record.epochs)
    assert first == 2
    assert all(2 < p < 8 for p in later)


def counted(kind, steps):
    real = kind.step

    def step(self):
        steps[kind] += 1
        real(self)

    return step


def test_a_straight_line():
    record = run(spec(arm="LPSGDM-linear", agr=False, weight_decay=0.0, epochs=4))
    assert [epoch.p for epoch in record.epochs] == pytest.approx([8, 6, 4, 2])


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """The study with one learning rate for each arm, two seeds and two epochs."""
    folder = tmp_path_factory.mktemp("adaptive")
    plans = tuple(ArmPlan(name=arm.name, lrs=(ARMS[arm.name].lr,), regularizers=("none",)) for arm in STUDY.arms)
    study = STUDY.model_copy(update=dict(arms=plans, final_seeds=(1, 2), epochs=2))
    execute(study, Store(folder), workers=2, advance=lambda phase, n: None)
    return collect(Store(folder))


def test_the_report_compares_each_adaptive_arm_with_its_twins_and_the_ends(small):
    pairs = [(c.row.arm, c.against.arm) for c in adaptive_family(small)]
    for arm in ("LPSGDM-matched", "LPSGDM"):
        for other in (arm, f"{arm}-linear", f"{arm}-constant", "SGD-EMA", "Signum"):
            assert (f"{arm}-adaptive", other) in pairs
    assert len(pairs) == 10
    finding = next(f for f in findings(small) if f.title == "What a p by the gradient does")
    assert finding.text.count(" minus ") == 10
    lines = [(t.line.color, t.line.dash) for t in figures(small)[0].figure.data]
    assert len(set(lines)) == len(lines) == 10


def test_what_is_kept_is_what_was_found(small, tmp_path):
    kept = adaptive.condensed(small)
    adaptive.write(kept, tmp_path / "kept.json")
    assert adaptive.AdaptiveStudy.model_validate_json((tmp_path / "kept.json").read_text(encoding="utf-8")) == kept
    for arm, row in zip(kept.arms, small.rows, strict=True):
        assert arm.accuracies == pytest.approx([r.test_accuracy for r in row.runs], abs=1e-6)
        assert arm.losses[1] == pytest.approx(sum(r.epochs[1].validation_loss for r in row.runs) / 2, abs=1e-5)
    by_name = {arm.arm: arm for arm in kept.arms}
    assert by_name["LPSGDM"].p == [8.0, 2.0]
    assert by_name["Signum"].p == [None, None]
    a, b = (by_name[name].accuracies for name in ("LPSGDM-adaptive", "LPSGDM"))
    found = next(c for c in kept.comparisons if (c.this, c.that) == ("LPSGDM-adaptive", "LPSGDM"))
    assert found.mean == pytest.approx(sum(x - y for x, y in zip(a, b, strict=True)) / 2, abs=1e-5)


def test_what_the_documentation_shows_is_of_this_study():
    kept = adaptive.AdaptiveStudy.model_validate_json((DATA / "adaptive_p.json").read_text(encoding="utf-8"))
    assert [arm.arm for arm in kept.arms] == [arm.name for arm in STUDY.arms]
    assert tuple(kept.seeds) == STUDY.final_seeds
    assert kept.epochs == STUDY.epochs
    assert all(len(arm.accuracies) + arm.diverged == len(kept.seeds) for arm in kept.arms)


def test_the_overhead_is_measured_in_pairs(monkeypatch, tmp_path):
    monkeypatch.setattr(overhead, "BLOCK", 2)
    told = []
    result = overhead.measure(6, lambda phase, n: told.append(n))
    assert sum(told) == len(overhead.MAKERS)
    assert [(c.optimizer, c.every) for c in result.costs] == [
        (name, every) for name in overhead.MAKERS for every in overhead.EVERY
    ]
    assert all(c.low <= c.median <= c.high for c in result.costs)
    assert len(overhead.lines(result)) == len(result.costs)
    overhead.write(result, tmp_path / "overhead.json")
    assert json.loads((tmp_path / "overhead.json").read_text(encoding="utf-8"))["default"] == overhead.DEFAULT_EVERY


def test_the_overhead_of_the_documentation_is_at_the_default_interval():
    kept = overhead.Overhead.model_validate_json((DATA / "overhead.json").read_text(encoding="utf-8"))
    assert kept.default == overhead.DEFAULT_EVERY
    assert {c.every for c in kept.costs} == set(overhead.EVERY)
    assert {c.optimizer for c in kept.costs} == set(overhead.MAKERS)
