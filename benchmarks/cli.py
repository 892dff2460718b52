"""The commands: ``python -m benchmarks run`` and what belongs to it, and a command for each other measurement."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import textwrap
import warnings
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.text import Text

from benchmarks import doctor as doctors
from benchmarks import listing, report
from benchmarks.environment import mixed
from benchmarks.programs import adaptive_norms, kept, radii
from benchmarks.progress import counting, dashboard
from benchmarks.report.tables import terminal
from benchmarks.results import Results, collect
from benchmarks.store import PARQUET, Store, UnfitStore
from benchmarks.study import flags
from benchmarks.study.clusters import NoCluster, connect
from benchmarks.study.estimate import estimate
from benchmarks.study.execute import execute
from benchmarks.study.presets import PRESETS
from benchmarks.study.rehearsal import rehearse
from benchmarks.study.spec import Study
from benchmarks.study.toml import BadStudy
from benchmarks.tasks import TASKS

app = typer.Typer(help="Compare optimizers, and measure normopt.", no_args_is_help=True, pretty_exceptions_enable=False)
console, errors = Console(highlight=False), Console(stderr=True, highlight=False)

RESULTS = Path("results")
Workers = Annotated[
    int | None,
    typer.Option(min=1, help="Worker processes, one thread each. Default: one a CPU; if a task uses a GPU, one a GPU."),
]
Cluster = Annotated[str | None, typer.Option(help="dask://HOST:PORT: run on the workers of that Dask scheduler.")]
Timeout = Annotated[
    float | None, typer.Option(min=0.1, help="Seconds that a run may take; one that takes longer is a failure.")
]
Out = Annotated[Path, typer.Option(help="The JSON file of the results.")]
Folder = Annotated[Path, typer.Argument(help="Folder of a study's results.")]

FAILED = 1  # the exit code of a study some of whose runs failed
DISK = 3  # of one that could not read or write: a full disk, a folder that is not to be written to, a damaged file
INTERRUPTED = 130


def plainly(command: Callable[..., None]) -> Callable[..., None]:
    """Turn expected errors into a one-line message without a traceback."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except (BadStudy, UnfitStore, NoCluster, ModuleNotFoundError, OSError) as error:
            # A missing file is a wrong argument; other OSErrors come from the disk or the system.
            code = DISK if isinstance(error, OSError) and not isinstance(error, FileNotFoundError) else 2
            errors.print(Text.assemble(("Error: ", "bold red"), str(error)), soft_wrap=True)
            raise typer.Exit(code) from None

    return wrapped


@app.command()
@plainly
def run(
    what: Annotated[
        str | None,
        typer.Argument(help=f"A preset ({', '.join(PRESETS)}), or a TOML file.", metavar="[PRESET|FILE.toml]"),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the results. Default: results/NAME.")] = None,
    workers: Workers = None,
    cluster: Cluster = None,
    timeout: Timeout = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print how many runs there are and about how long they take; run nothing.")
    ] = False,
    task: Annotated[list[str] | None, typer.Option(help="A task; repeatable. Replaces those of the preset.")] = None,
    arm: Annotated[
        list[str] | None,
        typer.Option(
            "--arm",
            "--optimizer",
            help='An optimizer and its settings, "lpsgdm p=8 agr=true lr=1e-3..1", or one of your own, '
            'my_module:MyOptimizer; repeatable. Added to those of the preset. A name with blanks: name="no decay".',
        ),
    ] = None,
    trials: Annotated[int | None, typer.Option(min=1, help="Settings that tuning tries for each arm.")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Final runs of each arm.")] = None,
    budget: Annotated[float | None, typer.Option(min=0.001, help="Factor on the epochs of every task.")] = None,
    baseline: Annotated[str | None, typer.Option(help="The name of the arm that the others are compared with.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Batch size. Default: each task's own.")] = None,
    tuning_seeds: Annotated[int | None, typer.Option(min=1, help="Runs of each setting that tuning tries.")] = None,
    amp: Annotated[bool, typer.Option("--amp", help="Make forward passes under bfloat16 autocast.")] = False,
) -> None:
    """Run a study and write its report. The same command continues a study that was interrupted."""
    others = {"seeds": seeds, "budget": budget, "baseline": baseline, "batch_size": batch_size, "amp": amp}
    study = flags.study(what, task or (), arm or (), trials, tuning_seeds, **others)
    folder = out or RESULTS / study.name
    if dry_run:
        rehearse(study)
        listing.estimated(console, estimate(study, _open(folder)), workers or _processes(study))
        return
    _run(study, folder, workers, cluster, timeout)


@app.command()
@plainly
def resume(folder: Folder, workers: Workers = None, cluster: Cluster = None, timeout: Timeout = None) -> None:
    """Continue a study that was stopped or killed."""
    _run(_study(_open(folder)), folder, workers, cluster, timeout)


@app.command("list")
@plainly
def list_(
    folder: Annotated[Path | None, typer.Argument(help="List the studies in this folder instead.")] = None,
) -> None:
    """List presets, tasks and optimizers, or the progress of the studies in a folder."""
    if folder is None:
        listing.names(console)
    else:
        candidates = [folder, *sorted(path for path in folder.glob("*/") if path.is_dir())]
        listing.studies(console, [(path, _open(path)) for path in candidates if Store.begun(path)], folder)


@app.command("report")
@plainly
def again(
    folder: Annotated[Path, typer.Argument(help="Folder of a study's results, or a Parquet file of runs.")],
    page: Annotated[
        Path | None, typer.Option(help="Write a page of the docs, Markdown, instead of the report.")
    ] = None,
) -> None:
    """Write the report again from stored results; the study may be unfinished."""
    store = _open(folder)
    if page is None:
        _report(store, store.folder)
        return
    _say_where("The page", report.write_page(collect(store), page))


@app.command()
@plainly
def compare(
    folders: Annotated[list[Path], typer.Argument(help="Folders of results, or Parquet files of runs: two or more.")],
    out: Annotated[Path, typer.Option(help="Folder of the comparison.")] = RESULTS / "compared",
    rename: Annotated[list[str] | None, typer.Option(help="OLD=NEW: rename an arm in all studies; repeatable.")] = None,
) -> None:
    """Compare studies on tasks and arms of the same names."""
    if len(folders) < 2:
        raise UnfitStore("a comparison needs two folders or more")
    stores = [_open(folder) for folder in folders]
    names = dict(_renaming(text, {arm.name for store in stores for arm in _study(store).arms}) for text in rename or ())
    for store in stores:
        store.rename(names)
    _say_where("The comparison", report.compare([collect(store) for store in stores], out))


def _renaming(text: str, arms: set[str]) -> tuple[str, str]:
    """OLD and NEW, both of which may hold an equals sign."""
    parts = text.split("=")
    for i in range(1, len(parts)):
        old, new = "=".join(parts[:i]), "=".join(parts[i:])
        if old in arms and new:
            return old, new
    raise BadStudy(
        f"--rename is OLD=NEW, of which no study has an arm OLD in {text!r} (arms: {', '.join(sorted(arms))})"
    )


@app.command()
@plainly
def doctor(
    folder: Annotated[Path, typer.Argument(help="Folder for results.")] = RESULTS,
    cluster: Cluster = None,
) -> None:
    """Check that everything that studies need is installed: versions, data, disk, cluster."""
    checks = doctors.examine(folder, cluster)
    listing.examined(console, checks)
    if any(check.fatal for check in checks):
        raise typer.Exit(FAILED)


@app.command("transfer")
def measure_transfer(out: Out = RESULTS / "transfer.json", workers: Workers = None) -> None:
    """Measure whether the best learning rate changes with width and depth."""
    _measure("transfer", out, workers)


@app.command("sparsity")
def measure_sparsity(out: Out = RESULTS / "sparsity.json", workers: Workers = None) -> None:
    """Measure accuracy against size under weight decay, and the speed of networks without their dead units."""
    _measure("sparsity", out, workers)


@app.command("best-norm")
def measure_best_norm(out: Out = RESULTS / "best_norm.json", workers: Workers = None) -> None:
    """Measure which norm's direction decreases the loss most, at checkpoints along trainings."""
    _measure("best_norm", out, workers)


@app.command("speed")
@plainly
def measure_speed(
    model: Annotated[
        list[str] | None,
        typer.Option(help="mlp, resnet18, vit-s, gpt2, tiny1000, one100m, polar; repeatable. Default: by the part."),
    ] = None,
    part: Annotated[
        list[str] | None, typer.Option(help="table, growth, memory, share or limits; repeatable. Default: all of them.")
    ] = None,
    threads: Annotated[
        list[int] | None, typer.Option(min=1, help="Threads of the CPU; repeatable. Default: 1, and all there are.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="How often each step is timed.")] = 30,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("results/speed"),
    compiled: Annotated[
        bool, typer.Option("--compiled", help="Also measure torch's compiled steps, beside the limits; takes minutes.")
    ] = False,
    page: Annotated[
        Path | None, typer.Option(help="Measure nothing: write the pages of the docs from the results in --out.")
    ] = None,
) -> None:
    """Measure the speed of steps: normopt and other libraries, growth with model size, and the limits."""
    from benchmarks.speed import models, run  # matplotlib and the compilers, which no other command needs
    from benchmarks.speed import page as pages

    if page is not None:
        if not (out / pages.JSON).exists():
            raise BadStudy(f"{out} holds no {pages.JSON}: measure first, without --page")
        pages.publish(pages.read(out), page)
    else:
        for what, value, allowed in (
            *(("model", name, [*models.MODELS]) for name in model or ()),
            *(("part", name, [*run.PARTS]) for name in part or ()),
            ("dtype", dtype, [*run.DTYPES]),
            ("device", device, ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]),
        ):
            if value not in allowed:
                raise BadStudy(f"the {what} is one of {', '.join(allowed)} here, not {value!r}")
        run.run(
            model or (),
            out,
            lambda said: console.print(said, soft_wrap=isinstance(said, str)),
            width=console.width,
            parts=part or (),
            threads=threads or (),
            rounds=rounds,
            dtype=run.DTYPES[dtype],
            device=torch.device(device),
            compiled=compiled,
        )
    written = page or out / pages.USERS
    console.print(f"The report: {written.resolve().as_uri()}", soft_wrap=True)


@app.command("adaptive-norms")
@plainly
def measure_adaptive_norms(
    out: Annotated[Path, typer.Option(help="Folder of the JSON files and of the studies.")] = RESULTS,
    workers: Workers = None,
) -> None:
    """Run the two studies of ℓp directions in adaptive coordinates, and store what the documentation shows."""
    for study in adaptive_norms.STUDIES:
        results = _made(PRESETS[study], out, workers)
        kept.write(adaptive_norms.condensed(results), out / f"{study.replace('-', '_')}.json")
    _say_where("For the documentation", out)


@app.command("radii")
@plainly
def measure_radii(
    out: Annotated[Path, typer.Option(help="Folder of the JSON file and of the studies.")] = RESULTS / "radii",
    workers: Workers = None,
) -> None:
    """Measure which radius and learning-rate ratio Muon's presets need, and compare them with AdamW."""
    kept.write(radii.measure(functools.partial(_made, out=out, workers=workers)), out / "radii.json")
    _say_where("For the documentation", out / "radii.json")


def _made(study: Study, out: Path, workers: int | None) -> Results:
    """Run a study in a folder of its own in this one."""
    _run(study, out / study.name, workers)
    return collect(_open(out / study.name))


def _measure(name: str, out: Path, workers: int | None) -> None:
    """Run one of the programs, and write its results; run again, it continues."""
    program = import_module(f"benchmarks.programs.{name}")  # some load what no other command needs
    folder = out.with_suffix(".runs")
    with dashboard(console) as watch:
        result = program.measure(workers or os.cpu_count() or 1, counting(watch, program.count()), folder)
    kept.write(result, out)
    shutil.rmtree(folder, ignore_errors=True)
    _say_where("The results", out)


def _run(
    study: Study, folder: Path, processes: int | None, cluster: str | None = None, timeout: float | None = None
) -> None:
    store = _open(folder)
    rehearse(study)
    if cluster is None:
        for name in study.tasks:
            TASKS[name].load()  # data that are not here are missed now, and not in every run
    workers = connect(cluster, processes or _processes(study))
    try:
        with stopping() as stop, dashboard(console) as watch:
            execute(study, store, workers, watch, stop=stop, timeout=timeout)
    except KeyboardInterrupt:
        errors.print(f"Stopped with {len(store.runs)} runs stored; `python -m benchmarks resume {folder}` continues.")
        raise typer.Exit(INTERRUPTED) from None
    finally:
        workers.close()
    store.compact()
    _report(store, folder)
    if store.failures:
        listing.failures(errors, store)
        raise typer.Exit(FAILED)


def _processes(study: Study) -> int:
    """One a CPU, or one a GPU if a task is trained on one: a model that needs a GPU needs it for itself."""
    gpus = torch.cuda.device_count()
    with contextlib.suppress(OSError, ImportError):  # data that are missing are told elsewhere
        if gpus and any(TASKS[task].load().device == "cuda" for task in study.tasks):
            return gpus
    return os.cpu_count() or 1


@contextlib.contextmanager
def stopping() -> Iterator[Callable[[], bool]]:
    """Whether someone wants the program to stop, by Ctrl-C or as a batch system does; a second Ctrl-C is one."""
    asked = False

    def ask(signum: int, frame: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    # Not an exception out of nowhere: the processes of a pool do not survive it in order.
    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _open(path: Path) -> Store:
    """The store, with what it warns of told to people: without the line of source that Python adds."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        store = Store.from_parquet(path) if path.suffix == Path(PARQUET).suffix else Store(path)
    for warning in caught:
        _warn(str(warning.message))
    return store


def _warn(text: str) -> None:
    errors.print(Text.assemble(("Warning: ", "yellow"), text), soft_wrap=True)


def _study(store: Store) -> Study:
    if store.study is None:
        raise UnfitStore(f"{store.folder} holds no study: begin one with `python -m benchmarks run`")
    return store.study


def _report(store: Store, folder: Path) -> None:
    for versions in mixed(store.environments):
        _warn(f"the runs of {folder} were made with more than one version: {versions}")
    results = collect(store)
    path = report.write(results, folder)
    console.print()
    _say(f"Study {results.study.name}", results.study.purpose)
    for table in terminal(results, console.width):
        console.print(table)
    for finding in report.findings(results):
        console.print()
        _say(finding.title, finding.text)
    console.print()
    _say_where("The report", path)


def _say_where(what: str, path: Path) -> None:
    console.print(f"{what}: {path.resolve().as_uri()}", soft_wrap=True)


def _say(title: str, text: str) -> None:
    # Rich would break lines at no-break spaces, and paths at hyphens.
    bold = f"{title}." if title else ""
    lines = textwrap.fill(f"{bold} {text}".strip(), console.width, break_long_words=False, break_on_hyphens=False)
    said = Text(lines)
    said.stylize("bold", 0, len(bold))
    console.print(said, soft_wrap=True)
