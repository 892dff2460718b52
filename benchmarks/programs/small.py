"""Eager steps of a small network, relative to torch.optim.SGD's, when a schedule changes lr and p before each step."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from statistics import median

import torch
from pydantic import BaseModel, ConfigDict
from torch.optim import Optimizer

import normopt
from benchmarks.programs.overhead import busy
from benchmarks.progress import Advance
from benchmarks.speed.measure import Entrant, repeat, take_turns, threads_set
from benchmarks.speed.records import Machine, machine, ratio

SHAPES = ((130, 64), (130,), (130, 130), (130,), (10, 130), (10,))
BLOCK = 20  # steps that are timed as one
ROUNDS = 200
TORCH = "torch SGD, momentum"
# The orders that p takes in turn; at 3 the power is a square root, which the time of a general power would hide.
MAKERS: dict[str, tuple[Callable[[list[torch.nn.Parameter]], Optimizer], tuple[float, ...]]] = {
    TORCH: (lambda params: torch.optim.SGD(params, lr=0.01, momentum=0.9), ()),
    "normopt SGD, momentum": (lambda params: normopt.SGD(params, lr=0.01, momentum=0.9), ()),
    "normopt Lion": (lambda params: normopt.Lion(params, lr=0.01), ()),
    "normopt LPSGDM, p = 3": (lambda params: normopt.LPSGDM(params, lr=0.01, p=3.0), (3.0,)),
    "normopt LPSGDM, p from 3.1 to 3.5": (lambda params: normopt.LPSGDM(params, p=3.1), (3.1, 3.2, 3.3, 3.4, 3.5)),
}


class Relative(BaseModel):
    """One optimizer's steps: their time, and how many times torch's that is."""

    model_config = ConfigDict(extra="forbid")

    optimizer: str
    microseconds: float
    median: float
    low: float
    high: float


class Small(BaseModel):
    """The whole measurement."""

    model_config = ConfigDict(extra="forbid")

    machine: Machine
    rounds: int
    block: int
    steps: list[Relative]


def step_of(make: Callable[[list[torch.nn.Parameter]], Optimizer], orders: tuple[float, ...]) -> Callable[[], None]:
    """Return a step before which lr changes, and p if there are orders for it."""
    torch.manual_seed(0)
    params = [torch.nn.Parameter(0.1 * torch.randn(shape)) for shape in SHAPES]
    for p in params:
        p.grad = torch.randn_like(p)
    optimizer = make(params)
    group = optimizer.param_groups[0]
    rates, order = itertools.cycle([0.01 + 1e-6 * i for i in range(7)]), itertools.cycle(orders)

    def step() -> None:
        group["lr"] = next(rates)
        if orders:
            group["p"] = next(order)
        optimizer.step()

    return step


def measure(rounds: int, advance: Advance) -> Small:
    """Time all in turns, on one thread; ``advance`` is told once."""
    with threads_set(1):
        entrants = [Entrant(name, "eager", step_of(*made), 0, 0.0, BLOCK) for name, made in MAKERS.items()]
        for entrant in entrants:
            repeat(entrant.step, BLOCK)
        take_turns(entrants, rounds, busy)
        base, steps = entrants[0].entry(), []
        for entrant in entrants:
            found = ratio(entrant.entry(), base)
            low, high = found.interval or (found.median, found.median)
            time = round(1e6 * median(entrant.seconds), 1)
            numbers = [round(x, 3) for x in (found.median, low, high)]
            kept = dict(zip(("median", "low", "high"), numbers, strict=True))
            steps.append(Relative(optimizer=entrant.optimizer, microseconds=time, **kept))
        advance("small", 1)
    return Small(machine=machine(torch.device("cpu"), (), None), rounds=rounds, block=BLOCK, steps=steps)


def lines(result: Small) -> list[str]:
    """A line for each optimizer."""
    return [
        f"{s.optimizer}: {s.microseconds:.0f} µs, {s.median:.2f} times torch's ({s.low:.2f} to {s.high:.2f})"
        for s in result.steps
    ]
