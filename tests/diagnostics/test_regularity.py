from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from benchmarks.cli import app
from benchmarks.programs import regularity
from benchmarks.programs.regularity import Cell, Point, Regularity, Run, Setting, build, correlate, train

pytestmark = pytest.mark.usefixtures("one_thread")

BARE = Cell(optimizer="SGD", batch_norm=False, skip=False, activation="relu")
FULL = Cell(optimizer="LPSGDM", batch_norm=True, skip=True, activation="tanh")
SMALL = Setting(width=16, depth=2, steps=12, seeds=(1, 2, 3))


def test_the_command_on_a_miniature_grid(monkeypatch, tmp_path):
    monkeypatch.setattr(regularity, "plan", lambda: [BARE, FULL])
    monkeypatch.setattr(regularity, "SETTING", SMALL)
    monkeypatch.setattr(regularity, "RATES", 2)
    out = tmp_path / "made" / "regularity.json"
    done = CliRunner().invoke(app, ["regularity", "--out", str(out), "--workers", "1"])
    assert done.exit_code == 0, done.output
    assert "2 points" in done.output
    for trap in regularity.TRAPS:
        assert trap in done.output
    found = Regularity.model_validate_json(out.read_text(encoding="utf-8"))
    assert found.traps == regularity.TRAPS
    assert [point.cell for point in found.points] == [BARE, FULL]
    for point in found.points:
        assert point.edge  # of two rates, each is at the edge
        assert [run.seed for run in point.runs] == [1, 2, 3]
        for run in point.runs:
            assert 0 < run.straightness < 1
            assert -1 <= run.median_cosine <= 1
            assert run.train_loss > 0
    # The best rate by validation, and a run that can be made again.
    by_rate = {0.01 * 4**i: train(BARE, SMALL, 0.01 * 4**i, SMALL.tuning_seed, False)[0] for i in range(2)}
    assert found.points[0].lr == min(by_rate, key=by_rate.get)
    _, again = train(FULL, SMALL, found.points[1].lr, 2, True)
    assert again == found.points[1].runs[1]


def test_what_the_networks_are():
    torch.manual_seed(0)
    bare, full = build(BARE, 16, 3), build(FULL, 16, 3)
    assert sum(isinstance(m, torch.nn.BatchNorm1d) for m in full.modules()) == 3
    assert not any(isinstance(m, torch.nn.BatchNorm1d) for m in bare.modules())
    x = torch.randn(4, 64)
    for layer in (*bare.hidden, *full.hidden):
        torch.nn.init.zeros_(layer[0].weight)
    torch.nn.init.zeros_(bare.hidden[0][0].bias)
    # Layers that give nothing: with skips what came in goes on, without it is lost.
    full.eval()
    torch.testing.assert_close(full(x), full.head(full.stem(x)))
    assert torch.equal(bare(x)[0], bare(x)[1])


def run(loss, cosine, seed=1):
    return Run(
        seed=seed,
        min_gamma=cosine,
        min_gamma_step=0,
        negative_gamma=0.0,
        median_cosine=cosine,
        straightness=-cosine if cosine is not None else None,
        train_loss=loss,
        test_accuracy=0.5,
    )


def test_correlations_are_of_medians_without_the_diverged():
    def point(*runs):
        return Point(cell=BARE, lr=0.1, edge=False, runs=list(runs))

    points = [
        point(run(1.0, 0.9), run(1.1, 0.8), run(9.0, 0.1)),
        point(run(2.0, 0.7), run(None, None)),
        point(run(3.0, 0.75)),
        point(run(4.0, 0.2)),
        point(run(None, None)),
    ]
    found = {c.measure: c for c in correlate(points)}
    assert set(found) == {"min_gamma", "median_cosine", "straightness"}  # a share that is always 0 ranks nothing
    # Ranks of the medians .8, .7, .75, .2 against 1, 2, 3, 4: Spearman's formula.
    ranks, order = np.array([4, 2, 3, 1]), np.array([1, 2, 3, 4])
    rho = 1 - 6 * ((ranks - order) ** 2).sum() / (4 * 15)
    assert found["median_cosine"].rho == pytest.approx(rho)
    assert found["straightness"].rho == pytest.approx(-rho)
    assert found["median_cosine"].networks == 4
    assert correlate(points[:2]) == []


def test_a_run_that_diverges_says_so():
    loss, found = train(BARE, SMALL, 1e12, 1, True)
    assert loss == math.inf
    assert found == Run(seed=1, **dict.fromkeys(f for f in Run.model_fields if f != "seed"))


def test_the_plan_is_the_one_that_was_measured():
    from tests.test_docs import ROOT

    kept = json.loads((ROOT / "docs/data/regularity.json").read_text(encoding="utf-8"))
    assert [Cell(**point["cell"]) for point in kept["points"]] == regularity.plan()
    assert Setting(**kept["setting"]) == regularity.SETTING
    assert tuple(kept["traps"]) == regularity.TRAPS
    assert regularity.count() == 60 * 8
