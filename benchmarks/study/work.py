"""What a worker process does: a spec → a record, or what went wrong."""

from __future__ import annotations

import ctypes
import faulthandler
import os
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from benchmarks.environment import Environment, here
from benchmarks.study.record import RunRecord
from benchmarks.study.spec import RunSpec

Run = Callable[[RunSpec], RunRecord]
GRACE = 2.0  # seconds that a run has to stop when it is told to, before its process ends


class Overdue(BaseException):
    """A run has taken longer than it may. No Exception, which a loop in the run could catch."""


@dataclass(frozen=True)
class Outcome:
    """What comes back from a worker: where it is, and a record, or what went wrong; overdue if that was the time."""

    environment: Environment | None
    record: RunRecord | None = None
    error: str = ""
    traceback: str = ""
    overdue: bool = False


def work(
    run: Run, spec: RunSpec, tasks: tuple[str, ...], optimizers: tuple[str, ...] = (), timeout: float | None = None
) -> Outcome:
    """Make a run, at most for so many seconds, and look what data and optimizers the study finds here."""
    environment = None
    # torch's generator belongs to the whole process, in which a Dask worker may have many threads.
    with _one_at_a_time:
        try:
            environment = here(tasks, optimizers)
            with _deadline(timeout):
                record = run(spec)
            # What cannot be read again, a NaN among the measures say, must not reach the store.
            RunRecord.model_validate_json(record.model_dump_json())
        except Overdue:
            return Outcome(environment, None, stopped(timeout or 0.0), traceback.format_exc(), overdue=True)
        except Exception as error:
            return Outcome(environment, None, line(error), traceback.format_exc())
        return Outcome(environment, record)


def line(error: BaseException) -> str:
    """An error in a line."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


def stopped(timeout: float) -> str:
    """What is said of a run that took too long."""
    return f"TimeoutError: it was stopped after {timeout:g} seconds"


_one_at_a_time = threading.Lock()
_raise_in = ctypes.pythonapi.PyThreadState_SetAsyncExc


@contextmanager
def _deadline(seconds: float | None) -> Iterator[None]:
    """Raise Overdue after so many seconds; where that does not help, as within a call into C, end the process."""
    if seconds is None:
        yield
        return
    thread = ctypes.c_ulong(threading.get_ident())
    timer = threading.Timer(seconds, lambda: _raise_in(thread, ctypes.py_object(Overdue)))
    timer.daemon = True
    with open(os.devnull, "w") as nowhere:
        faulthandler.dump_traceback_later(seconds + GRACE, exit=True, file=nowhere)
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
            timer.join()
            _raise_in(thread, None)
            faulthandler.cancel_dump_traceback_later()
