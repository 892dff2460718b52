"""A study whose truth is known: tasks without data, and runs that are drawn instead of trained."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.environment import Environment
from benchmarks.store import Failure, Store
from benchmarks.study.lanes import chosen, lanes
from benchmarks.study.record import Point, RunRecord
from benchmarks.study.spec import Arm, PSchedule, Range, RunSpec, Study, Tuning
from benchmarks.tasks import Splits

EPOCHS, STEPS = 6, 10  # of a run, and of an epoch
BEST_LR, TOO_MUCH = 0.1, 5.0  # where the loss is least, and from where on runs diverge
NOISE = 0.001  # of a score, beside what all arms share on a seed


@dataclass(frozen=True)
class Toy:
    """A task that nobody trains."""

    name: str
    score_name: str
    higher_is_better: bool
    target: float
    description: str = "A task that nobody trains"
    epochs: int = EPOCHS
    batch_size: int = 4
    residual_depth: int | None = None

    def load(self) -> Splits:
        data = torch.zeros(4, 2), torch.zeros(4, 1)
        return Splits(data, data, data)

    def build(self) -> nn.Module:
        return nn.Linear(2, 1)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).square().mean()

    def score(self, outputs: Tensor, targets: Tensor) -> float:
        return 0.0

    def measures(self, model: nn.Module) -> Mapping[str, float]:
        return {}

    def fingerprint(self) -> str | None:
        return None


UP = Toy("toy-up", "accuracy", higher_is_better=True, target=0.87)
DOWN = Toy("toy-down", "log₁₀ gap", higher_is_better=False, target=-0.87)
TASKS_OF_TOYS = {toy.name: toy for toy in (UP, DOWN)}

LR = {"lr": Range(low=1e-3, high=10)}
COSINE = PSchedule(kind="cosine")
LP = {"decay": "lp", "decay_p": 0.8, "decay_step": 3e-4}

STUDY = Study(
    name="toy",
    purpose="Does the report say what is true?",
    tasks=(UP.name, DOWN.name),
    arms=(
        Arm(name="SGD", optimizer="sgd", search=LR),
        Arm(name="AdamW", optimizer="adamw", search=LR),
        Arm(name="LPSGDM", optimizer="lpsgdm", p_schedule=COSINE, search=LR),
        Arm(name="LPSGDM constant p", optimizer="lpsgdm", search=LR, against="LPSGDM"),
        Arm(name="Lengths", optimizer="lpsgdm-lr-matched", p_schedule=COSINE, search=LR, against="LPSGDM"),
        Arm(
            name="LPSGDM + AGR",
            optimizer="lpsgdm",
            settings={"agr": True},
            p_schedule=COSINE,
            search=LR,
            against="LPSGDM",
        ),
        Arm(name="LPSGDM + decay", optimizer="lpsgdm", settings=LP, p_schedule=COSINE, tuned_as="LPSGDM"),
    ),
    baseline="SGD",
    tuning=Tuning(trials=5, startup=4, seeds=(1000,)),
    seeds=(1, 2, 3, 4, 5, 6),
)


@dataclass(frozen=True)
class Truth:
    """What is true of an arm, on every task.

    Attributes:
        gain: of its final score over SGD's, positive where it is better.
        reached: the epoch from which on it is at its final score; None if it is never near.
        zeros: the part of its weights that are exactly zero.
        validation: what its score on the validation data is higher by than that on the test data.
        diverges: on these seeds.
    """

    gain: float = 0.0
    reached: int | None = 4
    zeros: float = 0.0
    validation: float = 0.0
    diverges: tuple[int, ...] = ()


TRUTHS: dict[str, Truth] = {
    "SGD": Truth(reached=4),
    "AdamW": Truth(gain=0.03, reached=2),
    "LPSGDM": Truth(gain=-0.02, reached=3),
    "LPSGDM constant p": Truth(gain=-0.05, reached=6),
    "Lengths": Truth(gain=-0.02, reached=None),
    "LPSGDM + AGR": Truth(gain=-0.02, reached=3),
    "LPSGDM + decay": Truth(gain=-0.025, reached=3, zeros=0.7),
}


def run(spec: RunSpec, truth: Truth) -> RunRecord:
    """What a run would give. The shared part of a seed is larger than any gain: only pairs tell arms apart."""
    seed = int(spec.run_id, 16) % 2**32
    noise = np.random.default_rng(seed).normal(scale=NOISE, size=3)
    shared = 0.05 * math.sin(7.0 * spec.seed)
    lr = spec.settings["lr"]
    assert isinstance(lr, float)
    sign = 1 if TASKS_OF_TOYS[spec.task].higher_is_better else -1
    final = sign * (0.9 + truth.gain + shared + noise[0])
    diverged = lr > TOO_MUCH or spec.seed in truth.diverges
    curve = [
        Point(
            steps=STEPS * epoch,
            train_loss=0.2,
            validation_loss=0.1 + 0.05 * math.log10(lr / BEST_LR) ** 2 + 0.5 / epoch,
            score=final + sign * truth.validation if truth.reached and epoch >= truth.reached else 0.0,
        )
        for epoch in range(1, 2 if diverged else EPOCHS + 1)
    ]
    return RunRecord(
        id=spec.run_id,
        spec=spec,
        curve=curve,
        diverged=diverged,
        test_loss=None if diverged else 0.3 + float(noise[1]),
        test_score=None if diverged else final,
        measures={} if diverged else {"zeros": truth.zeros and truth.zeros + float(noise[2])},
        state_bytes=1024,
        ms_per_step=1.5,
        seconds=2.0,
    )


ENVIRONMENT = Environment(
    python="3.11", system="Linux", cpus=2, torch="2.13", normopt="0.1", numpy="2.4", sklearn="1.5", commit="abc"
)


def fill(
    folder: Path,
    study: Study = STUDY,
    truths: Mapping[str, Truth] = TRUTHS,
    tuned: int | None = None,
    final: int | None = None,
    failing: tuple[str, int] | None = None,
    environment: Environment = ENVIRONMENT,
) -> Store:
    """A store of the study's runs: of all, or of so many trials and final runs an arm; one arm's seed may fail."""
    store = Store(folder)
    store.begin(study, environment)
    every = lanes(study)
    for (task, name), lane in every.items():
        while not lane.tuned and (tuned is None or len(lane.trials) < tuned):
            losses = {}
            for spec in lane.tuning_specs().values():
                record = run(spec, Truth())
                store.add(record)
                losses[record.id] = record.last_loss
            for trial in lane.tell(losses)[: None if tuned is None else tuned]:
                store.add_trial(task, name, trial)
    for (_, name), lane in every.items():
        choice = chosen(lane, every)
        # From the last seed to the first: no result may depend on the order in which runs end.
        for spec in reversed(lane.final_specs(choice)[:final] if choice else []):
            if (name, spec.seed) == failing:
                store.add_failure(Failure(id=spec.run_id, spec=spec, error="ValueError: no"))
            else:
                store.add(run(spec, truths[name]))
    return store
