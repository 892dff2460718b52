"""Sparse linear regression whose coefficients are known: does an optimizer find the few columns that matter?"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.tasks.base import Splits
from benchmarks.tasks.common import SPLIT_SEED, Plain, split, standardised

DESIGN_SEED = 0
REAL, SHUFFLED, GAUSSIAN = 10, 90, 100  # columns
COLUMNS = REAL + SHUFFLED + GAUSSIAN
RELEVANT = 5  # of the real columns, and as many of the others
NOISE = 1.0  # the deviation of what no column explains
ZERO = 1e-13


class DiabetesSparse(Plain):
    """Linear regression on 200 columns, 10 of which matter, with 265 rows to learn from."""

    name = "diabetes-sparse"
    epochs, batch_size = 40, 32
    score_name = "R²"
    higher_is_better = True
    target = 0.75
    description = (
        f"The {REAL} columns of scikit-learn's diabetes table (442 patients), which correlate with each other by up "
        f"to 0.9, {SHUFFLED} columns that are they in another order of the patients, and {GAUSSIAN} Gaussian ones "
        f"(seed {DESIGN_SEED}), split 60/20/20 (split seed {SPLIT_SEED}) and standardised by the training data. The "
        f"targets are made: {2 * RELEVANT} columns, half of them real, have coefficients between 0.5 and 1.5 of "
        f"either sign, the others none, and noise of deviation {NOISE:g} is added. Linear regression without a bias, "
        "PyTorch's own initialisation (200 weights in a matrix, 0 biases), mean squared error. “Support F1” takes a "
        "weight for relevant if it is not exactly zero, “top support F1” if it is among the "
        f"{2 * RELEVANT} largest; “coefficient error” is ‖w − w⋆‖₂/‖w⋆‖₂"
    )

    def load(self) -> Splits:
        """The three splits, made once a process."""
        return _load()

    def build(self) -> nn.Module:
        """One linear layer; the targets have no constant part to learn."""
        return nn.Linear(COLUMNS, 1, bias=False)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean squared error."""
        return (outputs.squeeze(-1) - targets).square().mean()

    def score(self, outputs: Tensor, targets: Tensor) -> float:
        """R²: the part of the targets' variance that is explained."""
        error = (outputs.squeeze(-1) - targets).square().mean()
        return float(1 - error / targets.var(correction=0))

    def measures(self, model: nn.Module) -> Mapping[str, float]:
        """How well the support and the coefficients were found."""
        w, known = next(model.parameters()).detach().flatten().double().cpu(), coefficients()
        largest = torch.zeros_like(w, dtype=torch.bool).index_fill(0, w.abs().topk(2 * RELEVANT).indices, True)
        return {
            "support F1": f1(w.abs() >= ZERO, known != 0),
            "top support F1": f1(largest, known != 0),
            "coefficient error": float((w - known).norm() / known.norm()),
        }


def f1(found: Tensor, relevant: Tensor) -> float:
    """2·(found and relevant) / (found + relevant), 1 at its best, 0 where nothing relevant is found."""
    return 2 * int((found & relevant).sum()) / (int(found.sum()) + int(relevant.sum()))


@cache
def coefficients() -> Tensor:
    """The known w⋆ [COLUMNS], of the standardised columns."""
    draws = np.random.default_rng(DESIGN_SEED)
    chosen = [*draws.permutation(REAL)[:RELEVANT], *(REAL + draws.permutation(COLUMNS - REAL)[:RELEVANT])]
    w = np.zeros(COLUMNS)
    w[chosen] = draws.uniform(0.5, 1.5, 2 * RELEVANT) * draws.choice([-1, 1], 2 * RELEVANT)
    return torch.from_numpy(w)


@cache
def _load() -> Splits:
    from sklearn.datasets import load_diabetes  # as in `split`

    real = load_diabetes(return_X_y=True)[0]
    draws = np.random.default_rng(DESIGN_SEED + 1)
    shuffled = [draws.permutation(real[:, i % REAL]) for i in range(SHUFFLED)]
    design = np.column_stack([real, *shuffled, draws.standard_normal((len(real), GAUSSIAN))])
    noise = NOISE * draws.standard_normal(len(real))
    splits = standardised(split(design, noise, torch.float32, by_class=False))
    w = coefficients()
    return splits.each(lambda data: (data[0], (data[0].double() @ w + data[1].double()).float()))
