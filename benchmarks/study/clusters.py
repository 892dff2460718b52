"""Who makes the runs: processes on this machine, or the workers of a Dask cluster on many."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Protocol, TypeVar

from joblib.externals.loky import ProcessPoolExecutor

Result = TypeVar("Result")
SCHEME = "dask://"
PATIENCE = "10s"  # for a scheduler to answer


class NoCluster(ValueError):
    """A cluster that cannot be reached, or is gone; the message says which and what to do."""


class Workers(Protocol):
    """Processes that call functions.

    Attributes:
        deaths: what the future of a call raises whose process died.
        attempts: how often a call is tried whose process dies.
    """

    deaths: tuple[type[BaseException], ...]
    attempts: int

    def count(self) -> int:
        """How many calls can run at once, now."""

    def submit(self, function: Callable[..., Result], *arguments: Any) -> Future[Result]:
        """Have a process call the function; raises one of ``deaths`` if none can any more."""

    def recover(self) -> bool:
        """After a death: be ready again, and say whether whatever was submitted is lost with it."""

    def close(self) -> None:
        """Stop all calls and let go of the processes."""


class Local:
    """Processes on this machine: joblib's loky. When one dies, the others are stopped too, and all are made anew."""

    deaths: tuple[type[BaseException], ...] = (BrokenProcessPool,)
    attempts = 3

    def __init__(self, processes: int) -> None:
        self.processes = processes
        self._executor = self._begin()

    def count(self) -> int:
        """As many as were asked for."""
        return self.processes

    def submit(self, function: Callable[..., Result], *arguments: Any) -> Future[Result]:
        """Have the next free process call it."""
        future: Future[Result] = self._executor.submit(function, *arguments)
        return future

    def recover(self) -> bool:
        """New processes: loky gives up all of them when one dies."""
        self.close()
        self._executor = self._begin()
        return True

    def close(self) -> None:
        """Kill the processes."""
        self._executor.shutdown(wait=True, kill_workers=True)

    def _begin(self) -> ProcessPoolExecutor:
        # No timeout: loky can hang when a process that has idled for too long ends just as it gets something to do.
        return ProcessPoolExecutor(
            max_workers=self.processes, timeout=None, initializer=_be_a_worker, initargs=(os.getpid(),)
        )


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
        self._counted = 0.0
        self._count = 0

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

    def submit(self, function: Callable[..., Result], *arguments: Any) -> Future[Result]:
        """Have some worker call it."""
        future: Future[Result] = self._executor.submit(function, *arguments)
        return future

    def recover(self) -> bool:
        """Nothing to do: other calls go on."""
        return False

    def close(self) -> None:
        """Take back what was submitted; the cluster lives on."""
        with contextlib.suppress(Exception):
            self._executor.shutdown(wait=False)
        self._client.close(timeout=5)


def connect(cluster: str | None, processes: int) -> Workers:
    """Workers on this machine, or on the cluster of that address.

    Raises:
        NoCluster, ModuleNotFoundError: as `Dask` does.
    """
    return Local(processes) if cluster is None else Dask(cluster)


def _distributed() -> Any:
    try:
        import distributed
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            'a Dask cluster needs distributed, which this Python does not have: pip install -e ".[cluster]"'
        ) from None
    return distributed


def _be_a_worker(program: int) -> None:
    """Leave Ctrl-C, which reaches every process of a terminal, to the program, and do not outlive it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == program:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
