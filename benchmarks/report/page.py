"""The page: one file of HTML with everything in it, plotly.js too, that needs no network."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from string import Template

from plotly.offline import get_plotlyjs

from benchmarks.report import tables
from benchmarks.report.data import Rows, csv_text
from benchmarks.report.figures import Figure, figures, style
from benchmarks.report.finding import Finding
from benchmarks.report.layers import WORDS, layers
from benchmarks.report.protocol import command, protocol, settings
from benchmarks.report.text import counted, share
from benchmarks.results import Results, TaskResults
from benchmarks.stats import LEVEL

TEMPLATE = Path(__file__).with_name("page.html")


def html(results: Results, summary: Sequence[Finding], rows: Mapping[str, Rows]) -> str:
    """The whole report as HTML, with the rows of every figure inside."""
    study = results.study
    drawn = figures(results)
    files = {name: link(name, table) for name, table in rows.items()}
    lead = (
        f"{study.purpose} {counted(len(study.arms), 'arm')} on {counted(len(study.tasks), 'task')}, each tuned with "
        "the same budget, over the same seeds."
    )
    made = command(results)
    title = f"normopt: ablation “{study.name}”"
    body = [
        f'<header><h1>{escape(title)}</h1>\n<p class="lead">{escape(lead)}</p>',
        f'<p class="note">Made by <code>{escape(made)}</code></p>' if made else "",
        "</header>\n<main>",
        f"<h2>In words</h2>\n{said([f for f in summary if not f.task])}",
        _standings(results),
        "<h2>Task by task</h2>",
        chooser(list(results.tasks)),
        *(_task(task, [f for f in summary if f.task == task.name]) for task in results.tasks.values()),
        '<h2>Figures</h2>\n<div class="figures">',
        *(figure_html(figure, files, legend(results)) for figure in drawn),
        "</div>",
        _layers(layers(results)),
        f"<h2>How it was done</h2>\n{items(settings(results))}",
        f"<h2>How others do it</h2>\n{items(protocol(results))}",
        '<h2>All data</h2>\n<p class="note">Comma-separated values; those of a figure are linked under it as well.</p>',
        f"<ul>{''.join(f'<li>{address}</li>' for address in files.values())}</ul>",
        "</main>",
    ]
    return document(title, [part for part in body if part], drawn)


def document(title: str, body: Sequence[str], drawn: Sequence[Figure]) -> str:
    """A page of these parts, with the means to draw the figures that they have places for."""
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=escape(title), body="\n".join(body), plotly=get_plotlyjs(), data=_data(drawn)
    )


def said(summary: Sequence[Finding]) -> str:
    """Findings as boxes."""
    boxes = "\n".join(f"<section><h3>{escape(f.title)}</h3><p>{_text(f.text)}</p></section>" for f in summary)
    return f'<div class="findings">{boxes}</div>'


def _text(text: str) -> str:
    """A P-value is not broken at its hyphen."""
    return escape(text).replace("P-value", "<span>P-value</span>")


def chooser(tasks: Sequence[str]) -> str:
    """The box that chooses the task of tables and figures; hidden where there is but one."""
    options = "".join(f"<option>{escape(name)}</option>" for name in tasks)
    return f'<nav{" hidden" if len(tasks) == 1 else ""}><label>Task <select id="task">{options}</select></label></nav>'


def items(lines: Sequence[str]) -> str:
    """A list of points."""
    return "<ul>\n" + "\n".join(f"<li>{escape(line)}</li>" for line in lines) + "\n</ul>"


def table(grid: tables.Grid) -> str:
    """A table as HTML, which scrolls sideways where it is too wide."""

    def line(tag: str, cells: Sequence[str]) -> str:
        marked = zip(cells, grid.left, strict=True)
        inner = "".join(f"<{tag}{_place(left)}>{escape(cell)}</{tag}>" for cell, left in marked)
        return f"<tr>{inner}</tr>"

    body = "\n".join(line("td", row) for row in grid.rows)
    return f'<div class="scroll"><table><thead>{line("th", grid.titles)}</thead>\n<tbody>{body}</tbody></table></div>'


def _place(left: bool) -> str:
    return ' class="left"' if left else ""


def _standings(results: Results) -> str:
    grid = tables.standings(results)
    if grid is None:
        return ""
    return f'<h2>Over all tasks</h2>\n{table(grid)}\n<p class="note">{escape(tables.STANDINGS)}</p>'


def _task(task: TaskResults, summary: Sequence[Finding]) -> str:
    intervals = f"Means over the seeds, with {share(LEVEL)} intervals."
    notes = "\n".join(f'<p class="note">{escape(line)}</p>' for line in (intervals, *tables.notes(task)))
    pairs = tables.differences(task)
    more = f"<details><summary>Paired differences</summary>{table(pairs)}</details>" if pairs.rows else ""
    grid = tables.grid(tables.columns(task), task.rows)
    return (
        f'<section class="task" data-task="{escape(task.name)}">{said(summary)}\n{table(grid)}\n{notes}{more}</section>'
    )


def _layers(shown: Mapping[str, str]) -> str:
    """The section on the norms of layers, where optimizers have a preset."""
    if not shown:
        return ""
    parts = (
        f'<details><summary>{escape(title)}</summary><pre class="scroll">{escape(text)}</pre></details>'
        for title, text in shown.items()
    )
    return "\n".join([f'<h2>Which layer has which norm</h2><p class="note">{escape(WORDS)}</p>', *parts])


def legend(results: Results) -> str:
    """The arms with their colours; a click on one hides it in all figures, and shows it again."""
    dashes = {"solid": "", "dash": "6 3", "dot": "2 3", "dashdot": "6 3 2 3"}
    buttons = []
    for arm in results.study.arms:
        colour, dash = style(results, arm.name)
        line = f'<line x2="26" y1="4" y2="4" stroke="{colour}" stroke-width="2.5" stroke-dasharray="{dashes[dash]}"/>'
        name = escape(arm.name)
        buttons.append(f'<button data-arm="{name}" aria-pressed="true"><svg>{line}</svg>{name}</button>')
    return f'<div class="legend">{"".join(buttons)}</div>'


def figure_html(figure: Figure, files: Mapping[str, str], legend: str = "") -> str:
    """A figure's place, with its caption and its data."""
    source = "scores" if figure.name == "costs" else figure.name
    return (
        f'<figure><h3>{escape(figure.title)}</h3><div id="figure-{figure.name}"></div>'
        f"{legend if figure.by_colour else ''}"
        f"<figcaption>{escape(figure.caption)} Data: {files[source]}</figcaption></figure>"
    )


def link(name: str, rows: Rows) -> str:
    """Rows as a file that can be saved, whole inside its address."""
    coded = base64.b64encode(csv_text(rows).encode()).decode()
    return f'<a download="{name}.csv" href="data:text/csv;charset=utf-8;base64,{coded}">{name}.csv</a>'


def _data(drawn: Sequence[Figure]) -> str:
    inner = ",".join(
        f'"{figure.name}":{{' + ",".join(f'"{task}":{plot.to_json()}' for task, plot in figure.panels.items()) + "}"
        for figure in drawn
    )
    # "</" would end the script element that holds the data.
    return "{" + inner.replace("</", "<\\/") + "}"
