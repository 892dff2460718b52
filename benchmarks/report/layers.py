"""Which norm each layer has under each preset of a study."""

from __future__ import annotations

from benchmarks.arms import ARMS, grouped
from benchmarks.results import Results
from benchmarks.tasks import TASKS

WORDS = (
    "The other optimizers measure all weights by one norm; these measure each layer by a norm that fits what it does "
    "with its input, and move it, in one step at a learning rate of 1, by the radius. Under linf a step is the sign of "
    "the gradient, under spectral a matrix whose singular values are all equal. The tables are what "
    "print(normopt.param_groups(model, preset=…)) shows."
)


def layers(results: Results) -> dict[str, str]:
    """A table for each arm with a preset, for it gives every layer its own norm; empty if the study has none."""
    presets = {arm.name: ARMS[arm.name].preset for arm in results.study.arms}
    if not any(presets.values()):
        return {}
    task = TASKS[results.study.task]
    model = task.build()
    return {name: str(grouped(preset, model, task.residual_depth)) for name, preset in presets.items() if preset}
