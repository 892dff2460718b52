"""Whether everything is here that a study needs."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from benchmarks.environment import here
from benchmarks.study.clusters import Dask, NoCluster
from benchmarks.tasks import TASKS

PACKAGES = ("torch", "normopt", "numpy", "scikit-learn", "scipy", "optuna", "pyarrow", "joblib", "jinja2", "pydantic")
ROOM = 200e6  # bytes; a large study's results are some tens of megabytes


@dataclass(frozen=True)
class Check:
    """Something that was looked at.

    Attributes:
        what, found: what it was, and what was found, with what to do if it is not good.
        good: as studies need it.
        fatal: without it no study runs; else only some do not.
    """

    what: str
    found: str
    good: bool = True
    fatal: bool = False


def examine(folder: Path, cluster: str | None = None) -> list[Check]:
    """Look at the versions, the machine, the data of every task, the folder of the results, and the cluster."""
    return [_versions(), _machine(), *map(_data, TASKS), _folder(folder), *([_cluster(cluster)] if cluster else [])]


def _versions() -> Check:
    found, missing = [], []
    for package in PACKAGES:
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            missing.append(package)
    where = here(())
    words = [f"Python {where.python}", *found, *([f"commit {where.commit}"] if where.commit else [])]
    if missing:
        words.append(f'missing: {", ".join(missing)} (pip install "normopt[bench]")')
    return Check("versions", ", ".join(words), good=not missing, fatal=bool(missing))


def _machine() -> Check:
    # Of a container, the share of the machine that it may use.
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    text = f"{here(()).system}, {os.cpu_count()} CPUs, {allowed} of them for this process"
    if hasattr(os, "getloadavg"):
        text += f", load {os.getloadavg()[0]:.1f}"
    return Check("machine", text)


def _data(task: str) -> Check:
    try:
        TASKS[task].load()
    except (OSError, ImportError, ValueError, RuntimeError) as error:
        return Check(f"data of {task}", str(error), good=False)
    return Check(f"data of {task}", "here")


def _folder(folder: Path) -> Check:
    what = f"folder {folder}"
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(b"x")
    except OSError as error:
        return Check(what, f"results cannot be written there ({error}): choose another with --out", False, True)
    free = shutil.disk_usage(existing).free
    text = f"writable, {free / 1e9:.1f} GB free"
    return Check(what, text if free > ROOM else f"{text}: a large study may not fit", free > ROOM)


def _cluster(address: str) -> Check:
    what = f"cluster {address}"
    try:
        dask = Dask(address)
    except (NoCluster, ModuleNotFoundError) as error:
        return Check(what, str(error), False, True)
    try:
        workers = dask.count()
    finally:
        dask.close()
    many = f"{workers} worker{'s' if workers != 1 else ''}"
    return Check(what, f"answers, {many}" + ("" if workers else ": start some with `dask worker`"), bool(workers))
