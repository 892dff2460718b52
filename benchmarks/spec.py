"""The settings of one run and of a whole study: everything that a result depends on."""

from __future__ import annotations

import hashlib
import json
from typing import Literal

from pydantic import BaseModel, ConfigDict

Regularizer = Literal["none", "agr", "lp", "agr+lp"]
Pair = tuple[str, Regularizer]


class Frozen(BaseModel):
    """Settings that cannot change and refuse what they do not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class RunSpec(Frozen):
    """One training run. Equal specs give equal records, but for the timings."""

    task: str
    arm: str
    lr: float
    agr: bool
    weight_decay: float
    decay_p: float
    seed: int
    epochs: int
    batch_size: int
    target: float

    @property
    def regularizer(self) -> Regularizer:
        """What the run wears besides its optimizer."""
        if self.agr:
            return "agr+lp" if self.weight_decay else "agr"
        return "lp" if self.weight_decay else "none"

    @property
    def run_id(self) -> str:
        """A hash of the settings: the name under which the run is stored."""
        canonical = json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]


class ArmPlan(Frozen):
    """What a study tries with one arm: every learning rate under every regularizer."""

    name: str
    lrs: tuple[float, ...]
    regularizers: tuple[Regularizer, ...]


class SparsityPlan(Frozen):
    """The sweep over λ of one arm under AGR and ℓp decay, beside its twin without either.

    The learning rate is not set here: it is the one that tuning finds for the TWIN, so that what the
    sparse runs are held against is at its best.
    """

    arm: str
    weight_decays: tuple[float, ...]
    seeds: tuple[int, ...]
    epochs: int
    # What the study is asked to show: so many zeros, at no more than so much accuracy lost.
    zeros_wanted: float = 0.75
    loss_allowed: float = 0.01


class Study(Frozen):
    """A whole ablation; what only regularizers or a sweep over λ need may be left out with them.

    ``decay_step`` is ηλ, the ℓp decay of one step at the peak of the learning rate, and the same for
    all: learning rates of the arms differ by a factor of a thousand, so that one λ for all would
    erase one arm's weights and leave another's alone.
    """

    preset: str
    task: str
    arms: tuple[ArmPlan, ...]
    baseline: str
    tuning_seed: int
    final_seeds: tuple[int, ...]
    epochs: int
    batch_size: int
    target: float
    decay_p: float = 1.0
    decay_step: float = 0.0
    sparsity: SparsityPlan | None = None

    @property
    def pairs(self) -> list[Pair]:
        """Every arm with every regularizer that it is tried with."""
        return [(arm.name, regularizer) for arm in self.arms for regularizer in arm.regularizers]

    @property
    def regularized(self) -> bool:
        """Some arm is tried with a regularizer."""
        return any(regularizer != "none" for _, regularizer in self.pairs)
