from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import normopt
from benchmarks.optimizers import make_optimizer
from benchmarks.store import Store
from benchmarks.study.record import RunRecord
from benchmarks.study.spec import LRSchedule, PSchedule, RunSpec
from benchmarks.tasks import TASKS
from benchmarks.training import AT_ONCE, evaluate, make_lr_schedule, run, zero_fraction

DATA = Path(__file__).parents[2] / "docs/data"
LP = {"decay": "lp", "decay_p": 0.8}


def spec(**changes: Any) -> RunSpec:
    plain: dict[str, Any] = dict(
        task="digits",
        optimizer="lpsgdm",
        settings={"lr": 0.01, "agr": True, "weight_decay": 0.1, **LP},
        p_schedule=PSchedule(kind="cosine"),
        seed=3,
        epochs=2,
        batch_size=64,
    )
    return RunSpec.model_validate(plain | changes)


def outcome(record: RunRecord) -> dict[str, object]:
    return record.model_dump(exclude={"ms_per_step", "seconds"})


@pytest.fixture(autouse=True)
def restore_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("optimizer", ["lpsgdm", "adamw"])
def test_equal_specs_give_equal_records(optimizer):
    plain = dict(optimizer="adamw", settings={"lr": 0.01}, p_schedule=None)
    s = spec(**(plain if optimizer == "adamw" else {}))
    first = run(s)
    torch.rand(7)  # the state of torch's generator is no part of a run
    assert outcome(run(s)) == outcome(first)


def test_another_seed_is_another_run():
    assert run(spec(seed=4)).curve != run(spec()).curve


def test_a_run_is_what_a_plain_loop_does():
    """The weights, the batches, the cosine of the learning rate, and the mean loss of an epoch."""
    record = run(spec(optimizer="sgd-torch", settings={"lr": 0.1, "momentum": 0.0}, p_schedule=None))
    torch.manual_seed(3)
    model = TASKS["digits"].build().double()
    x, y = (part.double() if part.is_floating_point() else part for part in TASKS["digits"].load().train)
    draws, step, means = torch.Generator().manual_seed(3), 0, []
    for _ in range(2):
        total = 0.0
        for chosen in torch.randperm(len(x), generator=draws).split(64):
            loss = torch.nn.functional.cross_entropy(model(x[chosen]), y[chosen])
            model.zero_grad()
            loss.backward()
            lr = 0.1 * (1 + math.cos(math.pi * step / 34)) / 2
            with torch.no_grad():
                for p in model.parameters():
                    p -= lr * p.grad
            step += 1
            total += float(loss.detach()) * len(chosen)
        means.append(total / len(x))
    assert [point.train_loss for point in record.curve] == pytest.approx(means, rel=1e-4)
    assert [point.steps for point in record.curve] == [17, 34]


def test_a_record_survives_json():
    record = run(spec(task="digits-noise"))
    assert RunRecord.model_validate_json(record.model_dump_json()) == record


def test_p_is_annealed_once_an_epoch_where_it_is_and_stays_where_it_is_not():
    assert [point.p for point in run(spec(epochs=3)).curve] == [8.0, 5.0, 2.0]
    exponent = PSchedule(kind="linear", space="exponent", p_end=3.0)
    curve = run(spec(epochs=3, settings={"lr": 0.01, "p": "inf"}, p_schedule=exponent)).curve
    assert [point.p for point in curve] == [None, 5.0, 3.0]
    assert [point.p for point in run(spec(p_schedule=None)).curve] == [8.0, 8.0]
    assert run(spec(optimizer="adamw", settings={"lr": 0.01}, p_schedule=None)).curve[0].p is None


def test_an_adaptive_p_is_moved_after_every_step(monkeypatch):
    steps, step = [], normopt.schedules.AdaptiveP.step
    monkeypatch.setattr(normopt.schedules.AdaptiveP, "step", lambda self: (steps.append(1), step(self)))
    record = run(spec(p_schedule=PSchedule(kind="adaptive")))
    assert len(steps) == record.curve[-1].steps == 34
    assert record.curve[0].p == 2.0
    assert 2.0 < record.curve[1].p < 8.0


def test_what_json_cannot_say_is_not_in_a_record():
    for s in (
        spec(optimizer="signum", settings={"lr": 0.01}, p_schedule=None),
        spec(optimizer="sgd", settings={"lr": 1e18}, p_schedule=None),
        spec(task="diabetes-sparse", optimizer="sgd", settings={"lr": 0.2}, p_schedule=None, epochs=20),
    ):
        text = run(s).model_dump_json()
        assert "Infinity" not in text
        assert "NaN" not in text


def test_a_run_that_diverges_is_a_result():
    record = run(spec(optimizer="sgd", settings={"lr": 1e18}, p_schedule=None))
    assert record.diverged
    assert record.last_loss == math.inf
    assert record.test_loss is record.test_score is None
    assert record.measures == {}
    assert RunRecord.model_validate_json(record.model_dump_json()) == record


def test_a_decomposition_that_fails_on_what_is_not_finite_is_a_divergence(monkeypatch):
    def fail(self: object, closure: object = None) -> None:
        raise torch.linalg.LinAlgError("no convergence")

    monkeypatch.setattr(torch.optim.SGD, "step", fail)
    s = spec(optimizer="sgd-torch", settings={"lr": 0.1}, p_schedule=None)
    with pytest.raises(torch.linalg.LinAlgError):
        run(s)
    build = TASKS["digits"].build

    def broken() -> torch.nn.Module:
        model = build()
        torch.nn.init.constant_(model[0].weight, math.nan)
        return model

    monkeypatch.setattr(TASKS["digits"], "build", broken, raising=False)
    assert run(s).diverged


def test_lp_decay_makes_exact_zeros_and_its_absence_none():
    assert run(spec(settings={"lr": 0.01, "weight_decay": 1.0, **LP})).measures["zeros"] > 0.5
    assert run(spec(settings={"lr": 0.01})).measures["zeros"] == 0


def test_zeros_are_counted_over_matrices_alone():
    model = torch.nn.Linear(4, 2)
    with torch.no_grad():
        model.weight.fill_(1.0)
        model.weight[0, :3] = torch.tensor([0.0, 1e-14, 1e-12])
        model.bias.zero_()
    assert zero_fraction(model) == 1 / 8


def test_the_state_of_the_optimizer_is_measured():
    weights = 64 * 128 + 128 + 128 * 128 + 128 + 128 * 10 + 10
    assert run(spec(optimizer="sgd", settings={"lr": 0.1}, p_schedule=None)).state_bytes == 4 * weights
    assert run(spec(optimizer="signsgd", settings={"lr": 1e-3}, p_schedule=None)).state_bytes == 0
    # Adam's two moments, and a step of 4 bytes for each of six tensors.
    adam = run(spec(optimizer="adamw", settings={"lr": 1e-3}, p_schedule=None)).state_bytes
    assert adam == 8 * weights + 24


def test_normalisation_is_by_the_batch_in_training_and_by_its_averages_in_evaluation():
    task = TASKS["digits-noise"]
    splits = task.load()
    torch.manual_seed(0)
    model = task.build()
    evaluate(model, task, splits, splits.test)
    assert model[1].num_batches_tracked == 0
    record = run(spec(task="digits-noise", optimizer="sgd", settings={"lr": 0.0}, p_schedule=None, epochs=1))
    # Nothing was learned, so that the training loss is by batch statistics and the other by averages of them.
    assert record.curve[0].train_loss != pytest.approx(record.curve[0].validation_loss, rel=1e-3)


def test_loss_and_accuracy_are_over_all_that_is_predicted_however_it_is_cut():
    torch.manual_seed(0)
    n = AT_ONCE + 3
    logits, classes = torch.randn(n, 5, 7), torch.randint(7, (n, 5))
    loss, accuracy = evaluate(torch.nn.Identity(), TASKS["bytes"], TASKS["digits"].load(), (logits, classes))
    z, y = logits.double().numpy().reshape(-1, 7), classes.numpy().reshape(-1)
    logs = z - np.log(np.exp(z).sum(1, keepdims=True))
    assert loss == pytest.approx(-logs[np.arange(len(y)), y].mean(), rel=1e-6)
    assert accuracy == (z.argmax(1) == y).mean()


def test_the_run_id_is_a_hash_of_every_setting():
    changes: dict[str, Any] = dict(
        task="bytes",
        optimizer="sgd",
        settings={"lr": 0.02},
        p_schedule=PSchedule(kind="linear"),
        lr_schedule=LRSchedule(warmup=0.1),
        seed=4,
        epochs=3,
        batch_size=32,
    )
    ids = {spec().run_id} | {spec(**{key: value}).run_id for key, value in changes.items()}
    assert len(ids) == len(changes) + 1
    assert spec().run_id == spec().run_id


@pytest.mark.parametrize("path", sorted(DATA.glob("*.parquet")), ids=lambda path: path.stem)
def test_stored_runs_keep_their_names(path):
    runs = Store.from_parquet(path).runs
    assert runs
    assert all(record.spec.run_id == record.id == run_id for run_id, record in runs.items())


LR_SCHEDULES = {
    "constant": (LRSchedule(kind="constant"), [1.0] * 10),
    "cosine": (LRSchedule(), [(1 + math.cos(math.pi * t / 10)) / 2 for t in range(10)]),
    "warm-up and cosine": (
        LRSchedule(warmup=0.2),
        [1 / 3, 2 / 3, *((1 + math.cos(math.pi * t / 8)) / 2 for t in range(8))],
    ),
    "wsd": (LRSchedule(kind="wsd", warmup=0.1, cooldown=0.4), [0.5, *[1.0] * 6, 0.75, 0.5, 0.25]),
}


@pytest.mark.parametrize(("plan", "factors"), LR_SCHEDULES.values(), ids=LR_SCHEDULES)
def test_the_learning_rate_moves_as_planned(plan, factors):
    optimizer = torch.optim.SGD([torch.zeros(2, requires_grad=True)], lr=0.3)
    schedule, seen = make_lr_schedule(plan, optimizer, 10), []
    for _ in factors:
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert seen == pytest.approx([0.3 * factor for factor in factors], rel=1e-12)
    assert [plan.factor(t, 10) for t in range(10)] == pytest.approx(factors, rel=1e-12)


def test_a_run_has_its_schedule_of_the_learning_rate():
    losses = {name: run(spec(lr_schedule=plan)).test_loss for name, (plan, _) in LR_SCHEDULES.items()}
    assert len(set(losses.values())) == len(losses)


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"kind": "wsd"}, "wsd needs a cooldown"),
        ({"cooldown": 0.2}, "only wsd has one"),
        ({"kind": "wsd", "warmup": 0.7, "cooldown": 0.4}, "at most 1"),
        ({"kind": "linear"}, "'cosine', 'constant' or 'wsd'"),
    ],
)
def test_a_schedule_of_the_learning_rate_that_cannot_be_is_refused(settings, word):
    with pytest.raises(ValueError, match=word):
        LRSchedule(**settings)


@pytest.mark.parametrize("optimizer", ["adamw", "lpsgdm"])
def test_pruning_leaves_the_share_of_zeros_that_is_asked_for(optimizer):
    settings = {"lr": 1e-2, "prune": 0.75}
    pruned = run(spec(optimizer=optimizer, settings=settings, p_schedule=None, epochs=10))
    assert pruned.measures["zeros"] == pytest.approx(0.75, abs=1e-4)
    assert pruned.test_score > 0.8


def test_agr_of_an_optimizer_and_on_hooks_are_the_same():
    def loss(optimizer: str, **agr: bool) -> float:
        made = run(spec(optimizer=optimizer, settings={"lr": 1e-3} | agr, p_schedule=None, epochs=1))
        return made.curve[0].train_loss

    assert loss("adamw", agr=True) == pytest.approx(loss("adamw-normopt", agr=True), rel=1e-5)
    assert loss("adamw", agr=True) != loss("adamw")


def test_an_unknown_task_lists_the_near_ones():
    with pytest.raises(ValueError, match="unknown task 'digit'; did you mean 'digits'"):
        run(spec(task="digit"))


def test_p_is_what_the_steps_of_an_epoch_are_made_with():
    s = spec(epochs=2)
    model = TASKS["digits"].build()
    optimizer, schedule = make_optimizer(s, model, TASKS["digits"])
    assert schedule is not None
    seen = [optimizer.param_groups[0]["p"]]
    schedule.step()
    seen.append(optimizer.param_groups[0]["p"])
    assert [point.p for point in run(s).curve] == seen
