"""The statistics of the report: intervals, paired differences, many tests, censored times, profiles, best of n, ranks.

Nothing here knows of studies or runs: numbers go in, numbers come out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

LEVEL = 0.95
BOOTSTRAP_FROM = 20  # values: with fewer, the resamples of a bootstrap differ too little, and its intervals are short
RESAMPLES = 9999
WITHIN = 4.0  # the largest factor of a performance profile, AlgoPerf's

ROUNDING = 1e-6  # of the values: what two equal methods may differ by


@dataclass(frozen=True)
class Interval:
    """The mean of n values and the ends of its 95 % interval; both are NaN from a single value, which has none."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def half(self) -> float:
        """Half its width, which of a t interval is the ± of it."""
        return (self.high - self.low) / 2

    @property
    def symmetric(self) -> bool:
        """A t interval: mean ± half says it all."""
        return self.n < BOOTSTRAP_FROM

    def times(self, factor: float) -> Interval:
        """The interval in another unit: a positive factor."""
        return Interval(self.mean * factor, self.low * factor, self.high * factor, self.n)


def interval(values: Sequence[float]) -> Interval:
    """The mean of at least one value, with its 95 % interval.

    ::

        n < 20    mean ± t(n − 1)·s/√n
        n ≥ 20    the bootstrap's: 9,999 resamples from a fixed seed, bias-corrected and accelerated (BCa)

    Values that are all equal give an interval without width.
    """
    n = len(values)
    mean = float(np.mean(values))
    if n == 1:
        return Interval(mean, math.nan, math.nan, n)
    if _equal(values):
        return Interval(mean, mean, mean, n)
    if n < BOOTSTRAP_FROM:
        half = float(stats.t.ppf((1 + LEVEL) / 2, n - 1) * np.std(values, ddof=1) / math.sqrt(n))
        return Interval(mean, mean - half, mean + half, n)
    found = stats.bootstrap(
        (np.asarray(values),),
        np.mean,
        confidence_level=LEVEL,
        n_resamples=RESAMPLES,
        method="BCa",
        rng=np.random.default_rng(0),
    ).confidence_interval
    return Interval(mean, float(found.low), float(found.high), n)


@dataclass(frozen=True)
class Difference:
    """A paired difference and the P-value of the paired t test that it is zero."""

    interval: Interval
    p_value: float


def paired(a: Sequence[float], b: Sequence[float]) -> Difference:
    """a − b, value by value; at least two of each.

    Differences that are all equal leave nothing to estimate a spread from: no test is made, and the P-value is 1,
    whatever their size. Nor is one made of what is only rounding, a millionth of the values or less.
    """
    differences = [x - y for x, y in zip(a, b, strict=True)]
    if len(differences) < 2:
        raise ValueError(f"a paired difference needs at least 2 pairs, but there is {len(differences)}")
    largest = max(map(abs, [*a, *b]))
    rounding = max(map(abs, differences)) <= ROUNDING * largest
    untold = rounding or _equal(differences)
    return Difference(interval(differences), 1.0 if untold else float(stats.ttest_1samp(differences, 0).pvalue))


def _equal(values: Sequence[float]) -> bool:
    """Equal accuracies may differ in the last bit of a float, and so may their differences."""
    return bool(np.ptp(values) <= 1e-12 * max(1.0, float(np.max(np.abs(values)))))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment: P-values that hold for the whole family at once, in the order given."""
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


@dataclass(frozen=True)
class Profile:
    """How far an arm is from the fastest: its cost on each problem over the lowest cost there, sorted; ∞ is never."""

    ratios: tuple[float, ...]

    def share(self, factor: float) -> float:
        """The part of the problems that it solves at no more than ``factor`` times the lowest cost."""
        return sum(ratio <= factor for ratio in self.ratios) / len(self.ratios)

    @property
    def area(self) -> float:
        """The mean of `share` over the factors from 1 to 4: between 0 and 1, AlgoPerf's score of an arm."""
        return sum(max(0.0, WITHIN - ratio) for ratio in self.ratios) / (len(self.ratios) * (WITHIN - 1))

    @property
    def steps(self) -> list[tuple[float, float]]:
        """The corners (factor, share) of the curve from 1 to 4, for a line that rises in steps."""
        inner = sorted({ratio for ratio in self.ratios if 1 < ratio <= WITHIN})
        return [(factor, self.share(factor)) for factor in dict.fromkeys([1.0, *inner, WITHIN])]


def performance_profiles(costs: Mapping[str, Sequence[float | None]]) -> dict[str, Profile]:
    """The performance profiles of Dolan and Moré (arXiv cs/0102001), as AlgoPerf uses them (arXiv 2306.07179).

    ``costs`` has each arm's cost of the same problems in the same order, all positive, None for one that it did not
    solve. A problem that no arm solves counts as unsolved by all, and so holds every curve below 1. The profiles
    depend on which arms are compared: another arm that is faster on some problems moves them all.
    """
    table = np.array([[math.inf if c is None else c for c in row] for row in costs.values()], dtype=float)
    best = table.min(axis=0)
    # ∞/∞ would be NaN: what nobody solves, nobody solves within any factor.
    ratios = np.where(np.isinf(table), math.inf, table / np.where(np.isinf(best), 1.0, best))
    return {arm: Profile(tuple(sorted(map(float, row)))) for arm, row in zip(costs, ratios, strict=True)}


def expected_best(losses: Sequence[float]) -> list[float]:
    """The expected lowest of n of these losses, for n = 1 … N: what a tuning budget of n trials would have found.

    The quantity is Dodge et al.'s (arXiv 1909.03004), the estimate Tang et al.'s (arXiv 2004.13705), which has no
    bias: the mean over all sets of n different trials, where Dodge et al. draw with replacement. With the losses
    sorted, v₁ ≤ … ≤ v_N, it is ::

        E[best of n] = Σᵢ vᵢ·C(N − i, n − 1)/C(N, n)

    It holds for settings that were drawn independently of each other's results: at random or quasi-random, not by
    TPE. It is ∞ where a set of n may consist of diverged trials only.
    """
    ordered, total = sorted(losses), len(losses)
    found = []
    for n in range(1, total + 1):
        weights = [math.comb(total - i, n - 1) / math.comb(total, n) for i in range(1, total + 1)]
        # 0·∞ would be NaN: a loss that cannot be the best of n takes no part.
        found.append(sum(w * v for w, v in zip(weights, ordered, strict=True) if w))
    return found


def ranks(scores: Mapping[str, float | None], higher_is_better: bool) -> dict[str, float]:
    """1 for the best; ties share the mean of their ranks, and so do all those without a score, at the end."""
    worst = -math.inf if higher_is_better else math.inf
    known = [worst if score is None else score for score in scores.values()]
    found = stats.rankdata([-v for v in known] if higher_is_better else known)
    return {name: float(rank) for name, rank in zip(scores, found, strict=True)}


def normalised(scores: Mapping[str, float | None], higher_is_better: bool) -> dict[str, float]:
    """Scores of one task on a scale that tasks share: 1 for the best arm, 0 for the median, never below −1.

    None, for an arm that has no score because it diverged, is −1, and takes no part in best and median. Where the
    best is no better than the median, those at it are 0, and any below it −1.
    """
    sign = 1.0 if higher_is_better else -1.0
    known = [sign * score for score in scores.values() if score is not None]
    if not known:
        return dict.fromkeys(scores, -1.0)
    best, median = max(known), float(np.median(known))

    def place(score: float | None) -> float:
        if score is None:
            return -1.0
        above = sign * score - median
        if above == 0:
            return 0.0
        return max(-1.0, above / (best - median)) if best > median else -1.0

    return {name: place(score) for name, score in scores.items()}
