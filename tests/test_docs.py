"""The documentation tells the truth: its code runs, its pages are complete, and the site needs no other host."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import normopt
import normopt.integrations.timm
import normopt.recipe
from benchmarks.programs import paper_pages
from benchmarks.study.papers import DECLARED
from tests.forked import run_file
from tests.patience import patience

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PUBLIC = (
    [f"normopt.{name}" for name in normopt.__all__]
    + [f"normopt.norms.{name}" for name in normopt.norms.__all__]
    + [f"normopt.schedules.{name}" for name in normopt.schedules.__all__]
    + [f"normopt.sparsity.{name}" for name in normopt.sparsity.__all__]
    + ["normopt.recipe.Recipe", "normopt.recipe.make_recipe"]
    + [f"normopt.settings.{name}" for name in ("Settings", "Coordinates", "Common")]
    + ["normopt.integrations.timm.register"]
)


def run_python(*arguments: str, cwd: Path = ROOT, **environment: str) -> str:
    """A fresh interpreter, because the pages register norms that other tests must not see."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=patience(60),
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def python_of(page: Path) -> str:
    """The page with every line blanked that is not in a ```python block, so that tracebacks show its own lines."""
    lines, inside = [], False
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("```"):
            inside = line == "```python"
            line = ""
        lines.append(line if inside else "")
    return "\n".join(lines)


@pytest.mark.parametrize(
    "page", [p for p in PAGES if "```python" in p.read_text(encoding="utf-8")], ids=lambda p: p.name
)
def test_code_blocks_run(page: Path, tmp_path: Path) -> None:
    code = tmp_path / page.with_suffix(".py").name
    code.write_text(python_of(page), encoding="utf-8")
    printed = run_file(code, tmp_path)
    for output in re.findall(r"```python\n[^`]*```\n\n```text\n([^`]*)```", page.read_text(encoding="utf-8")):
        assert output in printed


def test_the_example_of_the_readme_is_that_of_the_home_page() -> None:
    readme, home = (
        re.search(r"```python\n.*?```", p.read_text(encoding="utf-8"), re.DOTALL)
        for p in (ROOT / "README.md", ROOT / "docs/index.md")
    )
    assert readme is not None
    assert home is not None
    assert readme[0] == home[0]


def test_the_readme_is_short_and_its_numbers_are_on_the_pages_it_links_to() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 100
    assert max(map(len, text.splitlines())) <= 120
    measured = re.search(r"^## What is measured\n+(.+?)\n\n", text, re.MULTILINE | re.DOTALL)
    assert measured is not None
    items = measured[1].split("\n- ")
    assert len(items) == 4
    for item in items:
        pages = re.findall(r"\]\((\S+?)\)", item)
        sources = " ".join(" ".join(_shown(page).split()) for page in pages)
        said = " ".join(item.split())
        counts = re.findall(r"\d+ better, \d+ worse, \d+ ties", said)
        numbers = re.findall(r"\d+\.\d+|\d{3,}", said)
        assert counts or numbers, item
        assert [x for x in counts + numbers if x not in sources] == [], item
    results = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    for row in ("| Muon | AdamW | 5–1–1 |", "| Scion | AdamW | 4–1–2 |"):
        assert row in results


def _shown(page: str) -> str:
    """The text of a page; of a paper's committed runs, the page that they make."""
    name = Path(page).stem
    if page.endswith(".parquet"):
        return paper_pages.page(DECLARED[name], paper_pages.read(name))
    return (ROOT / page).read_text(encoding="utf-8")


def test_every_public_symbol_is_on_a_page() -> None:
    pages = "\n".join(p.read_text(encoding="utf-8") for p in (ROOT / "docs").rglob("*.md"))
    shown = re.findall(r"^::: (\S+)$", pages, re.MULTILINE)
    assert len(set(shown)) == len(shown), "a symbol stands on two pages, so that a link to it has two targets"
    assert set(shown) == set(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_symbol_has_a_docstring(name: str) -> None:
    thing: object = normopt
    for part in name.split(".")[1:]:
        thing = getattr(thing, part)
    # The class's own: inspect.getdoc alone would be content with an inherited one.
    assert thing.__doc__ is not None
    assert len(inspect.cleandoc(thing.__doc__)) > 20


def test_a_tutorial_shows_the_long_run_and_no_descriptions() -> None:
    sys.path.insert(0, str(ROOT / "docs/hooks"))
    import tutorials

    cell = (
        "import os\nfig, n = plot(), 7\n# NORMOPT_DOCS_FAST=1 is short.\nFAST = os.environ.get('NORMOPT_DOCS_FAST')\n"
        "n = 2 if FAST else n\nfig.alt = (\n  'ℓp'\n)\n"
        "rates = [f(1 if FAST else 2) for k in ((0,) if FAST else (1, 2))]\n"
        "if not FAST:\n    print('∞')\n    x = 'ℓ' if FAST else '∞'\nprint(n)\n"
    )
    expected = "fig, n = plot(), 7\nrates = [f(2) for k in (1, 2)]\nprint('∞')\nx = '∞'\nprint(n)"
    assert tutorials.page_code([cell]) == [expected]
    for script in sorted((ROOT / "docs/tutorials").glob("*.py")):
        code = [body for is_text, _, body in tutorials.cells(script.read_text(encoding="utf-8")) if not is_text]
        page = "\n".join(tutorials.page_code(code))
        compile(page, script.name, "exec")
        assert re.findall(r"\bFAST\b|\bDOCS_FAST|\.alt\b|sys\.path", page) == [], script.name


def test_an_error_in_a_tutorial_is_an_error_at_its_line(tmp_path: Path) -> None:
    script = tmp_path / "broken.py"
    script.write_text("# %% [markdown]\n# # Title\n\n# %%\nx = 1\n\n# %%\nprint(x)\nraise RuntimeError('as told')\n")
    code = (
        "import sys, traceback, pathlib, tutorials\n"
        "try: tutorials.run(pathlib.Path(sys.argv[1]))\n"
        "except RuntimeError as e: print(e, traceback.extract_tb(e.__traceback__)[-1].lineno)\n"
    )
    assert "as told 9" in run_python("-c", code, str(script), PYTHONPATH=str(ROOT / "docs/hooks"))
