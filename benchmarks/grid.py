"""Tables of text, shown in a terminal, in Markdown and in HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.box import SIMPLE_HEAD
from rich.table import Table


@dataclass(frozen=True)
class Grid:
    """Cells under titles. The first ``left`` columns are aligned left, the others right."""

    titles: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1

    @property
    def markdown(self) -> str:
        """The table as Markdown; a bar in a name would end its cell."""
        marks = [":--" if i < self.left else "--:" for i in range(len(self.titles))]
        lines = [f"| {' | '.join(self.titles)} |", f"|{'|'.join(marks)}|"]
        lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in self.rows]
        return "\n".join(lines)

    def terminal(self, title: str | None = None) -> Table:
        """The table for a terminal."""
        table = Table(box=SIMPLE_HEAD, pad_edge=False, title=title, title_justify="left", title_style="bold")
        for i, name in enumerate(self.titles):
            table.add_column(name, justify="left" if i < self.left else "right")
        for row in self.rows:
            table.add_row(*row)
        return table
