"""An MkDocs hook: every script in docs/tutorials/ is run by the build and becomes a page.

A script is split at lines that begin with ``# %%``: ``# %% [markdown]`` starts text (comment lines), ``# %%``
alone starts code. The cells run in one namespace, from the root of the repository; what a cell prints and the
figures it leaves open follow it on the page. An error in a cell fails the build. Give a figure an ``alt`` attribute to
describe it. Where ``FAST`` is true the run is a short one, for tests. Pages show neither ``alt`` nor ``FAST``.
"""

from __future__ import annotations

import ast
import contextlib
import io
import os
import re
import sys
import textwrap
import types
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # benchmarks, which some tutorials import
sys.path.insert(0, str(Path(__file__).parent))
from style import STYLE, svg

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

ROOT = Path(__file__).resolve().parents[2]
Figures = dict[str, str]
SHORT = '!!! warning "A short run, for tests"\n    Numbers and figures are not those of the code that is shown.'
_done: dict[tuple[Path, str], tuple[str, Figures]] = {}  # `mkdocs serve` rebuilds often: run only what changed


def cells(source: str) -> list[tuple[bool, int, str]]:
    """The cells of a script: whether each is text, its first line's number, and what stands in it."""
    found = []
    for marker in re.finditer(r"^# %%(.*)\n((?:(?!# %%).*\n?)*)", source, re.MULTILINE):
        is_text = "[markdown]" in marker[1]
        body = re.sub(r"^# ?", "", marker[2], flags=re.MULTILINE) if is_text else marker[2]
        found.append((is_text, source[: marker.start(2)].count("\n"), body.strip("\n")))
    return found


def is_fast(node: ast.AST) -> bool:
    """Return whether a node is the variable FAST."""
    return isinstance(node, ast.Name) and node.id == "FAST"


def shown(body: str) -> str:
    """The code of a cell as its page shows it: the long run, and no descriptions of figures."""
    source = body.encode()  # ast counts columns in bytes
    starts = [0, *(match.end() for match in re.finditer(rb"\n|\Z", source))]
    edits = [(*match.span(), b"") for match in re.finditer(rb"^# NORMOPT_DOCS_FAST.*\n", source, re.MULTILINE)]
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.stmt | ast.expr):
            continue
        begin, end = starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset
        lines = (starts[node.lineno - 1], starts[node.end_lineno])
        match node:
            case ast.Assign([ast.Name("FAST") | ast.Attribute(attr="alt")]):
                edits.append((*lines, b""))
            case ast.Assign([target], ast.IfExp(test, _, long)) if is_fast(test):
                if ast.unparse(target) == ast.unparse(long):  # x = … if FAST else x
                    edits.append((*lines, b""))
            case ast.If(ast.UnaryOp(ast.Not(), test), inner) if is_fast(test):
                text = source[starts[inner[0].lineno - 1] : starts[inner[-1].end_lineno]].decode()
                edits.append((*lines, shown(textwrap.dedent(text)).encode() + b"\n"))
        if isinstance(node, ast.IfExp) and is_fast(node.test):
            long = node.orelse
            text = source[starts[long.lineno - 1] + long.col_offset : starts[long.end_lineno - 1] + long.end_col_offset]
            if re.search(rb"(^|[^\w)\]])\($", source[:begin]) and source[end : end + 1] == b")":
                begin, end = begin - 1, end + 1  # brackets that only the condition needed
            edits.append((begin, end, text))
    code, done = b"", 0
    for begin, end, text in sorted(edits, key=lambda edit: (edit[0], -edit[1])):
        if begin >= done:  # an edit inside another is none
            code, done = code + source[done:begin] + text, end
    return (code + source[done:]).decode().strip("\n")


def page_code(bodies: list[str]) -> list[str]:
    """The cells as the page shows them, without an import that only FAST needed."""
    found = [shown(body) for body in bodies]
    if len(re.findall(r"\bos\b", "\n".join(found))) == 1:
        found = [re.sub(r"^import os\n", "", code, flags=re.MULTILINE) for code in found]
    return found


def run(script: Path, execute: bool = True) -> tuple[str, Figures]:
    """Run a script: its page as Markdown, and its figures, file name to SVG text. Without ``execute``, code alone."""
    module = types.ModuleType(f"tutorial_{script.stem}")
    sys.modules[module.__name__] = module  # dataclasses look their module up
    page: list[str] = []
    figures: Figures = {}
    parts = cells(script.read_text(encoding="utf-8"))
    codes = iter(page_code([body for is_text, _, body in parts if not is_text]))
    plt.close("all")
    try:
        with plt.rc_context(STYLE), contextlib.chdir(ROOT):
            for is_text, line, body in parts:
                if is_text:
                    page.append(body)
                    continue
                out = io.StringIO()
                # The blank lines make a traceback point at the right line of the script.
                code = compile("\n" * line + body, str(script), "exec")
                if execute:
                    with contextlib.redirect_stdout(out):
                        exec(code, module.__dict__)
                page.append(f"```python\n{next(codes)}\n```")
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
        if os.environ.get("NORMOPT_DOCS_FAST") == "1":
            page = page.replace("\n\n", f"\n\n{SHORT}\n\n", 1)
        files.append(File.generated(config, f"tutorials/{script.stem}.md", content=page))
        for name, content in figures.items():
            files.append(File.generated(config, f"tutorials/{name}", content=content))
    return files
