"""The statistics of the report: intervals, paired differences, correction for many tests, censored medians."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean and the half width of its 95 % t interval (NaN from a single value, which has none)."""

    mean: float
    half: float

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half


def t_interval(values: Sequence[float]) -> Interval:
    """Mean ± t(n−1)·s/√n of at least one value."""
    n = len(values)
    if n == 1:
        return Interval(float(values[0]), math.nan)
    quantile = stats.t.ppf((1 + LEVEL) / 2, n - 1)
    return Interval(float(np.mean(values)), float(quantile * np.std(values, ddof=1) / math.sqrt(n)))


@dataclass(frozen=True)
class Difference:
    """A paired difference and the p-value of the paired t test that it is zero."""

    interval: Interval
    p_value: float


def paired(a: Sequence[float], b: Sequence[float]) -> Difference:
    """a − b, value by value; at least two of each.

    Differences that are all equal leave nothing to estimate a spread from: no test is made, and the
    p-value is 1, whatever their size.
    """
    differences = [x - y for x, y in zip(a, b, strict=True)]
    interval = t_interval(differences)
    # Equal accuracies may differ in the last bit of a float.
    if np.ptp(differences) < 1e-12:
        return Difference(interval, 1.0)
    return Difference(interval, float(stats.ttest_rel(a, b).pvalue))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment: p-values that hold for the whole family at once, in the order given."""
    n = len(p_values)
    adjusted = [0.0] * n
    highest = 0.0
    for rank, i in enumerate(sorted(range(n), key=lambda i: p_values[i])):
        highest = max(highest, min(1.0, (n - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted


def censored_median(values: Sequence[int | None]) -> float | None:
    """The median, None standing for "later than was looked": None if the median itself is."""
    ordered = sorted(math.inf if v is None else float(v) for v in values)
    middle = len(ordered) // 2
    median = ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
    return None if math.isinf(median) else median
