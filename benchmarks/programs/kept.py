"""Measurements as files that are kept in the repository, and what several of them have."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict

from benchmarks.results import Comparison


def write(result: BaseModel, path: Path) -> None:
    """As JSON, every record of its lists of them a line, so that a later measurement shows what changed."""
    lists = {
        name: value
        for name, value in result
        if isinstance(value, list | tuple) and value and all(isinstance(record, BaseModel) for record in value)
    }
    parts = [json.dumps(result.model_dump(exclude=set(lists)), ensure_ascii=False)[1:-1]]
    for name, records in lists.items():
        lines = ",\n".join(record.model_dump_json() for record in records)
        parts.append(f'"{name}": [\n{lines}\n]')
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{" + ", ".join(part for part in parts if part) + "}\n", encoding="utf-8")


class Against(BaseModel):
    """A paired difference in test accuracy, its 95 % t interval and Holm's p-value."""

    model_config = ConfigDict(extra="forbid")

    this: str
    that: str
    mean: float
    low: float
    high: float
    p_value: float

    @classmethod
    def of(cls, c: Comparison, **more: Any) -> Self:
        """Return what is kept of a comparison."""
        i = c.difference.interval
        names = {"this": c.row.name, "that": c.against.name}
        return cls(**names, mean=i.mean, low=i.low, high=i.high, p_value=c.adjusted, **more)


def rounded(values: Iterable[float | None]) -> list[float]:
    """Return those that are there, to six digits."""
    return [round(value, 6) for value in values if value is not None]
