"""The table of the study: its columns once, for terminal, Markdown and HTML; as CSV with full numbers."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from dataclasses import dataclass
from math import inf

from rich.box import SIMPLE_HEAD
from rich.table import Table

from benchmarks.arms import ARMS
from benchmarks.report.layers import WORDS, layers
from benchmarks.report.settings import regularizers
from benchmarks.report.text import LABELS, NBSP, listed, number, percent, share
from benchmarks.report.words import Finding
from benchmarks.results import Results, Row
from benchmarks.spec import Regularizer
from benchmarks.stats import censored_median, t_interval
from benchmarks.training import RunRecord

WIDE = 140  # characters of a terminal that shows losses and validation too

EDGE = "†"


@dataclass(frozen=True)
class Column:
    """A title and a row's text under it."""

    title: str
    cell: Callable[[Row], str]
    left: bool = False
    least: float = 0  # characters of the narrowest terminal that shows it


def _mean(value: Callable[[RunRecord], float | None], write: Callable[..., str]) -> Callable[[Row], str]:
    def cell(row: Row) -> str:
        values = [value(run) for run in row.runs]
        known = [v for v in values if v is not None]
        if len(known) < len(values):
            return f"{row.diverged}/{len(values)}{NBSP}diverged"
        return write(t_interval(known))

    return cell


def _steps(row: Row) -> str:
    median = censored_median([run.steps_to_target for run in row.runs])
    # Runs that diverged early were looked at for fewer steps than the others.
    looked = max((run.epochs[-1].steps for run in row.runs if run.epochs), default=0)
    return f">{looked}" if median is None else f"{median:g}"


def _lr(row: Row) -> str:
    return f"{row.choice.lr:g}{EDGE if row.choice.at_edge else ''}"


def validation_accuracy(run: RunRecord) -> float | None:
    """After the last epoch; None if the run diverged."""
    return None if run.diverged else run.epochs[-1].validation_accuracy


def validation_loss(run: RunRecord) -> float | None:
    """After the last epoch; None if the run diverged."""
    return None if run.diverged else run.epochs[-1].validation_loss


def columns(results: Results) -> list[Column]:
    """The columns of the table that people read; without regularizers, none that they alone fill."""
    regularizer = [Column("regularizer", lambda row: LABELS[row.regularizer], left=True)]
    zeros = [Column("zeros", _mean(lambda run: run.zero_fraction, percent))]
    return [
        Column("optimizer", lambda row: row.arm, left=True),
        *(regularizer if results.study.regularized else []),
        Column("learning rate", _lr),
        Column("validation accuracy", _mean(validation_accuracy, percent), least=WIDE),
        Column("validation loss", _mean(validation_loss, number), least=WIDE),
        Column("test accuracy", _mean(lambda run: run.test_accuracy, percent)),
        Column("test loss", _mean(lambda run: run.test_loss, number), least=WIDE),
        Column(f"steps to{NBSP}{share(results.study.target)}", _steps),
        *(zeros if results.study.regularized else []),
        Column("ms/step", lambda row: f"{t_interval([run.ms_per_step for run in row.runs]).mean:.2f}", least=inf),
        Column("state KiB", lambda row: f"{row.runs[0].state_bytes / 1024:.0f}", least=inf),
    ]


def notes(results: Results) -> list[str]:
    """What goes under the table: the mark in it, and what would look like a mistake, where they are there."""
    same = [
        arm.name
        for arm in results.study.arms
        if ARMS[arm.name].sign_step
        and _same(results, arm.name, "agr", "none")
        and _same(results, arm.name, "agr+lp", "lp")
    ]
    told = []
    if any(row.choice.at_edge for row in results.rows):
        told.append(f"{EDGE} The smallest or largest learning rate that was tried: a better one may lie beyond.")
    if same:
        told.append(
            f"The rows of {listed(same)} with AGR equal those without, but for the time: AGR changes the sizes of a "
            "gradient's entries and never a sign, so it cannot change a sign step."
        )
    return told


def _same(results: Results, arm: str, this: Regularizer, that: Regularizer) -> bool:
    a, b = results.row((arm, this)), results.row((arm, that))
    return a is not None and b is not None and not a.diverged and [*map(_outcome, a.runs)] == [*map(_outcome, b.runs)]


def _outcome(run: RunRecord) -> object:
    return run.spec.lr, run.epochs, run.test_loss, run.test_accuracy, run.zero_fraction


def terminal(results: Results, width: int) -> Table:
    """The table for a terminal that is so many characters wide."""
    table = Table(box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    shown = [column for column in columns(results) if width >= column.least]
    cells = [[column.cell(row) for column in shown] for row in results.rows]
    for i, column in enumerate(shown):
        # Titles may be broken into lines at plain spaces, a number and its interval may not.
        needed = max(len(text) for text in [*column.title.split(" "), *(line[i] for line in cells)])
        table.add_column(column.title, justify="left" if column.left else "right", width=needed)
    for i, line in enumerate(cells):
        last = i + 1 == len(cells) or results.rows[i + 1].arm != results.rows[i].arm
        table.add_row(*line, end_section=last and results.study.regularized)
    return table


def markdown(results: Results, summary: list[Finding], settings: list[str]) -> str:
    """The summary and the table as Markdown."""
    shown = columns(results)
    lines = [f"# Ablation: {results.study.preset}", ""]
    lines += [f"- **{finding.title}.** {finding.text}" for finding in summary]
    lines += ["", regularizers(results)] if results.study.regularized else []
    lines += ["", "| " + " | ".join(column.title for column in shown) + " |"]
    lines += ["|" + "|".join(":--" if column.left else "--:" for column in shown) + "|"]
    lines += ["| " + " | ".join(column.cell(row) for column in shown) + " |" for row in results.rows]
    lines += [text for note in notes(results) for text in ("", note)]
    for i, (arm, table) in enumerate(layers(results).items()):
        lines += ["", "## Which layer has which norm", "", WORDS] if i == 0 else []
        lines += ["", f"{arm}:", "", "```text", table, "```"]
    lines += ["", "## Settings", "", *(f"- {line}" for line in settings), ""]
    return "\n".join(lines)


def csv_text(results: Results) -> str:
    """One line a row, with unrounded means and half widths; empty where a run diverged."""
    measured: dict[str, Callable[[RunRecord], float | None]] = {
        "validation_accuracy": validation_accuracy,
        "validation_loss": validation_loss,
        "test_accuracy": lambda run: run.test_accuracy,
        "test_loss": lambda run: run.test_loss,
        "zero_fraction": lambda run: run.zero_fraction,
        "ms_per_step": lambda run: run.ms_per_step,
    }
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    head = ["arm", "regularizer", "lr", "lr_at_edge", "seeds", "diverged", "median_steps_to_target", "state_bytes"]
    writer.writerow(head + [f"{name}_{part}" for name in measured for part in ("mean", "t95_half_width")])
    for row in results.rows:
        steps = censored_median([run.steps_to_target for run in row.runs])
        cells: list[object] = [row.arm, row.regularizer, row.choice.lr, row.choice.at_edge, len(row.runs), row.diverged]
        cells += ["" if steps is None else steps, row.runs[0].state_bytes]
        for value in measured.values():
            values = [value(run) for run in row.runs]
            known = [v for v in values if v is not None]
            interval = t_interval(known) if len(known) == len(values) else None
            cells += [interval.mean, interval.half] if interval else ["", ""]
        writer.writerow(cells)
    return out.getvalue()
