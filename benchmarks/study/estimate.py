"""How long a study will take: from runs that are stored, and for others from a run of one epoch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.store import Store
from benchmarks.study.clusters import Died, Local
from benchmarks.study.lanes import Choice, Key, Lane, lanes, left
from benchmarks.study.pace import Pace, time_left
from benchmarks.study.spec import RunSpec, Study
from benchmarks.study.work import Outcome, Run, work
from benchmarks.training import run as train

PATIENCE = 20.0  # seconds for one epoch


@dataclass(frozen=True)
class Estimate:
    """What a study would do.

    Attributes:
        lanes: its arms on its tasks.
        missing: how many runs of each the store does not hold.
        seconds: how long a run of each takes, on one worker.
        slow: lanes whose epoch takes longer than could be waited for: their seconds are the least that it can be.
        failed: lanes whose probe failed → why.
    """

    lanes: Mapping[Key, Lane]
    missing: Mapping[Key, int]
    seconds: Mapping[Key, float]
    slow: frozenset[Key]
    failed: Mapping[Key, str]

    def total(self, workers: int) -> float:
        """Seconds that the rest takes, if that many workers do not disturb each other."""
        return time_left((self.missing[key] * self.seconds.get(key, 0.0) for key in self.lanes), workers)


def estimate(study: Study, store: Store, run: Run = train, patience: float = PATIENCE) -> Estimate:
    """Count the runs, and time what is not known."""
    pace = Pace(store.runs.values())
    all_lanes = lanes(study, store.trials)
    # What is found of one arm holds for those with the same optimizer on the same task.
    kinds = {key: (lane.task, lane.arm.optimizer) for key, lane in all_lanes.items()}
    known = {(record.spec.task, record.spec.optimizer) for record in store.runs.values()}
    slow: set[tuple[str, str]] = set()
    failed: dict[tuple[str, str], str] = {}
    warm: set[str] = set()
    workers = Local(1)
    try:
        for key, lane in all_lanes.items():
            like = kinds[key]
            if like in known:
                continue
            known.add(like)
            spec = _probe(lane, all_lanes)
            # The first run of a task reads its data too, which later ones find in memory.
            for _ in range(1 if lane.task in warm else 2):
                try:
                    outcome = workers.submit(work, run, spec, (), (), patience).result()
                except Died as error:
                    outcome = Outcome(None, error="its worker died", overdue=error.seconds >= patience)
                if outcome.overdue:
                    slow.add(like)
                    pace.add(*like, patience * _epochs(lane))
                    break
                if outcome.record is None:
                    failed[like] = outcome.error
                    break
                if lane.task in warm:
                    pace.add(*like, outcome.record.seconds * _epochs(lane))
                warm.add(lane.task)
    finally:
        workers.close()
    return Estimate(
        lanes=all_lanes,
        missing={key: left(lane, all_lanes, store.losses) for key, lane in all_lanes.items()},
        seconds={
            key: seconds
            for key, like in kinds.items()
            if like not in failed and (seconds := pace.seconds(*like)) is not None
        },
        slow=frozenset(key for key, like in kinds.items() if like in slow),
        failed={key: failed[like] for key, like in kinds.items() if like in failed},
    )


def _probe(lane: Lane, all_lanes: Mapping[Key, Lane]) -> RunSpec:
    """A run of one epoch, with settings that tuning might try first."""
    twin = all_lanes[lane.task, lane.arm.tuned_as] if lane.arm.tuned_as else lane
    settings = twin.startup[0] if twin.trials_wanted else {}
    spec = lane.final_specs(Choice(settings=settings, trials=()))[0]
    return spec.model_copy(update={"epochs": 1})


def _epochs(lane: Lane) -> int:
    return lane.final_specs(Choice(settings={}, trials=()))[0].epochs
