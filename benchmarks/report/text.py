"""How numbers are written."""

from __future__ import annotations

import math
from collections.abc import Sequence

from benchmarks.results import Results, Row
from benchmarks.spec import Regularizer
from benchmarks.stats import LEVEL, Interval

NBSP = "\u00a0"  # a no-break space: a number stays on the line of its unit

# What the report calls the regularizers. Bare "lp" would look like a part of the name LPSGD.
LABELS: dict[Regularizer, str] = {
    "none": "none",
    "agr": "AGR",
    "lp": f"ℓp{NBSP}decay",
    "agr+lp": f"AGR + ℓp{NBSP}decay",
}


def name(row: Row) -> str:
    """The optimizer with what it wears: Signum, or Signum + AGR."""
    return row.arm if row.regularizer == "none" else f"{row.arm} + {LABELS[row.regularizer]}"


def compared(results: Results) -> str:
    """36 pairs of optimizer and regularizer, or 7 optimizers."""
    n = len(results.rows)
    return (
        f"{counted(n, 'pair')} of optimizer and regularizer" if results.study.regularized else counted(n, "optimizer")
    )


def share(fraction: float) -> str:
    """A round fraction in per cent: 95 %."""
    return f"{100 * fraction:g}{NBSP}%"


def weight(decay: float) -> str:
    """λ = 0.1."""
    return f"λ{NBSP}={NBSP}{decay:g}"


def percent(interval: Interval, digits: int = 1) -> str:
    """A fraction and its interval in per cent: 97.2 % ± 0.5; what is always exactly 0 is just 0."""
    if interval.mean == interval.half == 0:
        return "0"
    if math.isnan(interval.half):
        return f"{100 * interval.mean:.{digits}f}{NBSP}%"
    return f"{100 * interval.mean:.{digits}f}{NBSP}%{NBSP}±{NBSP}{100 * interval.half:.{digits}f}"


def number(interval: Interval, digits: int = 3) -> str:
    """A number and its interval: 0.123 ± 0.004."""
    if math.isnan(interval.half):
        return f"{interval.mean:.{digits}f}"
    return f"{interval.mean:.{digits}f}{NBSP}±{NBSP}{interval.half:.{digits}f}"


def points(interval: Interval) -> str:
    """A difference of two fractions in percentage points, with the ends of its interval."""
    mean = f"{signed(100 * interval.mean)}{NBSP}points"
    if math.isnan(interval.half):
        return mean
    return f"{mean} ({share(LEVEL)} interval {signed(100 * interval.low)} to {signed(100 * interval.high)})"


def signed(value: float, digits: int = 2) -> str:
    """+0.12, −0.12 or 0.00, with a true minus and no negative zero."""
    text = f"{value:+.{digits}f}"
    return text[1:] if float(text) == 0 else text.replace("-", "−")


def p_value(p: float) -> str:
    """P-value 0.042. Never "p = 0.042": p is the norm's."""
    return f"P-value{NBSP}<{NBSP}0.001" if p < 0.001 else f"P-value{NBSP}{p:.3f}"


def listed(items: Sequence[str]) -> str:
    """a, b and c."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def counted(n: int, noun: str) -> str:
    """1 run, 2 runs."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"
