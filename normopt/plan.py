"""Deprecated: `normopt.recipe` replaces this module."""

from __future__ import annotations

import warnings
from typing import Any

from normopt import recipe

_NEW = {"Plan": "Recipe", "make_plan": "make_recipe"}


def __getattr__(name: str) -> Any:
    if name not in _NEW:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn(f"normopt.plan.{name} is now normopt.recipe.{_NEW[name]}", DeprecationWarning, stacklevel=2)
    return getattr(recipe, _NEW[name])
