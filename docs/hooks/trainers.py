"""An MkDocs hook: ``<!-- trainers -->`` becomes the table of trainers and optimizers that tests/frameworks found."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

MARK = "<!-- trainers -->"


def cell(found: list[str] | str) -> str:
    """Return a cell: what was found, or a dash for what cannot be."""
    return "—" if isinstance(found, str) else ", ".join(found) or "**fails**"


def table(rows: dict[str, dict[str, object]]) -> str:
    """Return the table in Markdown, with the reasons for its dashes below it."""
    cases = list(next(iter(rows.values()))["cells"])  # type: ignore[call-overload]
    lines = [f"| trainer | version | {' | '.join(cases)} |", "|---" * (len(cases) + 2) + "|"]
    reasons = set()
    for name, row in rows.items():
        cells: dict[str, list[str] | str] = row["cells"]  # type: ignore[assignment]
        reasons |= {found for found in cells.values() if isinstance(found, str)}
        lines.append(f"| {name} | {row['package']} {row['version']} | {' | '.join(cell(cells[c]) for c in cases)} |")
    torchs = sorted({str(row["torch"]) for row in rows.values()})
    return "\n".join([*lines, "", f"With torch {' and '.join(torchs)}. —: {'; '.join(sorted(reasons))}."])


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill in the table."""
    if MARK not in markdown:
        return markdown
    return markdown.replace(MARK, table(json.loads((Path(config.docs_dir) / "data/trainers.json").read_text("utf-8"))))
