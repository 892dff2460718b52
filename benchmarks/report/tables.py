"""The tables: columns once, for terminal, Markdown and HTML."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import inf

from rich.table import Table

from benchmarks.grid import Grid
from benchmarks.report import data
from benchmarks.report.text import NBSP, counted, number, of, percent, ratio, signed, unit
from benchmarks.results import Results, Row, TaskResults, measure, ms_per_step, test_loss, test_score, validation_loss
from benchmarks.stats import Interval, censored_median
from benchmarks.study.record import RunRecord

WIDE = 120  # characters of a terminal that shows losses too

EDGE = "†"


def grid(task: TaskResults, width: float = inf) -> Grid:
    """A task's table, without measures of which no arm has any, and without what so many characters do not hold."""
    it = unit(task.task)
    searched = dict.fromkeys(name for row in task.rows for name in row.arm.search)
    measured = [n for n in data.measures(task) if any(value for row in task.rows for value in row.values(measure(n)))]
    cells: dict[str, Callable[[Row], str]] = {"arm": lambda row: row.name}
    cells |= {"learning rate" if name == "lr" else name: partial(_setting, name) for name in searched}
    cells[f"test {it.title}"] = _mean(test_score, it.score)
    if width >= WIDE:
        cells |= {"test loss": _mean(test_loss, number), "validation loss": _mean(validation_loss, number)}
    cells[f"steps to {it.rounded(task.target)}"] = partial(_steps, task)
    if width >= WIDE:
        cells["seconds to it"] = partial(_seconds, task)
    cells |= {name: _mean(measure(name), percent if name == "zeros" else number) for name in measured}
    if width == inf:
        cells["ms/step"] = _mean(ms_per_step, lambda interval: f"{interval.mean:.2f}")
        cells["state KiB"] = lambda row: f"{row.runs[0].state_bytes / 1024:.0f}" if row.runs else ""
    return Grid([*cells], [[cell(row) for cell in cells.values()] for row in task.rows])


def _setting(name: str, row: Row) -> str:
    value = row.settings.get(name)
    text = f"{value:g}" if isinstance(value, int | float) else "" if value is None else str(value)
    return text + EDGE if name in row.at_edge else text


def _mean(value: Callable[[RunRecord], float | None], write: Callable[[Interval], str]) -> Callable[[Row], str]:
    def cell(row: Row) -> str:
        mean = data.mean_of(row, value)
        return write(mean) if mean else state(row)

    return cell


def state(row: Row) -> str:
    """Why a row has no means: its final runs are to be made, failed or diverged."""
    total = len(row.runs) + row.failed + row.missing
    if row.failed:
        return f"{of(row.failed, total)} failed"
    if row.diverged:
        return f"{of(row.diverged, total)} diverged"
    if row.missing:
        return "being tuned" if row.choice is None else f"{of(row.missing, total)} missing"
    return ""


def _steps(task: TaskResults, row: Row) -> str:
    if not row.runs:
        return ""
    median = censored_median([task.steps_to_target(run) for run in row.runs])
    # Runs that diverged early were looked at for fewer steps than the others.
    looked = max((run.curve[-1].steps for other in task.rows for run in other.runs if run.curve), default=0)
    return f">{looked}" if median is None else f"{median:g}"


def _seconds(task: TaskResults, row: Row) -> str:
    median = censored_median([task.seconds_to_target(run) for run in row.runs]) if row.runs else None
    return "" if median is None else f"{median:.2g}"


def notes(task: TaskResults) -> list[str]:
    """What goes under a task's table, where it is in it."""
    edge = any(row.at_edge for row in task.rows)
    found = [f"{EDGE} At an end of the range that was searched: a better one may lie beyond."] if edge else []
    partial = [f"{row.name} ({state(row)})" for row in task.rows if row.missing]
    return [*found, f"Not finished: {', '.join(partial)}."] if partial else found


def standings(results: Results) -> Grid | None:
    """The arms over all tasks, in the order of the study, for no order is certain; None for a single task."""
    if not results.standings:
        return None
    rows = []
    for s in results.standings:
        against = results.study.against(s.arm) or ""
        improved = ratio(results.improvements[s.arm, against]) if against else ""
        told = "–".join(str(n) for n in data.tally(results, s.arm)) if against else ""
        iqm = f"{signed(s.iqm.mean)}{NBSP}({signed(s.iqm.low)}{NBSP}to{NBSP}{signed(s.iqm.high)})"
        areas = f"{s.steps.area:.2f}", f"{s.seconds.area:.2f}"
        rows.append([s.arm, against, told, improved, iqm, f"{s.rank:.1f}", *areas])
    titles = ["arm", "against", "better–worse–tie", "improvement", "IQM", "mean rank", "steps area", "seconds area"]
    return Grid(titles, rows, left=2)


STANDINGS = (
    "Better, worse and tie count tasks. Improvement is the probability that a run of the arm has a better test score "
    "than that of the arm it is compared with on the same seed; 50\u00a0% is no difference. IQM is the interquartile "
    "mean of the normalised test scores: 1 is a task's best arm, 0 its median one. Both have 95\u00a0% bootstrap "
    "intervals over tasks and seeds; where they overlap, no order is shown. Areas are those under the performance "
    "profiles of steps and seconds to the target, up to 4 times the fastest arm's (AlgoPerf's score). IQM, ranks and "
    "areas depend on which arms are compared."
)


def terminal(results: Results, width: int) -> list[Table]:
    """A table a task, for a terminal that is so many characters wide."""
    return [_terminal(task, width) for task in results.tasks.values()]


def _terminal(task: TaskResults, width: int) -> Table:
    runs = counted(max((len(row.runs) for row in task.rows), default=0), "seed")
    shown = grid(task, width)
    table = shown.terminal(f"{task.name}, {runs}".replace(NBSP, " "))
    table.collapse_padding = True
    for column, title, cells in zip(table.columns, shown.titles, zip(*shown.rows, strict=True), strict=True):
        # Titles may be broken into lines at plain spaces, a number and its interval may not.
        column.width = max(map(len, [*title.split(" "), *cells]))
    return table
