"""The pictures: how long steps take, and how that grows. They read on white and on near-black."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from itertools import groupby
from statistics import median
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from benchmarks.speed.records import Case, Results, ratio

GREY = "#808894"
COLOURS = {
    "for-loop": "#c9a100",
    "foreach": "#e8743b",
    "fused": "#3b82f6",
    "compiled": "#b05ce6",
    "default": "#1f9d6c",
}
OTHERS = ["#d6457a", "#06a5c4", "#8a6d3b"]
STYLE: Any = {
    "axes.edgecolor": GREY,
    "axes.facecolor": "none",
    "axes.labelcolor": GREY,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "figure.facecolor": "none",
    "font.size": 9,
    "legend.frameon": False,
    "legend.labelcolor": GREY,
    "savefig.facecolor": "none",
    "svg.fonttype": "path",  # no font has to be found where the picture is seen
    "svg.hashsalt": "normopt",  # the same picture gives the same file
    "text.color": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
}
TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)
CLOSE = (0.5, 0.75, 1, 1.25, 1.5, 2, 2.5, 3, 4, 5)  # where all is within a factor of five


def pictures(results: Results) -> dict[str, str]:
    """A picture for each model beside its limit, and for each sweep, as SVG text under its name."""
    drawn = {}
    by_model = groupby((c for c in results.cases if c.part == "limits"), key=lambda c: c.model)
    by_sweep = groupby((c for c in results.cases if c.part == "growth"), key=lambda c: c.group)
    with rc_context(STYLE):
        for model, cases in by_model:
            drawn[model] = _svg(_compared(list(cases)))
        for sweep, cases in by_sweep:
            drawn[f"by-{sweep}"] = _svg(_grown(sweep, list(cases)))
    return drawn


def _compared(cases: Sequence[Case]) -> Figure:
    """A panel for each case: a row for each optimizer, a dot for each backend, its interval as a line."""
    optimizers = list(dict.fromkeys(e.optimizer for case in cases for e in case.entries if e is not case.reference))
    backends = list(dict.fromkeys(e.backend for case in cases for e in case.entries if e is not case.reference))
    across = min(len(cases), 2)
    down = -(-len(cases) // across)
    figure = Figure(figsize=(9, down * (0.9 + 0.23 * len(optimizers)) + 0.3), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False, sharex=True, sharey=True).ravel()
    for ax, case in zip(axes, cases, strict=False):
        _panel(ax, case, optimizers, backends)
    for ax in axes[len(cases) :]:
        ax.set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels))
    return figure


def _panel(ax: Axes, case: Case, optimizers: Sequence[str], backends: Sequence[str]) -> None:
    for backend in backends:
        entries = [e for e in case.entries if e.backend == backend and e is not case.reference]
        ratios = [ratio(e, case.reference) for e in entries]
        rows = [optimizers.index(e.optimizer) for e in entries]
        colour = _colour(backend, backends)
        for r, row in zip(ratios, rows, strict=True):
            if r.interval:
                ax.plot(r.interval, (row, row), color=colour, lw=1.5, alpha=0.7)
        ax.plot([r.median for r in ratios], rows, "o", color=colour, ms=4.5, label=backend)
    ax.axvline(1, color=GREY, lw=1, ls=(0, (4, 3)))
    ax.set_xscale("log")
    low, high = ax.get_xlim()
    ticks = [t for t in (CLOSE if high < 5 * low else TICKS) if low <= t <= high]
    ax.set_xticks(ticks, [f"{t:g}" for t in ticks])
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.grid(axis="x", color=GREY, alpha=0.25, lw=0.6)
    ax.set_yticks(range(len(optimizers)), optimizers)
    ax.set_ylim(len(optimizers) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)
    ax.set_title(case.title, loc="left")
    ax.set_xlabel(f"× {case.reference.optimizer}")


def _grown(sweep: str, cases: Sequence[Case]) -> Figure:
    """The cost of a step against what grows, "tensors" or "parameters": a line for each candidate, by threads."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    threads = sorted({case.threads for case in cases})
    axes = figure.subplots(1, len(threads), squeeze=False, sharey=True).ravel()
    for ax, n in zip(axes, threads, strict=True):
        mine = [case for case in cases if case.threads == n]
        names = list(dict.fromkeys((e.optimizer, e.backend) for case in mine for e in case.entries))
        for (optimizer, backend), colour in zip(names, [*COLOURS.values(), *OTHERS], strict=False):
            points = [(getattr(case, sweep), case.entry(optimizer, backend)) for case in mine]
            known = [(x, 1000 * median(e.seconds)) for x, e in points if e is not None]
            ax.plot(*zip(*known, strict=True), "o-", color=colour, ms=3.5, lw=1.3, label=optimizer)
        ax.set(xscale="log", yscale="log", xlabel=sweep, ylabel="ms per step" if ax is axes[0] else "")
        ax.set_title(mine[0].title.partition(", ")[2], loc="left")
        ax.grid(color=GREY, alpha=0.25, lw=0.6)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=1)
    return figure


def _colour(backend: str, backends: Sequence[str]) -> str:
    unknown = [b for b in backends if b not in COLOURS]
    return COLOURS[backend] if backend in COLOURS else OTHERS[unknown.index(backend) % len(OTHERS)]


def _svg(figure: Figure) -> str:
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return re.sub(r"[ \t]+$", "", out.getvalue(), flags=re.MULTILINE)
