"""Malignant or benign, from 30 measurements of cell nuclei: a small real table, and a convex problem."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from benchmarks.tasks.base import Splits
from benchmarks.tasks.common import SPLIT_SEED, Plain, split, standardised


class BreastCancer(Plain):
    """Logistic regression, split 60/20/20 by class."""

    name = "breast-cancer"
    epochs, batch_size = 25, 32
    score_name = "accuracy"
    higher_is_better = True
    target = 0.97
    description = (
        "scikit-learn's breast cancer table (569 patients, 30 features), split 60/20/20 into training, validation and "
        f"test with the classes balanced (split seed {SPLIT_SEED}), features standardised by the training data; "
        "logistic regression from PyTorch's own initialisation (30 weights in a matrix, 1 bias), cross-entropy in nats"
    )

    def load(self) -> Splits:
        """The three splits, read once a process."""
        return _load()

    def build(self) -> nn.Module:
        """One linear layer."""
        return nn.Linear(30, 1)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The mean cross-entropy, in nats."""
        return binary_cross_entropy_with_logits(outputs.squeeze(-1), targets)

    def score(self, outputs: Tensor, targets: Tensor) -> float:
        """The part that is on its right side of 0."""
        return int(((outputs.squeeze(-1) > 0) == (targets > 0.5)).sum()) / targets.numel()


@cache
def _load() -> Splits:
    from sklearn.datasets import load_breast_cancer  # as in `split`

    features, benign = load_breast_cancer(return_X_y=True)
    return standardised(split(features, benign, torch.float32, by_class=True))
