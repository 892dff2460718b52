"""The report of a finished study: in words, as a table, in figures, the norms of layers, and how it was done."""

from __future__ import annotations

from pathlib import Path

from benchmarks.report import tables
from benchmarks.report.page import page
from benchmarks.report.settings import settings
from benchmarks.report.words import findings
from benchmarks.results import Results


def write(results: Results, folder: Path) -> Path:
    """Write report.html, summary.md and summary.csv into the folder; where the report is."""
    summary, done = findings(results), settings(results)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "summary.csv").write_text(tables.csv_text(results), encoding="utf-8")
    (folder / "summary.md").write_text(tables.markdown(results, summary, done), encoding="utf-8")
    report = folder / "report.html"
    report.write_text(page(results, summary, done), encoding="utf-8")
    return report


__all__ = ["write"]
