"""What a study found, as numbers: rows, comparisons, standings. No words, no pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.environment import Environment
from benchmarks.stats import Difference, Profile, holm, normalised, paired, performance_profiles, ranks
from benchmarks.store import Failure, Store, UnfitStore
from benchmarks.study.lanes import Choice, Key, Trial, choices, final_specs
from benchmarks.study.record import RunRecord
from benchmarks.study.spec import Arm, Range, Study
from benchmarks.tasks import TASKS
from benchmarks.tasks.base import Task

EDGE = 0.05  # of a searched range, on the scale on which it is searched: nearer than that to an end is at the edge


@dataclass(frozen=True)
class Row:
    """One arm on one task.

    Attributes:
        task, arm: which.
        trials: its tuning so far; empty if it has none of its own.
        choice: the settings that tuning found; None as long as that goes on.
        runs: the final runs so far, in the order of the seeds.
        failed, missing: final runs that raised an error, and that are yet to be made.
    """

    task: str
    arm: Arm
    trials: tuple[Trial, ...]
    choice: Choice | None
    runs: tuple[RunRecord, ...]
    failed: int
    missing: int

    @property
    def name(self) -> str:
        return self.arm.name

    @property
    def diverged(self) -> int:
        return sum(run.diverged for run in self.runs)

    @property
    def sound(self) -> bool:
        """It has runs, and none diverged or failed: its means are means of all."""
        return bool(self.runs) and not self.diverged and not self.failed

    @property
    def settings(self) -> dict[str, object]:
        """The whole settings of the final runs."""
        return {**self.arm.settings, **(self.choice.settings if self.choice else {})}

    @property
    def lr(self) -> float | None:
        """The learning rate of the final runs."""
        value = self.settings.get("lr")
        return float(value) if isinstance(value, int | float) else None

    @property
    def at_edge(self) -> list[str]:
        """The searched settings whose best value is at an end of the range: a better one may lie beyond."""
        if not self.choice:
            return []
        return [name for name, within in self.arm.search.items() if _near_end(self.choice.settings[name], within)]

    def values(self, of: Callable[[RunRecord], float | None]) -> list[float]:
        """A measure of every final run; empty unless all are sound and have it."""
        found = [of(run) for run in self.runs] if self.sound else []
        known = [value for value in found if value is not None]
        return known if len(known) == len(found) else []


def _near_end(value: float, within: Range) -> bool:
    low, high, at = within.low, within.high, value
    if within.log:
        low, high, at = math.log(low), math.log(high), math.log(at)
    return not EDGE < (at - low) / (high - low) < 1 - EDGE


def test_score(run: RunRecord) -> float | None:
    """The score on the test data; None if the run diverged."""
    return run.test_score


def test_loss(run: RunRecord) -> float | None:
    """The loss on the test data; None if the run diverged."""
    return run.test_loss


def validation_score(run: RunRecord) -> float | None:
    """The score on the validation data after the last epoch; None if the run diverged."""
    return None if run.diverged else run.curve[-1].score


def validation_loss(run: RunRecord) -> float | None:
    """The loss on the validation data after the last epoch; None if the run diverged."""
    return None if run.diverged else run.curve[-1].validation_loss


def ms_per_step(run: RunRecord) -> float | None:
    """Milliseconds of the processor a step."""
    return run.ms_per_step


def measure(name: str) -> Callable[[RunRecord], float | None]:
    """One of the task's own measures."""
    return lambda run: run.measures.get(name)


@dataclass(frozen=True)
class Comparison:
    """The paired difference of two arms in a score, this − that; adjusted is Holm's P-value within its family."""

    row: Row
    against: Row
    difference: Difference
    adjusted: float
    higher_is_better: bool

    @property
    def gain(self) -> float:
        """The mean difference, positive where the row is the better one."""
        return self.difference.interval.mean if self.higher_is_better else -self.difference.interval.mean


@dataclass(frozen=True)
class TaskResults:
    """A task's rows in the order of the arms, and every arm held against its own; one family of tests."""

    name: str
    task: Task
    rows: tuple[Row, ...]
    comparisons: tuple[Comparison, ...]

    def row(self, arm: str) -> Row:
        """The row of this arm."""
        return next(row for row in self.rows if row.name == arm)

    @property
    def whole(self) -> bool:
        """No run is yet to be made."""
        return not any(row.missing for row in self.rows)

    def compare(self, pairs: Iterable[tuple[str, str]], of: Callable[[RunRecord], float | None]) -> list[Comparison]:
        """One family of paired tests, of arms over the seeds that both have; pairs that cannot be tested drop out."""
        family = []
        for this, that in pairs:
            row, against = self.row(this), self.row(that)
            if not (row.sound and against.sound):
                continue
            a, b = ({run.spec.seed: of(run) for run in r.runs} for r in (row, against))
            both = [(x, y) for seed in a if (x := a[seed]) is not None and (y := b.get(seed)) is not None]
            if len(both) > 1:
                family.append((row, against, paired([x for x, _ in both], [y for _, y in both])))
        adjusted = holm([difference.p_value for *_, difference in family])
        return [Comparison(*case, p, self.task.higher_is_better) for case, p in zip(family, adjusted, strict=True)]

    def steps_to_target(self, run: RunRecord) -> int | None:
        """The steps at the first evaluation that reached the task's target, diverged later or not; None if none did."""
        sign = 1 if self.task.higher_is_better else -1
        return next((point.steps for point in run.curve if sign * point.score >= sign * self.task.target), None)


@dataclass(frozen=True)
class Standing:
    """How an arm stands over all tasks that are whole.

    Attributes:
        arm: which.
        profile: of its steps to target, a problem being a task and a seed.
        rank: the mean of its ranks by mean test score.
        score: the mean of its normalised scores: 1 is the best arm of a task, 0 the median.
    """

    arm: str
    profile: Profile
    rank: float
    score: float


@dataclass(frozen=True)
class Results:
    """Everything that the report is made of.

    Attributes:
        folder: where its store is.
        study, environments: what was asked, and where it ran.
        tasks: by task, in the study's order.
        standings: the arms over the tasks; empty unless at least two tasks are whole.
        done, wanted: how many runs count so far, those of whole trials and final ones, and how many the study has.
        failures: runs that raised an error, and why, by id.
        seconds: of all runs together.
    """

    folder: Path
    study: Study
    environments: Sequence[Environment]
    tasks: Mapping[str, TaskResults]
    standings: Sequence[Standing]
    done: int
    wanted: int
    failures: Mapping[str, Failure]
    seconds: float

    @property
    def rows(self) -> list[Row]:
        return [row for task in self.tasks.values() for row in task.rows]

    @property
    def whole(self) -> bool:
        """No run is yet to be made."""
        return all(task.whole for task in self.tasks.values())


def collect(store: Store) -> Results:
    """Gather a store's results; of a study that is not finished, what is there.

    Raises:
        UnfitStore: the store holds no study, or one of a task that this program does not have.
    """
    study = store.study
    if study is None:
        raise UnfitStore("there is no study in it: make one with `python -m benchmarks run`")
    unknown = [task for task in study.tasks if task not in TASKS]
    if unknown:
        raise UnfitStore(f"the study has the tasks {', '.join(unknown)}, which this version of the program has not")
    found = choices(study, store.trials)
    ids = {key: [spec.run_id for spec in specs] for key, specs in final_specs(study, found).items()}
    tasks = {task: _task(study, task, store, found, ids) for task in study.tasks}
    rows = [row for task in tasks.values() for row in task.rows]
    seeds = len(study.tuning.seeds)
    tried = sum(study.tuning.trials * seeds for arm in study.arms if arm.search)
    return Results(
        folder=store.folder,
        study=study,
        environments=store.environments,
        tasks=tasks,
        standings=_standings([task for task in tasks.values() if task.whole]),
        done=sum(len(row.trials) * seeds + len(row.runs) + row.failed for row in rows),
        wanted=len(study.tasks) * (tried + len(study.arms) * len(study.seeds)),
        failures=store.failures,
        seconds=sum(run.seconds for run in store.runs.values()),
    )


def _task(
    study: Study, task: str, store: Store, found: Mapping[Key, Choice], final: Mapping[Key, Sequence[str]]
) -> TaskResults:
    rows = []
    for arm in study.arms:
        ids = final.get((task, arm.name), ())
        failed = sum(run_id in store.failures for run_id in ids)
        runs = tuple(store.runs[run_id] for run_id in ids if run_id in store.runs)
        rows.append(
            Row(
                task=task,
                arm=arm,
                trials=tuple(store.trials.get((task, arm.name), ())),
                choice=found.get((task, arm.name)),
                runs=runs,
                failed=failed,
                missing=len(study.seeds) - len(runs) - failed,
            )
        )
    alone = TaskResults(task, TASKS[task], tuple(rows), ())
    pairs = [(arm.name, other) for arm in study.arms if (other := study.against(arm.name))]
    return TaskResults(task, TASKS[task], tuple(rows), tuple(alone.compare(pairs, test_score)))


def _standings(tasks: Sequence[TaskResults]) -> list[Standing]:
    if len(tasks) < 2:
        return []
    arms = [row.name for row in tasks[0].rows]
    costs: dict[str, list[float | None]] = {arm: [] for arm in arms}
    placed: dict[str, list[float]] = {arm: [] for arm in arms}
    scored: dict[str, list[float]] = {arm: [] for arm in arms}
    for task in tasks:
        means = {row.name: _mean(row.values(test_score)) for row in task.rows}
        for arm, rank in ranks(means, task.task.higher_is_better).items():
            placed[arm].append(rank)
        for arm, score in normalised(means, task.task.higher_is_better).items():
            scored[arm].append(score)
        seeds = sorted({run.spec.seed for row in task.rows for run in row.runs})
        for row in task.rows:
            reached = {run.spec.seed: task.steps_to_target(run) for run in row.runs}
            costs[row.name] += [reached.get(seed) for seed in seeds]
    profiles = performance_profiles(costs)
    return [
        Standing(arm, profiles[arm], rank=sum(placed[arm]) / len(tasks), score=sum(scored[arm]) / len(tasks))
        for arm in arms
    ]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
