"""What every named optimizer is made with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def fixed_kwargs(name: str, given: Mapping[str, Any], **fixed: Any) -> dict[str, Any]:
    """The settings that make a named optimizer what it is, and the ones that its user gave."""
    for key in fixed.keys() & given.keys():
        raise TypeError(f"{name} fixes {key} = {fixed[key]!r}: to choose it, use normopt.SteepestDescent")
    return {**fixed, **given}
