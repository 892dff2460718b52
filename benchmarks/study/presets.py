"""The studies that have a name."""

from __future__ import annotations

import math

from benchmarks.study import papers
from benchmarks.study.spec import Arm, PSchedule, Range, Study, Tuning, Value

COSINE = PSchedule(kind="cosine")
LINEAR = PSchedule(kind="linear")
ADAPTIVE = PSchedule(kind="adaptive")
CURVATURE = PSchedule(kind="curvature")

# Where tuning looks for an optimizer's learning rate on any task: four decades for each, so that equal trials search
# equally well. The best of a scan by factors of √10 lies inside on every task that comes without files.
LEARNING_RATES = {
    "sgd": Range(low=1e-3, high=10),
    "sgd-ema": Range(low=1e-2, high=100),
    "adamw": Range(low=1e-3, high=10),
    "signum": Range(low=1e-4, high=1),
    "signsgd": Range(low=1e-4, high=1),
    "lion": Range(low=1e-4, high=1),
    "normalizedsgd": Range(low=1e-3, high=10),
    "powerstep": Range(low=1e-4, high=1),
    "lpsgd": Range(low=1e-3, high=10),
    "lpsgdm": Range(low=3e-4, high=3),
    "lpsgdm-lr-matched": Range(low=1e-3, high=10),
    "muon": Range(low=1e-3, high=10),
    "scion": Range(low=3e-6, high=3e-2),
    "scale": Range(low=1e-4, high=1),
    "modular": Range(low=3e-3, high=30),
}
# Of the power map at SGD's step length, whose learning rates are SGD's.
MATCHED = LEARNING_RATES["sgd-ema"]
# arXiv:2404.10824's p = 0.8, at a decay of one step, ηλ, that brings a weight of 0.1 which gets no gradient to zero in
# about |w|^(2−p)/((2−p)·pηλ) = 66 steps: a fifth of a run's, or less.
LP: dict[str, Value] = {"decay": "lp", "decay_p": 0.8, "decay_step": 1e-3}


def _arm(
    name: str,
    optimizer: str,
    settings: dict[str, Value] | None = None,
    p: PSchedule | None = None,
    lr: Range | None = None,
    against: str | None = None,
) -> Arm:
    """An arm that tunes its learning rate, alone."""
    search = {"lr": lr or LEARNING_RATES[optimizer]}
    return Arm(name=name, optimizer=optimizer, settings=settings or {}, p_schedule=p, search=search, against=against)


def _with(arm: Arm, label: str, settings: dict[str, Value]) -> Arm:
    """The same with more settings, tuned for itself, and held against the arm without."""
    changes = {"name": f"{arm.name} + {label}", "settings": arm.settings | settings, "against": arm.name}
    return arm.model_copy(update=changes)


SGD = _arm("SGD", "sgd")
SGD_EMA = _arm("SGD-EMA", "sgd-ema")
ADAMW = _arm("AdamW", "adamw")
SIGNUM = _arm("Signum", "signum")
LPSGD = _arm("LPSGD", "lpsgd", p=COSINE)
LPSGDM = _arm("LPSGDM", "lpsgdm", p=COSINE)
MUON = _arm("Muon", "muon")
SCION = _arm("Scion", "scion")
SCALE = _arm("SCALE", "scale")
MODULAR = _arm("Modular", "modular")


def _controls(against: str | None) -> tuple[Arm, ...]:
    """What LPSGDM is without its schedule of p, without the steps that this changes, and with nothing but these."""
    return (
        _arm("LPSGDM constant p", "lpsgdm", against=against),
        _arm("LPSGDM matched", "lpsgdm", {"scale": "matched"}, COSINE, MATCHED, against),
        _arm("SGD-EMA at LPSGDM's length", "lpsgdm-lr-matched", None, COSINE, None, against),
    )


# Seconds: proves that the machinery runs, and nothing about optimizers.
SMOKE = Study(
    name="smoke",
    purpose="Does the program run? It says nothing about optimizers.",
    tasks=("digits", "breast-cancer"),
    arms=(SGD, ADAMW, _with(LPSGDM, "AGR", {"agr": True}).model_copy(update={"against": None})),
    baseline="SGD",
    tuning=Tuning(trials=2, startup=1),
    seeds=(1, 2),
    budget=0.15,
)

QUICK = Study(
    name="quick",
    purpose="Is LPSGDM better than SGD, AdamW and Signum, and what of it is annealing p, step length or a regularizer?",
    tasks=("digits", "breast-cancer", "diabetes-sparse"),
    arms=(
        *(SGD, ADAMW, SIGNUM, LPSGDM),
        *_controls(LPSGDM.name),
        _with(LPSGDM, "AGR", {"agr": True}),
        _with(LPSGDM, "ℓ0.8 decay", LP),
    ),
    baseline="SGD",
    tuning=Tuning(trials=12, startup=8, reruns=2),
    seeds=tuple(range(1, 9)),
)

STANDARD = Study(
    name="standard",
    purpose="Which norm, which schedule of p and which regularizer is worth it, over tasks of several kinds?",
    tasks=("digits", "digits-noise", "breast-cancer", "diabetes-sparse", "bytes", "quadratic", "rosenbrock"),
    arms=(
        *(SGD, SGD_EMA, ADAMW, SIGNUM, LPSGD, LPSGDM),
        *_controls(LPSGDM.name),
        _arm("LPSGDM linear p", "lpsgdm", p=LINEAR, against=LPSGDM.name),
        *(_with(arm, "AGR", {"agr": True}) for arm in (LPSGDM, ADAMW)),
        *(_with(arm, "ℓ0.8 decay", LP) for arm in (LPSGDM, ADAMW)),
        *(MUON, SCION, SCALE),
    ),
    baseline="AdamW",
    tuning=Tuning(trials=10, startup=8, reruns=2),
    seeds=tuple(range(1, 13)),
)

P_SCHEDULE = Study(
    name="p-schedule",
    purpose="Does annealing p help, and is it the direction that helps or the learning rate that p changes with it?",
    tasks=("digits", "digits-noise", "breast-cancer", "diabetes-sparse", "quadratic", "rosenbrock"),
    arms=(
        LPSGDM,
        _arm("LPSGDM linear p", "lpsgdm", p=LINEAR),
        _arm("LPSGDM adaptive p", "lpsgdm", p=ADAPTIVE, lr=Range(low=1e-3, high=10)),  # p near 2 makes short steps
        *_controls(None),
        *(SGD_EMA, SIGNUM, ADAMW),
    ),
    baseline="LPSGDM",
    tuning=Tuning(trials=12, startup=8, reruns=2),
    seeds=tuple(range(1, 11)),
)

# Where tuning looks for the learning rate of the power map at the p near 2 that the gradient's density asks for.
_NEAR_TWO = Range(low=3e-3, high=10)


def _ways(name: str, settings: dict[str, Value], lr: Range, near_two: Range) -> tuple[Arm, ...]:
    """LPSGDM under every way to move p."""
    return (
        _arm(name, "lpsgdm", settings, COSINE, lr),
        _arm(f"{name}-linear", "lpsgdm", settings, LINEAR, lr),
        _arm(f"{name}-constant", "lpsgdm", settings, None, lr),
        _arm(f"{name}-adaptive", "lpsgdm", settings, ADAPTIVE, near_two, name),
    )


ADAPTIVE_P = Study(
    name="adaptive-p",
    purpose="Is a p that follows the gradient's density or the curvature better than one that follows the clock, or "
    "stays?",
    tasks=("digits",),
    arms=(
        *_ways("LPSGDM-matched", {"scale": "matched"}, MATCHED, MATCHED),
        _arm("LPSGDM-matched-curvature", "lpsgdm", {"scale": "matched"}, CURVATURE, MATCHED, "LPSGDM-matched"),
        # The ranges of these runs, from before all ranges had four decades.
        *_ways("LPSGDM", {}, Range(low=1e-3, high=1), _NEAR_TWO),
        *(SGD_EMA, _arm("Signum", "signum", lr=Range(low=3e-4, high=0.3))),
    ),
    baseline="LPSGDM-matched",
    tuning=Tuning(trials=12, startup=8),
    seeds=tuple(range(1, 11)),
)

# AdamW's and its twins', whose steps are as long at every p, so that all search one range.
_ADAM_LENGTH = Range(low=1e-4, high=1)
# Under "dual" a step's length is about d^½·(d^(1−2/p)) in a tensor of d entries, AdamW's being d^½: the same range,
# divided by what that is in a matrix of 10,000.
_DUAL = {1.5: Range(low=2e-3, high=20), 4.0: Range(low=1e-6, high=1e-2), math.inf: Range(low=1e-8, high=1e-4)}


def _twin(p: float, scale: str, lr: Range) -> Arm:
    return _arm(f"ℓ{p:g} {scale}".replace("inf", "∞"), "adamw-lp", {"p": p, "scale": scale}, lr=lr)


# Declared before the first run: held against AdamW by test score, ten seeds, Holm over the arms of a task. At p = 2 the
# twin is AdamW itself with a tuning of its own: what it differs by is what the luck of tuning is.
ADAPTIVE_NORMS = Study(
    name="adaptive-norms",
    purpose="Is there an ℓp direction in AdamW's coordinates that is better than AdamW's own, which is p = 2?",
    tasks=("digits", "bytes"),
    arms=(
        _arm("AdamW", "adamw", lr=_ADAM_LENGTH),
        *(_twin(p, "matched", _ADAM_LENGTH) for p in (1.5, 2.0, 3.0, 4.0, 6.0, 10.0, math.inf)),
        *(_twin(p, "dual", lr) for p, lr in _DUAL.items()),
    ),
    baseline="AdamW",
    tuning=Tuning(trials=12, startup=8),
    seeds=tuple(range(1, 11)),
)

# Declared after that study and before its own first run. There the twin at p = 2 was a point of accuracy better than
# AdamW on bytes: one learning rate in half a decade is too few. Here the twins with the best means have eight, evenly
# spread, in the one decade where the best of the study lay, and fresh seeds, for tuning too.
_NEAR = Range(low=4e-3, high=4e-2)
_DECAYS: tuple[dict[str, Value], ...] = ({"p": 1.5, "scale": "dual", "decay_step": 1.2e-4}, {"decay_step": 1.6e-3})
ADAPTIVE_NORMS_NEAR = Study(
    name="adaptive-norms-near",
    purpose="Is a twin better than AdamW where both have tried many learning rates near the best?",
    tasks=ADAPTIVE_NORMS.tasks,
    arms=(
        _arm("AdamW", "adamw", lr=_NEAR),
        *(_twin(p, "matched", _NEAR) for p in (1.5, 2.0, 4.0)),
        _twin(1.5, "dual", Range(low=0.04, high=0.4)),
        # Added after the study, in which the "dual" twin was better: at its learning rates λ = 0.01 makes an ηλ ten to
        # twenty times AdamW's. Here each has about the other's ηλ, at its own learning rate.
        Arm(name="ℓ1.5 dual, ηλ = 1.2e-4", optimizer="adamw-lp", settings=_DECAYS[0], tuned_as="ℓ1.5 dual"),
        Arm(name="AdamW, ηλ = 1.6e-3", optimizer="adamw", settings=_DECAYS[1], tuned_as="AdamW"),
    ),
    baseline="AdamW",
    tuning=Tuning(trials=8, startup=8, seeds=(1001,)),
    seeds=tuple(range(11, 21)),
)

NORMS_BY_LAYER = Study(
    name="norms-by-layer",
    purpose="Is a norm of its own for each kind of layer better than one norm for all of them?",
    tasks=("digits-mix", "bytes"),
    arms=(ADAMW, SGD, LPSGDM, MUON, SCION, SCALE, MODULAR),
    baseline="AdamW",
    tuning=Tuning(trials=10, startup=8, reruns=2),
    seeds=tuple(range(1, 9)),
)

# What is known before anything is run, so that it tests the program: SGD of normopt, SGD of torch at the same learning
# rate, and averaged momentum at ten times that rate are the same method; momentum goes further than none, on the
# quadratics because √κ steps do instead of κ; along the axes Adam goes further than SGD without momentum, because it
# sees each curvature for itself.
ORDERINGS = Study(
    name="orderings",
    purpose="Does the program find what is known: equal methods equal, and momentum better where curvatures differ?",
    tasks=("quadratic", "quadratic-axes", "digits"),
    arms=(
        SGD,
        Arm(name="SGD of torch", optimizer="sgd-torch", tuned_as="SGD"),
        Arm(name="SGD-EMA at ten times the rate", optimizer="sgd-ema", tuned_as="SGD", lr_factor=10.0),
        _arm("SGD without momentum", "sgd", {"momentum": 0.0}),
        _arm("Adam", "adamw", {"weight_decay": 0.0}, against="SGD without momentum"),
    ),
    baseline="SGD",
    tuning=Tuning(trials=12, startup=8),
    seeds=tuple(range(1, 9)),
)

PRESETS: dict[str, Study] = {
    study.name: study
    for study in (
        *(SMOKE, QUICK, STANDARD, P_SCHEDULE, ADAPTIVE_P, ADAPTIVE_NORMS, NORMS_BY_LAYER),
        *(ADAPTIVE_NORMS_NEAR, ORDERINGS),
        *(protocol.study for protocol in papers.DECLARED.values()),
    )
}
