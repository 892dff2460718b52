from __future__ import annotations

import math

import pytest
import torch

from benchmarks.arms import ARMS
from benchmarks.spec import RunSpec
from benchmarks.store import Store
from benchmarks.tasks import TASKS
from benchmarks.training import RunRecord, run, zero_fraction


def spec(**changes: object) -> RunSpec:
    settings: dict[str, object] = dict(
        task="digits",
        arm="LPSGDM",
        lr=0.01,
        agr=True,
        weight_decay=0.1,
        decay_p=0.8,
        seed=3,
        epochs=2,
        batch_size=64,
        target=0.5,
    )
    return RunSpec.model_validate(settings | changes)


def outcome(record: RunRecord) -> dict[str, object]:
    return record.model_dump(exclude={"ms_per_step", "seconds"})


@pytest.fixture(autouse=True)
def restore_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("arm", ["LPSGDM", "AdamW"])
def test_equal_specs_give_equal_records(arm):
    regularized = arm != "AdamW"
    s = spec(arm=arm, agr=regularized, weight_decay=0.1 if regularized else 0.0)
    first = run(s)
    torch.rand(7)  # the state of torch's generator is no part of a run
    assert outcome(run(s)) == outcome(first)


def test_another_seed_is_another_run():
    assert outcome(run(spec(seed=4)))["epochs"] != outcome(run(spec()))["epochs"]


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_learns_and_its_record_survives_json(arm):
    record = run(spec(arm=arm, lr=ARMS[arm].lr, agr=False, weight_decay=0.0))
    assert not record.diverged
    assert record.epochs[-1].train_loss < record.epochs[0].train_loss < math.log(10) * 1.1
    assert [epoch.steps for epoch in record.epochs] == [17, 34]
    assert RunRecord.model_validate_json(record.model_dump_json()) == record


def test_p_is_annealed_once_an_epoch_where_it_is_and_stays_where_it_is_not():
    annealed = run(spec(epochs=3)).epochs
    assert [epoch.p for epoch in annealed] == [8.0, 5.0, 2.0]
    assert [epoch.p for epoch in run(spec(arm="LPSGDM-constant")).epochs] == [8.0, 8.0]
    assert run(spec(arm="AdamW", agr=False, weight_decay=0.0)).epochs[0].p is None


def test_an_infinite_p_is_recorded_as_none_for_json_cannot_say_it():
    record = run(spec(arm="Signum"))
    assert record.epochs[0].p is None
    text = record.model_dump_json()
    assert "Infinity" not in text
    assert "NaN" not in text


def test_a_record_from_when_an_infinite_p_was_a_string_can_still_be_read():
    text = run(spec(arm="Signum")).model_dump_json().replace('"p":null', '"p":"Infinity"')
    assert RunRecord.model_validate_json(text).epochs[0].p == math.inf


def test_a_run_that_diverges_is_a_result(tmp_path):
    record = run(spec(arm="SGD", lr=1e18, agr=False, weight_decay=0.0))
    assert record.diverged
    assert record.test_loss is record.test_accuracy is record.zero_fraction is None
    Store(tmp_path).add(record)
    assert Store(tmp_path).runs[record.id] == record


def test_lp_decay_makes_exact_zeros_and_its_absence_none():
    strong = run(spec(weight_decay=1.0)).zero_fraction
    assert strong is not None
    assert strong > 0.5
    assert run(spec(weight_decay=0.0)).zero_fraction == 0


def test_zeros_are_counted_over_matrices_alone():
    model = torch.nn.Linear(4, 2)
    with torch.no_grad():
        model.weight.fill_(1.0)
        model.weight[0, :3] = torch.tensor([0.0, 1e-14, 1e-12])
        model.bias.zero_()
    assert zero_fraction(model) == 2 / 8


def test_the_state_of_the_optimizer_is_measured():
    weights = 64 * 128 + 128 + 128 * 128 + 128 + 128 * 10 + 10
    assert run(spec(arm="SGD")).state_bytes == 4 * weights
    assert run(spec(arm="SignSGD")).state_bytes == 0


def test_the_run_id_is_a_hash_of_every_setting():
    changes = dict(
        arm="SGD", lr=0.02, agr=False, weight_decay=0.2, decay_p=0.9, seed=4, epochs=3, batch_size=32, target=0.6
    )
    ids = {spec().run_id} | {spec(**{key: value}).run_id for key, value in changes.items()}
    assert len(ids) == len(changes) + 1
    assert spec().run_id == spec().run_id


def test_the_splits_are_disjoint_whole_and_balanced():
    splits = TASKS["digits"].load()
    parts = [splits.train, splits.validation, splits.test]
    assert [len(x) for x, _ in parts] == [1078, 359, 360]
    assert sum(len(x) for x, _ in parts) == 1797
    for x, y in parts:
        assert x.min() == 0
        assert x.max() == 1
        shares = torch.bincount(y, minlength=10) / len(y)
        assert (shares - 0.1).abs().max() < 0.005
