"""An MkDocs hook: every script in docs/tutorials/ is run by the build and becomes a page.

A script is split at lines that begin with ``# %%``: ``# %% [markdown]`` starts text (comment lines), ``# %%``
alone starts code. The cells run in one namespace; what a cell prints and the figures it leaves open follow it
on the page. An error in a cell fails the build. Give a figure an ``alt`` attribute to describe it.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
import types
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).parent))
from style import STYLE, svg

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

Figures = dict[str, str]
_done: dict[tuple[Path, str], tuple[str, Figures]] = {}  # `mkdocs serve` rebuilds often: run only what changed


def cells(source: str) -> list[tuple[bool, int, str]]:
    """The cells of a script: whether each is text, its first line's number, and what stands in it."""
    found = []
    for marker in re.finditer(r"^# %%(.*)\n((?:(?!# %%).*\n?)*)", source, re.MULTILINE):
        is_text = "[markdown]" in marker[1]
        body = re.sub(r"^# ?", "", marker[2], flags=re.MULTILINE) if is_text else marker[2]
        found.append((is_text, source[: marker.start(2)].count("\n"), body.strip("\n")))
    return found


def run(script: Path, execute: bool = True) -> tuple[str, Figures]:
    """Run a script: its page as Markdown, and its figures, file name to SVG text. Without ``execute``, code alone."""
    module = types.ModuleType(f"tutorial_{script.stem}")
    sys.modules[module.__name__] = module  # dataclasses look their module up
    page: list[str] = []
    figures: Figures = {}
    plt.close("all")
    try:
        with plt.rc_context(STYLE):
            for is_text, line, body in cells(script.read_text(encoding="utf-8")):
                if is_text:
                    page.append(body)
                    continue
                out = io.StringIO()
                # The blank lines make a traceback point at the right line of the script.
                code = compile("\n" * line + body, str(script), "exec")
                if execute:
                    with contextlib.redirect_stdout(out):
                        exec(code, module.__dict__)
                page.append(f"```python\n{body.strip()}\n```")
                if out.getvalue():
                    page.append(f"```text\n{out.getvalue().rstrip()}\n```")
                for number in plt.get_fignums():
                    figure = plt.figure(number)
                    name = f"{script.stem}_{len(figures) + 1}.svg"
                    page.append(f"![{getattr(figure, 'alt', '')}]({name})")
                    figures[name] = svg(figure)
    finally:
        plt.close("all")
        del sys.modules[module.__name__]
    return "\n\n".join(page) + "\n", figures


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages and figures to the site; nothing is written into docs/."""
    from mkdocs.structure.files import File

    folder = Path(config.docs_dir) / "tutorials"
    only = os.environ.get("NORMOPT_TUTORIALS")  # names, separated by commas; the others are shown and not run
    for script in sorted(folder.glob("*.py")):
        key = (script, script.read_text(encoding="utf-8"))
        if key not in _done:
            _done[key] = run(script, only is None or script.stem in only.split(","))
        page, figures = _done[key]
        files.append(File.generated(config, f"tutorials/{script.stem}.md", content=page))
        for name, content in figures.items():
            files.append(File.generated(config, f"tutorials/{name}", content=content))
    return files
