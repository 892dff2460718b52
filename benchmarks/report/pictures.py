"""The figures of the docs: SVG that reads on white and on near-black."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from benchmarks.report import data
from benchmarks.report.data import Rows
from benchmarks.report.figures import style, together
from benchmarks.report.text import NBSP, unit
from benchmarks.results import Results, TaskResults
from benchmarks.speed.plot import GREY, STYLE
from benchmarks.stats import WITHIN

ACROSS = 3  # plots side by side
LINES: Mapping[str, Any] = {"solid": "-", "dash": (0, (5, 2)), "dot": (0, (1, 1.5)), "dashdot": (0, (5, 1.5, 1, 1.5))}


def pictures(results: Results) -> dict[str, str]:
    """Every picture that the results have data for, as SVG text under its name."""
    rows = data.tables(results)
    drawn = {}
    with rc_context(STYLE):
        if results.standings:
            drawn["profiles"] = _svg(_profiles(results))
        for name, across, draw in (
            ("differences", 2, _differences),
            ("trials", ACROSS, _trials),
            ("zeros", ACROSS, _zeros),
        ):
            tasks = [task for task in results.tasks.values() if any(r["task"] == task.name for r in rows.get(name, ()))]
            if tasks:
                drawn[name] = _svg(_by_task(results, tasks, rows[name], across, draw))
    return drawn


def _profiles(results: Results) -> Figure:
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    ax = figure.subplots()
    # The legend in the order of the scores, which is about that of the lines.
    for s in sorted(results.standings, key=lambda s: -s.profile.area):
        corners = s.profile.steps
        colour, dash = style(results, s.arm)
        ax.step(
            [factor for factor, _ in corners],
            [100 * part for _, part in corners],
            where="post",
            color=colour,
            ls=LINES[dash],
            lw=1.6,
            label=f"{s.arm} ({s.profile.area:.2f})",
        )
    ax.set(xlim=(1, WITHIN), ylim=(0, 102), xlabel="steps to target, × the fastest arm's", ylabel="% of the problems")
    ax.grid(color=GREY, alpha=0.25, lw=0.6)
    figure.legend(loc="outside right center")
    return figure


Draw = Callable[[Results, TaskResults, Rows, Axes], None]


def _by_task(results: Results, tasks: Sequence[TaskResults], rows: Rows, across: int, draw: Draw) -> Figure:
    """A plot for each task, and one legend where plots do not name their arms themselves."""
    across = min(across, len(tasks))
    down = -(-len(tasks) // across)
    mine = {task.name: [row for row in rows if row["task"] == task.name] for task in tasks}
    named = draw is _differences
    height = 0.9 + 0.21 * max(map(len, mine.values())) if named else 2.7
    figure = Figure(figsize=(9, down * height + (0 if named else 0.9)), layout="constrained")
    axes = figure.subplots(down, across, squeeze=False, sharey=named).ravel()
    for ax, task in zip(axes, tasks, strict=False):
        draw(results, task, mine[task.name], ax)
        ax.set_title(task.name, loc="left")
        ax.grid(color=GREY, alpha=0.25, lw=0.6, axis="x" if named else "both")
    for ax in axes[len(tasks) :]:
        ax.set_visible(False)
    if not named:
        handles = {label: h for ax in axes for h, label in zip(*ax.get_legend_handles_labels(), strict=True)}
        figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=4)
    return figure


def _differences(results: Results, task: TaskResults, rows: Rows, ax: Axes) -> None:
    it = unit(task.task)
    # All tasks have the same lines, so that they can share the names.
    arms = [arm.name for arm in results.study.arms if results.study.against(arm.name)]
    for row in rows:
        colour, _ = style(results, row["arm"])
        y = arms.index(row["arm"])
        if not math.isnan(row["low"]):
            ax.plot((it.factor * row["low"], it.factor * row["high"]), (y, y), color=colour, lw=1.6)
        filled = colour if row["p_value_holm"] < data.ALPHA else "none"
        ax.plot(it.factor * row["difference"], y, "o", ms=5, mec=colour, mfc=filled)
    ax.axvline(0, color=GREY, lw=1)
    ax.set_yticks(range(len(arms)), [f"{arm} − {results.study.against(arm)}" for arm in arms])
    ax.set_ylim(len(arms) - 0.5, -0.5)
    ax.tick_params(axis="y", length=0)
    better = "→ better" if task.task.higher_is_better else "← better"
    ax.set_xlabel(f"{it.title}{', points' if it.factor != 1 else ''} ({better})")


def _trials(results: Results, task: TaskResults, rows: Rows, ax: Axes) -> None:
    known = [row for row in rows if row["validation_loss"] is not None and row.get("lr")]
    for arm in dict.fromkeys(row["arm"] for row in known):
        mine = sorted((row for row in known if row["arm"] == arm), key=lambda row: row["lr"])
        colour, dash = style(results, arm)
        xs, ys = [row["lr"] for row in mine], [row["validation_loss"] for row in mine]
        ax.plot(xs, ys, color=colour, ls=LINES[dash], lw=1, label=arm)
        chosen = [row for row in mine if row["chosen"]]
        ax.plot([r["lr"] for r in chosen], [r["validation_loss"] for r in chosen], "o", ms=4.5, color=colour)
    ax.set(xscale="log", yscale="log", xlabel="learning rate", ylabel="validation loss")
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.yaxis.set_minor_formatter(NullFormatter())
    losses = [row["validation_loss"] for row in known]
    if losses and max(losses) > 1e3 * min(losses):
        ax.set_ylim(min(losses) / 1.5, min(max(losses), 1e4 * sorted(losses)[len(losses) // 2]) * 1.5)


def _zeros(results: Results, task: TaskResults, rows: Rows, ax: Axes) -> None:
    it = unit(task.task)
    for name, colour, mine in together(results, rows):
        xs, ys = [100 * row["zeros"] for row in mine], [it.factor * row["test_score"] for row in mine]
        ax.plot(xs, ys, "o-", color=colour, ms=4.5, lw=0.8, label=name)
        for x, row in zip(xs, mine, strict=True):
            low, high = it.factor * row["test_score_low"], it.factor * row["test_score_high"]
            if not math.isnan(low):
                ax.plot((x, x), (low, high), color=colour, lw=1.2)
    ax.set(xlim=(-3, 103), xlabel="exact zeros, %", ylabel=f"test {it.title}{it.sign.replace(NBSP, ', ')}")


def _svg(figure: Figure) -> str:
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return re.sub(r"[ \t]+$", "", out.getvalue(), flags=re.MULTILINE)
