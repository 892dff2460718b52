"""How numbers are written."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.stats import LEVEL, Interval
from benchmarks.tasks.base import Task

NBSP = "\u00a0"  # a no-break space: a number stays on the line of its unit


@dataclass(frozen=True)
class Unit:
    """How a task's score is written: accuracies in per cent and their differences in points, all else as it is.

    Attributes:
        factor: what a score is multiplied by.
        sign: what stands behind it.
        title: the score's name, as a column's or an axis' title.
        of_difference: what stands behind a difference.
    """

    factor: float
    sign: str
    title: str
    of_difference: str

    def score(self, interval: Interval) -> str:
        """A score and its interval: 97.2 % ± 0.5, or 0.743 ± 0.012."""
        if self.factor == 1:
            return number(interval)
        scaled = interval.times(self.factor)
        return _with_interval(scaled, 1, self.sign)

    def rounded(self, value: float) -> str:
        """One score to four digits: 97.21 %."""
        return f"{self.factor * value:.4g}{self.sign}".replace("-", "−")

    def size(self, value: float) -> str:
        """The size of a difference: 0.42 points."""
        digits = 2 if self.factor != 1 else decimals(Interval(value, math.nan, math.nan, 1))
        return f"{self.factor * value:.{digits}f}{self.of_difference}"

    def mean_difference(self, interval: Interval) -> str:
        """A difference without its interval: +0.42 points; where runs diverged there is none."""
        if not math.isfinite(interval.mean):
            return "diverged"
        scaled = interval.times(self.factor)
        return f"{signed(scaled.mean, self._digits(scaled))}{self.of_difference}"

    def difference(self, interval: Interval, more: str = "") -> str:
        """A difference with the ends of its interval, and more: +0.42 points (95 % interval −0.10 to +0.94)."""
        scaled = interval.times(self.factor)
        digits = self._digits(scaled)
        ends = f"{share(LEVEL)} interval {signed(scaled.low, digits)} to {signed(scaled.high, digits)}"
        inner = ", ".join(part for part in ("" if math.isnan(scaled.half) else ends, more) if part)
        return f"{self.mean_difference(interval)}{f' ({inner})' if inner else ''}"

    def _digits(self, scaled: Interval) -> int:
        return 2 if self.factor != 1 else decimals(scaled)


def unit(task: Task) -> Unit:
    """The unit of a task's score."""
    if task.score_name == "accuracy":
        return Unit(100, f"{NBSP}%", "accuracy", f"{NBSP}points")
    return Unit(1, "", task.score_name, "")


def percent(interval: Interval, digits: int = 1) -> str:
    """A fraction and its interval in per cent: 97.2 % ± 0.5; what is always exactly 0 is just 0."""
    if interval.mean == 0 and not interval.half > 0:
        return "0"
    return _with_interval(interval.times(100), digits, f"{NBSP}%")


def ratio(interval: Interval) -> str:
    """A probability with its interval in whole per cent: 63 % (41 to 82)."""
    mean, low, high = (f"{100 * value:.0f}" for value in (interval.mean, interval.low, interval.high))
    return f"{mean} % ({low} to {high})".replace(" ", NBSP)


def number(interval: Interval) -> str:
    """A number and its interval, to two digits of the interval: 0.743 ± 0.012, or 3.1e-09 ± 2e-10."""
    size = abs(interval.mean)
    if size and not 1e-3 <= size < 1e5:
        spread = "" if math.isnan(interval.half) else f"{NBSP}±{NBSP}{interval.half:.0e}"
        return f"{interval.mean:.1e}{spread}".replace("-", "−")
    return _with_interval(interval, decimals(interval), "")


def decimals(interval: Interval) -> int:
    """Digits behind the point that show two digits of the interval, or three of a mean that has none."""
    half = interval.half
    size = abs(interval.mean) / 10 if math.isnan(half) or half == 0 else half
    return min(6, max(0, 1 - math.floor(math.log10(size)))) if size else 0


def _with_interval(interval: Interval, digits: int, sign: str) -> str:
    mean = f"{interval.mean:.{digits}f}".replace("-", "−") + sign
    if math.isnan(interval.half):
        return mean
    if math.isclose(interval.high - interval.mean, interval.mean - interval.low, rel_tol=1e-6, abs_tol=1e-12):
        return f"{mean}{NBSP}±{NBSP}{interval.half:.{digits}f}"
    ends = f"({interval.low:.{digits}f} to {interval.high:.{digits}f})".replace("-", "−")
    return f"{mean}{NBSP}{ends}".replace(" ", NBSP)


def share(fraction: float) -> str:
    """A round fraction in per cent: 95 %."""
    return f"{100 * fraction:g}{NBSP}%"


def signed(value: float, digits: int = 2) -> str:
    """+0.12, −0.12 or 0.00, with a true minus and no negative zero."""
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text.replace("-", "−")


def p_value(p: float, name: bool = True) -> str:
    """P-value 0.042, or 0.042 alone. Never "p = 0.042": p is the norm's."""
    number = f"<{NBSP}0.001" if p < 0.001 else f"{p:.3f}"
    return f"P-value{NBSP}{number}" if name else number


def filled(line: str) -> str:
    """Sentences in lines of 120 characters, so that what changes can be seen; tables and HTML as they are."""
    if line.startswith(("|", "#", "<", ".", "@", " ", "}")):
        return line
    indent = "  " if line.startswith("- ") else ""
    return textwrap.fill(line, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def listed(items: Sequence[str]) -> str:
    """a, b and c."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def counted(n: int, noun: str) -> str:
    """1 run, 2 runs."""
    return f"{n:,}{NBSP}{noun}{'' if n == 1 else 's'}"


def of(n: int, total: int) -> str:
    """3 of 7."""
    return f"{n}{NBSP}of{NBSP}{total}"
