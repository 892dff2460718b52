"""One run: a spec → a record. Knows nothing of studies or other runs."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, LRScheduler

from benchmarks.checkpoint import EVERY, Checkpoint
from benchmarks.environment import here
from benchmarks.optimizers import make_optimizer, prune
from benchmarks.study.record import Point, RunRecord
from benchmarks.study.spec import LRSchedule, RunSpec
from benchmarks.tasks import TASKS, Splits, Task
from normopt._checks import near
from normopt.diagnostics import Trajectory, TrajectoryMonitor

Item = TypeVar("Item")
AT_ONCE = 512  # examples that are evaluated together
LAST = {"cuda"}  # kinds of devices on which convolutions are fastest with the channels last


def run(spec: RunSpec, folder: Path | None = None, every: float = EVERY) -> RunRecord:
    """Train and measure one run, on one thread, or on the GPU of this process if the task's data ask for one.

    The model is drawn from the seed, and the batches from a generator of their own with the same seed, so that runs
    with equal seeds start from the same weights and see the same batches, whatever their optimizer does. The learning
    rate moves with every step; p moves once an epoch, but an adaptive p with every step, as it
    reads the gradient: what is recorded is the p that an epoch begins with. A loss that is not finite ends the run:
    that is a result too.

    Args:
        spec: the run.
        folder: of its study, in which its state is kept every few minutes. A run that was killed goes on from there,
            on a CPU with the same result to the last bit, but for the timings.
        every: seconds between two states.

    Raises:
        ValueError: an unknown task, optimizer or setting.
        FileNotFoundError: the task's data are not on this machine; the message says where they are looked for.
    """
    # More threads than one per worker only fight each other: a small run takes 20 times as long.
    torch.set_num_threads(1)
    if spec.task not in TASKS:
        raise ValueError(f"unknown task {spec.task!r}{near(spec.task, TASKS)} (known: {', '.join(TASKS)})")
    own = (spec.optimizer,) if ":" in spec.optimizer else ()
    checkpoint = Checkpoint(folder, spec.run_id, here((), own), every) if folder else None
    training = Training(spec, TASKS[spec.task])
    training.go_on(checkpoint)
    return training.result()


def make_lr_schedule(plan: LRSchedule, optimizer: Optimizer, steps: int) -> LRScheduler:
    """Return the schedule of a run of so many steps, to be stepped after each of them."""
    if plan == LRSchedule():
        return CosineAnnealingLR(optimizer, steps)  # whose rounding is that of the stored runs
    return LambdaLR(optimizer, lambda step: plan.factor(step, steps))


class Training:
    """A run under way. Whatever its rest depends on is in `state`."""

    def __init__(self, spec: RunSpec, task: Task) -> None:
        self.spec, self.task, self.began = spec, task, time.perf_counter()
        self.splits = splits = task.load()
        torch.manual_seed(spec.seed)
        self.model = placed_model(task.build(), splits.device)
        self.draws = torch.Generator().manual_seed(spec.seed)
        optimizer, p_schedule = make_optimizer(spec, self.model, task)
        self.drawn = splits.per_epoch or len(splits.train[0])
        self.per_epoch = math.ceil(self.drawn / spec.batch_size)
        steps = spec.epochs * self.per_epoch
        lr_schedule = make_lr_schedule(spec.lr_schedule, optimizer, steps)
        pruning = prune(spec, optimizer, self.model, steps)
        adaptive = spec.p_schedule is not None and spec.p_schedule.kind == "adaptive"
        self.optimizer = optimizer
        self.each_step = [lr_schedule, *([p_schedule] if p_schedule and adaptive else [])]
        self.each_epoch = [p_schedule] if p_schedule and not adaptive else []
        self.monitor = TrajectoryMonitor(optimizer) if task.trajectory else None
        # In the order in which states are loaded: of the optimizer's p and its schedule's, the latter counts.
        parts: tuple[Any, ...] = self.model, optimizer, lr_schedule, p_schedule, pruning, self.monitor
        self.parts = [part for part in parts if part is not None]
        self.curve: list[Point] = []
        self.diverged = False
        self.busy = 0.0  # seconds in training steps
        # Of the epoch under way: its examples, how many batches of them are done, and what they found.
        self.order: Tensor | None = None
        self.done = 0
        self.loss_sum = torch.zeros((), device=splits.device)
        self.p: float | None = None

    def go_on(self, checkpoint: Checkpoint | None = None) -> None:
        """Train, from the checkpoint if it has a state."""
        state = checkpoint.read() if checkpoint else None
        if state is not None:
            self.load(state)
        while len(self.curve) < self.spec.epochs and not self.diverged:
            if self.order is None:
                self.p = _finite_p(self.optimizer)
                self.order = torch.randperm(len(self.splits.train[0]), generator=self.draws)[: self.drawn]
                self.done = 0
                self.loss_sum.zero_()
            train_loss = self.epoch(checkpoint)
            self.order = None
            loss, score = self.evaluate(self.splits.validation)
            self.diverged = not all(map(math.isfinite, (train_loss, loss, score)))
            if not self.diverged:
                steps = (len(self.curve) + 1) * self.per_epoch
                point = Point(steps=steps, train_loss=train_loss, validation_loss=loss, score=score, p=self.p)
                self.curve.append(point)
                for schedule in self.each_epoch:
                    schedule.step()

    def epoch(self, checkpoint: Checkpoint | None) -> float:
        """Make the steps that an epoch has left; the mean loss over all of it.

        NaN where the weights are past what a matrix decomposition can take, which then raises.
        """
        # The processor's time, which other programs disturb less; on a GPU it is not the processor that is busy.
        clock = time.process_time if self.splits.device == "cpu" else time.perf_counter
        before, start = self.busy, clock()
        self.model.train()
        for inputs, targets, draws in ahead(self.batches(), self.splits.ahead):
            self.optimizer.zero_grad()
            outputs = forward(self.model, placed(inputs, self.splits.device), self.spec.amp)
            loss = self.task.loss(outputs, placed(targets, self.splits.device))
            loss.backward()  # type: ignore[no-untyped-call]
            try:
                self.optimizer.step()
            except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
                if _finite(self.model):
                    raise
                return math.nan
            if self.monitor is not None:
                self.monitor.record(loss)
            for schedule in self.each_step:
                schedule.step()
            self.loss_sum += loss.detach() * len(targets)
            self.done += 1
            self.busy = before + clock() - start
            if checkpoint is not None:
                checkpoint.offer(lambda: self.state(draws))  # noqa: B023
        mean = float(self.loss_sum) / self.drawn  # which waits for the GPU
        self.busy = before + clock() - start
        return mean

    def batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """The batches that the epoch has left, each with the state of the generator after it."""
        x, y = self.splits.train
        assert self.order is not None
        for chosen in torch.split(self.order, self.spec.batch_size)[self.done :]:
            inputs = self.splits.fetch(x[chosen], self.draws)
            # Copied to the GPU without waiting only from pinned memory.
            inputs = inputs.pin_memory() if self.splits.device != "cpu" else inputs
            yield inputs, y[chosen], self.draws.get_state()

    def evaluate(self, data: tuple[Tensor, Tensor]) -> tuple[float, float]:
        """The mean loss and the score on a part of the data."""
        return evaluate(self.model, self.task, self.splits, data, self.spec.amp)

    def result(self) -> RunRecord:
        """Test the trained model."""
        regularity = {} if self.monitor is None or self.diverged else regularity_of(self.monitor.result())
        model, task = self.model, self.task
        test_loss, test_score = self.evaluate(self.splits.test)
        diverged = self.diverged or not (math.isfinite(test_loss) and math.isfinite(test_score))
        return RunRecord(
            id=self.spec.run_id,
            spec=self.spec,
            curve=self.curve,
            diverged=diverged,
            test_loss=None if diverged else test_loss,
            test_score=None if diverged else test_score,
            measures={} if diverged else {"zeros": zero_fraction(model), **regularity, **task.measures(model)},
            state_bytes=_state_bytes(self.optimizer),
            ms_per_step=1000 * self.busy / ((len(self.curve) + self.diverged) * self.per_epoch),
            seconds=time.perf_counter() - self.began,
        )

    def state(self, draws: Tensor) -> dict[str, Any]:
        """Everything after a step, given the state of the batches' generator after its batch."""
        return {
            "parts": [part.state_dict() for part in self.parts],
            "curve": [asdict(point) for point in self.curve],
            "epoch": (self.order, self.done, self.loss_sum, self.p),
            "draws": draws,
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state() if self.splits.device == "cuda" else None,
            "busy": self.busy,
            "seconds": time.perf_counter() - self.began,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go back to a state."""
        for part, saved in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(saved)
        self.curve = [Point(**point) for point in state["curve"]]
        self.order, self.done, self.loss_sum, self.p = state["epoch"]
        self.draws.set_state(state["draws"])
        torch.set_rng_state(state["random"])
        if state["random_cuda"] is not None:
            torch.cuda.set_rng_state(state["random_cuda"])
        self.busy = state["busy"]
        self.began -= state["seconds"]


def ahead(items: Iterator[Item], n: int) -> Iterator[Item]:
    """The items, so many of which a thread makes in advance: in the same order, and an error where it occurred."""
    if not n:
        yield from items
        return
    end = object()
    with ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) as thread:
        waiting = deque(thread.submit(next, items, end) for _ in range(n))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(thread.submit(next, items, end))
            yield item  # type: ignore[misc]


def placed_model(model: nn.Module, device: str) -> nn.Module:
    """The model on its device, the kernels of its convolutions with the channels last where that is fastest."""
    model.to(device)
    if device in LAST:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model


def placed(x: Tensor, device: str) -> Tensor:
    """A batch on its device, images with the channels last where that is fastest."""
    last = torch.channels_last if device in LAST and x.dim() == 4 else torch.preserve_format
    return x.to(device, non_blocking=True, memory_format=last)


def forward(model: nn.Module, inputs: Tensor, amp: bool) -> Tensor:
    """The model's outputs, under bfloat16 autocast as float32."""
    with torch.autocast(inputs.device.type, torch.bfloat16) if amp else nullcontext():
        outputs: Tensor = model(inputs)
    return outputs.float() if amp else outputs


@torch.no_grad()
def evaluate(
    model: nn.Module, task: Task, splits: Splits, data: tuple[Tensor, Tensor], amp: bool = False
) -> tuple[float, float]:
    """The mean loss and the score on a part of the data."""
    model.eval()
    x, y = data
    batches = (splits.fetch(chosen, None) for chosen in torch.split(x, AT_ONCE))
    parts = [forward(model, placed(batch, splits.device), amp) for batch in ahead(batches, splits.ahead)]
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
