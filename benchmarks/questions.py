"""The questions that a study has arms for: families of pairs, each pair in one family only.

What a paper claims comes first: annealing p, AGR and ℓp decay, each arm against its own control. A control is found by
settings, not by name: the same optimizer with everything else equal. The other pairs, of an arm and the one that the
study holds it against, are the last question.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from benchmarks.study.spec import Arm, Study

AGR = frozenset({"agr"})
DECAY = frozenset({"decay", "decay_p", "weight_decay", "decay_step"})
STAYS, LENGTHS = "p stays constant", "SGD's direction at LPSGDM's step lengths"
SAME = "the same without"

ANNEALING = "What annealing p does"
REGULARIZED = "What AGR does"
DECAYED = "What ℓp decay does"
REST = "Every arm against its reference"

ABOUT = {
    ANNEALING: "In LPSGDM, p falls from a high value to 2; arXiv 2606.02078 reports gains on CIFAR and ImageNet. Under "
    "its power map a smaller p also means shorter steps, so annealing p is also a learning-rate schedule: the "
    "controls separate the two.",
    REGULARIZED: "Adaptive gradient regularization (arXiv 2407.16944) is reported to improve the optimizers that use "
    "it.",
    DECAYED: "ℓp weight decay (arXiv 2404.10824) is reported to make 83.6\u00a0% of a Fashion-MNIST network's weights "
    "exactly zero at equal accuracy.",
    REST: "",
}


@dataclass(frozen=True)
class Pair:
    """An arm, its control, and what the control is."""

    arm: str
    control: str
    what: str = ""


@dataclass(frozen=True)
class Question:
    """A family of pairs, tested on every task and corrected once; ``about`` says what is reported elsewhere."""

    title: str
    about: str
    pairs: tuple[Pair, ...]


def questions(study: Study) -> list[Question]:
    """All questions with at least one pair."""
    held = [Pair(arm.name, other) for arm in study.arms if (other := study.against(arm.name))]
    asked = {ANNEALING: annealing(study), REGULARIZED: twins(study, AGR), DECAYED: twins(study, DECAY), REST: held}
    found, seen = [], set[frozenset[str]]()
    for title, pairs in asked.items():
        new = tuple(pair for pair in pairs if frozenset({pair.arm, pair.control}) not in seen)
        seen |= {frozenset({pair.arm, pair.control}) for pair in new}
        if new:
            single = title == REST and len({pair.control for pair in new}) == 1
            found.append(Question(f"Against {new[0].control}" if single else title, ABOUT[title], new))
    return found


def annealing(study: Study) -> list[Pair]:
    """An arm whose p anneals, without regularizers, and its controls; of several, the one that has most.

    Controls are the arm whose p stays, those with other schedules, those whose steps are as long as SGD's, and SGD with
    the same momentum, by itself and at the arm's step lengths.
    """
    plain = [arm for arm in study.arms if not (AGR | DECAY) & arm.settings.keys()]
    moving = [arm for arm in plain if arm.p_schedule and arm.settings.get("scale") != "matched"]
    # The paper's schedule first: of arms with as many controls it is the one.
    moving.sort(key=lambda arm: arm.p_schedule is not None and arm.p_schedule.kind != "cosine")
    return max((_controls(arm, plain) for arm in moving), key=len, default=[])


def _controls(this: Arm, others: Sequence[Arm]) -> list[Pair]:
    pairs = []
    for arm in others:
        same = arm.optimizer == this.optimizer and _without(arm, {"scale"}) == _without(this, {"scale"})
        if arm is this:
            continue
        if same and arm.settings.get("scale") == "matched":
            what = "steps as long as SGD's" + ("" if arm.p_schedule else ", p stays constant")
        elif same and arm.settings == this.settings:
            what = f"p falls by another schedule, {arm.p_schedule.kind}" if arm.p_schedule else STAYS
        elif arm.optimizer == f"{this.optimizer}-lr-matched":
            what = LENGTHS
        elif arm.optimizer == "sgd-ema":
            what = "SGD with the same momentum"
        else:
            continue
        pairs.append(Pair(this.name, arm.name, what))
    return pairs


def twins(study: Study, keys: frozenset[str]) -> list[Pair]:
    """Every arm with the regularizer, and the arm with the same settings without it.

    Where there is no such arm because the arm has both regularizers, it is the one without either.
    """
    pairs = []
    for arm in study.arms:
        if not _has(arm, keys):
            continue
        bare = _without(arm, AGR | DECAY)
        stem = arm.optimizer, arm.p_schedule
        others = [o for o in study.arms if not _has(o, keys) and (o.optimizer, o.p_schedule) == stem]
        exact = next((o for o in others if _without(o, keys) == _without(arm, keys)), None)
        neither = next((o for o in others if o.settings == bare), None)
        if exact:
            pairs.append(Pair(arm.name, exact.name, SAME))
        elif neither:
            pairs.append(Pair(arm.name, neither.name, "the same without AGR and without decay"))
    return pairs


def _has(arm: Arm, keys: frozenset[str]) -> bool:
    """Torch's own weight decay is no ℓp decay."""
    return bool(arm.settings.get("agr")) if keys == AGR else arm.settings.get("decay") == "lp"


def _without(arm: Arm, keys: Collection[str]) -> dict[str, object]:
    return {key: value for key, value in arm.settings.items() if key not in keys}
