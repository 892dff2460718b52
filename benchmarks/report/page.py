"""The page: one file of HTML with everything in it, plotly.js too, that needs no network."""

from __future__ import annotations

from html import escape
from pathlib import Path
from string import Template

from plotly.offline import get_plotlyjs

from benchmarks.report.figures import Figure, figures
from benchmarks.report.layers import WORDS, layers
from benchmarks.report.settings import command, regularizers
from benchmarks.report.tables import Column, columns, notes
from benchmarks.report.text import LABELS, compared, counted, share
from benchmarks.report.words import Finding
from benchmarks.results import Results
from benchmarks.stats import LEVEL

TEMPLATE = Path(__file__).with_name("page.html")


def page(results: Results, summary: list[Finding], settings: list[str]) -> str:
    """The whole report as HTML."""
    drawn = figures(results)
    explained = f"{regularizers(results)} " if results.study.regularized else ""
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=escape(f"normopt: ablation “{results.study.preset}”"),
        lead=escape(
            f"{compared(results)} on {results.study.task}, the learning rate of each tuned with the same budget."
        ),
        command=escape(command(results)),
        findings="\n".join(f"<section><h3>{escape(f.title)}</h3><p>{escape(f.text)}</p></section>" for f in summary),
        regularizers=escape(explained),
        level=share(LEVEL),
        seeds=counted(len(results.study.final_seeds), "seed"),
        table=_table(results, columns(results)),
        notes="\n".join(f'<p class="note">{escape(note)}</p>' for note in notes(results)),
        choice=_choice(results),
        figures="\n".join(_figure(figure) for figure in drawn),
        layers=_layers(layers(results)),
        settings="\n".join(f"<li>{escape(line)}</li>" for line in settings),
        plotly=get_plotlyjs(),
        data=_data(drawn),
    )


def _table(results: Results, shown: list[Column]) -> str:
    def cell(tag: str, column: Column, text: str) -> str:
        place = ' class="left"' if column.left else ""
        return f"<{tag}{place}>{escape(text)}</{tag}>"

    lines = ["<thead><tr>" + "".join(cell("th", column, column.title) for column in shown) + "</tr></thead><tbody>"]
    before = ""
    for row in results.rows:
        first = "" if row.arm == before else ' class="first"'
        lines.append(f"<tr{first}>" + "".join(cell("td", column, column.cell(row)) for column in shown) + "</tr>")
        before = row.arm
    return "\n".join([*lines, "</tbody>"])


def _choice(results: Results) -> str:
    """The box that chooses a regularizer, where there is one to choose."""
    if not results.study.regularized:
        return ""
    worn = dict.fromkeys(regularizer for _, regularizer in results.study.pairs)
    options = "".join(f'<option value="{name}">{escape(LABELS[name])}</option>' for name in worn)
    return f'<label>Curves and learning rates with regularizer <select id="regularizer">{options}</select></label>'


def _layers(shown: dict[str, str]) -> str:
    """The section on the norms of layers, where optimizers have a preset."""
    if not shown:
        return ""
    tables = (f'<h3>{escape(arm)}</h3><pre class="scroll">{escape(table)}</pre>' for arm, table in shown.items())
    return "\n".join([f'<h2>Which layer has which norm</h2><p class="note">{escape(WORDS)}</p>', *tables])


def _figure(figure: Figure) -> str:
    whole = ' class="whole"' if figure.whole_width else ""
    return (
        f'<figure{whole}><h3>{escape(figure.title)}</h3><div id="figure-{figure.name}"></div>'
        f"<figcaption>{escape(figure.caption)}</figcaption></figure>"
    )


def _data(drawn: list[Figure]) -> str:
    inner = ",".join(f'"{figure.name}":{figure.figure.to_json()}' for figure in drawn)
    # "</" would end the script element that holds the data.
    return "{" + inner.replace("</", "<\\/") + "}"
