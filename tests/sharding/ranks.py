"""Processes that are the ranks of a gloo group, to call functions in: every call under a watchdog.

They are forked from the one of tests/forked.py, because what they import takes as long as most of the tests.
"""

from __future__ import annotations

import os
import socket
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from tests.forked import context
from tests.patience import patience

TIMEOUT = patience(40)  # seconds for a call


class Ranks:
    """k processes; a call that raises in one of them, or takes too long, ends them all."""

    def __init__(self, k: int, group_timeout: float = TIMEOUT) -> None:
        self.k, self.group_timeout = k, group_timeout
        self.start()

    def start(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(self.k):
            mine, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.k, port, self.group_timeout, theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(mine)
            self.processes.append(process)

    def send(self, function: Callable[..., Any], *args: Any) -> None:
        for pipe in self.pipes:
            pipe.send((function, args))

    def receive(self, rank: int, timeout: float = TIMEOUT) -> Any:
        """A rank's result; an error there, its silence or its death is one here."""
        if not self.pipes[rank].poll(timeout):
            raise TimeoutError(f"rank {rank} of {self.k} has not answered in {timeout} s")
        error, result = self.pipes[rank].recv()
        if error:
            raise RuntimeError(f"rank {rank} of {self.k}:\n{error}")
        return result

    def call(self, function: Callable[..., Any], *args: Any, timeout: float = TIMEOUT) -> list[Any]:
        """The results of all ranks."""
        if not all(p.is_alive() for p in self.processes):
            self.stop()
            self.start()
        self.send(function, *args)
        try:
            return [self.receive(rank, timeout) for rank in range(self.k)]
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def _serve(rank: int, k: int, port: int, group_timeout: float, pipe: Connection) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(k)}
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch.*")
    warnings.filterwarnings("ignore", r"\w+ steps matrices, but some parameters are vectors")  # as in pyproject.toml
    dist.init_process_group("gloo", timeout=timedelta(seconds=group_timeout))
    while True:
        try:
            function, args = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((None, function(*args)))
        except BaseException:
            pipe.send((traceback.format_exc(), None))
