from __future__ import annotations

from pathlib import Path

import pytest
import torch

import normopt
from benchmarks.optimizers import make_optimizer
from benchmarks.programs import radii
from benchmarks.stats import holm, paired
from benchmarks.study.lanes import lanes
from benchmarks.study.spec import RunSpec
from benchmarks.tasks import TASKS

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def kept() -> radii.Radii:
    return radii.Radii.model_validate_json((DOCS / "data/radii.json").read_text(encoding="utf-8"))


def cell(ratio: float, loss: float | None, task: str = "bytes", length: str = "short") -> radii.Tried:
    return radii.Tried(length=length, task=task, preset="muon", ratio=ratio, lr=radii.LR, losses=[loss, loss])


def test_the_choice_is_the_ratio_whose_worst_loss_over_the_best_is_lowest():
    bytes_, digits = (2.0, 1.5, 1.2, 1.0, 1.3), (0.1, 0.1, 0.11, 0.2, None)
    cells = [cell(r, x) for r, x in zip(radii.RATIOS, bytes_, strict=True)]
    cells += [cell(r, x, "digits-mix", "long") for r, x in zip(radii.RATIOS, digits, strict=True)]
    assert radii.worst(cells, "muon") == [2.0, 1.5, 1.2, 2.0, float("inf")]
    assert radii.choose(cells + [c.model_copy(update={"preset": "muon-adamw"}) for c in cells]) == {
        "muon": 0.1,
        "muon-adamw": 0.1,
    }


@pytest.mark.parametrize(("preset", "key"), [("muon", "radius"), ("muon-adamw", "lr_ratio")])
def test_the_ratio_is_of_the_layers_that_are_no_hidden_matrices(preset, key):
    task = TASKS["bytes"]
    model = task.build()
    settings = {"preset": preset, "ratio": 0.25, "lr": 0.02, "weight_decay": 0.01, "qkv_blocks": 3}
    spec = RunSpec(task="bytes", optimizer="muon", settings=settings, seed=1, epochs=1, batch_size=16)
    groups = make_optimizer(spec, model, task)[0].param_groups
    named = {name: g for g in groups for name, p in model.named_parameters() if any(p is q for q in g["params"])}
    assert {name for name, g in named.items() if g[key] == 1} == {
        f"blocks.{i}.{layer}.weight" for i in range(2) for layer in ("qkv", "out", "up", "down")
    }
    assert {g[key] for g in groups} == {1.0, 0.25}
    assert {name for name, g in named.items() if g["norm_blocks"] == 3} == {f"blocks.{i}.qkv.weight" for i in (0, 1)}
    assert {g["weight_decay"] for name, g in named.items() if dict(model.named_parameters())[name].dim() == 1} == {0}


def test_a_run_is_as_long_as_it_is_said_to_be():
    for length, task in radii.CELLS:
        study = radii.final(length, task, dict.fromkeys(radii.PRESETS, 0.1), radii.ADAMW)
        (spec, *_) = [run for lane in lanes(study).values() for run in lane.final_specs(lane.choice())]
        assert spec.epochs == radii.EPOCHS[length][task]


def test_what_the_documentation_shows_is_of_this_study(kept):
    assert (kept.epochs, kept.tuned_on, kept.seeds) == (radii.EPOCHS, radii.TUNED_ON, radii.SEEDS)
    wanted = []
    for length, task in radii.CELLS:
        rates = radii.rates(kept.tried, length, task)
        wanted += [(length, task, arm) for arm in radii.final(length, task, radii.choose(kept.tried), rates).arms]
    assert [(f.length, f.task, f.arm) for f in kept.found] == [(*key, arm.name) for *key, arm in wanted]
    assert [f.settings for f in kept.found] == [arm.settings for *_, arm in wanted]
    assert all(len(f.loss) == len(f.score) == len(kept.seeds) for f in kept.found)
    tried = {(c.length, c.task, c.preset, c.ratio, c.lr): c.losses for c in kept.tried}
    assert len(tried) == sum(len(radii.grid(*key).arms) + len(radii.edge(*key).arms) for key in radii.CELLS)
    assert all(len(losses) == len(radii.TUNED_ON[key[0]]) for key, losses in tried.items())


def test_the_presets_are_held_against_adamw_at_its_best_and_the_extras_against_a_preset(kept):
    for length, task in radii.CELLS:
        losses = {f.arm: f.loss for f in kept.found if (f.length, f.task) == (length, task)}
        best = min((name for name in losses if name.startswith("AdamW")), key=lambda name: sum(losses[name]))
        found = radii.held(kept, length, task)
        families = [[name for name in found if found[name].against == best]]
        families += [[name for name in radii.EXTRAS if name in found and name.startswith(word)] for word in ("q", "m")]
        assert families[0] == list(radii.PRESETS)
        assert len(found) == (6 if (length, task) == radii.CELLS[0] else 2)
        for names, against in zip(families, (best, "muon-adamw", "muon-adamw"), strict=True):
            differences = [paired(losses[name], losses[against]) for name in names]
            for name, d, p in zip(names, differences, holm([d.p_value for d in differences]), strict=True):
                mean = sum(losses[name]) / len(losses[name])
                assert found[name] == (name, pytest.approx(mean), against, d.interval, p)


def test_a_run_that_diverged_is_kept_as_infinitely_bad(kept):
    found = kept.found[0].model_copy(update={"loss": [float("inf"), *kept.found[0].loss[1:]]})
    again = radii.Found.model_validate_json(found.model_dump_json())
    assert again == found
    changed = kept.model_copy(update={"found": [again, *kept.found[1:]]})
    assert radii.held(changed, found.length, found.task)[found.arm].difference.mean == float("inf")


def test_the_page_shows_the_tables_of_the_kept_runs(kept):
    page = (DOCS / "how-to/param-groups.md").read_text(encoding="utf-8")
    for table in radii.tables(kept):
        assert table in page


def test_the_defaults_of_the_presets_are_what_was_chosen(kept):
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    ratios = radii.choose(kept.tried)
    for preset, key in (("muon", "radius"), ("muon-adamw", "lr_ratio")):
        groups = normopt.param_groups(model, preset)
        assert {g.get(key, 1.0) for g in groups} == {1.0, ratios[preset]}
