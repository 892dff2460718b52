"""What the summary consists of."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """A question and what the results say to it; of one task, or of all."""

    title: str
    text: str
    task: str | None = None
