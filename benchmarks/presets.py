"""The studies that have a name."""

from __future__ import annotations

from collections.abc import Iterable

from benchmarks.arms import ARMS
from benchmarks.spec import ArmPlan, Regularizer, SparsityPlan, Study

ALL: tuple[Regularizer, ...] = ("none", "agr", "lp", "agr+lp")
FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0)


def _plans(names: Iterable[str], factors: tuple[float, ...], regularizers: tuple[Regularizer, ...]) -> list[ArmPlan]:
    return [
        ArmPlan(
            name=name,
            # Three digits: 0.3 and not 0.30000000000000004 in the store and the report.
            lrs=tuple(float(f"{ARMS[name].lr * factor:.3g}") for factor in factors),
            regularizers=regularizers if ARMS[name].ours else ("none",),
        )
        for name in names
    ]


# What anneals p, beside those that do not and what they are compared with.
QUICK_ARMS = (
    *("SGD", "SGD-EMA", "SignSGD", "Signum", "AdamW"),
    *("LPSGD", "LPSGDM", "LPSGDM-constant", "LPSGDM-matched"),
)

# These, with one norm for all layers, on handwritten digits, in less than three minutes on two cores.
QUICK = Study(
    preset="quick",
    task="digits",
    arms=tuple(_plans(QUICK_ARMS, FACTORS, ALL)),
    baseline="SGD",
    tuning_seed=1000,
    final_seeds=(1, 2, 3, 4, 5),
    epochs=12,
    batch_size=64,
    target=0.95,
    decay_p=0.8,
    decay_step=3e-4,
    sparsity=SparsityPlan(
        arm="LPSGDM",
        weight_decays=(0.01, 0.03, 0.06, 0.1, 0.15, 0.2),
        seeds=tuple(range(11, 21)),
        epochs=20,
    ),
)

# Optimizers that give each layer a norm of its own beside three that do not, on a network with layers of every kind:
# about a minute.
LAYERS_DIGITS = Study(
    preset="layers-digits",
    task="digits-mix",
    arms=tuple(_plans(("AdamW", "SGD", "LPSGDM", "Muon", "Scion", "SCALE", "Modular"), FACTORS, ("none",))),
    baseline="AdamW",
    tuning_seed=1000,
    final_seeds=(1, 2, 3, 4, 5),
    epochs=12,
    batch_size=64,
    target=0.95,
)

# The same on a tiny GPT, in less than ten minutes on two cores.
LAYERS_BYTES = Study(
    preset="layers-bytes",
    task="bytes",
    arms=LAYERS_DIGITS.arms,
    baseline="AdamW",
    tuning_seed=1000,
    final_seeds=(1, 2, 3),
    epochs=10,
    batch_size=16,
    target=0.35,
)

# What moves p: the number of the epoch, the gradient, or nothing; with steps as long as SGD's, where only the direction
# differs, and with the power map's own. About a minute.
ADAPTIVE_P = Study(
    preset="adaptive-p",
    task="digits",
    arms=tuple(
        _plans(
            (
                *("LPSGDM-matched", "LPSGDM-matched-linear", "LPSGDM-matched-constant", "LPSGDM-matched-adaptive"),
                *("LPSGDM", "LPSGDM-linear", "LPSGDM-constant", "LPSGDM-adaptive", "SGD-EMA", "Signum"),
            ),
            FACTORS,
            ("none",),
        )
    ),
    baseline="LPSGDM-matched",
    tuning_seed=1000,
    final_seeds=tuple(range(1, 11)),
    epochs=12,
    batch_size=64,
    target=0.95,
)

# Seconds: proves that the machinery runs, and nothing about optimizers.
SMOKE = Study(
    preset="smoke",
    task="digits",
    arms=tuple(_plans(("SGD", "AdamW", "LPSGDM"), (1.0, 3.0), ("none", "agr+lp"))),
    baseline="SGD",
    tuning_seed=1000,
    final_seeds=(1, 2),
    epochs=2,
    batch_size=64,
    target=0.5,
    decay_p=0.8,
    decay_step=3e-4,
    sparsity=SparsityPlan(arm="LPSGDM", weight_decays=(0.1, 1.0), seeds=(11, 12), epochs=2),
)

PRESETS: dict[str, Study] = {study.preset: study for study in (QUICK, LAYERS_DIGITS, LAYERS_BYTES, ADAPTIVE_P, SMOKE)}
