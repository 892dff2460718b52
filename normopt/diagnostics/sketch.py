"""Seeded sketches of long vectors, small enough to keep one per step, with a stated error bound."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from normopt._checks import check_integer
from normopt.norms.base import without_autocast

SIDE = 8
MIXED = SIDE**2  # coordinates per rotation block
SMALLEST, LARGEST = 64, 16384  # bucket and sign share an int16
# Half-width in standard deviations. A Gaussian error needs 1.96; vectors with few entries have heavier tails.
WIDTH = 2.25


class Sketch:
    """Sparse random projection S of a vector, split over devices, to k numbers: a rotation, then CountSketch.

    ::

        x̃ = HΔx, 64 coordinates far apart at a time          H Hadamard's matrix/8, Δ 64 random signs
        (Sx)_j = Σ_i s(i)·x̃_i over all i with h(i) = j       j = 1 … k

    Each mixed coordinate i goes to one random bucket h with a random sign s. S is linear, and ⟨Sx, Sy⟩ has the mean
    ⟨x, y⟩ and the variance::

        (‖x‖²‖y‖² + ⟨x,y⟩² − 2Σx̃_i²ỹ_i²)/k

    Mixing is a rotation and preserves inner products. It helps vectors with few entries: a CountSketch errs where
    entries collide, and without mixing one rare collision among 20 equal entries would move a cosine by .05 or more.
    Without the last term, which is unknown, and to first order in 1/√k, the standard deviations are at most::

        ‖Sx‖                                relative     √(1/2k)
        cos(Sx, Sy)                         absolute     (1 − c²)/√k
        ‖x‖·‖Sy‖·cos(Sx, Sy) for ⟨x, y⟩     absolute     ‖x‖·‖y‖·√((1 − c²/2)/k)       c = cos(x, y)

    A 95 % confidence interval is ±2.25 standard deviations: 3.5 % of a distance and ±.05 of a cosine at k = 2048. For
    a Gaussian error that would be 97.6 %; the slack covers vectors of fewer than about 64 entries.

    Args:
        sizes: the number of coordinates of each piece.
        k: the sketch's size, from 64 to 16,384.
        seed: seed of signs and buckets, drawn on the CPU: equal seeds and sizes give equal sketches on all devices.
        devices: the device of each piece.

    Memory per coordinate: 2 bytes, for bucket and sign.

    Source: CountSketch is Charikar, Chen and Farach-Colton 2002; its variance is Lemma 2 of arXiv:0902.2206; the
    other two deviations follow from it by the delta method. Mixing before sampling is Ailon and Chazelle 2006.

    Example:
        >>> sketch = Sketch([1000], k=2048, seed=0, devices=[torch.device("cpu")])
        >>> sketch([torch.ones(1000)]).square().sum()  # about 1000
    """

    def __init__(self, sizes: Sequence[int], k: int, seed: int, devices: Sequence[torch.device]) -> None:
        check_size(k)
        self.k = k
        generator = torch.Generator().manual_seed(seed)
        signs = 2.0 * torch.randint(2, (MIXED,), generator=generator, device="cpu") - 1
        # H is the Kronecker product of two smaller ones: two products of 8 × 8 take half the time of one of 64 × 64.
        butterfly = torch.tensor([[1.0, 1.0], [1.0, -1.0]], device="cpu")
        self.outer = functools.reduce(torch.kron, [butterfly] * int(math.log2(SIDE)))
        self.inner = self.outer * signs.reshape(SIDE, 1, SIDE) / SIDE  # ±1/8 is exact
        self.signed_buckets: list[Tensor] = []
        for n, device in zip(sizes, devices, strict=True):
            # Indices in [0, 2k): the upper half is subtracted at the end, which saves a multiplication by signs.
            shape = (n + -n % MIXED,)
            signed_buckets = torch.randint(2 * k, shape, generator=generator, dtype=torch.int16, device="cpu")
            self.signed_buckets.append(signed_buckets.to(device))

    def __call__(self, pieces: Sequence[Tensor]) -> Tensor:
        """Return the sketch, shape [k], on the device and in the dtype of the first piece, without a host sync."""
        home = pieces[0]
        total = home.new_zeros(2 * self.k)
        for piece, signed_buckets in zip(pieces, self.signed_buckets, strict=True):
            mixed = without_autocast([piece.device.type], self.mixed, piece)
            total += piece.new_zeros(2 * self.k).scatter_add_(0, signed_buckets.long(), mixed).to(home)
        return total[: self.k] - total[self.k :]

    def mixed(self, piece: Tensor) -> Tensor:
        """Return HΔx of a piece x, filled up with zeros to a multiple of 64.

        Coordinates that are 1/64 of the vector apart are mixed, because neighbours are often correlated.
        """
        x = torch.nn.functional.pad(piece, (0, -len(piece) % MIXED)).reshape(SIDE, SIDE, -1)
        return (self.outer.to(x) @ (self.inner.to(x) @ x).reshape(SIDE, -1)).flatten()


def check_size(k: object) -> None:
    """Raise unless k is a valid sketch size."""
    check_integer("sketch", k, SMALLEST, LARGEST)


def distance_half(k: int) -> float:
    """Return half the width of a distance's 95 % confidence interval, relative to the distance."""
    return WIDTH * math.sqrt(1 / (2 * k))


def cosine_half(k: int, cosine: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return half the width of a cosine's 95 % confidence interval."""
    return WIDTH * (1 - cosine**2) / math.sqrt(k)


def product_half(k: int, cosine: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return half the width of the 95 % confidence interval of ⟨x, y⟩ from ‖x‖·‖Sy‖·cos(Sx, Sy), over ‖x‖·‖y‖."""
    return WIDTH * np.sqrt((1 - cosine**2 / 2) / k)
