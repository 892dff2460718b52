"""Steps timed side by side: every round gives each entrant a turn, in another order."""

from __future__ import annotations

import gc
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile

from benchmarks.speed.candidates import COMPILED, LR, Candidate
from benchmarks.speed.limit import STREAMS, limit
from benchmarks.speed.models import MATRICES, Model, Tensors
from benchmarks.speed.records import DIGITS, Case, Entry

Step = Callable[[], object]
Clock = Callable[[Step], float]

WARM = 3  # steps before the first round, the first of which compiles
TURN = 5e-3  # seconds that a turn on a CPU fills with steps, so that what other entrants left is not most of it
LAUNCH = re.compile(r"cu(da)?(LaunchKernel|LaunchCooperativeKernel|GraphLaunch|Memcpy|Memset)\w*")


@dataclass
class Entrant:
    """A step to be timed, the number of steps in a turn, and the entry that stores the time per step of each round."""

    entry: Entry
    step: Step
    times: int = 1


def measure(
    model: Model,
    candidates: Sequence[Candidate],
    *,
    rounds: int,
    dtype: torch.dtype,
    device: torch.device,
    threads: int = 1,
    fresh: bool = False,
    part: str = "limits",
    group: str = "",
) -> Case:
    """One case: the candidates' steps of one model, the first of which is the reference.

    Where limits are measured, but for matrices, the limit comes before them. A candidate that fails is told of and left
    out; the reference must not.

    Args:
        model: what is stepped.
        candidates: who steps it.
        rounds: how often each of them is timed.
        dtype, device: the weights'.
        threads: of the CPU.
        fresh: the gradients are new tensors in every turn, made outside of what is timed.
        part, group: as of a `Case`.
    """
    clock = clock_of(device)
    entrants: list[Entrant] = []
    failed: dict[str, str] = {}
    with threads_set(threads):
        tensors = Tensors(model, dtype, device)
        least = limit(tensors) if part == "limits" and model.name != MATRICES else None

        def before() -> None:
            if fresh:
                tensors.renew()
                if least is not None:
                    least.refresh()

        if least is not None:
            entry = Entry(optimizer="limit", backend=least.name, streams=STREAMS, first=clock(least.step))
            entrants.append(Entrant(entry, least.step))
        for candidate in candidates:
            try:
                one = warmed(candidate, tensors.weights, clock, before, tensors.adopt)
                if not tensors.intact:
                    tensors.renew()
                    raise ValueError("its step takes the gradients away or changes them, and the next finds others")
                entrants.append(one)
            except Exception as error:
                if not entrants:
                    raise
                failed[candidate.name] = told(error)
                continue
            if device.type != "cuda":
                continue
            one.entry = one.entry.model_copy(update={"launches": launches(one.step)})
            if candidate.to_capture is not None and not fresh:  # a graph reads where gradients were
                try:
                    entrants.append(captured(candidate, tensors, clock))
                except Exception as error:
                    failed[f"{candidate.name}, graph"] = told(error)

        if device.type == "cpu" and not fresh:
            for entrant in entrants:
                entrant.times = max(1, round(TURN / min(clock(entrant.step) for _ in range(WARM))))
        take_turns(entrants, rounds, clock, before)
    return case_of(model, entrants, failed, dtype, device, part=part, group=group, threads=threads, fresh=fresh)


def case_of(
    model: Model,
    entrants: Iterable[Entrant],
    failed: dict[str, str],
    dtype: torch.dtype,
    device: torch.device,
    **about: Any,
) -> Case:
    """The case of entrants that have had their turns, and of those that failed."""
    return Case(
        model=model.name,
        tensors=model.tensors,
        parameters=model.parameters,
        dtype=str(dtype).removeprefix("torch."),
        device=device.type,
        entries=[entrant.entry for entrant in entrants],
        failed=failed,
        **about,
    )


def take_turns(
    entrants: Sequence[Entrant], rounds: int, clock: Clock, before: Callable[[], None] = lambda: None
) -> None:
    """Time every entrant's turn in each round.

    Each round begins with the next entrant and goes around by another stride, so that nobody always finds the cache
    that the same one has left.

    Args:
        entrants: take the times.
        rounds: how many.
        clock: times a step.
        before: called before each turn.
    """
    n = len(entrants)
    strides = [s for s in range(1, n) if math.gcd(s, n) == 1] or [1]
    gc.collect()
    collects = gc.isenabled()
    gc.disable()
    try:
        for r in range(rounds):
            stride = strides[r % len(strides)]
            for turn in range(n):
                before()
                entrant = entrants[(r + turn * stride) % n]
                seconds = clock(partial(repeat, entrant.step, entrant.times)) / entrant.times
                entrant.entry.seconds.append(round(seconds, DIGITS))
    finally:
        if collects:
            gc.enable()


def repeat(step: Step, times: int) -> None:
    """So many steps."""
    for _ in range(times):
        step()


def warmed(
    candidate: Candidate,
    weights: Sequence[Tensor],
    clock: Clock,
    before: Callable[[], None],
    adopt: Callable[[Optimizer], None] = lambda optimizer: None,
) -> Entrant:
    """A candidate that has compiled what it compiles.

    Args:
        candidate, weights: who steps what.
        clock: times the first step.
        before: called before each step, and after the last.
        adopt: takes the optimizer when it has its state.
    """
    optimizer = candidate.make(weights)
    step: Step = torch.compile(lambda: optimizer.step()) if candidate.backend == COMPILED else optimizer.step
    if candidate.orders is not None:
        step = scheduled(optimizer, candidate.orders)
    before()
    first = clock(step)
    adopt(optimizer)
    for _ in range(WARM - 1):
        before()
        step()
    before()
    return Entrant(candidate.entry(first), step)


def scheduled(optimizer: Optimizer, orders: Sequence[float]) -> Step:
    """A step before which lr changes, and p if there are orders for it, as schedulers do."""
    rates, order = cycle([LR * (1 + i / 10) for i in range(7)]), cycle(orders)

    def step() -> None:
        change = {"lr": next(rates)} | ({"p": next(order)} if orders else {})
        for group in optimizer.param_groups:
            group.update(change)
        optimizer.step()

    return step


def captured(candidate: Candidate, tensors: Tensors, clock: Clock) -> Entrant:
    """A candidate whose step is replayed as one CUDA graph; its first step is the capture."""
    optimizer = candidate.make(tensors.weights, **(candidate.to_capture or {}))
    optimizer.step()
    tensors.adopt(optimizer)
    began = time.perf_counter()
    graph = graph_of(optimizer.step)
    first = time.perf_counter() - began
    for _ in range(WARM):
        clock(graph.replay)
    about = {"backend": f"{candidate.backend}, graph", "launches": launches(graph.replay)}
    return Entrant(candidate.entry(first).model_copy(update=about), graph.replay)


def graph_of(step: Step) -> Any:
    """A step captured as torch asks for it: after a few on a stream of its own."""
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def clock_of(device: torch.device) -> Clock:
    """What times a step on a device."""
    return on_cuda if device.type == "cuda" else on_cpu


def on_cpu(step: Step) -> float:
    """Seconds of a step."""
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def on_cuda(step: Step) -> float:
    """Seconds from an idle device to the end of the step's last kernel: what the host takes is in it."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    begin.record()
    step()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end)) / 1000


def launches(step: Step) -> int:
    """How many kernels, copies, fills and graphs a step gives to a CUDA device: the calls that do."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    with profile(activities=activities) as seen:
        step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    return sum(bool(LAUNCH.fullmatch(e.name)) for e in seen.events() or ())


def copied(device: torch.device, size: int = 1 << 30, times: int = 10) -> float:
    """Bytes per second that copies of a large tensor on the device read and write: the best of a few."""
    clock = clock_of(device)
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / min(clock(lambda: target.copy_(source)) for _ in range(times))


@contextmanager
def threads_set(n: int) -> Iterator[None]:
    """torch's threads, for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def told(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}".removesuffix(": ")
