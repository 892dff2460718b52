"""Threads for kernels that release the interpreter's lock. torch's own pool is left alone, and so are its settings.

Numba's pools are not used: one kind dies when two threads enter it at once, another in a process that was forked.
These are plain threads of Python. A forked process makes its own, and any number of steps may share them.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

import torch

from normopt.kernels.tables import Chunks

ALONE = 1 << 16  # entries under which waking other threads costs more than they save

_lock = threading.Lock()
_pool: ThreadPoolExecutor | None = None
_size = 0


def share_out(work: Callable[[int, int], None], chunks: Chunks, begin: int = 0, end: int | None = None) -> None:
    """Call ``work(a, b)`` on ranges that cover the chunks ``begin`` to ``end``, on as many threads as torch would use.

    The calling thread takes the first range itself. An error in any range is raised here, after all have ended.
    """
    threads = torch.get_num_threads()
    end = len(chunks) if end is None else end
    if threads == 1 or chunks.total < ALONE or chunks.before[end] - chunks.before[begin] < ALONE:
        work(begin, end)
        return
    mine, *others = chunks.shared(threads, begin, end)
    waiting: list[Future[None]] = []
    try:
        for part in others:
            try:
                waiting.append(_executor(threads - 1).submit(work, *part))
            except RuntimeError:  # the interpreter is going down, and starts no more threads
                work(*part)
        work(*mine)
    finally:
        _finish(waiting)
    for future in waiting:
        future.result()


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
    global _lock, _pool, _size
    _lock, _pool, _size = threading.Lock(), None, 0


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=_forget)
