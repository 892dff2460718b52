"""How fast runs are made, and how long the rest will take."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from benchmarks.study.record import RunRecord


class Pace:
    """Mean seconds a run: of the same task and optimizer; if there was none yet, of the task; or of any."""

    def __init__(self, records: Iterable[RunRecord] = ()) -> None:
        self._sums: dict[tuple[str, ...], list[float]] = defaultdict(lambda: [0.0, 0.0])
        for record in records:
            self.add(record.spec.task, record.spec.optimizer, record.seconds)

    def add(self, task: str, optimizer: str, seconds: float) -> None:
        """Learn of a run."""
        for like in ((), (task,), (task, optimizer)):
            self._sums[like][0] += seconds
            self._sums[like][1] += 1

    def seconds(self, task: str, optimizer: str) -> float | None:
        """What to expect of a run; None before the first of all."""
        for like in ((task, optimizer), (task,), ()):
            if like in self._sums:
                total, n = self._sums[like]
                return total / n
        return None


@dataclass(frozen=True)
class Status:
    """How far a study is.

    Attributes:
        tasks: a task → its runs done, and all.
        running: the runs that workers have, as "task, arm" words.
        workers: how many there are.
        diverged, failed: of the runs done.
        left: seconds until the end, None before the first run.
    """

    tasks: dict[str, tuple[int, int]]
    running: list[str] = field(default_factory=list)
    workers: int = 0
    diverged: int = 0
    failed: int = 0
    left: float | None = None

    @property
    def done(self) -> int:
        """Runs done, of all tasks."""
        return sum(done for done, _ in self.tasks.values())

    @property
    def total(self) -> int:
        """All runs."""
        return sum(total for _, total in self.tasks.values())


def time_left(seconds: Iterable[float], workers: int) -> float:
    """From the seconds that each lane still needs: all shared by the workers, but no less than the longest needs."""
    lanes = list(seconds)
    return max(sum(lanes) / max(workers, 1), max(lanes, default=0.0))
