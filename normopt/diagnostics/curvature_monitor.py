"""Monitor of the loss's curvature during training: the Hessian's eigenvalues, its trace, the gradient's density."""

from __future__ import annotations

import math
from dataclasses import asdict
from os import PathLike
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from normopt._checks import check_integer
from normopt._plots import subplots
from normopt.diagnostics.curvature import Spectrum, check_size, estimate
from normopt.diagnostics.products import Loss, Matrix, Products
from normopt.diagnostics.rows import write_csv

if TYPE_CHECKING:
    from matplotlib.figure import Figure

OF_GRADIENT = ("loss", "grad_l2", "density")
OF_SPECTRUM = (
    *("largest", "largest_error", "smallest", "smallest_error", "trace", "trace_half"),
    *("negative", "anisotropy", "effective_rank"),
)
ROW = np.dtype([("step", np.int64), *((name, np.float64) for name in (*OF_GRADIENT, *OF_SPECTRUM))])


class CurvatureMonitor:
    """Monitor the spectrum of the Hessian of a loss on one fixed batch, over a training, under any optimizer.

    Call ``step()`` once per training step (or once per epoch; ``every`` counts its calls). The first call and every
    ``every``-th after it measure the model as it is then. A measurement adds a row::

        loss, grad_l2            of the probe batch: ℓ and ‖g‖₂
        density                  φ(g) = ‖g‖₁²/(d‖g‖₂²), d entries, as in `GeometryMonitor`
        largest, smallest        the ends of the spectrum, each with its ``_error``
        trace, trace_half        tr H with the half-width of its 95 % interval
        negative                 Σ_{λ<0}|λ| / Σ|λ|
        anisotropy               max|λ| / mean|λ|
        effective_rank           Σ|λ| / max|λ|

    and a `Spectrum`, which says how each is found. Weights, buffers, gradients and random numbers stay bitwise the
    same. 0/0 is NaN.

    Args:
        model: any module, called as ``model(input)``.
        loss_fn: called as ``loss_fn(output, target)``; returns the mean over the batch.
        probe_batch: the pair (input, target), on the model's device, kept.
        every: calls of ``step()`` between measurements. Default 1000.
        matrix: "hessian" (the default) or "gauss-newton".
        steps: the number of Lanczos steps, from 8. Default 64.
        probes: the number of probes. Default 2.
        seed: seed of the probes; the same at every measurement, so that changes are not those of the probes. Default 0.
        train: True: batch norm and dropout in train mode. Default False, eval mode.

    Attributes:
        calls: the number of calls of ``step()``.
        spectra: a `Spectrum` for each measurement.

    Cost: steps + probes·(steps − steps/4) + 2 products with the matrix, 162 by default, and one gradient. On one core,
    a product took 1.1 (MLP), 2.0 (transformer) and 3.1 (convolutions with batch norm) times as long as a training
    step with AdamW on the same batch. Memory during a measurement: ``steps`` times the weights, and about ten times
    the weights more; see `hessian_spectrum`.

    Raises:
        TypeError: as `hessian_spectrum`; ``every`` is not an integer.
        ValueError: as `hessian_spectrum`; ``every`` < 1.

    Source: as `hessian_spectrum`. Eigenvalues over a training are figure 1 of arXiv:2606.02078.

    Example:
        >>> monitor = normopt.CurvatureMonitor(model, loss, batches[0], every=500)
        >>> for x, y in batches:
        ...     monitor.step()
        ...     optimizer.zero_grad()
        ...     loss(model(x), y).backward()
        ...     optimizer.step()
        >>> monitor.rows["largest"]
        >>> monitor.to_csv("curvature.csv")
        >>> monitor.plot().savefig("curvature.png")
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Loss,
        probe_batch: tuple[Any, Any],
        *,
        every: int = 1000,
        matrix: Matrix = "hessian",
        steps: int = 64,
        probes: int = 2,
        seed: int = 0,
        train: bool = False,
    ) -> None:
        check_integer("every", every)
        check_size(steps, probes)
        self._products = Products(model, loss_fn, [probe_batch], matrix, train, seed)
        self._every, self._steps, self._probes = every, steps, probes
        self.calls = 0
        self.spectra: list[Spectrum] = []
        self._rows: list[tuple[float, ...]] = []

    def __repr__(self) -> str:
        """Return the model's type, the settings and the number of measurements."""
        of = self._products
        return (
            f"CurvatureMonitor({type(of.model).__name__}, every={self._every}, matrix={of.matrix!r}, "
            f"steps={self._steps}, probes={self._probes}, {len(self.spectra)} measurements in {self.calls} steps)"
        )

    def step(self) -> None:
        """Count a training step, and measure if it is due.

        Raises:
            TypeError: the outputs are not one tensor, for "gauss-newton".
            ValueError: the loss is not one finite number, or does not depend on the parameters; the matrix is zero;
                a product is not finite.
            RuntimeError: an operation has no second derivative.
        """
        call = self.calls
        if call % self._every == 0:
            loss, g = self._products.gradient()
            l2 = float(torch.linalg.vector_norm(g))
            density = float(g.abs().sum()) ** 2 / (len(g) * l2**2) if l2 else np.nan
            spectrum = estimate(self._products, self._steps, self._probes)
            self._rows.append((call, loss, l2, density, *(getattr(spectrum, name) for name in OF_SPECTRUM)))
            self.spectra.append(spectrum)
        self.calls = call + 1

    @property
    def rows(self) -> NDArray[Any]:
        """All rows so far: a NumPy structured array; ``step`` 0 is the first call."""
        return np.array(self._rows, dtype=ROW)

    def to_csv(self, path: str | PathLike[str]) -> None:
        """Write all rows as CSV, one line per measurement; NaN as ``nan``.

        Args:
            path: the file, which is overwritten.
        """
        write_csv(path, ROW.names or (), (row.tolist() for row in self.rows))

    def state_dict(self) -> dict[str, Any]:
        """Return all that was measured, as tensors and primitive values."""
        return {
            "calls": self.calls,
            "rows": torch.tensor(self._rows, dtype=torch.float64),
            "spectra": [
                {k: torch.from_numpy(v.copy()) if isinstance(v, np.ndarray) else v for k, v in asdict(s).items()}
                for s in self.spectra
            ],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue a saved monitor.

        Args:
            state_dict: the ``state_dict()`` of a monitor of the same model and matrix.

        Raises:
            ValueError: the state is that of another number of parameters or another matrix.
        """
        ours = (self._products.size, self._products.matrix)
        for saved in state_dict["spectra"]:
            if (theirs := (saved["size"], saved["matrix"])) != ours:
                raise ValueError(f"the state has (parameters, matrix) = {theirs}, and this monitor {ours}")
        self.calls = state_dict["calls"]
        self._rows = [(int(row[0]), *row[1:]) for row in state_dict["rows"].tolist()]
        self.spectra = []
        for saved in state_dict["spectra"]:
            found: dict[str, Any] = {k: v.numpy() if isinstance(v, torch.Tensor) else v for k, v in saved.items()}
            self.spectra.append(Spectrum(**found))

    def plot(self) -> Figure:
        """Plot over the steps: the eigenvalues, the trace, the effective rank, the negative part and the density.

        Outliers are dots; the lines are the largest and the smallest eigenvalue, the shade has the middle 98 %.

        Returns:
            A pyplot figure.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """
        rows = self.rows
        figure, axes = subplots(2, 2, figsize=(8, 5.2), sharex=True, layout="constrained")
        (values, trace), (rank, parts) = axes
        for name in ("largest", "smallest"):
            values.plot(rows["step"], rows[name], linewidth=1, color="C0")
        for step, s in zip(rows["step"], self.spectra, strict=True):
            values.plot(np.full_like(s.outliers, step), s.outliers, ".", color="C0", markersize=3, alpha=0.6)
        if self.spectra:
            bulk = np.array([s.quantile([0.01, 0.99]) for s in self.spectra]).T
            values.fill_between(rows["step"], *bulk, alpha=0.3, color="C1", linewidth=0)
            if middle := float(np.median([s.scale for s in self.spectra])):  # outliers and bulk are far apart
                values.set_yscale("symlog", linthresh=10 ** math.ceil(math.log10(middle / 100)))
        trace.plot(rows["step"], rows["trace"], linewidth=1)
        half = rows["trace_half"]
        trace.fill_between(rows["step"], rows["trace"] - half, rows["trace"] + half, alpha=0.25)
        rank.plot(rows["step"], rows["effective_rank"], linewidth=1)
        rank.set(yscale="log")
        parts.plot(rows["step"], rows["negative"], linewidth=1, label="negative part")
        parts.plot(rows["step"], rows["density"], linewidth=1, label="density of the gradient")
        parts.set(ylim=(0, None))
        for ax, title in ((values, "eigenvalues"), (trace, "trace"), (rank, "effective rank"), (parts, "fractions")):
            ax.set_title(title, fontsize=9)
        for ax in (rank, parts):
            ax.set(xlabel="step")
        parts.legend(fontsize=8)
        return figure
