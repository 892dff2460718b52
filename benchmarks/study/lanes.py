"""What a study runs next. Pure: it follows from the study and from what its runs gave.

A lane is one arm on one task: its quasi-random trials, which can all be made at once; its TPE trials, one after
another; the best three again, on more seeds; then its final runs, on the settings that it, or the arm named in
``tuned_as``, found. Trials are told in the order of their numbers, whatever the order in which their runs end, so that
a study that was interrupted goes on as if it had not been.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property

from pydantic import ConfigDict

from benchmarks.study import search
from benchmarks.study.spec import Arm, Frozen, RunSpec, Study, Tuning
from benchmarks.tasks import TASKS

Key = tuple[str, str]  # a task and an arm
Losses = Mapping[str, float]  # run id → the loss after the last epoch, ∞ if the run diverged or failed


class Trial(Frozen):
    """Settings that tuning tried, and the mean loss of the runs that did it: ∞ if one of them diverged or failed."""

    # JSON has no ∞: a word stands for it.
    model_config = ConfigDict(ser_json_inf_nan="strings")

    number: int
    settings: dict[str, float]
    loss: float
    run_ids: tuple[str, ...]


class Choice(Frozen):
    """What tuning found: the settings of the trial with the lowest loss. With reruns, only trials run again count.

    If two trials tie, the earlier one is taken.

    An arm that searches nothing has no trials, and no settings beside its own; one that takes over another's has no
    trials, and the other's settings, its learning rate multiplied by ``lr_factor``.
    """

    settings: dict[str, float]
    trials: tuple[Trial, ...]


class Lane:
    """One arm on one task, with the trials told so far.

    Args:
        study, task, arm: which.
        trials: those that are known already, from number 0 on.
    """

    def __init__(self, study: Study, task: str, arm: Arm, trials: Iterable[Trial] = ()) -> None:
        self.study = study
        self.task = task
        self.arm = arm
        self.key: Key = (task, arm.name)
        self.trials = list(trials)
        self._open: dict[int, tuple[search.Settings, tuple[str, ...], dict[str, RunSpec]]] = {}

    @property
    def trials_wanted(self) -> int:
        """How many trials its tuning has, those that are run again counted twice."""
        return self.study.tuning.trials + self.study.tuning.finalists if self.arm.search else 0

    @property
    def tuned(self) -> bool:
        """Its own tuning is done."""
        return len(self.trials) >= self.trials_wanted

    @property
    def runs_wanted(self) -> int:
        """How many runs it has, trials and final ones."""
        return self.study.tuning.runs(self.trials_wanted) + len(self.study.seeds)

    @cached_property
    def startup(self) -> list[search.Settings]:
        """The settings of its quasi-random trials."""
        n = min(self.study.tuning.startup, self.study.tuning.trials) if self.arm.search else 0
        seed = search.seed(self.study.name, *self.key, "quasi-random")
        return search.quasi_random(self.arm.search, n, seed) if n else []

    def tuning_specs(self) -> dict[str, RunSpec]:
        """The runs of all trials that can be made now, by id."""
        return {run_id: spec for _, _, specs in self._proposals().values() for run_id, spec in specs.items()}

    def tell(self, losses: Losses) -> list[Trial]:
        """Close the trials whose runs are all there, as far as no earlier one is open, and return them."""
        told: list[Trial] = []
        while not self.tuned:
            number = len(self.trials)
            settings, earlier, specs = self._proposals()[number]
            if any(run_id not in losses for run_id in specs):
                break
            run_ids = (*earlier, *specs)
            loss = math.fsum(losses[run_id] for run_id in run_ids) / len(run_ids)
            trial = Trial(number=number, settings=settings, loss=loss, run_ids=run_ids)
            self.trials.append(trial)
            del self._open[number]
            told.append(trial)
        return told

    def choice(self) -> Choice:
        """What its own tuning found."""
        if not self.trials_wanted:
            return Choice(settings={}, trials=())
        return Choice(settings=best(self.study.tuning, self.trials).settings, trials=tuple(self.trials))

    def final_specs(self, choice: Choice) -> list[RunSpec]:
        """Its final runs, in the order of the seeds."""
        return [self._spec(choice.settings, seed) for seed in self.study.seeds]

    def _proposals(self) -> dict[int, tuple[search.Settings, tuple[str, ...], dict[str, RunSpec]]]:
        """The open trials by number: settings, the runs that an earlier trial of them has, and those to be made."""
        tuning, told = self.study.tuning, len(self.trials)
        startup = len(self.startup)
        for number in range(told, min(max(startup, told + 1), tuning.trials)):
            if number not in self._open:
                settings = self.startup[number] if number < startup else self._next()
                self._open[number] = settings, (), self._specs(settings, tuning.seeds)
        if told >= tuning.trials:
            finalists = ranked(self.trials[: tuning.trials])[: tuning.finalists]
            for number, trial in enumerate(finalists, tuning.trials):
                if number >= told and number not in self._open:
                    specs = self._specs(trial.settings, tuning.rerun_seeds)
                    self._open[number] = trial.settings, trial.run_ids, specs
        return self._open

    def _specs(self, settings: search.Settings, seeds: Iterable[int]) -> dict[str, RunSpec]:
        return {spec.run_id: spec for spec in (self._spec(settings, seed) for seed in seeds)}

    def _next(self) -> search.Settings:
        history = [(trial.settings, trial.loss) for trial in self.trials]
        return search.tpe(self.arm.search, history, search.seed(self.study.name, *self.key, len(history)))

    def _spec(self, found: Mapping[str, float], seed: int) -> RunSpec:
        task = TASKS[self.task]
        of_arm = {name: getattr(self.arm, name) for name in RunSpec.model_fields.keys() & Arm.model_fields.keys()}
        return RunSpec(
            **of_arm | {"settings": {**found, **self.arm.settings}},
            task=self.task,
            seed=seed,
            epochs=max(1, round(task.epochs * self.study.budget)),
            batch_size=self.study.batch_size or task.batch_size,
            amp=self.study.amp,
        )


def ranked(trials: Iterable[Trial]) -> list[Trial]:
    """Trials from the lowest loss up; the earliest first if two tie."""
    return sorted(trials, key=lambda trial: (trial.loss, trial.number))


def best(tuning: Tuning, trials: Sequence[Trial]) -> Trial:
    """The trial whose settings are chosen: of those that were run again, if any were."""
    return ranked(trials[tuning.trials :] or trials)[0]


def lanes(study: Study, trials: Mapping[Key, Sequence[Trial]] | None = None) -> dict[Key, Lane]:
    """All lanes of a study, with the trials that are known already."""
    known = trials or {}
    return {
        (task, arm.name): Lane(study, task, arm, known.get((task, arm.name), ()))
        for task in study.tasks
        for arm in study.arms
    }


def chosen(lane: Lane, all_lanes: Mapping[Key, Lane]) -> Choice | None:
    """The settings of a lane's final runs; None while the tuning that they wait for goes on."""
    if lane.arm.tuned_as is None:
        return lane.choice() if lane.tuned else None
    twin = all_lanes[lane.task, lane.arm.tuned_as]
    if not twin.tuned:
        return None
    settings = dict(twin.choice().settings)
    if "lr" in settings and lane.arm.lr_factor != 1:
        # Six digits, so that the product leaves no dust in the store.
        settings["lr"] = float(f"{settings['lr'] * lane.arm.lr_factor:.6g}")
    return Choice(settings=settings, trials=())


def ready(lane: Lane, all_lanes: Mapping[Key, Lane]) -> dict[str, RunSpec]:
    """The runs of a lane that can be made now, by id, those that are made already among them."""
    if not lane.tuned:
        return lane.tuning_specs()
    choice = chosen(lane, all_lanes)
    return {} if choice is None else {spec.run_id: spec for spec in lane.final_specs(choice)}


def left(lane: Lane, all_lanes: Mapping[Key, Lane], losses: Losses) -> int:
    """How many runs of a lane are yet to be made."""
    told = lane.study.tuning.runs(len(lane.trials))
    return lane.runs_wanted - told - sum(run_id in losses for run_id in ready(lane, all_lanes))
