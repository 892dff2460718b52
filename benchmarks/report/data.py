"""What the figures and tables show, as plain rows: each figure is drawn from the rows that lie beside it as CSV."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Sequence
from itertools import takewhile
from statistics import fmean
from typing import Any

from benchmarks.results import (
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
from benchmarks.stats import Interval, censored_median, expected_best, interval
from benchmarks.study.record import Point, RunRecord
from benchmarks.study.spec import Study

Rows = list[dict[str, Any]]


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
        found |= _interval(name, row, of)
    found |= {
        "target": task.task.target,
        "reached_target": sum(steps is not None for steps in reached),
        "median_steps_to_target": censored_median(reached) if reached else None,
        "state_bytes": max((run.state_bytes for run in row.runs), default=None),
    }
    for name in measures(task):
        found |= _interval(f"measure: {name}", row, measure(name))
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


def _interval(name: str, row: Row, of: Callable[[RunRecord], float | None]) -> dict[str, float | None]:
    found = mean_of(row, of)
    return {
        name: found.mean if found else None,
        f"{name}_low": found.low if found else None,
        f"{name}_high": found.high if found else None,
    }


def measures(task: TaskResults) -> list[str]:
    """What the task's runs measured beside loss and score, in the order in which they say it."""
    return list(dict.fromkeys(name for row in task.rows for run in row.runs for name in run.measures))


def differences(results: Results) -> Rows:
    """Every arm against its own, paired by seed."""
    return [difference(task, c) for task in results.tasks.values() for c in task.comparisons]


def difference(task: TaskResults, c: Comparison) -> dict[str, Any]:
    """One comparison."""
    found = c.difference.interval
    return {
        "task": task.name,
        "arm": c.row.name,
        "against": c.against.name,
        "seeds": found.n,
        "difference": found.mean,
        "low": found.low,
        "high": found.high,
        "higher_is_better": c.higher_is_better,
        "p_value": c.difference.p_value,
        "p_value_holm": c.adjusted,
    }


def trials(results: Results) -> Rows:
    """Every setting that tuning tried, and the loss on the validation data that it gave."""
    startup = results.study.tuning.startup
    return [
        {
            "task": row.task,
            "arm": row.name,
            "trial": trial.number + 1,
            "by": "Sobol" if trial.number < startup else "TPE",
            "validation_loss": None if math.isinf(trial.loss) else trial.loss,
            "diverged": math.isinf(trial.loss),
            "chosen": row.choice is not None and trial == best(row),
            **trial.settings,
        }
        for row in results.rows
        for trial in row.trials
    ]


def best(row: Row) -> Any:
    """The trial of the lowest loss, the earliest if two tie; None without trials."""
    return min(row.trials, key=lambda trial: (trial.loss, trial.number), default=None)


def budgets(results: Results) -> Rows:
    """What tuning finds with n trials: expected of quasi-random ones, and found by these, in their order."""
    startup, found = results.study.tuning.startup, []
    for row in results.rows:
        losses = [trial.loss for trial in row.trials]
        expected = expected_best(losses[:startup]) if losses else []
        for n in range(1, len(losses) + 1):
            found.append(
                {
                    "task": row.task,
                    "arm": row.name,
                    "trials": n,
                    "expected_best": _finite(expected[n - 1]) if n <= len(expected) else None,
                    "best_so_far": _finite(min(losses[:n])),
                }
            )
    return found


def curves(results: Results) -> Rows:
    """Means over the seeds at the end of every epoch; runs that diverged are left out."""
    found = []
    for row in results.rows:
        whole = [run.curve for run in row.runs if not run.diverged]
        for points in zip(*whole, strict=True):
            found.append({"task": row.task, "arm": row.name, "seeds": len(points)} | _point(points))
    return found


def _point(points: Sequence[Point]) -> dict[str, float | None]:
    return {
        "steps": points[0].steps,
        "train_loss": fmean(p.train_loss for p in points),
        "validation_loss": fmean(p.validation_loss for p in points),
        "validation_score": fmean(p.score for p in points),
        "p": points[0].p,
    }


def profiles(results: Results) -> Rows:
    """The corners of every arm's performance profile."""
    return [
        {"arm": standing.arm, "factor": factor, "share": share}
        for standing in results.standings
        for factor, share in standing.profile.steps
    ]


def standings(results: Results) -> Rows:
    """Every arm over all whole tasks: profile, ranks, and how often it is told apart from what it is held against."""
    tallies = tally(results)
    return [
        {
            "arm": s.arm,
            "against": results.study.against(s.arm),
            "better": tallies[s.arm][0],
            "worse": tallies[s.arm][1],
            "not_told_apart": tallies[s.arm][2],
            "profile_area": s.profile.area,
            "solved": s.profile.share(math.nextafter(math.inf, 0)),
            "mean_rank": s.rank,
            "normalised_score": s.score,
        }
        for s in results.standings
    ]


ALPHA = 0.05


def tally(results: Results) -> dict[str, tuple[int, int, int]]:
    """Each arm → on how many tasks it is better, worse, and not told apart from what it is held against."""
    found = {arm.name: (0, 0, 0) for arm in results.study.arms}
    for task in results.tasks.values():
        for c in task.comparisons:
            better, worse, same = found[c.row.name]
            if c.adjusted >= ALPHA:
                same += 1
            elif c.gain > 0:
                better += 1
            else:
                worse += 1
            found[c.row.name] = better, worse, same
    return found


SPARSE = 0.005  # of the weights: fewer zeros than that are no sparsity


def zeros(results: Results) -> Rows:
    """Exact zeros and test score of the arms that make any, and of those that they are held against."""
    found: Rows = []
    swept = sweeps(results.study)
    for task in results.tasks.values():
        shares = {row.name: mean_of(row, measure("zeros")) for row in task.rows}
        sparse = [name for name, share in shares.items() if share and share.mean > SPARSE]
        shown = {*sparse, *(results.study.against(name) for name in sparse)}
        for row in task.rows:
            if row.name in shown and row.values(measure("zeros")) and row.values(test_score):
                name = {"task": row.task, "arm": row.name, "sweep": swept.get(row.name)}
                found.append(
                    name | _interval("zeros", row, measure("zeros")) | _interval("test_score", row, test_score)
                )
    return found


STRENGTHS = ("weight_decay", "decay_step")


def sweeps(study: Study) -> dict[str, str]:
    """Arms that differ in nothing but the strength of a decay, at least three together → what their names share."""
    groups: dict[str, list[str]] = {}
    for arm in study.arms:
        if any(arm.settings.get(name) for name in STRENGTHS):
            rest = {name: value for name, value in arm.settings.items() if name not in STRENGTHS}
            groups.setdefault(repr((arm.optimizer, arm.p_schedule, sorted(rest.items()))), []).append(arm.name)
    return {name: _shared(names) for names in groups.values() if len(names) > 2 for name in names}


def _shared(names: Sequence[str]) -> str:
    """The words that all names begin with; the first name if there are none."""
    words = takewhile(lambda column: len(set(column)) == 1, zip(*(name.split(" ") for name in names), strict=False))
    return " ".join(column[0] for column in words) or names[0]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def tables(results: Results) -> dict[str, Rows]:
    """All of it, by the name of its file."""
    every = {
        "runs": runs(results),
        "scores": scores(results),
        "differences": differences(results),
        "trials": trials(results),
        "budgets": budgets(results),
        "curves": curves(results),
        "profiles": profiles(results),
        "standings": standings(results),
        "zeros": zeros(results),
    }
    return {name: rows for name, rows in every.items() if rows}
