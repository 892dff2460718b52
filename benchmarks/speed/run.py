"""A run of the speed program: every case that is asked for, told as it is done, and written as it goes."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from benchmarks.grid import Grid
from benchmarks.speed import page, report
from benchmarks.speed.candidates import Candidate, candidates
from benchmarks.speed.measure import copied, measure, told
from benchmarks.speed.memory import held
from benchmarks.speed.models import MATRICES, MODELS, SWEEP, TINY, Model, fits
from benchmarks.speed.records import Results, machine
from benchmarks.speed.share import TRAININGS, share
from benchmarks.speed.startup import RULES, startup
from benchmarks.speed.typed import FAMILIES, MUON, PACKAGES, SWEPT, absent, installed, peers

PARTS = ("table", "growth", "memory", "share", "limits")
DEFAULT = {
    "table": ("mlp", "resnet18", "vit-s", "gpt2"),
    "memory": ("vit-s",),
    "limits": ("resnet18", TINY, MATRICES),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MOST = 30_000_000  # parameters of matrices that Muon steps: with GPT-2's, a step takes seconds
Tell = Callable[[str | Table], None]
Asked = tuple[Model, list[Candidate], dict[str, Any]]


def run(
    models: Sequence[str],
    out: Path,
    tell: Tell,
    *,
    width: int = report.WIDE,
    parts: Sequence[str] = (),
    threads: Sequence[int] = (),
    rounds: int = 30,
    dtype: torch.dtype = torch.float32,
    device: torch.device,
    compiled: bool = False,
) -> Results:
    """Measure, tell and write.

    Args:
        models: names of models; none are the default of each part.
        out: the folder of the results, which are written after every case.
        tell: shows a line or a table.
        width: of what shows it, in characters.
        parts: what is measured, of `PARTS`; by default all.
        threads: numbers of threads, on a CPU; by default 1, and all that there are. Users' parts take the most.
        rounds: how often each step is timed.
        dtype, device: the weights'.
        compiled: beside the limits, have torch compile its own steps too, which takes minutes.
    """
    parts = parts or PARTS
    counts = [1] if device.type == "cuda" else sorted({*(threads or (1, os.cpu_count() or 1))})
    wanted = {part: [MODELS[name] for name in models or DEFAULT.get(part, ())] for part in parts}
    if "growth" in wanted:
        wanted["growth"] = [*SWEEP]
    large = {m.name for those in wanted.values() for m in those if not fits(m, dtype, device)}
    found = Results(
        machine=machine(device, [*PACKAGES.values()], copied(device) if device.type == "cuda" else None),
        rounds=rounds,
        absent=absent(),
        too_large=sorted(large),
        startup=[startup(rule, device) for rule in RULES] if "limits" in parts else [],
        cases=[],
    )
    for line in (report.described(found.machine), *report.told(found)):
        tell(line)
    for model, who, how in asked(wanted, counts, compiled):
        if model.name in large:
            continue
        tell(f"Timing {model.name}: {len(who)} candidates in {rounds} rounds.")
        case = measure(model, who, rounds=rounds, dtype=dtype, device=device, **how)
        found.cases.append(case)
        tell(report.grid(case, width).terminal(f"{case.title}: {report.size(case)}"))
        for line in report.failures(case):
            tell(line)
        page.write(found, out)
    for model in (m for m in wanted.get("memory", ()) if m.name not in large):
        tell(f"Measuring the memory of {model.name}.")
        for stepped, candidate in ((m, c) for m, family in stepping(model) for c in installed(family)):
            try:
                found.held.append(held(stepped, candidate, dtype, device))
            except Exception as error:
                found.unheld[f"{candidate.optimizer}, {model.name}"] = told(error)
        page.write(found, out)
    for name in TRAININGS if "share" in parts else ():
        tell(f"Timing the training of {name} in {rounds} rounds.")
        who = [c for family in FAMILIES if family != MUON for c in installed(family)]
        case = share(name, who, rounds=rounds, dtype=dtype, device=device, threads=counts[-1])
        found.cases.append(case)
        page.write(found, out)
    for title, grid in summaries(found):
        tell(grid.terminal(title))
    return found


def summaries(results: Results) -> Iterator[tuple[str, Grid]]:
    """The tables over all cases, each with a title: what was not measured has none, and Markdown's marks are away."""
    for title, grid in (
        ("Goals", report.goals(results)),
        ("Memory", page.memory(results)),
        ("Percent of a training step", page.shares(results)),
        (page.slower(results).replace("`", ""), page.users(results)),
    ):
        if grid.rows:
            yield title, Grid(grid.titles, [[name.strip("`*"), *cells] for name, *cells in grid.rows], grid.left)


def stepping(model: Model) -> Iterator[tuple[Model, str]]:
    """What each family steps of a model: Muon the matrices alone, where they are most of it and not too many."""
    for family in FAMILIES:
        stepped = model.matrices if family == MUON else model
        if family != MUON or model.parameters / 2 < stepped.parameters <= MOST:
            yield stepped, family


def asked(wanted: Mapping[str, Sequence[Model]], counts: Sequence[int], compiled: bool) -> Iterator[Asked]:
    """The cases of the models of each part that are timed by themselves: a model, who steps it, and how."""
    users: dict[str, Any] = {"threads": counts[-1], "fresh": True}
    for model in wanted.get("table", ()):
        for stepped, family in stepping(model):
            yield stepped, [*installed(family)], users | {"part": "table", "group": family}
    for model in wanted.get("growth", ()):
        yield model, [typed.candidate() for typed in SWEPT], users | {"part": "growth", "group": model.sweep}
    for model, threads, fresh in product(wanted.get("limits", ()), counts, (False, True)):
        if not fresh or model.name == TINY:
            who = [*candidates(model, compiled), *(peers() if model.name != MATRICES else ())]
            yield model, who, {"threads": threads, "fresh": fresh}
