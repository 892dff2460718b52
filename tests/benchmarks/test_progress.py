from __future__ import annotations

import io

import pytest
from rich.console import Console

from benchmarks.progress import Log, _Shown, clock_time, counting, dashboard
from benchmarks.study.pace import Pace, Status, time_left
from tests.benchmarks.test_store import records


@pytest.fixture
def log() -> Console:
    return Console(file=io.StringIO(), width=40)


def printed(log: Console) -> list[str]:
    assert isinstance(log.file, io.StringIO)
    return log.file.getvalue().splitlines()


def status(done: int, left: float | None, **more: object) -> Status:
    return Status(tasks={"digits": (done // 2, 20), "bytes": (done - done // 2, 20)}, left=left, **more)


def test_a_log_has_a_line_every_tenth_with_the_time_left_and_what_went_wrong(log):
    watch = Log(log)
    for done in range(41):
        watch(status(done, None if not done else 6.0 * (40 - done), diverged=done // 20, failed=done // 30))
    lines = printed(log)
    assert lines[:2] == ["  0 %: 0 of 40 runs", " 10 %: 4 of 40 runs, about 3:36 left"]
    assert [line[:5] for line in lines] == [f"{percent:3} %" for percent in range(0, 101, 10)]
    assert lines[5] == " 50 %: 20 of 40 runs, about 2:00 left; 1 diverged"
    assert lines[-1] == "100 %: 40 of 40 runs; 2 diverged, 1 failed"


def test_a_terminal_has_a_bar_a_task_and_what_goes_on():
    shown = _Shown()
    console = Console(file=io.StringIO(), width=80)
    console.print(shown.get_renderable())
    shown.take(status(7, 100.0, workers=2, running=["digits sgd", "digits sgd"], diverged=3))
    console.print(shown.get_renderable())
    lines = printed(console)
    assert lines[0] == "Starting …"
    assert [line.split()[0] for line in lines[1:4]] == ["digits", "bytes", "all"]
    assert [line.split()[-1] for line in lines[1:4]] == ["3/20", "4/20", "7/40"]
    assert lines[4] == "0:00 gone, about 1:40 left; 3 diverged"
    assert lines[5] == "2 workers: 2 × digits sgd"
    shown.take(status(7, 100.0))
    console.print(shown.get_renderable())
    assert printed(console)[-1] == "Waiting for workers to join."


def test_a_dashboard_draws_in_a_terminal_and_prints_in_a_log(log):
    terminal = Console(file=io.StringIO(), force_terminal=True, width=100)
    with dashboard(terminal) as watch:
        watch(status(40, 0.0, workers=1))
    assert "40/40" in "".join(printed(terminal))
    with dashboard(log) as watch:
        watch(status(40, 0.0))
    assert printed(log) == ["100 %: 40 of 40 runs"]


def test_a_program_that_only_counts_has_its_time_left_from_the_clock():
    seen: list[Status] = []
    times = iter([0.0, 10.0, 20.0, 40.0])
    advance = counting(seen.append, 4, clock=lambda: next(times))
    for n in (1, 1, 2):
        advance("transfer", n)
    assert [(s.done, s.total, s.left) for s in seen] == [(1, 4, 30.0), (2, 4, 20.0), (4, 4, 0.0)]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(7, "0:07"), (216.4, "3:36"), (7416, "2:03:36"), (93816, "1 day 2:03:36"), (176400, "2 days 1:00:00")],
)
def test_times_are_written_as_clocks_do(seconds, text):
    assert clock_time(seconds) == text


def test_the_pace_is_that_of_like_runs_and_else_of_the_nearest():
    pace = Pace()
    assert pace.seconds("mini", "sgd") is None
    pace.add("mini", "sgd", 1.0)
    pace.add("mini", "sgd", 3.0)
    pace.add("mini", "adamw", 5.0)
    pace.add("bytes", "sgd", 11.0)
    assert pace.seconds("mini", "sgd") == 2.0
    assert pace.seconds("mini", "muon") == 3.0
    assert pace.seconds("digits", "muon") == 5.0
    of_records = Pace(records(4))
    assert of_records.seconds("mini", "sgd") == pytest.approx(sum(r.seconds for r in records(4)) / 4)


def test_time_left_is_shared_by_the_workers_but_a_lane_is_one_chain():
    assert time_left([10, 10, 10, 10], 2) == 20
    assert time_left([35, 5], 2) == 35
    assert time_left([], 2) == 0
    assert time_left([10], 0) == 10
