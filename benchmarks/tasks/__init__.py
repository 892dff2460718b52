"""The tasks: what is learned. A task is one file with a class that fits `Task`, and a line in `TASKS`."""

from __future__ import annotations

from benchmarks.tasks.base import Splits, Task
from benchmarks.tasks.bytes import Bytes
from benchmarks.tasks.digits import Digits
from benchmarks.tasks.digits_mix import DigitsMix

TASKS: dict[str, Task] = {task.name: task for task in (Digits(), DigitsMix(), Bytes())}

__all__ = ["TASKS", "Splits", "Task"]
