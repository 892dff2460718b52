"""The geometry of a training run: norms, density and shape of gradients and updates, as they happen."""

from __future__ import annotations

import csv
import math
import warnings
from os import PathLike
from typing import TYPE_CHECKING, Any, Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.optim import Optimizer

from normopt._checks import is_quantized
from normopt.diagnostics.measures import Measure, copied, entries, number, of_gradient, of_update
from normopt.diagnostics.rows import METRICS, ROW, Ring, drawn
from normopt.engine import SteepestDescent
from normopt.hooks import OutermostStep
from normopt.norms import registry
from normopt.norms.base import Norm
from normopt.norms.lp import Lp
from normopt.norms.matrices import check_integer
from normopt.sharding.layout import whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure


Call = tuple[tuple[Any, ...], dict[str, Any]]


class Writer(Protocol):
    """What takes scalars: TensorBoard's SummaryWriter, or anything with its ``add_scalar``."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> object:
        """Take one number under a tag at a step."""


class GeometryMonitor:
    """Sees, beside any optimizer, how long, how dense and how peaked gradients and updates are in each param group.

    It hangs on the optimizer's step hooks and changes nothing: weights, state and random numbers go on bit for
    bit as without it. Every ``every`` steps, the first included, it adds a row for each group to a ring on the
    group's device, without the host waiting for anything; ``flush()`` and what is built on it fetch the rows.

    With g the group's gradient as one vector of d entries (of the parameters that have a gradient), w its weights
    before the step and Δw what the step, decay and all, has added to them::

        lr            the group's η          p    the group's p; NaN where it has none
        grad_dual     ‖g‖⋆                   the dual norm of the gradient
        grad_l2       ‖g‖₂
        density       φ(g) = ‖g‖₁²/(d‖g‖₂²)               1/d: one entry is not zero … 1: all are as large;
                                                          2/π = 0.64 for Gaussian entries
        density_q     ‖g‖_q²/(d^(2/q−1)·‖g‖₂²)            the same for q = p/(p−1) if ‖·‖ is an ℓp norm; q = 1
                                                          (p = ∞) is φ; NaN if q ≥ 2 or ‖·‖ is another norm
        anisotropy    ‖g‖_∞·√d/‖g‖₂                       peak to RMS, 1 … √d; 1 where all are as large
        update_norm   ‖Δw‖                   in the group's norm
        update_ratio  ‖Δw‖₂/‖w‖₂
        zeros         how many of the weights are exactly 0 after the step, as a fraction

    ‖·‖ is the norm of the optimizer's own step, if it is of normopt, else ℓ2. As in
    [`norm_pairs`][normopt.SteepestDescent.norm_pairs], over a group's tensors the norm is the largest and the dual
    norm the sum, but under ``scope="group"``, where they are those of all tensors as one vector; unlike there,
    the dual norm is the bare gradient's, and ``update_norm`` has the learning rate, the radius and the decay in it.
    `Trajectory` has another, ``update_l2``: the ℓ2 norm of all groups' updates as one vector.

    What is 0/0 is NaN: density, density_q and anisotropy of a zero gradient (whose norms are 0), the ratio of zero
    weights that stay (that of those that move is ∞). In a group without entries all is NaN but lr and p; without any
    gradient, what is of g. The update norm is NaN where a norm of your own defines no ``norm``.

    The gradient is what ``.grad`` holds when ``step()`` is called, or, if a closure is given, when that has returned
    for the last time. `AGR` and `LpDecay` act before the monitor looks, whichever was attached first: it sees the
    regularized gradient and the decayed weights. Scaled gradients that a fused step unscales itself (GradScaler) are
    measured unscaled. A step that calls a hooked step inside is one step, and that by which
    torch.distributed.checkpoint has an optimizer create its state is none. A sparse gradient is measured as the dense
    one that it means. Quantized weights, of integers or of 8-bit floats, are left out.

    Args:
        optimizer: any torch.optim.Optimizer.
        every: steps from one row to the next. Default 50, at which it takes a few per cent of a small
            model's steps; the tutorial "Can the gradient choose p?" has the measurement.
        capacity: rows a group that fit between two flushes; older ones are overwritten, and counted in ``lost``.
            Default 1000.
        norm: a registered name or a Norm, to measure all groups in. Default: each group's own, or ℓ2.

    Attributes:
        steps: how many steps it has seen, measured or not.

    Cost: in the steps that are measured a copy of the weights and a few passes over weights and gradients (over
    gradients at each call of a closure); in the others a call. No host sync, but where a norm decomposes matrices on
    CUDA: torch.linalg.svd waits by itself, and takes far longer than the rest, which is worth a larger ``every``.
    Memory: one copy of the weights during a measured step, and of the larger gradients one at a time in float32; 80
    bytes a row.

    DTensors are brought together whole in the steps that are measured, which needs a monitor with the same settings on
    every rank, and memory for the weights and the largest group's gradients there.

    It has no state to save: a new one begins at step 0.

    Raises:
        TypeError: not an optimizer, or a norm that is none; ``every`` or ``capacity`` is no integer.
        ValueError: the norm is unknown, or takes no parameter of such shapes; ``every`` or ``capacity`` < 1.

    Warns:
        UserWarning: in ``flush()``, once, that rows were overwritten before they were fetched.

    Source: the density is that of signSGD, arXiv:1802.04434.

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
            raise TypeError(
                f"GeometryMonitor watches a torch.optim.Optimizer, but was given {type(optimizer).__name__}"
            )
        check_integer("every", every, math.inf)
        check_integer("capacity", capacity, math.inf)
        self.optimizer, self.every, self.capacity = optimizer, every, capacity
        self.steps = 0
        self.norm = None if norm is None else _named(norm)
        for group in optimizer.param_groups:
            _refuse(_weights(group), self.norm)
        self._rings: dict[int, Ring] = {}
        self._kept: list[NDArray[Any]] = []  # what was flushed
        self._told = 0  # rows that a TensorBoard has
        self._warned = False
        self._outermost = OutermostStep()
        self._begun: list[_Begun] | None = None
        self._hooks = [
            optimizer.register_step_pre_hook(self._pre),
            optimizer.register_step_post_hook(self._post),
        ]

    def __repr__(self) -> str:
        """What it watches, its settings, and how many steps it has seen."""
        return (
            f"GeometryMonitor({type(self.optimizer).__name__}, every={self.every}, capacity={self.capacity}, "
            f"norm={self.norm!r}, {self.steps} steps, {'attached' if self._hooks else 'closed'})"
        )

    def close(self) -> None:
        """Let go of the optimizer; the rows stay."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._begun = [], None
        self._outermost.reset()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def lost(self) -> int:
        """How many rows were overwritten before they were flushed, all groups together."""
        return sum(ring.lost for ring in self._rings.values())

    @property
    def rows(self) -> NDArray[Any]:
        """All rows so far, flushed first: a NumPy structured array, by step and then by group."""
        self.flush()
        return np.concatenate(self._kept) if self._kept else np.empty(0, ROW)

    def flush(self) -> NDArray[Any]:
        """Fetch the rows since the last flush, which makes room for as many; here the host waits for the device.

        Returns:
            A NumPy structured array with the fields ``step`` (0 for the first since the monitor was made, as in
            `Trajectory`), ``group`` and the metrics, by step and then by group.
        """
        parts = [ring.taken(i) for i, ring in self._rings.items()]
        new = np.concatenate([np.empty(0, ROW), *parts])
        new.sort(order=["step", "group"])
        if len(new):
            self._kept.append(new)
        if self.lost and not self._warned:
            self._warned = True
            warnings.warn(
                f"{self.lost} rows were overwritten before they were fetched: call flush() at least every "
                f"{self.capacity * self.every} steps, or give a larger capacity",
                UserWarning,
                stacklevel=2,
            )
        return new

    def to_csv(self, path: str | PathLike[str]) -> None:
        """Write all rows so far as CSV, a line for each step and group; NaN as ``nan``.

        Args:
            path: the file, which is written anew.
        """
        with open(path, "w", newline="", encoding="utf-8") as file:
            out = csv.writer(file, lineterminator="\n")
            out.writerow(ROW.names or ())
            out.writerows(row.tolist() for row in self.rows)

    def to_tensorboard(self, writer: Writer) -> None:
        """Give a TensorBoard writer the rows that it has not got yet, as ``geometry/<metric>/group <i>``, without NaN.

        Args:
            writer: anything with ``add_scalar(tag, value, step)``.
        """
        rows = self.rows
        for row in rows[self._told :]:
            for name in METRICS:
                if not math.isnan(row[name]):
                    writer.add_scalar(f"geometry/{name}/group {row['group']}", float(row[name]), int(row["step"]))
        self._told = len(rows)

    def plot(self) -> Figure:
        """Draw every metric over the steps, a line for each group; metrics that are NaN throughout are left out.

        Returns:
            A pyplot figure.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """
        return drawn(self.rows)

    def _pre(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        if not self._outermost.enter(optimizer, args, kwargs):
            return None
        self._begun = None
        if self.steps % self.every:
            return None
        with torch.no_grad():
            begun = [_Begun(group, self._measure(group)) for group in optimizer.param_groups]
        self._begun = begun
        if not any(callable(x) for x in (*args[1:], *kwargs.values())):
            self._see_gradients(begun)
            return None

        def watched(given: Any) -> Any:
            def closure(*args: Any, **kwargs: Any) -> Any:
                loss = given(*args, **kwargs)
                self._see_gradients(begun)
                return loss

            return closure if callable(given) else given

        return (args[0], *map(watched, args[1:])), {k: watched(x) for k, x in kwargs.items()}

    def _post(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._outermost.leave():
            return
        begun, self._begun = self._begun, None
        step, self.steps = self.steps, self.steps + 1
        if begun is None:
            return
        with torch.no_grad():
            for i, b in enumerate(begun):
                if i not in self._rings:
                    self._rings[i] = Ring(self.capacity, b.params[0].device if b.params else torch.device("cpu"))
                self._rings[i].add(step, b.lr, b.p, b.gradient, of_update(b.params, b.weights, b.measure))

    @torch.no_grad()
    def _see_gradients(self, begun: list[_Begun]) -> None:
        """Now, because an optimizer may write into ``.grad``, and an add-on put back what was there."""
        scale = getattr(self.optimizer, "grad_scale", None)
        for b in begun:
            b.gradient = of_gradient(b.params, b.measure, scale)

    def _measure(self, group: dict[str, Any]) -> Measure:
        if not isinstance(self.optimizer, SteepestDescent):
            return Measure(self.norm or Lp(2.0), False)
        norm = self.norm or registry.build(group)
        return Measure(norm, group["scope"] == "group" and norm.spans_groups)


class _Begun:
    """What is known of a group before a step."""

    def __init__(self, group: dict[str, Any], measure: Measure) -> None:
        self.params, self.lr, self.p = _weights(group), number(group, "lr"), number(group, "p")
        self.measure = measure
        self.weights = copied([entries(whole(p)) for p in self.params])
        self.gradient: Tensor | None = None


def _weights(group: dict[str, Any]) -> list[Tensor]:
    """A group's parameters but for quantized ones, whose numbers are codes."""
    return [p for p in group["params"] if not is_quantized(p)]


def _named(norm: str | Norm) -> Norm:
    """The norm of a ``norm=`` argument."""
    if isinstance(norm, Norm):
        return norm
    try:
        return registry.build({"norm": norm})
    except ValueError as error:
        raise ValueError(f"{error}, or as an object here, such as norm=normopt.norms.Lp(3.0)") from None


def _refuse(params: list[Tensor], norm: Norm | None) -> None:
    """Raise where parameters cannot be measured."""
    if norm is not None:
        norm.check("unit", params)
