from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks.environment import here
from benchmarks.store import Store, UnfitStore
from benchmarks.study.clusters import Local, NoCluster, connect
from benchmarks.study.execute import SPARE, execute
from benchmarks.study.lanes import chosen, lanes, left
from benchmarks.study.pace import Status
from benchmarks.study.spec import Arm, RunSpec, Study
from benchmarks.study.work import Outcome, work
from tests.benchmarks.study import mini
from tests.benchmarks.study.mini import RUNS, STUDY, run, told
from tests.patience import patience

ROOT = Path(__file__).parents[3]
PROGRAM = """
import sys
from pathlib import Path
from benchmarks.store import Store
from benchmarks.study.clusters import connect
from benchmarks.study.execute import execute
from tests.benchmarks.study.mini import STUDY, run
if __name__ == "__main__":
    workers = connect(sys.argv[2] if len(sys.argv) > 2 else None, 1)
    try:
        execute(STUDY, Store(Path(sys.argv[1])), workers, run=run)
    finally:
        workers.close()
"""


@pytest.fixture(scope="module")
def workers():
    local = Local(2)
    yield local
    local.close()


@pytest.fixture(scope="module")
def whole(tmp_path_factory, workers) -> Store:
    """An uninterrupted study."""
    store = Store(tmp_path_factory.mktemp("whole"))
    execute(STUDY, store, workers, run=run)
    return store


def outcomes(store: Store) -> dict[str, dict[str, object]]:
    return {k: record.model_dump(exclude={"seconds", "ms_per_step"}) for k, record in store.runs.items()}


def assert_same(store: Store, whole: Store) -> None:
    assert outcomes(store) == outcomes(whole)
    assert store.trials == whole.trials
    assert store.failures == {}


def stored(folder: Path) -> list[str]:
    """Ids of runs, as often as the files have them."""
    lines = [line for path in folder.glob("runs-*.jsonl") for line in path.read_bytes().splitlines(keepends=True)]
    return [json.loads(line)["run"]["id"] for line in lines if line.startswith(b'{"run"') and line.endswith(b"\n")]


def program(folder: Path, log: Path, seconds: float, *more: str) -> subprocess.Popen[str]:
    environment = os.environ | {"MINI_LOG": str(log), "MINI_SECONDS": str(seconds), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore::UserWarning", str(folder.with_suffix(".py")), str(folder), *more]
    folder.with_suffix(".py").write_text(PROGRAM)
    return subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, text=True)


def wait_until(true, process: subprocess.Popen[str] | None = None, seconds: float = 20) -> None:
    deadline = time.monotonic() + patience(seconds)
    while not true():
        assert process is None or process.poll() is None, "it ended too early"
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_study_is_made_whole_and_nothing_of_it_again(whole, workers):
    assert len(whole.runs) == RUNS
    assert [len(t) for t in whole.trials.values()] == [6] * 4
    known = lanes(STUDY, whole.trials)
    assert all(chosen(lane, known) for lane in known.values())
    assert len(known) == 8
    assert whole.environments == [here(STUDY.tasks)]
    again = Store(whole.folder)
    before = {path: path.read_bytes() for path in whole.folder.iterdir()}
    seen: list[Status] = []
    execute(STUDY, again, workers, watch=seen.append, run=run)
    assert {path: path.read_bytes() for path in whole.folder.iterdir()} == before
    assert [(s.done, s.total, s.running) for s in seen] == [(RUNS, RUNS, [])]


def test_the_watch_is_told_how_far_it_is(tmp_path, workers):
    seen: list[Status] = []
    store = Store(tmp_path)
    execute(STUDY, store, workers, watch=seen.append, run=run)
    assert seen[0].done == 0
    assert seen[0].left is None
    assert seen[-1].done == seen[-1].total == RUNS
    assert seen[-1].left == 0
    assert [s.done for s in seen] == sorted(s.done for s in seen)
    assert all(len(s.running) <= 2 for s in seen)
    assert seen[-1].diverged == sum(record.diverged for record in store.runs.values()) > 0
    assert set(seen[0].tasks) == {"mini", "mini-2"}


def test_a_run_that_raises_is_a_failure_and_the_study_goes_on(tmp_path, workers):
    bad = (
        Arm(name="bad", optimizer="sgd", settings={"raise": True, "lr": 0.1}),
        Arm(name="bad too", optimizer="sgd", settings={"raise": True}, search=mini.LR),
        Arm(name="NaN", optimizer="sgd", settings={"nan": True, "lr": 0.1}),
    )
    study = Study.model_validate(STUDY.model_dump() | {"arms": [*STUDY.arms, *bad]})
    store = Store(tmp_path)
    execute(study, store, workers, run=run)
    assert len(store.runs) == RUNS
    assert len(store.failures) == 2 * (3 + 9 + 3)
    by_kind = Counter(failure.error.partition(":")[0] for failure in store.failures.values())
    assert by_kind == {"RuntimeError": 24, "ValidationError": 6}  # a NaN would be null in JSON, and unreadable
    failure = next(f for f in store.failures.values() if "raise" in f.spec.settings)
    assert failure.error == "RuntimeError: told to raise"
    assert "in run" in failure.traceback
    assert [trial.loss for trial in store.trials["mini", "bad too"]] == [float("inf")] * 6
    again = Store(tmp_path)
    assert again.failures == store.failures
    execute(study, again, workers, run=lambda spec: pytest.fail("nothing is made again"))


@pytest.mark.exhaustive
@pytest.mark.skipif(sys.platform == "win32", reason="there is no kill −9")
def test_a_run_that_kills_its_workers_is_a_failure_and_the_innocent_are_not(tmp_path, monkeypatch):
    log = tmp_path / "log"
    monkeypatch.setenv("MINI_LOG", str(log))
    monkeypatch.setenv("MINI_SECONDS", "0.05")
    killer = Arm(name="killer", optimizer="sgd", settings={"die": True, "lr": 1})
    less = {"tasks": ("mini",), "tuning": {"trials": 2, "startup": 2}, "seeds": (1,)}
    study = Study.model_validate(STUDY.model_dump() | less | {"arms": [*STUDY.arms, killer]})
    store = Store(tmp_path / "results")
    local = Local(1)
    execute(study, store, local, run=run)
    local.close()
    assert [(f.spec.settings, f.error[:20]) for f in store.failures.values()] == [
        ({"die": True, "lr": 1}, "its worker died 3 ti")
    ]
    assert len(store.runs) == 2 * (2 + 1) + 1 + 1
    ended = Counter(told(log, "end"))
    assert set(ended) == set(store.runs)
    assert Counter(told(log, "begin"))[next(iter(store.failures))] == 3


@pytest.mark.exhaustive
@pytest.mark.skipif(sys.platform == "win32", reason="there is no kill −9")
def test_an_arm_that_kills_its_workers_is_given_up_and_the_others_go_on(tmp_path, monkeypatch):
    log = tmp_path / "log"
    monkeypatch.setenv("MINI_LOG", str(log))
    killer = Arm(name="killer", optimizer="sgd", settings={"die": True}, search=mini.LR)
    study = Study.model_validate(STUDY.model_dump() | {"arms": [*STUDY.arms, killer]})
    store = Store(tmp_path / "results")
    local = Local(2)
    execute(study, store, local, run=run)
    local.close()
    assert len(store.runs) == RUNS
    errors = Counter(failure.error.partition(":")[0] for failure in store.failures.values())
    assert set(errors) == {"its worker died 3 times", "given up"}
    every = lanes(study, store.trials)
    assert {left(lane, every, store.losses) for lane in every.values()} == {0}
    # Some were handed out before the first death was noticed; from then on it is one at a time, until one died 3 times.
    killed = [run_id for run_id in told(log, "begin") if run_id in store.failures]
    assert 3 <= len(killed) <= 2 + SPARE + 2
    assert set(told(log, "end")) == set(store.runs)


@pytest.mark.exhaustive
def test_a_run_that_hangs_is_stopped_and_the_others_go_on(tmp_path):
    where = ("in Python", "in C")
    hang = [Arm(name=f"hangs {at}", optimizer="sgd", settings={"hang": at, "lr": 0.1}) for at in where]
    study = Study.model_validate(STUDY.model_dump() | {"tasks": ("mini",), "arms": [*STUDY.arms, *hang], "seeds": (1,)})
    store = Store(tmp_path)
    local = Local(2)
    execute(study, store, local, run=run, timeout=patience(0.5))
    local.close()
    assert len(store.runs) == 2 * (6 + 1) + 1 + 1
    by_place = {failure.spec.settings["hang"]: failure for failure in store.failures.values()}
    assert set(by_place) == set(where)
    assert all(f.error.startswith("TimeoutError: it was stopped after") for f in by_place.values())
    assert "in run" in by_place["in Python"].traceback


@pytest.mark.exhaustive
@pytest.mark.skipif(sys.platform == "win32", reason="there is no kill −9")
def test_a_worker_that_is_killed_costs_the_runs_in_work_alone(tmp_path, whole, monkeypatch):
    log = tmp_path / "log"
    monkeypatch.setenv("MINI_LOG", str(log))
    monkeypatch.setenv("MINI_SECONDS", "0.1")
    killed: list[int] = []
    at_death: set[str] = set()
    store = Store(tmp_path / "results")

    def watch(status: Status) -> None:
        if status.done >= 8 and not killed and status.running:
            pid = int([line for line in log.read_text().splitlines() if line.startswith("begin")][-1].split()[2])
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)
            at_death.update(store.runs)

    local = Local(1)
    execute(STUDY, store, local, watch=watch, run=run)
    local.close()
    assert killed
    assert_same(store, whole)
    assert max(Counter(told(log, "begin")[len(at_death) :]).values()) <= 2
    begun = Counter(told(log, "begin"))
    assert {begun[run_id] for run_id in at_death} == {1}


@pytest.mark.skipif(sys.platform == "win32", reason="there is no kill −9")
def test_a_killed_study_goes_on_and_ends_as_if_it_had_not_been(tmp_path, whole, workers):
    folder, log = tmp_path / "results", tmp_path / "log"
    process = program(folder, log, 0.05)
    wait_until(lambda: len(stored(folder)) >= 20, process)  # among TPE's trials
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    survived = stored(folder)
    assert 20 <= len(survived) < RUNS
    last = max(folder.glob("runs-*.jsonl"), key=lambda path: path.stat().st_mtime)
    with last.open("a") as file:
        file.write('{"run":{"id":"half')  # as if the kill had come in the middle of a write
    with pytest.warns(UserWarning, match="cut off"):
        store = Store(folder)
    assert set(store.runs) == set(survived)
    execute(STUDY, store, workers, run=run)
    assert_same(store, whole)
    assert Counter(stored(folder)) == dict.fromkeys(whole.runs, 1)
    # A run was made again only if the kill came before it was stored.
    ended = Counter(told(log, "end"))
    assert sum(ended.values()) - len(ended) <= 4
    store.compact()
    assert_same(Store(folder), whole)
    assert {path.name for path in folder.iterdir()} == {"runs.parquet", ".lock"}


@pytest.mark.exhaustive
@pytest.mark.skipif(sys.platform == "win32", reason="there is no kill −9")
def test_two_programs_in_one_folder_share_the_work(tmp_path, whole):
    folder, log = tmp_path / "results", tmp_path / "log"
    programs = [program(folder, log, 0.15) for _ in range(2)]
    assert [process.wait(timeout=patience(20)) for process in programs] == [0, 0]
    assert len(list(folder.glob("runs-*.jsonl"))) == 2
    store = Store(folder)
    assert_same(store, whole)
    # Each leaves alone what the other has begun, unless both looked in the same instant.
    assert RUNS <= len(told(log, "end")) <= RUNS + 2
    assert min(Counter(line.split()[2] for line in log.read_text().splitlines()).values()) >= 4  # of every process
    store.compact()
    assert_same(Store(folder), whole)


@pytest.mark.exhaustive
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for a process in /proc")
def test_workers_do_not_outlive_their_program(tmp_path):
    log = tmp_path / "log"
    process = program(tmp_path / "results", log, 30)
    wait_until(lambda: told(log, "begin"), process)
    worker = int(log.read_text().split()[2])
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    wait_until(
        lambda: not Path(f"/proc/{worker}").exists() or "Z" in Path(f"/proc/{worker}/stat").read_text().split()[2]
    )


def test_workers_with_other_data_are_refused(tmp_path, monkeypatch):
    other = here(STUDY.tasks).model_copy(update={"data": {"mini": "others"}})

    class There:
        deaths: tuple[type[BaseException], ...] = ()
        attempts = 1

        def count(self) -> int:
            return 1

        def submit(self, function, *arguments):
            future: Future[Outcome] = Future()
            outcome = work(*arguments)
            future.set_result(Outcome(other, outcome.record))
            return future

    store = Store(tmp_path)
    with pytest.raises(UnfitStore, match="other data of the task 'mini'"):
        execute(STUDY, store, There(), run=run)
    assert store.runs == {}
    all_lanes = lanes(STUDY, store.trials)
    assert sum(left(lane, all_lanes, store.losses) for lane in all_lanes.values()) == RUNS


class StandIns:
    """So many workers, of which one at a time, the next in turn, has made its run."""

    deaths: tuple[type[BaseException], ...] = ()
    attempts = 1

    def __init__(self, n: int) -> None:
        self.n = n
        self.waiting: list[tuple[Future[Outcome], RunSpec]] = []

    def count(self) -> int:
        return self.n

    def submit(self, function, run, spec, *arguments):
        future: Future[Outcome] = Future()
        self.waiting.append((future, spec))
        return future


def seconds_a_dispatch(n: int, folder: Path, runs: int) -> float:
    """What the loop's own work takes of the processor's time a run, with so many workers, all of them busy."""
    one = {"tasks": ("mini",), "arms": STUDY.arms[3:], "baseline": "fixed", "seeds": range(2000, 2000 + runs)}
    study = Study.model_validate(STUDY.model_dump() | one)
    workers = StandIns(n)
    times: list[float] = []

    class Ended(queue.SimpleQueue):
        def get(self, timeout):
            times.append(time.process_time())
            future, spec = workers.waiting.pop(0)
            future.set_result(Outcome(None, run(spec)))
            return super().get(timeout=timeout)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda _: None)
        patch.setattr("benchmarks.study.execute.queue", SimpleNamespace(SimpleQueue=Ended, Empty=queue.Empty))
        execute(study, Store(folder), workers, run=run)
    # The first wait is when all workers have their first run; the last runs are not replaced by others.
    busy = times[: runs - n]
    return (busy[-1] - busy[0]) / (len(busy) - 1)


def test_a_dispatch_costs_no_more_with_many_workers_than_with_two(tmp_path):
    few = min(seconds_a_dispatch(2, tmp_path / f"few {i}", 400) for i in range(3))
    many = min(seconds_a_dispatch(1000, tmp_path / f"many {i}", 1400) for i in range(3))
    assert many < 1.5 * few


@pytest.fixture
def dask(tmp_path, monkeypatch):
    """A scheduler and two worker processes with a thread each, as a user starts them; the address, and the workers."""
    pytest.importorskip("distributed")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "MINI_LOG": str(tmp_path / "log"), "MINI_SECONDS": "0.1"}
    file = tmp_path / "scheduler.json"

    def start(what: str, *options: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", f"distributed.cli.dask_{what}", "--scheduler-file", str(file), *options]
        with (tmp_path / f"{what}.txt").open("ab") as said:
            return subprocess.Popen(
                command, cwd=tmp_path, env=environment, stdout=said, stderr=said, start_new_session=True
            )

    local = ("--host", "127.0.0.1", "--no-dashboard")
    scheduler = start("scheduler", *local, "--port", "0")
    # Without its nanny, a worker that is killed stays dead.
    members = [start("worker", *local, "--nthreads", "1", "--no-nanny") for _ in range(2)]
    try:
        wait_until(lambda: file.exists() and file.read_text().endswith("}"), scheduler)
        yield json.loads(file.read_text())["address"].replace("tcp://", "dask://"), members, scheduler
    finally:
        for process in (*members, scheduler):
            process.kill()
            process.wait()


@pytest.mark.skipif(sys.platform == "win32", reason="there is no kill −9")
def test_on_a_cluster_a_killed_worker_costs_nothing_that_is_stored(tmp_path, whole, dask):
    address, members, _ = dask
    log = tmp_path / "log"
    store = Store(tmp_path / "results")
    cluster = connect(address, 1)
    wait_until(lambda: cluster.count() == 2)
    at_death: list[str] = []
    killed: list[subprocess.Popen[bytes]] = []

    def watch(status: Status) -> None:
        if len(store.runs) >= 10 and not killed:
            at_death.extend(store.runs)
            last = [line.split()[-1] for line in log.read_text().splitlines() if line.startswith("begin")][-1]
            killed.extend(member for member in members if str(member.pid) == last)  # one that has work
            killed[0].kill()

    try:
        execute(STUDY, store, cluster, watch=watch, run=run)
    finally:
        cluster.close()
    assert_same(store, whole)
    begun = [line.split() for line in log.read_text().splitlines() if line.startswith("begin")]
    assert {pid for _, _, pid in begun} == {str(process.pid) for process in members}
    assert killed[0].poll() == -signal.SIGKILL
    # What was stored when it died was made once; what it had in work, or had not handed over, once more at most.
    times = Counter(run_id for _, run_id, _ in begun)
    assert {times[run_id] for run_id in at_death} == {1}
    assert sum(times.values()) - RUNS <= 4


@pytest.mark.exhaustive
def test_a_scheduler_that_goes_away_stops_the_study_and_loses_nothing(tmp_path, whole, dask, workers):
    address, _, scheduler = dask
    store = Store(tmp_path / "results")
    cluster = connect(address, 1)

    def watch(status: Status) -> None:
        if len(store.runs) >= 5:
            scheduler.kill()

    try:
        with pytest.raises(NoCluster, match="stored is safe"):
            execute(STUDY, store, cluster, watch=watch, run=run)
    finally:
        cluster.close()
    assert 5 <= len(store.runs) < RUNS
    again = Store(tmp_path / "results")
    execute(STUDY, again, workers, run=run)
    assert_same(again, whole)


def test_a_cluster_that_is_not_there_is_said_so(monkeypatch):
    monkeypatch.setattr("benchmarks.study.clusters.PATIENCE", "1s")
    with pytest.raises(NoCluster, match="dask://HOST:PORT, not 'tcp://localhost'"):
        connect("tcp://localhost", 1)
    with pytest.raises(NoCluster, match="no Dask scheduler answers"):
        connect("dask://127.0.0.1:9", 1)
