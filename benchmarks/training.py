"""One run: a spec → a record. Knows nothing of studies, files or other runs."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler

from benchmarks.optimizers import make_optimizer, prune
from benchmarks.study.record import Point, RunRecord
from benchmarks.study.spec import LRSchedule, RunSpec
from benchmarks.tasks import TASKS, Splits, Task
from normopt._checks import near
from normopt.diagnostics import Trajectory, TrajectoryMonitor
from normopt.schedules import PSchedule

AT_ONCE = 512  # examples that are evaluated together


def run(spec: RunSpec) -> RunRecord:
    """Train and measure one run, on one thread.

    The model is drawn from the seed, and the batches from a generator of their own with the same seed, so that runs
    with equal seeds start from the same weights and see the same batches, whatever their optimizer does. The learning
    rate moves with every step; p moves once an epoch, but an adaptive p with every step, as it
    reads the gradient: what is recorded is the p that an epoch begins with. A loss that is not finite ends the run:
    that is a result too.

    Raises:
        ValueError: an unknown task, optimizer or setting.
        FileNotFoundError: the task's data are not on this machine; the message says where they are looked for.
    """
    # More threads than one per worker only fight each other: a small run takes 20 times as long.
    torch.set_num_threads(1)
    began = time.perf_counter()
    if spec.task not in TASKS:
        raise ValueError(f"unknown task {spec.task!r}{near(spec.task, TASKS)} (known: {', '.join(TASKS)})")
    task = TASKS[spec.task]
    splits = task.load()
    torch.manual_seed(spec.seed)
    model = task.build().to(splits.device)
    batches = torch.Generator().manual_seed(spec.seed)
    optimizer, p_schedule = make_optimizer(spec, model, task)
    drawn = splits.per_epoch or len(splits.train[0])
    per_epoch = math.ceil(drawn / spec.batch_size)
    total = spec.epochs * per_epoch
    lr_schedule = make_lr_schedule(spec.lr_schedule, optimizer, total)
    prune(spec, optimizer, model, total)
    adaptive = spec.p_schedule is not None and spec.p_schedule.kind == "adaptive"
    each_step: list[LRScheduler | PSchedule] = [lr_schedule, *([p_schedule] if p_schedule and adaptive else [])]

    monitor = TrajectoryMonitor(optimizer) if task.trajectory else None
    curve: list[Point] = []
    busy, steps, diverged = 0.0, 0, False
    for _ in range(spec.epochs):
        p = _finite_p(optimizer)
        start = time.process_time()
        train_loss = _train_epoch(model, task, splits, drawn, spec.batch_size, batches, optimizer, each_step, monitor)
        busy += time.process_time() - start
        steps += per_epoch
        loss, score = evaluate(model, task, splits, splits.validation)
        diverged = not all(map(math.isfinite, (train_loss, loss, score)))
        if diverged:
            break
        curve.append(Point(steps=steps, train_loss=train_loss, validation_loss=loss, score=score, p=p))
        if p_schedule is not None and not adaptive:
            p_schedule.step()
    regularity = {} if monitor is None or diverged else regularity_of(monitor.result())
    test_loss, test_score = evaluate(model, task, splits, splits.test)
    diverged = diverged or not (math.isfinite(test_loss) and math.isfinite(test_score))
    return RunRecord(
        id=spec.run_id,
        spec=spec,
        curve=curve,
        diverged=diverged,
        test_loss=None if diverged else test_loss,
        test_score=None if diverged else test_score,
        measures={} if diverged else {"zeros": zero_fraction(model), **regularity, **task.measures(model)},
        state_bytes=_state_bytes(optimizer),
        ms_per_step=1000 * busy / steps,
        seconds=time.perf_counter() - began,
    )


def make_lr_schedule(plan: LRSchedule, optimizer: Optimizer, steps: int) -> LRScheduler:
    """Return the schedule of a run of so many steps, to be stepped after each of them."""
    if plan == LRSchedule():
        return CosineAnnealingLR(optimizer, steps)  # whose rounding is that of the stored runs
    return LambdaLR(optimizer, lambda step: plan.factor(step, steps))


def _train_epoch(
    model: nn.Module,
    task: Task,
    splits: Splits,
    drawn: int,
    batch_size: int,
    batches: torch.Generator,
    optimizer: Optimizer,
    schedules: Sequence[LRScheduler | PSchedule],
    monitor: TrajectoryMonitor | None,
) -> float:
    """One pass over so many of the examples, drawn anew and in a new order; the mean loss over it.

    NaN where the weights are past what a matrix decomposition can take, which then raises.
    """
    x, y = splits.train
    model.train()
    total = torch.zeros((), device=splits.device)
    for chosen in torch.split(torch.randperm(len(x), generator=batches)[:drawn], batch_size):
        optimizer.zero_grad()
        inputs = splits.fetch(x[chosen], batches).to(splits.device)
        loss = task.loss(model(inputs), y[chosen].to(splits.device))
        loss.backward()  # type: ignore[no-untyped-call]
        try:
            optimizer.step()
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            if _finite(model):
                raise
            return math.nan
        if monitor is not None:
            monitor.record(loss)
        for schedule in schedules:
            schedule.step()
        total += loss.detach() * len(chosen)
    return float(total) / drawn


@torch.no_grad()
def evaluate(model: nn.Module, task: Task, splits: Splits, data: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """The mean loss and the score on a part of the data."""
    model.eval()
    x, y = data
    parts = [model(splits.fetch(chosen, None).to(splits.device)) for chosen in torch.split(x, AT_ONCE)]
    outputs, targets = torch.cat(parts), y.to(splits.device)
    loss = float(task.loss(outputs, targets))
    return loss, task.score(outputs, targets) if math.isfinite(loss) else math.nan


@torch.no_grad()
def zero_fraction(model: nn.Module) -> float:
    """Return the share of the weights that is exactly 0, over tensors of 2 dims or more."""
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    return sum(int((p == 0).sum()) for p in matrices) / sum(p.numel() for p in matrices)


def regularity_of(found: Trajectory) -> dict[str, float]:
    """Return the measures of a trajectory that its page compares, those of them that are finite."""
    gamma = found.gamma[found.valid]
    measures = {
        "median cosine": float(np.nanmedian(found.cosine)),
        "straightness": found.straightness,
        "min γ": float(gamma.min()) if gamma.size else math.nan,
        "negative γ": float((gamma < 0).mean()) if gamma.size else math.nan,
    }
    return {name: value for name, value in measures.items() if math.isfinite(value)}


def _finite(model: nn.Module) -> bool:
    tensors = (t for p in model.parameters() for t in (p, p.grad) if t is not None)
    return all(bool(t.isfinite().all()) for t in tensors)


def _finite_p(optimizer: Optimizer) -> float | None:
    """The p of the norm, None if there is none or it is infinite, which JSON cannot say."""
    p: Any = optimizer.param_groups[0].get("p")
    return None if p is None or math.isinf(p) else float(p)


def _state_bytes(optimizer: Optimizer) -> int:
    values = (v for state in optimizer.state.values() for v in state.values())
    return sum(v.numel() * v.element_size() for v in values if isinstance(v, Tensor))
