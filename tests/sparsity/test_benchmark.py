"""The measurement of what sparsity is worth, on a miniature grid, and the task that it adds. No speed is asserted."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from benchmarks.cli import app
from benchmarks.programs import sparsity
from benchmarks.programs.sparsity import Arm, Run
from benchmarks.tasks.digits import Digits
from benchmarks.tasks.digits_cnn import NOISE, DigitsCNN
from benchmarks.training import evaluate


@pytest.fixture
def miniature(monkeypatch):
    """A few short runs, one of which surely kills units, and timings of a few rounds."""
    arms = (
        Arm(over="no decay", p=None, weight_decays=(0.0,)),
        Arm(over="AdamW's own", p=None, weight_decays=(1.0,)),
        Arm(over="rows", p=0.5, weight_decays=(1.0, 30.0)),
    )
    monkeypatch.setattr(sparsity, "ARMS", arms)
    monkeypatch.setattr(sparsity, "SEEDS", (1,))
    monkeypatch.setattr(sparsity, "TASKS", {"digits": Digits()})
    monkeypatch.setattr(sparsity, "SETTINGS", {"digits": {"lr": 3e-3, "epochs": 2}})
    monkeypatch.setattr(sparsity, "LAYERS", ((32, 0.9),))
    monkeypatch.setattr(sparsity, "ROUNDS", 6)


def test_the_command_measures_and_writes_what_the_docs_read(miniature, tmp_path):
    out = tmp_path / "sparsity.json"
    done = CliRunner().invoke(app, ["sparsity", "--out", str(out), "--workers", "1"])
    assert done.exit_code == 0, done.output
    result = json.loads(out.read_text(encoding="utf-8"), object_hook=lambda fields: SimpleNamespace(**fields))
    assert [(r.arm, r.weight_decay, r.seed) for r in result.runs] == [
        ("no decay", 0.0, 1),
        ("AdamW's own", 1.0, 1),
        ("ℓ0.5 of rows", 1.0, 1),
        ("ℓ0.5 of rows", 30.0, 1),
    ]
    assert all(r.error <= 1e-6 and r.shrunk <= r.parameters == 26122 for r in result.runs)
    assert {r.shrunk for r in result.runs if r.arm == "no decay"} == {26122}
    heavy = [r for r in result.runs if r.weight_decay == 30]
    assert all(r.zeros > 0.99 and r.shrunk < 1000 for r in heavy)
    assert [c.arm for c in result.chosen] == ["no decay", "AdamW's own", "ℓ0.5 of rows"]
    assert [(t.arm, t.batch) for t in result.networks] == [(c.arm, b) for c in result.chosen for b in (1, 256)]
    assert [(t.units, t.batch) for t in result.layers] == [(32, 1), (32, 256)]
    assert all(t.speedup > 0 and t.milliseconds > 0 for t in [*result.networks, *result.layers])


def test_a_run_is_the_same_whenever_it_is_made(monkeypatch):
    monkeypatch.setattr(sparsity, "SETTINGS", {"digits": {"lr": 3e-3, "epochs": 6}})
    arm = Arm(over="rows", p=0.5, weight_decays=(6.0,))
    first, second = (sparsity.train("digits", arm, 6.0, 1) for _ in range(2))
    assert first[0] == second[0]
    run, full, small = first
    assert run.dead_rows > 0
    assert run.shrunk == sum(p.numel() for p in small.parameters()) < run.parameters
    task = Digits()
    splits = task.load()
    assert evaluate(small, task, splits, splits.test)[1] == evaluate(full, task, splits, splits.test)[1] == run.test


def test_the_choice_is_by_validation_alone_and_of_the_smallest(monkeypatch):
    def run(arm, decay, validation, shrunk):
        same = {"task": "digits", "seed": 1, "test": 0.0, "zeros": 0.0, "dead_rows": 0, "rows": 1, "parameters": 100}
        return Run(arm=arm, weight_decay=decay, validation=validation, shrunk=shrunk, error=0.0, **same)

    arms = (
        Arm(over="no decay", p=None, weight_decays=(0.0,)),
        Arm(over="entries", p=1.0, weight_decays=(1.0, 2.0, 3.0)),
        Arm(over="rows", p=1.0, weight_decays=(1.0, 2.0)),
    )
    monkeypatch.setattr(sparsity, "ARMS", arms)
    monkeypatch.setattr(sparsity, "TASKS", {"digits": Digits()})
    entries, rows = (arm.name for arm in arms[1:])
    runs = [run("no decay", 0.0, 0.95, 100)]
    runs += [run(entries, 1.0, 0.96, 100), run(entries, 2.0, 0.94, 60), run(entries, 3.0, 0.93, 10)]
    runs += [run(rows, 1.0, 0.93, 90), run(rows, 2.0, 0.90, 50)]
    chosen = {c.arm: (c.weight_decay, c.keeps) for c in sparsity.choose(runs)}
    assert chosen == {"no decay": (0.0, True), entries: (2.0, True), rows: (1.0, False)}


def test_a_share_of_the_training_labels_is_noise_and_no_others():
    task, clean = DigitsCNN(), Digits().load()
    splits = task.load()
    assert all(torch.equal(a, b) for a, b in zip(splits.train, task.load().train, strict=True))
    for name in ("validation", "test"):
        x, y = getattr(splits, name)
        assert torch.equal(y, getattr(clean, name)[1])
        assert torch.equal(x.flatten(1), getattr(clean, name)[0])
    wrong = float((splits.train[1] != clean.train[1]).float().mean())
    assert wrong == pytest.approx(0.9 * NOISE, abs=0.04)
    assert splits.train[0].shape[1:] == (1, 8, 8)


def test_the_cnn_is_as_described():
    model = DigitsCNN().build()
    for chosen in ([p for p in model.parameters() if p.dim() > 1], [p for p in model.parameters() if p.dim() == 1]):
        assert f"{sum(p.numel() for p in chosen):,} " in DigitsCNN.description.replace("(", " ")
    assert isinstance(model, nn.Sequential)
    assert model(DigitsCNN().load().test[0][:3]).shape == (3, 10)
