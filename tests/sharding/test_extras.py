"""Add-ons, monitors and the adaptive schedule: the same numbers, sharded and not."""

from __future__ import annotations

import pytest

from tests.sharding import extras
from tests.sharding.ranks import Ranks
from tests.versions import NEEDS_FSDP_ON_CPUS


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize(("optimizer", "scope"), [("SGD", "group"), ("AdamW", "tensor")])
def test_agr(optimizer: str, scope: str, dim: int, ranks: Ranks) -> None:
    # AdamW divides by the root of what AGR has rounded: where that is next to nothing, its first steps jump.
    assert max(ranks.call(extras.agr_on, optimizer, dim, scope)) <= (1e-6 if optimizer == "SGD" else 1e-5)


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("over", ["entries", "rows", "columns", "heads"])
def test_lp_decay(over: str, dim: int, ranks: Ranks) -> None:
    assert max(ranks.call(extras.decay_over, over, dim)) <= 1e-6


@pytest.mark.parametrize(
    "settings", [dict(norm="lp", p=3.0), dict(norm="spectral", scale="unit"), dict(norm="l2")], ids=str
)
@pytest.mark.parametrize("dim", [0, 1])
def test_geometry(settings: dict[str, object], dim: int, ranks: Ranks) -> None:
    assert max(ranks.call(extras.geometry, settings, dim)) <= 2e-6


@pytest.mark.parametrize("dim", [0, 1])
def test_exact_trajectory(dim: int, ranks: Ranks) -> None:
    for found in ranks.call(extras.trajectory, True, dim):
        assert max(found.values()) <= 1e-6, found


def test_sketched_trajectory(ranks: Ranks) -> None:
    for found in ranks.call(extras.trajectory, False, 0):
        assert found["update_l2"] <= 1e-6
        assert found["distance"] <= 2 * 0.035  # both are within 3.5 % of the true one
        assert found["cosine"] <= 2 * 0.05


def test_adaptive_p(ranks: Ranks) -> None:
    assert max(ranks.call(extras.adaptive)) <= 1e-6


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_a_step_that_creates_state_is_counted_by_no_rank(optimizer: str, dim: int, ranks: Ranks) -> None:
    for created, warming_up in ranks.call(extras.creation_of_state, optimizer, dim):
        assert created == [0, 0, 0]
        assert warming_up == [1, 1, 0]  # a warm-up of the decay does not count at the number 0 as the lr


PLACES = [*(pytest.param(how, marks=NEEDS_FSDP_ON_CPUS) for how in ("FSDP2", "FSDP2 after a forward"))]
PLACES += ["dim 0", "dim 1", "copies"]


@pytest.mark.parametrize("how", PLACES)
def test_a_report_counts_the_whole_weights_on_every_rank(how: str, ranks: Ranks) -> None:
    for sharded, whole in ranks.call(extras.sparse_report, how):
        assert sharded == whole
        assert 0 < whole.total.zeros < whole.total.small < whole.total.entries
        assert whole.total.dead_rows > 2
        assert whole.total.dead_columns > 2


@pytest.mark.parametrize("settings", [dict(threshold=0.1), dict(fraction=0.6)], ids=str)
@pytest.mark.parametrize("over", ["entries", "rows", "columns"])
@pytest.mark.parametrize("how", PLACES)
def test_pruning_is_of_the_whole_weights(how: str, over: str, settings: dict[str, float], two: Ranks) -> None:
    two.call(extras.pruned, how, dict(over=over, exclude=["6.*"], **settings))


def test_weights_that_two_dims_of_a_mesh_cut_are_counted_and_pruned(four: Ranks) -> None:
    for sharded, whole in four.call(extras.sparse_report, "two dims"):
        assert sharded == whole
    four.call(extras.pruned, "two dims", dict(fraction=0.6))


@pytest.mark.parametrize("layout", ["csr", "csc", "coo"])
@pytest.mark.parametrize("how", PLACES)
def test_a_sparse_state_dict_has_whole_tensors_on_every_rank(how: str, layout: str, two: Ranks) -> None:
    two.call(extras.stored_sparsely, how, layout)


@pytest.mark.parametrize("how", PLACES)
@pytest.mark.parametrize("what", ["to_sparse", "to_dense", "shrink"])
def test_what_needs_whole_tensors_says_how_to_get_them(what: str, how: str, two: Ranks) -> None:
    for said in two.call(extras.refused_sparsity, what, how):
        assert "0.weight is a DTensor of shape (6, 1, 3, 3)" in said
        assert "full_state_dict=True" in said


def test_partial_sums_are_not_pruned(two: Ranks) -> None:
    for said in two.call(extras.refused_sparsity, "prune_", "dim 0"):
        assert said.startswith("5.weight is a DTensor of partial sums")
