"""The presets of norms by layer on networks with layers of every kind."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.optimizers import OPTIMIZERS, make_optimizer
from benchmarks.study.spec import RunSpec
from benchmarks.tasks import TASKS
from benchmarks.training import evaluate

# Each somewhat below its best on these two tasks.
RATES = {"muon": 0.03, "normuon": 0.03, "scion": 1e-4, "scale": 0.01, "modular": 0.1}


@pytest.mark.parametrize("name", [name for name, entry in OPTIMIZERS.items() if entry.preset])
@pytest.mark.parametrize("task", ["digits-mix", "bytes"])
def test_every_preset_has_every_parameter_and_trains_it(task, name):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    chosen = TASKS[task]
    model, splits = chosen.build(), chosen.load()
    settings: dict[str, Any] = {"lr": RATES[name]}
    spec = RunSpec(task=task, optimizer=name, settings=settings, seed=1, epochs=1, batch_size=16)
    optimizer, _ = make_optimizer(spec, model, chosen)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len(set(held)) == len(list(model.parameters()))
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    batch = tuple(part[:16] for part in splits.train)
    before, _ = evaluate(model, chosen, splits, batch)
    for _ in range(10):
        optimizer.zero_grad()
        chosen.loss(model(batch[0]), batch[1]).backward()
        optimizer.step()
    assert evaluate(model, chosen, splits, batch)[0] < 0.9 * before
    assert [name for name, p in model.named_parameters() if torch.equal(p, start[name])] == []
