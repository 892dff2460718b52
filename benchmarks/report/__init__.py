"""The report of a study: in words, in tables, in figures, and how it was done; as HTML, Markdown and CSV."""

from __future__ import annotations

from pathlib import Path

from benchmarks.report import claims, data, markdown, page
from benchmarks.report.comparison import compare
from benchmarks.report.words import findings
from benchmarks.results import Results


def write(results: Results, folder: Path) -> Path:
    """Write report.html, its twins summary.md and summary.csv, and the figures' data; where the report is."""
    summary, rows = findings(results), data.tables(results)
    if compared := claims.rows(results):
        rows["claims"] = compared
    (folder / "data").mkdir(parents=True, exist_ok=True)
    for name, table in rows.items():
        (folder / "data" / f"{name}.csv").write_text(data.csv_text(table), encoding="utf-8")
    (folder / "summary.csv").write_text(data.csv_text(rows["scores"]), encoding="utf-8")
    (folder / "summary.md").write_text(markdown.text(results, summary), encoding="utf-8")
    report = folder / "report.html"
    report.write_text(page.html(results, summary, rows), encoding="utf-8")
    return report


__all__ = ["compare", "write"]
