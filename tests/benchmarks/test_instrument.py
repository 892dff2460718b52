"""The instrument itself: it finds no difference where there is none, and the known ones where they are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import results
from benchmarks.results import Results, collect
from benchmarks.stats import paired
from benchmarks.store import Store
from benchmarks.study.presets import PRESETS
from benchmarks.study.spec import RunSpec
from benchmarks.training import run

ORDERINGS = Path(__file__).parents[2] / "docs/data/orderings.parquet"


def test_the_same_arm_under_two_names_is_told_apart_as_often_as_by_chance():
    """An A/A test on real runs: two times 8 seeds of one arm, drawn 400 times from 120 runs, tested at 5 %."""
    threads = torch.get_num_threads()
    try:
        scores = np.array([_score(seed) for seed in range(120)])
    finally:
        torch.set_num_threads(threads)
    assert np.ptp(scores) > 0
    draws = np.random.default_rng(0)
    rejected = 0
    for _ in range(400):
        chosen = draws.permutation(len(scores))[:16]
        rejected += paired(scores[chosen[:8]].tolist(), scores[chosen[8:]].tolist()).p_value < 0.05
    assert 0.02 <= rejected / 400 <= 0.09


def _score(seed: int) -> float:
    spec = RunSpec(task="digits", optimizer="sgd", settings={"lr": 0.1}, seed=seed, epochs=3, batch_size=64)
    score = run(spec).test_score
    assert score is not None
    return score


@pytest.fixture(scope="module")
def orderings() -> Results:
    return collect(Store.from_parquet(ORDERINGS))


def test_the_orderings_were_found_by_the_study_of_that_name(orderings):
    assert orderings.study == PRESETS["orderings"]
    assert orderings.whole
    assert not orderings.failures


@pytest.mark.parametrize("task", PRESETS["orderings"].tasks)
def test_one_method_under_three_names_is_one_method(orderings, task):
    rows = orderings.tasks[task]
    ours = rows.row("SGD").values(results.test_score)
    for name in ("SGD of torch", "SGD-EMA at ten times the rate"):
        assert rows.row(name).values(results.test_score) == pytest.approx(ours, abs=0.02)


@pytest.mark.parametrize("task", PRESETS["orderings"].tasks)
def test_momentum_is_better_than_none(orderings, task):
    (found,) = orderings.tasks[task].compare([("SGD", "SGD without momentum")], results.test_score)
    assert found.gain > 0
    assert found.adjusted < 0.05


def test_adam_goes_further_along_the_axes_than_sgd_without_momentum(orderings):
    (found,) = orderings.tasks["quadratic-axes"].compare([("Adam", "SGD without momentum")], results.test_score)
    assert found.gain > 0
    assert found.adjusted < 0.05
