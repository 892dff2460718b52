"""Call functions that Numba compiles, one process of a machine compiling or loading from the cache at a time.

Numba's cache on disk is not made for processes that fill it at once, as the ranks of a job do, or test workers. It
numbers a function's files, and writes its index before the file that the index names: another process may find a name
there, and under it what an older source was compiled to, or another set of flags. To call that is to write anywhere.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import update_wrapper
from pathlib import Path
from types import CellType, FunctionType
from typing import Any

try:
    import fcntl
except ImportError:  # on Windows, where processes are left to Numba
    fcntl = None  # type: ignore[assignment]


# Of all files that kernels are made from: Numba's cache watches only the one that a function is in.
SOURCES = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))).hexdigest()


# What calls the compiled code of a function without looking at its arguments, which are always of the same types. Numba
# finds out their types at every call, which takes longer than many a kernel runs.
ENTRIES: dict[Any, Any] = {}
LOGGER, ANNOUNCED = logging.getLogger("normopt"), list[bool]()


def compiled(**options: Any) -> Callable[[Any], Any]:
    """Return ``numba.njit(**options)``, with `SOURCES` in the key of its disk cache: in the function's closure."""
    from numba import njit

    def decorate(function: Any) -> Any:
        code = function.__code__
        code = code.replace(co_freevars=(*code.co_freevars, "sources"))
        closure = (*(function.__closure__ or ()), CellType(SOURCES))
        watching = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, closure)
        return njit(**options)(update_wrapper(watching, function))

    return decorate


def can_cache() -> bool:
    """Return whether Numba can write its cache to disk; warn if it cannot, because every process then compiles."""
    from numba import njit

    try:
        njit(cache=True)(can_cache)  # looks for the folder and compiles nothing
    except (RuntimeError, OSError) as error:
        warnings.warn(
            f"Numba cannot cache compiled kernels on disk ({error}): each process compiles them again, which takes "
            "seconds. Set NUMBA_CACHE_DIR to a folder that can be written",
            RuntimeWarning,
            stacklevel=2,
        )
        return False
    return True


def call_with_jit_lock(function: Any, *args: Any, compiled: Any = None) -> Any:
    """``function(*args)``, alone on this machine if it has yet to be compiled or loaded in this process.

    Args:
        function: compiled by Numba, or one that calls what is.
        args: its arguments.
        compiled: what it calls, if it is not compiled itself.
    """
    kernel = compiled or function
    if (entry := ENTRIES.get(kernel)) is not None:
        return (function if compiled else entry)(*args)
    with _alone(), _announced():
        result = function(*args)
    known = list(kernel.overloads.values())
    if len(known) == 1:
        ENTRIES[kernel] = known[0].entry_point
    return result


@contextmanager
def _announced() -> Iterator[None]:
    """Log, once in a process, that something is compiled, which the cache did not have."""
    from numba.core import event

    class Announce(event.Listener):  # type: ignore[misc]
        def on_start(self, _: Any) -> None:
            if not ANNOUNCED:
                ANNOUNCED.append(True)
                LOGGER.warning(
                    "compiling kernels for this CPU, which takes seconds, once on a machine: they are cached. "
                    "Silence this by logging.getLogger('normopt').setLevel('ERROR'); normopt's own optimizers step "
                    "without kernels by fused=False"
                )

        def on_end(self, _: Any) -> None:
            """Nothing more is to be said."""

    with event.install_listener("numba:compile", Announce()):
        yield


@contextmanager
def _alone() -> Iterator[None]:
    """Hold a lock that one process of this user has at a time; where there are no locks, go on without one."""
    with ExitStack() as stack:
        # A closed file would not free it: a child that was forked meanwhile has it open too, for as long as it lives.
        with suppress(OSError, AttributeError):  # another user's file, a folder without locks, Windows
            path = Path(tempfile.gettempdir()) / f"normopt-{os.getuid()}.lock"
            file = stack.enter_context(path.open("a"))
            fcntl.flock(file, fcntl.LOCK_EX)
            stack.callback(fcntl.flock, file, fcntl.LOCK_UN)
        yield
