"""The statistics of the report: intervals, paired tests, corrections, ranks, profiles and bootstrapped aggregates.

Nothing here knows of studies or runs: numbers go in, numbers come out. In scores, −∞ stands for a run that diverged.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

LEVEL = 0.95
ALPHA = 0.05  # of a family of tests
EXACT_UP_TO = 14  # pairs: 2¹⁴ sign flips are enumerated in a millisecond
RESAMPLES = 1000
WITHIN = 4.0  # the largest factor of a performance profile, AlgoPerf's

ROUNDING = 1e-6  # relative: the difference that two equal methods may have

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Interval:
    """The mean of n values and the ends of its 95 % interval; both are NaN from a single value, which has none."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def half(self) -> float:
        """Half the width: the ± of a symmetric interval."""
        return (self.high - self.low) / 2

    def times(self, factor: float) -> Interval:
        """The interval in another unit; a negative factor swaps the ends."""
        low, high = sorted((self.low * factor, self.high * factor))
        return Interval(self.mean * factor, low, high, self.n)


def interval(values: Sequence[float]) -> Interval:
    """The mean of at least one value with Student's 95 % interval, mean ± t(n − 1)·s/√n.

    Values that are all equal give an interval without width.
    """
    n = len(values)
    mean = float(np.mean(values))
    if n == 1:
        return Interval(mean, math.nan, math.nan, n)
    if _equal(values):
        return Interval(mean, mean, mean, n)
    half = _quantile(n) * float(np.std(values, ddof=1)) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


@cache
def _quantile(n: int) -> float:
    return float(stats.t.ppf((1 + LEVEL) / 2, n - 1))


@dataclass(frozen=True)
class Difference:
    """A paired difference with two P-values of the hypothesis that it is zero.

    Attributes:
        interval: of the mean difference; its mean is ±∞ or NaN, and it has no ends, where a run diverged.
        p_value: of the paired t test; of the exact sign test where a run diverged, for then there is no mean.
        exact: of the exact sign-flip permutation test; None for more than 14 pairs, where t serves.
        wins, losses: pairs with a positive and with a negative difference.
    """

    interval: Interval
    p_value: float
    exact: float | None
    wins: int
    losses: int


def paired(a: Sequence[float], b: Sequence[float]) -> Difference:
    """a − b, value by value; at least two of each.

    An infinite value, of a run that diverged, is worse or better than any finite one, and two of them are equal.
    Differences that are all equal leave nothing to estimate a spread from: no test is made, and the P-value is 1,
    whatever their size. Nor is one made of rounding, a millionth of the values or less.
    """
    pairs = list(zip(a, b, strict=True))
    if len(pairs) < 2:
        raise ValueError(f"a paired difference needs at least 2 pairs, but there is {len(pairs)}")
    differences = [0.0 if x == y else x - y for x, y in pairs]
    wins, losses = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    if not all(map(math.isfinite, [*a, *b])):
        p = float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0
        signs = {d for d in differences if math.isinf(d)}
        mean = signs.pop() if len(signs) == 1 else math.nan
        return Difference(Interval(mean, math.nan, math.nan, len(pairs)), p, p, wins, losses)
    rounding = max(map(abs, differences)) <= ROUNDING * max(map(abs, [*a, *b]))
    untold = rounding or _equal(differences)
    p = 1.0 if untold else _t_test(differences)
    exact = 1.0 if rounding else sign_flip(differences)
    return Difference(interval(differences), p, exact, wins, losses)


def _t_test(differences: Sequence[float]) -> float:
    """Student's, of a mean of zero; scipy's own function takes fifty times as long."""
    n = len(differences)
    t = float(np.mean(differences)) / (float(np.std(differences, ddof=1)) / math.sqrt(n))
    return 2 * float(special.stdtr(n - 1, -abs(t)))


def _equal(values: Sequence[float]) -> bool:
    """Equal accuracies may differ in the last bit of a float, and so may their differences."""
    return bool(np.ptp(values) <= 1e-12 * max(1.0, float(np.max(np.abs(values)))))


def sign_flip(differences: Sequence[float]) -> float | None:
    """The exact two-sided P-value of the mean under all 2ⁿ flips of the signs; None for more than 14 differences.

    It assumes no distribution, only that each difference is as likely to be d as −d. It cannot be below 2/2ⁿ.
    """
    if len(differences) > EXACT_UP_TO:
        return None
    sums = np.abs(_flips(len(differences)) @ np.asarray(differences, dtype=float))
    # Sums of the same numbers in another order may differ in their last bits.
    return float(np.mean(sums >= abs(math.fsum(differences)) - 1e-12 * np.abs(differences).sum()))


@cache
def _flips(n: int) -> Array:
    return np.array(list(itertools.product((1.0, -1.0), repeat=n)))


def least_exact(n: int) -> float:
    """The least P-value that the exact sign-flip test of n pairs can give."""
    return 2.0 ** (1 - n)


def pairs_needed(tests: int) -> int:
    """The fewest pairs with which the exact test can reject one of so many hypotheses after Holm's correction."""
    return next(n for n in itertools.count(2) if tests * least_exact(n) < ALPHA)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment: P-values that hold for the whole family at once, in the order given."""
    order = np.argsort(p_values, kind="stable")
    steps = np.asarray(p_values, dtype=float)[order] * np.arange(len(order), 0, -1)
    adjusted = np.empty(len(order))
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(steps))
    return [float(p) for p in adjusted]


def censored_median(values: Sequence[float | None]) -> float | None:
    """The median, None standing for "later than was looked": None if the median itself is."""
    median = float(np.median([math.inf if v is None else v for v in values]))
    return median if math.isfinite(median) else None


@dataclass(frozen=True)
class Profile:
    """An arm's cost on each problem over the lowest cost there, sorted; ∞ for a problem that it did not solve."""

    ratios: tuple[float, ...]

    def share(self, factor: float) -> float:
        """The part of the problems that it solves at no more than ``factor`` times the lowest cost."""
        return sum(ratio <= factor for ratio in self.ratios) / len(self.ratios)

    @property
    def area(self) -> float:
        """The mean of `share` over the factors from 1 to 4: between 0 and 1, AlgoPerf's score of an arm."""
        return sum(max(0.0, WITHIN - ratio) for ratio in self.ratios) / (len(self.ratios) * (WITHIN - 1))


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


@dataclass(frozen=True)
class Draws:
    """The resamples of a bootstrap over tasks and, within each drawn task, over its seeds.

    All arms share the draws of seeds, as they share the seeds: what pairing takes away stays away.

    Attributes:
        tasks: the drawn tasks, (resamples, tasks).
        seeds: the seeds drawn for each of them, (resamples, tasks, seeds).
    """

    tasks: NDArray[np.int64]
    seeds: NDArray[np.int64]

    @staticmethod
    def of(tasks: int, seeds: int) -> Draws:
        """1,000 resamples from a fixed seed."""
        rng = np.random.default_rng(0)
        return Draws(rng.integers(tasks, size=(RESAMPLES, tasks)), rng.integers(seeds, size=(RESAMPLES, tasks, seeds)))

    def drawn(self, values: Array) -> Array:
        """The resamples of values, (tasks, seeds), a row each."""
        return values[self.tasks[:, :, None], self.seeds].reshape(len(self.tasks), -1)

    def interval(self, estimate: float, resampled: Array) -> Interval:
        """The estimate with the bootstrap's percentile interval."""
        low, high = np.quantile(resampled, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
        return Interval(estimate, float(low), float(high), self.seeds[0].size)


def iqm(values: Array, draws: Draws) -> Interval:
    """The interquartile mean of an arm's values, (tasks, seeds): of the middle half of all runs (arXiv 2108.13264)."""
    return draws.interval(
        float(stats.trim_mean(values.ravel(), 0.25)), stats.trim_mean(draws.drawn(values), 0.25, axis=1)
    )


def improvement(a: Array, b: Array, draws: Draws) -> Interval:
    """The probability that a run of a scores higher than b's on the same seed, ties half; both are (tasks, seeds).

    It is that of arXiv 2108.13264 for paired seeds, averaged over the tasks: ½ means no difference.
    """
    wins = (a > b) + 0.5 * (a == b)
    return draws.interval(float(wins.mean()), draws.drawn(wins).mean(axis=1))


def mean_ranks(scores: Array) -> Array:
    """Each arm's mean rank over tasks and seeds; scores are (arms, tasks, seeds), higher is better, 1 is the best.

    Ties share the mean of their ranks; so do all runs that diverged, at the end.
    """
    return np.asarray(stats.rankdata(-scores, axis=0).mean(axis=(1, 2)))


def normalised(scores: Array) -> Array:
    """Scores on a scale that tasks share: 1 for the median run of the best arm, 0 for that of the median arm.

    Scores are (arms, tasks, seeds), higher is better. Nothing is below −1, which a run that diverged has. Where the
    best arm is no better than the median one, runs at or above it are 0 and the others −1.
    """
    medians = np.median(scores, axis=2)
    middle = np.median(medians, axis=0)[:, None]
    with np.errstate(invalid="ignore"):  # ∞ − ∞
        span = medians.max(axis=0)[:, None] - middle
        above = np.where(np.isfinite(scores), scores - middle, -math.inf)
    known = np.isfinite(span) & (span > 0)
    scaled = np.where(known, above / np.where(known, span, 1.0), np.where(above < 0, -1.0, 0.0))
    return np.maximum(scaled, -1.0)


def noise_floor(scores: Array) -> float | None:
    """How far apart an arm's runs put it from itself: the A/A difference that 95 % of halvings stay below.

    Scores are (arms, seeds), all finite. What all arms share on a seed is taken away first, as pairing does. Then the
    seeds of each arm are halved in 200 random ways; the difference of the halves' means, scaled from n/2 seeds to n,
    is spread as the difference of two equal arms. None for fewer than 2 arms or 4 seeds.
    """
    arms, seeds = scores.shape
    if arms < 2 or seeds < 4:
        return None
    own = (scores - scores.mean(axis=0)) * math.sqrt(arms / (arms - 1))
    rng, half = np.random.default_rng(0), seeds // 2
    order = rng.permuted(np.tile(np.arange(seeds), (200, 1)), axis=1)
    apart = own[:, order[:, :half]].mean(axis=2) - own[:, order[:, half : 2 * half]].mean(axis=2)
    return float(np.quantile(np.abs(apart), LEVEL) * math.sqrt(half / seeds))
