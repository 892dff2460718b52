"""What the ablation of adaptive p found, as the one JSON file that the documentation draws."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Self

from pydantic import BaseModel, ConfigDict

from benchmarks.environment import Environment
from benchmarks.optimizers import find
from benchmarks.results import Comparison, Results, Row, test_score

STUDY = "adaptive-p"
TWINS = ("SGD-EMA", "Signum")  # p = 2 and p = ∞


class Found(BaseModel):
    """One arm: how it was tuned, and its final runs, in the order of the seeds."""

    model_config = ConfigDict(extra="forbid")

    arm: str
    rule: str
    lr: float
    at_edge: bool
    diverged: int
    accuracies: list[float]
    losses: list[float]  # validation, by the epoch, the mean over the seeds
    p: list[float | None]  # of the first step of each epoch, the mean over the seeds; None where it is none to set


class Against(BaseModel):
    """A paired difference in test accuracy, its 95 % t interval and Holm's p-value."""

    model_config = ConfigDict(extra="forbid")

    this: str
    that: str
    mean: float
    low: float
    high: float
    p_value: float

    @classmethod
    def of(cls, c: Comparison, **more: Any) -> Self:
        """Return what is kept of a comparison."""
        i = c.difference.interval
        names = {"this": c.row.name, "that": c.against.name}
        return cls(**names, mean=i.mean, low=i.low, high=i.high, p_value=c.adjusted, **more)


def rounded(values: Iterable[float | None]) -> list[float]:
    """Return those that are there, to six digits."""
    return [round(value, 6) for value in values if value is not None]


class AdaptiveStudy(BaseModel):
    """The whole result."""

    model_config = ConfigDict(extra="forbid")

    environments: list[Environment]
    task: str
    epochs: int
    seeds: list[int]
    seconds: float
    arms: list[Found]
    comparisons: list[Against]


def family(arms: Sequence[str]) -> list[tuple[str, str]]:
    """Every arm whose p is measured against the same with another schedule or none, and against the ends of p."""
    return [
        (arm, other)
        for measured in ("-adaptive", "-curvature")
        for arm in arms
        if arm.endswith(measured)
        for same in [arm.removesuffix(measured)]
        for other in (same, f"{same}-linear", f"{same}-constant", *TWINS)
    ]


def condensed(results: Results) -> AdaptiveStudy:
    """What the documentation needs of a finished study."""
    (found,) = results.tasks.values()
    comparisons = [Against.of(c) for c in found.compare(family([row.name for row in found.rows]), test_score)]
    study = results.study
    return AdaptiveStudy(
        environments=list(results.environments),
        task=found.name,
        epochs=max(run.spec.epochs for row in found.rows for run in row.runs),
        seeds=list(study.seeds),
        seconds=round(results.seconds, 1),
        arms=[_found(row) for row in found.rows],
        comparisons=comparisons,
    )


def _found(row: Row) -> Found:
    whole = [run for run in row.runs if not run.diverged]
    epochs = list(zip(*(run.curve for run in whole), strict=True))
    ps = [[epoch.p for epoch in same] for same in epochs]
    return Found(
        arm=row.name,
        rule=find(row.arm.optimizer).rule,
        lr=row.lr or 0.0,
        at_edge=bool(row.at_edge),
        diverged=row.diverged,
        accuracies=rounded(map(test_score, whole)),
        losses=[round(sum(epoch.validation_loss for epoch in same) / len(same), 5) for same in epochs],
        p=[None if None in same else round(sum(p for p in same if p is not None) / len(same), 4) for same in ps],
    )
