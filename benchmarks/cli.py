"""The commands: ``python -m benchmarks ablate`` and ``python -m benchmarks report``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks import phases, report
from benchmarks.presets import PRESETS
from benchmarks.report.tables import terminal
from benchmarks.report.words import findings
from benchmarks.results import collect
from benchmarks.store import Store, UnfitStore
from benchmarks.study import execute

app = typer.Typer(help="Programs that measure normopt.", no_args_is_help=True, pretty_exceptions_enable=False)
console = Console()


@app.command()
def ablate(
    preset: Annotated[str, typer.Option(help=f"Which study: {', '.join(PRESETS)}.")] = "quick",
    out: Annotated[Path | None, typer.Option(help="Folder of the results. Default: results/PRESET.")] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Worker processes, one thread each. Default: one a CPU.")
    ] = None,
) -> None:
    """Run an ablation and write its report. Killed and started again, it goes on where it was."""
    if preset not in PRESETS:
        raise typer.BadParameter(f"there is no preset {preset!r}, only {', '.join(PRESETS)}")
    study = PRESETS[preset]
    folder = out or Path("results") / preset
    store = Store(folder)
    progress = Progress(
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
    try:
        with progress:
            bar = progress.add_task("", total=phases.count(study))
            execute(
                study,
                store,
                workers or os.cpu_count() or 1,
                lambda phase, n: progress.update(bar, description=phase, advance=n),
            )
    except KeyboardInterrupt:
        console.print(f"Stopped with {len(store.runs)} runs stored; the same command goes on from there.")
        raise typer.Exit(130) from None
    except UnfitStore as error:
        raise typer.BadParameter(str(error)) from None
    _report(store, folder)


@app.command("report")
def again(folder: Annotated[Path, typer.Argument(help="Folder of a finished study.")]) -> None:
    """Make the report again from stored results."""
    _report(Store(folder), folder)


def _report(store: Store, folder: Path) -> None:
    try:
        results = collect(store)
    except UnfitStore as error:
        raise typer.BadParameter(str(error)) from None
    path = report.write(results, folder)
    console.print(terminal(results, console.width))
    for finding in findings(results):
        console.print(f"[bold]{finding.title}.[/bold] {finding.text}", highlight=False)
    console.print(f"The report: {path}", soft_wrap=True)
