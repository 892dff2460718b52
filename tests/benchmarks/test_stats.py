from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from benchmarks.stats import censored_median, holm, paired, t_interval


def test_t_interval_by_hand():
    # mean 3, s = √2.5, t(4, .975) = 2.776445
    interval = t_interval([1.0, 2.0, 3.0, 4.0, 5.0])
    assert interval.mean == 3
    assert interval.half == pytest.approx(2.776445105 * math.sqrt(2.5 / 5))
    assert (interval.low, interval.high) == (3 - interval.half, 3 + interval.half)


def test_t_interval_is_scipys():
    values = np.random.default_rng(0).normal(size=10)
    low, high = scipy_stats.t.interval(0.95, 9, loc=values.mean(), scale=scipy_stats.sem(values))
    assert (t_interval(values).low, t_interval(values).high) == pytest.approx((low, high))


def test_one_value_has_no_interval():
    interval = t_interval([0.5])
    assert interval.mean == 0.5
    assert math.isnan(interval.half)


def test_paired_is_scipys_and_its_interval_covers_zero_if_p_is_large():
    rng = np.random.default_rng(1)
    a, b = rng.normal(size=8), rng.normal(size=8)
    difference = paired(list(a), list(b))
    expected = scipy_stats.ttest_rel(a, b)
    assert difference.p_value == pytest.approx(expected.pvalue)
    assert difference.interval.mean == pytest.approx((a - b).mean())
    low, high = expected.confidence_interval(0.95)
    assert (difference.interval.low, difference.interval.high) == pytest.approx((low, high))


@pytest.mark.parametrize("shift", [0.0, 0.1])
def test_equal_differences_are_no_evidence(shift):
    a = [0.91, 0.93, 0.97]
    assert paired([x + shift for x in a], a).p_value == 1


def test_paired_refuses_unequal_lengths():
    with pytest.raises(ValueError, match=r"shorter|longer"):
        paired([1.0, 2.0], [1.0])


def test_holm_by_hand():
    # Sorted .01 .02 .03 .04 times 4 3 2 1: .04 .06 .06 .04, made monotone.
    assert holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([0.04]) == [0.04]
    assert holm([]) == []


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
