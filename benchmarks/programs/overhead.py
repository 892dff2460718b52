"""What a GeometryMonitor costs: training steps of the digits MLP with and without it, side by side in one process."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable
from statistics import median

import torch
from pydantic import BaseModel, ConfigDict
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

import normopt
from benchmarks.progress import Advance
from benchmarks.speed.measure import Entrant, Step, repeat, take_turns, threads_set
from benchmarks.speed.records import Machine, machine, ratio
from benchmarks.tasks import TASKS
from normopt.diagnostics.geometry import GeometryMonitor

DEFAULT_EVERY = int(inspect.signature(GeometryMonitor).parameters["every"].default)
EVERY = (DEFAULT_EVERY, 1)
BLOCK = DEFAULT_EVERY  # steps that are timed as one: a whole interval, so that each has its share of rows
ROUNDS = 60
BATCH = 64
MAKERS: dict[str, Callable[[list[torch.nn.Parameter]], Optimizer]] = {
    "normopt SGD, momentum": lambda params: normopt.SGD(params, lr=0.01, momentum=0.9),
    "normopt LPSGDM, p = 8": lambda params: normopt.LPSGDM(params, lr=1e-4),
    "normopt dual ℓp, p = 3": lambda params: normopt.SteepestDescent(params, lr=1e-4, norm="lp", p=3.0),
    "torch AdamW": lambda params: torch.optim.AdamW(params, lr=1e-4),
}


class Cost(BaseModel):
    """One optimizer under a monitor of one interval: how much longer its steps take, as a fraction."""

    model_config = ConfigDict(extra="forbid")

    optimizer: str
    every: int
    microseconds: float  # of a bare step, the median of the processor's time
    median: float
    low: float
    high: float


class Overhead(BaseModel):
    """The whole measurement."""

    model_config = ConfigDict(extra="forbid")

    machine: Machine
    rounds: int
    block: int
    batch: int
    default: int
    costs: list[Cost]


def step_of(make: Callable[[list[torch.nn.Parameter]], Optimizer], every: int | None) -> Callable[[], None]:
    """A training step: forward, backward and the optimizer's, under a monitor if there is an interval."""
    torch.manual_seed(0)
    model = TASKS["digits"].build()
    optimizer = make(list(model.parameters()))
    if every is not None:
        GeometryMonitor(optimizer, every=every)  # kept alive by the optimizer's hooks
    x, y = (part[:BATCH] for part in TASKS["digits"].load().train)

    def step() -> None:
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step


def busy(step: Step) -> float:
    """Seconds of the processor's time, which other programs on the machine disturb less than the clock."""
    began = time.process_time()
    step()
    return time.process_time() - began


def count() -> int:
    """How many optimizers there are."""
    return len(MAKERS)


def measure(advance: Advance) -> Overhead:
    """Time everything, on one thread; ``advance`` is told of each optimizer."""
    costs = []
    with threads_set(1):
        for name, make in MAKERS.items():
            entrants = [Entrant(name, str(every), step_of(make, every), 0, 0.0, BLOCK) for every in (None, *EVERY)]
            for entrant in entrants:
                repeat(entrant.step, BLOCK)
            take_turns(entrants, ROUNDS, busy)
            bare = entrants[0].entry()
            for every, entrant in zip(EVERY, entrants[1:], strict=True):
                found = ratio(entrant.entry(), bare)
                low, high = found.interval or (found.median, found.median)
                costs.append(
                    Cost(
                        optimizer=name,
                        every=every,
                        microseconds=round(1e6 * median(bare.seconds), 1),
                        median=round(found.median - 1, 4),
                        low=round(low - 1, 4),
                        high=round(high - 1, 4),
                    )
                )
            advance("overhead", 1)
    here = machine(torch.device("cpu"), (), None)
    return Overhead(machine=here, rounds=ROUNDS, block=BLOCK, batch=BATCH, default=DEFAULT_EVERY, costs=costs)


def lines(result: Overhead) -> list[str]:
    """A line for each optimizer and interval."""
    return [
        f"{c.optimizer}, every {c.every}: {100 * c.median:+.1f} % ({100 * c.low:+.1f} to {100 * c.high:+.1f}) "
        f"of a step of {c.microseconds:.0f} µs"
        for c in result.costs
    ]
