"""Analysis of a finished trajectory: distances, cosines, and the regularity γ."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from normopt._checks import check_number
from normopt._plots import subplots
from normopt.diagnostics.iterates import LOSS, LR, Array, TrajectoryRecord, read
from normopt.diagnostics.rows import write_csv
from normopt.diagnostics.sketch import cosine_half, distance_half, product_half

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NEAR = 1e-3


@dataclass(frozen=True)
class Trajectory:
    """T steps of a training run, relative to its end: straightness, and the progress of every step towards the end.

    With θ_t the weights at which the loss ℓ_t was computed, U_t = θ_{t+1} − θ_t, and θ_T the final weights::

        distance             D_t = ‖θ_t − θ_T‖
        cosine               ⟨U_t, θ_T − θ_t⟩ / (‖U_t‖·D_t)
        consecutive_cosine   ⟨U_t, U_{t+1}⟩ / (‖U_t‖·‖U_{t+1}‖)
        path_length          Σ_t ‖U_t‖
        straightness         D_0 / path_length
        gamma                γ_t = (D_t² − D_{t+1}²) / (2η_t·(ℓ_t − inf ℓ))
                                 = (2⟨U_t, θ_T − θ_t⟩ − ‖U_t‖²) / (2η_t·(ℓ_t − inf ℓ))

    The paper finds γ_t > 0 almost throughout in successful trainings. Its minimum, `min_gamma`, is the largest γ with
    which the whole trajectory is regular. (γ's display form is recalled from the paper, not copied from it.) The
    second form, which equals the first, is the one computed: it avoids cancellation between two large numbers.

    Three pitfalls. γ_t diverges as ℓ_t nears inf ℓ, so do not average it; steps whose excess loss is below a
    thousandth of the first recorded one's are not valid. γ is proportional to 1/η, so it cannot compare optimizers or
    learning rates; the cosine can. The last cosines are high in any training: the last is 1.

    Attributes:
        loss: ℓ_t [T]; NaN where none was recorded.
        lr: η_t [T], the learning rate of the param groups; NaN if there is none or they differ. It does not include
            the radius of normopt's groups, which belongs to the norm.
        distance: D_t [T + 1], in the units of the weights; the last is 0.
        update_l2: ‖U_t‖ [T], the ℓ2 norm of all weights' updates as one vector, under any optimizer's norm; exact in
            both modes.
        cosine: [T]; NaN where the weights did not move or were at θ_T.
        consecutive_cosine: [T − 1]; NaN where one of the two updates is zero.
        gamma: γ_t [T], NaN where it is not valid.
        reason: [T], why γ_t is not valid, or "": "no finite loss was recorded", "the weights are
            not finite", "the weights did not move", "no single learning rate", "the learning rate is 0", or
            "the loss is at its infimum".
        inf_loss: inf ℓ, as given.
        sketch: the size of the sketch, None if exact.
        distance_half: half-width of the 95 % confidence interval of every distance, relative to it; 0 if exact.
        cosine_half: half-width for the cosines [T], absolute.
        consecutive_half: half-width for the consecutive cosines [T − 1], absolute.
        gamma_half: half-width for γ [T], absolute: 2.25·‖U_t‖·D_t·√((1 − c_t²/2)/k)/(η_t·(ℓ_t − inf ℓ)), c_t the
            cosine.

    The intervals follow from the variance of a sketched inner product, (‖x‖²‖y‖² + ⟨x,y⟩² − 2Σx_i²y_i²)/k without its
    last term. To first order the standard deviations are at most 1/√(2k) of a distance, (1 − c²)/√k of a cosine c and
    √((1 − c²/2)/k) of ⟨U_t, θ_T − θ_t⟩/(‖U_t‖·D_t), where ‖U_t‖ is exact; an interval is ±2.25 of them.
    They are pointwise, not simultaneous: one sketch serves all steps, so errors of neighbouring steps are correlated.

    Source: γ is from Chen, Yang and Zhou, arXiv:2011.06702; the cosine, which needs no learning rate, from
    arXiv:2306.11922; the variance is Lemma 2 of arXiv:0902.2206.

    Example:
        >>> found = monitor.result()
        >>> found.min_gamma, found.straightness, found.invalid
        >>> found.to_csv("trajectory.csv")
        >>> found.plot().savefig("trajectory.png")
    """

    loss: Array
    lr: Array
    distance: Array
    update_l2: Array
    cosine: Array
    consecutive_cosine: Array
    gamma: Array
    reason: NDArray[np.str_]
    inf_loss: float
    sketch: int | None
    distance_half: float
    cosine_half: Array
    consecutive_half: Array
    gamma_half: Array

    @property
    def valid(self) -> NDArray[np.bool_]:
        """Mask of the steps with a valid γ [T]."""
        return np.equal(self.reason, np.str_(""))

    @property
    def invalid(self) -> dict[str, int]:
        """Number of steps without a valid γ, by reason."""
        return dict(Counter(str(r) for r in self.reason if r))

    @property
    def min_gamma(self) -> float:
        """Minimum γ_t over the valid steps; NaN if there are none."""
        return float(np.min(self.gamma[self.valid])) if self.valid.any() else math.nan

    @property
    def path_length(self) -> float:
        """Path length Σ‖U_t‖."""
        return float(self.update_l2.sum())

    @property
    def displacement(self) -> float:
        """Displacement D_0 from the first weights to the last."""
        return float(self.distance[0])

    @property
    def straightness(self) -> float:
        """Displacement over path length, 1 for a straight line; NaN if nothing moved."""
        return self.displacement / self.path_length if self.path_length else math.nan

    @classmethod
    def load(cls, directory: str | Path, inf_loss: float = 0.0) -> Trajectory:
        """Return the trajectory that a monitor with ``directory=`` wrote, also of an interrupted training.

        All complete steps in the files are used, and the last iterate is θ_T. A step is complete once the next step
        has begun, or the monitor's ``result()`` or ``close()`` was called.

        Args:
            directory: the monitor's directory.
            inf_loss: inf ℓ, a lower bound of the losses. Default 0, as in `TrajectoryMonitor.result`.

        Raises:
            ValueError: the directory has no trajectory, or one without a complete step; ``inf_loss`` is NaN, or above
                a recorded loss.
            TypeError: ``inf_loss`` is not a number.
        """
        return from_record(read(directory), inf_loss)

    def to_csv(self, path: str | Path) -> None:
        """Write one line per step, from step 0, with half-widths; NaN as ``nan``.

        Args:
            path: the file, which is overwritten.
        """
        columns: dict[str, NDArray[Any]] = {
            "step": np.arange(len(self.loss)),
            "loss": self.loss,
            "lr": self.lr,
            "distance": self.distance[:-1],
            "distance_half": self.distance_half * self.distance[:-1],
            "update_l2": self.update_l2,
            "cosine": self.cosine,
            "cosine_half": self.cosine_half,
            "consecutive_cosine": np.append(self.consecutive_cosine, np.nan),
            "consecutive_half": np.append(self.consecutive_half, np.nan),
            "gamma": self.gamma,
            "gamma_half": self.gamma_half,
            "reason": self.reason,
        }
        write_csv(path, columns, zip(*(column.tolist() for column in columns.values()), strict=True))

    def plot(self) -> Figure:
        """Plot loss, distance to the end, cosine and γ over the steps, with 95 % confidence bands.

        Returns:
            A pyplot figure.

        Raises:
            ModuleNotFoundError: matplotlib is not installed.
        """
        figure, axes = subplots(2, 2, figsize=(8, 5.2), sharex=True, layout="constrained")
        (loss, distance), (cosine, gamma) = axes
        least, most = np.nanmin(self.loss, initial=np.inf), np.nanmax(self.loss, initial=0)
        loss.set(ylabel="loss", yscale="log" if most > 10 * least > 0 else "linear")
        for ax, values, half, width in (
            (loss, self.loss, None, 0.8),
            (distance, self.distance, self.distance_half * self.distance, 1.0),
            (cosine, self.cosine, self.cosine_half, 0.8),
            (gamma, self.gamma, self.gamma_half, 0.8),
        ):
            ax.plot(values, linewidth=width)
            if half is not None:
                ax.fill_between(np.arange(len(values)), values - half, values + half, alpha=0.25)
        distance.set(ylabel="distance to the end", ylim=(0, None))
        for ax, label in ((cosine, "cosine to the end"), (gamma, "γ")):
            ax.axhline(0, color="gray", linewidth=0.8)
            ax.set(ylabel=label, xlabel="step")
        sizes = np.abs(self.gamma[self.valid & (self.gamma != 0)])
        if sizes.size:  # γ spans orders of magnitude and may be negative
            gamma.set_yscale("symlog", linthresh=float(np.median(sizes)))
        return figure


def from_record(record: TrajectoryRecord, inf_loss: float) -> Trajectory:
    """Compute distances, cosines, γ and the confidence intervals from a record; 0/0 is NaN."""
    check_number("inf_loss", inf_loss)
    products, squares, scalars, k = record
    if not len(scalars):
        raise ValueError("no step has been made yet, so there is no trajectory: call result() after training")
    loss, lr = scalars[:, LOSS], scalars[:, LR]
    lengths, rests = np.sqrt(products[:2])
    update_l2 = np.sqrt(squares)
    excess = loss - inf_loss
    below = np.flatnonzero(np.isfinite(excess) & (excess < 0))
    if len(below):
        t = below[0]
        raise ValueError(f"inf_loss = {inf_loss:g} is above the loss of step {t}, {loss[t]:g}: give a lower bound")
    reason = _reasons(excess, lr, update_l2, rests)
    with np.errstate(all="ignore"):
        cosine = np.clip(products[2] / lengths / rests, -1, 1)
        consecutive = np.clip(products[3] / lengths / np.roll(lengths, -1), -1, 1)[:-1]
        # Exact as D_t² − D_{t+1}² is: (θ_T − θ_t) − U_t = θ_T − θ_{t+1}.
        product = update_l2 * rests * cosine
        gamma = np.where(reason == "", (2 * product - update_l2**2) / (2 * lr * excess), np.nan)
        reach = update_l2 * rests / (lr * excess)
    if k is None:
        zeros = np.zeros(len(loss))
        halves = 0.0, zeros, zeros[1:], zeros
    else:
        gamma_half = np.where(reason == "", reach * product_half(k, cosine), np.nan)
        halves = distance_half(k), cosine_half(k, cosine), cosine_half(k, consecutive), gamma_half
    distance = np.append(rests, 0.0)
    return Trajectory(loss, lr, distance, update_l2, cosine, consecutive, gamma, reason, float(inf_loss), k, *halves)


def _reasons(excess: Array, lr: Array, update_l2: Array, distance: Array) -> NDArray[np.str_]:
    """Return why γ_t is not valid, or "", for each step."""
    finite = np.isfinite(excess)
    threshold = NEAR * excess[finite][0] if finite.any() else 0.0
    reason = np.full(len(excess), "", dtype="<U32")
    for why, holds in (  # the last that holds is reported
        ("the loss is at its infimum", ~(excess > threshold)),
        ("the learning rate is 0", lr == 0),
        ("no single learning rate", np.isnan(lr)),
        ("the weights did not move", update_l2 == 0),
        ("the weights are not finite", ~(np.isfinite(update_l2) & np.isfinite(distance))),
        ("no finite loss was recorded", ~finite),
    ):
        reason[holds] = why
    return reason
