"""Measurements as files that are kept in the repository."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_core import to_json


def write(result: BaseModel | Mapping[str, Any], path: Path) -> None:
    """As JSON, every record of its lists of them a line, so that a later measurement shows what changed."""
    parts = []
    for name, value in dict(result).items():
        records = isinstance(value, list) and value and isinstance(value[0], BaseModel | dict)
        lines = ",\n".join(map(_json, value)) if records else ""
        parts.append(f'"{name}": ' + (f"[\n{lines}\n]" if records else _json(value)))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{" + ", ".join(parts) + "}\n", encoding="utf-8")


def _json(value: Any) -> str:
    return to_json(value).decode()
