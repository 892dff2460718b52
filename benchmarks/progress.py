"""How far a study is: a dashboard in a terminal, and in a log a line every 10 %."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
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
    shown = _Shown()
    # Twice a second, as the time that is left is shown in seconds; what the loop tells comes once a second or less.
    with Live(get_renderable=shown.render, console=console, refresh_per_second=2) as live:
        yield shown.take
        live.refresh()


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


class _Shown:
    """The dashboard: a bar a task, a bar for all, and what goes on."""

    def __init__(self) -> None:
        self.status: Status | None = None
        self.told = self.began = time.monotonic()

    def take(self, status: Status) -> None:
        self.status = status
        self.told = time.monotonic()

    def render(self) -> RenderableType:
        status = self.status
        if status is None:
            return Text("Starting …", style="dim")
        bars = Table.grid(padding=(0, 2))
        bars.add_column(no_wrap=True)
        bars.add_column(ratio=1)
        bars.add_column(justify="right", no_wrap=True)
        bars.expand = True
        rows = [*status.tasks.items()]
        if len(rows) > 1:
            rows.append(("all", (status.done, status.total)))
        for name, (done, total) in rows:
            bars.add_row(
                Text(name, style="bold" if name == "all" else ""),
                ProgressBar(total=max(total, 1), completed=done),
                f"{done}/{total}",
            )
        now = time.monotonic()
        line = Text(f"{clock_time(now - self.began)} gone")
        if status.left is not None:
            line.append(f", about {clock_time(max(status.left - (now - self.told), 0))} left", style="bold")
        line.append(_troubles(status), style="yellow" if status.failed else "")
        parts: list[RenderableType] = [bars, line]
        if status.running:
            counted = Counter(status.running)
            running = ", ".join(name if n == 1 else f"{n} × {name}" for name, n in counted.items())
            words = f"{status.workers} worker{'s' if status.workers != 1 else ''}: {running}"
            parts.append(Text(words, style="dim", no_wrap=True, overflow="ellipsis"))
        elif not status.workers and status.done < status.total:
            parts.append(Text("Waiting for workers to join.", style="yellow"))
        return Group(*parts)


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
