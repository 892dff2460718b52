"""The figures, as plotly figures without colours of their own for paper and ink: the page gives them those."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from benchmarks.report.text import LABELS, NBSP, name, share, weight
from benchmarks.report.words import chosen
from benchmarks.results import Results, Row
from benchmarks.spec import SparsityPlan
from benchmarks.stats import LEVEL, Interval

# Told apart on white and on near-black, by most eyes; the baseline first.
COLOURS = ("#3b82f6", "#06a5c4", "#e8590c", "#f2a20c", "#8b93a1", "#2f9e44", "#d6336c", "#9c5fd6", "#8a6d3b")
PERCENT = f"{NBSP}%"
DASHES = ("solid", "dash", "dot")


@dataclass(frozen=True)
class Figure:
    """A figure with its place in the page."""

    name: str
    title: str
    caption: str
    figure: Any
    whole_width: bool = False


def figures(results: Results) -> list[Figure]:
    """All figures of the report, in their order."""
    seeds = len(results.study.final_seeds)
    each = "pair" if results.study.regularized else "optimizer"
    drawn = [
        Figure(
            "loss",
            "Validation loss",
            f"Mean over {seeds} seeds, each {each} at its chosen learning rate; runs that diverged are left out.",
            _curves(results, "validation_loss", "validation loss"),
        ),
        Figure(
            "accuracy",
            "Validation accuracy",
            f"The same runs; the dotted line is the target of {share(results.study.target)}.{_cut(results)}",
            _curves(results, "validation_accuracy", "validation accuracy", target=results.study.target),
        ),
        Figure(
            "lr",
            "Sensitivity to the learning rate",
            "Validation loss after the last epoch of the tuning runs (one seed); the ringed point was chosen. "
            "A gap is a run that diverged.",
            _sensitivity(results),
            whole_width=True,
        ),
    ]
    return drawn + _sparsity_figures(results, results.study.sparsity) if results.study.sparsity else drawn


def _sparsity_figures(results: Results, plan: SparsityPlan) -> list[Figure]:
    return [
        Figure(
            "sparsity",
            "Accuracy against sparsity",
            f"{plan.arm} + {LABELS['agr+lp']} at each λ, means and {share(LEVEL)} t intervals over "
            f"{len(plan.seeds)} seeds; the line and band are the twin without either. The ringed "
            "point was chosen by validation data.",
            _sparsity(results, plan),
        ),
        Figure(
            "difference",
            "Paired difference to the twin",
            f"Test accuracy minus the twin's with the same seeds, in points, with {share(LEVEL)} t intervals. The "
            "dotted lines are what was asked for: right of one, at least "
            f"{share(plan.zeros_wanted)} zeros; above the other, at most {100 * plan.loss_allowed:g}{NBSP}point lost.",
            _difference(results, plan),
        ),
    ]


def _style(results: Results, arm: str) -> dict[str, str]:
    place = [plan.name for plan in results.study.arms].index(arm)
    return {"color": COLOURS[place % len(COLOURS)], "dash": DASHES[(place + place // len(COLOURS)) % len(DASHES)]}


def _curves(results: Results, field: str, title: str, target: float | None = None) -> Any:
    means = {name(row): _means(row, field) for row in results.rows}
    shown = [mean for row in means.values() for mean in row]
    percent = target is not None
    figure = _figure("optimizer steps", title, log_y=not percent and _wide(shown), unit_y=PERCENT if percent else "")
    for row in results.rows:
        histories = [run.epochs for run in row.runs if not run.diverged]
        if histories:
            figure.add_scatter(
                x=[epoch.steps for epoch in histories[0]],
                y=[100 * mean if percent else mean for mean in means[name(row)]],
                line=_style(results, row.arm),
                mode="lines",
                **_entry(row),
            )
    if target is not None:
        figure.add_hline(y=100 * target, line={"dash": "dot", "width": 1.5, "color": "#888"})
        low, high = _range(results, target)
        figure.update_yaxes(range=[100 * low, 100 * high])
    return figure


def _wide(values: list[float]) -> bool:
    """So far apart that an axis of powers shows more."""
    return max(values, default=1.0) > 5 * min(values, default=1.0)


def _means(row: Row, field: str) -> list[float]:
    histories = [run.epochs for run in row.runs if not run.diverged]
    return [sum(getattr(epoch, field) for epoch in epochs) / len(epochs) for epochs in zip(*histories, strict=True)]


def _range(results: Results, target: float) -> tuple[float, float]:
    """The axis of accuracy: up to 1 the first epochs would take all the room; far from it, all that is shown fits."""
    shown = [target, *(mean for row in results.rows for mean in _means(row, "validation_accuracy"))]
    if max(shown) < 0.8:
        return 0.95 * min(shown), 1.05 * max(shown)
    return max(0.0, 1 - 4 * (1 - target)), 1.005


def _cut(results: Results) -> str:
    lowest, _ = _range(results, results.study.target)
    if any(mean < lowest for row in results.rows for mean in _means(row, "validation_accuracy")):
        return f" The axis starts at {share(lowest)}; what lies below is not shown."
    return ""


def _sensitivity(results: Results) -> Any:
    tried = [loss for row in results.rows for loss in row.choice.losses.values() if math.isfinite(loss)]
    figure = _figure("learning rate", "validation loss", log_y=True, digits=(1, 2, 5) if _wide(tried) else range(1, 10))
    powers = [10.0**power for power in range(-6, 4)]
    figure.update_xaxes(type="log", tickvals=powers, ticktext=[f"{power:g}" for power in powers])
    for row in results.rows:
        losses = row.choice.losses
        figure.add_scatter(
            x=list(losses),
            y=[None if math.isinf(loss) else loss for loss in losses.values()],
            line=_style(results, row.arm),
            marker={
                "size": [12 if lr == row.choice.lr else 6 for lr in losses],
                "symbol": ["circle-open" if lr == row.choice.lr else "circle" for lr in losses],
                "line": {"width": 2, "color": _style(results, row.arm)["color"]},
            },
            mode="lines+markers",
            **_entry(row),
        )
    return figure


def _entry(row: Row) -> dict[str, Any]:
    return {
        "name": row.arm,
        "meta": {"regularizer": row.regularizer},
        "visible": row.regularizer == "none",
        "hovertemplate": f"{name(row)}<br>%{{x}}: %{{y}}<extra></extra>",
    }


def _sparsity(results: Results, plan: SparsityPlan) -> Any:
    figure = _figure("exact zeros", "test accuracy", unit_y=PERCENT, unit_x=PERCENT)
    twin = next((point for point in results.sparsity if not point.weight_decay), None)
    if twin:
        if not math.isnan(twin.accuracy.half):
            band = {"fillcolor": "rgba(136,136,136,0.2)", "line_width": 0, "layer": "below"}
            figure.add_hrect(y0=100 * twin.accuracy.low, y1=100 * twin.accuracy.high, **band)
        figure.add_hline(y=100 * twin.accuracy.mean, line={"color": "#888", "width": 2})
    _scatter(figure, results, plan, [point.accuracy for point in results.sparsity if point.weight_decay], PERCENT)
    return figure


def _difference(results: Results, plan: SparsityPlan) -> Any:
    figure = _figure("exact zeros", "difference in test accuracy, points", unit_x=PERCENT)
    asked = {"dash": "dot", "width": 1.5, "color": "#888"}
    figure.add_hline(y=0, line={"color": "#888", "width": 2})
    figure.add_hline(y=-100 * plan.loss_allowed, line=asked)
    figure.add_vline(x=100 * plan.zeros_wanted, line=asked)
    differences = [point.test_difference.interval for point in results.sparsity if point.test_difference]
    _scatter(figure, results, plan, differences, f"{NBSP}points")
    return figure


def _scatter(figure: Any, results: Results, plan: SparsityPlan, heights: list[Interval], unit: str) -> None:
    """Every λ but 0 at its zeros and the given height, both × 100."""
    points = [point for point in results.sparsity if point.weight_decay]
    # Without a twin there are no differences to draw.
    if not points or len(heights) < len(points):
        return
    pick = chosen(results, plan)
    ends = [
        (100 * (height.mean - _finite(height.half)), 100 * (height.mean + _finite(height.half))) for height in heights
    ]
    # Without caps: at an interval of the dot's own size they frame it, and it looks like a square.
    bar = {"thickness": 1.5, "width": 0}
    figure.add_scatter(
        x=[100 * point.zeros.mean for point in points],
        y=[100 * height.mean for height in heights],
        error_x=bar | {"array": [100 * _finite(point.zeros.half) for point in points]},
        error_y=bar | {"array": [high - 100 * height.mean for (_, high), height in zip(ends, heights, strict=True)]},
        text=[weight(point.weight_decay) for point in points],
        mode="lines+markers",
        showlegend=False,
        line={"color": COLOURS[6], "width": 1},
        marker={
            "size": [13 if point is pick else 8 for point in points],
            "symbol": ["circle-open" if point is pick else "circle" for point in points],
            "line": {"width": 2, "color": COLOURS[6]},
            "opacity": 1,
        },
        hovertemplate=f"%{{text}}<br>zeros %{{x:.1f}}{PERCENT}<br>%{{y:.2f}}{unit}<extra></extra>",
    )
    for point, height in zip(points, heights, strict=True):
        # A curve that falls leaves room above its right and below its left; away from the edge, a label fits.
        right = point.zeros.mean < 0.5
        figure.add_annotation(
            x=100 * point.zeros.mean,
            y=100 * height.mean,
            xanchor="left" if right else "right",
            yanchor="bottom" if right else "top",
            xshift=5 if right else -6,
            yshift=3 if right else -3,
            text=weight(point.weight_decay),
            showarrow=False,
            borderpad=1,
            font={"size": 11},
        )
    # Plotly leaves no room for labels by itself, nor for lines across the plot.
    shown = [y for pair in ends for y in pair] + [
        shape.y0 for shape in figure.layout.shapes if shape.xref == "x domain"
    ]
    bottom, top = min(shown), max(shown)
    room = 0.12 * (top - bottom or 1)
    figure.update_yaxes(range=[bottom - room, top + room])
    figure.update_xaxes(range=[-2, 102])


def _figure(
    x: str, y: str, log_y: bool = False, unit_x: str = "", unit_y: str = "", digits: Iterable[int] = (1, 2, 5)
) -> Any:
    figure = go.Figure()
    figure.update_layout(
        template="none",
        height=440,
        margin={"l": 56, "r": 20, "t": 20, "b": 60},
        legend={"orientation": "h", "y": -0.24, "yanchor": "top", "x": 0},
        hovermode="closest",
    )
    title = {"standoff": 14}
    figure.update_xaxes(title=title | {"text": x}, ticksuffix=unit_x, zeroline=False, automargin=True)
    figure.update_yaxes(
        title=title | {"text": y}, type="log" if log_y else None, ticksuffix=unit_y, zeroline=False, automargin=True
    )
    if log_y:
        ticks = [digit * 10**power for power in range(-4, 3) for digit in digits]
        figure.update_yaxes(tickvals=ticks, ticktext=[f"{tick:g}" for tick in ticks])
    return figure


def _finite(value: float) -> float:
    return 0.0 if math.isnan(value) else value
