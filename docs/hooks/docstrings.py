"""A Griffe extension: what reads well in ``help()`` but is no Markdown is translated for the site.

``::`` before an indented block becomes ``:`` (or nothing, on a line of its own), and an ``Example:`` section the
``Examples:`` that Griffe knows how to show. An arXiv number becomes a link.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import griffe

import normopt


class Docstrings(griffe.Extension):
    """Translates every docstring once, when its object has been read."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring is not None:
            text = re.sub(r"^(\s*)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)
            text = re.sub(r"^\s*::$", "", text, flags=re.MULTILINE)
            text = re.sub(r"::$", ":", text, flags=re.MULTILINE)
            obj.docstring.value = re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[\g<0>](https://arxiv.org/abs/\1)", text)

    def on_function(self, *, func: griffe.Function, **kwargs: Any) -> None:
        """Show the settings behind SteepestDescent's ``**settings``, as help() does."""
        if func.path != "normopt.engine.SteepestDescent.__init__":
            return
        others = func.parameters["settings"]
        del func.parameters["settings"]
        kinds = {kind.name.lower(): kind for kind in griffe.ParameterKind}
        for name, p in inspect.signature(normopt.SteepestDescent).parameters.items():
            if name not in func.parameters and name != "settings":
                kind = kinds[p.kind.name.lower()]
                func.parameters.add(griffe.Parameter(name, annotation=p.annotation, kind=kind, default=repr(p.default)))
        func.parameters.add(others)
