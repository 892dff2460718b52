"""The chooser: every optimizer is in its table, what it says of state is true, and its filter filters."""

from __future__ import annotations

import re
import sys
from typing import Any

import pytest

import normopt
from tests.site.conftest import ROOT

sys.path.insert(0, str(ROOT / "docs/hooks"))
import optimizers

TABLE = re.findall(
    r"^\| \[(\w+)\]\((\w+)\.md\) \|(.+)\|$",
    (ROOT / "docs/optimizers/index.md").read_text(encoding="utf-8"),
    re.MULTILINE,
)
# Bytes a float32 weight of an 8 × 4 matrix.
STATES = {"one buffer": 4, "one buffer, and rows": 5, "two buffers": 8, "four buffers": 16}
HEADINGS = [
    *("The rule and its mathematics", "Defaults, and where they come from", "Where it departs from the paper"),
    *("Memory and cost", "Use it", "When, and when not", "Used in", "References", "Reference"),
]


def test_every_optimizer_is_in_the_table_and_has_a_whole_page() -> None:
    assert {page for _, page, _ in TABLE} == {*normopt.list_optimizers(), "steepestdescent"}
    for name, page, _ in TABLE:
        assert optimizers.optimizer(page).__name__ == name
        text = (ROOT / f"docs/optimizers/{page}.md").read_text(encoding="utf-8")
        assert re.findall(r"^## (.+)$", text, re.MULTILINE) == HEADINGS, page
        assert f"::: normopt.{name}\n" in text


def test_the_state_in_the_table_is_what_a_step_keeps() -> None:
    for _, page, cells in TABLE:
        says = cells.split("|")[3].strip()
        kept = optimizers.state_bytes(optimizers.optimizer(page))
        assert kept == STATES.get(says, 0), page
        if says.startswith("none, or"):
            assert optimizers.state_bytes(optimizers.optimizer(page), momentum=0.9) == 4, page


def test_the_facts_of_a_page_are_the_codes() -> None:
    facts = optimizers.facts("lpsgdm")
    for fact in ("`lp`, p = 6", "power", "moving average, μ = 0.9", "4 bytes", "`lr=0.01`"):
        assert fact in facts
    assert "get-started.md" in optimizers.used_in("lpsgdm", ROOT / "docs")


def test_what_the_pages_say_of_the_study_is_in_its_results() -> None:
    results = " ".join((ROOT / "docs/results.md").read_text(encoding="utf-8").split())
    chooser = " ".join((ROOT / "docs/optimizers/index.md").read_text(encoding="utf-8").split())
    for said in ("119 comparisons, 59 are significant", "60 are ties"):
        assert said in chooser
        assert said in results
    rows = re.findall(r"\| AdamW \| \d–\d–\d \| \d+ % \((\d+) to (\d+)\) \|", results.replace("\u00a0", " "))
    assert len(rows) == 10
    assert sum(not int(low) <= 50 <= int(high) for low, high in rows) == 2  # SCALE, and AdamW + AGR
    assert re.search(r"\| SCALE \| AdamW \| 3–0–4 \| 77 % \(58 to 93\)", results.replace("\u00a0", " "))
    assert "| Muon | AdamW | 5–1–1 |" in results
    assert "| Scion | AdamW | 4–1–2 |" in results
    assert "the result contradicts the reported one (1 better, 2 worse" in results
    better = re.findall(r"(\S+) against AdamW: better on [^;]*bytes \(\S+ points, P-value < 0.001\)", results)
    assert better == ["Muon", "Scion"]
    guide = " ".join((ROOT / "docs/how-to/param-groups.md").read_text(encoding="utf-8").split())
    (chosen,) = re.findall(r"tuning chose (\S+) \(", guide)
    table = results.split("## bytes", 1)[1].split(" ## ", 1)[0]
    assert f"| Muon | {chosen} |" in table
    accuracies = {arm: float(mean) for arm, mean in re.findall(r"\| ([^|]+) \| [\d.e-]+ \| ([\d.]+) % ±", table)}
    assert sorted(accuracies, key=accuracies.__getitem__)[-2:] == ["Scion", "Muon"]
    assert "second-best mean of all arms, after Muon" in (ROOT / "docs/optimizers/scion.md").read_text(encoding="utf-8")
    (lost,) = re.findall(r" SGD against AdamW: [^;]*; worse on bytes \(−([\d.]+) points", results)
    sgd = " ".join((ROOT / "docs/optimizers/sgd.md").read_text(encoding="utf-8").split())
    assert f"its accuracy is {lost} points below AdamW's" in sgd
    assert len(re.findall(r"against AdamW[^:]*: better on [^;]*bytes", results)) == 2


def test_the_standing_of_an_optimizer_is_that_of_the_results() -> None:
    said = optimizers.standing("signum", ROOT / "docs").replace("\u00a0", " ")
    assert "significantly better than AdamW on 1 and worse on 2; 4 are ties." in said
    row = re.search(
        r"^\| Signum \| AdamW \| 1–2–4 \| (.*?) \|", (ROOT / "docs/results.md").read_text("utf-8"), re.MULTILINE
    )
    assert row is not None
    assert row[1].replace("\u00a0", " ") in said
    with pytest.raises(ValueError, match="no arm Lion"):
        optimizers.standing("lion", ROOT / "docs")


def test_the_filter_hides_and_shows(visit: Any) -> None:
    one = visit(viewport=(1280, 900))
    one.goto("optimizers/")
    count, rows = one.page.locator("#chooser-count"), one.page.locator("#chooser tbody tr:visible")
    assert count.inner_text() == f"{len(TABLE)} of {len(TABLE)} optimizers"
    one.page.focus("select[name=layers]")  # by the keyboard alone
    one.page.keyboard.type("matrices")
    assert count.inner_text() == f"{rows.count()} of {len(TABLE)} optimizers"
    assert 0 < rows.count() < len(TABLE)
    assert "LPSGDM" not in one.page.locator("#chooser table").inner_text()
    one.page.fill("input[name=words]", "muon")
    assert "Muon" in rows.first.inner_text()
    one.page.fill("input[name=words]", "no such word")
    assert count.inner_text() == f"0 of {len(TABLE)} optimizers"
