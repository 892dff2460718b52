"""What a worker process does: a spec → a record, or what went wrong."""

from __future__ import annotations

import atexit
import gc
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from benchmarks.environment import Environment, here
from benchmarks.study.record import RunRecord
from benchmarks.study.spec import RunSpec

Run = Callable[[RunSpec], RunRecord]


@dataclass(frozen=True)
class Outcome:
    """What comes back from a worker: where it is, and a record, or what went wrong."""

    environment: Environment | None
    record: RunRecord | None = None
    error: str = ""
    traceback: str = ""


def work(run: Run, spec: RunSpec, tasks: tuple[str, ...]) -> Outcome:
    """Make a run, and look what data the study's tasks have here."""
    environment = None
    # torch's generator belongs to the whole process, in which a Dask worker may have many threads.
    with _one_at_a_time:
        try:
            environment = here(tasks)
            record = run(spec)
            # What cannot be read again, a NaN among the measures say, must not reach the store.
            RunRecord.model_validate_json(record.model_dump_json())
        except Exception as error:
            return Outcome(environment, error=line(error), traceback=traceback.format_exc())
        _spare_modules()
        return Outcome(environment, record)


def line(error: BaseException) -> str:
    """An error in a line."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


_one_at_a_time = threading.Lock()


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
