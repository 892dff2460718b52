"""A study at work: its phases on worker processes, stored as they come, taken up again where they were."""

from __future__ import annotations

import atexit
import gc
import os
import platform
from collections.abc import Callable, Iterable
from functools import cache

import joblib
import sklearn
import torch

import normopt
from benchmarks import phases
from benchmarks.spec import RunSpec, Study
from benchmarks.store import Environment, Store
from benchmarks.tasks import TASKS
from benchmarks.training import RunRecord, run


def environment(study: Study) -> Environment:
    """Where this process runs, and the data that the study finds there."""
    return Environment(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}",
        cpus=os.cpu_count() or 1,
        torch=torch.__version__,
        normopt=normopt.__version__,
        sklearn=sklearn.__version__,
        data=TASKS[study.task].fingerprint(),
    )


def execute(study: Study, store: Store, workers: int, advance: Callable[[str, int], None]) -> None:
    """Make every run of the study that the store does not hold yet.

    Args:
        study: what to run.
        store: where results go, each as soon as it is there.
        workers: processes, each on one thread.
        advance: told the phase and how many of its runs were found stored; then, after each, that 1 more was made.
    """
    store.begin(study, environment(study))

    def make(phase: str, specs: Iterable[RunSpec]) -> None:
        wanted = {spec.run_id: spec for spec in specs}
        missing = [spec for run_id, spec in wanted.items() if run_id not in store.runs]
        advance(phase, len(wanted) - len(missing))
        if not missing:
            return
        # One run a batch: joblib would otherwise hold back short runs to hand them over by the dozen.
        parallel = joblib.Parallel(n_jobs=workers, batch_size=1, return_as="generator_unordered")
        for record in parallel(joblib.delayed(_work)(spec) for spec in missing):
            store.add(record)
            advance(phase, 1)

    make("tuning", phases.tuning(study))
    choices = phases.choose(study, store.runs)
    make("final runs", [spec for specs in phases.final(study, choices).values() for spec in specs])
    if study.sparsity:
        make("sparsity", [spec for specs in phases.sparsity(study, choices).values() for spec in specs])


def _work(spec: RunSpec) -> RunRecord:
    """A run on a worker process."""
    record = run(spec)
    _spare_modules()
    return record


@cache
def _spare_modules() -> None:
    """Keep the garbage collector, once a process, from going through what will never be garbage.

    Without psutil, joblib's workers collect about every second, and torch's modules make that 0.2 seconds each time.
    The first run has loaded the last of them.
    """
    gc.collect()
    gc.freeze()
    # At exit it is garbage after all: triton prints pages about what it finds alive then.
    atexit.register(gc.unfreeze)
