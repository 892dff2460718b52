"""Every statistic against an independent computation: by hand, by enumeration, by simulation, or another package's."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from benchmarks.stats import (
    EXACT_UP_TO,
    Draws,
    censored_median,
    holm,
    improvement,
    interval,
    iqm,
    least_exact,
    mean_ranks,
    noise_floor,
    normalised,
    paired,
    pairs_needed,
    performance_profiles,
    sign_flip,
)


def test_t_interval_by_hand():
    # mean 3, s = √2.5, t(4, .975) = 2.776445
    found = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found.mean == 3
    assert found.half == pytest.approx(2.776445105 * math.sqrt(2.5 / 5))
    assert (found.low, found.high) == pytest.approx((3 - found.half, 3 + found.half))
    assert found.times(100).half == pytest.approx(100 * found.half)
    assert (found.times(-1).low, found.times(-1).high) == (-found.high, -found.low)


@pytest.mark.parametrize("n", [2, 8, 40])
def test_t_interval_is_scipys(n):
    values = np.random.default_rng(0).normal(size=n)
    low, high = scipy_stats.t.interval(0.95, n - 1, loc=values.mean(), scale=scipy_stats.sem(values))
    assert (interval(values).low, interval(values).high) == pytest.approx((low, high))


@pytest.mark.parametrize("n", [2, 5, 30])
def test_equal_values_have_an_interval_without_width(n):
    found = interval([0.7] * n)
    assert found.low == found.high == found.mean == pytest.approx(0.7)


def test_one_value_has_no_interval():
    found = interval([0.5])
    assert found.mean == 0.5
    assert math.isnan(found.half)


@pytest.mark.parametrize("n", [2, 8, 25])
def test_paired_is_scipys(n):
    rng = np.random.default_rng(n)
    a, b = rng.normal(size=n), rng.normal(size=n)
    difference = paired(list(a), list(b))
    expected = scipy_stats.ttest_rel(a, b)
    assert difference.p_value == pytest.approx(expected.pvalue)
    assert difference.interval.mean == pytest.approx((a - b).mean())
    low, high = expected.confidence_interval(0.95)
    assert (difference.interval.low, difference.interval.high) == pytest.approx((low, high))
    assert (difference.wins, difference.losses) == ((a > b).sum(), (a < b).sum())
    # What the interval leaves out, the test by itself rejects, and nothing else.
    assert (low <= 0 <= high) == (difference.p_value >= 0.05)


@pytest.mark.parametrize("n", [2, 5, 8, EXACT_UP_TO])
def test_sign_flip_is_scipys_permutation_test(n):
    differences = np.random.default_rng(n).normal(loc=0.4, size=n)
    expected = scipy_stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=math.inf, alternative="two-sided"
    )
    assert sign_flip(list(differences)) == pytest.approx(expected.pvalue)
    assert paired(list(differences), [0.0] * n).exact == sign_flip(list(differences))
    assert sign_flip([1.0 + i for i in range(n)]) == least_exact(n) == 2 / 2**n
    assert sign_flip([0.0] * n) == 1


def test_too_many_pairs_have_no_exact_test():
    assert sign_flip([1.0] * (EXACT_UP_TO + 1)) is None
    assert paired(list(np.arange(20.0)), list(np.arange(20.0)[::-1])).exact is None


def test_the_pairs_that_are_needed_can_reject():
    for tests in (1, 7, 56):
        n = pairs_needed(tests)
        assert min(holm([least_exact(n)] + [1.0] * (tests - 1))) < 0.05
        assert min(holm([least_exact(n - 1)] + [1.0] * (tests - 1))) >= 0.05


def test_a_run_that_diverged_is_worse_than_any_that_did_not():
    worst = -math.inf
    found = paired([worst] * 4 + [1.0], [0.5, 0.6, 0.7, worst, 0.9])
    # The sign test: of the four pairs that differ, three are lost.
    assert (found.wins, found.losses) == (1, 3)
    assert found.p_value == found.exact == pytest.approx(scipy_stats.binomtest(1, 4).pvalue)
    assert math.isnan(found.interval.low)
    lost = paired([worst] * 8, list(np.linspace(0, 1, 8)))
    assert lost.p_value == 2 / 2**8
    assert lost.interval.mean == worst
    assert paired([worst, worst], [worst, worst]).p_value == 1
    # Where lower is better the worst is +∞, and a difference of it is a difference upwards.
    assert paired([math.inf, 2.0], [1.0, 2.0]).wins == 1


@pytest.mark.parametrize("shift", [0.0, 0.1])
def test_equal_differences_are_no_evidence(shift):
    a = [0.91, 0.93, 0.97]
    assert paired([x + shift for x in a], a).p_value == 1


def test_paired_refuses_unequal_lengths_and_single_pairs():
    with pytest.raises(ValueError, match=r"shorter|longer"):
        paired([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="at least 2 pairs, but there is 1"):
        paired([1.0], [1.0])


def test_holm_by_hand():
    # Sorted .01 .02 .03 .04 times 4 3 2 1: .04 .06 .06 .04, made monotone.
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([0.04]) == [0.04]
    assert holm([]) == []


def test_holm_rejects_what_the_step_down_procedure_rejects():
    rng = np.random.default_rng(2)
    for _ in range(50):
        p = rng.uniform(size=6) ** 3
        order = np.argsort(p)
        rejected = set()
        for rank, i in enumerate(order):
            if p[i] > 0.05 / (6 - rank):
                break
            rejected.add(int(i))
        assert {i for i, adjusted in enumerate(holm(list(p))) if adjusted <= 0.05} == rejected


@pytest.mark.parametrize(
    ("values", "median"),
    [
        ([17, 34, 51], 34),
        ([17, 34, None], 34),
        ([17, None, None], None),
        ([17, 34], 25.5),
        ([17, 34, 51, None], 42.5),
        ([17, 34, None, None], None),
        ([None], None),
    ],
)
def test_censored_median(values, median):
    assert censored_median(values) == median


def test_performance_profiles_by_hand():
    profiles = performance_profiles({"a": [10, 20, None, None], "b": [20, 10, 30, None], "c": [10, 100, 45, None]})
    assert profiles["a"].ratios == (1, 2, math.inf, math.inf)
    assert profiles["b"].ratios == (1, 1, 2, math.inf)
    assert profiles["c"].ratios == (1, 1.5, 10, math.inf)
    assert [profiles["b"].share(factor) for factor in (1, 1.99, 2, 100)] == [0.5, 0.5, 0.75, 0.75]


def test_the_area_of_a_profile_is_its_integral():
    rng = np.random.default_rng(5)
    costs = {arm: [float(c) if c < 60 else None for c in rng.uniform(5, 70, size=12)] for arm in "abc"}
    grid = np.linspace(1, 4, 30_001)
    for profile in performance_profiles(costs).values():
        by_grid = np.trapezoid([profile.share(factor) for factor in grid], grid) / 3
        assert profile.area == pytest.approx(by_grid, abs=2e-4)


def rng_scores(tasks: int, seeds: int, shift: float = 0.0, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(loc=shift, size=(tasks, seeds))


def test_the_interquartile_mean_is_that_of_the_middle_half():
    values = rng_scores(3, 8)
    ordered = np.sort(values.ravel())
    assert iqm(values, Draws.of(3, 8)).mean == pytest.approx(ordered[6:18].mean())


def test_the_probability_of_improvement_is_the_share_of_pairs_that_win():
    a = np.array([[0.5, 0.6, -math.inf, 0.1], [0.9, 0.2, -math.inf, 0.4]])
    b = np.array([[0.4, 0.6, 0.3, -math.inf], [0.1, 0.3, -math.inf, 0.6]])
    # Won, tied, lost, won; won, lost, tied, lost.
    draws = Draws.of(2, 4)
    assert improvement(a, b, draws).mean == (2.5 + 1.5) / 8
    assert improvement(b, a, draws).mean == 1 - (2.5 + 1.5) / 8
    assert improvement(a, a, draws).mean == 0.5


def test_the_bootstrap_draws_tasks_and_within_them_seeds():
    a, b = rng_scores(4, 6, 0.3), rng_scores(4, 6, seed=1)
    draws = Draws.of(4, 6)
    for estimate, found in (
        (lambda x, y: np.mean(x > y), improvement(a, b, draws)),
        (lambda x, y: np.sort(x.ravel())[6:18].mean(), iqm(a, draws)),
    ):
        rng = np.random.default_rng(9)
        resampled = []
        for _ in range(4000):
            tasks = rng.integers(4, size=4)
            seeds = [rng.integers(6, size=6) for _ in tasks]
            x, y = (np.array([m[t, s] for t, s in zip(tasks, seeds, strict=True)]) for m in (a, b))
            resampled.append(estimate(x, y))
        low, high = np.quantile(resampled, [0.025, 0.975])
        assert (found.low, found.high) == pytest.approx((low, high), abs=0.06)
        assert found.low < found.mean < found.high


def test_intervals_of_improvement_cover_the_truth():
    # Equal arms that share a large part of every seed: about 95 % of the intervals hold ½.
    rng = np.random.default_rng(3)
    draws = Draws.of(7, 8)
    held = 0
    for _ in range(300):
        shared = rng.normal(scale=5, size=(7, 8))
        a, b = shared + rng.normal(size=(2, 7, 8))
        found = improvement(a, b, draws)
        held += found.low <= 0.5 <= found.high
    assert 0.92 <= held / 300 <= 1


def test_mean_ranks_put_what_diverged_last():
    scores = np.array([[[0.9, 0.8]], [[0.95, 0.8]], [[-math.inf, 0.7]], [[0.9, -math.inf]]])
    # On the first seed 2.5, 1, 4, 2.5, on the second 1.5, 1.5, 3, 4.
    assert mean_ranks(scores) == pytest.approx([2.0, 1.25, 3.5, 3.25])


def test_normalised_scores():
    scores = np.array([[[1.0, 3.0]], [[2.0, 2.0]], [[4.0, 4.5]], [[-math.inf, 2.0]]])
    # Medians 2, 2, 4.25, −∞: the best 4.25, the median arm 2.
    found = normalised(scores)
    assert found[2] == pytest.approx(np.array([[2, 2.5]]) / 2.25)
    assert found[0] == pytest.approx(np.array([[-1, 1]]) / 2.25)
    assert found[3] == pytest.approx(np.array([[-1, 0]]))
    level = normalised(np.array([[[3.0]], [[3.0]], [[1.0]]]))
    assert level.ravel().tolist() == [0, 0, -1]
    assert (normalised(np.full((3, 2, 2), -math.inf)) == -1).all()


def test_the_noise_floor_is_what_equal_arms_stay_below():
    rng = np.random.default_rng(1)
    floors, apart = [], []
    for _ in range(60):
        shared = rng.normal(scale=5, size=8)  # pairing takes it away
        scores = shared + rng.normal(size=(10, 8))
        floors.append(noise_floor(scores))
        apart += [abs(float(np.mean(a - b))) for a, b in zip(scores[::2], scores[1::2], strict=True)]
    assert np.mean(floors) == pytest.approx(1.96 * math.sqrt(2 / 8), rel=0.1)
    assert np.mean(np.array(apart) < np.mean(floors)) == pytest.approx(0.95, abs=0.03)
    # Of the same runs the floor is the same, and gains of arms are not in it.
    assert noise_floor(scores + np.arange(10)[:, None]) == pytest.approx(noise_floor(scores))
    assert noise_floor(scores[:1]) is noise_floor(scores[:, :3]) is None


def test_equal_arms_are_told_apart_as_often_as_the_level_says():
    # The whole path of a report: paired differences over eight seeds, 400 times.
    rng = np.random.default_rng(7)
    shared = rng.normal(size=(400, 8))
    a, b = shared + rng.normal(size=(2, 400, 8))
    rejected = np.mean([paired(list(x), list(y)).p_value < 0.05 for x, y in zip(a, b, strict=True)])
    assert 0.02 <= rejected <= 0.09
    # And Holm's correction keeps it for a family of comparisons with one arm.
    family = [
        holm([paired(list(x), list(y)).p_value for y in rng.normal(size=(5, 8))]) for x in rng.normal(size=(200, 8))
    ]
    assert np.mean([min(p) < 0.05 for p in family]) <= 0.09


def test_rounding_is_no_difference():
    a = [1.0, 2.0, 3.0, 4.0]
    b = [1.0 + 1e-8, 2.0 + 2e-8, 3.0 + 1e-8, 4.0 + 3e-8]
    assert paired(a, b).p_value == 1.0
    assert paired(a, [x + 0.01 * (1 + i % 2) for i, x in enumerate(a)]).p_value < 0.05
