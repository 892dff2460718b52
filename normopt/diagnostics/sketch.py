"""A seeded sketch of long vectors, short enough to keep one a step, whose error has a stated bound."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

MIXED = 64  # coordinates that are mixed with each other
SMALLEST, LARGEST = 64, 16384  # buckets, signs included, are counted in 16 bits
# In standard deviations. A Gaussian error would need 1.96; that of a vector with few entries comes in lumps.
WIDTH = 2.25


class Sketch:
    """A sparse random projection S of vectors in pieces, one a device, to k numbers: CountSketch after a rotation.

    ::

        x̃ = HΔx, 64 coordinates far apart at a time          H Hadamard's matrix/8, Δ 64 random signs
        (Sx)_j = Σ_i s(i)·x̃_i over all i with h(i) = j       j = 1 … k

    Each mixed coordinate i goes to one random bucket h with a random sign s. S is linear, and ⟨Sx, Sy⟩ has the mean
    ⟨x, y⟩ and the variance::

        (‖x‖²‖y‖² + ⟨x,y⟩² − 2Σx̃_i²ỹ_i²)/k

    Mixing is a rotation, and so changes no inner product. It is there for vectors with few entries: a CountSketch
    errs where entries collide, and without it one collision of two of 20 equal entries would move a
    cosine by .05 or more, though seldom. Dropping the last term, which no sketch knows, and to first order
    in 1/√k, the standard deviations are at most::

        ‖Sx‖                                relative     √(1/2k)
        cos(Sx, Sy)                         absolute     (1 − c²)/√k
        ‖x‖·‖Sy‖·cos(Sx, Sy) for ⟨x, y⟩     absolute     ‖x‖·‖y‖·√((1 − c²/2)/k)       c = cos(x, y)

    An interval of 95 % is 2.25 of them to each side: 3.5 % of a distance and ±.05 of a cosine at k = 2048. For a
    Gaussian error that is 97.6 %; the slack is for vectors of fewer than about 64 entries.

    Args:
        sizes: how many coordinates each piece has.
        k: the sketch's size, from 64 to 16,384.
        seed: of signs and buckets, which are drawn on the CPU: equal seeds and sizes sketch equally everywhere.
        devices: where each piece is.

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
        self.mix = _hadamard(MIXED) * signs / math.sqrt(MIXED)  # a sum of 64 terms ±1/8: exact but for roundoff
        self.places: list[Tensor] = []
        for n, device in zip(sizes, devices, strict=True):
            # Twice as many places as buckets: the upper half is subtracted, which spares a multiplication by signs.
            shape = (n + -n % MIXED,)
            places = torch.randint(2 * k, shape, generator=generator, dtype=torch.int16, device="cpu")
            self.places.append(places.to(device))

    def __call__(self, pieces: Sequence[Tensor]) -> Tensor:
        """S of the vector: k numbers, on the device and in the dtype of its first piece; waits for no device."""
        home = pieces[0]
        total = home.new_zeros(2 * self.k)
        for piece, places in zip(pieces, self.places, strict=True):
            with torch.autocast(piece.device.type, enabled=False):
                # Coordinates that are mixed are a 64th of the vector apart: neighbours often move together.
                columns = torch.nn.functional.pad(piece, (0, -len(piece) % MIXED)).reshape(MIXED, -1)
                mixed = (self.mix.to(piece) @ columns).flatten()
            total += piece.new_zeros(2 * self.k).index_add_(0, places.int(), mixed).to(home)
        return total[: self.k] - total[self.k :]


def _hadamard(n: int) -> Tensor:
    """The matrix of ±1 with orthogonal rows, for n a power of two."""
    if n == 1:
        return torch.ones(1, 1, device="cpu")
    half = _hadamard(n // 2)
    return torch.cat([torch.cat([half, half], 1), torch.cat([half, -half], 1)])


def check_size(k: object) -> None:
    """Raise unless a sketch can have this size."""
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"sketch must be an integer, but is {k!r} ({type(k).__name__})")
    if not SMALLEST <= k <= LARGEST:
        raise ValueError(f"sketch must lie in [{SMALLEST}, {LARGEST}], but is {k}: 2048 keeps cosines within ±.05")


def distance_half(k: int) -> float:
    """Half of the 95 % interval of a distance, relative to it."""
    return WIDTH * math.sqrt(1 / (2 * k))


def cosine_half(k: int, cosine: NDArray[np.float64]) -> NDArray[np.float64]:
    """Half of the 95 % interval of a cosine, absolute."""
    return WIDTH * (1 - cosine**2) / math.sqrt(k)


def product_half(k: int, cosine: NDArray[np.float64]) -> NDArray[np.float64]:
    """Half of the 95 % interval of ‖x‖·‖Sy‖·cos(Sx, Sy) about ⟨x, y⟩, relative to ‖x‖·‖y‖."""
    return WIDTH * np.sqrt((1 - cosine**2 / 2) / k)
