"""What a run found beside the limits, for contributors: in the terminal and as a page. No figure is typed."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping

from benchmarks.grid import Grid
from benchmarks.speed.asked import lines
from benchmarks.speed.measure import TURN
from benchmarks.speed.records import Case, Entry, Machine, Results, quartiles, ratio

WIDE = 110  # characters of a terminal that shows all columns
HOW = """\
All steps of a case are timed in one run: in every round each of them has a turn, in another order, on the same weights,
gradients and state. {turn} Times are medians over {rounds} rounds, with the quartiles in brackets. A ratio is computed
in every round, to the reference measured in the same round; the table has the median of these ratios and, in brackets,
its 95 % interval (order statistics). The reference is the limit{where}; for matrices it is torch's Muon. The backend
"default" is another library's own. "Bytes" are the least that the rule must read and write for each parameter: its
weight, gradient and state; GB/s are computed from them. The last column is the first step, in which kernels are
compiled or read from a cache; it and two more steps are not in the times."""
TURNS = {
    "cpu": f"A turn is as many steps as take {1000 * TURN:g} ms, at least one; with fresh gradients it is one step.",
    "cuda": "A turn is one step, from an idle device.",
}
LIMITS = {
    "cpu": ", an in-place loop that reads w, g and m and writes w and m on the same threads",
    "cuda": ", a copy on the device of as many bytes as reading w, g and m and writing w and m",
}


def grid(case: Case, width: int = WIDE) -> Grid:
    """A case's table, without some of its columns where there are fewer than `WIDE` characters."""
    reference = case.reference
    columns: dict[str, Callable[[Entry], str]] = {
        "optimizer": lambda e: e.optimizer,
        "backend": lambda e: e.backend,
        "ms": lambda e: "{1} ({0}–{2})".format(*(digits(1000 * q) for q in quartiles(e))),
        f"× {reference.optimizer}": lambda e: "1" if e is reference else str(ratio(e, reference)),
    }
    if width >= WIDE:
        columns |= {
            "bytes": lambda e: f"{case.moved(e):g}" if e.streams else "",
            "GB/s": lambda e: digits(case.bandwidth(e) / 1e9) if e.streams else "",
            "first s": lambda e: f"{e.first:.2f}",
        }
    if case.device == "cuda":
        columns["launches"] = lambda e: "" if e.launches is None else str(e.launches)
    return Grid([*columns], [[cell(e) for cell in columns.values()] for e in case.entries], left=2)


def goals(results: Results) -> Grid:
    """Goals, what was measured and whether they are met, of what was run."""
    return Grid(("step", "goal", "measured", "met"), lines(results), left=4)


UNCERTAIN = "A goal is met if the median meets it; this is uncertain if the goal lies within the interval."


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
    """What is not in the tables, in a line each: absent peers and models too large."""
    found = [f"Not installed, and so not measured: {', '.join(results.absent)}."] if results.absent else []
    found += [f"Too large for the memory that was free: {', '.join(results.too_large)}."] if results.too_large else []
    return found


def failures(case: Case) -> list[str]:
    """Which candidates failed, and why."""
    return [f"{case.title}: {name} failed: {why}" for name, why in case.failed.items()]


def markdown(results: Results, pictures: Mapping[str, str]) -> str:
    """The contributors' page: goals and every case beside its limit, with pictures at these addresses."""
    cases = [case for case in results.cases if case.part == "limits"]
    device = cases[0].device if cases else "cpu"
    how = textwrap.fill(HOW.format(rounds=results.rounds, where=LIMITS[device], turn=TURNS[device]), 120)
    parts = ["# Limits of speed", described(results.machine), how]
    parts += [line for case in cases for line in failures(case)]
    if (promised := goals(results)).rows:
        parts += ["## Goals", UNCERTAIN, promised.markdown]
    parts += [f"![Times of steps: {name}]({at})" for name, at in pictures.items() if not name.startswith("by-")]
    for case in cases:
        parts += [f"## {case.title}", f"{size(case)}.", grid(case).markdown]
    return "\n\n".join(parts) + "\n"
