"""A run that is killed goes on where it was, and ends as if it had not been."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import checkpoint, training
from benchmarks.checkpoint import Checkpoint
from benchmarks.environment import here
from benchmarks.optimizers import OPTIMIZERS
from benchmarks.store import Store
from benchmarks.study.clusters import Local
from benchmarks.study.execute import execute
from benchmarks.study.lanes import lanes
from benchmarks.study.record import RunRecord
from benchmarks.study.spec import Arm, LRSchedule, PSchedule, RunSpec, Study, Tuning
from benchmarks.tasks import TASKS
from benchmarks.training import run
from tests.patience import patience

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).parents[2]
LP = {"decay": "lp", "decay_p": 0.8, "weight_decay": 0.1}
SHORT = {"sgd": 0.1, "sgd-torch": 0.1, "normalizedsgd": 0.1}


class Killed(BaseException):
    pass


def spec(**changes: Any) -> RunSpec:
    """Three steps an epoch."""
    plain: dict[str, Any] = dict(
        task="digits", optimizer="lpsgdm", settings={"lr": 0.01}, seed=3, epochs=2, batch_size=360
    )
    return RunSpec.model_validate(plain | changes)


def outcome(record: RunRecord) -> dict[str, object]:
    return record.model_dump(exclude={"ms_per_step", "seconds"})


def interrupted(of: RunSpec, folder: Path, after: int) -> RunRecord:
    """Die after so many steps and their checkpoint, then make the rest; no step is made twice."""
    offer, steps = Checkpoint.offer, 0

    def dying(self, state):
        nonlocal steps
        offer(self, state)
        steps += 1
        if steps == after:
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Checkpoint, "offer", dying)
        with pytest.raises(Killed):
            run(of, folder, every=0)
        torch.rand(5)  # another process has another state of the generator
        record = run(of, folder, every=0)
    assert steps == of.epochs * -(-_examples(of) // of.batch_size)
    return record


def _examples(of: RunSpec) -> int:
    splits = TASKS[of.task].load()
    return splits.per_epoch or len(splits.train[0])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_with_every_optimizer(tmp_path, name):
    of = spec(optimizer=name, settings={"lr": SHORT.get(name, 1e-3)})
    assert outcome(interrupted(of, tmp_path, 4)) == outcome(run(of))


KINDS: dict[str, dict[str, Any]] = {
    "p by the epoch, AGR and decay": dict(
        settings={"lr": 0.01, "agr": True, **LP}, p_schedule=PSchedule(kind="cosine")
    ),
    "adaptive p": dict(p_schedule=PSchedule(kind="adaptive")),
    "AGR and decay on hooks": dict(optimizer="adamw", settings={"lr": 1e-3, "agr": True, **LP}),
    "pruning": dict(optimizer="adamw", settings={"lr": 1e-2, "prune": 0.75}, batch_size=40),
    "batch norm and dropout": dict(task="digits-noise", optimizer="sgd", settings={"lr": 0.1}),
    "warm-up": dict(lr_schedule=LRSchedule(kind="wsd", warmup=0.3, cooldown=0.3)),
    "bfloat16": dict(amp=True),
}


@pytest.mark.parametrize("after", [1, 3, 4], ids=["first step", "end of an epoch", "second epoch"])
@pytest.mark.parametrize("kind", KINDS)
def test_at_every_place_of_a_run(tmp_path, monkeypatch, kind, after):
    of = spec(**KINDS[kind])
    if kind == "pruning":  # after the first pruning, which is in step 20 of 27 in each epoch
        after *= 12
    if "dropout" in kind:
        build = TASKS[of.task].build
        monkeypatch.setattr(TASKS[of.task], "build", lambda: torch.nn.Sequential(torch.nn.Dropout(0.2), build()))
    assert outcome(interrupted(of, tmp_path, after)) == outcome(run(of))


def test_with_batches_that_are_drawn_ahead(tmp_path, monkeypatch):
    task = TASKS["digits"]
    plain = task.load()

    def noisy(inputs, draws):
        return inputs if draws is None else inputs + 0.1 * torch.randn(inputs.shape, generator=draws)

    monkeypatch.setattr(task, "load", lambda: replace(plain, fetch=noisy), raising=False)
    expected = run(spec())
    monkeypatch.setattr(task, "load", lambda: replace(plain, fetch=noisy, ahead=2))
    assert outcome(run(spec())) == outcome(expected)
    assert outcome(interrupted(spec(), tmp_path, 4)) == outcome(expected)


def test_with_a_measured_trajectory(tmp_path, monkeypatch):
    monkeypatch.setattr(TASKS["digits"], "trajectory", True, raising=False)
    found, expected = interrupted(spec(), tmp_path, 4), run(spec())
    assert "median cosine" in expected.measures
    assert outcome(found) == outcome(expected)


def test_times_of_both_parts_are_added(tmp_path, monkeypatch):
    monkeypatch.setattr(TASKS["digits"], "loss", lambda *_, loss=TASKS["digits"].loss: (time.sleep(0.05), loss(*_))[1])
    assert interrupted(spec(), tmp_path, 4).seconds > 6 * 0.05


@pytest.fixture
def begun(tmp_path):
    """A folder with the checkpoint of a run's second step, and the checkpoint."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "evaluate", lambda *_: (_ for _ in ()).throw(Killed))
        with pytest.raises(Killed):
            run(spec(), tmp_path, every=0)
    return tmp_path, Checkpoint(tmp_path, spec().run_id, here(()))


def test_what_another_environment_left_is_not_gone_on_with(begun, monkeypatch):
    folder, own = begun
    assert own.read() is not None
    for changes in ({"torch": "2.0"}, {"normopt": "0"}, {"commit": "abc+"}, {"code": {"mine:Own": "0"}}):
        assert Checkpoint(folder, spec().run_id, here(()).model_copy(update=changes)).read() is None
    assert Checkpoint(folder, spec(seed=4).run_id, here(())).read() is None


@pytest.mark.parametrize("damage", [lambda data: data[:-100], lambda data: b"", lambda data: b"\0" * len(data)])
def test_a_damaged_checkpoint_costs_only_itself(begun, damage):
    folder, own = begun
    own.path.write_bytes(damage(own.path.read_bytes()))
    with pytest.warns(UserWarning, match="its run begins anew"):
        record = run(spec(), folder)
    assert outcome(record) == outcome(run(spec()))


def test_a_disk_that_refuses_costs_only_the_checkpoint(tmp_path):
    (tmp_path / checkpoint.FOLDER).touch()  # no folder can be made there
    with pytest.warns(UserWarning, match="no checkpoint could be written"):
        record = run(spec(), tmp_path, every=0)
    assert outcome(record) == outcome(run(spec()))


def test_a_short_run_writes_nothing_and_so_does_one_without_a_folder(tmp_path):
    run(spec(), tmp_path)
    run(spec(), tmp_path / "none", every=0)
    assert [*tmp_path.iterdir()] == []


PROGRAM = """
import sys
from functools import partial
from pathlib import Path
from benchmarks.store import Store
from benchmarks.study.clusters import Local
from benchmarks.study.execute import execute
from benchmarks.training import run
from tests.benchmarks.test_checkpoint import STUDY
if __name__ == "__main__":
    folder, workers = Path(sys.argv[1]), Local(1)
    execute(STUDY, Store(folder), workers, run=partial(run, folder=folder, every=0))
"""
ARM = Arm(name="own", optimizer="tests.benchmarks.counted:Counted", settings={"lr": 0.1, "momentum": 0.9})
STUDY = Study(
    name="killed",
    purpose="Is a run that was killed gone on with?",
    tasks=("digits",),
    arms=(ARM,),
    baseline="own",
    tuning=Tuning(trials=1, startup=1),
    seeds=(1,),
    budget=0.25,
)
STEPS = 3 * 17


@pytest.mark.skipif(sys.platform == "win32", reason="there is no kill −9")
def test_a_run_that_was_killed_goes_on_in_the_resumed_study(tmp_path, monkeypatch):
    folder, log, file = tmp_path / "results", tmp_path / "steps", tmp_path / "program.py"
    monkeypatch.setenv("COUNTED", str(log))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    file.write_text(PROGRAM)
    log.touch()
    process = subprocess.Popen([sys.executable, str(file), str(folder)], cwd=ROOT, start_new_session=True)
    deadline = time.monotonic() + patience(40)
    while log.stat().st_size < 25:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    time.sleep(0.1)  # the worker notices that its program is gone
    made = log.stat().st_size
    assert 25 <= made < STEPS
    store = Store(folder)
    assert store.runs == {}
    assert len([*(folder / checkpoint.FOLDER).glob("*.pt")]) == 1
    local = Local(1)
    try:
        execute(STUDY, store, local)
    finally:
        local.close()
    # Of the step in which it was killed there may be no checkpoint.
    assert STEPS <= log.stat().st_size <= STEPS + 2
    (record,) = store.runs.values()
    assert outcome(record) == outcome(run(record.spec))
    assert not (folder / checkpoint.FOLDER).exists()


def test_checkpoints_of_runs_that_are_stored_or_failed_are_removed(tmp_path, monkeypatch):
    monkeypatch.setenv("COUNTED", str(tmp_path / "steps"))
    broken = ARM.model_copy(update={"name": "broken", "settings": {"lr": -1.0}})
    study = STUDY.model_copy(update={"arms": (ARM, broken)})
    folder = tmp_path / "results"
    files, seen = folder / checkpoint.FOLDER, []
    files.mkdir(parents=True)
    for lane in lanes(study).values():
        for of in lane.final_specs(lane.choice()):
            (files / f"{of.run_id}.pt").write_bytes(b"")
    (files / "half").write_bytes(b"")
    local, store = Local(1), Store(folder)
    try:
        execute(study, store, local, watch=lambda s: seen.append(len([*files.iterdir()]) if files.exists() else 0))
    finally:
        local.close()
    assert (len(store.runs), len(store.failures)) == (1, 1)
    assert seen[0] == 3
    assert seen[-1] == 1
    assert not files.exists()
