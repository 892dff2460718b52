"""The page of the docs, and the comparison of studies."""

from __future__ import annotations

import csv
import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks import report
from benchmarks.report.words import findings
from benchmarks.results import Results, collect
from benchmarks.store import Store, UnfitStore
from benchmarks.study.presets import PRESETS
from tests.benchmarks.synthetic import ENVIRONMENT, LR, STUDY, UP, Truth
from tests.benchmarks.test_report import plain, read, told

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.usefixtures("toys")


@pytest.fixture(scope="module")
def results(toys: None, tmp_path_factory: pytest.TempPathFactory) -> Results:
    return told(tmp_path_factory.mktemp("whole"))


def test_studies_are_compared_seed_by_seed(results, tmp_path):
    wider = STUDY.arms[0].model_copy(update={"search": {"lr": LR["lr"].model_copy(update={"high": 11.0})}})
    other = STUDY.model_copy(update={"name": "other", "arms": (wider, *STUDY.arms[1:])})
    first = replace(results, environments=[ENVIRONMENT.model_copy(update={"data": {UP.name: "a", "only here": "b"}})])
    environment = ENVIRONMENT.model_copy(update={"torch": "2.14", "data": {UP.name: "b"}})
    again = told(tmp_path / "again", {"AdamW": Truth(gain=-0.01, reached=2)}, other, environment=environment)
    path = report.compare([first, again], tmp_path / "compared")
    _, reader = read(path.parent, path.name)
    assert all(address.startswith("data:") for address in reader.loads)
    text = plain((path.parent / "compare.md").read_text(encoding="utf-8"))
    assert "name other instead of toy" in text
    assert "torch 2.14 instead of 2.13" in text
    assert "another search of SGD;" in text
    assert "other data of toy-up" in text
    # AdamW alone has another truth, on both tasks.
    assert re.search(
        r"again against whole\d+: of 14 comparisons, 2 are significant \(0 better, 2 worse\) and 12 are ties", text
    )
    rows = list(csv.DictReader((path.parent / "compare.csv").read_text(encoding="utf-8").splitlines()))
    (row,) = (r for r in rows if (r["task"], r["arm"], r["study"]) == (UP.name, "AdamW", "again"))
    assert float(row["difference_to_first"]) == pytest.approx(-0.04, abs=0.003)
    assert (float(row["p_value_holm"]) < 0.05, row["verdict"]) == (True, "-1")
    assert sum(tag == "circle" for tag, _ in reader.tags) == 14


def test_equal_studies_are_said_to_be_equal(results, tmp_path):
    path = report.compare([results, results], tmp_path)
    text = plain((path.parent / "compare.md").read_text(encoding="utf-8"))
    assert "nothing in their settings or environments" in text
    assert "14 of 14 are equal to the last bit on every seed" in text
    assert "(2)" in text


def test_what_cannot_be_compared_is_refused(results, tmp_path):
    with pytest.raises(UnfitStore, match="at least two"):
        report.compare([results], tmp_path)
    folder = Store(tmp_path)
    folder.study = PRESETS["smoke"]
    with pytest.raises(UnfitStore, match="no task and arm in common"):
        report.compare([results, collect(folder)], tmp_path)


def test_the_docs_page_follows_the_data(results, tmp_path):
    text = report.write_page(results, tmp_path / "results.md").read_text(encoding="utf-8")
    again = told(tmp_path / "swapped", {"AdamW": Truth(gain=-0.03)})
    other = report.write_page(again, tmp_path / "other.md").read_text(encoding="utf-8")
    flat = {name: re.sub(r"\s+", " ", plain(t)) for name, t in (("this", text), ("other", other))}
    for name, source in (("this", results), ("other", again)):
        assert all(re.sub(r"\s+", " ", plain(finding.text)) in flat[name] for finding in findings(source))
    assert flat["this"] != flat["other"]
    assert max(len(line) for line in text.splitlines() if not line.startswith(("|", "<"))) <= 120
    assert "[the stored runs](data/toy.parquet)" in flat["this"]
    assert not re.search(r"^#+ .*\n+(#|\Z)", text, re.MULTILINE)
    # Markdown ends a block of HTML at an empty line: none may be inside.
    for block in re.findall(r'<div class="forest">.*?\n</div>', text, re.DOTALL):
        assert "\n\n" not in block
        xml = "<r>" + block + "</r>"
        ElementTree.fromstring(xml)


def test_the_committed_page_is_what_the_committed_runs_say(tmp_path):
    stored, page = ROOT / "docs" / "data" / "standard.parquet", ROOT / "docs" / "results.md"
    again = report.write_page(collect(Store.from_parquet(stored)), tmp_path / page.name)
    assert again.read_text(encoding="utf-8") == page.read_text(encoding="utf-8")
