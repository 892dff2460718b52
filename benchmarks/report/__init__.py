"""The report of a study: one page of HTML that opens with the answer, the same as Markdown, and all numbers as CSV."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.report import data, forest, tables
from benchmarks.report.comparison import compare
from benchmarks.report.layers import WORDS, layers
from benchmarks.report.text import filled, share
from benchmarks.report.words import ENGINE, command, findings, settings
from benchmarks.results import Results
from benchmarks.stats import LEVEL

LEGEND = (
    f"Dots are estimates and lines their {share(LEVEL)} intervals, not corrected for their number. Filled dots are "
    "significant, hollow ones are ties: over all tasks, where the interval leaves out 50\u00a0%; on a task, by "
    "Holm's P-value. The grey band is the noise floor: by chance, 95\u00a0% of differences of two equal arms lie in it."
)
OPENING = ("Not finished", "Answer")


def write(results: Results, folder: Path) -> Path:
    """Write report.html, its twins summary.md and summary.csv, and the tables in data; where the report is."""
    rows = data.tables(results)
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for name, table in rows.items():
        (folder / "data" / f"{name}.csv").write_text(data.csv_text(table), encoding="utf-8")
    (folder / "summary.csv").write_text(data.csv_text(rows["scores"]), encoding="utf-8")
    view = _view(results)
    markdown = ENGINE.get_template("report.md.j2").render(**view, heading=f"Ablation: {results.study.name}", stored="")
    (folder / "summary.md").write_text(markdown, encoding="utf-8")
    report = folder / "report.html"
    report.write_text(_html(results, view, beside=True), encoding="utf-8")
    return report


def html(results: Results) -> str:
    """The report as HTML, without files beside it."""
    return _html(results, _view(results), beside=False)


def _html(results: Results, view: dict[str, Any], beside: bool) -> str:
    title = f"normopt: ablation “{results.study.name}”"
    return ENGINE.get_template("report.html.j2").render(**view, title=title, beside=beside)


def write_page(results: Results, path: Path) -> Path:
    """Write the page of the docs that shows a study; where it is."""
    stored = f"data/{results.study.name}.parquet"
    text = ENGINE.get_template("report.md.j2").render(**_view(results), heading="Results", stored=stored)
    path.write_text("\n".join(map(filled, text.splitlines())) + "\n", encoding="utf-8")
    return path


def _view(results: Results) -> dict[str, Any]:
    found = findings(results)
    said = {finding.task: finding.text for finding in found if finding.task}
    tasks = []
    for task in results.tasks.values():
        drawn = [
            forest.on_task(task, answer.question.title, mine, task.comparisons)
            for answer in results.answers
            if (mine := [c for c in answer.comparisons if c.row.task == task.name])
        ]
        shown = {"forests": drawn, "grid": tables.grid(task), "notes": tables.notes(task)}
        tasks.append({"name": task.name, "text": said[task.name], **shown})
    alone = tasks[0]["forests"] if len(tasks) == 1 else []
    if alone:
        tasks[0]["forests"] = []
    return {
        "study": results.study,
        "made": command(results),
        "opening": [finding for finding in found if finding.title in OPENING],
        "more": [finding for finding in found if finding.title not in OPENING and not finding.task],
        "forests": alone or [forest.over_tasks(results, answer) for answer in results.answers if results.standings],
        "legend": LEGEND,
        "standings": tables.standings(results),
        "about_standings": tables.STANDINGS,
        "tasks": tasks,
        "layers": layers(results),
        "about_layers": WORDS,
        "settings": settings(results),
    }


__all__ = ["compare", "findings", "html", "write", "write_page"]
