from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.presets import SMOKE
from benchmarks.results import Results, collect
from benchmarks.store import Store
from benchmarks.study import execute


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished smoke study."""
    folder = tmp_path_factory.mktemp("smoke")
    execute(SMOKE, Store(folder), workers=2, advance=lambda phase, n: None)
    return folder


@pytest.fixture(scope="session")
def results(finished: Path) -> Results:
    return collect(Store(finished))
