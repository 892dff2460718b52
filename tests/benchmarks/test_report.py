from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from plotly.offline import get_plotlyjs
from rich.console import Console

from benchmarks import report
from benchmarks.phases import Choice
from benchmarks.presets import PRESETS, SMOKE
from benchmarks.report.figures import figures
from benchmarks.report.tables import columns, notes, terminal
from benchmarks.report.text import NBSP
from benchmarks.report.words import chosen, findings, met, sparsity_words
from benchmarks.results import Results, Row, SparsityPoint, collect
from benchmarks.spec import Pair, Study
from benchmarks.stats import Difference, Interval
from benchmarks.store import Store, UnfitStore
from benchmarks.training import Epoch, RunRecord
from tests.benchmarks.test_store import ROOT

QUICK = PRESETS["quick"]
ASKED = QUICK.sparsity
assert ASKED is not None


class Reader(HTMLParser):
    """Collects what a page would load, its visible words, and its scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.words: list[str] = []
        self.scripts: list[str] = []
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self._inside = tag
        self.loads += [value or "" for key, value in attributes if key in ("src", "href", "srcset", "data")]

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        (self.scripts if self._inside == "script" else self.words).append(data)


@pytest.fixture(scope="module")
def written(results: Results, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    report.write(results, folder)
    return folder


def test_the_page_loads_nothing(written):
    html = (written / "report.html").read_text(encoding="utf-8")
    assert html.count(get_plotlyjs()) == 1
    rest = html.replace(get_plotlyjs(), "")
    assert not re.search(r"https?://|@import|url\(", rest)
    assert Reader(rest).loads == ["data:,"]
    assert "prefers-color-scheme: dark" in rest
    assert 'name="viewport"' in rest


def test_the_page_holds_every_arm_finding_setting_and_figure(written, results):
    reader = Reader((written / "report.html").read_text(encoding="utf-8").replace(get_plotlyjs(), ""))
    words = " ".join(reader.words)
    for arm in SMOKE.arms:
        assert arm.name in words
    for finding in findings(results):
        assert finding.text in words
    assert "python -m benchmarks ablate --preset smoke" in words
    words = plain(words)
    for number in ("seed 1000", "seeds 1, 2", "0.0003/η", "λ = 0.1, 1"):
        assert number in words
    figures = json.loads(next(script for script in reader.scripts if script.startswith("{")))
    assert list(figures) == ["loss", "accuracy", "lr", "sparsity", "difference"]
    assert {trace["name"] for trace in figures["loss"]["data"]} == {arm.name for arm in SMOKE.arms}


def test_the_twins_say_what_the_page_says(written, results):
    text = (written / "summary.md").read_text(encoding="utf-8")
    assert all(finding.text in text for finding in findings(results))
    rows = list(csv.DictReader((written / "summary.csv").read_text(encoding="utf-8").splitlines()))
    assert [(row["arm"], row["regularizer"]) for row in rows] == SMOKE.pairs
    for found, row in zip(rows, results.rows, strict=True):
        mean = sum(run.test_accuracy or 0 for run in row.runs) / len(row.runs)
        assert float(found["test_accuracy_mean"]) == pytest.approx(mean)


def record(pair: Pair, study: Study, seed: int, accuracy: float | None) -> RunRecord:
    """A run that never was, with the test accuracy that a sentence is to be made of."""
    spec = dict(task="digits", arm=pair[0], lr=0.1, agr="agr" in pair[1], weight_decay=0.1 * ("lp" in pair[1]))
    spec |= dict(decay_p=0.8, seed=seed, epochs=1, batch_size=64, target=study.target)
    epoch = Epoch(steps=17, train_loss=0.1, validation_loss=0.1, validation_accuracy=accuracy or 0, p=None)
    return RunRecord.model_validate(
        dict(
            id=f"{pair}{seed}",
            spec=spec,
            epochs=[epoch] if accuracy is not None else [],
            diverged=accuracy is None,
            test_loss=None if accuracy is None else 0.1,
            test_accuracy=accuracy,
            zero_fraction=None if accuracy is None else 0.0,
            steps_to_target=None,
            state_bytes=0,
            ms_per_step=1.0,
            seconds=1.0,
        )
    )


def point(weight_decay: float, zeros: float, test: float, validation: float, half: float = 0.002) -> SparsityPoint:
    return SparsityPoint(
        weight_decay,
        Interval(zeros, 0.01),
        Interval(0.97 + test, 0.003),
        Difference(Interval(test, half), 0.01),
        Difference(Interval(validation, half), 0.01),
    )


def made_up(means: dict[Pair, float | None], points: tuple[SparsityPoint, ...] = ()) -> Results:
    """Results in which every pair scatters around its mean in its own way; None diverges."""
    rows = []
    for k, (pair, mean) in enumerate(means.items()):
        runs = [
            record(pair, QUICK, seed, None if mean is None else mean + 0.001 * math.sin(seed * (k + 1)))
            for seed in QUICK.final_seeds
        ]
        rows.append(Row(*pair, Choice(0.1, {0.01: 1.0, 0.1: 0.5, 1.0: math.inf}), runs))
    return Results(QUICK, [], rows, 0.01, list(points), [], 1.0)


def words(results: Results) -> dict[str, str]:
    """The findings, with plain spaces: where a line may not be broken has a test of its own."""
    return {finding.title: plain(finding.text) for finding in findings(results)}


def plain(text: str) -> str:
    return text.replace(NBSP, " ")


def test_words_on_arms_follow_the_data():
    pairs: dict[Pair, float | None] = {("SGD", "none"): 0.95, ("Signum", "none"): 0.97, ("LPSGD", "none"): 0.91}
    text = words(made_up(pairs))["Other optimizers against SGD, without regularizers"]
    assert "Better at the 5 % level: Signum, +2" in text
    assert "Worse at the 5 % level: LPSGD, −4" in text
    assert "by Signum; the lowest is 91.0 %" in words(made_up(pairs))["The best"]

    swapped = made_up(pairs | {("Signum", "none"): 0.91, ("LPSGD", "none"): 0.97})
    text = words(swapped)["Other optimizers against SGD, without regularizers"]
    assert "Better at the 5 % level: LPSGD" in text
    assert "Worse at the 5 % level: Signum" in text

    level = made_up(dict.fromkeys(pairs, 0.95))
    text = words(level)["Other optimizers against SGD, without regularizers"]
    assert "None of the 2 can be told apart from SGD (" in text
    assert "at the 5 % level" not in text


def test_words_on_regularizers_and_annealing_follow_the_data():
    means: dict[Pair, float | None] = {("LPSGDM", "none"): 0.95, ("LPSGDM", "agr"): 0.98}
    means |= {("LPSGDM-constant", "none"): 0.90, ("LPSGDM-matched", "none"): 0.95}
    text = words(made_up(means))
    assert "Better at the 5 % level: LPSGDM + AGR" in text["Regularizers against the same optimizer without"]
    annealing = text["What annealing p does"]
    assert re.search(r"minus LPSGDM-constant: \+\d\.\d\d points [^;]*a difference that stands", annealing)
    assert re.search(r"minus LPSGDM-matched: [^;]*not significant", annealing)


def test_diverged_runs_are_named_and_compared_with_nothing():
    means: dict[Pair, float | None] = {("SGD", "none"): 0.95, ("Signum", "none"): None}
    results = made_up(means)
    text = words(results)
    assert "final runs that did: Signum (5 of 5)" in text["How far to trust this"]
    assert "2 tuning runs diverged" in text["How far to trust this"]
    assert text["Other optimizers against SGD, without regularizers"] == "There is nothing to compare."
    nowhere = words(made_up({("SGD", "none"): None}))
    assert nowhere["The best"].startswith("Each of 1 pair")


def test_words_on_divergence():
    sound = made_up({("SGD", "none"): 0.95})
    row = dataclasses.replace(sound.rows[0], choice=Choice(0.1, {0.01: 1.0, 0.1: 0.5, 1.0: 0.7}))
    none = dataclasses.replace(sound, rows=[row])
    assert words(none)["How far to trust this"].endswith(" No run diverged.")
    assert words(sound)["How far to trust this"].endswith(" 1 tuning run diverged, and no final run.")
    swept = dataclasses.replace(none, sparsity_diverged=[0.2])
    assert words(swept)["How far to trust this"].endswith(" No tuning run diverged, and no final run.")


def test_p_is_the_norms_and_never_a_significance(results):
    means = {("LPSGDM", "none"): 0.95, ("LPSGDM-constant", "none"): 0.90, ("LPSGDM-matched", "none"): 0.95}
    for finding in [*words(results).values(), *words(made_up(means)).values()]:
        assert not re.search(r"p [=<](?! 0\.8\))|p-value", finding)
    text = words(made_up(means))["What annealing p does"]
    assert re.search(r"stands \(P-value < 0.001\).*significant \(P-value \d\.\d{3}\)", text)


def test_numbers_stay_with_their_units(results, written):
    texts = [finding.text for finding in findings(results)] + (written / "summary.md").read_text("utf-8").splitlines()
    for text in texts:
        assert not re.search(r"\d (%|±|points?\b)|± \d|[λp] =|= \d", text), text
    for column in columns(results)[2:]:
        assert all(" " not in column.cell(row) for row in results.rows)


def test_regularizers_have_one_name_everywhere_and_it_is_explained_above_the_table(written, results):
    html = Reader((written / "report.html").read_text(encoding="utf-8").replace(get_plotlyjs(), ""))
    markdown = (written / "summary.md").read_text(encoding="utf-8")
    hover = " ".join(str(trace.hovertemplate) for figure in figures(results) for trace in figure.figure.data)
    captions = " ".join(figure.caption for figure in figures(results))
    for text in (" ".join(html.words), markdown, hover, captions):
        assert "AGR + ℓp" in text
        assert not re.search(r"\bagr\b|\blp\b", text)
    for text in (" ".join(html.words), markdown):
        assert text.index("AGR is adaptive gradient regularization") < text.index("optimizer", text.index("AGR is"))


def signs(agr: float) -> Results:
    results = made_up({("SignSGD", "none"): 0.95, ("SignSGD", "lp"): 0.94})
    shown = [(row, regularizer) for row, regularizer in zip(results.rows, ("agr", "agr+lp"), strict=True)]
    changed = [
        dataclasses.replace(
            row,
            regularizer=regularizer,
            runs=[run.model_copy(update={"test_loss": agr, "ms_per_step": 2.0}) for run in row.runs],
        )
        for row, regularizer in shown
    ]
    return dataclasses.replace(results, rows=results.rows + changed)


def test_equal_rows_of_a_sign_step_are_explained_if_they_are_equal(tmp_path):
    equal, unequal = signs(agr=0.1), signs(agr=0.2)
    (note,) = notes(equal)  # nothing at an edge
    assert "SignSGD with AGR equal those without" in note
    assert notes(unequal) == []
    report.write(equal, tmp_path)
    for name in ("report.html", "summary.md"):
        text = (tmp_path / name).read_text(encoding="utf-8")
        assert "SignSGD with AGR equal those without" in text
    other = [dataclasses.replace(row, arm="Signum") for row in equal.rows]
    assert notes(dataclasses.replace(equal, rows=other)) == []


@pytest.mark.parametrize(("width", "shown"), [(80, 6), (139, 6), (140, 9), (200, 9)])
def test_the_terminal_shows_what_fits_whole(width, shown):
    results = made_up({("LPSGDM-constant", "agr+lp"): 0.95, ("LPSGDM-matched", "lp"): None})
    results = dataclasses.replace(
        results, rows=[dataclasses.replace(row, choice=Choice(0.0003, {0.0003: 1.0, 1.0: 2.0})) for row in results.rows]
    )
    table = terminal(results, width)
    assert len(table.columns) == shown
    console = Console(width=width, file=io.StringIO())
    console.print(table)
    text = console.file.getvalue()
    for row in results.rows:
        line = next(line for line in text.splitlines() if row.arm in line)
        assert all(column.cell(row) in line for column in columns(results) if width >= column.least)


def test_curves_that_leave_the_axis_are_said_to():
    def caption(accuracy: float) -> str:
        return plain(next(f.caption for f in figures(made_up({("SGD", "none"): accuracy})) if f.name == "accuracy"))

    assert "The axis starts at 80 %" in caption(0.75)
    assert "axis" not in caption(0.85)


def test_the_axis_of_accuracies_far_from_1_fits_them():
    results = made_up({("SGD", "none"): 0.3, ("Signum", "none"): 0.4})
    low_target = dataclasses.replace(results, study=QUICK.model_copy(update={"target": 0.35}))
    figure = next(f for f in figures(low_target) if f.name == "accuracy")
    low, high = figure.figure.layout.yaxis.range
    assert 25 < low < 30 < 40 < high < 45
    assert "axis" not in figure.caption


def test_words_at_the_edge_of_the_grid():
    results = made_up({("SGD", "none"): 0.95})
    assert "inside its grid" in words(results)["How far to trust this"]
    edge = dataclasses.replace(results.rows[0], choice=Choice(0.01, {0.01: 0.2, 0.1: 0.5}))
    text = words(dataclasses.replace(results, rows=[edge]))["How far to trust this"]
    assert "edge of the grid" in text
    assert "SGD (0.01)" in text


def asked(*points: SparsityPoint) -> str:
    return plain(sparsity_words(made_up({}, points), ASKED))


def test_words_on_sparsity_follow_the_data():
    good = point(0.1, zeros=0.8, test=-0.003, validation=-0.002)
    text = asked(point(0.01, 0.2, 0.0, 0.0), good, point(0.2, 0.9, -0.03, -0.04))
    assert "It does at λ = 0.1." in text
    assert "gives λ = 0.1: 80.0 % ± 1.0 exact zeros" in text
    assert "−0.30 points (95 % interval −0.50 to −0.10)" in text
    assert "the whole interval lies within" in text

    wide = asked(dataclasses.replace(good, test_difference=point(1, 0, -0.009, 0).test_difference))
    assert "does not rule out a loss of more than 1 point" in wide

    none = asked(point(0.1, 0.7, 0.0, 0.0), point(0.2, 0.9, -0.011, -0.011))
    assert "It does not at any λ tried." in none
    assert "gives λ = 0.1: 70.0 %" in none

    lost = asked(point(0.2, 0.9, -0.5, -0.5))
    assert "At no λ does the validation accuracy stay" in lost


def test_the_choice_of_lambda_does_not_look_at_test_data():
    lucky = point(0.2, zeros=0.9, test=0.0, validation=-0.02)
    fair = point(0.1, zeros=0.8, test=-0.02, validation=0.0)
    results = made_up({}, (lucky, fair))
    assert met(ASKED, lucky)
    assert chosen(results, ASKED) is fair


def test_an_unfinished_study_has_no_report(tmp_path, finished):
    kept = (finished / "runs.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:-1]
    (tmp_path / "runs.jsonl").write_text("".join(kept), encoding="utf-8")
    with pytest.raises(UnfitStore, match=r"25 of 26 runs: finish the study with"):
        collect(Store(tmp_path))
    with pytest.raises(UnfitStore, match="holds no study"):
        collect(Store(tmp_path / "nowhere"))


def test_the_report_is_made_again_from_the_store(finished, tmp_path):
    (tmp_path / "runs.jsonl").write_bytes((finished / "runs.jsonl").read_bytes())
    command = [sys.executable, "-m", "benchmarks", "report", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert (tmp_path / "report.html").exists()
    assert "Sparsity." in done.stdout
    assert done.stdout.splitlines()[-1] == f"The report: {(tmp_path / 'report.html').as_uri()}"
    assert str(tmp_path / "summary.md") in done.stdout


@pytest.mark.parametrize("package", ["plotly", "sklearn"])
def test_a_missing_extra_is_named_with_what_to_install(package):
    code = (
        "import importlib.util as u; find = u.find_spec\n"
        f"u.find_spec = lambda name, *rest: None if name == {package!r} else find(name, *rest)\n"
        "import benchmarks"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert f"need {package}" in done.stderr
    assert 'pip install "normopt[bench]"' in done.stderr
