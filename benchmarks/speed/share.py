"""How much of a whole training step an optimizer's own is: small models, forward and backward beside the step."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from benchmarks.speed.candidates import Candidate
from benchmarks.speed.measure import Entrant, case_of, clock_of, take_turns, threads_set, told, warmed
from benchmarks.speed.models import Model
from benchmarks.speed.records import Case, Entry, Ratio, ratio
from benchmarks.tasks import TASKS

TRAININGS = ("digits", "digits-cnn")  # tasks: the MLP and the convolutional network
WHOLE = "forward and backward"


def share(
    name: str, candidates: Sequence[Candidate], *, rounds: int, device: torch.device, threads: int, dtype: torch.dtype
) -> Case:
    """Times of candidates' steps of a task's model, whose reference is forward and backward for a batch of the task."""
    task = TASKS[name]
    torch.manual_seed(0)
    model = task.build().to(device, dtype)
    inputs, targets = (part[: task.batch_size].to(device) for part in task.load().train)
    inputs = inputs.to(dtype)
    parameters = list(model.parameters())

    def back() -> None:
        model.zero_grad()
        torch.nn.functional.cross_entropy(model(inputs), targets).backward()  # type: ignore[no-untyped-call]

    clock = clock_of(device)
    failed = {}
    with threads_set(threads):
        whole = Entry(optimizer=WHOLE, backend="", streams=0, first=clock(back))
        entrants = [Entrant(whole, back)]
        for candidate in candidates:
            try:
                entrants.append(warmed(candidate, parameters, clock, back))
            except Exception as error:
                failed[candidate.name] = told(error)
        take_turns(entrants, rounds, clock, back)
    shapes = tuple(tuple(p.shape) for p in parameters)
    return case_of(Model(name, shapes), entrants, failed, dtype, device, part="share", threads=threads, fresh=True)


def percent(case: Case, entry: Entry) -> Ratio:
    """Of the whole step, how many hundredths an entry's step is: r/(1 + r) of its ratio r to forward and backward."""

    def of(r: float) -> float:
        return 100 * r / (1 + r)

    r = ratio(entry, case.reference)
    return Ratio(of(r.median), r.interval and (of(r.interval[0]), of(r.interval[1])))
