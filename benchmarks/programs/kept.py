"""Measurements as files that are kept in the repository."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import BaseModel


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
