"""The page "What we found" says what the committed runs say, and of runs that are not there that they are not."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from benchmarks.programs import paper_pages
from benchmarks.study import papers
from tests.benchmarks.test_papers import told

sys.path.insert(0, str(Path(__file__).parents[1] / "docs/hooks"))
import findings

DOCS = Path(__file__).parents[1] / "docs"


def test_a_study_without_committed_runs_is_not_measured_yet():
    page = findings.page(DOCS)
    data = [DOCS / f"data/{name}.parquet" for name in papers.DECLARED] + [DOCS / "data/best_norm.json"]
    assert page.count(findings.NOT_YET) == sum(not path.exists() for path in data)
    for name in papers.DECLARED:
        assert f"](benchmarks/{name}.md)" in page


def test_committed_runs_of_a_paper_change_the_page(tmp_path, monkeypatch):
    monkeypatch.setattr(paper_pages, "read", lambda name: None)
    before = findings.page(DOCS)
    gains = {"AdamW + AGR": 0.01, "Adan + AGR": 0.01, "torch's AdamW + AGR on hooks": 0.01}
    results = told(tmp_path, "paper-agr", gains, {}, lambda spec: 0.5)
    monkeypatch.setattr(paper_pages, "read", lambda name: results if name == "paper-agr" else None)
    after = findings.page(DOCS)
    assert before.count(findings.NOT_YET) == after.count(findings.NOT_YET) + 1
    assert "better in 2, worse in 1 of 14 comparisons | the claim holds |" in after
    assert "The claim holds: AdamW + AGR minus AdamW is +" in " ".join(after.split())


def test_the_best_norm_is_counted_by_its_changes(tmp_path):
    def change(task: str, difference: tuple[float, float, float], p: float, **other: object) -> dict[str, object]:
        numbers = {"early": (0.1, 0, 0.2), "late": (0.4, 0.3, 0.5), "difference": difference, "p_value": p}
        return findings.BEST | numbers | {"task": task} | other

    path = tmp_path / "best_norm.json"
    assert findings.best_norm(path) == ("not measured yet", findings.NOT_YET)
    changes = [
        change("digits", (0.3, 0.2, 0.4), 0.01),
        change("fashion-cnn", (-0.3, -0.4, -0.2), 0.01),
        change("mnist1d", (0.3, -0.2, 0.8), 0.2),
        change("digits", (0.3, 0.2, 0.4), 0.01, adaptive=True),
    ]
    path.write_text(json.dumps({"changes": changes}), encoding="utf-8")
    verdict, table = findings.best_norm(path)
    assert verdict == "the best p falls significantly on 1 of 3 tasks, and rises on 1"
    assert "| digits | 0.10 | 0.40 | +0.30 (+0.20 to +0.40) | 0.010 |" in table
    assert "| fashion-cnn | 0.10 | 0.40 | −0.30 (−0.40 to −0.20) | 0.010 |" in table


def test_the_verdicts_are_those_of_the_results():
    results = (DOCS / "results.md").read_text(encoding="utf-8")
    words = " ".join(results.split()).replace("\u00a0", " ")
    for arm in ("LPSGDM", "AdamW"):
        pair = findings.held(results, f"{arm} + AGR", arm)
        assert pair.better + pair.worse + pair.ties == len(re.findall(r"^- Task ", results, re.MULTILINE))
    agr = [findings.held(results, f"{arm} + AGR", arm) for arm in ("LPSGDM", "AdamW")]
    counts = [sum(pair[i] for pair in agr) for i in (3, 4, 5)]
    assert "({} better, {} worse, {} ties)".format(*counts) in words
    turned = findings.held(results, "LPSGDM constant p", "LPSGDM").turned()
    assert f"({turned.better} better, {turned.worse} worse, {turned.ties} ties)" in words
    assert turned.low <= turned.improvement <= turned.high
    with pytest.raises(ValueError, match="no comparison of Muon with SGD"):
        findings.held(results, "Muon", "SGD")
