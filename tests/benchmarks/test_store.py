from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest

from benchmarks import phases
from benchmarks.presets import SMOKE
from benchmarks.spec import Study
from benchmarks.store import FILE, Store, UnfitStore
from benchmarks.study import environment, execute
from benchmarks.training import RunRecord

ROOT = Path(__file__).parents[2]


def lines(folder: Path) -> list[str]:
    return (folder / FILE).read_text(encoding="utf-8").splitlines()


def run_ids(folder: Path) -> list[str]:
    return [line["run"]["id"] for line in map(json.loads, lines(folder)) if "run" in line]


@pytest.fixture
def records(finished: Path) -> list[RunRecord]:
    return list(Store(finished).runs.values())


def test_what_is_stored_is_read_again(tmp_path, records):
    store = Store(tmp_path)
    store.begin(SMOKE, environment(SMOKE))
    for record in records[:3]:
        store.add(record)
        store.add(record)  # a second time changes nothing
    again = Store(tmp_path)
    assert again.study == SMOKE
    assert again.environments == [environment(SMOKE)]
    assert again.runs == {record.id: record for record in records[:3]}
    again.begin(SMOKE, environment(SMOKE))
    assert len(lines(tmp_path)) == 1 + 1 + 3


@pytest.mark.parametrize("cut", [1, 2, 100, -1])
def test_a_line_cut_off_is_skipped_and_the_next_does_not_grow_out_of_it(tmp_path, records, cut):
    store = Store(tmp_path)
    store.begin(SMOKE, environment(SMOKE))
    for record in records[:3]:
        store.add(record)
    path = tmp_path / FILE
    whole = path.read_bytes()
    last = whole.splitlines(keepends=True)[-1]
    path.write_bytes(whole[: -len(last)] + last[:cut])
    broken = path.read_bytes()

    with pytest.warns(UserWarning, match="cut off"):
        store = Store(tmp_path)
    assert path.read_bytes() == broken  # opening changes nothing
    assert list(store.runs) == [record.id for record in records[:2]]
    for record in records[2:4]:
        store.add(record)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert list(Store(tmp_path).runs) == [record.id for record in records[:4]]
    assert path.read_bytes().startswith(whole)


def test_a_line_that_cannot_be_read_is_skipped_with_its_number(tmp_path, records):
    store = Store(tmp_path)
    store.begin(SMOKE, environment(SMOKE))
    store.add(records[0])
    with (tmp_path / FILE).open("a") as file:
        file.write('{"run": {"id": 3}}\nnonsense\n{"what": 1}\n[]\n')
    with pytest.warns(UserWarning, match="is skipped") as told:
        store = Store(tmp_path)
    assert [f"line {n} " in str(w.message) for n, w in zip((4, 5, 6, 7), told, strict=True)] == [True] * 4
    store.add(records[1])
    with pytest.warns(UserWarning, match="is skipped"):
        assert list(Store(tmp_path).runs) == [records[0].id, records[1].id]


def test_two_studies_do_not_mix(tmp_path):
    Store(tmp_path).begin(SMOKE, environment(SMOKE))
    other = Study.model_validate(SMOKE.model_dump() | {"epochs": 3})
    with pytest.raises(UnfitStore, match="--out"):
        Store(tmp_path).begin(other, environment(other))


def test_runs_on_other_data_do_not_mix(tmp_path):
    here = environment(SMOKE)
    Store(tmp_path).begin(SMOKE, here)
    Store(tmp_path).begin(SMOKE, here.model_copy(update={"torch": "another"}))
    with pytest.raises(UnfitStore, match="on other data"):
        Store(tmp_path).begin(SMOKE, here.model_copy(update={"data": "of another Python"}))


def test_a_finished_study_runs_nothing_again(finished):
    before = lines(finished)
    told: list[int] = []
    execute(SMOKE, Store(finished), workers=2, advance=lambda phase, n: told.append(n))
    assert lines(finished) == before
    assert sum(told) == phases.count(SMOKE) == len(run_ids(finished)) == len(set(run_ids(finished)))


def test_a_killed_study_goes_on_and_ends_with_every_run_once(tmp_path, finished):
    command = [sys.executable, "-m", "benchmarks", "ablate", "--preset", "smoke"]
    command += ["--out", str(tmp_path), "--workers", "1"]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / FILE).exists() or len(lines(tmp_path)) < 2 + 3:
            assert process.poll() is None, "the study ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    survived = run_ids(tmp_path)
    assert 3 <= len(survived) < phases.count(SMOKE)
    with (tmp_path / FILE).open("a") as file:
        file.write('{"run":{"id":"half')  # as if the kill had come in the middle of a write

    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert re.fullmatch(r"Warning: \S+runs\.jsonl: the last line was cut off; its run is made again\n", done.stderr)
    ids = run_ids(tmp_path)
    assert ids[: len(survived)] == survived
    assert len(ids) == len(set(ids)) == phases.count(SMOKE)
    assert set(ids) == set(run_ids(finished))
    assert (tmp_path / "report.html").exists()
