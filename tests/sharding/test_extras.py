"""Add-ons, monitors and the adaptive schedule: the same numbers, sharded and not."""

from __future__ import annotations

import pytest

from tests.sharding import extras
from tests.sharding.ranks import Ranks


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
def test_agr(optimizer: str, dim: int, ranks: Ranks) -> None:
    # AdamW divides by the root of what AGR has rounded: where that is next to nothing, its first steps jump.
    assert max(ranks.call(extras.agr_on, optimizer, dim)) <= (1e-6 if optimizer == "SGD" else 1e-5)


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
