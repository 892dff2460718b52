"""An MkDocs hook: the pages of the presets that run papers' recipes, made anew from the stored runs.

A page whose runs are not stored yet shows what was declared.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).parents[2]))  # the program `mkdocs` does not look into the current folder
from benchmarks.programs import paper_pages
from benchmarks.study.papers import DECLARED

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages; nothing is written into docs/."""
    from mkdocs.structure.files import File

    for name, protocol in DECLARED.items():
        content = paper_pages.page(protocol, paper_pages.read(name))
        files.append(File.generated(config, f"benchmarks/{name}.md", content=content))
    return files
