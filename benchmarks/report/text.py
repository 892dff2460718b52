"""How numbers are written."""

from __future__ import annotations

import math
from collections.abc import Sequence

from benchmarks.stats import Interval


def percent(interval: Interval, digits: int = 1) -> str:
    """A fraction and its interval in per cent: 97.2 % ± 0.5; what is always exactly 0 is just 0."""
    if interval.mean == interval.half == 0:
        return "0"
    if math.isnan(interval.half):
        return f"{100 * interval.mean:.{digits}f} %"
    return f"{100 * interval.mean:.{digits}f} % ± {100 * interval.half:.{digits}f}"


def number(interval: Interval, digits: int = 3) -> str:
    """A number and its interval: 0.123 ± 0.004."""
    if math.isnan(interval.half):
        return f"{interval.mean:.{digits}f}"
    return f"{interval.mean:.{digits}f} ± {interval.half:.{digits}f}"


def points(interval: Interval) -> str:
    """A difference of two fractions in percentage points, with the ends of its interval."""
    mean = f"{signed(100 * interval.mean)} points"
    if math.isnan(interval.half):
        return mean
    return f"{mean} (95 % interval {signed(100 * interval.low)} to {signed(100 * interval.high)})"


def signed(value: float, digits: int = 2) -> str:
    """+0.12, −0.12 or 0.00, with a true minus and no negative zero."""
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text.replace("-", "−")


def p_text(p: float) -> str:
    """A p-value."""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def listed(items: Sequence[str]) -> str:
    """a, b and c."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def counted(n: int, noun: str) -> str:
    """1 run, 2 runs."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"
