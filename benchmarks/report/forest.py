"""Forest plots as data: for each line the places of a dot and of its interval, in per cent of the width."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.report.text import NBSP, p_value, ratio, signed, unit
from benchmarks.results import Answer, Comparison, Results, TaskResults
from benchmarks.stats import Interval

VERDICTS = {1: "better", -1: "worse", 0: "tie"}
CUT = 3  # times the third quartile of the intervals' far ends: what lies further would take all the room


@dataclass(frozen=True)
class Line:
    """A line: the name, the numbers as text, the verdict, and the places of dot and interval; None without any."""

    name: str
    text: str
    verdict: str
    dot: float
    ends: tuple[float, float] | None


@dataclass(frozen=True)
class Forest:
    """Lines on one axis: where no difference is, marks with their texts, and the noise floor's two ends."""

    title: str
    axis: str
    zero: float
    marks: tuple[tuple[float, str], ...]
    noise: tuple[float, float] | None
    lines: tuple[Line, ...]


def over_tasks(results: Results, answer: Answer) -> Forest:
    """The probability of improvement of every pair of a question, over all tasks."""
    lines = []
    for pair in answer.question.pairs:
        it = results.improvements[pair.arm, pair.control]
        better, worse, ties = answer.counts(pair.arm, pair.control)
        verdict = VERDICTS[0 if it.low <= 0.5 <= it.high else 1 if it.mean > 0.5 else -1]
        told = f"{ratio(it)}; {better}–{worse}–{ties}"
        lines.append(Line(f"{pair.arm} − {pair.control}", told, verdict, 100 * it.mean, (100 * it.low, 100 * it.high)))
    axis = f"probability of improvement, % (→{NBSP}better); tasks better–worse–tie"
    marks = tuple((float(at), str(at)) for at in (0, 25, 50, 75, 100))
    return Forest(answer.question.title, axis, 50.0, marks, None, tuple(lines))


def on_task(
    task: TaskResults,
    title: str,
    comparisons: Sequence[Comparison],
    axis_of: Sequence[Comparison],
    names: Sequence[str] | None = None,
) -> Forest:
    """The paired differences on a task, better to the right whichever sign that is.

    ``axis_of`` are those that share the axis, so that a task's forests have one; ``names`` stands in for the arms'.
    """
    it = unit(task.task)
    names = names or [f"{c.row.name} − {c.against.name}" for c in comparisons]
    known = [c.difference.interval for c in axis_of if math.isfinite(c.difference.interval.low)]
    limit = _limit([task.noise or 0.0, *(max(abs(i.low), abs(i.high)) for i in known)])
    step = _step(limit)

    def place(value: float) -> float:
        return min(100.0, max(0.0, 50 + 50 * task.sign * value / limit))

    def line(c: Comparison, name: str) -> Line:
        i = c.difference.interval
        ends = None if math.isnan(i.low) else _sorted(place(i.low), place(i.high))
        difference = it.mean_difference(i) + ("" if ends is None else _ends(it.factor, i))
        told = f"{VERDICTS[c.verdict]}: {difference}; {p_value(c.adjusted)}"
        return Line(name, told, VERDICTS[c.verdict], place(task.sign * c.gain), ends)

    marks = tuple((place(at), signed(it.factor * at, _digits(it.factor * step))) for at in (-step, 0.0, step))
    noise = (place(-task.noise), place(task.noise)) if task.noise else None
    axis = f"difference in test {it.title}{', points' if it.factor != 1 else ''} (→{NBSP}better)"
    return Forest(title, axis, 50.0, marks, noise and _sorted(*noise), tuple(map(line, comparisons, names)))


def _sorted(a: float, b: float) -> tuple[float, float]:
    return min(a, b), max(a, b)


def _ends(factor: float, i: Interval) -> str:
    scaled = i.times(factor)
    digits = _digits(scaled.half) + 1 if scaled.half else 2
    return f" ({signed(scaled.low, digits)} to {signed(scaled.high, digits)})".replace(" ", NBSP)


def _limit(reach: Sequence[float]) -> float:
    ordered = sorted(reach)
    return min(ordered[-1], CUT * ordered[3 * len(ordered) // 4]) * 1.05 or 1.0


def _step(limit: float) -> float:
    """The largest of 1, 2 and 5 times a power of ten within three quarters of the axis."""
    power = 10.0 ** math.floor(math.log10(0.75 * limit))
    return max(factor * power for factor in (1, 2, 5) if factor * power <= 0.75 * limit)


def _digits(value: float) -> int:
    """Digits behind the point of a number's first one."""
    return max(0, -math.floor(math.log10(value) + 1e-9)) if value else 0
