"""The loop that makes a study's runs: it alone owns the store and the trials; workers turn a spec into a record."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait

from benchmarks.environment import here
from benchmarks.store import Failure, Store
from benchmarks.study.clusters import NoCluster, Workers
from benchmarks.study.lanes import Lane, lanes, left, ready
from benchmarks.study.pace import Pace, Status, time_left
from benchmarks.study.spec import RunSpec, Study
from benchmarks.study.work import Outcome, Run, line, work
from benchmarks.training import run as train

Watch = Callable[[Status], None]
SPARE = 2  # runs that wait beside those that run, so that no worker does


def execute(
    study: Study,
    store: Store,
    workers: Workers,
    watch: Watch = lambda _: None,
    run: Run = train,
    stop: Callable[[], bool] = lambda: False,
) -> None:
    """Make every run of the study that the store does not hold yet.

    A run that raises, or whose workers die again and again, is stored as a failure, and the study goes on.

    Args:
        study: what to run.
        store: where results go, each as soon as it is there; other programs may write to it too.
        workers: who makes the runs.
        watch: told how far the study is, after each run and about every second.
        run: a spec → its record.
        stop: asked about every second whether to stop.

    Raises:
        KeyboardInterrupt: it was to stop.
        UnfitStore: the store holds another study, or runs on other data.
        NoCluster: the cluster is gone.
    """
    store.begin(study, here(study.tasks))
    try:
        _Loop(study, store, workers, watch, run)(stop)
    finally:
        store.close()  # which gives free the runs that it has claimed


class _Loop:
    def __init__(self, study: Study, store: Store, workers: Workers, watch: Watch, run: Run) -> None:
        self.study = study
        self.store = store
        self.workers = workers
        self.watch = watch
        self.run = run
        self.lanes = lanes(study, store.trials)
        self.flying: dict[Future[Outcome], RunSpec] = {}
        self.deaths: Counter[str] = Counter()
        self.suspects: dict[str, RunSpec] = {}
        self.pace = Pace(store.runs.values())
        self.claimed: set[str] = set()
        # Of lanes with equally much left, two programs in one folder rarely take the same.
        self.order = list(self.lanes.values())
        random.shuffle(self.order)

    def __call__(self, stop: Callable[[], bool]) -> None:
        self.settle()
        while True:
            if stop():
                raise KeyboardInterrupt
            self.fill()
            self.watch(self.status())
            if not self.flying:
                if not self.claimed:
                    return
                # Another program makes the last runs, or those that the next ones wait for.
                time.sleep(1)
            done, _ = wait(self.flying, timeout=1, return_when=FIRST_COMPLETED)
            died = [self.take(future) for future in done]
            if any(died) and self.workers.recover():
                for future in list(self.flying):
                    self.take(future)
            self.store.refresh()
            self.settle()

    def settle(self) -> None:
        """Close the trials whose runs are there."""
        for lane in self.lanes.values():
            for trial in lane.tell(self.store.losses):
                self.store.add_trial(*lane.key, trial)

    def left(self, lane: Lane) -> int:
        return left(lane, self.lanes, self.store.losses)

    def fill(self) -> None:
        """Give the workers as much as they can do; a run during which a worker has died runs alone."""
        while len(self.flying) < self.workers.count() + SPARE:
            # Right before each choice: two programs that look at once would choose the same.
            self.claimed = self.store.refresh()
            self.suspects = {k: spec for k, spec in self.suspects.items() if k not in self.store.losses}
            if self.suspects and self.flying:
                return
            spec = next(iter(self.suspects.values()), None) or self.next()
            if spec is None:
                return
            self.store.claim(spec.run_id)
            try:
                future = self.workers.submit(work, self.run, spec, self.study.tasks)
            except self.workers.deaths:
                if self.flying:
                    return  # their futures tell of it too
                self.workers.recover()
                continue
            self.flying[future] = spec

    def next(self) -> RunSpec | None:
        """A run of the lane that has most work left."""
        taken = self.claimed | {spec.run_id for spec in self.flying.values()}
        best: tuple[float, RunSpec | None] = (0.0, None)
        for lane in self.order:
            runs = ready(lane, self.lanes)
            missing = [run_id for run_id in runs if run_id not in self.store.losses]
            waiting = [run_id for run_id in missing if run_id not in taken]
            if waiting:
                work = (self.left(lane) - len(missing) + len(waiting)) * self.seconds(lane)
                if best[1] is None or work > best[0]:
                    best = work, runs[waiting[0]]
        return best[1]

    def seconds(self, lane: Lane) -> float:
        return self.pace.seconds(lane.task, lane.arm.optimizer) or 1.0

    def take(self, future: Future[Outcome]) -> bool:
        """Store what a run gave; whether its worker died instead."""
        spec = self.flying.pop(future)
        if not future.done():
            return self.suspect(spec, "another run's worker died")
        try:
            outcome = future.result()
        except self.workers.deaths as error:
            return self.suspect(spec, line(error))
        except BaseException as error:
            # `work` returns what a run raises: this is the machinery between.
            raise NoCluster(
                f"the workers are gone ({line(error)}): what is stored is safe, and `resume` goes on from there"
            ) from error
        if outcome.environment is not None:
            self.store.note(outcome.environment)
        if outcome.record is None:
            self.fail(spec, outcome.error, outcome.traceback)
        else:
            self.store.add(outcome.record)
            self.pace.add(spec.task, spec.optimizer, outcome.record.seconds)
        self.suspects.pop(spec.run_id, None)
        return False

    def suspect(self, spec: RunSpec, why: str) -> bool:
        """Note that a run may have killed its worker: the innocent are cleared when they run alone."""
        self.deaths[spec.run_id] += 1
        if self.deaths[spec.run_id] < self.workers.attempts:
            self.suspects[spec.run_id] = spec
        else:
            self.suspects.pop(spec.run_id, None)
            self.fail(
                spec, f"its worker died {self.deaths[spec.run_id]} times, the last time with nothing beside: {why}"
            )
        return True

    def fail(self, spec: RunSpec, error: str, traceback: str = "") -> None:
        self.store.add_failure(Failure(id=spec.run_id, spec=spec, error=error, traceback=traceback))

    def status(self) -> Status:
        tasks = {}
        for task in self.study.tasks:
            of_task = [lane for lane in self.lanes.values() if lane.task == task]
            total = sum(lane.runs_wanted for lane in of_task)
            tasks[task] = total - sum(self.left(lane) for lane in of_task), total
        known = self.pace.seconds("", "") is not None
        left = time_left((self.left(lane) * self.seconds(lane) for lane in self.lanes.values()), self.workers.count())
        return Status(
            tasks=tasks,
            running=[f"{spec.task} {spec.optimizer}" for spec in self.flying.values()][: self.workers.count()],
            workers=self.workers.count(),
            diverged=sum(record.diverged for record in self.store.runs.values()),
            failed=len(self.store.failures),
            left=left if known else None,
        )
