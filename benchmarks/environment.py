"""Where runs are made: what a result may depend on besides its settings."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import platform
import subprocess
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.metadata import version
from modulefinder import ModuleFinder
from pathlib import Path

import numpy
import torch
from pydantic import BaseModel, ConfigDict

import normopt
from benchmarks.study.spec import Study
from benchmarks.tasks import TASKS


class Environment(BaseModel):
    """Where runs were made.

    Attributes:
        python, torch, normopt, numpy, sklearn: versions.
        system, cpus: the machine.
        gpu: the device's name, if a task is trained on one.
        commit: of normopt's repository, with a plus sign where files differ from it; None outside one.
        data: a task → the sha256 of its data, for tasks whose data another machine may have in another version.
        code: an optimizer that is the user's own → the sha256 of its module and of those that it imports beside it.
    """

    model_config = ConfigDict(frozen=True)

    python: str
    system: str
    cpus: int
    torch: str
    normopt: str
    numpy: str
    sklearn: str
    gpu: str | None = None
    commit: str | None = None
    data: dict[str, str] = {}
    code: dict[str, str] = {}


@cache
def here(tasks: tuple[str, ...], optimizers: tuple[str, ...] = ()) -> Environment:
    """Return this process's environment, with fingerprints of the tasks' data and of the code of user optimizers.

    It is computed once a process.
    """
    return Environment(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        cpus=os.cpu_count() or 1,
        torch=torch.__version__,
        normopt=normopt.__version__,
        numpy=numpy.__version__,
        sklearn=version("scikit-learn"),
        gpu=_gpu(tasks),
        commit=_commit(),
        data={task: digest for task in tasks if (digest := TASKS[task].fingerprint()) is not None},
        code={name: _code(name.partition(":")[0]) for name in optimizers},
    )


def own_optimizers(study: Study) -> tuple[str, ...]:
    """The optimizers of a study that are the user's own: MODULE:CLASS."""
    return tuple(dict.fromkeys(arm.optimizer for arm in study.arms if ":" in arm.optimizer))


def mixed(environments: Sequence[Environment]) -> list[str]:
    """In which versions of what computes them the runs of a study differ: "torch 2.12 and 2.13" …"""
    found = {
        name: list(dict.fromkeys(str(getattr(environment, name)) for environment in environments))
        for name in ("torch", "normopt", "commit", "numpy", "python", "gpu")
    }
    return [f"{name} {' and '.join(versions)}" for name, versions in found.items() if len(versions) > 1]


def _code(module: str) -> str:
    """The sha256 of a module's source; where it is installed, of the one file, else with all that it imports nearby."""
    top, spec = importlib.util.find_spec(module.partition(".")[0]), importlib.util.find_spec(module)
    if top is None or spec is None or spec.origin is None or not os.path.exists(spec.origin):
        return ""  # built in
    files = {spec.origin}
    if not {"site-packages", "dist-packages"} & set(Path(spec.origin).parts):
        inside = top.submodule_search_locations
        root = Path(next(iter(inside))).parent if inside else Path(spec.origin).parent
        # normopt has its version, and is said to be another, not refused.
        finder = ModuleFinder([str(root)], excludes=["benchmarks", "normopt"])
        with contextlib.suppress(ImportError, SyntaxError):
            finder.import_hook(module)
        files |= {file for found in finder.modules.values() if (file := getattr(found, "__file__", None))}
    return hashlib.sha256(b"\0".join(sorted(Path(file).read_bytes() for file in files))).hexdigest()


def _gpu(tasks: Iterable[str]) -> str | None:
    # Asked only where it is used: the answer takes half a gigabyte of the device's memory.
    used = torch.cuda.is_available() and any(TASKS[task].load().device == "cuda" for task in tasks)
    return torch.cuda.get_device_name() if used else None


@cache
def _commit() -> str | None:
    # The directory of the package, since another repository may be the current one; its own may be site-packages.
    root = Path(normopt.__file__).parent
    command = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--exclude=*", "--abbrev=12"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return said or None
