"""An MkDocs hook: the interactive report of the study that docs/results.md shows, made anew from the same stored runs.

It is one file with plotly inside, as `python -m benchmarks report` writes it, and so the one page of the site that is
heavy.
"""

from __future__ import annotations

import sys
import tempfile
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
        with tempfile.TemporaryDirectory() as folder:
            runs = Store.from_parquet(Path(config.docs_dir) / "data/standard.parquet")
            _made.append(report.write(collect(runs), Path(folder)).read_text(encoding="utf-8"))
    files.append(File.generated(config, NAME, content=_made[0]))
    return files
