"""The summary, the tables and the settings as Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.report import tables
from benchmarks.report.finding import Finding
from benchmarks.report.layers import WORDS, layers
from benchmarks.report.protocol import command, protocol, settings
from benchmarks.results import Results


def text(results: Results, summary: Sequence[Finding]) -> str:
    """Everything that is no figure."""
    made = command(results)
    parts = [f"# Ablation: {results.study.name}", results.study.purpose, *([f"Made by `{made}`."] if made else [])]
    parts.append("\n".join(f"- **{finding.title}.** {finding.text}" for finding in summary if not finding.task))
    over = tables.standings(results)
    if over:
        parts += ["## Over all tasks", over.markdown, tables.STANDINGS]
    for task in results.tasks.values():
        parts += [f"## {task.name}", *(finding.text for finding in summary if finding.task == task.name)]
        parts += [tables.grid(tables.columns(task), task.rows).markdown, *tables.notes(task)]
        pairs = tables.differences(task)
        parts += [pairs.markdown] if pairs.rows else []
    for i, (title, table) in enumerate(layers(results).items()):
        parts += ["## Which layer has which norm", WORDS] if i == 0 else []
        parts.append(f"<details><summary>{title}</summary>\n\n```text\n{table}\n```\n\n</details>")
    parts += ["## How it was done", _items(settings(results)), "## How others do it", _items(protocol(results))]
    return "\n\n".join(parts) + "\n"


def _items(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)
