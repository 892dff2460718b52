"""What a study found, as numbers: rows, comparisons, standings. No words, no pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks import stats
from benchmarks.environment import Environment
from benchmarks.questions import Pair, Question, questions
from benchmarks.stats import ALPHA, Difference, Draws, Interval, Profile, holm, paired
from benchmarks.store import Failure, Store, UnfitStore
from benchmarks.study.lanes import Choice, Lane, Trial, chosen, lanes
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
    """The paired difference of two arms in a score, this − that, tested as one of a family.

    Attributes:
        row, against: this and that.
        difference: with the P-values of the test by itself.
        adjusted, exact: Holm's P-values within the family, of the t test and of the exact one; None where one is not.
        higher_is_better: of the score.
    """

    row: Row
    against: Row
    difference: Difference
    adjusted: float
    exact: float | None
    higher_is_better: bool

    @property
    def gain(self) -> float:
        """The mean difference, positive where the row is the better one; ±∞ where runs diverged."""
        mean = self.difference.interval.mean
        if not math.isfinite(mean):
            ahead = self.difference.wins - self.difference.losses
            mean = math.copysign(math.inf, ahead) if ahead else 0.0
        return mean if self.higher_is_better else -mean

    @property
    def verdict(self) -> int:
        """1 if the row is significantly better, −1 if worse, 0 for a tie: every page and table takes it from here."""
        return 0 if self.adjusted >= ALPHA else 1 if self.gain > 0 else -1

    @property
    def confirmed(self) -> bool:
        """The exact test rejects too."""
        return self.verdict != 0 and self.exact is not None and self.exact < ALPHA

    @property
    def flipped(self) -> Comparison:
        """That − this: another sign, the same P-values."""
        d = self.difference
        turned = replace(d, interval=d.interval.times(-1), wins=d.losses, losses=d.wins)
        return replace(self, row=self.against, against=self.row, difference=turned)


@dataclass(frozen=True)
class TaskResults:
    """A task's rows in the order of the arms, and its comparisons of all questions.

    Attributes:
        name, task: which.
        rows, comparisons: what was found.
        target: the validation score to which steps and seconds are counted: the median of the baseline's final ones,
            or the task's own target where the baseline has none.
        noise: the A/A difference in test score that equal arms stay below with 95 %; None from too few runs.
    """

    name: str
    task: Task
    rows: tuple[Row, ...]
    comparisons: tuple[Comparison, ...]
    target: float
    noise: float | None

    def row(self, arm: str) -> Row:
        """The row of this arm."""
        return next(row for row in self.rows if row.name == arm)

    @property
    def whole(self) -> bool:
        """No run is yet to be made."""
        return not any(row.missing for row in self.rows)

    @property
    def sign(self) -> int:
        """1 where a higher score is better, −1 where a lower one is."""
        return 1 if self.task.higher_is_better else -1

    def comparison(self, arm: str, against: str) -> Comparison | None:
        """Return the comparison of two arms, in either order; None if no question of the study has this pair."""
        for c in self.comparisons:
            if (c.row.name, c.against.name) == (arm, against):
                return c
            if (c.row.name, c.against.name) == (against, arm):
                return c.flipped
        return None

    def compare(self, pairs: Iterable[tuple[str, str]], of: Callable[[RunRecord], float | None]) -> list[Comparison]:
        """A family of its own, of sound arms in any measure over the seeds that both have."""
        named = ((self.row(this), self.row(that)) for this, that in pairs)
        return family((self, row, against, of) for row, against in named if row.sound and against.sound)

    def steps_to_target(self, run: RunRecord) -> int | None:
        """The steps at the first evaluation that reached the target, diverged later or not; None if none did."""
        return next((point.steps for point in run.curve if self.sign * point.score >= self.sign * self.target), None)

    def seconds_to_target(self, run: RunRecord) -> float | None:
        """The processor's seconds of the training steps to the target."""
        steps = self.steps_to_target(run)
        return None if steps is None else steps * run.ms_per_step / 1000

    def score(self, run: RunRecord) -> float:
        """The test score, or the worst there is if the run diverged."""
        return -self.sign * math.inf if run.test_score is None else run.test_score


Case = tuple[TaskResults, Row, Row, Callable[[RunRecord], float | None]]


def family(cases: Iterable[Case]) -> list[Comparison]:
    """Paired tests over the seeds that both have, corrected once; pairs of fewer than two seeds drop out."""
    tested = []
    for task, row, against, of in cases:
        a, b = ({run.spec.seed: of(run) for run in r.runs} for r in (row, against))
        both = [(x, y) for seed in a if (x := a[seed]) is not None and (y := b.get(seed)) is not None]
        if len(both) > 1:
            tested.append((task, row, against, paired(*zip(*both, strict=True))))
    adjusted = holm([difference.p_value for *_, difference in tested])
    known = [difference.exact for *_, difference in tested if difference.exact is not None]
    exact = holm(known) if len(known) == len(tested) else [None] * len(tested)
    return [
        Comparison(row, against, difference, p, e, task.task.higher_is_better)
        for (task, row, against, difference), p, e in zip(tested, adjusted, exact, strict=True)
    ]


@dataclass(frozen=True)
class Answer:
    """A question with its comparisons on all tasks: one family, corrected once."""

    question: Question
    comparisons: tuple[Comparison, ...]

    def counts(self, arm: str = "", against: str = "") -> tuple[int, int, int]:
        """(better, worse, ties), of all pairs or of one."""
        verdicts = [c.verdict for c in (self.between(arm, against) if arm else self.comparisons)]
        return verdicts.count(1), verdicts.count(-1), verdicts.count(0)

    def between(self, arm: str, against: str) -> list[Comparison]:
        """The comparisons of one pair."""
        return [c for c in self.comparisons if (c.row.name, c.against.name) == (arm, against)]


@dataclass(frozen=True)
class Standing:
    """How an arm stands over all tasks that are whole; a run that diverged or failed is the worst of its seed.

    Attributes:
        arm: which.
        iqm: the interquartile mean of its normalised scores.
        rank: the mean of its ranks over tasks and seeds.
        steps, seconds: profiles of its steps and seconds to the target, a problem being a task and a seed.
    """

    arm: str
    iqm: Interval
    rank: float
    steps: Profile
    seconds: Profile


@dataclass(frozen=True)
class Results:
    """Everything that the report is made of.

    Attributes:
        folder: where its store is.
        study, environments: what was asked, and where it ran.
        tasks: by task, in the study's order.
        answers: the study's questions with their comparisons.
        standings: the arms over the tasks; empty unless at least two tasks are whole.
        improvements: (arm, other) → the probability that the arm is better, over the same tasks, of every question's
            pairs; empty as standings are.
        done, wanted: how many runs count so far, those of whole trials and final ones, and how many the study has.
        failures: runs that raised an error, and why, by id.
        seconds: of all runs together.
    """

    folder: Path
    study: Study
    environments: Sequence[Environment]
    tasks: Mapping[str, TaskResults]
    answers: Sequence[Answer]
    standings: Sequence[Standing]
    improvements: Mapping[tuple[str, str], Interval]
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
    all_lanes = lanes(study, store.trials)
    rows = [_row(store, lane, chosen(lane, all_lanes)) for lane in all_lanes.values()]
    tasks = {task: _task(task, [row for row in rows if row.task == task], study.baseline) for task in study.tasks}
    asked = questions(study)
    answers = [_answer(question, tasks) for question in asked]
    for name, task in tasks.items():
        mine = tuple(c for answer in answers for c in answer.comparisons if c.row.task == name)
        tasks[name] = replace(task, comparisons=mine)
    standings, improvements = _over_tasks(study, asked, [task for task in tasks.values() if task.whole])
    return Results(
        folder=store.folder,
        study=study,
        environments=store.environments,
        tasks=tasks,
        answers=answers,
        standings=standings,
        improvements=improvements,
        done=sum(study.tuning.runs(len(row.trials)) + len(row.runs) + row.failed for row in rows),
        wanted=sum(lane.runs_wanted for lane in all_lanes.values()),
        failures=store.failures,
        seconds=sum(run.seconds for run in store.runs.values()),
    )


def _row(store: Store, lane: Lane, choice: Choice | None) -> Row:
    ids = [spec.run_id for spec in lane.final_specs(choice)] if choice else []
    runs = tuple(store.runs[run_id] for run_id in ids if run_id in store.runs)
    failed = sum(run_id in store.failures for run_id in ids)
    missing = len(lane.study.seeds) - len(runs) - failed
    return Row(lane.task, lane.arm, tuple(lane.trials), choice, runs, failed, missing)


def _task(task: str, rows: Sequence[Row], baseline: str) -> TaskResults:
    base = next(row for row in rows if row.name == baseline)
    own, higher = TASKS[task].target, TASKS[task].higher_is_better
    # A baseline that diverged on most seeds sets no target.
    worst = -math.inf if higher else math.inf
    finals = [worst if (score := validation_score(run)) is None else score for run in base.runs]
    target = median(finals) if finals else worst
    sound = [row.values(test_score) for row in rows if row.sound and not row.missing]
    noise = stats.noise_floor(np.array(sound)) if sound else None
    return TaskResults(task, TASKS[task], tuple(rows), (), target if math.isfinite(target) else own, noise)


def _answer(question: Question, tasks: Mapping[str, TaskResults]) -> Answer:
    cases = [
        (task, row, against, task.score)
        for task in tasks.values()
        for pair in question.pairs
        if not ((row := task.row(pair.arm)).failed or (against := task.row(pair.control)).failed)
    ]
    return Answer(question, tuple(family(cases)))


def _over_tasks(
    study: Study, asked: Sequence[Question], tasks: Sequence[TaskResults]
) -> tuple[list[Standing], dict[tuple[str, str], Interval]]:
    if len(tasks) < 2:
        return [], {}
    arms = [arm.name for arm in study.arms]
    scores = np.array([[_scores(task, task.row(arm), study.seeds) for task in tasks] for arm in arms])
    draws = Draws.of(*scores.shape[1:])
    scaled, ranks = stats.normalised(scores), stats.mean_ranks(scores)
    steps = {arm: [c for t in tasks for c in _costs(t.row(arm), t.steps_to_target, study.seeds)] for arm in arms}
    seconds = {arm: [c for t in tasks for c in _costs(t.row(arm), t.seconds_to_target, study.seeds)] for arm in arms}
    steps_profiles, seconds_profiles = map(stats.performance_profiles, (steps, seconds))
    standings = [
        Standing(arm, stats.iqm(scaled[i], draws), float(ranks[i]), steps_profiles[arm], seconds_profiles[arm])
        for i, arm in enumerate(arms)
    ]
    held = [Pair(arm, other) for arm in arms if (other := study.against(arm))]
    pairs = [(pair.arm, pair.control) for pair in [*(p for question in asked for p in question.pairs), *held]]
    by_name = dict(zip(arms, scores, strict=True))
    return standings, {
        pair: stats.improvement(by_name[pair[0]], by_name[pair[1]], draws) for pair in dict.fromkeys(pairs)
    }


def _scores(task: TaskResults, row: Row, seeds: Sequence[int]) -> list[float]:
    """Higher is better, and −∞ where there is no score."""
    found = {run.spec.seed: task.sign * task.score(run) for run in row.runs}
    return [found.get(seed, -math.inf) for seed in seeds]


def _costs(row: Row, of: Callable[[RunRecord], float | None], seeds: Sequence[int]) -> list[float | None]:
    found = {run.spec.seed: of(run) for run in row.runs}
    return [found.get(seed) for seed in seeds]
