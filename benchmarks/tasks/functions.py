"""Functions whose optimum is known, as tasks: there is nothing to generalise to, only a way down."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from benchmarks.tasks.base import Splits
from benchmarks.tasks.common import Plain

STEPS = 50  # an epoch, without noise: every batch is the same
FLOOR = 1e-16  # of the gap, whose logarithm is taken: float32 gets no nearer


class KnownOptimum(Plain):
    """f(w) = ½‖r(w)‖², the same in training, validation and test; a seed draws where it starts."""

    epochs, batch_size = 20, 1
    score_name = "log₁₀ gap"
    higher_is_better = False
    residual_depth: int | None = 1  # one layer, which need not be traced

    def load(self) -> Splits:
        """Inputs that nothing reads: STEPS of them an epoch."""
        nothing = (torch.zeros(1, 1), torch.zeros(1, 1))
        return Splits(train=(torch.zeros(STEPS, 1), torch.zeros(STEPS, 1)), validation=nothing, test=nothing)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """f; its least value is 0."""
        return outputs.square().sum(-1).mean() / 2

    def score(self, outputs: Tensor, targets: Tensor) -> float:
        """log₁₀ of how far f is above its least value."""
        return math.log10(max(float(self.loss(outputs, targets)), FLOOR))

    def measures(self, model: nn.Module) -> Mapping[str, float]:
        """How far the weights are from the optimum."""
        w, best = model.get_parameter("matrix.weight").detach(), model.get_buffer("optimum")
        return {"distance": float((w - best).norm())}


class Function(nn.Module):
    """A matrix of weights with a known optimum; subclasses say what the residuals are.

    The weights are a linear layer's, so that an optimizer with norms of matrices takes them for one.
    """

    optimum: Tensor

    def __init__(self, optimum: Tensor) -> None:
        super().__init__()
        rows, columns = optimum.shape
        self.matrix = nn.Linear(columns, rows, bias=False)
        self.register_buffer("optimum", optimum, persistent=False)

    def residuals(self, w: Tensor) -> Tensor:
        """r of the weights, flattened."""
        raise NotImplementedError

    def forward(self, inputs: Tensor) -> Tensor:
        """r, once for every input."""
        return self.residuals(self.matrix.weight.flatten()).expand(len(inputs), -1)
