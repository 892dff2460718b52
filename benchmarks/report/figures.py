"""The figures, as plotly figures without colours of their own for paper and ink: the page gives them those."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from benchmarks.report import data
from benchmarks.report.data import Rows
from benchmarks.report.text import NBSP, counted, share, unit
from benchmarks.results import Results, TaskResults
from benchmarks.stats import LEVEL, WITHIN

# Told apart on white and on near-black, by most eyes; dashes tell those apart that share one.
COLOURS = ("#3b82f6", "#e8590c", "#2f9e44", "#d6336c", "#06a5c4", "#f2a20c", "#9c5fd6", "#8b93a1", "#8a6d3b")
DASHES = ("solid", "dash", "dot", "dashdot")
GREY = "#888"
EVERY = ""  # the key of a figure that is over all tasks
BAR = {"thickness": 1.5, "width": 0}  # caps would frame a dot of the interval's size, and it would look like a square


@dataclass(frozen=True)
class Figure:
    """A figure with its place in the page.

    Attributes:
        name: of its file of data, and of its place.
        title, caption: what it shows, in words.
        panels: a task → its plot, or, under the empty name, one over all tasks.
    """

    name: str
    title: str
    caption: str
    panels: Mapping[str, Any]

    @property
    def by_colour(self) -> bool:
        """It tells arms apart by the colours that they have everywhere, which need the page's legend."""
        return not any(plot.layout.meta for plot in self.panels.values())


def figures(results: Results) -> list[Figure]:
    """All figures that the results have data for, in their order."""
    seeds = counted(len(results.study.seeds), "seed")
    startup = results.study.tuning.startup
    per_task: list[tuple[str, str, str, Callable[[Results, TaskResults, Rows], Any]]] = [
        (
            "scores",
            "Final scores",
            f"Test scores of the final runs: a small dot for each seed, the mean over {seeds} and its {share(LEVEL)} "
            "interval. Arms of which a run diverged or failed have no mean.",
            _scores,
        ),
        (
            "differences",
            "Paired differences",
            "Each arm minus the one it is held against, seed by seed, in test score: mean and "
            f"{share(LEVEL)} interval. Filled dots are told apart at the 5{NBSP}% level after Holm's correction over "
            "the task's comparisons; intervals are not corrected. The arrow says which way is better.",
            _differences,
        ),
        (
            "trials",
            "Sensitivity to the learning rate",
            "Validation loss after the last epoch of every setting that tuning tried, against its learning rate; where "
            "more than that was searched, the other settings differ from dot to dot. The ringed one was chosen. "
            "Crosses at the upper edge diverged.",
            _sensitivity,
        ),
        (
            "budgets",
            "Best against tuning budget",
            f"Solid, up to {counted(startup, 'trial')}: the lowest validation loss that so many quasi-random trials "
            "are expected to find. Dotted, from there on: what the trials had found in their order, TPE's included; "
            "these follow from each other and have no expectation. A line begins where not even the worst draw "
            "consists of diverged trials only.",
            _budgets,
        ),
        (
            "curves",
            "Learning curves",
            f"Means over {seeds} at the end of every epoch, each arm at its chosen settings; runs that diverged are "
            "left out. The dotted line is the target by which steps are counted.",
            _curves,
        ),
        (
            "costs",
            "Time and memory",
            "Processor time of a whole training step, against what the optimizer keeps between steps. Runs beside each "
            "other on one machine disturb times: a few per cent say nothing.",
            _costs,
        ),
        (
            "zeros",
            "Score against exact zeros",
            f"Test score against the part of the weights that is exactly zero, means and {share(LEVEL)} intervals, of "
            "arms that make any and of those they are held against.",
            _zeros,
        ),
    ]
    drawn = [_over_tasks(results)] if results.standings else []
    rows = data.tables(results)
    rows["costs"] = rows.get("scores", [])
    for name, title, caption, draw in per_task:
        panels = {}
        for task in results.tasks.values():
            mine = [row for row in rows.get(name, []) if row["task"] == task.name]
            plot = draw(results, task, mine) if mine else None
            if plot is not None and plot.data:
                panels[task.name] = plot
        if panels:
            drawn.append(Figure(name, title, caption, panels))
    return drawn


def _over_tasks(results: Results) -> Figure:
    plot = _figure("steps to target, × the fastest arm's", "part of the problems")
    for row in results.standings:
        corners = row.profile.steps
        plot.add_scatter(
            x=[factor for factor, _ in corners],
            y=[100 * part for _, part in corners],
            mode="lines",
            **_line(results, row.arm, shape="hv"),
        )
    plot.update_yaxes(ticksuffix=f"{NBSP}%", range=[-2, 102])
    plot.update_xaxes(range=[0.95, WITHIN])
    whole = [task for task in results.tasks.values() if task.whole]
    return Figure(
        "profiles",
        "Performance profile",
        f"The part of {len(whole)} tasks × {counted(len(results.study.seeds), 'seed')} that an arm solves within a "
        "factor of the fastest arm's steps to the task's target. What an arm never solves is missing at every factor, "
        "and what nobody solves keeps all curves down. Higher is better; further left is faster.",
        {EVERY: plot},
    )


def style(results: Results, arm: str) -> tuple[str, str]:
    """The colour and the dash of an arm, the same in every figure."""
    place = [a.name for a in results.study.arms].index(arm)
    return COLOURS[place % len(COLOURS)], DASHES[place // len(COLOURS) % len(DASHES)]


def _line(results: Results, arm: str, **more: Any) -> dict[str, Any]:
    colour, dash = style(results, arm)
    return {
        "name": arm,
        "line": {"color": colour, "dash": dash, "width": 2, **more},
        "hovertemplate": f"{arm}<br>%{{x:.4g}}: %{{y:.4g}}<extra></extra>",
    }


def _scores(results: Results, task: TaskResults, rows: Rows) -> Any:
    it = unit(task.task)
    plot = by_arm(f"test {it.title}", [row["arm"] for row in rows], it.sign)
    for row in rows:
        colour, _ = style(results, row["arm"])
        runs = [run.test_score for run in task.row(row["arm"]).runs if run.test_score is not None]
        each = {"color": colour, "size": 4, "opacity": 0.45}
        _dots(plot, row["arm"], [it.factor * score for score in runs], each, it.sign)
        if row["test_score"] is not None:
            interval_at(plot, row["arm"], row, "test_score", it.factor, {"color": colour, "size": 9}, it.sign)
    return plot


def _differences(results: Results, task: TaskResults, rows: Rows) -> Any:
    it = unit(task.task)
    names = [f"{row['arm']} − {row['against']}" for row in rows]
    better = "→ better" if task.task.higher_is_better else "← better"
    plot = by_arm(f"{it.title}{', points' if it.factor != 1 else ''} ({better})", names)
    plot.add_vline(x=0, line={"color": GREY, "width": 1.5})
    for name, row in zip(names, rows, strict=True):
        colour, _ = style(results, row["arm"])
        sure = row["p_value_holm"] < data.ALPHA
        marker = {"color": colour, "size": 9, "symbol": "circle" if sure else "circle-open", "line": {"width": 2}}
        values = {"difference": row["difference"], "difference_low": row["low"], "difference_high": row["high"]}
        interval_at(plot, name, values, "difference", it.factor, marker, it.of_difference)
    return plot


def _dots(plot: Any, name: str, values: Sequence[float], marker: dict[str, Any], sign: str) -> None:
    plot.add_scatter(
        x=values,
        y=[name] * len(values),
        mode="markers",
        marker=marker,
        hovertemplate=f"{name}<br>%{{x:.4g}}{sign}<extra></extra>",
    )


def interval_at(
    plot: Any, name: str, row: Mapping[str, Any], key: str, factor: float, marker: dict[str, Any], sign: str
) -> None:
    """A dot on the line of this name, with its interval: the values under the key, and under key_low and key_high."""
    mean, low, high = (row[k] for k in (key, f"{key}_low", f"{key}_high"))
    _dots(plot, name, [factor * mean], marker, sign)
    if low is not None and not math.isnan(low):
        plot.data[-1].error_x = {
            "symmetric": False,
            "array": [factor * (high - mean)],
            "arrayminus": [factor * (mean - low)],
            "color": marker["color"],
            **BAR,
        }


def _sensitivity(results: Results, task: TaskResults, rows: Rows) -> Any:
    rows = [row for row in rows if row.get("lr")]
    known = [row["validation_loss"] for row in rows if row["validation_loss"] is not None]
    if not known:
        return None
    log = _wide(known)
    plot = _figure("learning rate", "validation loss", log_x=True, log_y=log)
    top = 1.6 * max(known) if log else max(known) + 0.08 * (max(known) - min(known))
    for arm in dict.fromkeys(row["arm"] for row in rows):
        mine = sorted((row for row in rows if row["arm"] == arm), key=lambda row: row["lr"])
        line = _line(results, arm)
        line["line"] = line["line"] | {"width": 1.2}
        plot.add_scatter(
            x=[row["lr"] for row in mine],
            y=[top if row["diverged"] else row["validation_loss"] for row in mine],
            mode="lines+markers",
            marker={
                "color": line["line"]["color"],
                "size": [13 if row["chosen"] else 6 for row in mine],
                "symbol": ["x-thin" if r["diverged"] else "circle-open" if r["chosen"] else "circle" for r in mine],
                "line": {"width": 1.5, "color": line["line"]["color"]},
            },
            **line,
        )
    return plot


def _budgets(results: Results, task: TaskResults, rows: Rows) -> Any:
    shown = [value for row in rows for value in (row["expected_best"], row["best_so_far"]) if value is not None]
    plot = _figure("trials", "lowest validation loss", log_y=_wide(shown))
    startup = results.study.tuning.startup
    for arm in dict.fromkeys(row["arm"] for row in rows):
        mine = [row for row in rows if row["arm"] == arm]
        line = _line(results, arm) | {"mode": "lines"}
        first = [row for row in mine if row["expected_best"] is not None]
        plot.add_scatter(x=[r["trials"] for r in first], y=[r["expected_best"] for r in first], **line)
        # At the last quasi-random trial both are the best of all of them, so that the lines meet.
        later = [row for row in mine if row["trials"] >= startup and row["best_so_far"] is not None]
        line |= {"line": line["line"] | {"dash": "dot"}}
        plot.add_scatter(x=[r["trials"] for r in later], y=[r["best_so_far"] for r in later], **line)
    plot.update_xaxes(dtick=max(1, results.study.tuning.trials // 8))
    return plot


def _curves(results: Results, task: TaskResults, rows: Rows) -> Any:
    """Two plots in one: the loss above, the score below."""
    it = unit(task.task)
    plot = _figure("optimizer steps", "", height=560)
    losses = [row["validation_loss"] for row in rows]
    low, high = _shown([it.factor * row["validation_score"] for row in rows], it.factor * task.task.target)
    plot.update_layout(
        yaxis={"domain": [0.54, 1], "title": {"text": "validation loss", "standoff": 8}},
        yaxis2={
            "domain": [0, 0.46],
            "title": {"text": f"validation {it.title}", "standoff": 8},
            "range": [low, high],
            "ticksuffix": it.sign,
            "automargin": True,
            "zeroline": False,
        },
        xaxis={"anchor": "y2"},
    )
    if _wide(losses):
        plot.update_layout(yaxis=_powers())
    for arm in dict.fromkeys(row["arm"] for row in rows):
        mine = [row for row in rows if row["arm"] == arm]
        line = _line(results, arm) | {"mode": "lines", "x": [row["steps"] for row in mine]}
        plot.add_scatter(y=[row["validation_loss"] for row in mine], **line)
        scores = [it.factor * row["validation_score"] for row in mine]
        plot.add_scatter(y=scores, yaxis="y2", **line)
    target = it.factor * task.task.target
    plot.add_shape(
        type="line", xref="paper", x0=0, x1=1, yref="y2", y0=target, y1=target, line={"dash": "dot", "color": GREY}
    )
    return plot


def _shown(scores: Sequence[float], target: float) -> tuple[float, float]:
    """The axis of scores: what lies far below the rest, as the first epochs do, would take all the room."""
    ordered = sorted([*scores, target])
    low, high = ordered[len(ordered) // 5], ordered[-1]
    room = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    return max(ordered[0], low - (high - low)) - room, high + room


def _costs(results: Results, task: TaskResults, rows: Rows) -> Any:
    plot = _figure("state, KiB", "ms a step")
    for row in rows:
        if row["ms_per_step"] is None:
            continue
        colour, _ = style(results, row["arm"])
        plot.add_scatter(
            x=[row["state_bytes"] / 1024],
            y=[row["ms_per_step"]],
            mode="markers",
            name=row["arm"],
            marker={"color": colour, "size": 9},
            hovertemplate=f"{row['arm']}<br>%{{x:.4g}} KiB<br>%{{y:.3g}} ms<extra></extra>",
        )
    plot.update_yaxes(rangemode="tozero")
    plot.update_xaxes(rangemode="tozero")
    return plot


def _zeros(results: Results, task: TaskResults, rows: Rows) -> Any:
    it = unit(task.task)
    plot = _figure("exact zeros", f"test {it.title}")
    for name, colour, mine in together(results, rows):
        plot.add_scatter(
            x=[100 * row["zeros"] for row in mine],
            y=[it.factor * row["test_score"] for row in mine],
            error_x=_bars(mine, "zeros", 100) | {"color": colour},
            error_y=_bars(mine, "test_score", it.factor) | {"color": colour},
            mode="lines+markers" if len(mine) > 1 else "markers",
            name=name,
            text=[row["arm"] for row in mine],
            line={"color": colour, "width": 1},
            marker={"color": colour, "size": 9},
            hovertemplate=f"%{{text}}<br>zeros %{{x:.1f}}{NBSP}%<br>%{{y:.4g}}{it.sign}<extra></extra>",
        )
    if any(row["sweep"] for row in rows):
        legend = {"orientation": "h", "y": -0.2, "yanchor": "top", "x": 0}
        plot.update_layout(showlegend=True, legend=legend, meta={"swept": True}, height=440)
    plot.update_xaxes(ticksuffix=f"{NBSP}%", range=[-3, 103])
    plot.update_yaxes(ticksuffix=it.sign)
    return plot


def together(results: Results, rows: Rows) -> list[tuple[str, str, Rows]]:
    """(name, colour, rows) of every sweep, in the order of its zeros, and of every arm that is in none."""
    names = dict.fromkeys(row["sweep"] or row["arm"] for row in rows)
    swept = any(row["sweep"] for row in rows)
    found = []
    for i, name in enumerate(names):
        mine = [row for row in rows if name == (row["sweep"] or row["arm"])]
        # The colours of the first arms of sweeps may be the same.
        colour = COLOURS[i % len(COLOURS)] if swept else style(results, name)[0]
        found.append((name, colour, sorted(mine, key=lambda row: row["zeros"])))
    return found


def _bars(rows: Rows, key: str, factor: float) -> dict[str, Any]:
    if any(math.isnan(row[f"{key}_low"]) for row in rows):
        return {}
    above = [factor * (row[f"{key}_high"] - row[key]) for row in rows]
    below = [factor * (row[key] - row[f"{key}_low"]) for row in rows]
    return {"symmetric": False, "array": above, "arrayminus": below, **BAR}


def _wide(values: Sequence[float]) -> bool:
    """So far apart, and all above zero, that an axis of powers shows more."""
    return bool(values) and min(values) > 0 and max(values) > 5 * min(values)


def by_arm(title: str, names: Sequence[str], sign: str = "") -> Any:
    """A plot with a line for each name, the first at the top."""
    plot = _figure(title, "", height=90 + 26 * len(names))
    plot.update_layout(meta={"names": list(names)})  # which the page breaks into lines where it is narrow
    plot.update_xaxes(ticksuffix=sign, tickangle=0, nticks=8)
    plot.update_yaxes(categoryorder="array", categoryarray=list(reversed(names)), range=[-0.7, len(names) - 0.3])
    return plot


def _figure(x: str, y: str, log_x: bool = False, log_y: bool = False, height: int = 380) -> Any:
    plot = go.Figure()
    plot.update_layout(
        template="none",
        height=height,
        margin={"l": 56, "r": 16, "t": 12, "b": 48},
        showlegend=False,  # the page has a legend of its own
        hovermode="closest",
    )
    axis = {"zeroline": False, "automargin": True}
    plot.update_xaxes(title={"text": x, "standoff": 10}, **axis, **(_powers() if log_x else {}))
    plot.update_yaxes(title={"text": y, "standoff": 10}, **axis, **(_powers() if log_y else {}))
    return plot


def _powers() -> dict[str, Any]:
    return {"type": "log", "dtick": 1, "exponentformat": "power", "minor": {"ticks": "inside", "ticklen": 3}}
