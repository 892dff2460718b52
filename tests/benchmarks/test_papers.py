"""The presets of papers: declared before they are run."""

from __future__ import annotations

import hashlib

import pytest

from benchmarks.store import Store
from benchmarks.study import flags, papers
from benchmarks.study.presets import PRESETS


@pytest.mark.parametrize("name", papers.DECLARED)
def test_a_preset_is_what_its_file_declares(name):
    protocol, path = papers.DECLARED[name], papers.path(name)
    assert path.read_text(encoding="utf-8") == protocol.text()
    assert PRESETS[name] == protocol.study
    assert PRESETS[name].protocol == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("name", papers.DECLARED)
def test_stored_runs_are_those_of_the_declared_study(name):
    path = papers.PROTOCOLS / f"{name}.parquet"
    if not path.exists():
        pytest.skip(f"no runs of {name} are stored yet")
    assert Store.from_parquet(path).study == PRESETS[name]


@pytest.mark.parametrize("name", papers.DECLARED)
def test_every_preset_of_a_paper_has_eight_seeds_and_equal_trials(name):
    study = PRESETS[name]
    assert len(study.seeds) >= 8
    decades = {round(arm.search["lr"].high / arm.search["lr"].low) for arm in study.arms if arm.search}
    assert len(decades) <= 1


@pytest.mark.parametrize("name", papers.DECLARED)
def test_a_changed_preset_claims_no_protocol(name):
    changed = flags.study(name, tasks=["cifar10-resnet18"])
    assert changed.protocol is None
    assert changed.tasks == ("cifar10-resnet18",)
    assert changed.arms == PRESETS[name].arms
