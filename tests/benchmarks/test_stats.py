"""Every statistic against an independent computation: by hand, by enumeration, by simulation, or another package's."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from scipy import stats as scipy_stats

from benchmarks.stats import (
    BOOTSTRAP_FROM,
    censored_median,
    expected_best,
    holm,
    interval,
    normalised,
    paired,
    performance_profiles,
    ranks,
)


def test_t_interval_by_hand():
    # mean 3, s = √2.5, t(4, .975) = 2.776445
    found = interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert found.mean == 3
    assert found.half == pytest.approx(2.776445105 * math.sqrt(2.5 / 5))
    assert (found.low, found.high) == pytest.approx((3 - found.half, 3 + found.half))
    assert found.symmetric
    assert found.times(100).half == pytest.approx(100 * found.half)


def test_t_interval_is_scipys_up_to_19_values():
    values = np.random.default_rng(0).normal(size=BOOTSTRAP_FROM - 1)
    low, high = scipy_stats.t.interval(0.95, len(values) - 1, loc=values.mean(), scale=scipy_stats.sem(values))
    assert (interval(values).low, interval(values).high) == pytest.approx((low, high))


def bca(values: np.ndarray, resamples: int, seed: int) -> tuple[float, float]:
    """Efron's BCa interval of the mean, from its formula."""
    rng = np.random.default_rng(seed)
    n, mean = len(values), values.mean()
    drawn = values[rng.integers(n, size=(resamples, n))].mean(axis=1)
    z0 = scipy_stats.norm.ppf((drawn < mean).mean())
    jack = np.array([np.delete(values, i).mean() for i in range(n)])
    gap = jack.mean() - jack
    a = (gap**3).sum() / (6 * (gap**2).sum() ** 1.5)
    z = scipy_stats.norm.ppf([0.025, 0.975])
    levels = scipy_stats.norm.cdf(z0 + (z0 + z) / (1 - a * (z0 + z)))
    low, high = np.quantile(drawn, levels)
    return float(low), float(high)


def test_from_20_values_on_it_is_the_bca_bootstrap():
    values = np.random.default_rng(3).exponential(size=BOOTSTRAP_FROM)  # skewed: a t interval would be another
    found = interval(values)
    low, high = bca(values, 100_000, seed=1)
    assert (found.low, found.high) == pytest.approx((low, high), rel=0.02)
    assert found == interval(values)
    assert not found.symmetric
    t_low, _ = scipy_stats.t.interval(0.95, len(values) - 1, loc=values.mean(), scale=scipy_stats.sem(values))
    assert abs(found.low - t_low) > 0.05


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
    if n < BOOTSTRAP_FROM:
        low, high = expected.confidence_interval(0.95)
        assert (difference.interval.low, difference.interval.high) == pytest.approx((low, high))
    else:
        assert difference.interval == interval(list(a - b))


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
    assert profiles["a"].steps == [(1.0, 0.25), (2.0, 0.5), (4.0, 0.5)]


def test_the_area_of_a_profile_is_its_integral():
    rng = np.random.default_rng(5)
    costs = {arm: [float(c) if c < 60 else None for c in rng.uniform(5, 70, size=12)] for arm in "abc"}
    grid = np.linspace(1, 4, 30_001)
    for profile in performance_profiles(costs).values():
        by_grid = np.trapezoid([profile.share(factor) for factor in grid], grid) / 3
        assert profile.area == pytest.approx(by_grid, abs=2e-4)
        xs, ys = zip(*profile.steps, strict=True)
        by_steps = sum(y * (b - a) for y, a, b in zip(ys, xs, xs[1:], strict=False)) / 3
        assert profile.area == pytest.approx(by_steps)


def test_expected_best_is_the_mean_over_all_subsets():
    losses = [0.9, 0.4, 0.7, 0.4, 1.3]
    for n, found in enumerate(expected_best(losses), 1):
        subsets = list(itertools.combinations(losses, n))
        exact = sum(Fraction(min(subset)) for subset in subsets) / len(subsets)
        assert found == pytest.approx(float(exact))
    assert expected_best(losses)[-1] == min(losses)
    assert expected_best(losses)[0] == pytest.approx(np.mean(losses))


def test_expected_best_has_no_bias():
    # The best of 3 uniform numbers is 1/4 on average, which drawing with replacement overestimates.
    rng = np.random.default_rng(0)
    samples = rng.uniform(size=(4000, 6))
    found = np.mean([expected_best(list(sample))[2] for sample in samples])
    assert found == pytest.approx(1 / 4, abs=0.005)
    sorted_ = np.sort(samples, axis=1)
    above = 1 - np.arange(7) / 6
    replaced = (sorted_ * (above[:-1] ** 3 - above[1:] ** 3)).sum(axis=1).mean()
    assert replaced > 1 / 4 + 0.015


def test_expected_best_where_trials_diverged():
    found = expected_best([math.inf, 0.5, math.inf, 0.2])
    assert found[:2] == [math.inf, math.inf]
    # Of the sets of three, all but the two without 0.2 or 0.5 … by hand: {i, .5, i}: .5, the other three: .2
    assert found[2] == pytest.approx((0.5 + 3 * 0.2) / 4)
    assert found[3] == 0.2


def test_ranks():
    scores = {"a": 0.9, "b": 0.95, "c": None, "d": 0.9, "e": None}
    assert ranks(scores, higher_is_better=True) == {"a": 2.5, "b": 1, "c": 4.5, "d": 2.5, "e": 4.5}
    assert ranks(scores, higher_is_better=False) == {"a": 1.5, "b": 3, "c": 4.5, "d": 1.5, "e": 4.5}


def test_normalised_scores():
    assert normalised({"a": 1.0, "b": 2.0, "c": 4.0}, higher_is_better=True) == {"a": -0.5, "b": 0.0, "c": 1.0}
    assert normalised({"a": 1.0, "b": 2.0, "c": 4.0}, higher_is_better=False) == {"a": 1.0, "b": 0.0, "c": -1.0}
    cut = normalised({"a": -99.0, "b": 2.0, "c": 4.0, "d": None}, higher_is_better=True)
    assert cut == {"a": -1.0, "b": 0.0, "c": 1.0, "d": -1.0}
    level = normalised({"a": 3.0, "b": 3.0, "c": 1.0}, higher_is_better=True)
    assert level == {"a": 0.0, "b": 0.0, "c": -1.0}
    assert normalised({"a": None, "b": None}, higher_is_better=True) == {"a": -1.0, "b": -1.0}


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
