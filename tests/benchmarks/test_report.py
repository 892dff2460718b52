"""The report of a synthetic study: its words and figures follow the data, and it holds all that it shows."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks import report
from benchmarks.environment import Environment
from benchmarks.questions import REGULARIZED
from benchmarks.report import findings, forest, tables
from benchmarks.report.layers import layers
from benchmarks.report.text import NBSP, number, percent, unit
from benchmarks.report.words import command, settings
from benchmarks.results import Results, collect
from benchmarks.stats import Interval
from benchmarks.store import Store
from benchmarks.study.presets import PRESETS
from benchmarks.study.spec import Arm, LRSchedule, Study
from tests.benchmarks.synthetic import DOWN, ENVIRONMENT, LR, STUDY, TRUTHS, UP, Truth, fill

ROOT = Path(__file__).parents[2]
ALONE = STUDY.model_copy(update={"name": "alone", "tasks": (UP.name,)})

pytestmark = pytest.mark.usefixtures("toys")


class Reader(HTMLParser):
    """Collects what a page would load, its visible words, and the shapes that it draws."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.words: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self._inside = tag
        found = {key: value or "" for key, value in attributes}
        self.tags.append((tag, found))
        self.loads += [value for key, value in found.items() if key in ("src", "href", "srcset", "data")]

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, text: str) -> None:
        if self._inside != "style":
            self.words.append(text)


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
    return html, Reader(html)


def test_the_page_loads_nothing_and_runs_nothing(written):
    html, reader = read(written)
    assert not re.search(r"https?://|@import|url\(", html)
    assert all(address.startswith("data:") for address in reader.loads)
    assert "script" not in [tag for tag, _ in reader.tags]
    assert "prefers-color-scheme: dark" in html
    assert 'name="viewport"' in html


def test_the_page_opens_with_the_answer(written, results):
    _, reader = read(written)
    words = plain("".join(reader.words))
    counts = [c.verdict for task in results.tasks.values() for c in task.comparisons]
    better, worse, ties = counts.count(1), counts.count(-1), counts.count(0)
    first = (
        f"Of {len(counts)} comparisons, {better + worse} are significant ({better} better, {worse} worse) and {ties}"
    )
    assert words.index(first) < words.index("What annealing p does") < words.index("In words")
    assert findings(results)[0].text.replace(NBSP, " ").startswith(first)


def test_the_page_holds_every_arm_finding_setting_and_task(written, results):
    _, reader = read(written)
    words = "".join(reader.words)
    assert all(arm.name in words for arm in STUDY.arms)
    assert all(finding.text in words for finding in findings(results))
    assert all(line in words for line in settings(results))
    for text in ("5 trials", "4 of them scrambled Sobol points and then 1 by TPE", "1 to 6", "lr from 0.001 to 10"):
        assert text in plain(words)


def test_every_place_takes_the_verdict_of_a_pair_from_one_place(written, results):
    """Tables, figures, files and sentences, of every pair on every task."""
    rows = list(csv.DictReader((written / "data" / "comparisons.csv").read_text(encoding="utf-8").splitlines()))
    assert len(rows) == 14
    text = words(results)
    html, _ = read(written)
    for row in rows:
        c = results.tasks[row["task"]].comparison(row["arm"], row["against"])
        assert int(row["verdict"]) == c.verdict
        assert c.verdict == (0 if float(row["p_value_holm"]) >= 0.05 else 1 if c.gain > 0 else -1)
        word = forest.VERDICTS[c.verdict]
        (line,) = forest.on_task(results.tasks[row["task"]], "", [c], [c]).lines
        assert line.verdict == word
        assert line.text.startswith(f"{word}: ")
        assert f">{line.text}<" in html.replace("&#39;", "'").replace("&lt;", "<")
        said = re.search(
            rf"{re.escape(row['arm'])} against {re.escape(row['against'])}(?: \(.*?\))?: (.*?[^\d])\.(?: |$)",
            text[row["question"]],
        )
        assert said is not None
        there = re.search(rf"{word} on [^;]*{row['task']} \(", said[1])
        assert bool(there) == bool(c.verdict), (row, said[1])
    for s in results.standings:
        if other := STUDY.against(s.arm):
            verdicts = [task.comparison(s.arm, other).verdict for task in results.tasks.values()]
            grid = next(r for r in tables.standings(results).rows if r[0] == s.arm)
            assert grid[2] == "–".join(str(verdicts.count(v)) for v in (1, -1, 0))


def test_forests_show_the_numbers(results):
    for task in results.tasks.values():
        drawn = forest.on_task(task, "", task.comparisons, task.comparisons)
        zero = drawn.zero
        for line, c in zip(drawn.lines, task.comparisons, strict=True):
            # Better is to the right, and one axis serves all.
            assert (line.dot > zero) == (c.gain > 0)
            low, high = line.ends
            assert 0 <= low <= line.dot <= high <= 100
            scale = (line.dot - zero) / c.gain
            ends = sorted(
                zero + scale * task.sign * end for end in (c.difference.interval.low, c.difference.interval.high)
            )
            if low > 0 and high < 100:
                assert (low, high) == pytest.approx(tuple(ends))
        (left, right) = drawn.noise
        assert right - zero == pytest.approx(zero - left) == pytest.approx(scale * task.noise)
    over = forest.over_tasks(results, results.answers[0])
    for line, pair in zip(over.lines, results.answers[0].question.pairs, strict=True):
        found = results.improvements[pair.arm, pair.control]
        assert (line.dot, *line.ends) == pytest.approx((100 * found.mean, 100 * found.low, 100 * found.high))
        assert (line.verdict == "tie") == (found.low <= 0.5 <= found.high)


def test_a_study_that_cannot_reject_says_so(results, tmp_path):
    text = words(results)["Answer"]
    # Six seeds give 2/64 at least, and the largest question has 6 tests.
    assert "the P-value of the exact sign-flip test is never below 0.031" in text
    assert "it cannot reject in the largest question, of 6 tests, which needs 8 seeds" in text
    more = STUDY.model_copy(update={"seeds": tuple(range(1, 9))})
    said = words(told(tmp_path, study=more))["Answer"]
    assert "cannot reject" not in said
    assert re.search(r"The exact sign-flip test, which assumes no distribution, confirms (\d+) of \1\.", said)


def test_no_winner_is_named_where_nothing_separates(tmp_path):
    equal = told(tmp_path, dict.fromkeys(TRUTHS, Truth()))
    text = words(equal)["Answer"]
    assert text.startswith("All 14 comparisons are ties.")
    assert "no winner" in text
    assert not re.search(r"best|highest", text)


def test_the_twins_say_what_the_page_says(written, results):
    text = (written / "summary.md").read_text(encoding="utf-8")
    assert all(finding.text in text for finding in findings(results))
    assert not re.search(r"^#+ .*\n+(#|\Z)", text, re.MULTILINE)  # a heading with nothing under it
    rows = list(csv.DictReader((written / "summary.csv").read_text(encoding="utf-8").splitlines()))
    assert [(row["task"], row["arm"]) for row in rows] == [(row.task, row.name) for row in results.rows]
    for found, row in zip(rows, results.rows, strict=True):
        mean = sum(run.test_score or 0 for run in row.runs) / len(row.runs)
        assert float(found["test_score"]) == pytest.approx(mean)


def test_names_are_escaped(tmp_path):
    odd = STUDY.arms[1].model_copy(update={"name": "<b>Adam & W|</b>"})
    study = STUDY.model_copy(update={"arms": (STUDY.arms[0], odd)})
    report.write(collect(fill(tmp_path, study, {"SGD": Truth(), odd.name: Truth(gain=0.1)})), tmp_path)
    html, reader = read(tmp_path)
    assert "<b>Adam" not in html
    assert odd.name in "".join(reader.words)
    page = report.write_page(collect(Store(tmp_path)), tmp_path / "page.md").read_text(encoding="utf-8")
    assert "| <b>Adam & W\\|</b> |" in page


def test_words_follow_the_data(results, tmp_path):
    text = words(results)["Against SGD"]
    assert re.search(
        r"AdamW against SGD: better on toy-up \(\+[23]\.\d\d points, P-value .*\) and toy-down \(−0\.0", text
    )
    assert re.search(r"LPSGDM against SGD: worse on toy-up \(−[12]\.\d\d points", text)
    swapped = words(told(tmp_path, {"AdamW": Truth(gain=-0.03), "LPSGDM": Truth(gain=0.02)}))["Against SGD"]
    assert "AdamW against SGD: worse on toy-up" in swapped
    assert "LPSGDM against SGD: better on toy-up" in swapped
    assert "The noise floor is 0.1" in words(results)["Task toy-up"]


def test_how_learning_rates_move_is_said_of_every_arm(results, tmp_path):
    def said(*schedules: LRSchedule) -> str:
        arms = [arm.model_copy(update={"lr_schedule": plan}) for arm, plan in zip(STUDY.arms, schedules, strict=False)]
        study = STUDY.model_copy(update={"arms": (*arms, *STUDY.arms[len(arms) :])})
        (found,) = [p for p in settings(replace(results, study=study)) if p.startswith("Learning rates")]
        return found.replace("\u00a0", " ")

    assert said() == "Learning rates: they fall to 0 along half a cosine."
    warm, constant = LRSchedule(warmup=0.05), LRSchedule(kind="constant")
    assert said(*[constant] * len(STUDY.arms)) == "Learning rates: they stay as they are."
    text = said(warm, constant, warm, LRSchedule(kind="wsd", warmup=0.1, cooldown=0.25))
    assert text == (
        "Learning rates: they warm up over 5 % of the steps, then fall to 0 along half a cosine (SGD, LPSGDM); stay as "
        "they are (AdamW); warm up over 10 % of the steps, then stay as they are until they fall to 0 in a straight "
        "line over the last 25 % of the steps (LPSGDM constant p); fall to 0 along half a cosine (Lengths, LPSGDM + "
        "AGR, LPSGDM + decay)."
    )


def test_autocast_and_a_batch_size_of_the_study_are_said(results):
    changed = replace(results, study=STUDY.model_copy(update={"amp": True, "batch_size": 32}))
    (plain,), (said,) = ([p for p in settings(r) if p.startswith("Training")] for r in (results, changed))
    assert "bfloat16 autocast. Batches have 32 examples." in said
    assert "bfloat16" not in plain
    assert "Batches have" not in plain


def test_versions_of_which_there_is_more_than_one_are_said(results):
    def trust(*environments: Environment) -> str:
        return words(replace(results, environments=environments))["How far to trust this"]

    other = ENVIRONMENT.model_copy(update={"torch": "2.14", "normopt": "0.2"})
    moved = ENVIRONMENT.model_copy(update={"cpus": 64})
    assert "more than one version: torch 2.13 and 2.14; normopt 0.1 and 0.2." in trust(ENVIRONMENT, other)
    assert "made in 2 environments" in trust(ENVIRONMENT, moved)
    assert "environments" not in trust(ENVIRONMENT)


def test_what_was_lost_is_named(tmp_path):
    found = told(tmp_path, {"AdamW": Truth(diverges=(1, 2))}, failing=("LPSGDM + AGR", 3))
    text = words(found)
    assert "AdamW (2 of 6 diverged) and LPSGDM + AGR (1 of 6 failed)" in text["Task toy-up"]
    lost = "Final runs diverged or failed for AdamW on toy-up and toy-down and LPSGDM + AGR on"
    assert lost in text["How far to trust this"]
    assert "LPSGDM + AGR against LPSGDM (the same without): not compared, because runs are missing" in text[REGULARIZED]
    assert "2 runs raised an error" in text["How far to trust this"]
    assert "ValueError: no" in text["How far to trust this"]
    cells = tables.grid(found.tasks[UP.name]).rows
    assert plain(cells[1][2]) == "2 of 6 diverged"
    report.write(found, tmp_path)


def test_where_everything_diverged_there_is_still_a_report(tmp_path):
    found = told(tmp_path, {name: Truth(diverges=STUDY.seeds) for name in TRUTHS})
    assert words(found)["Answer"].startswith("All 14 comparisons are ties.")
    report.write(found, tmp_path)
    report.write_page(found, tmp_path / "page.md")


@pytest.mark.parametrize(("tuned", "final"), [(0, 0), (2, 0), (None, 0), (None, 1)])
def test_an_unfinished_study_reports_what_is_there(tmp_path, tuned, final):
    found = told(tmp_path, tuned=tuned, final=final)
    text = words(found)["Not finished"]
    assert f"{found.done} of {found.wanted} runs are done" in text
    assert "toy-up and toy-down" in text
    report.write(found, tmp_path)
    assert "Not finished" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_study_of_one_task_has_nothing_over_all_tasks(tmp_path):
    found = told(tmp_path, study=ALONE)
    report.write(found, tmp_path)
    html, _ = read(tmp_path)
    assert "Over all tasks" not in html
    # Its forest of differences opens the page.
    assert html.index("LPSGDM + AGR − LPSGDM") < html.index("In words")
    assert re.search(r"a tie: .0\.\d\d points \(95 %", words(found)["What AGR does"])


def test_p_is_the_norms_and_never_a_significance(results):
    for finding in findings(results):
        assert not re.search(r"p [=<]|p-value", plain(finding.text))


def test_numbers_stay_with_their_units(results, written):
    texts = [finding.text for finding in findings(results)] + (written / "summary.md").read_text("utf-8").splitlines()
    for text in texts:
        assert not re.search(r"\d (%|±|points?\b)|± \d", text), text
    for _, *cells in tables.grid(results.tasks[UP.name]).rows:
        assert all(" " not in cell for cell in cells)


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
        for name, *cells in tables.grid(task, width).rows:
            line = next(line for line in text.splitlines() if name in line)
            assert all(cell in line for cell in cells)


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
