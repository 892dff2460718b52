"""The loop that makes a study's runs: it alone owns the store and the trials; workers turn a spec into a record."""

from __future__ import annotations

import contextlib
import queue
import random
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from concurrent.futures import Future
from itertools import islice

from benchmarks.environment import here, own_optimizers
from benchmarks.store import Failure, Store
from benchmarks.study.clusters import NoCluster, Workers
from benchmarks.study.lanes import Key, Lane, lanes, left, ready
from benchmarks.study.pace import Pace, Status, time_left
from benchmarks.study.spec import RunSpec, Study
from benchmarks.study.work import Outcome, Run, line, stopped, work
from benchmarks.training import run as train

Watch = Callable[[Status], None]
SPARE = 2  # runs that wait beside those that run, so that no worker does
OFTEN = 0.1  # seconds between two looks at how far the study is


def execute(
    study: Study,
    store: Store,
    workers: Workers,
    watch: Watch = lambda _: None,
    run: Run = train,
    stop: Callable[[], bool] = lambda: False,
    timeout: float | None = None,
) -> None:
    """Make every run of the study that the store does not hold yet.

    A run that raises, takes too long, or whose workers die again and again, is stored as a failure, and the study goes
    on. An arm of which a run has killed its workers as often as ``workers.attempts`` says is given up: its other runs
    fail without being tried.

    Args:
        study: what to run.
        store: where results go, each as soon as it is there; other programs may write to it too.
        workers: who makes the runs.
        watch: told how far the study is, up to ten times a second and at least about once.
        run: a spec → its record.
        stop: asked about every second whether to stop.
        timeout: how many seconds a run may take; None: as long as it takes.

    Raises:
        KeyboardInterrupt: it was to stop.
        UnfitStore: the store holds another study, or runs on other data or of another optimizer's code.
        NoCluster: the cluster is gone.
    """
    store.begin(study, here(study.tasks, own_optimizers(study)))
    try:
        _Loop(study, store, workers, watch, run, timeout)(stop)
    finally:
        store.close()  # which gives free the runs that it has claimed


class _Loop:
    """Nothing that happens once a run takes time in proportion to the workers or to the runs."""

    def __init__(
        self, study: Study, store: Store, workers: Workers, watch: Watch, run: Run, timeout: float | None
    ) -> None:
        self.study = study
        self.store = store
        self.workers = workers
        self.watch = watch
        self.run = run
        self.timeout = timeout
        self.optimizers = own_optimizers(study)
        self.lanes = lanes(study, store.trials)
        # Of lanes with equally much left, two programs in one folder rarely take the same.
        self.order = random.sample([*self.lanes.values()], len(self.lanes))
        self.todo: dict[Key, deque[RunSpec]] = {}  # what can be made now
        self.left: dict[Key, int] = {}
        self.wanted: dict[str, list[Lane]] = defaultdict(list)  # a run that is missing → the lanes that count it
        self.flying: dict[Future[Outcome], tuple[Lane, RunSpec]] = {}
        self.ended: queue.SimpleQueue[Future[Outcome]] = queue.SimpleQueue()
        self.aloft: Counter[str | Key] = Counter()  # runs of an arm, of a lane, or of an id that fly
        self.deaths: Counter[str] = Counter()
        self.suspects: set[str] = set()  # arms of which a run died: one at a time, until one lands
        self.given_up: set[str] = set()
        self.claimed: set[str] = set()
        self.pace = Pace(store.runs.values())
        self.diverged = sum(record.diverged for record in store.runs.values())
        self.shown = 0.0

    def __call__(self, stop: Callable[[], bool]) -> None:
        self.settle(self.order)
        for lane in self.order:
            self.open(lane)
        while True:
            if stop():
                raise KeyboardInterrupt
            self.fill()
            over = not (self.flying or self.claimed)
            if over or time.monotonic() - self.shown > OFTEN:
                self.watch(self.status())
                self.shown = time.monotonic()
            if over:
                return
            # With none flying: another program makes the last runs, or those that the next ones wait for.
            with contextlib.suppress(queue.Empty):
                self.take(self.ended.get(timeout=1))

    def settle(self, touched: list[Lane]) -> list[Lane]:
        """Close the trials whose runs are there; the lanes in which that changes what can be made."""
        changed = []
        for lane in touched:
            told = lane.tell(self.store.losses)
            for trial in told:
                self.store.add_trial(*lane.key, trial)
            if told:
                takers = [arm for arm in self.study.arms if arm.tuned_as == lane.arm.name and lane.tuned]
                changed += [lane, *(self.lanes[lane.task, arm.name] for arm in takers)]
        return changed

    def open(self, lane: Lane) -> None:
        """Note what of a lane can be made now."""
        missing = {k: spec for k, spec in ready(lane, self.lanes).items() if k not in self.store.losses}
        self.left[lane.key] = left(lane, self.lanes, self.store.losses)
        self.todo[lane.key] = deque(missing.values())
        for run_id in missing:
            if lane not in self.wanted[run_id]:
                self.wanted[run_id].append(lane)

    def refresh(self) -> None:
        """Count what is there since the last time, by whatever program."""
        self.claimed = self.store.refresh()
        touched = []
        while self.store.fresh:
            for lane in self.wanted.pop(self.store.fresh.pop(), ()):
                self.left[lane.key] -= 1
                touched.append(lane)
        for lane in self.settle(touched):
            self.open(lane)

    def fill(self) -> None:
        """Give the workers as much as they can do."""
        while True:
            # Right before each choice: two programs that look at once would choose the same.
            self.refresh()
            if len(self.flying) >= self.workers.count() + SPARE:
                return
            found = self.next()
            if found is None:
                return
            lane, spec = found
            if lane.arm.name in self.given_up:
                self.fail(spec, f"given up: a worker of the arm {lane.arm.name!r} died {self.workers.attempts} times")
                continue
            self.store.claim(spec.run_id)
            future = self.workers.submit(work, self.run, spec, self.study.tasks, self.optimizers, self.timeout)
            self.flying[future] = found
            self.aloft.update((lane.key, lane.arm.name, spec.run_id))
            future.add_done_callback(self.ended.put)

    def next(self) -> tuple[Lane, RunSpec] | None:
        """A run of the lane that has most work left."""
        open_lanes = [
            lane
            for lane in self.order
            if self.todo[lane.key] and not (lane.arm.name in self.suspects and self.aloft[lane.arm.name])
        ]
        for lane in sorted(open_lanes, key=self.work, reverse=True):
            todo = self.todo[lane.key]
            for _ in range(len(todo)):
                spec = todo.popleft()
                if spec.run_id in self.store.losses:
                    continue
                if spec.run_id not in self.claimed and not self.aloft[spec.run_id]:
                    return lane, spec
                todo.append(spec)
        return None

    def work(self, lane: Lane) -> float:
        return (self.left[lane.key] - self.aloft[lane.key]) * self.seconds(lane)

    def seconds(self, lane: Lane) -> float:
        return self.pace.seconds(lane.task, lane.arm.optimizer) or 1.0

    def take(self, future: Future[Outcome]) -> None:
        """Store what a run gave."""
        lane, spec = self.flying.pop(future)
        self.aloft.subtract((lane.key, lane.arm.name, spec.run_id))
        try:
            outcome = future.result()
        except self.workers.deaths as error:
            if self.timeout and getattr(error, "seconds", 0.0) >= self.timeout:
                self.fail(spec, stopped(self.timeout))
            else:
                self.died(lane, spec, line(error))
            return
        except BaseException as error:
            # `work` returns what a run raises: this is the machinery between.
            raise NoCluster(
                f"the workers are gone ({line(error)}): what is stored is safe, and `resume` goes on from there"
            ) from error
        self.suspects.discard(lane.arm.name)
        if outcome.environment is not None:
            self.store.note(outcome.environment)
        if outcome.record is None:
            self.fail(spec, outcome.error, outcome.traceback)
        else:
            self.store.add(outcome.record)
            self.pace.add(spec.task, spec.optimizer, outcome.record.seconds)
            self.diverged += outcome.record.diverged

    def died(self, lane: Lane, spec: RunSpec, why: str) -> None:
        """Try a run again whose worker died, unless it has had its attempts: then its arm is given up."""
        self.deaths[spec.run_id] += 1
        self.suspects.add(lane.arm.name)
        if self.deaths[spec.run_id] < self.workers.attempts:
            self.todo[lane.key].appendleft(spec)
        else:
            self.given_up.add(lane.arm.name)
            self.fail(spec, f"its worker died {self.deaths[spec.run_id]} times: {why}")

    def fail(self, spec: RunSpec, error: str, traceback: str = "") -> None:
        self.store.add_failure(Failure(id=spec.run_id, spec=spec, error=error, traceback=traceback))

    def status(self) -> Status:
        totals: dict[str, int] = Counter()
        lefts: dict[str, int] = Counter()
        for lane in self.lanes.values():
            totals[lane.task] += lane.runs_wanted
            lefts[lane.task] += self.left[lane.key]
        workers = self.workers.count()
        left = time_left((self.left[lane.key] * self.seconds(lane) for lane in self.order), workers)
        return Status(
            tasks={task: (totals[task] - lefts[task], totals[task]) for task in self.study.tasks},
            running=[f"{spec.task} {spec.optimizer}" for _, spec in islice(self.flying.values(), workers)],
            workers=workers,
            diverged=self.diverged,
            failed=len(self.store.failures),
            left=left if self.pace.seconds("", "") is not None else None,
        )
