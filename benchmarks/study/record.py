"""What comes out of a run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from pydantic import BaseModel, ConfigDict

from benchmarks.study.spec import RunSpec


@dataclass(frozen=True, slots=True)  # a third of a model's memory; a large study has hundreds of thousands
class Point:
    """How a run stood at the end of an epoch; p is the one its steps were made with, None where there is none to set.

    ``score`` is what the task calls its score, on the validation data.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    steps: int
    train_loss: float
    validation_loss: float
    score: float
    p: float | None = None


class RunRecord(BaseModel):
    """A run and what came out of it. One that diverged has its finite epochs, no test result, and says so.

    Attributes:
        id, spec: which run.
        curve: a point an epoch.
        diverged: a loss was not finite.
        test_loss, test_score: after the last epoch.
        measures: what else the task measured of the trained model, by name: exact zeros, the distance to an optimum …
        state_bytes: of the optimizer's tensors.
        ms_per_step: of the processor's time, which other programs on the machine disturb less than the clock.
        seconds: the whole run, by the clock.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    spec: RunSpec
    curve: list[Point]
    diverged: bool
    test_loss: float | None
    test_score: float | None
    measures: dict[str, float]
    state_bytes: int
    ms_per_step: float
    seconds: float

    @property
    def last_loss(self) -> float:
        """The validation loss after the last epoch, ∞ if the run diverged: what tuning makes small."""
        return math.inf if self.diverged else self.curve[-1].validation_loss
