"""An ill-conditioned quadratic, turned away from the axes, and its twin along them."""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor, nn

from benchmarks.tasks.functions import Function, KnownOptimum

SIDE = 16  # of the square matrix of weights
CONDITION = 1e4
SHAPE_SEED = 0


class Quadratic(KnownOptimum):
    """f = ½(w − w⋆)ᵀQΛQᵀ(w − w⋆), the eigenvalues Λ from 1 down to 1/CONDITION, evenly by ratios."""

    name = "quadratic"
    target = -2.0
    rotated = True
    description = (
        f"A quadratic of {SIDE**2} variables, a {SIDE} × {SIDE} matrix, whose curvatures fall from 1 to "
        f"{1 / CONDITION:g} by equal ratios (condition number {CONDITION:g}), along directions that are drawn at "
        f"random (seed {SHAPE_SEED}), as is its optimum; no noise. A seed draws the start (256 weights "
        "in a matrix, 0 biases)"
    )

    def build(self) -> nn.Module:
        """The function, started at a standard Gaussian point."""
        return Bowl(self.rotated)


class QuadraticAxes(Quadratic):
    """The same with Q = 1: what methods that take every coordinate for itself can make use of."""

    name = "quadratic-axes"
    rotated = False
    description = (
        f"The quadratic of the task “{Quadratic.name}” turned so that its {SIDE**2} curvatures lie along the "
        "coordinate axes (256 weights in a matrix, 0 biases)"
    )


class Bowl(Function):
    """The residuals Λ^½Qᵀ(w − w⋆)."""

    root: Tensor

    def __init__(self, rotated: bool) -> None:
        optimum, root = _shape(rotated)
        super().__init__(optimum)
        self.register_buffer("root", root, persistent=False)
        nn.init.normal_(self.matrix.weight)

    def residuals(self, w: Tensor) -> Tensor:
        """The distance is taken first: near the optimum nothing is lost to cancellation."""
        return self.root @ (w - self.optimum.flatten())


@cache
def _shape(rotated: bool) -> tuple[Tensor, Tensor]:
    """w⋆ [SIDE, SIDE] and Λ^½Qᵀ."""
    draws, size = torch.Generator().manual_seed(SHAPE_SEED), SIDE**2
    optimum = torch.randn(SIDE, SIDE, generator=draws)
    root = torch.logspace(0, -math.log10(CONDITION) / 2, size, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(size, size, generator=draws, dtype=torch.float64)).Q
    return optimum, (root[:, None] * turn.T if rotated else root.diag()).float()
