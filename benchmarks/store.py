"""The store: a folder to which many programs can write, and in which what is written survives being killed.

Each writing program appends JSON lines to a file of its own, ``runs-HOST-PID-TIME.jsonl``, safely on disk before it
goes on. When a study is finished, `Store.compact` gathers the files in one ``runs.parquet``. Reading merges both.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import re
import socket
import tempfile
import time
import warnings
import weakref
import zlib
from collections.abc import Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import to_jsonable_python

from benchmarks import parquet
from benchmarks.environment import Environment
from benchmarks.locks import held, lock, sync
from benchmarks.study.lanes import Key, Trial
from benchmarks.study.record import RunRecord
from benchmarks.study.spec import RunSpec, Study

LINES = "runs-*.jsonl"
PLURALS = {"environments": "environment", "trials": "trial", "failures": "failure"}
PARQUET = "runs.parquet"
SEAL = len(',"crc":"00000000"}\n')


class UnfitStore(ValueError):
    """A folder of results that does not serve what is asked of it; the message says why and what to do."""


class Damaged(UnfitStore, OSError):
    """A file of results that cannot be read."""


class Failure(BaseModel):
    """A run that gave no record: it raised an exception, or its workers died again and again.

    Attributes:
        id, spec: which run.
        error: what went wrong, in a line.
        traceback: where, if it raised; else empty.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    spec: RunSpec
    error: str
    traceback: str = ""


class Told(BaseModel):
    """A trial, with the lane that it is of."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    task: str
    arm: str
    trial: Trial


class Store:
    """The results in a folder: the study they belong to, where they were made, trials, runs and failures so far.

    Opening reads and changes nothing, and the folder need not exist. Each line is one JSON object with the key
    "study", "environment", "trial", "run", "failure", or "claim" for a run that was begun, and a checksum of the rest.
    A line that cannot be read is skipped with a warning: the run that it held is simply made again. What two programs
    made twice is kept once.

    Attributes:
        folder: where.
        study: what the runs are for; None in an empty folder.
        environments: where they were made, each once.
        runs: run id → its record.
        failures: run id → what went wrong; no run of ``runs``.
        losses: run id → what the run came to, ∞ if it diverged or failed.
        fresh: the ids of what was stored, or read, since someone last emptied this list.
    """

    def __init__(self, folder: Path, *, only: Path | None = None) -> None:
        self.folder = folder
        self.study: Study | None = None
        self.environments: list[Environment] = []
        self.runs: dict[str, RunRecord] = {}
        self.failures: dict[str, Failure] = {}
        self.losses: dict[str, float] = {}
        self.fresh: list[str] = []
        self._trials: dict[Key, dict[int, Trial]] = {}
        self._own: FileIO | None = None
        self._read: dict[str, int] = {}  # file → bytes up to the end of the last whole line that was read
        self._lines: dict[str, int] = {}  # file → how many lines that are
        self._claims: dict[str, list[str]] = {}  # file → the runs that its program has begun
        self._spoilt: set[str] = set()  # files with a whole line that could not be read
        self._parquet: tuple[int, int] | None = None  # the inode and the time of the Parquet file that was read
        if only is not None:
            self._take_parquet(only)
        else:
            self.refresh()
            self._warn_of_stumps()

    @classmethod
    def from_parquet(cls, path: Path) -> Store:
        """What one Parquet file holds, wherever it lies: for committed results.

        Raises:
            UnfitStore: there is no such file, or it is none that `compact` wrote.
        """
        if not path.is_file():
            raise UnfitStore(f"there is no file {path}")
        return cls(path.parent, only=path)

    @staticmethod
    def begun(folder: Path) -> bool:
        """The folder holds results."""
        return (folder / PARQUET).is_file() or any(folder.glob(LINES))

    @property
    def changed(self) -> float:
        """When something was last written, in seconds since the epoch; 0 if nothing was."""
        files = [self.folder / PARQUET, *self.folder.glob(LINES)]
        return max((path.stat().st_mtime for path in files if path.exists()), default=0.0)

    @property
    def trials(self) -> dict[Key, list[Trial]]:
        """The trials of every task and arm in the order of their numbers, up to the first that is not there."""
        return {
            key: [found[number] for number in itertools.takewhile(found.__contains__, itertools.count())]
            for key, found in self._trials.items()
        }

    def begin(self, study: Study, environment: Environment) -> None:
        """Note the study and the environment, each once.

        Raises:
            UnfitStore: the folder holds another study, or runs on other data.
        """
        if self.study is not None and self.study != study:
            raise UnfitStore(
                f"{self.folder} holds a study with other settings (its name is {self.study.name!r}), and results of "
                "two studies do not mix: choose another folder with --out, or remove that one"
            )
        self._check(environment)
        if self.study is None:
            self._keep("study", study)
        self.note(environment)

    def note(self, environment: Environment) -> None:
        """Note where runs are made, once.

        Raises:
            UnfitStore: the data of a task are others there.
        """
        if environment not in self.environments:
            self._check(environment)
            self._keep("environment", environment)

    def add(self, record: RunRecord) -> None:
        """Store a run, safely on disk when this returns; one that is stored already is left as it is."""
        if record.id not in self.runs:
            self._keep("run", record)

    def add_failure(self, failure: Failure) -> None:
        """Store that a run failed."""
        if failure.id not in self.runs and failure.id not in self.failures:
            self._keep("failure", failure)

    def add_trial(self, task: str, arm: str, trial: Trial) -> None:
        """Store a trial; one with this number that is stored already is left as it is."""
        if trial.number not in self._trials.get((task, arm), {}):
            self._keep("trial", Told(task=task, arm=arm, trial=trial))

    def rename(self, names: Mapping[str, str]) -> None:
        """Give arms other names, here and not in the folder: for a comparison; nothing can be stored from then on.

        Raises:
            UnfitStore: two arms would have the same name.
        """
        assert self.study is not None, "there is a study"
        study = self.study.model_dump()
        study["baseline"] = names.get(self.study.baseline, self.study.baseline)
        for arm in study["arms"]:
            arm |= {key: names.get(arm[key], arm[key]) for key in ("name", "tuned_as", "against")}
        try:
            self.study = Study.model_validate(study)
        except ValidationError as error:
            raise UnfitStore(f"{self.folder}: {error.errors()[0]['msg'].removeprefix('Value error, ')}") from None
        self._trials = {(task, names.get(arm, arm)): trials for (task, arm), trials in self._trials.items()}

    def claim(self, run_id: str) -> None:
        """Tell other programs that this one begins a run: they leave it alone as long as this one lives."""
        self._append("claim", {"id": run_id}, safely=False)

    def refresh(self) -> set[str]:
        """Read what other programs have written to the folder since, and return the runs that they have in work."""
        for path in sorted(self.folder.glob(LINES)):
            # Gone since: another program has just compacted it, so that the Parquet file holds it.
            with contextlib.suppress(FileNotFoundError):
                self._take_lines(path)
        # After the lines, which are removed only when the Parquet file that holds them is in place.
        self._take_parquet(self.folder / PARQUET)
        return self._in_work()

    def compact(self) -> Path:
        """Gather everything in one Parquet file, then remove the files of lines that it wholly contains.

        Files to which a living program writes stay, and so do those with lines that cannot be read.
        """
        path = self.folder / PARQUET
        with self._alone():
            self.refresh()
            own = self._own.name if self._own is not None else None
            self.close()
            files = sorted(self.folder.glob(LINES))
            if files or not path.exists():
                self._write_parquet(path)
            for file in files:
                # In this order: a file that is let go of, and only that, has nothing more to come.
                if (str(file) == own or held(file) is False) and self._contains(file):
                    file.unlink()
        return path

    def close(self) -> None:
        """Close the file of lines; the next addition begins another."""
        if self._own is not None:
            self._own.close()
            self._own = None

    def _check(self, environment: Environment) -> None:
        for old in self.environments:
            for what, before, now in (
                ("data of the task", old.data, environment.data),
                ("code of the optimizer", old.code, environment.code),
            ):
                for name in sorted(before.keys() & now.keys()):
                    if before[name] != now[name]:
                        raise UnfitStore(
                            f"{self.folder} was begun with other {what} {name!r} than there is here now (Python "
                            f"{environment.python}): put it back as it was, to go on, or run the study in a new folder "
                            "(run … --out FOLDER)"
                        )

    def _keep(self, kind: str, content: BaseModel) -> None:
        self._append(kind, content)
        self._take({kind: content})

    def _append(self, kind: str, content: BaseModel | dict[str, str], safely: bool = True) -> None:
        if self._own is None:
            self._own = self._begin_file()
        text = json.dumps(content) if isinstance(content, dict) else content.model_dump_json()
        line = _sealed(f'{{"{kind}":{text}'.encode())
        rest = memoryview(line)
        try:
            while rest:
                rest = rest[self._own.write(rest) :]
            if safely:
                os.fsync(self._own.fileno())
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror}; what is stored is safe", self._own.name) from error
        name = Path(self._own.name).name
        self._read[name] = self._read.get(name, 0) + len(line)
        self._lines[name] = self._lines.get(name, 0) + 1

    def _begin_file(self) -> FileIO:
        self.folder.mkdir(parents=True, exist_ok=True)
        host = re.sub(r"[^A-Za-z0-9.]", "_", socket.gethostname())
        path = self.folder / f"runs-{host}-{os.getpid()}-{time.time_ns()}.jsonl"
        file = path.open("xb", buffering=0)  # what the disk does not take is an error here, and not at the end
        # For as long as this program lives, whatever ends it.
        lock(file, wait=False)
        # A store that is let go lets go of its file.
        weakref.finalize(self, file.close)
        return file

    def _in_work(self) -> set[str]:
        claimed: set[str] = set()
        for name, run_ids in self._claims.items():
            run_ids[:] = [run_id for run_id in run_ids if run_id not in self.losses]
            if run_ids and held(self.folder / name):
                claimed.update(run_ids)
        return claimed

    def _take_lines(self, path: Path) -> None:
        name = path.name
        before = self._read.get(name, 0)
        with path.open("rb") as file:
            file.seek(before)
            lines = file.read().splitlines(keepends=True)
        for line in lines:
            # A line counts once its end is written: without one, it may be a number cut in two.
            if not line.endswith(b"\n"):
                return
            self._read[name] = before = before + len(line)
            self._lines[name] = self._lines.get(name, 0) + 1
            try:
                content = _opened(line)
                if "claim" in content:
                    self._claims.setdefault(name, []).append(content["claim"]["id"])
                else:
                    self._take(content)
            except (ValueError, TypeError, KeyError) as error:
                self._spoilt.add(name)
                reason = str(error).splitlines()[0]
                _warn(f"{path}: line {self._lines[name]} is skipped, it cannot be read: {reason}")

    def _contains(self, path: Path) -> bool:
        """Every whole line of a file was read, and understood."""
        return path.name not in self._spoilt and b"\n" not in self._rest(path)

    def _rest(self, path: Path) -> bytes:
        """Return the bytes of a file that have not been read yet."""
        with path.open("rb") as file:
            file.seek(self._read.get(path.name, 0))
            return file.read()

    def _warn_of_stumps(self) -> None:
        for name in self._read:
            path = self.folder / name
            with contextlib.suppress(FileNotFoundError):
                # Asked before the rest is read: a program that has just ended may have written whole lines.
                if not held(path) and (rest := self._rest(path)) and b"\n" not in rest:
                    _warn(f"{path}: the last line was cut off; what it held is made again")

    def _take(self, line: dict[str, Any]) -> None:
        match line:
            case {"study": study}:
                self.study = self.study or Study.model_validate(study)
            case {"environment": environment}:
                found = Environment.model_validate(environment)
                if found not in self.environments:
                    self.environments.append(found)
            case {"trial": told}:
                of = Told.model_validate(told)
                self._trials.setdefault((of.task, of.arm), {}).setdefault(of.trial.number, of.trial)
            case {"run": run}:
                record = RunRecord.model_validate(run)
                if record.id not in self.runs:
                    self.runs[record.id] = record
                    self.losses[record.id] = record.last_loss
                    self.fresh.append(record.id)
                # Another program's workers lived longer.
                self.failures.pop(record.id, None)
            case {"failure": failure}:
                failed = Failure.model_validate(failure)
                if failed.id not in self.runs:
                    self.failures.setdefault(failed.id, failed)
                    self.losses[failed.id] = math.inf
                    self.fresh.append(failed.id)
            case _:
                raise ValueError("neither a study, an environment, a trial, a run nor a failure")

    def _take_parquet(self, path: Path) -> None:
        try:
            stat = path.stat()
        except FileNotFoundError:
            return
        if self._parquet != (stat.st_ino, stat.st_mtime_ns):
            try:
                others, runs = parquet.read(path)
                if others["study"] is not None:
                    self._take({"study": others["study"]})
                for plural, kind in PLURALS.items():
                    for content in others[plural]:
                        self._take({kind: content})
                for run in runs:
                    self._take({"run": run})
            except (parquet.NoRuns, OSError) as error:
                raise (UnfitStore if isinstance(error, parquet.NoRuns) else Damaged)(f"{path}: {error}") from None
            self._parquet = stat.st_ino, stat.st_mtime_ns

    def _write_parquet(self, path: Path) -> None:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
        try:
            with os.fdopen(handle, "wb") as file:
                parquet.write(file, self.runs.values(), self._others())
                file.flush()
                os.fsync(file.fileno())
            others, runs = parquet.read(Path(temporary))
            again = (RunRecord.model_validate(run).model_dump_json() for run in runs)
            mine = (run.model_dump_json() for run in self.runs.values())
            if others != self._others() or any(one != other for one, other in itertools.zip_longest(mine, again)):
                raise OSError(f"{path} could not be written: what was read back is not what was to be stored")
            os.chmod(temporary, 0o644)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
        sync(path.parent)
        stat = path.stat()
        self._parquet = stat.st_ino, stat.st_mtime_ns

    def _others(self) -> dict[str, Any]:
        """Return the data of the study, as opposed to those of its runs."""
        trials = [
            Told(task=task, arm=arm, trial=trial)
            for (task, arm), trials in self._trials.items()
            for _, trial in sorted(trials.items())
        ]
        failures = [*self.failures.values()]
        others = {"study": self.study, "environments": self.environments, "trials": trials, "failures": failures}
        return {kind: to_jsonable_python(content) for kind, content in others.items()}

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Two programs that compact at once could each remove what only the other's file holds."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / ".lock").open("ab") as file:
            lock(file, wait=True)
            yield


def _sealed(begun: bytes) -> bytes:
    """A whole line of an object that lacks its end, with a checksum of what was given."""
    return begun + b',"crc":"%08x"}\n' % zlib.crc32(begun)


def _opened(line: bytes) -> Any:
    """Parse a line and verify its checksum. Lines of older versions have none.

    Raises:
        ValueError: it is damaged.
    """
    content = json.loads(line)
    if isinstance(content, dict) and "crc" in content and _sealed(line[:-SEAL]) != line:
        raise ValueError("its checksum is another")
    return content


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=4)
