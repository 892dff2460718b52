"""Monitor norms, density and anisotropy of gradients and updates during training."""

from __future__ import annotations

import math
from os import PathLike
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch.optim import Optimizer

from normopt._checks import check_integer, warn
from normopt.diagnostics.measures import GroupSnapshot, unquantized
from normopt.diagnostics.rows import METRICS, ROW, RingBuffer, plot_rows, write_csv
from normopt.engine import SteepestDescent
from normopt.hooks import OutermostStep
from normopt.norms import registry
from normopt.norms.base import Norm
from normopt.norms.lp import Lp

if TYPE_CHECKING:
    from matplotlib.figure import Figure


HookResult = tuple[tuple[Any, ...], dict[str, Any]]


class Writer(Protocol):
    """Scalar logger: TensorBoard's SummaryWriter, or anything with its ``add_scalar``."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> object:
        """Log one number under a tag at a step."""


class GeometryMonitor:
    """Monitor norm, density and anisotropy of gradients and updates per param group, for any optimizer.

    The monitor uses step hooks and changes nothing: weights, state and random numbers stay bitwise the same. Every
    ``every`` steps, from the first on, it adds a row per group to a ring buffer on the group's device, without a host
    sync. ``flush()``, and all that uses it, fetches the rows.

    With g the group's gradient as one vector of d entries (of the parameters that have a gradient), w its weights
    before the step and Δw the change of the weights in the step, including decay::

        lr            the group's η          p    the group's p; NaN where it has none
        grad_dual     ‖g‖⋆                   the dual norm of the gradient
        grad_l2       ‖g‖₂
        density       φ(g) = ‖g‖₁²/(d‖g‖₂²)               1/d: one nonzero entry … 1: all of one magnitude;
                                                          2/π = 0.64 for Gaussian entries
        density_q     ‖g‖_q²/(d^(2/q−1)·‖g‖₂²)            the same for q = p/(p−1) if ‖·‖ is an ℓp norm; q = 1
                                                          (p = ∞) is φ; NaN if q ≥ 2 or ‖·‖ is another norm
        anisotropy    ‖g‖_∞·√d/‖g‖₂                       peak to RMS, 1 … √d; 1: all of one magnitude
        update_norm   ‖Δw‖                   in the group's norm
        update_ratio  ‖Δw‖₂/‖w‖₂
        zeros         fraction of the weights that are exactly 0 after the step

    ‖·‖ is the norm of a normopt optimizer's step, else ℓ2. As in
    [`norm_pairs`][normopt.SteepestDescent.norm_pairs], a group's norm is the maximum over its tensors and its dual
    norm the sum; under ``scope="group"`` both are those of all tensors as one vector. Unlike there, the dual norm is
    that of the raw gradient, and ``update_norm`` includes the learning rate, the radius and the decay.
    `Trajectory` has ``update_l2`` instead: the ℓ2 norm of all groups' updates as one vector.

    0/0 is NaN: density, density_q and anisotropy of a zero gradient (whose norms are 0), and the ratio of zero weights
    that do not move (of those that do, it is ∞). In a group without entries, all but lr and p is NaN; without a
    gradient, all metrics of g. The update norm is NaN if a custom norm defines no ``norm``.

    The gradient is ``.grad`` at the call of ``step()``, or after the last call of a closure. `AGR` and `LpDecay` act
    first, in whatever order they were attached, so the monitor sees the regularized gradient and the decayed weights.
    Gradients that a fused step unscales itself (GradScaler) are measured unscaled. Nested hooked steps count as one
    step; the step in which torch.distributed.checkpoint creates optimizer state is not counted. Sparse gradients are
    measured as dense ones. Quantized weights (integers or 8-bit floats) are left out.

    Args:
        optimizer: any torch.optim.Optimizer.
        every: interval between rows, in steps. Default 50, which costs a few per cent of a small model's steps; the
            tutorial "Can the gradient choose p?" has the measurement.
        capacity: rows per group between two flushes; older rows are overwritten, and counted in ``lost``.
            Default 1000.
        norm: a registered name or a Norm, to measure all groups in. Default: each group's own, or ℓ2.

    Attributes:
        steps: the number of steps seen, measured or not.

    Cost: a measured step copies the weights and makes a few passes over weights and gradients (over gradients at each
    call of a closure); other steps cost a function call. There is no host sync, except where a norm decomposes
    matrices on CUDA: torch.linalg.svd syncs, and takes far longer than the rest, so choose a larger ``every``.
    Memory: during a measured step, a copy of the weights and a float32 copy of one large gradient at a time; 80 bytes
    per row.

    DTensors are gathered in measured steps. This needs a monitor with the same settings on every rank, and memory for
    the full weights and the full gradients of the largest group.

    The monitor has no state to save: a new one starts at step 0.

    Raises:
        TypeError: not an optimizer, or not a norm; ``every`` or ``capacity`` is not an integer.
        ValueError: the norm is unknown, or does not support a parameter's shape; ``every`` or ``capacity`` < 1.

    Warns:
        UserWarning: in ``flush()``, once, if rows were overwritten before they were fetched.

    Source: the density is from signSGD, arXiv:1802.04434.

    Example:
        >>> with normopt.GeometryMonitor(opt) as monitor:
        ...     train(model, opt)
        >>> monitor.rows["density"]
        >>> monitor.to_csv("geometry.csv")
        >>> monitor.plot().savefig("geometry.png")
    """

    def __init__(
        self, optimizer: Optimizer, *, every: int = 50, capacity: int = 1000, norm: str | Norm | None = None
    ) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"GeometryMonitor needs a torch.optim.Optimizer, but was given {type(optimizer).__name__}")
        check_integer("every", every)
        check_integer("capacity", capacity)
        self.optimizer, self.every, self.capacity = optimizer, every, capacity
        self.steps = 0
        self.norm = None if norm is None else _resolve_norm(norm)
        if self.norm is not None:
            for group in optimizer.param_groups:
                self.norm.check("unit", unquantized(group))
        self._rings: dict[int, RingBuffer] = {}
        self._flushed: list[NDArray[Any]] = []  # rows fetched so far
        self._logged = 0  # rows written to TensorBoard
        self._warned = False
        self._outermost = OutermostStep()
        self._snapshots: list[GroupSnapshot] = []  # of a step that is measured
        self._hooks = [
            optimizer.register_step_pre_hook(self._pre_hook),
            optimizer.register_step_post_hook(self._post_hook),
        ]

    def __repr__(self) -> str:
        """Return the optimizer's type, the settings and the number of steps seen."""
        return (
            f"GeometryMonitor({type(self.optimizer).__name__}, every={self.every}, capacity={self.capacity}, "
            f"norm={self.norm!r}, {self.steps} steps, {'attached' if self._hooks else 'closed'})"
        )

    def close(self) -> None:
        """Detach from the optimizer; the rows stay."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._snapshots = [], []
        self._outermost.reset()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def lost(self) -> int:
        """Number of rows overwritten before they were flushed, over all groups."""
        return sum(ring.lost for ring in self._rings.values())

    @property
    def rows(self) -> NDArray[Any]:
        """All rows so far, after a flush: a NumPy structured array, sorted by step, then group."""
        self.flush()
        return np.concatenate([np.empty(0, ROW), *self._flushed])

    def flush(self) -> NDArray[Any]:
        """Fetch the rows since the last flush, and free their room in the buffer; syncs with the device.

        Returns:
            A NumPy structured array with the fields ``step`` (0 is the monitor's first, as in `Trajectory`),
            ``group`` and the metrics, sorted by step, then group. ``rows["density"]`` is a column.

        Example:
            >>> monitor = normopt.GeometryMonitor(opt, every=1)
            >>> opt.step()
            >>> for row in monitor.flush():  # each as a dict of Python numbers
            ...     print(dict(zip(row.dtype.names, row.tolist())))
        """
        new = np.concatenate([np.empty(0, ROW), *(ring.fetch(i) for i, ring in self._rings.items())])
        new.sort(order=["step", "group"])
        if len(new):
            self._flushed.append(new)
        if self.lost and not self._warned:
            self._warned = True
            warn(
                f"{self.lost} rows were overwritten before they were fetched: call flush() at least every "
                f"{self.capacity * self.every} steps, or give a larger capacity"
            )
        return new

    def to_csv(self, path: str | PathLike[str]) -> None:
        """Write all rows so far as CSV, one line per step and group; NaN as ``nan``.

        Args:
            path: the file, which is overwritten.
        """
        write_csv(path, ROW.names or (), (row.tolist() for row in self.rows))

    def to_tensorboard(self, writer: Writer) -> None:
        """Log the rows not logged before to TensorBoard, as ``geometry/<metric>/group <i>``; NaN is left out.

        Args:
            writer: anything with ``add_scalar(tag, value, step)``.
        """
        rows = self.rows
        for row in rows[self._logged :]:
            for name in METRICS:
                if not math.isnan(row[name]):
                    writer.add_scalar(f"geometry/{name}/group {row['group']}", float(row[name]), int(row["step"]))
        self._logged = len(rows)

    def plot(self) -> Figure:
        """Plot every metric over the steps, one line per group; metrics that are always NaN are left out.

        Returns:
            A pyplot figure.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """
        return plot_rows(self.rows)

    def _pre_hook(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> HookResult | None:
        if not self._outermost.enter(optimizer, args, kwargs):
            return None
        self._snapshots = []
        if self.steps % self.every:
            return None
        self._snapshots = [self._snapshot(group) for group in optimizer.param_groups]
        if not any(map(callable, (*args[1:], *kwargs.values()))):
            self._measure_gradients()
            return None

        def watched(given: Any) -> Any:
            def closure(*args: Any, **kwargs: Any) -> Any:
                loss = given(*args, **kwargs)
                self._measure_gradients()
                return loss

            return closure if callable(given) else given

        return (args[0], *map(watched, args[1:])), {k: watched(x) for k, x in kwargs.items()}

    def _post_hook(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._outermost.leave():
            return
        snapshots, self._snapshots = self._snapshots, []
        step, self.steps = self.steps, self.steps + 1
        for i, b in enumerate(snapshots):
            if i not in self._rings:
                self._rings[i] = RingBuffer(self.capacity, b.params[0].device if b.params else torch.device("cpu"))
            self._rings[i].add(step, b.lr, b.p, b.gradient, b.update_metrics())

    def _measure_gradients(self) -> None:
        """Measure now: an optimizer may write into ``.grad``, and an add-on restores it after the step."""
        scale = getattr(self.optimizer, "grad_scale", None)
        for b in self._snapshots:
            b.gradient = b.gradient_metrics(scale)

    def _snapshot(self, group: dict[str, Any]) -> GroupSnapshot:
        if not isinstance(self.optimizer, SteepestDescent):
            return GroupSnapshot(group, self.norm or Lp(2.0), False)
        norm = self.norm or registry.build(group)
        return GroupSnapshot(group, norm, group["scope"] == "group" and norm.spans_groups)


def _resolve_norm(norm: str | Norm) -> Norm:
    """Return the Norm of a ``norm=`` argument."""
    if isinstance(norm, Norm):
        return norm
    try:
        return registry.build({"norm": norm})
    except ValueError as error:
        raise ValueError(f"{error}; or pass a Norm, such as norm=normopt.norms.Lp(3.0)") from None
