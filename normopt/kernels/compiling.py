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
from contextlib import contextmanager, suppress
from functools import cache, update_wrapper
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
LOGGER, ANNOUNCED = logging.getLogger("normopt"), set[str]()
LOCKS = set[int]()  # the descriptors of lock files that this process has open


def compiled(cache: bool, **options: Any) -> Callable[[Any], Any]:
    """Return ``numba.njit(cache=cache, **options)``, with a disk cache that can fail without failing the call.

    `SOURCES` is in the cache's key, as a part of the function's closure.
    """
    from numba import njit

    def decorate(function: Any) -> Any:
        code = function.__code__
        code = code.replace(co_freevars=(*code.co_freevars, "sources"))
        closure = (*(function.__closure__ or ()), CellType(SOURCES))
        watching = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, closure)
        dispatcher = njit(**options)(update_wrapper(watching, function))
        if cache:
            dispatcher._cache = _disk_cache()(dispatcher.py_func)
        return dispatcher

    return decorate


@cache
def _disk_cache() -> Any:
    """Return Numba's class of disk caches, without what it does after an error: to raise it in the call."""
    from numba.core.caching import FunctionCache

    class DiskCache(FunctionCache):  # type: ignore[misc]
        def load_overload(self, *args: Any) -> Any:
            return self._tried(super().load_overload, *args)

        def save_overload(self, *args: Any) -> None:
            self._tried(super().save_overload, *args)

        def _tried(self, method: Callable[..., Any], *args: Any) -> Any:
            if "no lock" in ANNOUNCED:  # another process may be writing
                return None
            try:
                return method(*args)
            except Exception as error:  # another user's file, a full disk, a file that was cut off
                _say_once(
                    "no cache",
                    f"Numba's cache in {self.cache_path} cannot be used ({type(error).__name__}: {error}): this "
                    "process compiles kernels again, which takes seconds. Set NUMBA_CACHE_DIR to a folder of your own",
                )
                return None

    return DiskCache


def _say_once(what: str, text: str) -> None:
    """Log a warning, the first time in this process that it is about this."""
    if what not in ANNOUNCED:
        ANNOUNCED.add(what)
        LOGGER.warning(text)


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
            _say_once(
                "compiling",
                "compiling kernels for this CPU, which takes seconds, once on a machine: they are cached. "
                "Silence this by logging.getLogger('normopt').setLevel('ERROR'); normopt's own optimizers step "
                "without kernels by fused=False",
            )

        def on_end(self, _: Any) -> None:
            """Nothing more is to be said."""

    with event.install_listener("numba:compile", Announce()):
        yield


@contextmanager
def _alone() -> Iterator[None]:
    """Hold a lock that one process of this user has at a time; where there are no locks, leave the disk cache alone."""
    handle = None
    try:
        if fcntl is not None:
            try:
                handle = _open_lock_file()
                fcntl.flock(handle, fcntl.LOCK_EX)
            except OSError as error:  # another user's file, a folder without locks, no folder
                _say_once(
                    "no lock",
                    f"processes cannot wait for one another ({error}): this one compiles kernels without Numba's cache "
                    "on disk, which takes seconds. Set TMPDIR to a folder of your own whose file system has locks",
                )
        yield
    finally:
        if handle in LOCKS:  # not in a child that was forked meanwhile
            LOCKS.remove(handle)
            with suppress(OSError):
                # Closing the file would not do: a copy of it may be open in a process that was forked in C.
                fcntl.flock(handle, fcntl.LOCK_UN)
            os.close(handle)


def _open_lock_file() -> int:
    """Open the file that `_alone` locks; programs that this process starts do not inherit it."""
    path = Path(tempfile.gettempdir()) / f"normopt-{os.getuid()}.lock"
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    LOCKS.add(handle)
    return handle


def _close_in_child() -> None:
    """Close the lock files that a forked child has from its parent: it would hold their locks if the parent died."""
    while LOCKS:
        os.close(LOCKS.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)
