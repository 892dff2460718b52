"""What is gathered from a store, against the known truth of a synthetic study."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats as scipy_stats

from benchmarks import results as numbers
from benchmarks.report import data, findings
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


PAIRS = [
    ("LPSGDM", "LPSGDM constant p"),
    ("LPSGDM", "Lengths"),
    ("LPSGDM + AGR", "LPSGDM"),
    ("LPSGDM + decay", "LPSGDM"),
    ("AdamW", "SGD"),
    ("LPSGDM", "SGD"),
    ("LPSGDM + decay", "SGD"),
]


def test_comparisons_are_paired_t_tests_of_the_true_differences(results):
    for task in results.tasks.values():
        assert [(c.row.name, c.against.name) for c in task.comparisons] == PAIRS
        for c in task.comparisons:
            a, b = ({run.spec.seed: run.test_score for run in r.runs} for r in (c.row, c.against))
            expected = scipy_stats.ttest_rel([a[s] for s in STUDY.seeds], [b[s] for s in STUDY.seeds])
            assert c.difference.p_value == pytest.approx(expected.pvalue)
            true = TRUTHS[c.row.name].gain - TRUTHS[c.against.name].gain
            assert c.gain == pytest.approx(true, abs=3 * NOISE)
            assert c.difference.interval.mean == pytest.approx(task.sign * c.gain)
            assert c.verdict == (0 if true == 0 else 1 if true > 0 else -1)
            # Unpaired, the difference drowns in what the seeds share.
            assert scipy_stats.ttest_ind(list(a.values()), list(b.values())).pvalue > 0.1


def test_holm_is_over_the_pairs_and_tasks_of_a_question_once(results):
    for answer in results.answers:
        for raw, adjusted in (
            ([c.difference.p_value for c in answer.comparisons], [c.adjusted for c in answer.comparisons]),
            ([c.difference.exact for c in answer.comparisons], [c.exact for c in answer.comparisons]),
        ):
            assert len(raw) == len(results.tasks) * len(answer.question.pairs)
            order = np.argsort(raw, kind="stable")
            highest = 0.0
            for rank, i in enumerate(order):
                highest = max(highest, min(1.0, (len(raw) - rank) * raw[i]))
                assert adjusted[i] == pytest.approx(highest)


def test_no_pair_is_in_two_families_and_either_way_round_is_one_verdict(results):
    for task in results.tasks.values():
        found = [frozenset({c.row.name, c.against.name}) for c in task.comparisons]
        assert len(found) == len(set(found))
        for c in task.comparisons:
            other = task.comparison(c.against.name, c.row.name)
            assert other is not None
            assert (other.verdict, other.gain, other.adjusted) == (-c.verdict, -c.gain, c.adjusted)
            assert task.comparison(c.row.name, c.against.name) == c == other.flipped
        assert task.comparison("AdamW", "Lengths") is None


def test_the_target_is_the_baselines_median(results, tmp_path):
    for task in results.tasks.values():
        finals = [run.curve[-1].score for run in task.row("SGD").runs]
        assert task.target == pytest.approx(np.median(finals))
        reached = [task.steps_to_target(run) for run in task.row("SGD").runs]
        assert sum(steps is not None for steps in reached) == 3
        for run in task.row("SGD").runs:
            steps = task.steps_to_target(run)
            assert task.seconds_to_target(run) == (None if steps is None else steps * run.ms_per_step / 1000)
    lost = collect(fill(tmp_path, truths=TRUTHS | {"SGD": Truth(diverges=(1, 2, 3, 4))}))
    assert [task.target for task in lost.tasks.values()] == [task.task.target for task in lost.tasks.values()]


def test_the_noise_floor_is_of_the_arms_that_are_sound(results, tmp_path):
    for task in results.tasks.values():
        assert task.noise == pytest.approx(1.96 * NOISE * math.sqrt(2 / 6), rel=0.4)
    assert all(task.noise is None for task in collect(fill(tmp_path, final=3)).tasks.values())


def test_steps_to_target_are_counted_on_both_kinds_of_scores(results):
    for task in results.tasks.values():
        for row in task.rows:
            reached = TRUTHS[row.name].reached
            for run in row.runs:
                # A seed's shared part may keep it from the target: then it never gets there.
                near = task.sign * run.curve[-1].score >= task.sign * task.target
                expected = STEPS * reached if reached and near else None
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
    assert standings["AdamW"].steps.share(1) == pytest.approx(fastest, abs=1 / 6)
    assert standings["SGD"].steps.share(1.99) == 0
    assert standings["SGD"].steps.share(2) == pytest.approx(both, abs=1 / 6)
    assert standings["Lengths"].steps.area == standings["Lengths"].seconds.area == 0
    # A step takes all arms the same time here.
    assert all(s.seconds.area == pytest.approx(s.steps.area) for s in results.standings)
    assert standings["AdamW"].rank == 1
    assert standings["LPSGDM constant p"].rank == 7
    assert standings["LPSGDM constant p"].iqm.mean < 0 < standings["AdamW"].iqm.low
    assert data.tally(results, "AdamW") == (2, 0, 0)
    assert data.tally(results, "LPSGDM constant p") == (0, 2, 0)
    assert data.tally(results, "LPSGDM + AGR")[2] == 2


def test_the_probability_of_improvement_by_hand(results):
    for pair in [*PAIRS, ("Lengths", "LPSGDM")]:
        shares = []
        for task in results.tasks.values():
            a, b = ([task.sign * run.test_score for run in task.row(arm).runs] for arm in pair)
            shares.append(np.mean([(x > y) + 0.5 * (x == y) for x, y in zip(a, b, strict=True)]))
        found = results.improvements[pair]
        assert found.mean == pytest.approx(np.mean(shares))
        assert found.low <= found.mean <= found.high


def test_counts(results, store):
    assert results.whole
    assert results.done == results.wanted == 2 * (6 * 5 + 7 * 6) == len(store.runs)
    assert results.seconds == 2.0 * len(store.runs)


def test_a_diverged_run_is_the_worst_and_a_failed_one_takes_the_comparison(tmp_path):
    truths = TRUTHS | {"AdamW": Truth(gain=0.03, diverges=(2, 3))}
    results = collect(fill(tmp_path, truths=truths, failing=("LPSGDM + AGR", 4)))
    for task in results.tasks.values():
        adamw, agr = task.row("AdamW"), task.row("LPSGDM + AGR")
        assert (adamw.diverged, adamw.failed, adamw.missing) == (2, 0, 0)
        assert (agr.diverged, agr.failed, agr.missing) == (0, 1, 0)
        assert not adamw.sound
        assert adamw.values(numbers.test_score) == agr.values(numbers.test_score) == []
        held = task.comparison("AdamW", "SGD")
        assert held is not None
        ahead, behind = held.difference.wins, held.difference.losses
        assert (ahead, behind) == ((4, 2) if task.task.higher_is_better else (2, 4))
        assert held.difference.p_value == pytest.approx(scipy_stats.binomtest(4, 6).pvalue)
        assert (held.verdict, held.gain) == (0, math.inf)
        assert task.comparison("LPSGDM + AGR", "LPSGDM") is None
        assert len(task.comparisons) == len(PAIRS) - 1
    assert results.whole
    assert results.done == results.wanted
    assert len(results.failures) == 2
    # Best of seven on four seeds, and seventh on two.
    assert {s.arm: s.rank for s in results.standings}["AdamW"] == pytest.approx(3, abs=0.2)
    assert results.improvements["AdamW", "SGD"].mean == pytest.approx(4 / 6)


def test_many_diverged_runs_are_a_verdict(tmp_path):
    seeds = tuple(range(1, 15))
    study = STUDY.model_copy(update={"arms": STUDY.arms[:2], "seeds": seeds})
    results = collect(fill(tmp_path, study, TRUTHS | {"AdamW": Truth(gain=0.03, diverges=seeds)}))
    for task in results.tasks.values():
        (c,) = task.comparisons
        assert (c.verdict, c.gain) == (-1, -math.inf)
        assert c.confirmed


def test_what_is_there_of_an_unfinished_study(tmp_path):
    untuned = collect(fill(tmp_path / "a", tuned=3, final=0))
    assert not untuned.whole
    assert untuned.standings == []
    assert all(row.choice is None and row.missing == 6 for row in untuned.rows)
    assert untuned.done == 2 * 6 * 3
    partial = collect(fill(tmp_path / "b", final=3))
    assert all(row.choice is not None and row.missing == 3 and len(row.runs) == 3 for row in partial.rows)
    assert len(partial.tasks[UP.name].comparisons) == len(PAIRS)
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


def test_means_have_the_intervals_of_student(results):
    for row in data.scores(results):
        scores = results.tasks[row["task"]].row(row["arm"]).values(numbers.test_score)
        low, high = scipy_stats.t.interval(0.95, 5, loc=np.mean(scores), scale=scipy_stats.sem(scores))
        assert (row["test_score_low"], row["test_score_high"]) == pytest.approx((low, high))


def test_csv_keeps_every_digit(results, tmp_path: Path):
    text = data.csv_text([{"a": 0.1 + 0.2, "b": None, "c": math.nan}, {"a": 1, "d": "x,y"}])
    assert text.splitlines() == ["a,b,c,d", "0.30000000000000004,,,", '1,,,"x,y"']
