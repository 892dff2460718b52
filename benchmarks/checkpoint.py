"""The state of a run that is under way, in a file of its study's folder, so that a kill costs minutes of it."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.environment import Environment

EVERY = 300.0  # seconds between two
FOLDER = "checkpoints"


class Checkpoint:
    """The file of one run, which is replaced as a whole or not at all.

    Args:
        folder: of the study; without one, or where there is no such folder, nothing is written or read.
        run_id: the run.
        environment: where it runs. What was written in another one, other versions say, is not read: a run is made by
            one program from its beginning to its end.
        every: seconds between two states.
    """

    def __init__(self, folder: Path | None, run_id: str, environment: Environment, every: float = EVERY) -> None:
        self.path = None if folder is None or not folder.is_dir() else _file(folder, run_id)
        self.environment = environment.model_dump_json()
        self.every = every
        self.last = time.monotonic()

    def read(self) -> dict[str, Any] | None:
        """Return the state that was last written, None if there is none that fits."""
        if self.path is None or not self.path.exists():
            return None
        try:
            found: dict[str, Any] = torch.load(self.path, weights_only=True)
            return found["state"] if found["environment"] == self.environment else None
        except Exception as error:
            reason = type(error).__name__
            warnings.warn(f"{self.path} cannot be read ({reason}), and its run begins anew", stacklevel=2)
            return None

    def offer(self, state: Callable[[], dict[str, Any]]) -> None:
        """Write the state, if it is time to. A disk that refuses costs the checkpoint, and not the run."""
        if self.path is None or time.monotonic() - self.last < self.every:
            return
        try:
            self.path.parent.mkdir(exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.path.parent, delete=False) as file:
                torch.save({"environment": self.environment, "state": state()}, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(file.name, self.path)
        except (OSError, RuntimeError) as error:  # torch's writer turns a full disk into the latter
            warnings.warn(f"no checkpoint could be written to {self.path}: {error}", stacklevel=2)
        self.last = time.monotonic()


def remove(folder: Path, run_id: str) -> None:
    """Remove the state of a run that is stored."""
    _file(folder, run_id).unlink(missing_ok=True)


def remove_all(folder: Path) -> None:
    """Remove what is left when all runs are stored: halves of files whose writers were killed."""
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(folder / FOLDER)


def _file(folder: Path, run_id: str) -> Path:
    return folder / FOLDER / f"{run_id}.pt"
