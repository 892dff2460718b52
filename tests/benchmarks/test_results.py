"""What is gathered from a store, against the known truth of a synthetic study."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats as scipy_stats

from benchmarks import results as numbers
from benchmarks.report import data
from benchmarks.report.words import findings
from benchmarks.results import Results, collect, validation_loss
from benchmarks.store import Store, UnfitStore
from benchmarks.study.presets import SMOKE
from tests.benchmarks.synthetic import DOWN, NOISE, STEPS, STUDY, TRUTHS, UP, Truth, fill

pytestmark = pytest.mark.usefixtures("toys")


@pytest.fixture(scope="module")
def store(toys: None, tmp_path_factory: pytest.TempPathFactory) -> Store:
    return fill(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def results(store: Store) -> Results:
    return collect(store)


def test_the_choice_is_the_trial_of_the_lowest_loss(results):
    for row in results.rows:
        if not row.arm.search:
            assert row.trials == ()
            twin = results.tasks[row.task].row(row.arm.tuned_as or "")
            assert row.lr == twin.lr
            continue
        assert len(row.trials) == STUDY.tuning.trials
        losses = [trial.loss for trial in row.trials]
        assert row.trials[losses.index(min(losses))].settings == row.choice.settings
        assert {run.spec.settings["lr"] for run in row.runs} == {row.lr}


def test_final_runs_are_in_the_order_of_the_seeds_whatever_that_of_the_store(results, store):
    assert all([run.spec.seed for run in row.runs] == list(STUDY.seeds) for row in results.rows)
    assert [run.spec.seed for run in store.runs.values() if run.spec.seed in STUDY.seeds][:2] == [6, 5]


def test_comparisons_are_paired_t_tests_of_the_true_differences(results):
    for task in results.tasks.values():
        assert [(c.row.name, c.against.name) for c in task.comparisons] == [
            ("AdamW", "SGD"),
            ("LPSGDM", "SGD"),
            ("LPSGDM constant p", "LPSGDM"),
            ("Lengths", "LPSGDM"),
            ("LPSGDM + AGR", "LPSGDM"),
            ("LPSGDM + decay", "SGD"),
        ]
        sign = 1 if task.task.higher_is_better else -1
        for c in task.comparisons:
            a, b = ({run.spec.seed: run.test_score for run in r.runs} for r in (c.row, c.against))
            expected = scipy_stats.ttest_rel([a[s] for s in STUDY.seeds], [b[s] for s in STUDY.seeds])
            assert c.difference.p_value == pytest.approx(expected.pvalue)
            true = TRUTHS[c.row.name].gain - TRUTHS[c.against.name].gain
            assert c.gain == pytest.approx(true, abs=3 * NOISE)
            assert c.difference.interval.mean == pytest.approx(sign * c.gain)
            # Unpaired, the difference drowns in what the seeds share.
            assert scipy_stats.ttest_ind(list(a.values()), list(b.values())).pvalue > 0.1


def test_holm_is_over_the_comparisons_of_a_task(results):
    comparisons = results.tasks[UP.name].comparisons
    raw = sorted(c.difference.p_value for c in comparisons)
    least = min(comparisons, key=lambda c: c.difference.p_value)
    assert least.adjusted == pytest.approx(len(comparisons) * raw[0])


def test_steps_to_target_are_counted_on_both_kinds_of_scores(results):
    for task in results.tasks.values():
        for row in task.rows:
            reached = TRUTHS[row.name].reached
            for run in row.runs:
                # A seed's shared part may keep it from the target: then it never gets there.
                score = run.curve[-1].score * (1 if task.task.higher_is_better else -1)
                expected = STEPS * reached if reached and score >= 0.87 else None
                assert task.steps_to_target(run) == expected


def test_a_run_that_diverged_after_the_target_has_reached_it(results):
    task = results.tasks[DOWN.name]
    run = next(run for run in task.row("AdamW").runs if task.steps_to_target(run))
    broken = run.model_copy(update={"diverged": True, "test_score": None, "test_loss": None})
    assert task.steps_to_target(broken) == task.steps_to_target(run)
    assert validation_loss(broken) is None


def test_standings_by_hand(results):
    standings = {s.arm: s for s in results.standings}
    task = results.tasks[UP.name]
    solved = {name: [task.steps_to_target(run) for run in task.row(name).runs] for name in TRUTHS}
    # AdamW is the fastest wherever it gets there, and SGD takes twice its steps.
    fastest = sum(steps is not None for steps in solved["AdamW"]) / len(STUDY.seeds)
    both = sum(a is not None and b is not None for a, b in zip(solved["AdamW"], solved["SGD"], strict=True)) / 6
    assert fastest > both > 0
    assert standings["AdamW"].profile.share(1) == pytest.approx(fastest, abs=1 / 6)
    assert standings["SGD"].profile.share(1.99) == 0
    assert standings["SGD"].profile.share(2) == pytest.approx(both, abs=1 / 6)
    assert standings["Lengths"].profile.area == 0
    assert standings["AdamW"].rank == 1
    assert standings["AdamW"].score == 1
    assert standings["LPSGDM constant p"].rank == 7
    assert standings["LPSGDM constant p"].score < 0
    assert data.tally(results)["AdamW"] == (2, 0, 0)
    assert data.tally(results)["LPSGDM constant p"] == (0, 2, 0)
    assert data.tally(results)["LPSGDM + AGR"][2] == 2


def test_counts(results, store):
    assert results.whole
    assert results.done == results.wanted == 2 * (6 * 5 + 7 * 6) == len(store.runs)
    assert results.seconds == 2.0 * len(store.runs)


def test_a_diverged_or_failed_final_run_takes_the_mean_and_the_comparison(tmp_path):
    truths = TRUTHS | {"AdamW": Truth(gain=0.03, diverges=(2, 3))}
    results = collect(fill(tmp_path, truths=truths, failing=("LPSGDM + AGR", 4)))
    for task in results.tasks.values():
        adamw, agr = task.row("AdamW"), task.row("LPSGDM + AGR")
        assert (adamw.diverged, adamw.failed, adamw.missing) == (2, 0, 0)
        assert (agr.diverged, agr.failed, agr.missing) == (0, 1, 0)
        assert not adamw.sound
        assert adamw.values(numbers.test_score) == agr.values(numbers.test_score) == []
        assert {c.row.name for c in task.comparisons}.isdisjoint({"AdamW", "LPSGDM + AGR"})
        assert len(task.comparisons) == 4
    assert results.whole
    assert results.done == results.wanted
    assert len(results.failures) == 2
    assert {s.arm: s.rank for s in results.standings}["AdamW"] > 5


def test_what_is_there_of_an_unfinished_study(tmp_path):
    untuned = collect(fill(tmp_path / "a", tuned=3, final=0))
    assert not untuned.whole
    assert untuned.standings == []
    assert all(row.choice is None and row.missing == 6 for row in untuned.rows)
    assert untuned.done == 2 * 6 * 3
    partial = collect(fill(tmp_path / "b", final=3))
    assert all(row.choice is not None and row.missing == 3 and len(row.runs) == 3 for row in partial.rows)
    assert len(partial.tasks[UP.name].comparisons) == 6
    assert partial.tasks[UP.name].comparisons[0].difference.interval.n == 3


def test_at_the_edge_of_a_searched_range(results):
    row = results.tasks[UP.name].row("SGD")
    within = row.arm.search["lr"]

    def at(lr: float) -> list[str]:
        assert row.choice is not None
        return dataclasses.replace(row, choice=row.choice.model_copy(update={"settings": {"lr": lr}})).at_edge

    span = math.log(within.high / within.low)
    for part, edge in ((0.04, True), (0.06, False), (0.5, False), (0.94, False), (0.96, True)):
        assert at(within.low * math.exp(part * span)) == (["lr"] if edge else [])


def test_a_parquet_file_says_what_its_folder_said(tmp_path, results):
    path = fill(tmp_path / "folder").compact()
    moved = tmp_path / "kept.parquet"
    moved.write_bytes(path.read_bytes())
    again = collect(Store.from_parquet(moved))
    assert findings(again) == findings(results)
    assert data.tables(again) == data.tables(results)


def test_a_store_without_a_study_or_of_an_unknown_task(tmp_path):
    with pytest.raises(UnfitStore, match="no study"):
        collect(Store(tmp_path / "nowhere"))
    store = Store(tmp_path)
    store.study = SMOKE.model_copy(update={"tasks": ("digits", "chess")})
    with pytest.raises(UnfitStore, match="chess"):
        collect(store)


def test_expected_best_and_curves_come_from_the_runs(results):
    rows = [row for row in data.budgets(results) if (row["task"], row["arm"]) == (UP.name, "SGD")]
    trials = results.tasks[UP.name].row("SGD").trials
    losses = [trial.loss for trial in trials]
    assert [row["best_so_far"] for row in rows] == [
        None if math.isinf(min(losses[:n])) else min(losses[:n]) for n in range(1, 6)
    ]
    startup = STUDY.tuning.startup
    assert rows[startup - 1]["expected_best"] == pytest.approx(min(losses[:startup]))
    assert rows[startup]["expected_best"] is None
    curve = [row for row in data.curves(results) if (row["task"], row["arm"]) == (UP.name, "SGD")]
    runs = results.tasks[UP.name].row("SGD").runs
    assert [row["validation_score"] for row in curve] == pytest.approx(
        list(np.mean([[point.score for point in run.curve] for run in runs], axis=0))
    )


def test_means_have_the_intervals_of_student(results):
    for row in data.scores(results):
        scores = results.tasks[row["task"]].row(row["arm"]).values(numbers.test_score)
        low, high = scipy_stats.t.interval(0.95, 5, loc=np.mean(scores), scale=scipy_stats.sem(scores))
        assert (row["test_score_low"], row["test_score_high"]) == pytest.approx((low, high))


def test_csv_keeps_every_digit(results, tmp_path: Path):
    text = data.csv_text([{"a": 0.1 + 0.2, "b": None, "c": math.nan}, {"a": 1, "d": "x,y"}])
    assert text.splitlines() == ["a,b,c,d", "0.30000000000000004,,,", '1,,,"x,y"']
