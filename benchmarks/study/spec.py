"""The settings of one run and of a whole study: everything that a result depends on."""

from __future__ import annotations

import hashlib
import json
import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

FINALISTS = 3  # trials that are run again before one of them is chosen


def _told(value: Any) -> Any:
    """JSON has no ∞: it is kept as the word."""
    return "inf" if isinstance(value, float) and math.isinf(value) and value > 0 else value


Value = Annotated[bool | int | float | str | None, BeforeValidator(_told)]


class Frozen(BaseModel):
    """Settings that cannot change and refuse what they do not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class PSchedule(Frozen):
    """How p moves from the optimizer's own p on: once an epoch, or, "adaptive", after every step.

    "adaptive" (by the gradient) and "curvature" (by the Hessian) have no space of their own: they move 1/(p−1).
    """

    kind: Literal["cosine", "linear", "adaptive", "curvature"]
    p_end: float = 2.0
    space: Literal["p", "exponent"] = "p"


class LRSchedule(Frozen):
    """How the learning rate moves, step by step: it warms up, then falls or stays.

    Attributes:
        kind: after the warm-up, "cosine" falls to 0 along half a cosine, "constant" stays, and "wsd" (warm-up, stable,
            decay) stays until it falls to 0 in a straight line.
        warmup: the share of the steps over which it rises linearly.
        cooldown: the share of the steps over which "wsd" falls. The other kinds have none.
    """

    kind: Literal["cosine", "constant", "wsd"] = "cosine"
    warmup: float = Field(default=0.0, ge=0, lt=1)
    cooldown: float = Field(default=0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _fits(self) -> LRSchedule:
        if (self.kind == "wsd") != (self.cooldown > 0):
            raise ValueError(f"wsd needs a cooldown above 0, and {self.kind} has {self.cooldown:g}: only wsd has one")
        if self.warmup + self.cooldown > 1:
            raise ValueError(f"warmup + cooldown must be at most 1, but is {self.warmup:g} + {self.cooldown:g}")
        return self

    def factor(self, step: int, steps: int) -> float:
        """Return what the learning rate is multiplied by in a step, counted from 0, of so many."""
        rising, falling = round(self.warmup * steps), round(self.cooldown * steps)
        if step < rising:
            return (step + 1) / (rising + 1)
        if self.kind == "cosine":
            return (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising))) / 2
        return min(1.0, (steps - step) / falling) if falling else 1.0


class RunSpec(Frozen):
    """One training run. Equal specs give equal records, but for the timings.

    Attributes:
        task: a name in `benchmarks.tasks.TASKS`.
        optimizer: a name in `benchmarks.optimizers.OPTIMIZERS`.
        settings: what the optimizer is made with: numbers, words and truth values; "inf" is ∞. lr is among them.
        p_schedule: how p moves, None if it stays.
        lr_schedule: how the learning rate moves.
        seed: of the weights and of the batches.
        epochs, batch_size: the budget; an epoch is what the task says it is.
        amp: the forward pass is made under bfloat16 autocast; weights, gradients, losses and the optimizer's state stay
            float32.
    """

    task: str
    optimizer: str
    settings: dict[str, Value]
    p_schedule: PSchedule | None = None
    lr_schedule: LRSchedule = LRSchedule()
    seed: int
    epochs: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    amp: bool = False

    @property
    def run_id(self) -> str:
        """A hash of the settings: the name under which the run is stored.

        Settings that were added after runs had been stored count only where they are not the default, so that those
        runs keep their names.
        """
        settings = self.model_dump(mode="json")
        for name in ("lr_schedule", "amp"):
            if getattr(self, name) == type(self).model_fields[name].default:
                del settings[name]
        canonical = json.dumps(settings, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]


class Range(Frozen):
    """Where tuning may look for a number: between two ends, by ratios if ``log``."""

    low: float
    high: float
    log: bool = True

    @model_validator(mode="after")
    def _ordered(self) -> Range:
        if not self.low < self.high or (self.log and self.low <= 0):
            raise ValueError(f"a range needs low < high, and low > 0 if log, but is {self.low:g} … {self.high:g}")
        return self

    def at(self, share: float) -> float:
        """Return the number so far from the low end to the high one."""
        if self.log:
            return float(self.low * (self.high / self.low) ** share)
        return self.low + (self.high - self.low) * share


class Arm(Frozen):
    """What a study compares: an optimizer with settings, some of which tuning finds.

    Attributes:
        name: what tables and figures call it; unique in its study.
        optimizer, settings, p_schedule, lr_schedule: as of `RunSpec`; without what is searched.
        search: the settings that are tuned, each task for itself; lr is nearly always among them.
        tuned_as: the arm of the same study whose tuned settings this one takes over, instead of tuning its own: for a
            sweep over λ at the learning rate of the twin without, or a control that must have the same one. Then
            ``search`` is empty.
        lr_factor: what the taken learning rate is multiplied by.
        against: the arm that it is held against, instead of the study's baseline.
    """

    name: str
    optimizer: str
    settings: dict[str, Value] = {}
    p_schedule: PSchedule | None = None
    lr_schedule: LRSchedule = LRSchedule()
    search: dict[str, Range] = {}
    tuned_as: str | None = None
    lr_factor: float = 1.0
    against: str | None = None


class Tuning(Frozen):
    """The tuning budget: the same for every arm on every task.

    Attributes:
        trials: settings tried by each.
        startup: how many of them are quasi-random (scrambled Sobol points), before TPE.
        seeds: the runs of a trial; its value is the mean validation loss after the last epoch, ∞ if one diverged.
        reruns: the runs more that the best three trials get, on the seeds that follow; then the lowest mean over all
            runs of a trial decides. 0: the best trial is taken as it is, which favours arms whose losses vary.
    """

    trials: int = Field(ge=1)
    startup: int = Field(ge=1)
    seeds: tuple[int, ...] = (1000,)
    reruns: int = Field(default=0, ge=0)

    @property
    def rerun_seeds(self) -> tuple[int, ...]:
        """The seeds on which the best trials are run again."""
        return tuple(range(max(self.seeds) + 1, max(self.seeds) + 1 + self.reruns))

    @property
    def finalists(self) -> int:
        """How many trials are run again; a single one is not, as nothing is chosen."""
        return min(FINALISTS, self.trials) if self.reruns and self.trials > 1 else 0

    def runs(self, closed: int) -> int:
        """How many runs an arm's first so many trials have; those that are run again come last, and count anew."""
        again = max(0, closed - self.trials)
        return (closed - again) * len(self.seeds) + again * self.reruns


class Study(Frozen):
    """A whole ablation: every arm on every task, tuned alike, then run on fresh seeds.

    Attributes:
        name, purpose: what it is called, and the question that it asks, in a sentence.
        tasks, arms: what is crossed.
        baseline: the arm that others are held against, unless they say otherwise.
        tuning: the budget.
        seeds: of the final runs: the same for all arms, so that differences are paired.
        budget: what the epochs of every task are multiplied by.
        protocol: the sha256 of the file that declared the study before it was run; None if none did.
        batch_size: of every task; None: each task's own.
        amp: as of `RunSpec`, for every run.
    """

    name: str
    purpose: str
    tasks: tuple[str, ...] = Field(min_length=1)
    arms: tuple[Arm, ...] = Field(min_length=1)
    baseline: str
    tuning: Tuning
    seeds: tuple[int, ...] = Field(min_length=1)
    budget: float = Field(default=1.0, gt=0)
    protocol: str | None = None
    batch_size: int | None = Field(default=None, ge=1)
    amp: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> Study:
        if not self.name.strip(".") or set(self.name) & set("/\\"):
            raise ValueError(f"the name is that of a folder too, without / and \\, but is {self.name!r}")
        names = [arm.name for arm in self.arms]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"arms need names of their own, but {', '.join(twice)} occurs twice")
        tuned = {*self.tuning.seeds, *self.tuning.rerun_seeds}
        if len(set(self.seeds)) < len(self.seeds) or set(self.seeds) & tuned:
            raise ValueError("the seeds must differ from each other and from those of the tuning")
        if self.baseline not in names:
            raise ValueError(f"the baseline {self.baseline!r} is none of the arms: {', '.join(names)}")
        by_name = {arm.name: arm for arm in self.arms}
        for arm in self.arms:
            for role, other in (("tuned_as", arm.tuned_as), ("against", arm.against)):
                if other is not None and (other not in by_name or other == arm.name):
                    raise ValueError(f"arm {arm.name!r}: {role} must name another arm, but is {other!r}")
            if arm.tuned_as is not None:
                if arm.search:
                    raise ValueError(f"arm {arm.name!r} has both search and tuned_as: leave one out")
                if by_name[arm.tuned_as].tuned_as is not None:
                    raise ValueError(f"arm {arm.name!r}: {arm.tuned_as!r} is itself tuned as another arm")
            both = sorted(set(arm.search) & set(arm.settings))
            if both:
                raise ValueError(f"arm {arm.name!r}: {', '.join(both)} is both set and searched")
        return self

    def arm(self, name: str) -> Arm:
        """The arm of this name."""
        return next(arm for arm in self.arms if arm.name == name)

    def against(self, name: str) -> str | None:
        """What an arm is held against; None for the baseline itself."""
        return self.arm(name).against or (None if name == self.baseline else self.baseline)
