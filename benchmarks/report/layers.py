"""Which norm each layer has, for the arms that give every layer its own."""

from __future__ import annotations

from typing import cast

import normopt
from benchmarks.optimizers import described
from benchmarks.results import Results
from benchmarks.tasks import TASKS
from normopt.groups.presets import PresetName

WORDS = (
    "The other optimizers measure all weights by one norm; these measure each layer by a norm that fits what it does "
    "with its input, and move it, in one step at a learning rate of 1, by the radius. Under linf a step is the sign of "
    "the gradient, under spectral a matrix whose singular values are all equal. The tables are what "
    "print(normopt.param_groups(model, preset=…)) shows."
)


def layers(results: Results) -> dict[str, str]:
    """A table for each preset and task, by a title; empty if no arm of the study has a preset."""
    worn: dict[str, list[str]] = {}
    for arm in results.study.arms:
        preset = arm.settings.get("preset", described(arm.optimizer).preset)
        if isinstance(preset, str) and preset != "none":
            worn.setdefault(preset, []).append(arm.name)
    return {
        f"{', '.join(arms)} on {name}": str(_grouped(preset, name))
        for name in results.tasks
        for preset, arms in worn.items()
    }


def _grouped(preset: str, name: str) -> normopt.ParamGroups:
    task = TASKS[name]
    return normopt.param_groups(
        task.build(), cast(PresetName, preset), residual_depth=task.residual_depth if preset == "modular" else None
    )
