from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.sharding.ranks import Ranks


@pytest.fixture(scope="package")
def two() -> Iterator[Ranks]:
    ranks = Ranks(2)
    yield ranks
    ranks.stop()


@pytest.fixture(scope="package")
def four() -> Iterator[Ranks]:
    ranks = Ranks(4)
    yield ranks
    ranks.stop()


@pytest.fixture(params=[2, pytest.param(4, marks=pytest.mark.exhaustive)])
def ranks(request: pytest.FixtureRequest) -> Ranks:
    """Two processes, then four."""
    found: Ranks = request.getfixturevalue({2: "two", 4: "four"}[request.param])
    return found
