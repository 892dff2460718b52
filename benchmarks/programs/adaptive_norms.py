"""What the studies of ℓp directions in adaptive coordinates found, as the JSON files that the documentation draws."""

from __future__ import annotations

from typing import Any

from benchmarks.results import Comparison, Results, Row, test_loss, test_score

STUDIES = ("adaptive-norms", "adaptive-norms-near")
MEASURES = {"score": test_score, "loss": test_loss}


def condensed(results: Results) -> dict[str, Any]:
    """Return what the documentation needs of a finished study.

    Each task and measure is a family of tests, and another one for the arms that take over a learning rate.
    """
    base, arms = results.study.baseline, results.study.arms
    comparisons = [
        _held(c, by)
        for task in results.tasks.values()
        for by, of in MEASURES.items()
        for taken in (False, True)
        for c in task.compare(
            [(a.name, base) for a in arms if (a.tuned_as is not None) == taken and a.name != base], of
        )
    ]
    return {
        "environments": list(results.environments),
        "epochs": {row.task: run.spec.epochs for row in results.rows for run in row.runs},
        "seeds": results.study.seeds,
        "seconds": round(results.seconds, 1),
        "arms": [_found(row) for row in results.rows],
        "comparisons": comparisons,
    }


def _held(c: Comparison, by: str) -> dict[str, Any]:
    """A paired difference from the baseline by test score or test loss, its 95 % t interval and Holm's p-value."""
    i = c.difference.interval
    names = {"this": c.row.name, "that": c.against.name}
    numbers = {"mean": i.mean, "low": i.low, "high": i.high, "p_value": c.adjusted}
    return names | numbers | {"task": c.row.task, "by": by}


def _found(row: Row) -> dict[str, Any]:
    """One arm on one task: what tuning tried and chose, and its final runs on test data, in the order of the seeds.

    A learning rate that was tried has its validation loss beside it, None where it diverged.
    """
    whole = [run for run in row.runs if not run.diverged]
    return {
        "task": row.task,
        "arm": row.name,
        "p": row.arm.settings.get("p", 2.0),
        "scale": row.arm.settings.get("scale", "dual"),
        "lr": row.lr,
        "at_edge": bool(row.at_edge),
        "diverged": row.diverged,
        "tried": [(t.settings["lr"], round(t.loss, 5) if t.loss < float("inf") else None) for t in row.trials],
        "score": [round(score, 6) for run in whole if (score := run.test_score) is not None],
        "loss": [round(loss, 6) for run in whole if (loss := run.test_loss) is not None],
    }
