# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"
"""The barest loop of a step with momentum, compiled by Numba: the kernel of the limit of a CPU."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
from numba import carray, njit

from normopt.kernels.numba import EXACT, bfloat16, load, pointer

MU, NEW, LR = np.float32(0.9), np.float32(0.1), np.float32(1e-8)


@cache
def kernel(low: bool) -> Callable[..., None]:
    """The loop over chunks of tensors, whose addresses it is given, in bfloat16 or in float32."""

    @njit(**EXACT)
    def loop(weights, gradients, momenta, tensor, start, count, begin, end):
        for j in range(begin, end):
            t, s, n = tensor[j], start[j], count[j]
            if low:
                w = carray(pointer(weights[t] + 2 * s), (n,), np.uint16)
                g = carray(pointer(gradients[t] + 2 * s), (n,), np.uint16)
                m = carray(pointer(momenta[t] + 2 * s), (n,), np.uint16)
            else:
                w = carray(pointer(weights[t] + 4 * s), (n,), np.float32)
                g = carray(pointer(gradients[t] + 4 * s), (n,), np.float32)
                m = carray(pointer(momenta[t] + 4 * s), (n,), np.float32)
            for i in range(n):
                c = np.float32(MU * load(m[i]) + NEW * load(g[i]))
                after = np.float32(load(w[i]) - LR * c)
                if low:
                    m[i], w[i] = bfloat16(c), bfloat16(after)
                else:
                    m[i], w[i] = c, after

    compiled: Callable[..., None] = loop
    return compiled
