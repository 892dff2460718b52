"""A miniature of a task, and a run of it that takes as long as it is told: what the loop is tested with.

Workers import this module by name, so that they have the task too.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import time
from pathlib import Path

from benchmarks.study.record import Point, RunRecord
from benchmarks.study.spec import Arm, Range, RunSpec, Study, Tuning
from benchmarks.tasks import TASKS


class Mini:
    name = "mini"
    description = "nothing to learn"
    epochs = 4
    batch_size = 8
    score_name = "score"
    higher_is_better = True
    target = 0.5
    residual_depth = None

    def fingerprint(self) -> str:
        return "the data of mini"


class Twin(Mini):
    name = "mini-2"
    epochs = 3

    def fingerprint(self) -> None:
        return None


for task in (Mini(), Twin()):
    TASKS[task.name] = task  # type: ignore[assignment]

LR = {"lr": Range(low=1e-4, high=1.0)}
STUDY = Study(
    name="miniature",
    purpose="whether the loop works",
    tasks=("mini", "mini-2"),
    arms=(
        Arm(name="A", optimizer="sgd", search=LR),
        Arm(name="B", optimizer="adamw", search=LR | {"weight_decay": Range(low=0.0, high=0.5, log=False)}),
        Arm(name="A again", optimizer="sgd", settings={"momentum": 0.5}, tuned_as="A", lr_factor=0.5),
        Arm(name="fixed", optimizer="sgd", settings={"lr": 0.1}),
    ),
    baseline="A",
    tuning=Tuning(trials=6, startup=4, seeds=(1000,)),
    seeds=(1, 2, 3),
)
RUNS = 2 * (2 * (6 + 3) + 3 + 3)


def run(spec: RunSpec) -> RunRecord:
    """A bowl over log lr: the same spec gives the same record. MINI_SECONDS and MINI_LOG are of the environment."""
    tell(f"begin {spec.run_id} {os.getpid()}")
    time.sleep(float(os.environ.get("MINI_SECONDS", "0")))
    lr = float(spec.settings["lr"])  # type: ignore[arg-type]
    if spec.settings.get("raise"):
        raise RuntimeError("told to raise")
    if spec.settings.get("hang") == "in Python":
        while True:
            with contextlib.suppress(Exception):
                time.sleep(0.001)
    if spec.settings.get("hang") == "in C":
        time.sleep(1000)
    if spec.settings.get("die"):
        os.kill(os.getpid(), signal.SIGKILL)
    loss = (math.log10(lr) + 2) ** 2 + 0.01 * math.sin(spec.seed) + float(spec.settings.get("weight_decay") or 0)  # type: ignore[arg-type]
    diverged = lr > 0.5
    record = RunRecord(
        id=spec.run_id,
        spec=spec,
        curve=[
            Point(steps=k + 1, train_loss=loss, validation_loss=loss + 1 / (k + 1), score=0.1 * k, p=None if k else 2.0)
            for k in range(0 if diverged else spec.epochs)
        ],
        diverged=diverged,
        test_loss=None if diverged else loss,
        test_score=None if diverged else 1 / (1 + loss),
        measures={} if diverged else {"zeros": 0.25, "distance": loss / 3},
        state_bytes=12,
        ms_per_step=0.5,
        seconds=float(os.environ.get("MINI_SECONDS", "0.01")),
    )
    if spec.settings.get("nan"):
        record = record.model_copy(update={"measures": {"zeros": math.nan}})
    tell(f"end {spec.run_id} {os.getpid()}")
    return record


def tell(line: str) -> None:
    if "MINI_LOG" in os.environ:
        with Path(os.environ["MINI_LOG"]).open("a") as file:
            file.write(line + "\n")


def told(log: Path, what: str) -> list[str]:
    """The ids of the runs that began, or ended, in the order in which they did."""
    if not log.exists():
        return []
    lines = [line.split() for line in log.read_text().splitlines()]
    return [line[1] for line in lines if line[0] == what]
