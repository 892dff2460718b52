"""Rosenbrock's valley in many dimensions: a bent, flat floor between steep walls, and a known optimum."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from benchmarks.tasks.functions import Function, KnownOptimum

SIDE = 4  # of the square matrix of weights
WALL = 100.0  # Rosenbrock's own


class Rosenbrock(KnownOptimum):
    """f = Σ_i [100(w_{i+1} − w_i²)² + (1 − w_i)²]/(d − 1), least where all w are 1."""

    name = "rosenbrock"
    target = -2.0
    description = (
        f"Rosenbrock's function, coupled along a chain of {SIDE**2} variables, a {SIDE} × {SIDE} matrix: the mean of "
        f"{WALL:g}(wᵢ₊₁ − wᵢ²)² + (1 − wᵢ)² over i, least where all are 1; no noise. A seed draws the start, evenly in "
        "[−½, ½] (16 weights in a matrix, 0 biases)"
    )

    def build(self) -> nn.Module:
        """The function, started around 0."""
        return Valley()


class Valley(Function):
    """The residuals √200·(w_{i+1} − w_i²) and √2·(1 − w_i), over √(d − 1)."""

    def __init__(self) -> None:
        super().__init__(torch.ones(SIDE, SIDE))
        nn.init.uniform_(self.matrix.weight, -0.5, 0.5)

    def residuals(self, w: Tensor) -> Tensor:
        """Of neighbours in the flattened matrix."""
        wall = WALL**0.5 * (w[1:] - w[:-1].square())
        return torch.cat([wall, 1 - w[:-1]]) * math.sqrt(2 / (len(w) - 1))
