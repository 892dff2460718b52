from __future__ import annotations

import pytest

from benchmarks.optimizers import check, make_optimizer
from benchmarks.study.presets import PRESETS
from benchmarks.study.spec import RunSpec, Study
from benchmarks.tasks import TASKS

ARMS = {(study.name, arm.name): arm for study in PRESETS.values() for arm in study.arms}


def test_the_studies_that_are_promised_are_there():
    wanted = {"smoke", "quick", "standard", "p-schedule", "norms-by-layer"}
    assert wanted <= set(PRESETS)
    assert all(name == study.name and study.purpose for name, study in PRESETS.items())


@pytest.mark.parametrize("name", PRESETS)
def test_a_study_is_consistent_however_it_was_made(name):
    study = PRESETS[name]
    assert Study.model_validate(study.model_dump()) == study
    assert Study.model_validate_json(study.model_dump_json()) == study
    assert set(study.tasks) <= set(TASKS)
    assert all(study.arm(arm.against or study.baseline) for arm in study.arms)


@pytest.mark.parametrize("arm", ARMS.values(), ids=map("-".join, ARMS))
def test_every_arm_can_be_made(arm):
    middle = {key: (span.low * span.high) ** 0.5 for key, span in arm.search.items()}
    settings = {**({"lr": 0.01} if arm.tuned_as else {}), **middle, **arm.settings}
    check(arm.optimizer, settings)
    spec = RunSpec(
        task="digits",
        optimizer=arm.optimizer,
        settings=settings,
        p_schedule=arm.p_schedule,
        seed=1,
        epochs=2,
        batch_size=64,
    )
    task = TASKS["digits"]
    _, schedule = make_optimizer(spec, task.build(), task)
    assert (schedule is None) == (arm.p_schedule is None)


@pytest.mark.parametrize("name", ["quick", "standard", "p-schedule", "norms-by-layer"])
def test_every_arm_of_a_comparison_is_tuned_by_itself(name):
    study = PRESETS[name]
    assert all("lr" in arm.search and arm.tuned_as is None for arm in study.arms)
    assert study.tuning.trials >= 10
    assert len(study.seeds) >= 5
    assert study.tuning.startup < study.tuning.trials
    assert study.tuning.reruns == 2
    assert {round(arm.search["lr"].high / arm.search["lr"].low) for arm in study.arms if arm.search} == {10**4}


def test_the_controls_of_lpsgdm_are_in_the_studies_that_speak_of_it():
    for name in ("quick", "standard", "p-schedule"):
        optimizers = {(arm.optimizer, arm.settings.get("scale"), arm.p_schedule is None) for arm in PRESETS[name].arms}
        wanted = {
            ("lpsgdm", None, False),
            ("lpsgdm", None, True),
            ("lpsgdm", "matched", False),
            ("lpsgdm-lr-matched", None, False),
        }
        assert wanted <= optimizers, name
