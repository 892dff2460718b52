"""Presets that run the recipes of papers on data that are here, each declared in a file before its first run.

The file is docs/data/NAME.protocol.json: the claim, the decision, what differs from the paper, and the study itself as
`benchmarks.study.spec.Study` has it. A study is run as its file says only if its ``protocol`` is the file's sha256.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from benchmarks.study.spec import Arm, Frozen, LRSchedule, PSchedule, Range, Study, Tuning, Value
from benchmarks.tasks.fashion import DEEP

PROTOCOLS = Path(__file__).parents[2] / "docs/data"
WARMUP = LRSchedule(warmup=0.05)
SEEDS = tuple(range(1, 9))


def path(name: str) -> Path:
    """Return where the protocol of a preset is."""
    return PROTOCOLS / f"{name}.protocol.json"


def digest(name: str) -> str | None:
    """Return the sha256 of a preset's protocol, None where there is no such file."""
    file = path(name)
    return hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else None


def _study(name: str, purpose: str, tasks: tuple[str, ...], arms: tuple[Arm, ...], trials: int, budget: float) -> Study:
    return Study(
        name=name,
        purpose=purpose,
        tasks=tasks,
        arms=arms,
        baseline=arms[0].name,
        tuning=Tuning(trials=trials, startup=trials),
        seeds=SEEDS,
        budget=budget,
        protocol=digest(name),
    )


def _arm(
    name: str,
    optimizer: str,
    settings: dict[str, Value],
    against: str | None = None,
    p: PSchedule | None = None,
    lr: Range | None = None,
    schedule: LRSchedule = WARMUP,
) -> Arm:
    search = {} if lr is None else {"lr": lr}
    return Arm(
        name=name,
        optimizer=optimizer,
        settings=settings,
        p_schedule=p,
        lr_schedule=schedule,
        search=search,
        against=against,
    )


class Protocol(Frozen):
    """What is declared of a preset before its first run.

    Attributes:
        paper: an arXiv id.
        claim: what the paper states.
        reported: the paper's numbers that ours are shown beside, by what they are.
        decision: how the claim is judged, on which comparison of arms.
        differs: what is not as in the paper, and why.
        chosen_by: the runs that were made before, none of which is part of the study.
        study: the study, without the hash of this declaration.
    """

    paper: str
    claim: str
    reported: dict[str, str]
    decision: str
    differs: tuple[str, ...]
    chosen_by: str
    study: Study

    def text(self) -> str:
        """Return the content of the protocol's file."""
        return (
            json.dumps(
                self.model_dump(
                    mode="json",
                    exclude={"study": {"protocol": True, "batch_size": True, "amp": True, "tuning": {"reruns"}}},
                ),
                indent=1,
                ensure_ascii=False,
            )
            + "\n"
        )


def _lp(decay_p: float, step: float) -> dict[str, Value]:
    return {"decay": "lp", "decay_p": decay_p, "decay_step": step}


def _taking(arm: Arm) -> Arm:
    """Return the arm with the tuned learning rate of plain AdamW."""
    return arm.model_copy(update={"tuned_as": "AdamW"})


_NONE: dict[str, Value] = {"weight_decay": 0.0}
_AT_PAPERS: dict[str, Value] = {"lr": 1e-3}

PWD = _study(
    "paper-pwd",
    "Does ℓp decay with p = 0.8 bring most weights to exactly zero at equal accuracy?",
    ("fashion-cnn",),
    (
        _arm("AdamW", "adamw", _NONE, lr=Range(low=2e-3, high=2e-2)),
        *(_taking(_arm(f"ℓ0.8, ηλ = {step:g}", "adamw", _lp(0.8, step))) for step in (3e-5, 8e-5, 1.2e-4)),
        _taking(_arm("ℓ0.5, ηλ = 3e-05", "adamw", _lp(0.5, 3e-5), against="ℓ0.8, ηλ = 8e-05")),
        _taking(_arm("ℓ1, ηλ = 0.00035", "adamw", _lp(1.0, 3.5e-4), against="ℓ0.8, ηλ = 8e-05")),
        _taking(_arm("pruned, 75 %", "adamw", _NONE | {"prune": 0.75}, against="ℓ0.8, ηλ = 8e-05")),
        _taking(_arm("pruned, 86 %", "adamw", _NONE | {"prune": 0.86}, against="ℓ0.8, ηλ = 0.00012")),
        _taking(_arm("AdamW's own decay, ηλ = 0.0001", "adamw", {"decay_step": 1e-4})),
        _arm("AdamW, lr 0.001, λ 0.01", "adamw", _AT_PAPERS | {"weight_decay": 0.01}),
        *(
            _arm(
                f"ℓ0.8, lr 0.001, λ {decay:g}",
                "adamw",
                _AT_PAPERS | {"decay": "lp", "decay_p": 0.8, "weight_decay": decay},
                against="AdamW, lr 0.001, λ 0.01",
            )
            for decay in (0.01, 0.03)
        ),
    ),
    trials=6,
    budget=0.8,
)

# λ of an arm is tuned along with its learning rate only in so far as ηλ, LPSGDM's of the paper, is held.
_TUNED: dict[str, Value] = {"decay_step": 1e-5}
_LPSGDM: dict[str, Value] = {"p": 6.0, "eps": 1e-8}
_COSINE = PSchedule(kind="cosine")
_TWO_DECADES = Range(low=3e-4, high=3e-2)

_TUNED_ARMS: tuple[tuple[str, str, dict[str, Value], PSchedule | None, Range], ...] = (
    ("SGD", "sgd", {"decay": "decoupled"}, None, Range(low=0.02, high=2.0)),
    ("AdamW", "adamw", {}, None, _TWO_DECADES),
    ("Lion", "lion", {}, None, Range(low=3e-5, high=3e-3)),
    ("p = 6", "lpsgdm", _LPSGDM, None, _TWO_DECADES),
    ("LPSGDM matched", "lpsgdm", {"p": 6.0, "scale": "matched"}, _COSINE, Range(low=0.2, high=20.0)),
)

LPSGDM = _study(
    "paper-lpsgdm",
    "Is LPSGDM better than SGD, AdamW and Lion, at the paper's settings and tuned, and is it the direction that helps?",
    ("fashion-cnn",),
    (
        _arm("LPSGDM", "lpsgdm", _LPSGDM | {"lr": 1e-3, "weight_decay": 0.01}, p=_COSINE),
        _arm("SGD", "sgd", {"lr": 0.1, "weight_decay": 1e-3, "decay": "decoupled"}),
        _arm("AdamW", "adamw", {"lr": 1e-3, "weight_decay": 0.1}),
        _arm("Lion", "lion", {"lr": 1e-4, "weight_decay": 1e-3}),
        _arm("p = 2 at LPSGDM's lr", "lpsgdm", {"p": 2.0, "lr": 1e-3, "weight_decay": 0.01}),
        _arm("LPSGDM tuned", "lpsgdm", _LPSGDM | _TUNED, p=_COSINE, lr=_TWO_DECADES),
        *(
            _arm(f"{name} tuned", optimizer, settings | _TUNED, "LPSGDM tuned", p, lr)
            for name, optimizer, settings, p, lr in _TUNED_ARMS
        ),
        Arm(
            name="SGD at LPSGDM's length",
            optimizer="lpsgdm-lr-matched",
            settings=_TUNED | {"p": 6.0},
            p_schedule=_COSINE,
            lr_schedule=WARMUP,
            tuned_as="LPSGDM tuned",
            against="LPSGDM tuned",
        ),
    ),
    trials=6,
    budget=0.8,
)

_AGR: dict[str, Value] = {"agr": True}

AGR = _study(
    "paper-agr",
    "Does adaptive gradient regularization make AdamW and Adan better, and is it the same on hooks?",
    ("fashion-cnn",),
    (
        _arm("AdamW", "adamw-normopt", _TUNED, lr=_TWO_DECADES),
        _arm("AdamW + AGR", "adamw-normopt", _TUNED | _AGR, "AdamW", lr=_TWO_DECADES),
        _arm("Adan", "adan", _TUNED, "AdamW", lr=_TWO_DECADES),
        _arm("Adan + AGR", "adan", _TUNED | _AGR, "Adan", lr=_TWO_DECADES),
        Arm(
            name="torch's AdamW + AGR on hooks",
            optimizer="adamw",
            settings=_TUNED | _AGR,
            lr_schedule=WARMUP,
            tuned_as="AdamW + AGR",
            against="AdamW + AGR",
        ),
    ),
    trials=6,
    budget=0.8,
)

_AS_IT_IS = LRSchedule(kind="constant")

TRAJECTORY = _study(
    "paper-trajectory",
    "Do batch normalisation, skips and ReLU make the trajectory of training more regular, and training better?",
    tuple(task.name for task in DEEP),
    (
        _arm("SGD", "sgd", {}, lr=Range(low=3e-3, high=0.3), schedule=_AS_IT_IS),
        _arm("AdamW", "adamw", {}, lr=Range(low=2e-4, high=2e-2), schedule=_AS_IT_IS),
    ),
    trials=5,
    budget=1.0,
)

PROTOCOLS_OF = (
    Protocol(
        paper="2404.10824",
        claim="AdamW with ℓp decay, p = 0.8, makes 83.6 % of the weights of a Fashion-MNIST CNN exactly zero at equal "
        "accuracy",
        reported={"exact zeros": "83.6 %", "accuracy": "equal to training without"},
        decision="Equal accuracy: the 95 % interval of the paired difference in test accuracy, ℓ0.8 minus AdamW, lies "
        "above −0.5 points. The claim holds here if an arm ℓ0.8 has at least 80 % zeros and equal accuracy. ℓ0.8 beats "
        "pruning if the arm pruned to about as many zeros is significantly worse.",
        differs=(
            "8 epochs: the paper trains longer",
            "a strided CNN of 33,424 weights, which a CPU trains in seconds: the paper's network is not known here",
            "the learning rate warms up over 5 % of the steps and falls to 0 along half a cosine",
            "the learning rate of AdamW is tuned, 6 trials in the decade from 0.002 to 0.02, and every arm of ηλ takes "
            "it over with ηλ held; beside them are arms at the authors' lr 0.001 and λ 0.01",
            "zeros are weights that are exactly 0; the authors count |w| < 1e-13",
            "magnitude pruning (arXiv:1710.01878) to about the zeros of two of the arms is added, ℓ1 by the same rule, "
            "p = 0.5 and AdamW's own decay",
        ),
        chosen_by="16 single runs with seed 100, 8 epochs, at learning rates from 0.001 to 0.006, chose the ηλ and the "
        "shares that are pruned",
        study=PWD,
    ),
    Protocol(
        paper="2606.02078",
        claim="LPSGDM with p from 6 to 2 reaches a higher test accuracy than SGD, AdamW and Lion",
        reported={
            "LPSGDM": "94.81 ± 0.19 % (ResNet-18 on CIFAR-10)",
            "SGD": "93.15 ± 0.09 %",
            "AdamW": "94.09 ± 0.17 %",
            "Lion": "94.04 ± 0.07 %",
        },
        decision="The claim holds here if LPSGDM is significantly better than SGD, AdamW and Lion both at the paper's "
        "settings and tuned. The direction helps if LPSGDM tuned is significantly better than SGD at LPSGDM's length; "
        "annealing p helps if it is significantly better than p = 6 tuned.",
        differs=(
            "8 epochs, the paper has 200, so that p takes 8 values",
            "a strided CNN on Fashion-MNIST: with CIFAR's files, --task cifar10-resnet18 has the paper's data and "
            "network",
            "the settings are the paper's of ResNet-18 on CIFAR-10; Lion's β₂ is 0.99, the text's, where the table has "
            "0.999",
            "the warm-up, whose length the paper does not give, is 5 % of the steps",
            "tuned arms are added: 6 learning rates in two decades each, SGD's beyond 0.1, with LPSGDM's ηλ = 1e-5",
            "p = 2 at LPSGDM's learning rate, p = 6 held, LPSGDM at SGD's step length and SGD at LPSGDM's are added",
        ),
        chosen_by="a pilot of one or two seeds and 10 epochs on a wider CNN chose the ranges of the learning rates",
        study=LPSGDM,
    ),
    Protocol(
        paper="2407.16944",
        claim="AGR improves the generalization of AdamW and of Adan",
        reported={},
        decision="The claim holds here if AdamW + AGR is significantly better than AdamW and Adan + AGR than Adan. On "
        "hooks it is the same if the 95 % interval of the difference from the native one lies within ±0.5 points.",
        differs=(
            "8 epochs of a strided CNN on Fashion-MNIST; the paper's full text, with its settings, was not found",
            "the learning rate warms up over 5 % of the steps and falls to 0 along half a cosine",
            "every arm is tuned, 6 learning rates in two decades, at ηλ = 1e-5; on hooks with the native's rate",
            "AGR divides by the sum over each tensor",
            "on hooks there is AdamW alone: torch has no Adan",
        ),
        chosen_by="no run: the ranges are that of AdamW in paper-lpsgdm",
        study=AGR,
    ),
    Protocol(
        paper="2011.06702",
        claim="Batch normalisation, skip connections and the activation, which make training succeed, make its "
        "trajectory more regular",
        reported={},
        decision="For each optimizer and each of the three, the paired difference over the seeds, averaged over the "
        "other two: a median cosine between steps and the direction to the final weights that is significantly higher, "
        "and a final training loss that is significantly lower. Holm over these 12 tests. The claim holds here for "
        "what has both.",
        differs=(
            "a deep, narrow network without convolutions on Fashion-MNIST, 3 epochs",
            "ReLU is held against sigmoid, and SGD is with momentum 0.9",
            "the learning rate is constant, tuned for every network, 5 of two decades",
            "regularity is measured by the cosine between each step and the direction to the final weights, which "
            "knows no learning rate; the paper's γ, whose display form is recalled and not read, is shown beside it",
            "distances and cosines are by sketches of 2048 numbers",
        ),
        chosen_by="three runs of one epoch with AdamW at lr 0.002 and seed 100, to see what they cost",
        study=TRAJECTORY,
    ),
)
DECLARED = {protocol.study.name: protocol for protocol in PROTOCOLS_OF}


if __name__ == "__main__":
    # Once: the runs carry the file's sha256.
    for _protocol in DECLARED.values():
        if not path(_protocol.study.name).exists():
            path(_protocol.study.name).write_text(_protocol.text(), encoding="utf-8")
