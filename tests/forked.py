"""Processes of their own for tests, forked from one that has imported torch: a tenth of a second each, not five."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import warnings
from collections.abc import Callable
from pathlib import Path

from torch.multiprocessing.spawn import start_processes

from tests.patience import patience

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(
    [
        "torch",
        "torch._dynamo",
        "torch.distributed.checkpoint",
        "torch.distributed.fsdp",
        "torch.distributed.optim",
        "torch.distributed.tensor.debug",
        "normopt",
        "normopt.kernels.support",
    ]
)


def run(function: Callable[..., object], *arguments: object, seconds: float = 40) -> int | None:
    """Call a function in a process of its own.

    Args:
        function: one that can be pickled.
        arguments: its arguments.
        seconds: how long it takes at most, on an idle machine.

    Returns:
        The exit code, as of ``multiprocessing.Process``; None if it has not ended in time, and was killed.
    """
    process = context.Process(target=function, args=arguments)
    process.start()
    process.join(patience(seconds))
    code = process.exitcode
    process.kill()
    process.join()
    return code


def spawn(function: Callable[..., object], args: tuple[object, ...], nprocs: int) -> None:
    """As torch's spawn does, call ``function(i, *args)`` in a process for each i; an error in one is one here."""
    start_processes(function, args, nprocs, start_method="forkserver")  # type: ignore[no-untyped-call]


def run_file(path: Path, folder: Path, warned: str = "error", **environment: str) -> str:
    """Run a Python file as a program, every warning an error, and return what it printed.

    Args:
        path: the file.
        folder: where it runs.
        warned: what is done about warnings.
        environment: variables that it has beside those of the tests.

    Raises:
        AssertionError: it failed; the message is what it printed.
    """
    printed = path.with_suffix(".txt")
    code = run(_as_program, path, folder, printed, warned, environment, seconds=60)
    said = printed.read_text(encoding="utf-8")
    assert code == 0, f"exit code {code}\n{said}"
    return said


def _as_program(path: Path, folder: Path, printed: Path, warned: str, environment: dict[str, str]) -> None:
    os.environ.update(environment)
    descriptor = os.open(printed, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    os.chdir(folder)
    warnings.simplefilter(warned)  # type: ignore[arg-type]
    # torch's own, where it imports its ZeroRedundancyOptimizer.
    warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"torch\.jit\._script")
    runpy.run_path(str(path), run_name="__main__")
