"""A backend in NumPy, elementwise rules at p = 2 only: what a new one has to provide."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from normopt.kernels.flags import GRADIENT, LINEAR, NEW, OLD, Flags, Numbers
from normopt.kernels.tables import Phase, Tables, nothing


def entries(address: int, count: int) -> np.ndarray:
    return np.ctypeslib.as_array((ctypes.c_float * int(count)).from_address(int(address)))


class Step:
    measured = None

    def __init__(self, flags: Flags, numbers: Numbers, tables: Tables) -> None:
        assert flags.mode == LINEAR
        assert not any((flags.scaled, flags.agr, flags.decay))
        self.flags, self.n, self.tables = flags, Numbers(*map(float, numbers)), tables

    def phases(self) -> list[Phase]:
        return [Phase(nothing, self.update)]

    def update(self, _: Any, __: Any) -> None:
        tables, flags, n = self.tables, self.flags, self.n
        for i, count in enumerate(tables.chunks.sizes):
            w, c = entries(tables.weights[i], count), entries(tables.gradients[i], count).copy()
            if flags.momentum:
                g, m = c, entries(tables.states[i], count)
                c = n.from_old * m * bool(flags.momentum & OLD) + n.from_gradient * g * bool(flags.momentum & GRADIENT)
                m[:] = n.keep * m + (n.first if i in tables.new else n.take) * g
                c = c + n.from_new * m * bool(flags.momentum & NEW)
            w[:] = n.weight_factor * w - n.step_size * c
