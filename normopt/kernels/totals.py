"""What a tensor's chunks add up to, on CPUs: AGR's row of a tensor, its dual norm, and the factor of its direction.

Compiled by Numba, because between two passes over memory nothing should wait for Python. Sums are in float64 and in
the order of the chunks. As in `numba.py`, compiled functions have no type hints.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from normopt.kernels.numba import AGR_INVERSE, AGR_OTHERS, AGR_SCALE, AGR_TOP, FACTOR, SIZE

OPTIONS = {"nogil": True, "cache": True, "error_model": "numpy"}
DUAL, UNIT, MATCHED = range(3)  # the scales that need sums
TINY = float(np.finfo(np.float32).tiny)


@njit(**OPTIONS)
def regularizers(partials, sizes, first, ends, begin, end, rows):
    """AGR's columns of the tensors ``begin`` to ``end``: (scale, largest, others, 1/sum) of |g|, the last three scaled.

    The scale is a power of two, so that no sum overflows and none is lost below the smallest float32; it is 0 where
    AGR leaves a tensor alone. ``partials`` has each chunk's largest |g| and the sum of its others.
    """
    for t in range(begin, end):
        top = 0.0
        for j in range(first[t], ends[t]):
            if top == top and not partials[j, 0] <= top:  # a NaN is taken, and stays
                top = partials[j, 0]
        others, found = 0.0, False
        for j in range(first[t], ends[t]):
            others += partials[j, 1]
            if partials[j, 0] == top and not found:
                found = True
            else:
                others += partials[j, 0]
        total = top + others
        scale = 1.0
        if np.isfinite(total):
            scale = math.ldexp(1.0, -min(max(math.frexp(total)[1], -126), 126))
        rows[t, AGR_SCALE] = scale if sizes[t] > 1 and total != 0 else 0
        rows[t, AGR_TOP] = top * scale
        rows[t, AGR_OTHERS] = others * scale
        rows[t, AGR_INVERSE] = 1 / (total * scale)


@njit(**OPTIONS)
def duals(partials, first, ends, begin, end, whole_group, exponent, scale, spared, rows, norms, factors):
    """The dual norm of the tensors ``begin`` to ``end``, by what their D(c) is multiplied, and both in ``rows``.

    ``partials`` has each chunk's M, Σ(|c|/M)^q, and for "matched" Σ(|c|/M)² and Σ(|c|/M)^(2·exponent). If
    ``whole_group`` all of them are one vector; if ``spared`` the powers at hand are those of |c|, not of |c|/‖c‖⋆.
    """
    for t in range(begin, end):
        if t > begin and whole_group:
            norms[t], factors[t] = norms[begin], factors[begin]
        else:
            some, past = (first[begin], ends[end - 1]) if whole_group else (first[t], ends[t])
            norms[t], factors[t] = summed(partials, some, past, exponent, scale)
        size = norms[t] if not norms[t] < TINY else TINY  # NaN stays
        rows[t, SIZE] = 1 / size
        rows[t, FACTOR] = factors[t] / size**exponent if spared else factors[t]


@njit(**OPTIONS)
def summed(partials, first, end, exponent, scale):
    """(‖c‖⋆, the factor) of the chunks ``first`` to ``end``."""
    top = 0.0
    for j in range(first, end):
        top = max(top, partials[j, 0])  # a power of two, never NaN
    q = 1 + exponent
    total = 0.0
    for j in range(first, end):
        total += partials[j, 1] * (partials[j, 0] / top) ** q
    norm = top * total ** (1 / q)
    if scale == DUAL:
        return norm, norm
    if scale == UNIT:
        return norm, 1.0
    if not norm > 0:
        return norm, norm
    squares, powers = 0.0, 0.0
    for j in range(first, end):
        ratio = partials[j, 0] / top
        squares += partials[j, 2] * ratio**2
        powers += partials[j, 3] * ratio ** (2 * exponent)
    length = (top / norm) ** exponent * math.sqrt(powers)
    return norm, top * math.sqrt(squares) / (length if length > 0 else 1.0)
