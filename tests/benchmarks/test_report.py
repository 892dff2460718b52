"""The report of a synthetic study: its words and figures follow the data, and it holds all that it shows."""

from __future__ import annotations

import base64
import csv
import io
import json
import math
import re
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from plotly.offline import get_plotlyjs
from rich.console import Console

from benchmarks import report
from benchmarks.report import docs, tables
from benchmarks.report.figures import figures
from benchmarks.report.layers import layers
from benchmarks.report.protocol import command, settings
from benchmarks.report.text import NBSP, number, percent, unit
from benchmarks.report.words import findings
from benchmarks.results import Results, collect
from benchmarks.stats import Interval
from benchmarks.store import Store
from benchmarks.study.presets import PRESETS
from benchmarks.study.spec import Arm, Study
from tests.benchmarks.synthetic import DOWN, LR, STUDY, TRUTHS, UP, Truth, fill

ROOT = Path(__file__).parents[2]
ALONE = STUDY.model_copy(update={"name": "alone", "tasks": (UP.name,)})

pytestmark = pytest.mark.usefixtures("toys")


class Reader(HTMLParser):
    """Collects what a page would load, its visible words, its scripts, and its files."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.words: list[str] = []
        self.scripts: list[str] = []
        self.files: dict[str, str] = {}
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self._inside = tag
        found = {key: value or "" for key, value in attributes}
        self.loads += [value for key, value in found.items() if key in ("src", "href", "srcset", "data")]
        if "download" in found:
            self.files[found["download"]] = base64.b64decode(found["href"].partition("base64,")[2]).decode()

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, text: str) -> None:
        (self.scripts if self._inside == "script" else self.words).append(text)


def plain(text: str) -> str:
    return text.replace(NBSP, " ")


def words(results: Results) -> dict[str, str]:
    """The findings, with plain spaces: where a line may not be broken has a test of its own."""
    return {finding.title: plain(finding.text) for finding in findings(results)}


def told(folder: Path, truths: Mapping[str, Truth] | None = None, study: Study = STUDY, **more: Any) -> Results:
    return collect(fill(folder, study, TRUTHS | (truths or {}), **more))


@pytest.fixture(scope="module")
def results(toys: None, tmp_path_factory: pytest.TempPathFactory) -> Results:
    return told(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def written(results: Results) -> Path:
    assert report.write(results, results.folder) == results.folder / "report.html"
    return results.folder


def read(folder: Path, name: str = "report.html") -> tuple[str, Reader]:
    html = (folder / name).read_text(encoding="utf-8")
    assert html.count(get_plotlyjs()) == 1
    rest = html.replace(get_plotlyjs(), "")
    return rest, Reader(rest)


def test_the_page_loads_nothing(written):
    html, reader = read(written)
    assert not re.search(r"https?://|@import|url\(", html)
    assert all(address.startswith("data:") for address in reader.loads)
    assert "prefers-color-scheme: dark" in html
    assert 'name="viewport"' in html


def test_the_page_holds_every_arm_finding_setting_and_task(written, results):
    _, reader = read(written)
    words = "".join(reader.words)
    assert all(arm.name in words for arm in STUDY.arms)
    assert all(finding.title in words and finding.text in words for finding in findings(results))
    assert all(line in words for line in settings(results))
    shown = json.loads(next(script for script in reader.scripts if script.startswith("{")))
    names = ["profiles", "scores", "differences", "trials", "budgets", "curves", "costs", "zeros"]
    assert list(shown) == names == [figure.name for figure in figures(results)]
    assert all(list(panels) == [UP.name, DOWN.name] for name, panels in shown.items() if name != "profiles")
    rows = list(csv.DictReader((written / "data" / "claims.csv").read_text(encoding="utf-8").splitlines()))
    assert {row["question"] for row in rows} == {"annealing", "AGR", "ℓp decay"}
    assert all(float(row["p_value_holm"]) >= float(row["p_value"]) for row in rows)
    for text in ("5 trials", "4 of them scrambled Sobol points and then 1 by TPE", "1 to 6", "lr from 0.001 to 10"):
        assert text in plain(words)


def test_every_figure_has_its_data_beside_it(written, results):
    _, reader = read(written)
    for name, text in reader.files.items():
        assert (written / "data" / name).read_text(encoding="utf-8") == text
    assert set(reader.files) == {path.name for path in (written / "data").iterdir()}
    for figure in figures(results):
        assert ("scores" if figure.name == "costs" else figure.name) + ".csv" in reader.files


def columns(written: Path, name: str, task: str) -> list[dict[str, str]]:
    lines = (written / "data" / f"{name}.csv").read_text(encoding="utf-8")
    return [row for row in csv.DictReader(io.StringIO(lines)) if row["task"] == task]


def test_figures_are_drawn_from_their_data(written, results):
    panels = {figure.name: figure.panels for figure in figures(results)}
    differences = panels["differences"][UP.name].data
    rows = columns(written, "differences", UP.name)
    assert [trace.x[0] for trace in differences] == pytest.approx([100 * float(row["difference"]) for row in rows])
    for trace, row in zip(differences, rows, strict=True):
        ends = trace.x[0] - trace.error_x.arrayminus[0], trace.x[0] + trace.error_x.array[0]
        assert ends == pytest.approx((100 * float(row["low"]), 100 * float(row["high"])))
        assert (trace.marker.symbol == "circle") == (float(row["p_value_holm"]) < 0.05)
    trials = [row for row in columns(written, "trials", DOWN.name) if row["arm"] == "SGD"]
    (trace,) = (trace for trace in panels["trials"][DOWN.name].data if trace.name == "SGD")
    assert list(trace.x) == sorted(float(row["lr"]) for row in trials)
    sound = [float(row["validation_loss"]) for row in trials if row["diverged"] == "False"]
    assert sorted(y for y, mark in zip(trace.y, trace.marker.symbol, strict=True) if mark != "x-thin") == sorted(sound)
    assert list(trace.marker.symbol).count("circle-open") == 1
    profile = {trace.name: trace for trace in panels["profiles"][""].data}
    area = sum(
        y * (b - a) for y, a, b in zip(profile["AdamW"].y, profile["AdamW"].x, profile["AdamW"].x[1:], strict=False)
    )
    assert area / 300 == pytest.approx({s.arm: s.profile.area for s in results.standings}["AdamW"])


def test_the_lines_of_best_against_budget_meet_where_tpe_begins(results):
    plot = next(figure for figure in figures(results) if figure.name == "budgets").panels[UP.name]
    lines = [trace for trace in plot.data if trace.name == "SGD"]
    assert len(lines) == 2
    assert lines[0].x[-1] == lines[1].x[0] == STUDY.tuning.startup
    assert lines[0].y[-1] == pytest.approx(lines[1].y[0])


def test_the_twins_say_what_the_page_says(written, results):
    text = (written / "summary.md").read_text(encoding="utf-8")
    assert all(finding.text in text for finding in findings(results))
    assert not re.search(r"^#+ .*\n+(#|\Z)", text, re.MULTILINE)  # a heading with nothing under it
    rows = list(csv.DictReader((written / "summary.csv").read_text(encoding="utf-8").splitlines()))
    assert [(row["task"], row["arm"]) for row in rows] == [(row.task, row.name) for row in results.rows]
    for found, row in zip(rows, results.rows, strict=True):
        mean = sum(run.test_score or 0 for run in row.runs) / len(row.runs)
        assert float(found["test_score"]) == pytest.approx(mean)


def test_words_on_tasks_follow_the_data(results, tmp_path):
    text = words(results)["Task toy-up"]
    assert "by AdamW; the worst is" in text
    number = r"[+−]\d\.\d\d"
    sure = rf"points \(95 % interval {number} to {number}, P-value .*?\)"
    assert re.search(rf"Against SGD: better at the 5 % level is AdamW by \+[23]\.\d\d {sure}; worse at", text)
    # Three of them: their intervals are in the table.
    assert re.search(
        r"worse at the 5 % level are LPSGDM by −[12]\.\d\d .* and LPSGDM \+ decay by −2\.\d\d points", text
    )
    assert re.search(
        r"Against LPSGDM: .*; not told apart from it are Lengths and LPSGDM \+ AGR \(\d of 2 means better\)", text
    )
    # Lower is better there, so that the signs are the other way round.
    down = words(results)["Task toy-down"]
    assert "by AdamW; the worst is" in down
    assert re.search(r"Against SGD: better at the 5 % level is AdamW by −0\.0[23]\d* \(95 % interval −", down)

    swapped = told(tmp_path, {"AdamW": Truth(gain=-0.03), "LPSGDM": Truth(gain=0.02)})
    for name in ("Task toy-up", "Task toy-down"):
        text = words(swapped)[name]
        assert re.search(r"better at the 5 % level is LPSGDM by", text)
        assert re.search(r"worse at the 5 % level are AdamW by", text)


def test_many_comparisons_are_told_by_their_means_alone(tmp_path):
    found = told(tmp_path, {name: Truth(gain=-0.05) for name in ("AdamW", "LPSGDM", "LPSGDM + decay")})
    text = words(found)["Task toy-up"].partition("Against LPSGDM:")[0]
    assert re.search(r"level are AdamW \(−\d\.\d\d points\), LPSGDM \(−\d\.\d\d points\) and LPSGDM \+ decay \(−", text)
    rows = tables.differences(found.tasks[UP.name]).rows
    assert all(re.fullmatch(r"(< )?0\.\d{3}", plain(row[3])) for row in rows)
    assert [row[0] for row in rows] == [c.row.name for c in found.tasks[UP.name].comparisons]


def test_words_over_all_tasks_follow_the_data(results, tmp_path):
    text = words(results)["Over all tasks"]
    assert text.startswith("Over 2 tasks, AdamW comes nearest")
    assert "AdamW has the best mean on every task." in text
    slow = told(tmp_path / "slow", {name: Truth(reached=None) for name in TRUTHS})
    assert "no arm reaches a target" in words(slow)["Over all tasks"]


def test_what_was_lost_is_named(tmp_path):
    found = told(tmp_path, {"AdamW": Truth(diverges=(1, 2))}, failing=("LPSGDM + AGR", 3))
    text = words(found)
    assert "AdamW (2 of 6 diverged) and LPSGDM + AGR (1 of 6 failed)" in text["Task toy-up"]
    assert "Final runs were lost by AdamW on toy-up and toy-down and LPSGDM + AGR on" in text["How far to trust this"]
    assert "2 runs raised an error" in text["How far to trust this"]
    assert "ValueError: no" in text["How far to trust this"]
    cells = tables.grid(tables.columns(found.tasks[UP.name]), found.tasks[UP.name].rows).rows
    assert plain(cells[1][2]) == "2 of 6 diverged"
    report.write(found, tmp_path)


def test_where_everything_diverged_there_is_still_a_report(tmp_path):
    found = told(tmp_path, {name: Truth(diverges=STUDY.seeds) for name in TRUTHS})
    assert words(found)["Task toy-up"].startswith("No arm has a mean")
    report.write(found, tmp_path)
    docs.write(found, tmp_path / "page.md")


@pytest.mark.parametrize(("tuned", "final"), [(0, 0), (2, 0), (None, 0), (None, 1)])
def test_an_unfinished_study_reports_what_is_there(tmp_path, tuned, final):
    found = told(tmp_path, tuned=tuned, final=final)
    text = words(found)["Not finished"]
    assert f"{found.done} of {found.wanted} runs are there" in text
    assert "toy-up and toy-down" in text
    report.write(found, tmp_path)
    assert "Not finished" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_study_of_one_task_has_nothing_over_all_tasks(tmp_path):
    found = told(tmp_path, study=ALONE)
    report.write(found, tmp_path)
    html, reader = read(tmp_path)
    assert "Over all tasks" not in html
    assert "<nav hidden>" in html
    shown = json.loads(next(script for script in reader.scripts if script.startswith("{")))
    assert "profiles" not in shown
    assert re.search(r"not told apart on toy-up, .0\.\d\d points \(95 %", words(found)["What AGR does"])


def test_p_is_the_norms_and_never_a_significance(results):
    for finding in findings(results):
        assert not re.search(r"p [=<]|p-value", plain(finding.text))


def test_numbers_stay_with_their_units(results, written):
    texts = [finding.text for finding in findings(results)] + (written / "summary.md").read_text("utf-8").splitlines()
    for text in texts:
        assert not re.search(r"\d (%|±|points?\b)|± \d", text), text
    task = results.tasks[UP.name]
    for column in tables.columns(task)[1:]:
        assert all(" " not in column.cell(row) for row in task.rows)


def test_how_numbers_are_written():
    assert plain(unit(UP).score(Interval(0.97, 0.965, 0.975, 5))) == "97.0 % ± 0.5"
    assert plain(unit(UP).score(Interval(0.97, 0.961, 0.975, 20))) == "97.0 % (96.1 to 97.5)"
    assert (
        plain(unit(UP).difference(Interval(-0.004, -0.006, -0.002, 5))) == "−0.40 points (95 % interval −0.60 to −0.20)"
    )
    assert plain(unit(DOWN).score(Interval(-2.5, -2.6, -2.4, 5))) == "−2.50 ± 0.10"
    assert plain(number(Interval(0.7431, 0.7311, 0.7551, 5))) == "0.743 ± 0.012"
    assert plain(number(Interval(3.1e-9, 2.9e-9, 3.3e-9, 5))) == "3.1e−09 ± 2e−10"
    assert plain(number(Interval(12.3456, math.nan, math.nan, 1))) == "12.3"
    assert percent(Interval(0, 0, 0, 5)) == "0"


@pytest.mark.parametrize(("width", "losses"), [(80, False), (119, False), (120, True), (200, True)])
def test_the_terminal_shows_what_fits_whole(results, width, losses):
    for task, table in zip(results.tasks.values(), tables.terminal(results, width), strict=True):
        out = Console(width=width, file=io.StringIO(), record=True)
        out.print(table)
        text = out.export_text()
        assert ("validation" in text) == losses
        assert "state" not in text
        for row in task.rows:
            line = next(line for line in text.splitlines() if row.name in line)
            shown = [column for column in tables.columns(task) if width >= column.least]
            assert all(column.cell(row) in line for column in shown)


def test_a_preset_says_its_command_and_another_study_none(results, tmp_path):
    assert command(results) is None
    folder = Store(tmp_path)
    folder.study = PRESETS["smoke"]
    assert command(collect(folder)) == "python -m benchmarks run smoke"


def test_layers_are_shown_where_optimizers_have_a_norm_for_each(tmp_path):
    assert layers(told(tmp_path / "none", study=ALONE)) == {}
    muon = Arm(name="Muon", optimizer="muon", search=LR)
    plainly = Arm(name="No preset", optimizer="muon", settings={"preset": "none"}, search=LR)
    study = ALONE.model_copy(update={"arms": (STUDY.arms[0], muon, plainly)})
    found = told(tmp_path, {"Muon": Truth(), "No preset": Truth()}, study)
    ((title, table),) = layers(found).items()
    assert title == "Muon on toy-up"
    assert "weight" in table
    report.write(found, tmp_path)
    _, reader = read(tmp_path)
    for text in (" ".join(reader.words), (tmp_path / "summary.md").read_text(encoding="utf-8")):
        assert "Which layer has which norm" in text
        assert table in text
