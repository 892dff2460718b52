from __future__ import annotations

import io
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from benchmarks import cli, doctor, listing
from benchmarks.cli import app
from benchmarks.environment import here
from benchmarks.store import PARQUET, Store
from benchmarks.study import toml
from benchmarks.study.estimate import estimate
from benchmarks.study.presets import PRESETS
from benchmarks.study.spec import Arm, Study
from benchmarks.tasks import TASKS, fashion
from benchmarks.tasks.images import VARIABLE
from tests.benchmarks.study import mini
from tests.benchmarks.study.mini import STUDY
from tests.benchmarks.test_store import filled
from tests.patience import patience

ROOT = Path(__file__).parents[2]
SMALL = """
purpose = "whether the program works"
tasks = ["digits"]
seeds = 2
budget = 0.1
tuning = { trials = 2, startup = 1, reruns = 0 }
[[arms]]
name = "SGD"
optimizer = "sgd"
search = { lr = { low = 0.01, high = 1 } }
[[arms]]
name = "AdamW"
optimizer = "adamw"
"""
RUNS = 2 * (2 + 2)


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    """Tables whole, whatever terminal the tests run in."""
    monkeypatch.setattr(cli, "console", Console(width=200, highlight=False))
    monkeypatch.setattr(cli, "errors", Console(stderr=True, width=200, highlight=False))


def said(*arguments: str, code: int = 0) -> str:
    done = CliRunner().invoke(app, [*arguments])
    assert done.exit_code == code, done.output
    assert "Traceback" not in done.output
    return done.output


def program(*arguments: str, **more: object) -> subprocess.Popen[str]:
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    command = [sys.executable, "-m", "benchmarks", *arguments]
    return subprocess.Popen(command, cwd=ROOT, start_new_session=True, **pipes, **more)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A small study, run by the program itself with an optimizer of the user's own beside it."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "small.toml").write_text(SMALL + '[[arms]]\noptimizer = "mine_of_test:Mine"\n')
    (folder / "mine_of_test.py").write_text(
        "import torch\nclass Mine(torch.optim.SGD):\n    def __init__(self, params, lr): super().__init__(params, lr)\n"
    )
    command = ("run", str(folder / "small.toml"), "--out", str(folder / "out"), "--workers", "2")
    process = program(*command, env=os.environ | {"PYTHONPATH": str(folder)})
    output, errors = process.communicate(timeout=patience(30))
    assert (process.returncode, errors) == (0, "")
    assert "100 %: 12 of 12 runs" in output
    assert "The report: file://" in output
    return folder


def test_a_run_leaves_its_results_and_a_report(finished):
    out = finished / "out"
    assert {path.name for path in out.iterdir()} >= {PARQUET, "report.html", "summary.md", "summary.csv"}
    assert not list(out.glob("*.jsonl"))
    store = Store.from_parquet(out / PARQUET)
    assert len(store.runs) == RUNS + 4
    assert store.study is not None
    assert (store.study.name, store.study.arms[-1].optimizer) == ("small", "mine_of_test:Mine")
    assert {record.spec.optimizer for record in store.runs.values()} == {"sgd", "adamw", "mine_of_test:Mine"}


def test_a_finished_study_is_listed_and_reported_again(finished, monkeypatch):
    monkeypatch.syspath_prepend(finished)
    out = finished / "out"
    assert "12/12" in said("list", str(finished))
    assert "No study in" in said("list", str(out / "data"))
    (out / "report.html").unlink()
    assert "The report" in said("report", str(out))
    assert (out / "report.html").exists()


@pytest.mark.exhaustive
@pytest.mark.skipif(sys.platform == "win32", reason="signals are others there")
def test_what_is_interrupted_says_so_and_is_resumed(tmp_path, finished):
    (tmp_path / "small.toml").write_text(SMALL.replace("seeds = 2", "seeds = 20"))
    out = tmp_path / "out"
    process = program("run", str(tmp_path / "small.toml"), "--out", str(out), "--workers", "1")
    deadline = time.monotonic() + patience(20)
    while sum(path.read_bytes().count(b'{"run"') for path in out.glob("*.jsonl")) < 3:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # what Ctrl-C does
    output, errors = process.communicate(timeout=patience(10))
    assert process.returncode == 130
    assert "runs stored" in errors
    assert "resume" in errors
    assert "Traceback" not in output + errors
    done = int(errors.split(" with ")[1].split()[0])
    assert 3 <= done < 44
    assert len(Store(out).runs) >= done
    assert f"{len(Store(out).runs)}/44" in said("list", str(out))
    process = program("resume", str(out), "--workers", "1")
    output, errors = process.communicate(timeout=patience(30))
    assert (process.returncode, errors) == (0, "")
    assert len(Store(out).runs) == 44


def test_an_unfinished_study_has_a_report_too(tmp_path):
    (tmp_path / "small.toml").write_text(SMALL)
    study = toml.read(tmp_path / "small.toml")
    store = Store(tmp_path / "out")
    store.begin(study, here(study.tasks))
    store.close()
    assert "Not finished" in said("report", str(tmp_path / "out"))


def test_studies_whose_arms_have_other_names_are_compared_by_task(tmp_path):
    for name in ("one", "two"):
        text = SMALL.replace('"AdamW"', '"Adam p=2"') if name == "two" else SMALL
        (tmp_path / "small.toml").write_text(text)
        store = Store(tmp_path / name)
        study = toml.read(tmp_path / "small.toml")
        store.begin(study, here(study.tasks))
        store.close()
    folders = (str(tmp_path / "one"), str(tmp_path / "two"), "--out", str(tmp_path / "out"))
    for names in ("Adam p=2=AdamW", "AdamW=Adam p=2"):
        said("compare", *folders, "--rename", names)
        page = (tmp_path / "out" / "compare.md").read_text(encoding="utf-8")
        assert names.replace("Adam p=2=AdamW", "AdamW").replace("AdamW=", "") in page
        assert "left out" not in page
    assert "no study has an arm OLD" in said("compare", *folders, "--rename", "Lion=AdamW", code=2)
    assert "occurs twice" in said("compare", *folders, "--rename", "SGD=AdamW", code=2)


def test_other_versions_in_one_study_are_said(tmp_path):
    (tmp_path / "small.toml").write_text(SMALL)
    study = toml.read(tmp_path / "small.toml")
    store = Store(tmp_path / "out")
    store.begin(study, here(study.tasks))
    assert "more than one version" not in said("report", str(tmp_path / "out"))
    store.note(here(study.tasks).model_copy(update={"torch": "9.9", "normopt": "8.8"}))
    store.close()
    output = said("report", str(tmp_path / "out"))
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    for text in (output, page):
        assert f"torch {torch.__version__} and 9.9" in text
        assert " and 8.8" in text


def test_what_the_disk_refuses_is_a_sentence_and_has_an_exit_code_of_its_own(tmp_path, monkeypatch):
    (tmp_path / "small.toml").write_text(SMALL)
    filled(tmp_path / "damaged").compact()
    path = tmp_path / "damaged" / PARQUET
    path.write_bytes(path.read_bytes()[:-9])
    (tmp_path / "file").write_text("")
    command = ("run", str(tmp_path / "small.toml"), "--workers", "1", "--out")
    for arguments in (("report", str(tmp_path / "damaged")), (*command, str(tmp_path / "file" / "out"))):
        output = said(*arguments, code=3)
        assert output.startswith("Error: ")
        assert len(output.splitlines()) == 1
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    output = said(*command, str(tmp_path / "out"), code=3)
    assert output.splitlines()[-1].startswith("Error: [Errno 28] No space left on device; what is stored is safe: ")


@pytest.mark.exhaustive
@pytest.mark.skipif(sys.platform == "win32", reason="there is no kill −9")
def test_an_optimizer_that_is_edited_before_a_study_goes_on_is_refused(tmp_path, finished):
    out, edited = tmp_path / "out", tmp_path / "mine_of_test.py"
    shutil.copytree(finished / "out", out)
    edited.write_text((finished / "mine_of_test.py").read_text() + "# edited\n")
    process = program("resume", str(out), env=os.environ | {"PYTHONPATH": str(tmp_path)})
    _, errors = process.communicate(timeout=patience(30))
    assert process.returncode == 2
    assert "other code of the optimizer 'mine_of_test:Mine'" in errors


@pytest.mark.exhaustive
def test_failures_are_named_and_are_the_exit_code(tmp_path, monkeypatch):
    (tmp_path / "broken_of_test.py").write_text(
        "import torch\nclass Broken(torch.optim.SGD):\n    def step(self): raise RuntimeError('no step today')\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    out = tmp_path / "out"
    study = ("--task", "digits", "--arm", "sgd lr=0.1", "--optimizer", "broken_of_test:Broken")
    less = ("--trials", "1", "--seeds", "2", "--budget", "0.1", "--workers", "1")
    process = program("run", *study, *less, "--out", str(out))
    output, errors = process.communicate(timeout=patience(30))
    assert process.returncode == 1
    assert "3 runs failed:" in errors
    assert "broken_of_test:Broken on digits, seed 1000" in errors
    assert "RuntimeError: no step today" in errors
    assert "3 failed" in output
    assert len(Store(out).runs) == 2


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["run", "quik"], "there is no preset 'quik'; did you mean 'quick'"),
        (["run"], "say what to run: a preset, a file.toml"),
        (["run", "none.toml"], "none.toml cannot be read"),
        (["run", "none.toml", "--seeds", "3"], "none.toml cannot be read"),
        (["run", "smoke", "--baseline", "none"], "the baseline 'none' is none of the arms"),
        (["run", "smoke", "--cluster", "tcp://here:1"], "dask://HOST:PORT"),
        (["run", "--task", "cifar10-resnet18", "--arm", "sgd"], "cifar-10-batches-py"),
        (["resume", "none"], "holds no study"),
        (["report", "none"], "no study"),
        (["report", "none.parquet"], "there is no file"),
        (["compare", "one"], "two folders or more"),
    ],
)
def test_what_cannot_be_is_said_in_a_sentence(tmp_path, monkeypatch, arguments, text):
    monkeypatch.chdir(tmp_path)
    output = said(*arguments, code=2)
    assert output.startswith("Error: ")
    assert text in output
    assert len(output.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_another_study_in_the_folder_is_refused_before_anything_runs(tmp_path):
    filled(tmp_path).close()
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert "another folder with --out" in said("run", "smoke", "--out", str(tmp_path), code=2)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_data_that_are_damaged_are_said_in_a_sentence_with_the_disks_exit_code(tmp_path, monkeypatch):
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    for file in fashion._FILES:
        path = tmp_path / "FashionMNIST/raw" / f"{file}-ubyte"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"cut off")
    output = said("run", "--task", "fashion-cnn", "--arm", "sgd", "--out", str(tmp_path / "out"), code=3)
    assert len(output.splitlines()) == 1
    assert "train-images-idx3-ubyte is damaged" in output
    assert not (tmp_path / "out").exists()


def test_there_are_as_many_workers_as_gpus_if_a_task_uses_one_and_else_as_cpus(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    study = PRESETS["smoke"]
    task = TASKS[study.tasks[1]]
    on_gpu = replace(task.load(), device="cuda")
    assert cli._processes(study) == 16
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert cli._processes(study) == 16
    monkeypatch.setattr(task, "load", lambda: on_gpu, raising=False)
    assert cli._processes(study) == 3


def test_the_names_of_everything_are_listed():
    output = said("list")
    for name in ("smoke", "standard", "digits", "quadratic", "lpsgdm", "adamw", "my_module:MyOptimizer"):
        assert name in output


def test_a_dry_run_counts_the_runs_and_times_them_and_stores_nothing(tmp_path):
    (tmp_path / "small.toml").write_text(SMALL)
    output = said("run", str(tmp_path / "small.toml"), "--dry-run", "--out", str(tmp_path / "out"), "--workers", "3")
    # On a busy machine a probe is given up, and the time is a lower bound.
    assert re.search(r"8 runs, 8 of them to be made: (about|at least) \d+:\d\d", output)
    assert "on 3 workers." in output
    rows = [line.split() for line in output.splitlines() if line.strip().startswith("digits")]
    assert [row[:5] for row in rows] == [["digits", arm, "2", "4", "4"] for arm in ("SGD", "AdamW")]
    assert not (tmp_path / "out").exists()


def test_an_estimate_takes_what_is_stored_and_probes_the_rest(tmp_path, monkeypatch):
    monkeypatch.setenv("MINI_SECONDS", "0.05")
    bad = (
        Arm(name="bad", optimizer="lion", settings={"lr": 0.1, "raise": True}),
        Arm(name="killer", optimizer="signum", settings={"lr": 0.1, "die": True}),
    )
    study = Study.model_validate(STUDY.model_dump() | {"tasks": ("mini",), "arms": [*STUDY.arms, *bad]})
    store = filled(tmp_path)  # five runs of sgd, 0.01 seconds each
    of = estimate(study, store, run=mini.run, patience=30)
    sgd = pytest.approx(sum(r.seconds for r in store.runs.values()) / 5)
    epochs = TASKS["mini"].epochs
    assert {arm: of.seconds.get(("mini", arm)) for arm in ("A", "A again", "fixed")} == dict.fromkeys(
        ("A", "A again", "fixed"), sgd
    )
    assert of.seconds["mini", "B"] == pytest.approx(epochs * 0.05)
    assert set(of.failed) == {("mini", "bad"), ("mini", "killer")}
    assert "told to raise" in of.failed["mini", "bad"]
    assert of.missing["mini", "B"] == 9
    assert of.missing["mini", "A"] == 9 - 2  # two trials are told
    console = Console(width=120, record=True, file=io.StringIO())
    listing.estimated(console, of, 1)
    assert "at least" in console.export_text()
    study = Study.model_validate(study.model_dump() | {"arms": STUDY.arms})
    slow = estimate(study, Store(tmp_path / "no"), run=mini.run, patience=0.001)
    assert slow.slow == {("mini", arm.name) for arm in STUDY.arms}


def test_the_doctor_finds_what_is_here_and_what_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "TASKS", {name: TASKS[name] for name in ("digits", "imagenet-resnet50")})
    checks = {check.what: check for check in doctor.examine(tmp_path / "new" / "folder", "dask://127.0.0.1:9x")}
    assert f"torch {torch.__version__}" in checks["versions"].found
    assert checks["data of digits"].good
    assert not checks["data of imagenet-resnet50"].good
    assert not checks["data of imagenet-resnet50"].fatal
    assert checks[f"folder {tmp_path / 'new' / 'folder'}"].good
    assert not (tmp_path / "new").exists()
    assert checks["cluster dask://127.0.0.1:9x"].fatal
    monkeypatch.setattr(doctor, "PACKAGES", ("torch", "no-such-package"))
    assert "missing: no-such-package" in said("doctor", str(tmp_path), code=1)


def test_make_demo_and_the_readme_call_commands_that_are_there():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    calls = [line.split("-m benchmarks ")[1].split() for line in makefile.splitlines() if "-m benchmarks " in line]
    assert calls
    names = {command.name or command.callback.__name__ for command in app.registered_commands if command.callback}
    assert {call[0] for call in calls} <= names
