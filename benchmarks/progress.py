"""How far a study is: a bar in a terminal, and in a log a line every 10 %."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

Advance = Callable[[str, int], None]


@contextmanager
def progress(console: Console, total: int) -> Iterator[Advance]:
    """What `execute` tells of its progress, shown as fits the console."""
    if not console.is_terminal:
        yield Lines(console, total)
        return
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left:"),
        TimeRemainingColumn(),
        console=console,
        # Phases differ in speed: look far back.
        speed_estimate_period=120,
    )
    with bar:
        task = bar.add_task("", total=total)
        yield lambda phase, n: bar.update(task, description=phase, advance=n)


class Lines:
    """One line at the start and one every 10 %: what a log or a pipe can hold of a bar."""

    def __init__(self, console: Console, total: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.console = console
        self.total = total
        self.clock = clock
        self.began = clock()
        self.phase = ""
        self.done = self.made = 0
        self.tenth = -1

    def __call__(self, phase: str, n: int) -> None:
        self.done += n
        # The first call of a phase tells of runs found stored, which took no time.
        if phase == self.phase:
            self.made += n
        self.phase = phase
        tenth = 10 * self.done // self.total
        if tenth == self.tenth:
            return
        self.tenth = tenth
        text = f"{10 * tenth:3} %: {self.done} of {self.total} runs ({phase})"
        if self.made and self.done < self.total:
            left = round((self.clock() - self.began) / self.made * (self.total - self.done))
            text += f", about {left // 60}:{left % 60:02} left"
        self.console.print(text, soft_wrap=True)
