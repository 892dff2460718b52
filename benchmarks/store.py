"""The store: one append-only file of JSON lines, written as results come, that survives being killed."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from benchmarks.spec import Study
from benchmarks.training import RunRecord

FILE = "runs.jsonl"


class UnfitStore(ValueError):
    """A folder of results that does not serve what is asked of it; the message says why and what to do."""


class Environment(BaseModel):
    """Where runs were made, with the sha256 of data that another machine may have in another version."""

    model_config = ConfigDict(frozen=True)

    python: str
    system: str
    cpus: int
    torch: str
    normopt: str
    sklearn: str
    data: str | None = None


class Store:
    """The results in a folder: the study they belong to, where they were made, and the runs so far.

    Opening reads and changes nothing. Each line is one JSON object with the key "study",
    "environment" or "run". A line that cannot be read is skipped with a warning: the run that it
    held is simply made again. If that is the last line, cut off when a write was killed, the first
    append removes it, so that the next line does not grow out of its stump.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE
        self.study: Study | None = None
        self.environments: list[Environment] = []
        self.runs: dict[str, RunRecord] = {}
        self._sound = 0  # bytes up to the end of the last whole line
        self._stump = False  # something follows it
        if self.path.exists():
            self._read()

    def begin(self, study: Study, environment: Environment) -> None:
        """Note the study and the environment, each once.

        Raises:
            UnfitStore: the folder holds another study, or runs on other data.
        """
        if self.study is None:
            self._append("study", study)
            self.study = study
        elif self.study != study:
            raise UnfitStore(
                f"{self.path} holds a study with other settings (preset {self.study.preset!r}), and results of two "
                "studies do not mix: choose another folder with --out, or remove that one"
            )
        if any(old.data != environment.data for old in self.environments):
            raise UnfitStore(
                f"{self.path} holds runs on other data than the task {study.task!r} has here, Python "
                f"{environment.python}: choose another folder with --out, or go on with the Python that began it"
            )
        if environment not in self.environments:
            self._append("environment", environment)
            self.environments.append(environment)

    def add(self, record: RunRecord) -> None:
        """Store a run, safely on disk when this returns; one that is stored already is left as it is."""
        if record.id not in self.runs:
            self._append("run", record)
            self.runs[record.id] = record

    def _append(self, kind: str, content: BaseModel) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            if self._stump:
                file.truncate(self._sound)
                self._stump = False
            file.write(f'{{"{kind}":{content.model_dump_json()}}}\n'.encode())
            file.flush()
            os.fsync(file.fileno())

    def _read(self) -> None:
        lines = self.path.read_bytes().splitlines(keepends=True)
        for number, line in enumerate(lines, 1):
            # A line counts once its end is written: without one, it may be a number cut in two.
            if not line.endswith(b"\n"):
                self._stump = True
                warnings.warn(f"{self.path}: the last line was cut off; its run is made again", stacklevel=3)
                return
            self._sound += len(line)
            try:
                self._take(json.loads(line))
            except (ValueError, ValidationError) as error:
                reason = str(error).splitlines()[0]
                warnings.warn(f"{self.path}: line {number} is skipped, it cannot be read: {reason}", stacklevel=3)

    def _take(self, line: dict[str, Any]) -> None:
        match line:
            case {"study": study}:
                self.study = Study.model_validate(study)
            case {"environment": environment}:
                self.environments.append(Environment.model_validate(environment))
            case {"run": run}:
                record = RunRecord.model_validate(run)
                self.runs.setdefault(record.id, record)
            case _:
                raise ValueError("neither a study, nor an environment, nor a run")
