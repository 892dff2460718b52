from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmarks.tasks import TASKS
from tests.benchmarks.synthetic import TASKS_OF_TOYS


@pytest.fixture(scope="module")
def toys() -> Iterator[None]:
    """The tasks of the synthetic study, for as long as a module's tests last."""
    with pytest.MonkeyPatch.context() as patch:
        for name, toy in TASKS_OF_TOYS.items():
            patch.setitem(TASKS, name, toy)
        yield
