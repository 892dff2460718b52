"""Metric rows: a ring buffer on the device, a NumPy table on the host, and a plot."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from normopt._plots import subplots

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Metric columns of a row, in order, and their titles in a plot.
TITLES = {
    "lr": "learning rate",
    "p": "p",
    "grad_dual": "dual norm of the gradient",
    "grad_l2": "ℓ2 norm of the gradient",
    "density": "density of the gradient",
    "density_q": "density in the group's own q",
    "anisotropy": "anisotropy of the gradient",
    "update_norm": "update in the group's norm",
    "update_ratio": "update to weights",
    "zeros": "weights that are 0",
}
METRICS = tuple(TITLES)
PARTS = [1, 1, 5, 3]  # numbers of columns: lr, p, metrics of the gradient, metrics of the update
FRACTIONS, LENGTHS = ("density", "density_q", "zeros"), ("lr", "grad_dual", "grad_l2", "update_norm", "update_ratio")
ROW = np.dtype([("step", np.int64), ("group", np.int64), *((name, np.float64) for name in METRICS)])


class RingBuffer:
    """Ring buffer of one group's last rows: metrics on its device, steps on the host."""

    def __init__(self, capacity: int, device: torch.device) -> None:
        dtype = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
        self.numbers = torch.full((capacity, len(METRICS)), math.nan, dtype=dtype, device=device)
        self.steps = np.zeros(capacity, np.int64)
        self.written = self.fetched = self.lost = 0

    def add(self, step: int, *values: float | Tensor | None) -> None:
        """Append a row, one value for each of `PARTS`, overwriting the oldest when full; None is stored as NaN."""
        slot = self.written % len(self.steps)
        for part, value in zip(torch.split(self.numbers[slot], PARTS), values, strict=True):
            if isinstance(value, Tensor):
                part.copy_(value)
            else:  # fill_ passes the number as a kernel argument: no copy to the device, no sync
                part.fill_(math.nan if value is None else value)
        self.lost += self.written - self.fetched >= len(self.steps)
        self.fetched = max(self.fetched, self.written + 1 - len(self.steps))
        self.steps[slot] = step
        self.written += 1

    def fetch(self, group: int) -> NDArray[Any]:
        """Return the rows that were not fetched yet."""
        slots = np.arange(self.fetched, self.written) % len(self.steps)
        self.fetched = self.written
        rows = np.empty(len(slots), ROW)
        if len(slots):
            for name, column in zip(METRICS, self.numbers.cpu().numpy()[slots].T, strict=True):
                rows[name] = column
        rows["step"], rows["group"] = self.steps[slots], group
        return rows


def write_csv(path: str | PathLike[str], names: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """Write a CSV file: a line of column names, then one line per row."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(names)
        out.writerows(rows)


def plot_rows(rows: NDArray[Any]) -> Figure:
    """Plot every metric that is not always NaN over the steps."""
    shown = [name for name in METRICS if np.isfinite(rows[name]).any()]
    height = math.ceil(max(len(shown), 1) / 2)
    size = (7, 0.8 + 1.4 * height)
    figure, axes = subplots(height, 2, layout="constrained", figsize=size, sharex=True, squeeze=False)
    from matplotlib.ticker import NullFormatter  # matplotlib is optional

    groups = np.unique(rows["group"])
    for ax, name in zip(axes.flat, shown, strict=False):
        for group in groups:
            of = rows[rows["group"] == group]
            ax.plot(of["step"], of[name], label=f"group {group}", linewidth=1)
        ax.set_title(TITLES[name], fontsize=9)
        finite = rows[name][np.isfinite(rows[name])]
        if name in FRACTIONS and finite.max() > 0:
            ax.set_ylim(bottom=-0.03 * finite.max())
        elif name in LENGTHS and finite.min() > 0 and finite.max() > 10 * finite.min():
            ax.set_yscale("log")
            ax.yaxis.set_minor_formatter(NullFormatter())
    for ax in axes.flat[len(shown) :]:
        ax.set_axis_off()
    for ax in axes[-1]:
        ax.set_xlabel("step")
    if len(groups) > 1 and shown:
        figure.legend(*axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=min(len(groups), 6))
    return figure
