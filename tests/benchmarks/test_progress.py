from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks.presets import SMOKE
from benchmarks.progress import Lines, progress
from benchmarks.spec import Study
from benchmarks.store import FILE, Store
from benchmarks.study import environment
from tests.benchmarks.test_store import ROOT


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def log() -> Console:
    return Console(file=io.StringIO(), width=40)


def printed(log: Console) -> list[str]:
    assert isinstance(log.file, io.StringIO)
    return log.file.getvalue().splitlines()


def test_a_log_has_a_line_every_tenth_with_the_time_left(log):
    clock = Clock()
    advance = Lines(log, 40, clock)
    advance("tuning", 0)
    for _ in range(40):
        clock.now += 6
        advance("tuning", 1)
    lines = printed(log)
    assert lines[:2] == ["  0 %: 0 of 40 runs (tuning)", " 10 %: 4 of 40 runs (tuning), about 3:36 left"]
    assert [line[:5] for line in lines] == [f"{percent:3} %" for percent in range(0, 101, 10)]
    assert lines[-1] == "100 %: 40 of 40 runs (tuning)"


def test_runs_that_were_found_say_nothing_of_the_time_left(log):
    clock = Clock()
    advance = Lines(log, 20, clock)
    advance("tuning", 10)
    clock.now += 10
    advance("tuning", 1)
    advance("final runs", 0)
    clock.now += 10
    advance("final runs", 1)
    assert printed(log) == [" 50 %: 10 of 20 runs (tuning)", " 60 %: 12 of 20 runs (final runs), about 1:20 left"]


def test_a_terminal_has_a_bar():
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with progress(console, 4) as advance:
        advance("tuning", 4)
    assert "4/4" in "".join(printed(console))


def test_a_store_that_is_refused_shows_no_progress(tmp_path: Path):
    other = Study.model_validate(SMOKE.model_dump() | {"epochs": 3})
    Store(tmp_path).begin(other, environment(other))
    before = (tmp_path / FILE).read_bytes()
    command = [sys.executable, "-m", "benchmarks", "ablate", "--preset", "smoke", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "another folder with --out" in " ".join(done.stderr.replace("│", " ").split())
    assert (tmp_path / FILE).read_bytes() == before
