"""Threads for kernels that release the interpreter's lock: torch's own where they can be had, else Python's.

After a parallel operation, the threads of torch's pool wait in a loop for the next one, for milliseconds: other threads
would share the processors with them. Where torch uses GNU OpenMP, kernels therefore run on its threads. They do not
survive a fork: a forked process, and torch with another pool, have plain threads of Python. Numba's pools are not used:
one kind dies when two threads enter it at once, another in a forked process.
"""

from __future__ import annotations

import ctypes
import os
import re
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache
from pathlib import Path
from typing import Any

import torch

from normopt.kernels.tables import Chunks

ALONE = 1 << 16  # entries under which waking other threads costs more than they save

_REGION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)

_forked = False
_lock = threading.Lock()
_pool: ThreadPoolExecutor | None = None
_size = 0


def share_out(work: Callable[[int, int], None], chunks: Chunks, begin: int = 0, end: int | None = None) -> None:
    """Call ``work(a, b)`` on ranges that cover the chunks ``begin`` to ``end``, on as many threads as torch would use.

    The calling thread is one of them. An error in any range is raised here, after all have ended.
    """
    threads = torch.get_num_threads()
    end = len(chunks) if end is None else end
    if threads == 1 or chunks.total < ALONE or chunks.before[end] - chunks.before[begin] < ALONE:
        work(begin, end)
        return
    parts = chunks.shared(threads, begin, end)
    openmp = None if _forked else _torch_openmp()
    if openmp is None:
        _on_threads_of_python(work, parts)
    else:
        _on_threads_of_torch(openmp, work, parts)


def _on_threads_of_torch(openmp: Any, work: Callable[[int, int], None], parts: list[tuple[int, int]]) -> None:
    errors: list[BaseException] = []

    def region(_: Any) -> None:
        try:
            while parts:  # OpenMP may give fewer threads than were asked for
                work(*parts.pop())
        except IndexError:  # another thread took the last
            pass
        except BaseException as error:
            errors.append(error)

    openmp.GOMP_parallel(_REGION(region), None, len(parts), 0)
    if errors:
        raise errors[0]


def _on_threads_of_python(work: Callable[[int, int], None], parts: list[tuple[int, int]]) -> None:
    mine, *others = parts
    waiting: list[Future[None]] = []
    try:
        for part in others:
            try:
                waiting.append(_executor(len(others)).submit(work, *part))
            except RuntimeError:  # the interpreter is going down, and starts no more threads
                work(*part)
        work(*mine)
    finally:
        _finish(waiting)
    for future in waiting:
        future.result()


@cache
def _torch_openmp() -> Any:
    """Return the GNU OpenMP that torch has loaded; None if it has another pool, or its library cannot be told."""
    maps = Path("/proc/self/maps")
    if not maps.exists() or "parallel backend: OpenMP" not in torch.__config__.parallel_info():
        return None
    loaded = {Path(path) for path in re.findall(r"/\S*/libgomp\S*\.so\S*", maps.read_text())}
    # Other packages bring one of their own, whose threads are others.
    home = Path(torch.__file__).resolve().parent
    of_torch = {path for path in loaded if path.parent in (home / "lib", home.with_name("torch.libs"))}
    found = of_torch or loaded
    if len(found) != 1:
        return None
    openmp = ctypes.CDLL(str(found.pop()))
    openmp.GOMP_parallel.argtypes = [_REGION, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    openmp.GOMP_parallel.restype = None
    return openmp


def _finish(waiting: list[Future[None]]) -> None:
    """Wait for all, through interrupts too: who caught one would free or change memory that is still written."""
    interrupt = None
    while True:
        try:
            wait(waiting)
            break
        except BaseException as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt


def _executor(threads: int) -> ThreadPoolExecutor:
    global _pool, _size
    with _lock:
        if _pool is None or _size < threads:
            # The old pool, if any, ends by itself once nobody holds it: its work is done or going on.
            _pool, _size = ThreadPoolExecutor(threads, thread_name_prefix="normopt"), threads
        return _pool


def _forget() -> None:
    """In a forked process: threads are not inherited, and the lock may have been held by one that is gone."""
    global _forked, _lock, _pool, _size
    _forked, _lock, _pool, _size = True, threading.Lock(), None, 0


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=_forget)
