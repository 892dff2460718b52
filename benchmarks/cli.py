"""The commands: ``python -m benchmarks ablate``, ``report``, ``transfer``, ``sparsity``, ``speed``, ``regularity``."""

from __future__ import annotations

import os
import textwrap
import warnings
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.text import Text

from benchmarks import adaptive, phases, regularity, report, sparsity, transfer
from benchmarks.presets import PRESETS
from benchmarks.progress import progress
from benchmarks.report.settings import regularizers
from benchmarks.report.tables import notes, terminal
from benchmarks.report.words import findings
from benchmarks.results import collect
from benchmarks.store import Store, UnfitStore
from benchmarks.study import environment, execute

app = typer.Typer(help="Programs that measure normopt.", no_args_is_help=True, pretty_exceptions_enable=False)
console, errors = Console(highlight=False), Console(stderr=True, highlight=False)


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
    store = _open(folder)
    try:
        # Before any progress is shown: a store that is refused would leave a stray line of it.
        store.begin(study, environment(study))
        with progress(console, phases.count(study)) as advance:
            execute(study, store, workers or os.cpu_count() or 1, advance)
    except KeyboardInterrupt:
        console.print(f"Stopped with {len(store.runs)} runs stored; the same command goes on from there.")
        raise typer.Exit(130) from None
    except UnfitStore as error:
        raise typer.BadParameter(str(error)) from None
    _report(store, folder)


@app.command("report")
def again(folder: Annotated[Path, typer.Argument(help="Folder of a finished study.")]) -> None:
    """Make the report again from stored results."""
    _report(_open(folder), folder)


@app.command("transfer")
def measure_transfer(
    out: Annotated[Path, typer.Option(help="The JSON file of the results.")] = Path("results/transfer.json"),
    workers: Annotated[
        int | None, typer.Option(min=1, help="Worker processes, one thread each. Default: one a CPU.")
    ] = None,
) -> None:
    """Measure whether one learning rate serves models of every width and depth."""
    with progress(console, transfer.count()) as advance:
        result = transfer.measure(workers or os.cpu_count() or 1, advance)
    transfer.write(result, out)
    console.print(
        f"{len(result.points)} points in {result.seconds:.0f} seconds: {out.resolve().as_uri()}", soft_wrap=True
    )


@app.command("sparsity")
def measure_sparsity(
    out: Annotated[Path, typer.Option(help="The JSON file of the results.")] = Path("results/sparsity.json"),
    workers: Annotated[
        int | None, typer.Option(min=1, help="Worker processes, one thread each. Default: one a CPU.")
    ] = None,
) -> None:
    """Measure accuracy against size under weight decay, and how fast the networks are without their dead units."""
    with progress(console, sparsity.count()) as advance:
        result = sparsity.measure(workers or os.cpu_count() or 1, advance)
    sparsity.write(result, out)
    for line in sparsity.summary(result):
        console.print(line, soft_wrap=True)
    console.print(f"{len(result.runs)} runs in {result.seconds:.0f} seconds: {out.resolve().as_uri()}", soft_wrap=True)


@app.command("speed")
def measure_speed(
    model: Annotated[
        list[str] | None,
        typer.Option(help="resnet18, gpt2, tiny1000, one100m, polar; repeatable. Default: resnet18, tiny1000, polar."),
    ] = None,
    threads: Annotated[
        list[int] | None, typer.Option(min=1, help="Threads of the CPU; repeatable. Default: 1, and all there are.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="How often each step is timed.")] = 30,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("results/speed"),
    sweep: Annotated[
        bool,
        typer.Option("--sweep", help="Measure how cost grows too: 10 to 10,000 tensors, 1 to 500 M parameters."),
    ] = False,
    compiled: Annotated[
        bool, typer.Option("--compiled", help="Have torch compile its own steps too, which takes minutes.")
    ] = False,
    startup: Annotated[bool, typer.Option(help="Measure the first steps of fresh processes.")] = True,
    page: Annotated[
        Path | None, typer.Option(help="Measure nothing: write a page of the docs from the results in --out.")
    ] = None,
) -> None:
    """Measure how fast steps are: normopt's and others', side by side, against what the memory allows."""
    from benchmarks.speed import models, report, run  # matplotlib and the compilers, which no other command needs

    if page is not None:
        if not (out / report.JSON).exists():
            raise typer.BadParameter(f"{out} holds no {report.JSON}: measure first, without --page")
        written = report.page(report.read(out), page)
    else:
        for what, value, allowed in (
            *(("model", name, [*models.MODELS]) for name in model or ()),
            ("dtype", dtype, [*run.DTYPES]),
            ("device", device, ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]),
        ):
            if value not in allowed:
                raise typer.BadParameter(f"the {what} is one of {', '.join(allowed)} here, not {value!r}")
        run.run(
            model or run.DEFAULT,
            out,
            lambda said: console.print(said, soft_wrap=isinstance(said, str)),
            width=console.width,
            threads=threads or (),
            rounds=rounds,
            dtype=run.DTYPES[dtype],
            device=torch.device(device),
            sweep=sweep,
            compiled=compiled,
            first_steps=startup,
        )
        written = out / report.MARKDOWN
    console.print(f"The report: {written.resolve().as_uri()}", soft_wrap=True)


@app.command("regularity")
def measure_regularity(
    out: Annotated[Path, typer.Option(help="The JSON file of the results.")] = Path("results/regularity.json"),
    workers: Annotated[
        int | None, typer.Option(min=1, help="Worker processes, one thread each. Default: one a CPU.")
    ] = None,
) -> None:
    """Measure whether trainings that succeed have more regular trajectories."""
    with progress(console, regularity.count()) as advance:
        result = regularity.measure(workers or os.cpu_count() or 1, advance)
    regularity.write(result, out)
    for line in regularity.words(result):
        console.print(line, soft_wrap=True)
    console.print(
        f"{len(result.points)} points in {result.seconds:.0f} seconds: {out.resolve().as_uri()}", soft_wrap=True
    )


@app.command("adaptive-p")
def measure_adaptive_p(
    out: Annotated[Path, typer.Option(help="The JSON file of the results.")] = Path("results/adaptive_p.json"),
    folder: Annotated[Path, typer.Option(help="Folder of the study itself.")] = Path("results/adaptive-p"),
    workers: Annotated[
        int | None, typer.Option(min=1, help="Worker processes, one thread each. Default: one a CPU.")
    ] = None,
) -> None:
    """Run the ablation of adaptive p, and keep of it what the documentation shows."""
    ablate(adaptive.PRESET, folder, workers)
    adaptive.write(adaptive.condensed(collect(_open(folder))), out)
    console.print(f"For the documentation: {out.resolve().as_uri()}", soft_wrap=True)


@app.command("overhead")
def measure_overhead(
    out: Annotated[Path, typer.Option(help="The JSON file of the results.")] = Path("results/overhead.json"),
    rounds: Annotated[int | None, typer.Option(min=6, help="Blocks of steps of each entrant. Default: 60.")] = None,
) -> None:
    """Measure what a GeometryMonitor costs in training steps of the digits MLP."""
    from benchmarks import overhead  # the speed program, which no other command needs

    with progress(console, len(overhead.MAKERS)) as advance:
        result = overhead.measure(rounds or overhead.ROUNDS, advance)
    overhead.write(result, out)
    for line in overhead.lines(result):
        console.print(line, soft_wrap=True)
    console.print(f"The results: {out.resolve().as_uri()}", soft_wrap=True)


def _open(folder: Path) -> Store:
    """The store, with what it warns of told to people: without the line of source that Python adds."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        store = Store(folder)
    for warning in caught:
        errors.print(Text.assemble(("Warning: ", "yellow"), str(warning.message)), soft_wrap=True)
    return store


def _report(store: Store, folder: Path) -> None:
    try:
        results = collect(store)
    except UnfitStore as error:
        raise typer.BadParameter(str(error)) from None
    path = report.write(results, folder)
    console.print()
    _say(
        f"Ablation {results.study.preset}",
        f"Means over {len(results.study.final_seeds)} seeds, ± half a 95 % t interval.",
    )
    if results.study.regularized:
        _say("Regularizers", regularizers(results))
    console.print(terminal(results, console.width))
    for note in notes(results):
        _say("", note)
    _say("More columns", f"See {path.with_name('summary.md')}.")
    for finding in findings(results):
        console.print()
        _say(finding.title, finding.text)
    console.print()
    console.print(f"The report: {path.resolve().as_uri()}", soft_wrap=True)


def _say(title: str, text: str) -> None:
    # Rich would break lines at no-break spaces, and paths at hyphens.
    bold = f"{title}." if title else ""
    lines = textwrap.fill(f"{bold} {text}".strip(), console.width, break_long_words=False, break_on_hyphens=False)
    said = Text(lines)
    said.stylize("bold", 0, len(bold))
    console.print(said, soft_wrap=True)
