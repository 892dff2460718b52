"""What the studies of ℓp directions in adaptive coordinates found, as the JSON files that the documentation draws."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from benchmarks.environment import Environment
from benchmarks.results import Comparison, Results, Row, test_loss, test_score
from benchmarks.study.spec import Value

STUDIES = ("adaptive-norms", "adaptive-norms-near")
MEASURES = {"score": test_score, "loss": test_loss}


class Found(BaseModel):
    """One arm on one task: what tuning tried and chose, and its final runs on test data, in the order of the seeds."""

    model_config = ConfigDict(extra="forbid")

    task: str
    arm: str
    p: Value
    scale: str
    lr: float
    at_edge: bool
    diverged: int
    tried: list[tuple[float, float | None]]  # a learning rate and its validation loss, None where it diverged
    score: list[float]
    loss: list[float]


class Held(BaseModel):
    """A paired difference from the baseline by test score or test loss, its 95 % t interval and Holm's p-value.

    Each task and measure is a family of tests, and another one for the arms that take over a learning rate.
    """

    model_config = ConfigDict(extra="forbid")

    this: str
    that: str
    mean: float
    low: float
    high: float
    p_value: float
    task: str
    by: str


class AdaptiveNorms(BaseModel):
    """The whole result."""

    model_config = ConfigDict(extra="forbid")

    environments: list[Environment]
    epochs: dict[str, int]
    seeds: list[int]
    seconds: float
    arms: list[Found]
    comparisons: list[Held]


def condensed(results: Results) -> AdaptiveNorms:
    """Return what the documentation needs of a finished study."""
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
    return AdaptiveNorms(
        environments=list(results.environments),
        epochs={row.task: run.spec.epochs for row in results.rows for run in row.runs},
        seeds=list(results.study.seeds),
        seconds=round(results.seconds, 1),
        arms=[_found(row) for row in results.rows],
        comparisons=comparisons,
    )


def _held(c: Comparison, by: str) -> Held:
    i = c.difference.interval
    names = {"this": c.row.name, "that": c.against.name, "task": c.row.task, "by": by}
    return Held(**names, mean=i.mean, low=i.low, high=i.high, p_value=c.adjusted)


def _found(row: Row) -> Found:
    whole = [run for run in row.runs if not run.diverged]
    return Found(
        task=row.task,
        arm=row.name,
        p=row.arm.settings.get("p", 2.0),
        scale=str(row.arm.settings.get("scale", "dual")),
        lr=row.lr or 0.0,
        at_edge=bool(row.at_edge),
        diverged=row.diverged,
        tried=[(t.settings["lr"], round(t.loss, 5) if t.loss < float("inf") else None) for t in row.trials],
        score=[round(score, 6) for run in whole if (score := run.test_score) is not None],
        loss=[round(loss, 6) for run in whole if (loss := run.test_loss) is not None],
    )
