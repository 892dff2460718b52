"""What the commands print besides reports: names, studies, estimates, failures, and what the doctor found."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten

from rich.console import Console
from rich.text import Text

from benchmarks.doctor import Check
from benchmarks.grid import Grid
from benchmarks.optimizers import OPTIMIZERS
from benchmarks.progress import clock_time
from benchmarks.store import Store
from benchmarks.study.estimate import Estimate
from benchmarks.study.lanes import lanes, left
from benchmarks.study.presets import PRESETS
from benchmarks.tasks import TASKS

SHOWN = 10  # failures; the rest are counted
DESCRIBED = 100  # characters of a task's description; a report has all of it


def names(console: Console) -> None:
    """Print the presets, the tasks and the optimizers."""
    presets = []
    for study in PRESETS.values():
        runs = sum(lane.runs_wanted for lane in lanes(study).values())
        presets.append([study.name, study.purpose, *map(str, (len(study.tasks), len(study.arms), runs))])
    tasks = [
        (task.name, shorten(task.description, DESCRIBED, placeholder=" …"), str(task.epochs)) for task in TASKS.values()
    ]
    optimizers = [(name, entry.rule) for name, entry in OPTIMIZERS.items()]
    for titles, rows in (
        (("Preset", "Question", "Tasks", "Arms", "Runs"), presets),
        (("Task", "What is learned", "Epochs"), tasks),
        (("Optimizer", "Rule"), optimizers),
    ):
        console.print(Grid(titles, rows, left=2).terminal())
    console.print("Name an optimizer of your own as my_module:MyOptimizer. Try: python -m benchmarks run quick")


def studies(console: Console, found: Sequence[tuple[Path, Store]], folder: Path) -> None:
    """Print the progress of studies."""
    if not found:
        console.print(f"No study in {folder}.")
        return
    rows = []
    for path, store in found:
        if store.study is None:
            continue
        all_lanes = lanes(store.study, store.trials)
        total = sum(lane.runs_wanted for lane in all_lanes.values())
        done = total - sum(left(lane, all_lanes, store.losses) for lane in all_lanes.values())
        diverged = sum(record.diverged for record in store.runs.values())
        changed = time.strftime("%Y-%m-%d %H:%M", time.localtime(store.changed))
        failed = str(len(store.failures))
        rows.append([str(path), store.study.name, f"{done}/{total}", str(diverged), failed, changed])
    titles = ("Folder", "Study", "Runs", "Diverged", "Failed", "Last change")
    console.print(Grid(titles, rows, left=2).terminal())


def estimated(console: Console, of: Estimate, workers: int) -> None:
    """How many runs a study has, and about how long they take."""
    table = Grid(("Task", "Arm", "Trials", "Runs", "Missing", "Seconds a run", "Time"), (), left=2).terminal()
    for (task, arm), lane in of.lanes.items():
        key, tuning = (task, arm), lane.study.tuning
        seconds = of.seconds.get(key)
        least = "> " if key in of.slow else ""
        table.add_row(
            task,
            arm,
            f"{tuning.trials}{f' + {tuning.finalists} again' if tuning.finalists else ''}" if lane.arm.search else "0",
            str(lane.runs_wanted),
            str(of.missing[key]),
            "?" if seconds is None else f"{least}{seconds:.2g}",
            "?" if seconds is None else least + clock_time(seconds * of.missing[key]),
            end_section=arm == lane.study.arms[-1].name,
        )
    console.print(table)
    runs = sum(lane.runs_wanted for lane in of.lanes.values())
    missing = sum(of.missing.values())
    least = "at least" if of.slow or of.failed else "about"
    many = f"{workers} workers" if workers != 1 else "one worker"
    console.print(f"{runs} runs, {missing} of them to be made: {least} {clock_time(of.total(workers))} on {many}.")
    for (task, arm), why in of.failed.items():
        console.print(Text.assemble(("A probe failed: ", "yellow"), f"{arm} on {task}: {why}"), soft_wrap=True)


def failures(console: Console, store: Store) -> None:
    """The runs that failed, and where their tracebacks are."""
    failed = list(store.failures.values())
    console.print(Text(f"{len(failed)} run{'s' if len(failed) != 1 else ''} failed:", style="bold red"))
    for failure in failed[:SHOWN]:
        spec = failure.spec
        where = f"  {spec.optimizer} on {spec.task}, seed {spec.seed}, settings {dict(spec.settings)}"
        console.print(f"{where}: {failure.error}", soft_wrap=True)
    if len(failed) > SHOWN:
        console.print(f"  … and {len(failed) - SHOWN} more")
    last = failed[0].traceback.strip()
    if last:
        console.print(Text(f"The first one's traceback:\n{last}", style="dim"), soft_wrap=True)


def examined(console: Console, checks: Sequence[Check]) -> None:
    """What the doctor found."""
    for check in checks:
        sign, style = ("✓", "green") if check.good else ("✗", "bold red") if check.fatal else ("–", "yellow")
        console.print(Text.assemble((f"{sign} ", style), (check.what, "bold"), f": {check.found}"), soft_wrap=True)
