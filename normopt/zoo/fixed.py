"""Settings that a named optimizer fixes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def fixed_kwargs(name: str, given: Mapping[str, Any], **fixed: Any) -> dict[str, Any]:
    """Merge the settings that define a named optimizer with the user's; raise a TypeError if both set one."""
    for key in fixed.keys() & given.keys():
        raise TypeError(f"{name} fixes {key} = {fixed[key]!r}: to set it, use normopt.SteepestDescent")
    return {**fixed, **given}
