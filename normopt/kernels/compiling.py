"""Compiled functions, called: where one has to be compiled first, by one process of the machine at a time.

Numba's cache on disk is not made for processes that fill it at once, as the ranks of a job do, or test workers. It
numbers a function's files, and writes its index before the file that the index names: another process may find a name
there, and under it what an older source was compiled to, or another set of flags. To call that is to write anywhere.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # on Windows, where processes are left to Numba
    fcntl = None  # type: ignore[assignment]


def called(function: Any, *args: Any, compiled: Any = None) -> Any:
    """``function(*args)``, alone on this machine if it has yet to be compiled or loaded in this process.

    Args:
        function: compiled by Numba, or one that calls what is.
        args: its arguments.
        compiled: what it calls, if it is not compiled itself.
    """
    if (compiled or function).signatures or fcntl is None:
        return function(*args)
    lock = Path(tempfile.gettempdir()) / f"normopt-{os.getuid()}.lock"
    with lock.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # free again when it is closed, or when this process has died
        return function(*args)
