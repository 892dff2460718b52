"""Where runs are made: what a result may depend on besides its settings."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterable
from functools import cache
from importlib.metadata import version
from pathlib import Path

import numpy
import torch
from pydantic import BaseModel, ConfigDict

import normopt
from benchmarks.tasks import TASKS


class Environment(BaseModel):
    """Where runs were made.

    Attributes:
        python, torch, normopt, numpy, sklearn: versions.
        system, cpus: the machine.
        commit: of normopt's repository, with a plus sign where files differ from it; None outside one.
        data: a task → the sha256 of its data, for tasks whose data another machine may have in another version.
    """

    model_config = ConfigDict(frozen=True)

    python: str
    system: str
    cpus: int
    torch: str
    normopt: str
    numpy: str
    sklearn: str
    commit: str | None = None
    data: dict[str, str] = {}


@cache
def here(tasks: tuple[str, ...]) -> Environment:
    """Where this process runs, and the data that these tasks find there; looked up once a process."""
    return Environment(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        cpus=os.cpu_count() or 1,
        torch=torch.__version__,
        normopt=normopt.__version__,
        numpy=numpy.__version__,
        sklearn=version("scikit-learn"),
        commit=_commit(),
        data=_fingerprints(tasks),
    )


def _fingerprints(tasks: Iterable[str]) -> dict[str, str]:
    found = {task: TASKS[task].fingerprint() for task in tasks}
    return {task: print_ for task, print_ in found.items() if print_ is not None}


def _commit() -> str | None:
    # The directory of the package, since another repository may be the current one; its own may be site-packages.
    root = Path(normopt.__file__).parent
    command = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--exclude=*", "--abbrev=12"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return said or None
