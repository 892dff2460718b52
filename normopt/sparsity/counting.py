"""``report``: count the zeros of each weight tensor; as numbers, a table and a figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from normopt._checks import check_number
from normopt._plots import subplots
from normopt.sparsity.weights import Weight, weights

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def aligned(rows: Sequence[Sequence[str]], left: int) -> str:
    """Return a table as text: the first ``left`` columns aligned to the left, the others to the right."""
    columns = []
    for i, column in enumerate(zip(*rows, strict=True)):
        width = max(map(len, column))
        columns.append([cell.ljust(width) if i < left else cell.rjust(width) for cell in column])
    return "\n".join("  ".join(row) for row in zip(*columns, strict=True))


@dataclass(frozen=True)
class WeightCount:
    """Counts for one weight tensor, or for all of them together.

    Attributes:
        name: the tensor's name in the model.
        shape: its shape; empty for the total.
        entries: number of entries.
        zeros: entries that are exactly 0.
        small: entries with magnitude below the report's threshold, zeros included.
        rows: output units or channels.
        dead_rows: rows whose weights are all exactly 0.
        columns: input units or channels.
        dead_columns: columns whose weights are all exactly 0.
    """

    name: str
    shape: tuple[int, ...]
    entries: int
    zeros: int
    small: int
    rows: int
    dead_rows: int
    columns: int
    dead_columns: int


@dataclass(frozen=True)
class Report:
    """Result of `report`.

    Attributes:
        weights: one count for each weight tensor, in the order of the model.
        threshold: magnitude below which an entry counts as ``small``.
    """

    weights: tuple[WeightCount, ...]
    threshold: float

    @property
    def total(self) -> WeightCount:
        """Total over all weight tensors."""
        fields = ("entries", "zeros", "small", "rows", "dead_rows", "columns", "dead_columns")
        return WeightCount("total", (), **{field: sum(getattr(w, field) for w in self.weights) for field in fields})

    def __str__(self) -> str:
        return aligned(self._cells(), left=2)

    def to_markdown(self) -> str:
        """Return the table in Markdown."""
        # A bar would end the Markdown cell.
        lines = [[cell.replace("|", r"\|") for cell in row] for row in self._cells()]
        lines.insert(1, ["---", "---", *["---:"] * (len(lines[0]) - 2)])
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    def figure(self) -> Figure:
        """Plot the percentages of zeros, dead rows and dead columns of each weight tensor as bars.

        Returns:
            A pyplot figure: ``plt.show()`` shows it, ``figure.savefig("zeros.png")`` saves it.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """
        kinds = {"zeros": "entries", "dead_rows": "rows", "dead_columns": "columns"}
        figure, ax = subplots(1, 1, figsize=(7, 1.2 + 0.55 * max(1, len(self.weights))), layout="constrained")
        for i, (kind, whole) in enumerate(kinds.items()):
            shares = [100 * getattr(w, kind) / max(1, getattr(w, whole)) for w in self.weights]
            places = [n + 0.27 * (i - 1) for n in range(len(self.weights))]
            bars = ax.barh(places, shares, height=0.24, label=kind.replace("_", " "))
            texts = [f"{getattr(w, kind):,} of {getattr(w, whole):,}" for w in self.weights]
            ax.bar_label(bars, texts, padding=3, fontsize=7)
        ax.set_yticks(range(len(self.weights)), [w.name for w in self.weights])
        ax.invert_yaxis()
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(False, axis="y")
        ax.set(xlim=(0, 125), xlabel="per cent of the tensor's entries, rows or columns", xticks=range(0, 101, 20))
        figure.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
        return figure

    def _cells(self) -> list[tuple[str, ...]]:
        head = ("weight", "shape", "entries", "zeros", f"|w| < {self.threshold:g}", "dead rows", "dead columns")
        return [head, *(_cells(w) for w in (*self.weights, self.total))]


def report(model: nn.Module, threshold: float = 1e-13) -> Report:
    """Count a model's zero entries, and its all-zero rows and columns, which `shrink` can remove.

    ::

        zeros        = #{ w = 0 }                     small       = #{ |w| < threshold }
        dead rows    = #{ o : W[o, :] = 0 }           dead columns = #{ i : W[:, i] = 0 }

    Weight tensors are parameters of two dims or more. Biases and the gains of norm layers are left out, as in ℓp
    decay, and so are integers and 8-bit floats, the codes of quantized layers. A row holds the incoming weights of an
    output unit, a column the outgoing weights of an input unit; in convolutions, transposed and grouped ones too,
    units are channels. A tensor shared by several modules counts once.

    The weights may be DTensors, as under FSDP2 or tensor parallelism: the counts are those of the full tensors, the
    same on every rank. Every rank must call it, and gathers one full weight at a time.

    Args:
        model: any module, dense or made by `to_sparse`.
        threshold: magnitude below which an entry is ``small``. Default 1e-13, as the authors of ℓp decay count
            without pruning.

    Returns:
        A `Report`; ``print`` it for a table.

    Raises:
        TypeError: ``model`` is not a module, or ``threshold`` not a number.
        ValueError: a threshold that is negative or infinite; a weight of a lazy module without a shape.

    Source: the count with 1e-13 is that of arXiv:2404.10824.

    Example:
        >>> model = torch.nn.Linear(3, 2)
        >>> with torch.no_grad():
        ...     _ = model.weight.copy_(torch.tensor([[1.0, 1e-20, 0.0], [0.0, 0.0, 0.0]]))
        >>> print(normopt.sparsity.report(model))
        weight  shape  entries      zeros  |w| < 1e-13  dead rows  dead columns
        weight  2 × 3        6  4 (66.7%)    5 (83.3%)     1 of 2        1 of 3
        total                6  4 (66.7%)    5 (83.3%)     1 of 2        1 of 3
    """
    check_number("threshold", threshold, low=0, open_high=True)
    return Report(tuple(_count(w, threshold) for w in weights(model)), float(threshold))


@torch.no_grad()
def _count(weight: Weight, threshold: float) -> WeightCount:
    units = weight.units()
    zero = units == 0
    groups, outs, ins = units.shape[:3]
    return WeightCount(
        name=weight.name,
        shape=tuple(weight.tensor.shape),
        entries=units.numel(),
        zeros=int(zero.sum()),
        small=int((units.abs() < threshold).sum()),
        rows=groups * outs,
        dead_rows=_all(zero, weight.dims("rows")),
        columns=groups * ins,
        dead_columns=_all(zero, weight.dims("columns")),
    )


def _all(zero: torch.Tensor, dims: tuple[int, ...]) -> int:
    return int(zero.all(dims).sum()) if zero.numel() else 0  # an empty tensor has no dead rows


def _cells(w: WeightCount) -> tuple[str, ...]:
    return (
        w.name,
        " × ".join(map(str, w.shape)),
        f"{w.entries:,}",
        _share(w.zeros, w.entries),
        _share(w.small, w.entries),
        f"{w.dead_rows:,} of {w.rows:,}",
        f"{w.dead_columns:,} of {w.columns:,}",
    )


def _share(part: int, whole: int) -> str:
    return f"{part:,} ({part / whole:.1%})" if part else "0"
