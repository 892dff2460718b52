"""The three phases of a study as lists of runs. Pure: what a later phase runs follows from earlier records."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from benchmarks.spec import Pair, RunSpec, Study
from benchmarks.training import RunRecord

Records = Mapping[str, RunRecord]


@dataclass(frozen=True)
class Choice:
    """The learning rate that tuning chose for a pair, and the validation loss at each it tried (∞: diverged)."""

    lr: float
    losses: dict[float, float]

    @property
    def at_edge(self) -> bool:
        """The best is the smallest or the largest that was tried: the true best may lie beyond."""
        return self.lr in (min(self.losses), max(self.losses))


def tuning(study: Study) -> list[RunSpec]:
    """Phase 1: the same number of learning rates for every pair, on one seed."""
    return [spec for pair in study.pairs for spec in _tuning_of(study, pair)]


def choose(study: Study, records: Records) -> dict[Pair, Choice]:
    """Each pair's learning rate: the lowest validation loss after the last epoch; the smaller rate if two tie."""
    choices = {}
    for pair in study.pairs:
        losses = {spec.lr: last_loss(records[spec.run_id]) for spec in _tuning_of(study, pair)}
        choices[pair] = Choice(min(losses, key=lambda lr: (losses[lr], lr)), losses)
    return choices


def final(study: Study, choices: Mapping[Pair, Choice]) -> dict[Pair, list[RunSpec]]:
    """Phase 2: every pair at its chosen learning rate on fresh seeds, the same for all."""
    return {
        pair: [_spec(study, pair, choice.lr, seed) for seed in study.final_seeds] for pair, choice in choices.items()
    }


def sparsity(study: Study, choices: Mapping[Pair, Choice]) -> dict[float, list[RunSpec]]:
    """Phase 3, if the study has it: the sweep over λ; λ = 0 is the twin, without AGR too."""
    plan = study.sparsity
    if plan is None:
        return {}
    lr = choices[plan.arm, "none"].lr
    return {
        weight_decay: [
            RunSpec(
                task=study.task,
                arm=plan.arm,
                lr=lr,
                agr=weight_decay != 0,
                weight_decay=weight_decay,
                decay_p=study.decay_p,
                seed=seed,
                epochs=plan.epochs,
                batch_size=study.batch_size,
                target=study.target,
            )
            for seed in plan.seeds
        ]
        for weight_decay in (0.0, *plan.weight_decays)
    }


def count(study: Study) -> int:
    """How many runs the whole study has."""
    tried = sum(len(arm.lrs) * len(arm.regularizers) for arm in study.arms)
    swept = (1 + len(study.sparsity.weight_decays)) * len(study.sparsity.seeds) if study.sparsity else 0
    return tried + len(study.pairs) * len(study.final_seeds) + swept


def last_loss(record: RunRecord) -> float:
    """The validation loss after the last epoch, ∞ if the run diverged."""
    return math.inf if record.diverged else record.epochs[-1].validation_loss


def _tuning_of(study: Study, pair: Pair) -> list[RunSpec]:
    lrs = next(arm.lrs for arm in study.arms if arm.name == pair[0])
    return [_spec(study, pair, lr, study.tuning_seed) for lr in lrs]


def _spec(study: Study, pair: Pair, lr: float, seed: int) -> RunSpec:
    arm, regularizer = pair
    return RunSpec(
        task=study.task,
        arm=arm,
        lr=lr,
        agr="agr" in regularizer,
        # Six digits, so that the division leaves no dust in the store.
        weight_decay=float(f"{study.decay_step / lr:.6g}") if "lp" in regularizer else 0.0,
        decay_p=study.decay_p,
        seed=seed,
        epochs=study.epochs,
        batch_size=study.batch_size,
        target=study.target,
    )
