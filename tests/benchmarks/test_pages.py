"""The page of the docs, and the comparison of studies."""

from __future__ import annotations

import csv
import json
import re
import xml.etree.ElementTree
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.report import docs
from benchmarks.report.pictures import pictures
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
        r"Of 7 arms on 2 tasks .*, 14 can be compared seed by seed, and 2 of 14 differ at the 5 % level", text
    )
    rows = list(csv.DictReader((path.parent / "compare.csv").read_text(encoding="utf-8").splitlines()))
    (row,) = (r for r in rows if (r["task"], r["arm"], r["study"]) == (UP.name, "AdamW", "again"))
    assert float(row["difference_to_first"]) == pytest.approx(-0.04, abs=0.003)
    assert reader.files["compare.csv"] == (path.parent / "compare.csv").read_text(encoding="utf-8")
    figure = json.loads(next(script for script in reader.scripts if script.startswith("{")))["compare"][UP.name]
    assert len(figure["data"]) == 14


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
    page = docs.write(results, tmp_path / "results.md")
    text = page.read_text(encoding="utf-8")
    again = told(tmp_path / "swapped", {"AdamW": Truth(gain=-0.03)})
    other = docs.page(again, {})
    flat = {name: re.sub(r"\s+", " ", plain(t)) for name, t in (("this", text), ("other", other))}
    for name, source in (("this", results), ("other", again)):
        assert all(re.sub(r"\s+", " ", plain(finding.text)) in flat[name] for finding in findings(source))
    assert flat["this"] != flat["other"]
    assert max(len(line) for line in text.splitlines() if not line.startswith(("|", "!"))) <= 120
    shown = re.findall(r"!\[.+\]\((.+)\)", text)
    assert shown == [f"assets/results-{name}.svg" for name in ("profiles", "zeros", "differences", "trials")]
    for picture in shown:
        svg = (tmp_path / picture).read_text(encoding="utf-8")
        xml.etree.ElementTree.fromstring(svg)
        assert "<dc:date>" not in svg
    assert not re.search(r"^#+ .*\n+(#|\Z)", text, re.MULTILINE)


def test_the_same_results_give_the_same_pictures(results):
    assert pictures(results) == pictures(results)


def test_the_docs_page_links_the_runs_where_they_are(results, tmp_path, monkeypatch):
    monkeypatch.setattr(docs, "pictures", lambda results: {})
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "toy.parquet").touch()
    text = docs.write(results, tmp_path / "results.md").read_text(encoding="utf-8")
    assert "[the stored runs](data/toy.parquet)" in re.sub(r"\s+", " ", text)


def test_the_committed_page_is_what_the_committed_runs_say(tmp_path):
    stored, page = ROOT / "docs" / "data" / "standard.parquet", ROOT / "docs" / "results.md"
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / stored.name).symlink_to(stored)
    again = docs.write(collect(Store.from_parquet(stored)), tmp_path / page.name)
    assert again.read_text(encoding="utf-8") == page.read_text(encoding="utf-8")
    made = sorted(path.name for path in (tmp_path / "assets").iterdir())
    assert made == sorted(path.name for path in (ROOT / "docs" / "assets").glob("results-*.svg"))
