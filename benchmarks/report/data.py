"""The numbers of the tables and figures in full precision: rows of the CSV files beside the report."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable
from typing import Any

from benchmarks.results import (
    Answer,
    Comparison,
    Results,
    Row,
    TaskResults,
    measure,
    ms_per_step,
    test_loss,
    test_score,
    validation_loss,
    validation_score,
)
from benchmarks.stats import Interval, censored_median, interval
from benchmarks.study.lanes import best
from benchmarks.study.record import RunRecord

Rows = list[dict[str, Any]]
SPARSE = 0.005  # of the weights: fewer zeros than that are no sparsity


def csv_text(rows: Rows) -> str:
    """Comma-separated values with unrounded numbers; empty where there is none."""
    out = io.StringIO()
    writer = csv.DictWriter(
        out, fieldnames=list(dict.fromkeys(key for row in rows for key in row)), lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows({key: "" if _absent(value) else value for key, value in row.items()} for row in rows)
    return out.getvalue()


def _absent(value: object) -> bool:
    return value is None or (isinstance(value, float) and math.isnan(value))


def runs(results: Results) -> Rows:
    """Every final run."""
    return [
        {
            "task": task.name,
            "arm": row.name,
            "seed": run.spec.seed,
            "diverged": run.diverged,
            "test_score": run.test_score,
            "test_loss": run.test_loss,
            "validation_score": validation_score(run),
            "validation_loss": validation_loss(run),
            "steps_to_target": task.steps_to_target(run),
            "seconds_to_target": task.seconds_to_target(run),
            "ms_per_step": run.ms_per_step,
            "state_bytes": run.state_bytes,
            **{f"measure: {name}": value for name, value in run.measures.items()},
            "id": run.id,
        }
        for task in results.tasks.values()
        for row in task.rows
        for run in row.runs
    ]


def scores(results: Results) -> Rows:
    """Every arm on every task: the summary."""
    return [_summary(task, row) for task in results.tasks.values() for row in task.rows]


def _summary(task: TaskResults, row: Row) -> dict[str, Any]:
    reached = [task.steps_to_target(run) for run in row.runs]
    found: dict[str, Any] = {
        "task": row.task,
        "arm": row.name,
        "settings": json.dumps(row.settings, ensure_ascii=False),
        "at_edge": " ".join(row.at_edge),
        "seeds": len(row.runs),
        "diverged": row.diverged,
        "failed": row.failed,
        "missing": row.missing,
        "score_name": task.task.score_name,
    }
    for name, of in MEANS.items():
        found |= ends(name, mean_of(row, of))
    found |= {
        "target": task.target,
        "reached_target": sum(steps is not None for steps in reached),
        "median_steps_to_target": censored_median(reached) if reached else None,
        "median_seconds_to_target": censored_median([task.seconds_to_target(run) for run in row.runs])
        if reached
        else None,
        "noise_floor": task.noise,
        "state_bytes": max((run.state_bytes for run in row.runs), default=None),
    }
    for name in measures(task):
        found |= ends(f"measure: {name}", mean_of(row, measure(name)))
    return found


MEANS: dict[str, Callable[[RunRecord], float | None]] = {
    "test_score": test_score,
    "test_loss": test_loss,
    "validation_score": validation_score,
    "validation_loss": validation_loss,
    "ms_per_step": ms_per_step,
}


def mean_of(row: Row, of: Callable[[RunRecord], float | None]) -> Interval | None:
    """The mean of a measure over the seeds with its interval; None unless all runs are sound and have it."""
    values = row.values(of)
    return interval(values) if values else None


def ends(name: str, it: Interval | None) -> dict[str, float | None]:
    """A number and the ends of its interval, under names of their own."""
    found = (it.mean, it.low, it.high) if it else (None,) * 3
    return dict(zip((name, f"{name}_low", f"{name}_high"), found, strict=True))


def measures(task: TaskResults) -> list[str]:
    """What the task's runs measured beside loss and score, in the order in which they say it."""
    return list(dict.fromkeys(name for row in task.rows for run in row.runs for name in run.measures))


def comparisons(results: Results) -> Rows:
    """Every comparison of every question: in ``verdict``, 1 is that the arm is better, −1 worse, and 0 is a tie."""
    return [_compared(answer, c) for answer in results.answers for c in answer.comparisons]


def _compared(answer: Answer, c: Comparison) -> dict[str, Any]:
    found = c.difference.interval
    return {
        "question": answer.question.title,
        "task": c.row.task,
        "arm": c.row.name,
        "against": c.against.name,
        "seeds": found.n,
        "difference": _finite(found.mean),
        "low": found.low,
        "high": found.high,
        "higher_is_better": c.higher_is_better,
        "seeds_higher": c.difference.wins,
        "seeds_lower": c.difference.losses,
        "p_value": c.difference.p_value,
        "p_value_holm": c.adjusted,
        "p_value_exact": c.difference.exact,
        "p_value_exact_holm": c.exact,
        "verdict": c.verdict,
    }


def trials(results: Results) -> Rows:
    """Every setting that tuning tried, and the loss on the validation data that it gave."""
    tuning = results.study.tuning

    def way(number: int) -> str:
        return "Sobol" if number < tuning.startup else "TPE" if number < tuning.trials else "rerun"

    return [
        {
            "task": row.task,
            "arm": row.name,
            "trial": trial.number + 1,
            "by": way(trial.number),
            "validation_loss": None if math.isinf(trial.loss) else trial.loss,
            "diverged": math.isinf(trial.loss),
            "chosen": row.choice is not None and trial == best(tuning, row.trials),
            **trial.settings,
        }
        for row in results.rows
        for trial in row.trials
    ]


def tally(results: Results, arm: str) -> tuple[int, int, int]:
    """Return on how many tasks an arm is better, worse and tied, compared with its control."""
    other = results.study.against(arm) or ""
    found = [c.verdict for task in results.tasks.values() if (c := task.comparison(arm, other))]
    return found.count(1), found.count(-1), found.count(0)


def standings(results: Results) -> Rows:
    """Every arm over all whole tasks."""
    found = []
    for s in results.standings:
        other = results.study.against(s.arm)
        better, worse, ties = tally(results, s.arm)
        row: dict[str, Any] = {"arm": s.arm, "against": other, "better": better, "worse": worse, "ties": ties}
        improved = results.improvements[s.arm, other] if other else None
        row |= ends("improvement", improved) | ends("iqm", s.iqm)
        row |= {"mean_rank": s.rank, "steps_area": s.steps.area, "seconds_area": s.seconds.area}
        found.append(row | {"solved": s.steps.share(math.nextafter(math.inf, 0))})
    return found


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def tables(results: Results) -> dict[str, Rows]:
    """All of it, by the name of its file."""
    every = {of.__name__: of(results) for of in (runs, scores, comparisons, trials, standings)}
    return {name: rows for name, rows in every.items() if rows}
