"""What cannot work is told before anything runs."""

from __future__ import annotations

import warnings

from benchmarks.optimizers import make_optimizer
from benchmarks.study.spec import RunSpec, Study
from benchmarks.study.toml import BadStudy
from benchmarks.tasks import TASKS
from benchmarks.tasks.digits import Digits


def rehearse(study: Study) -> None:
    """Make every arm's optimizer and its schedule of p once, on the digits' network, in the middle of what is searched.

    Raises:
        BadStudy: one cannot be made; the message says which and why.
    """
    task = TASKS[Digits.name]
    for arm in study.arms:
        searched = study.arm(arm.tuned_as).search if arm.tuned_as else arm.search
        spec = RunSpec(
            task=task.name,
            optimizer=arm.optimizer,
            settings={**{name: within.at(0.5) for name, within in searched.items()}, **arm.settings},
            p_schedule=arm.p_schedule,
            seed=0,
            epochs=task.epochs,
            batch_size=task.batch_size,
        )
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # they are the runs' to give
                make_optimizer(spec, task.build(), task)
        except Exception as error:
            raise BadStudy(f"the optimizer of the arm {arm.name!r} cannot be made: {error}") from error
