"""One run: a spec → a record. Knows nothing of studies, files or other runs."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from benchmarks.arms import make_optimizer
from benchmarks.spec import RunSpec
from benchmarks.tasks import TASKS
from normopt.schedules import AdaptiveP

ZERO = 1e-13  # the count of exact zeros of arXiv:2404.10824


class Epoch(BaseModel):
    """How a run stood at the end of an epoch; p is that of its first step, None where it is none to set."""

    model_config = ConfigDict(extra="forbid")

    steps: int
    train_loss: float
    validation_loss: float
    validation_accuracy: float
    p: float | None


class RunRecord(BaseModel):
    """What came out of a run. A run that diverged has its finite epochs, no test result, and says so."""

    model_config = ConfigDict(extra="forbid")

    id: str
    spec: RunSpec
    epochs: list[Epoch]
    diverged: bool
    test_loss: float | None
    test_accuracy: float | None
    zero_fraction: float | None
    steps_to_target: int | None
    state_bytes: int
    ms_per_step: float  # of the processor's time, which other programs on the machine disturb less than the clock
    seconds: float


def run(spec: RunSpec) -> RunRecord:
    """Train and measure one run, on one thread.

    The model is drawn from the seed, and the batches from a generator of their own with the same
    seed, so that runs with equal seeds start from the same weights and see the same batches,
    whatever their optimizer does.
    """
    # More threads than one per worker only fight each other: a small run takes 20 times as long.
    torch.set_num_threads(1)
    began = time.perf_counter()
    task = TASKS[spec.task]
    splits = task.load()
    torch.manual_seed(spec.seed)
    model = task.build()
    batches = torch.Generator().manual_seed(spec.seed)
    optimizer, p_schedule = make_optimizer(spec, model, task.residual_depth)
    drawn = splits.per_epoch or len(splits.train[0])
    per_epoch = math.ceil(drawn / spec.batch_size)
    lr_schedule = CosineAnnealingLR(optimizer, spec.epochs * per_epoch)
    by_the_step: list[CosineAnnealingLR | AdaptiveP] = [lr_schedule]
    if isinstance(p_schedule, AdaptiveP):
        by_the_step.append(p_schedule)

    history: list[Epoch] = []
    busy, steps, diverged = 0.0, 0, False
    for _ in range(spec.epochs):
        p = _finite_p(optimizer)
        start = time.process_time()
        train_loss = _train_epoch(model, optimizer, by_the_step, splits.train, drawn, spec.batch_size, batches)
        busy += time.process_time() - start
        steps += per_epoch
        if p_schedule is not None and p_schedule not in by_the_step:
            p_schedule.step()
        loss, accuracy = evaluate(model, splits.validation)
        diverged = not (math.isfinite(train_loss) and math.isfinite(loss))
        if diverged:
            break
        history.append(
            Epoch(steps=steps, train_loss=train_loss, validation_loss=loss, validation_accuracy=accuracy, p=p)
        )
    test_loss, test_accuracy = evaluate(model, splits.test)
    diverged = diverged or not math.isfinite(test_loss)
    return RunRecord(
        id=spec.run_id,
        spec=spec,
        epochs=history,
        diverged=diverged,
        test_loss=None if diverged else test_loss,
        test_accuracy=None if diverged else test_accuracy,
        zero_fraction=None if diverged else zero_fraction(model),
        steps_to_target=next((e.steps for e in history if e.validation_accuracy >= spec.target), None),
        state_bytes=_state_bytes(optimizer),
        ms_per_step=1000 * busy / steps,
        seconds=time.perf_counter() - began,
    )


def _train_epoch(
    model: nn.Module,
    optimizer: Optimizer,
    schedules: Sequence[CosineAnnealingLR | AdaptiveP],
    data: tuple[Tensor, Tensor],
    drawn: int,
    batch_size: int,
    batches: torch.Generator,
) -> float:
    """One pass over so many of the examples, drawn anew and in a new order; the mean loss over it."""
    x, y = data
    total = torch.zeros(())
    for chosen in torch.split(torch.randperm(len(x), generator=batches)[:drawn], batch_size):
        optimizer.zero_grad()
        loss = mean_loss(model(x[chosen]), y[chosen])
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        for schedule in schedules:
            schedule.step()
        total += loss.detach() * len(chosen)
    return float(total) / drawn


def mean_loss(logits: Tensor, classes: Tensor) -> Tensor:
    """Cross-entropy over the last dim, whatever comes before it: a class an image, or a byte a place."""
    return cross_entropy(logits.flatten(0, -2), classes.flatten())


@torch.no_grad()
def evaluate(model: nn.Module, data: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Mean cross-entropy and accuracy."""
    x, y = data
    logits = model(x)
    return float(mean_loss(logits, y)), int((logits.argmax(-1) == y).sum()) / y.numel()


@torch.no_grad()
def zero_fraction(model: nn.Module) -> float:
    """The part of the weights that is exactly zero: |w| < 1e-13, over tensors of 2 dims or more."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    return sum(int((p.abs() < ZERO).sum()) for p in matrices) / sum(p.numel() for p in matrices)


def _finite_p(optimizer: Optimizer) -> float | None:
    """The p of the norm, None if there is none or it is infinite, which JSON cannot say."""
    p = optimizer.param_groups[0].get("p")
    return None if p is None or math.isinf(p) else float(p)


def _state_bytes(optimizer: Optimizer) -> int:
    values = (v for state in optimizer.state.values() for v in state.values())
    return sum(v.numel() * v.element_size() for v in values if isinstance(v, Tensor))
