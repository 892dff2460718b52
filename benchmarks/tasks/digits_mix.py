"""The digits again, through one layer of every kind: what a preset of norms has to tell apart."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import relu

from benchmarks.tasks.base import Splits
from benchmarks.tasks.common import Classification
from benchmarks.tasks.digits import Digits

LEVELS = 17  # pixels are 0 … 16


class DigitsMix(Classification):
    """Grey levels through an embedding, two convolutions, two kinds of normalisation, linear layers, and biases."""

    name = "digits-mix"
    epochs, batch_size = 12, 64
    target = 0.95
    description = (
        f"scikit-learn's handwritten digits, split as in the task “{Digits.name}”, each pixel one of {LEVELS} grey "
        "levels; a network of one layer of every kind: embedding (8 features a level), convolution 8 → 16, GroupNorm, "
        "convolution 16 → 32 of stride 2, linear 512 → 64, LayerNorm, linear 64 → 10, with ReLU between and biases "
        "in all, PyTorch's own initialisation (39,304 weights in matrices and kernels, 282 in biases and gains), "
        "cross-entropy"
    )

    def load(self) -> Splits:
        """The splits of the digits, the pixels as whole numbers."""
        return Digits().load().each(lambda data: ((data[0] * (LEVELS - 1)).long().view(-1, 8, 8), data[1]))

    def build(self) -> nn.Module:
        """The network."""
        return Mix()


class Mix(nn.Module):
    """Pixels [batch, 8, 8] → logits [batch, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(LEVELS, 8)
        self.conv1 = nn.Conv2d(8, 16, 3, padding=1)
        self.norm1 = nn.GroupNorm(4, 16)
        self.conv2 = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.linear = nn.Linear(512, 64)
        self.norm2 = nn.LayerNorm(64)
        self.head = nn.Linear(64, 10)

    def forward(self, pixels: Tensor) -> Tensor:
        """Channels come last out of the embedding, and first into the convolution."""
        x = self.embedding(pixels).permute(0, 3, 1, 2)
        x = relu(self.norm1(self.conv1(x)))
        x = relu(self.conv2(x)).flatten(1)
        x = relu(self.norm2(self.linear(x)))
        logits: Tensor = self.head(x)
        return logits
