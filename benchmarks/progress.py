"""How far a study is: a dashboard in a terminal, and in a log a line every 10 %."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from rich.text import Text

from benchmarks.study.pace import Status

Watch = Callable[[Status], None]
Advance = Callable[[str, int], None]


@contextmanager
def dashboard(console: Console) -> Iterator[Watch]:
    """What is told how far a study is, and shows it as fits the console."""
    if not console.is_terminal:
        yield Log(console)
        return
    with _Shown(console) as shown:
        yield shown.take


def counting(watch: Watch, total: int, clock: Callable[[], float] = time.monotonic) -> Advance:
    """For a program that only counts runs: what takes a name and so many runs more."""
    began = clock()
    done = 0

    def advance(name: str, n: int) -> None:
        nonlocal done
        done += n
        left = (clock() - began) / done * (total - done) if done else None
        watch(Status(tasks={name: (done, total)}, left=left))

    return advance


class Log:
    """One line at the start and one every 10 %: what a log or a pipe can hold of a dashboard."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.tenth = -1

    def __call__(self, status: Status) -> None:
        tenth = 10 * status.done // max(status.total, 1)
        if tenth == self.tenth:
            return
        self.tenth = tenth
        text = f"{10 * tenth:3} %: {status.done} of {status.total} runs"
        if status.left is not None and status.done < status.total:
            text += f", about {clock_time(status.left)} left"
        self.console.print(text + _troubles(status), soft_wrap=True)


class _Shown(Progress):
    """The dashboard: a bar a task, a bar for all, and what goes on."""

    status: Status | None = None

    def __init__(self, console: Console | None = None) -> None:
        bars = TextColumn("{task.description}"), BarColumn(bar_width=None), MofNCompleteColumn()
        # Twice a second, as the time that is left is shown in seconds; what the loop tells comes more often.
        super().__init__(*bars, console=console, expand=True, refresh_per_second=2)
        self.bars: dict[str, TaskID] = {}
        self.told = self.began = time.monotonic()

    def take(self, status: Status) -> None:
        self.status, self.told = status, time.monotonic()
        rows = status.tasks | ({"all": (status.done, status.total)} if len(status.tasks) > 1 else {})
        for name, (done, total) in rows.items():
            if name not in self.bars:
                self.bars[name] = self.add_task(name, total=total)
            self.update(self.bars[name], completed=done, total=total)

    def get_renderables(self) -> Iterable[RenderableType]:
        status = self.status
        if status is None:
            yield Text("Starting …", style="dim")
            return
        yield from super().get_renderables()
        now = time.monotonic()
        line = Text(f"{clock_time(now - self.began)} gone")
        if status.left is not None:
            line.append(f", about {clock_time(max(status.left - (now - self.told), 0))} left", style="bold")
        line.append(_troubles(status), style="yellow" if status.failed else "")
        yield line
        if status.running:
            counted = Counter(status.running)
            running = ", ".join(name if n == 1 else f"{n} × {name}" for name, n in counted.items())
            words = f"{status.workers} worker{'s' if status.workers != 1 else ''}: {running}"
            yield Text(words, style="dim", no_wrap=True, overflow="ellipsis")
        elif not status.workers and status.done < status.total:
            yield Text("Waiting for workers to join.", style="yellow")


def clock_time(seconds: float) -> str:
    """Minutes and seconds, with hours and days when there are any: 0:07, 3:36, 2:03:36, 1 day 2:03:36."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    clock = f"{hours}:{minutes:02}:{rest:02}" if hours or days else f"{minutes}:{rest:02}"
    return f"{days} day{'s' if days > 1 else ''} {clock}" if days else clock


def _troubles(status: Status) -> str:
    counts = (f"{n} {what}" for what, n in (("diverged", status.diverged), ("failed", status.failed)) if n)
    text = ", ".join(counts)
    return f"; {text}" if text else ""
