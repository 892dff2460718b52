"""What is cited is in the bibliography, and what is in the bibliography is cited."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/bibliography.md"
# Numbers of today, wherever they stand, and older ones, which look like other numbers, behind their word.
NUMBER = re.compile(
    r"(?<![\d.])\d\d(?:0[1-9]|1[0-2])\.\d{5}(?!\d)|(?<=arxiv.org/abs/)[a-z-]+/\d{7}"
    r"|(?<=arxiv[: ])(?:\d{4}\.\d{4}(?!\d)|[a-z-]+/\d{7})",
    re.IGNORECASE,
)


def cited() -> dict[str, set[str]]:
    """Each arXiv number, and the files that cite it."""
    files = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "docs/tutorials").glob("*.py")]
    for folder in ("normopt", "benchmarks"):
        files += (ROOT / folder).rglob("*.py")
    found: dict[str, set[str]] = {}
    for file in files:
        if file != PAGE and "vendor" not in file.parts:
            for number in NUMBER.findall(file.read_text(encoding="utf-8")):
                found.setdefault(number, set()).add(str(file.relative_to(ROOT)))
    return found


def entries() -> dict[str, str]:
    """The text of each entry by its anchor."""
    text = PAGE.read_text(encoding="utf-8")
    return dict(re.findall(r"^### [^\n]+ \{#([\w-]+)\}\n(.*?)(?=^##|\Z)", text, re.MULTILINE | re.DOTALL))


def test_the_bibliography_has_what_is_cited_and_nothing_else():
    known = set(NUMBER.findall(PAGE.read_text(encoding="utf-8")))
    there = cited()
    assert {n: files for n, files in there.items() if n not in known} == {}, "cited, but not in docs/bibliography.md"
    assert known - set(there) == set(), "in docs/bibliography.md, but cited nowhere"


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("arXiv:2405.14813 and 2410.21265.", ["2405.14813", "2410.21265"]),
        ("[0902](https://arxiv.org/abs/cs/0102001), arXiv:0902.2206", ["cs/0102001", "0902.2206"]),
        ("arXiv cs/0102001", ["cs/0102001"]),
        ("1234.5678 s, 2399.12345, 1.2012.12345", []),
    ],
)
def test_what_a_number_looks_like(text, numbers):
    assert NUMBER.findall(text) == numbers


def test_every_entry_is_complete():
    found = entries()
    assert len(found) == PAGE.read_text(encoding="utf-8").count("\n### "), "an entry without an anchor, or two alike"
    for anchor, text in found.items():
        assert re.search(r"^Taken: .+?\bIn:\s", text, re.MULTILINE | re.DOTALL), anchor
        for number in re.findall(r"arXiv:([\w./-]+\w)\]", text):
            assert f"(https://arxiv.org/abs/{number})" in text, anchor
    for anchor in re.findall(r"\]\(#([\w-]+)\)", PAGE.read_text(encoding="utf-8")):
        assert anchor in found
