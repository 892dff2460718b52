"""Who makes the runs: processes on this machine, or the workers of a Dask cluster on many, both as executors."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import itertools
import multiprocessing
import os
import pickle
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch

import normopt

Result = TypeVar("Result")
SCHEME = "dask://"
PATIENCE = "10s"  # for a scheduler to answer
VISIBLE = "CUDA_VISIBLE_DEVICES"


class NoCluster(ValueError):
    """A cluster that cannot be reached, or is gone; the message says which and what to do."""


class Died(Exception):
    """The process of a call has died, so many seconds after the call was handed to it."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"the process ended after {seconds:.3g} seconds")
        self.seconds = seconds


class Workers(Protocol):
    """An executor of `concurrent.futures` that says how many calls it makes at once.

    Attributes:
        deaths: what the future of a call raises whose process died. Other calls go on.
        attempts: how often a call is tried whose process dies.
    """

    @property
    def deaths(self) -> tuple[type[BaseException], ...]: ...
    @property
    def attempts(self) -> int: ...

    def count(self) -> int:
        """How many calls can run at once, now."""

    def submit(self, fn: Callable[..., Result], /, *args: Any) -> Future[Result]:
        """Have a process call the function."""


class Local(ThreadPoolExecutor):
    """Processes on this machine, each with a thread here that waits for it: one that dies costs its own call alone.

    Each sees one of this program's CUDA devices, in turn, if there are any; one that replaces another, the same.
    """

    deaths = (Died,)
    attempts = 3

    def __init__(self, processes: int) -> None:
        super().__init__(processes)
        self.processes = processes
        self._mine = threading.local()
        self._numbers = itertools.count()
        self._devices = devices()
        self._pids: set[int] = set()
        self._closed = False
        self._context = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
        # Loaded once, not once a process.
        self._context.set_forkserver_preload(["benchmarks.training"])

    def count(self) -> int:
        """As many as were asked for."""
        return self.processes

    def submit(self, fn: Callable[..., Result], /, *args: Any, **kwargs: Any) -> Future[Result]:
        """Have the next free process call the function."""
        return super().submit(self._call, fn, *args, **kwargs)

    def close(self) -> None:
        """Kill the processes."""
        self._closed = True
        self.shutdown(wait=False, cancel_futures=True)
        for pid in list(self._pids):
            with contextlib.suppress(OSError):
                os.kill(pid, getattr(signal, "SIGKILL", signal.SIGTERM))
        self.shutdown()

    def _call(self, fn: Callable[..., Result], /, *args: Any, **kwargs: Any) -> Result:
        mine, began = self._mine, time.monotonic()
        if not hasattr(mine, "number"):
            mine.number = next(self._numbers)
        if not hasattr(mine, "pool"):
            own = {VISIBLE: self._devices[mine.number % len(self._devices)]} if self._devices else {}
            mine.pool, mine.pid = ProcessPoolExecutor(1, self._context, _be_a_worker, ({**os.environ} | own,)), 0
        try:
            if not mine.pid:
                mine.pid = mine.pool.submit(os.getpid).result()
                self._pids.add(mine.pid)
                began = time.monotonic()
            if self._closed:
                raise CancelledError
            result: Result = mine.pool.submit(fn, *args, **kwargs).result()
        except BrokenProcessPool:
            mine.pool.shutdown()
            self._pids.discard(mine.pid)
            del mine.pool
            raise Died(time.monotonic() - began) from None
        return result


class Dask:
    """The workers of a Dask scheduler. Dask itself makes a call again whose worker died, on another.

    Args:
        address: dask://HOST:PORT.

    Raises:
        NoCluster: that is no address, or no scheduler answers there.
        ModuleNotFoundError: Dask is not installed.
    """

    attempts = 2  # Dask has tried four times by then

    def __init__(self, address: str) -> None:
        if not re.fullmatch(rf"{SCHEME}.+:\d+", address):
            raise NoCluster(f"a cluster is given as {SCHEME}HOST:PORT, not {address!r}")
        distributed = _distributed()
        self.deaths: tuple[type[BaseException], ...] = (distributed.KilledWorker,)
        self.address = address
        try:
            self._client = distributed.Client(
                "tcp://" + address.removeprefix(SCHEME), timeout=PATIENCE, set_as_default=False
            )
        except OSError as error:
            raise NoCluster(
                f"no Dask scheduler answers at {address} ({error}): start one with `dask scheduler`, and workers with "
                "`dask worker HOST:PORT --nthreads 1`, each where `import benchmarks` works"
            ) from None
        self._executor = self._client.get_executor(pure=False)
        self._counted, self._count = 0.0, 0

    def count(self) -> int:
        """As many as there are now: workers come and go. One run a process, however many threads it has."""
        if time.monotonic() - self._counted > 2:
            try:
                self._count = len(self._client.ncores())
            except (OSError, RuntimeError, ValueError) as error:
                raise NoCluster(
                    f"the Dask scheduler at {self.address} is gone ({error}): what is stored is safe, and `resume` "
                    "goes on when there is one again"
                ) from None
            self._counted = time.monotonic()
        return self._count

    def submit(self, fn: Callable[..., Result], /, *args: Any) -> Future[Result]:
        """Have some worker call the function."""
        future: Future[Result] = self._executor.submit(fn, *args)
        return future

    def close(self) -> None:
        """Take back what was submitted; the cluster lives on."""
        with contextlib.suppress(Exception):
            self._executor.shutdown(wait=False)
        self._client.close(timeout=5)


def connect(cluster: str | None, processes: int) -> Local | Dask:
    """Workers on this machine, or on the cluster of that address.

    Raises:
        NoCluster, ModuleNotFoundError: as `Dask` does.
    """
    return Local(processes) if cluster is None else Dask(cluster)


def each(
    processes: int, function: Callable[..., Result], calls: Sequence[tuple[Any, ...]], folder: Path | None = None
) -> Iterator[Result]:
    """Yield the result of each call, in order, from a pool of processes; with one, the calls run in this process.

    Args:
        processes, function, calls: which.
        folder: keeps each result as soon as it is there; one that is there is not made again. It is another's where
            the arguments, the file of the function or the version of torch or normopt is another.
    """
    source = Path(inspect.getfile(function)).read_bytes()
    same = hashlib.sha256(source + f"{torch.__version__} {normopt.__version__}".encode()).hexdigest()
    names = (hashlib.sha256(f"{same}{call!r}".encode()).hexdigest()[:16] for call in calls)
    tasks = [(function, call, folder and folder / name) for call, name in zip(calls, names, strict=True)]
    if processes == 1:
        yield from map(pickle.loads, itertools.starmap(_pickled, tasks))
        return
    local = Local(processes)
    try:
        for future in [local.submit(_pickled, *task) for task in tasks]:
            yield pickle.loads(future.result())
    finally:
        local.close()


def _pickled(function: Callable[..., object], call: tuple[Any, ...], path: Path | None) -> bytes:
    """As bytes: of tensors in a result, torch would share the memory, with an open file for each."""
    if path is not None and path.exists():
        return path.read_bytes()
    result = pickle.dumps(function(*call))
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".part")
        unfinished.write_bytes(result)
        unfinished.replace(path)
    return result


def devices() -> list[str]:
    """This program's CUDA devices, as the variable CUDA_VISIBLE_DEVICES names them."""
    named, there = os.environ.get(VISIBLE), torch.cuda.device_count()
    return (named.split(",") if named else [str(i) for i in range(there)])[:there]


def _distributed() -> Any:
    try:
        import distributed
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            'a Dask cluster needs distributed, which this Python does not have: pip install -e ".[cluster]"'
        ) from None
    return distributed


def _be_a_worker(environ: dict[str, str]) -> None:
    """Leave Ctrl-C, which reaches every process of a terminal, to the program, and do not outlive it."""
    os.environ.clear()  # the server that forks workers has that of its own beginning
    os.environ.update(environ)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    program = multiprocessing.parent_process()

    def watch() -> None:
        if program is not None:
            program.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
