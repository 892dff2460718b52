"""The figures, as plotly figures without colours of their own for paper and ink: the page gives them those."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from benchmarks.report.words import chosen
from benchmarks.results import Results, Row

# Told apart on white and on near-black, by most eyes; the baseline first.
COLOURS = ("#3b82f6", "#06a5c4", "#e8590c", "#f2a20c", "#8b93a1", "#2f9e44", "#d6336c", "#9c5fd6", "#8a6d3b")
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
    return [
        Figure(
            "loss",
            "Validation loss",
            f"Mean over {seeds} seeds, each pair at its chosen learning rate; runs that diverged are left out.",
            _curves(results, "validation_loss", "validation loss", log=True),
        ),
        Figure(
            "accuracy",
            "Validation accuracy",
            f"The same runs; the dotted line is the target of {100 * results.study.target:g} %.",
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
        Figure(
            "sparsity",
            "Accuracy against sparsity",
            f"{results.study.sparsity.arm} + agr + lp at each λ, means and 95 % t intervals over "
            f"{len(results.study.sparsity.seeds)} seeds; the line and band are the twin without either. The ringed "
            "point was chosen by validation data.",
            _sparsity(results),
        ),
        Figure(
            "difference",
            "Paired difference to the twin",
            "Test accuracy minus the twin's with the same seeds, with 95 % t intervals. The dotted lines are what was "
            "asked for: right of one, above the other.",
            _difference(results),
        ),
    ]


def _style(results: Results, arm: str) -> dict[str, str]:
    place = [plan.name for plan in results.study.arms].index(arm)
    return {"color": COLOURS[place % len(COLOURS)], "dash": DASHES[place % len(DASHES)]}


def _curves(results: Results, field: str, title: str, log: bool = False, target: float | None = None) -> Any:
    figure = _figure("optimizer steps", title, log_y=log, percent_y=not log)
    for row in results.rows:
        histories = [run.epochs for run in row.runs if not run.diverged]
        if histories:
            figure.add_scatter(
                x=[epoch.steps for epoch in histories[0]],
                y=[_mean([getattr(epoch, field) for epoch in epochs]) for epochs in zip(*histories, strict=True)],
                line=_style(results, row.arm),
                mode="lines",
                **_entry(row),
            )
    if target is not None:
        figure.add_hline(y=target, line={"dash": "dot", "width": 1, "color": "#888"})
        # The first epochs would otherwise take all the room.
        figure.update_yaxes(range=[max(0.0, 1 - 4 * (1 - target)), 1.005])
    return figure


def _sensitivity(results: Results) -> Any:
    figure = _figure("learning rate", "validation loss", log_y=True)
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
        "hovertemplate": f"{row.name}<br>%{{x}}: %{{y}}<extra></extra>",
    }


def _sparsity(results: Results) -> Any:
    figure = _figure("exact zeros", "test accuracy", percent_y=True, percent_x=True)
    twin = next((point for point in results.sparsity if not point.weight_decay), None)
    if twin:
        if not math.isnan(twin.accuracy.half):
            band = {"fillcolor": "rgba(136,136,136,0.2)", "line_width": 0}
            figure.add_hrect(y0=twin.accuracy.low, y1=twin.accuracy.high, **band)
        figure.add_hline(y=twin.accuracy.mean, line={"color": "#888", "width": 2})
    points = [point for point in results.sparsity if point.weight_decay]
    _scatter(figure, results, [point.accuracy for point in points])
    figure.update_xaxes(range=[-0.02, 1.02])
    return figure


def _difference(results: Results) -> Any:
    figure = _figure("exact zeros", "difference in test accuracy", percent_y=True, percent_x=True)
    points = [point for point in results.sparsity if point.test_difference]
    _scatter(figure, results, [point.test_difference.interval for point in points if point.test_difference])
    plan = results.study.sparsity
    asked = {"dash": "dot", "width": 1, "color": "#888"}
    figure.add_hline(y=0, line={"color": "#888", "width": 2})
    figure.add_hline(y=-plan.loss_allowed, line=asked)
    figure.add_vline(x=plan.zeros_wanted, line=asked)
    figure.update_xaxes(range=[-0.02, 1.02])
    return figure


def _scatter(figure: Any, results: Results, heights: list[Any]) -> None:
    points = [point for point in results.sparsity if point.weight_decay]
    if not points:
        return
    pick = chosen(results)
    figure.add_scatter(
        x=[point.zeros.mean for point in points],
        y=[height.mean for height in heights],
        error_x={"array": [_finite(point.zeros.half) for point in points], "thickness": 1},
        error_y={"array": [_finite(height.half) for height in heights], "thickness": 1},
        text=[f"{point.weight_decay:g}" for point in points],
        textposition="top right",
        mode="lines+markers+text",
        showlegend=False,
        line={"color": COLOURS[6], "width": 1},
        marker={
            "size": [13 if point is pick else 7 for point in points],
            "symbol": ["circle-open" if point is pick else "circle" for point in points],
            "line": {"width": 2, "color": COLOURS[6]},
        },
        hovertemplate="λ = %{text}<br>zeros %{x:.1%}<br>%{y:.2%}<extra></extra>",
    )


def _figure(x: str, y: str, log_y: bool = False, percent_y: bool = False, percent_x: bool = False) -> Any:
    figure = go.Figure()
    figure.update_layout(
        template="none",
        height=430,
        margin={"l": 60, "r": 12, "t": 12, "b": 58},
        legend={"orientation": "h", "y": -0.24, "yanchor": "top", "x": 0},
        hovermode="closest",
    )
    figure.update_xaxes(title=x, tickformat=".0%" if percent_x else None, zeroline=False)
    figure.update_yaxes(
        title=y, type="log" if log_y else None, tickformat=".1%" if percent_y else None, zeroline=False, automargin=True
    )
    if log_y:
        ticks = [digit * 10**power for power in range(-4, 3) for digit in (1, 2, 5)]
        figure.update_yaxes(tickvals=ticks, ticktext=[f"{tick:g}" for tick in ticks])
    return figure


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _finite(value: float) -> float:
    return 0.0 if math.isnan(value) else value
