"""A run of the speed program: every case that is asked for, told as it is done, and written as it goes."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from itertools import product
from pathlib import Path

import torch
from rich.table import Table

from benchmarks.speed import report
from benchmarks.speed.candidates import PEERS, absent, candidates
from benchmarks.speed.measure import copied, measure
from benchmarks.speed.models import MATRICES, MODELS, SWEEP, TINY, fits
from benchmarks.speed.records import Results, machine
from benchmarks.speed.startup import RULES, startup

DEFAULT = ("resnet18", TINY, MATRICES)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Tell = Callable[[str | Table], None]


def run(
    models: Sequence[str],
    out: Path,
    tell: Tell,
    *,
    width: int = report.WIDE,
    threads: Sequence[int] = (),
    rounds: int = 30,
    dtype: torch.dtype = torch.float32,
    device: torch.device,
    sweep: bool = False,
    compiled: bool = False,
    first_steps: bool = True,
) -> Results:
    """Measure, tell and write.

    Args:
        models: names of models.
        out: the folder of the results, which are written after every case.
        tell: shows a line or a table.
        width: of what shows it, in characters.
        threads: numbers of threads, on a CPU; by default 1, and all that there are.
        rounds: how often each step is timed.
        dtype, device: the weights'.
        sweep: measure how the cost grows too.
        compiled: have torch compile its own steps too, which takes minutes.
        first_steps: measure the first steps of fresh processes too.
    """
    counts = [1] if device.type == "cuda" else sorted({*(threads or (1, os.cpu_count() or 1))})
    wanted = [*(MODELS[name] for name in models), *(SWEEP if sweep else ())]
    large = [model for model in wanted if not fits(model, dtype, device)]
    found = Results(
        machine=machine(device, [*PEERS], copied(device) if device.type == "cuda" else None),
        rounds=rounds,
        absent=absent(),
        too_large=[model.name for model in large],
        startup=[startup(rule, device) for rule in RULES] if first_steps else [],
        cases=[],
    )
    for line in (report.described(found.machine), *report.told(found)):
        tell(line)
    for model, n, fresh in product((m for m in wanted if m not in large), counts, (False, True)):
        if fresh and model.name != TINY:
            continue
        who = candidates(model, compiled)
        tell(f"Timing {model.name}: {len(who)} candidates in {rounds} rounds.")
        case = measure(model, who, rounds=rounds, dtype=dtype, device=device, threads=n, fresh=fresh)
        found = found.model_copy(update={"cases": [*found.cases, case]})
        tell(report.terminal(case, width))
        for line in report.failures(case):
            tell(line)
        report.write(found, out)
    promises = report.promises(found)
    if promises is not None:
        tell(promises)
    return found
