"""What ranks tell each other: what is counted is what arithmetic says, and the documentation has it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks import cli
from benchmarks.programs import sharding
from tests import forked

KEPT = Path(__file__).parents[2] / "docs/data/sharding.json"


def test_counts_are_those_on_paper(tmp_path, monkeypatch, request):
    monkeypatch.setattr(sharding, "RANKS", (2,))
    if not request.config.getoption("--all"):  # by the program's own spawn, ranks import for longer than they count
        monkeypatch.setattr(sharding, "spawn", forked.spawn)
    out = tmp_path / "sharding.json"
    done = CliRunner().invoke(cli.app, ["sharding", "--out", str(out)])
    assert done.exit_code == 0, done.output
    kept = sharding.Sharding.model_validate_json(KEPT.read_text(encoding="utf-8"))
    found = sharding.Sharding.model_validate(json.loads(out.read_text(encoding="utf-8")))
    assert found.cases == [case for case in kept.cases if case.ranks == 2]


def test_the_documentation_has_every_method_and_its_counts_are_those_on_paper():
    kept = sharding.Sharding.model_validate_json(KEPT.read_text(encoding="utf-8"))
    assert {(c.method, c.width, c.ranks) for c in kept.cases} == {
        (m, w, k) for m in sharding.METHODS for w in sharding.WIDTHS for k in sharding.RANKS
    }
    for case in kept.cases:
        assert case.counted == sharding.expected(case)


@pytest.mark.parametrize("ranks", [1, 2, 1024])
def test_shares_are_never_more_than_all_matrices_to_all_ranks(ranks):
    method = sharding.METHODS["spectral, unit (Muon)"]
    shapes = sharding.shapes_of(method, 1024)
    assert sharding.on_paper(method, shapes, ranks).received <= 1.01 * sharding.gathered_once(shapes, ranks).received
