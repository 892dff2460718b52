"""What a run found, for people: tables in the terminal, in Markdown, and as a page of the docs. No figure is typed."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from benchmarks.speed import plot
from benchmarks.speed.asked import lines
from benchmarks.speed.measure import TURN
from benchmarks.speed.records import Case, Entry, Machine, Results, quartiles, ratio

JSON, MARKDOWN = "speed.json", "speed.md"
WIDE = 110  # characters of a terminal that shows all columns
HOW = """\
All steps of a case are timed in one run: every round gives each of them a turn, in another order, on the same
weights, gradients and buffers of state. {turn} Times are medians over {rounds} rounds, with the quartiles in
brackets. A ratio is made in every round by itself, to the reference measured in that round; shown are the median of
those ratios and, in brackets, its 95 % interval (order statistics). The reference is the limit{where}; of matrices it
is torch's Muon. Bytes are what the rule has to read and write of each parameter at least: its weight, gradient and
state; GB/s count them. The first step, in which kernels are
compiled or read from a cache, is outside of all that, and two more are; it is the last column."""
TURNS = {
    "cpu": f"A turn is a step, or as many as take {1000 * TURN:g} ms; where gradients are fresh it is one.",
    "cuda": "A turn is one step, from an idle device.",
}
LIMITS = {
    "cpu": ", an in-place loop that reads w, g and m and writes w and m on the same threads",
    "cuda": ", a copy on the device of as many bytes as reading w, g and m and writing w and m",
}


@dataclass(frozen=True)
class Column:
    """A title and an entry's text under it."""

    title: str
    cell: Callable[[Case, Entry], str]
    left: bool = False
    wide: bool = False  # a narrow terminal does without it


def columns(case: Case) -> list[Column]:
    """The columns of a case's table."""
    found = [
        Column("optimizer", lambda case, e: e.optimizer, left=True),
        Column("backend", lambda case, e: e.backend, left=True),
        Column("ms", lambda case, e: "{1} ({0}–{2})".format(*(digits(1000 * q) for q in quartiles(e)))),
        Column(
            f"× {case.reference.optimizer}",
            lambda case, e: "1" if e is case.reference else str(ratio(e, case.reference)),
        ),
        Column("bytes", lambda case, e: f"{case.moved(e):g}" if e.streams else "", wide=True),
        Column("GB/s", lambda case, e: digits(case.bandwidth(e) / 1e9) if e.streams else "", wide=True),
        Column("first s", lambda case, e: f"{e.first:.2f}", wide=True),
    ]
    launches = Column("launches", lambda case, e: "" if e.launches is None else str(e.launches))
    return [*found, launches] if case.device == "cuda" else found


def terminal(case: Case, width: int) -> Table:
    """A case's table for a terminal that is so many characters wide."""
    shown = [c for c in columns(case) if not c.wide or width >= WIDE]
    rows = [[c.cell(case, e) for c in shown] for e in case.entries]
    return _terminal([(c.title, c.left) for c in shown], rows, f"{case.title}: {size(case)}")


def promises(results: Results) -> Table | None:
    """What was asked, measured and met, for a terminal; None if nothing of it was run."""
    rows = [[line.what, line.asked, line.measured, line.met] for line in lines(results)]
    return _terminal([(title, True) for title in ASKED], rows, "What was asked") if rows else None


ASKED = ("step", "asked", "measured", "met")
UNCERTAIN = "Met or not is said by the median; it is uncertain if the bound lies within the interval."


def _terminal(titles: Sequence[tuple[str, bool]], rows: Iterable[Sequence[str]], title: str) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left", title_style="bold")
    for name, left in titles:
        table.add_column(name, justify="left" if left else "right")
    for row in rows:
        table.add_row(*row)
    return table


def digits(x: float) -> str:
    """A positive number with three digits: 0.0123, 18.0, 1,680."""
    return f"{x:,.{max(0, 2 - math.floor(math.log10(x)))}f}" if x else "0"


def size(case: Case) -> str:
    """How large the model is, and in what dtype."""
    return f"{case.tensors:,} tensor{'' if case.tensors == 1 else 's'}, {case.parameters:,} parameters, {case.dtype}"


def described(machine: Machine) -> str:
    """The machine in a sentence."""
    packages = ", ".join(f"{name} {number}" for name, number in machine.packages.items())
    copied = f", which copies at {machine.copied / 1e9:.0f} GB/s" if machine.copied else ""
    device = "" if machine.device == "cpu" else f", and {machine.device}{copied}"
    cores = f"{machine.cores} core{'' if machine.cores == 1 else 's'}"
    return f"{machine.cpu} ({cores}){device}; {machine.system}, Python {machine.python}, {packages}."


def told(results: Results) -> list[str]:
    """What is not in the tables, in a line each: absent peers, models too large, candidates that failed."""
    found = [f"Not installed, and so not measured: {', '.join(results.absent)}."] if results.absent else []
    found += [f"Too large for the memory that was free: {', '.join(results.too_large)}."] if results.too_large else []
    return [*found, *(line for case in results.cases for line in failures(case))]


def failures(case: Case) -> list[str]:
    """Which candidates failed, and why."""
    return [f"{case.title}: {name} failed: {why}" for name, why in case.failed.items()]


def markdown(results: Results, pictures: Sequence[str]) -> str:
    """Everything, as Markdown, with the pictures at these addresses."""
    device = results.cases[0].device if results.cases else "cpu"
    how = textwrap.fill(HOW.format(rounds=results.rounds, where=LIMITS[device], turn=TURNS[device]), 120)
    parts = ["# Speed", described(results.machine), how]
    parts += told(results)
    promised = lines(results)
    if promised:
        rows = [[line.what, line.asked, line.measured, line.met] for line in promised]
        parts += ["## What was asked", UNCERTAIN, _table([(title, True) for title in ASKED], rows)]
    parts += [f"![Times of steps: {Path(address).stem.removeprefix('speed-')}]({address})" for address in pictures]
    for case in results.cases:
        shown = columns(case)
        rows = [[c.cell(case, e) for c in shown] for e in case.entries]
        parts += [f"## {case.title}", f"{size(case)}.", _table([(c.title, c.left) for c in shown], rows)]
    return "\n\n".join(parts) + "\n"


def _table(titles: Sequence[tuple[str, bool]], rows: Iterable[Sequence[str]]) -> str:
    head = ["| " + " | ".join(name for name, _ in titles) + " |"]
    head += ["|" + "|".join(":--" if left else "--:" for _, left in titles) + "|"]
    return "\n".join(head + ["| " + " | ".join(row) + " |" for row in rows])


def write(results: Results, folder: Path) -> Path:
    """Write speed.json, speed.md and the pictures into the folder; where the Markdown is."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / JSON).write_text(results.model_dump_json(), encoding="utf-8")
    return _write(results, folder / MARKDOWN, folder)


def page(results: Results, path: Path) -> Path:
    """Write a page of the docs, and its pictures into the folder ``assets`` beside it."""
    return _write(results, path, path.parent / "assets")


def read(folder: Path) -> Results:
    """What `write` wrote."""
    return Results.model_validate_json((folder / JSON).read_text(encoding="utf-8"))


def _write(results: Results, path: Path, pictures: Path) -> Path:
    pictures.mkdir(parents=True, exist_ok=True)
    addresses = []
    for name, svg in plot.pictures(results).items():
        (pictures / f"speed-{name}.svg").write_text(svg, encoding="utf-8")
        addresses.append((pictures / f"speed-{name}.svg").relative_to(path.parent).as_posix())
    path.write_text(markdown(results, addresses), encoding="utf-8")
    return path
