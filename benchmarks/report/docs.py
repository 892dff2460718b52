"""The page of the docs that shows a study's results: Markdown and figures, every claim computed from the results."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.report import tables
from benchmarks.report.claims import claims
from benchmarks.report.pictures import pictures
from benchmarks.report.protocol import command, protocol, settings
from benchmarks.report.text import counted
from benchmarks.report.words import findings
from benchmarks.results import Results

PICTURES = {
    "profiles": (
        "Performance profiles",
        "The part of the problems, a task and a seed each, that an arm solves within a factor of the fastest arm's "
        "steps to the target; in brackets the area under the line. Higher is better.",
    ),
    "differences": (
        "Paired differences",
        "Each arm minus the one it is held against, in test score, paired by seed: means and 95\u00a0% intervals, "
        "which are not corrected. Filled dots are told apart at the 5\u00a0% level after Holm's correction over the "
        "task's comparisons.",
    ),
    "trials": (
        "Sensitivity to the learning rate",
        "Validation loss of every setting that tuning tried, against its learning rate; the dots were chosen. Trials "
        "that diverged are left out.",
    ),
    "zeros": (
        "Score against exact zeros",
        "Test score against the part of the weights that is exactly zero, means and 95\u00a0% intervals, of arms that "
        "make any and of those they are held against.",
    ),
}


def write(results: Results, path: Path) -> Path:
    """Write the page, and its pictures into the folder ``assets`` beside it; where the page is."""
    assets = path.parent / "assets"
    assets.mkdir(parents=True, exist_ok=True)
    addresses = {}
    for name, svg in pictures(results).items():
        (assets / f"results-{name}.svg").write_text(svg, encoding="utf-8")
        addresses[name] = f"assets/results-{name}.svg"
    stored = path.parent / "data" / f"{results.study.name}.parquet"
    address = stored.relative_to(path.parent).as_posix() if stored.exists() else None
    path.write_text(page(results, addresses, address), encoding="utf-8")
    return path


def page(results: Results, addresses: Mapping[str, str], stored: str | None = None) -> str:
    """The page as Markdown, with the pictures at these addresses, and the stored runs at theirs."""
    study, made = results.study, command(results)
    found = findings(results)
    by_paper = [finding.title for finding in claims(results)]
    runs = f"[the stored runs]({stored})" if stored else "the stored runs"
    # The build of the site puts it beside the page.
    whole = " The [whole report](results-report.html) of these runs can be zoomed and asked." if stored else ""
    parts = [
        "# Results",
        f"{study.purpose} {counted(len(study.arms), 'arm')} on {counted(len(study.tasks), 'task')} that a CPU trains "
        "in seconds, each tuned with the same budget and run again on fresh seeds"
        + (f": the study that `{made}` makes." if made else ".")
        + f" This page is written by the program from {runs}: no number or verdict on it is typed.{whole}",
        *(f"**{f.title}.** {f.text}" for f in found if f.title not in by_paper and not f.task),
    ]
    over = tables.standings(results)
    if over:
        parts += ["## Over all tasks", *_picture(addresses, "profiles"), over.markdown, tables.STANDINGS]
    if by_paper:
        parts += ["## Beside the papers", "The papers' experiments are larger; what follows is what these tasks say."]
        parts += [text for f in found if f.title in by_paper for text in (f"### {f.title}", f.text)]
        parts += _picture(addresses, "zeros")
    parts += ["## Task by task", *_picture(addresses, "differences")]
    for task in results.tasks.values():
        parts += [
            f"### {task.name}",
            *(f.text for f in found if f.task == task.name),
            tables.grid(tables.columns(task), task.rows).markdown,
        ]
        parts += tables.notes(task)
    if "trials" in addresses:
        parts += ["## Sensitivity to the learning rate", *_picture(addresses, "trials")]
    parts += ["## How it was done", *_items(settings(results)), "## How others do it", *_items(protocol(results))]
    return "\n\n".join(map(_filled, parts)) + "\n"


def _picture(addresses: Mapping[str, str], name: str) -> list[str]:
    if name not in addresses:
        return []
    title, caption = PICTURES[name]
    return [f"![{title}]({addresses[name]})", f"*{caption}*"]


def _items(lines: Sequence[str]) -> list[str]:
    return [f"- {line}" for line in lines]


def _filled(part: str) -> str:
    """Paragraphs and points in lines of 120 characters, so that what changes can be seen; tables as they are."""
    if part.startswith(("|", "#", "![")):
        return part
    indent = "  " if part.startswith("- ") else ""
    return textwrap.fill(part, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
