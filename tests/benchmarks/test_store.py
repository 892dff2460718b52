from __future__ import annotations

import errno
import itertools
import json
import math
import threading
import warnings
from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks import parquet
from benchmarks.environment import Environment, here, mixed, own_optimizers
from benchmarks.store import PARQUET, Damaged, Failure, Store, UnfitStore
from benchmarks.study.lanes import Trial
from benchmarks.study.record import RunRecord
from benchmarks.study.spec import PSchedule, RunSpec, Study
from tests.benchmarks.study.mini import STUDY, run

HERE = here(STUDY.tasks)


def records(n: int, first: int = 0) -> list[RunRecord]:
    settings = [
        {"lr": 0.1},
        {"lr": 1e-3, "p": "inf", "agr": True, "momentum": 0},
        {"lr": 1.0, "p": 3, "decay": None},  # diverges
        {"lr": 0.25, "p": 3.0, "nesterov": False},
    ]
    schedules = [None, PSchedule(kind="cosine", space="exponent")]
    return [
        run(
            RunSpec(
                task="mini",
                optimizer="sgd",
                settings=settings[i % 4],
                p_schedule=schedules[i % 2],
                seed=i,
                epochs=3,
                batch_size=8,
            )
        )
        for i in range(first, first + n)
    ]


def trial(number: int, loss: float = 0.5) -> Trial:
    return Trial(number=number, settings={"lr": 0.1 / (number + 1)}, loss=loss, run_ids=(f"run {number}",))


def failure(seed: int) -> Failure:
    spec = RunSpec(task="mini", optimizer="adamw", settings={"lr": 0.1}, seed=seed, epochs=1, batch_size=8)
    return Failure(id=spec.run_id, spec=spec, error="RuntimeError: no", traceback="Traceback …\n  in run\n")


def filled(folder: Path, n: int = 5) -> Store:
    store = Store(folder)
    store.begin(STUDY, HERE)
    for record in records(n):
        store.add(record)
        store.add(record)  # a second time changes nothing
    store.add_trial("mini", "A", trial(0))
    store.add_trial("mini", "A", trial(1, math.inf))
    store.add_trial("mini", "A", trial(1, 0.25))  # this number is told
    store.add_failure(failure(7))
    return store


def content(store: Store) -> dict[str, object]:
    return {
        "study": store.study,
        "environments": store.environments,
        "runs": store.runs,
        "trials": store.trials,
        "failures": store.failures,
        "losses": store.losses,
    }


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("runs-*.jsonl"))


def test_what_is_stored_is_read_again(tmp_path):
    store = filled(tmp_path)
    assert len(files(tmp_path)) == 1
    assert len(files(tmp_path)[0].read_text().splitlines()) == 1 + 1 + 5 + 2 + 1
    again = Store(tmp_path)
    assert content(again) == content(store)
    assert again.study == STUDY
    assert again.environments == [HERE]
    assert list(again.runs.values()) == records(5)
    assert again.trials == {("mini", "A"): [trial(0), trial(1, math.inf)]}
    assert again.failures == {failure(7).id: failure(7)}
    assert again.losses[records(3)[2].id] == math.inf == again.losses[failure(7).id]
    assert again.losses[records(1)[0].id] == records(1)[0].curve[-1].validation_loss
    again.begin(STUDY, HERE)
    assert len(files(tmp_path)) == 1  # nothing was to be said


def test_opening_an_empty_or_absent_folder_makes_nothing(tmp_path):
    store = Store(tmp_path / "nothing")
    assert (store.study, store.runs, store.trials) == (None, {}, {})
    assert not (tmp_path / "nothing").exists()
    assert not Store.begun(tmp_path)
    assert store.changed == 0


@pytest.mark.parametrize("cut", [1, 2, 100, -1])
def test_a_line_cut_off_is_skipped_with_a_warning_and_nothing_grows_out_of_it(tmp_path, cut):
    filled(tmp_path, 3).close()
    path = files(tmp_path)[0]
    whole = path.read_bytes()
    last = whole.splitlines(keepends=True)[-1]
    path.write_bytes(whole[: -len(last)] + last[:cut])
    broken = path.read_bytes()
    with pytest.warns(UserWarning, match="the last line was cut off"):
        store = Store(tmp_path)
    assert path.read_bytes() == broken  # opening changes nothing
    assert store.failures == {}
    assert len(store.runs) == 3
    store.add(records(4)[3])
    assert path.read_bytes() == broken  # and writing goes to a file of its own
    with pytest.warns(UserWarning, match="cut off"):
        assert list(Store(tmp_path).runs) == [record.id for record in records(4)]


def test_the_line_that_another_program_is_writing_is_not_warned_of(tmp_path):
    writer = filled(tmp_path, 2)
    with files(tmp_path)[0].open("a") as file:
        file.write('{"run":{"id":"ha')
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reader = Store(tmp_path)
    writer.close()
    with files(tmp_path)[0].open("a") as file:
        file.write('lf"}}\n')
    with pytest.warns(UserWarning, match="is skipped"):
        reader.refresh()


def test_a_line_that_cannot_be_read_is_skipped_with_its_number_and_its_file_is_kept(tmp_path):
    filled(tmp_path, 1).close()
    path = files(tmp_path)[0]
    with path.open("a") as file:
        file.write('{"run": {"id": 3}}\nnonsense\n{"what": 1}\n[]\n{"claim": 3}\n')
    with pytest.warns(UserWarning, match="is skipped") as told:
        store = Store(tmp_path)
    numbers = (7, 8, 9, 10, 11)
    assert [f"line {n} " in str(w.message) for n, w in zip(numbers, told, strict=True)] == [True] * 5
    assert len(store.runs) == 1
    store.compact()
    assert files(tmp_path) == [path]


def test_a_line_that_was_damaged_but_is_an_object_still_is_skipped(tmp_path):
    filled(tmp_path, 1).close()
    path = files(tmp_path)[0]
    whole = path.read_bytes()
    at = whole.index(b'"test_loss":') + len(b'"test_loss":')
    path.write_bytes(whole[:at] + (b"9" if whole[at : at + 1] != b"9" else b"8") + whole[at + 1 :])
    with pytest.warns(UserWarning, match="its checksum is another"):
        store = Store(tmp_path)
    assert store.runs == {}


def test_lines_from_before_there_were_checksums_are_read(tmp_path):
    before = content(filled(tmp_path))
    path = files(tmp_path)[0]
    old = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert all(line.pop("crc") for line in old)
    path.write_text("".join(json.dumps(line) + "\n" for line in old))
    assert content(Store(tmp_path)) == before


def test_two_studies_do_not_mix(tmp_path):
    filled(tmp_path)
    other = Study.model_validate(STUDY.model_dump() | {"budget": 2.0})
    with pytest.raises(UnfitStore, match="another folder with --out"):
        Store(tmp_path).begin(other, HERE)
    assert len(files(tmp_path)) == 1


def test_runs_on_other_data_do_not_mix_but_those_of_other_versions_do(tmp_path):
    filled(tmp_path).close()
    newer = HERE.model_copy(update={"torch": "another"})
    store = Store(tmp_path)
    store.begin(STUDY, newer)
    assert store.environments == [HERE, newer]
    other = HERE.model_copy(update={"data": {"mini": "of another Python"}})
    with pytest.raises(UnfitStore, match="other data of the task 'mini'"):
        store.note(other)
    with pytest.raises(UnfitStore, match="other data"):
        Store(tmp_path).begin(STUDY, other)
    # Of a task that only one of them looked at, nothing is known to differ.
    store.note(Environment.model_validate(HERE.model_dump() | {"data": {}}))


def test_runs_of_an_edited_optimizer_do_not_mix(tmp_path):
    mine = HERE.model_copy(update={"code": {"my_module:Mine": "a"}})
    filled(tmp_path).note(mine)
    store = Store(tmp_path)
    with pytest.raises(UnfitStore, match="other code of the optimizer 'my_module:Mine'"):
        store.begin(STUDY, HERE.model_copy(update={"code": {"my_module:Mine": "b"}}))
    store.begin(STUDY, mine)


def test_the_code_of_an_optimizer_is_its_module_and_what_it_imports_nearby(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "hashed_package").mkdir()
    texts = {
        "hashed_helper.py": "x = 1\n",
        "hashed_module.py": "import torch, hashed_helper\nclass Mine(torch.optim.SGD): pass\n",
        "hashed_package/__init__.py": "",
        "hashed_package/part.py": "y = 1\n",
        "hashed_package/mine.py": "import torch\nfrom .part import y\nclass Mine(torch.optim.SGD): pass\n",
        "unrelated.py": "",
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    names = ("hashed_module:Mine", "hashed_package.mine:Mine", "torch.optim:SGD")
    here.cache_clear()
    seen = [here((), names).code]
    assert set(seen[0]) == set(names)
    for name in ("unrelated.py", "hashed_helper.py", "hashed_module.py", "hashed_package/part.py"):
        (tmp_path / name).write_text(texts[name] + "# edited\n")
        here.cache_clear()
        seen.append(here((), names).code)
    changed = [[name.partition(":")[0] for name in names if a[name] != b[name]] for a, b in itertools.pairwise(seen)]
    assert changed == [[], ["hashed_module"], ["hashed_module"], ["hashed_package.mine"]]
    assert own_optimizers(STUDY) == ()


def test_versions_that_differ_are_named():
    assert mixed([HERE, HERE]) == []
    assert mixed([HERE, HERE.model_copy(update={"torch": "9.9"})]) == [f"torch {HERE.torch} and 9.9"]


def test_parquet_gives_back_what_was_stored(tmp_path):
    store = filled(tmp_path)
    before = content(store)
    path = store.compact()
    assert [file.name for file in sorted(tmp_path.iterdir())] == [".lock", PARQUET]
    for again in (Store(tmp_path), Store.from_parquet(path)):
        assert content(again) == before
        # 3 and 3.0 are equal, but two settings with two names.
        assert [record.spec.run_id for record in again.runs.values()] == list(again.runs)
        assert [record.model_dump_json() for record in again.runs.values()] == [
            record.model_dump_json() for record in store.runs.values()
        ]
    moved = tmp_path / "committed.parquet"
    path.rename(moved)
    assert content(Store.from_parquet(moved)) == before


def test_what_comes_after_a_compaction_is_merged_and_compacted_in_turn(tmp_path):
    store = filled(tmp_path)
    store.compact()
    store.add_trial("mini", "A", trial(2))
    for record in records(3, first=5):
        store.add(record)
    assert len(files(tmp_path)) == 1
    assert content(Store(tmp_path)) == content(store)
    again = Store(tmp_path)
    again.add(records(9)[8])
    store.close()
    again.compact()
    assert files(tmp_path) == []
    assert set(Store(tmp_path).runs) == {record.id for record in records(9)}
    before = (tmp_path / PARQUET).read_bytes()
    Store(tmp_path).compact()
    assert (tmp_path / PARQUET).read_bytes() == before


def test_the_parquet_file_can_be_asked_by_its_columns(tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    path = filled(tmp_path).compact()
    table = pq.read_table(path, filters=[("optimizer", "=", "sgd"), ("diverged", "=", False)])
    rows = table.to_pylist(maps_as_pydicts="strict")
    expected = [record for record in records(5) if not record.diverged]
    assert [row["seed"] for row in rows] == [record.spec.seed for record in expected]
    assert [json.loads(row["settings"]) for row in rows] == [record.spec.settings for record in expected]
    assert [row["validation_loss"] for row in rows] == [record.last_loss for record in expected]
    assert [row["measures"] for row in rows] == [record.measures for record in expected]
    assert rows[0]["curve"][0] == asdict(expected[0].curve[0])
    schema = {field.name: str(field.type) for field in table.schema}
    assert schema["measures"].startswith("map<string, double")
    assert schema["curve"].startswith("list<element: struct<steps: int64, train_loss: double")


def test_a_program_that_still_writes_keeps_its_file_and_loses_nothing(tmp_path):
    alive, other = Store(tmp_path), Store(tmp_path)
    alive.begin(STUDY, HERE)
    alive.add(records(1)[0])
    other.refresh()
    other.add(records(2)[1])
    other.compact()
    assert len(files(tmp_path)) == 1  # the living one's
    alive.add(records(3)[2])
    assert list(Store(tmp_path).runs) == [records(3)[i].id for i in (0, 2, 1)]
    alive.refresh()
    assert set(alive.runs) == {record.id for record in records(3)}
    alive.compact()
    assert files(tmp_path) == []
    assert set(Store(tmp_path).runs) == {record.id for record in records(3)}


def test_a_compaction_that_is_cut_short_leaves_all_as_it_was(tmp_path, monkeypatch):
    store = filled(tmp_path)
    before = content(store)
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError("the disk is full")))
    with pytest.raises(OSError, match="full"):
        store.compact()
    monkeypatch.undo()
    assert len(files(tmp_path)) == 1
    assert content(Store(tmp_path)) == before
    assert [path.name for path in tmp_path.iterdir() if path.suffix not in (".jsonl", "")] == []


def test_the_lines_are_kept_until_the_parquet_file_has_been_read_back(tmp_path, monkeypatch):
    store = filled(tmp_path)
    store.compact()
    for record in records(8)[5:]:
        store.add(record)
    before, whole = content(store), (tmp_path / PARQUET).read_bytes()
    write = parquet.write

    def less(file, runs, others):
        write(file, list(runs)[:-1], others)

    def spoilt(file, runs, others):
        write(file, runs, others)
        file.seek(200)
        file.write(b"spoilt")

    for bad in (less, spoilt):
        monkeypatch.setattr(parquet, "write", bad)
        with pytest.raises(OSError, match=r"read back|damaged"):
            store.compact()
        assert len(files(tmp_path)) == 1
        assert (tmp_path / PARQUET).read_bytes() == whole
        assert content(Store(tmp_path)) == before
    monkeypatch.undo()
    store.compact()
    assert files(tmp_path) == []
    assert content(Store(tmp_path)) == before


def test_runs_are_written_and_read_some_at_a_time(tmp_path, monkeypatch):
    pq = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(parquet, "AT_ONCE", 2)
    path = filled(tmp_path, 5).compact()
    assert pq.ParquetFile(path).num_row_groups == 3
    chunks: list[int] = []
    curves = parquet._curves
    monkeypatch.setattr(parquet, "_curves", lambda column: (chunks.append(len(column)), curves(column))[1])
    _, runs = parquet.read(path)
    found = [next(runs)]
    assert chunks == [2]
    found += runs
    assert chunks == [2, 2, 1]
    assert [RunRecord.model_validate(run) for run in found] == records(5)


def test_a_damaged_parquet_file_is_said_to_be_one(tmp_path):
    store = filled(tmp_path)
    path = store.compact()
    before, whole = content(store), path.read_bytes()
    said: list[str] = []
    for at in range(0, len(whole) - 8, len(whole) // 40):
        path.write_bytes(whole[:at] + bytes(byte ^ 0xFF for byte in whole[at : at + 8]) + whole[at + 8 :])
        try:
            # Of the statistics of columns, and the names of who wrote it, no use is made.
            assert content(Store(tmp_path)) == before
        except Damaged as error:
            said.append(str(error))
    assert len(said) > 20
    assert all("damaged" in text and len(text.splitlines()) == 1 for text in said)


def test_a_full_disk_is_an_error_at_once_and_what_was_stored_is_there(tmp_path, monkeypatch):
    store = filled(tmp_path, 2)
    path = files(tmp_path)[0]
    size = path.stat().st_size

    class Full:
        """Takes some bytes of a line, and then has no room."""

        def __init__(self, file):
            self.file, self.room = file, 50
            self.name, self.close, self.fileno = file.name, file.close, file.fileno

        def write(self, data):
            if not self.room:
                raise OSError(errno.ENOSPC, "No space left on device")
            taken, self.room = self.file.write(data[: self.room]), 0
            return taken

    store._own = Full(store._own)
    with pytest.raises(OSError, match="No space left"):
        store.add(records(3)[2])
    store.close()
    assert path.stat().st_size == size + 50
    with pytest.warns(UserWarning, match="cut off"):
        again = Store(tmp_path)
    assert list(again.runs) == [record.id for record in records(2)]


def test_a_file_that_is_no_store_is_refused(tmp_path):
    with pytest.raises(UnfitStore, match="there is no file"):
        Store.from_parquet(tmp_path / "nothing.parquet")
    path = tmp_path / PARQUET
    path.write_bytes(b"nonsense")
    with pytest.raises(UnfitStore, match="no Parquet file"):
        Store(tmp_path)
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"a": [1]}), path)
    with pytest.raises(UnfitStore, match="holds no runs"):
        Store.from_parquet(path)


def test_a_claim_holds_as_long_as_its_program_lives_or_the_run_is_there(tmp_path):
    one, two = Store(tmp_path), Store(tmp_path)
    first, second = records(2)
    one.claim(first.id)
    one.claim(second.id)
    assert two.refresh() == {first.id, second.id}
    assert one.refresh() == set()  # its own
    one.add(first)
    assert two.refresh() == {second.id}
    one.close()
    assert two.refresh() == set()
    assert Store(tmp_path).refresh() == set()


def test_a_failure_gives_way_to_a_record(tmp_path):
    store = Store(tmp_path)
    record = records(1)[0]
    store.add_failure(Failure(id=record.id, spec=record.spec, error="its worker died"))
    store.add(record)
    assert store.failures == Store(tmp_path).failures == {}
    assert Store(tmp_path).losses == {record.id: record.last_loss}


def test_trials_end_where_one_is_missing(tmp_path):
    store = Store(tmp_path)
    for number in (0, 1, 3):
        store.add_trial("mini", "A", trial(number))
    assert Store(tmp_path).trials == {("mini", "A"): [trial(0), trial(1)]}
    store.add_trial("mini", "A", trial(2))
    assert Store(tmp_path).trials == {("mini", "A"): [trial(n) for n in range(4)]}


def test_a_program_that_writes_its_last_lines_meanwhile_cut_none_off(tmp_path, monkeypatch):
    """Between reading its file and asking whether it still lives."""
    filled(tmp_path).close()
    (file,) = tmp_path.glob("*.jsonl")
    *before, last = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(before) + last[:20])

    def ends(path):
        file.write_bytes(b"".join(before) + last)
        return False

    monkeypatch.setattr("benchmarks.store.held", ends)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store = Store(tmp_path)
        store.refresh()
    assert set(store.runs) == {record.id for record in records(5)}


def test_many_programs_write_to_one_folder_at_once(tmp_path):
    def write(first: int) -> None:
        store = Store(tmp_path)
        store.begin(STUDY, HERE)
        for record in records(12, first):
            store.add(record)
        store.close()
        store.compact()

    threads = [threading.Thread(target=write, args=(first,)) for first in (0, 6, 12, 18)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store = Store(tmp_path)
    assert set(store.runs) == {record.id for record in records(30)}
    store.compact()
    assert files(tmp_path) == []
    assert set(Store(tmp_path).runs) == {record.id for record in records(30)}
