"""An MkDocs hook: the report of the study that docs/results.md shows, made anew from the same stored runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parents[2]))  # the program `mkdocs` does not look into the current folder
from benchmarks import report
from benchmarks.results import collect
from benchmarks.store import Store

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

NAME = "results-report.html"
_made: list[str] = []  # `mkdocs serve` rebuilds often


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the report; nothing is written into docs/."""
    from mkdocs.structure.files import File

    if not _made:
        _made.append(report.html(collect(Store.from_parquet(Path(config.docs_dir) / "data/standard.parquet"))))
    files.append(File.generated(config, NAME, content=_made[0]))
    return files
