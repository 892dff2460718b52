"""Reduce the sums of a tensor's chunks, on CPUs: to AGR's row of a tensor, its dual norm, and its direction's factor.

Compiled by Numba, because between two passes over memory nothing should wait for Python. Sums are in float64 and in
the order of the chunks. As in `numba.py`, compiled functions have no type hints.
"""

from __future__ import annotations

import math

import numpy as np

from normopt.kernels import numba as kernels
from normopt.kernels.compiling import compiled

OPTIONS = {key: kernels.EXACT[key] for key in ("nogil", "cache", "error_model")}
DUAL, UNIT, MATCHED, POWER = range(4)  # scales
NO_LENGTH, RELATIVE, SPHERE = range(3)  # what a direction is rescaled to
TINY, LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


@compiled(**OPTIONS)
def regularizers(partials, sizes, first, ends, begin, end, rows):
    """AGR's columns of the tensors ``begin`` to ``end``: (scale, largest, others, 1/sum) of |g|, the last three scaled.

    The scale is a power of two, so that no sum overflows and none is lost below the smallest float32; it is 0 where
    AGR leaves a tensor alone. ``partials`` has each chunk's largest |g| and the sum of its others.
    """
    for t in range(begin, end):
        top, others = largest(partials, first[t], ends[t])
        total = top + others
        scale = 1.0
        if np.isfinite(total):
            scale = math.ldexp(1.0, -min(max(math.frexp(total)[1], -126), 126))
        rows[t, kernels.AGR_SCALE] = scale if sizes[t] > 1 and total != 0 else 0
        rows[t, kernels.AGR_TOP] = top * scale
        rows[t, kernels.AGR_OTHERS] = others * scale
        rows[t, kernels.AGR_INVERSE] = 1 / (total * scale)


@compiled(**OPTIONS)
def largest(partials, first, end):
    """The largest entry of the pieces ``first`` to ``end``, and the sum of all others."""
    top = 0.0
    for j in range(first, end):
        if top == top and not partials[j, 0] <= top:  # a NaN is taken, and stays
            top = partials[j, 0]
    others, found = 0.0, False
    for j in range(first, end):
        others += partials[j, 1]
        if partials[j, 0] == top and not found:
            found = True
        else:
            others += partials[j, 0]
    return top, others


@compiled(**OPTIONS)
def largest_of_each(partials, first, ends, found):
    """Write the result of `largest` for each tensor's chunks to ``found``, shape [n, 2]."""
    for t in range(len(first)):
        found[t, 0], found[t, 1] = largest(partials, first[t], ends[t])


@compiled(**OPTIONS)
def duals(partials, first, ends, begin, end, exponent, scale, powers_cached, how, rows, norms, factors, radii):
    """The dual norm of the tensors ``begin`` to ``end``, by what their D(c) is multiplied, and both in ``rows``.

    Returns whether the cached powers, if there are any, can be used for all of them: they are those of |c|, not of
    |c|/‖c‖⋆, and may be out of range where the norm is no normal float32.

    Args:
        partials: what `norm_kernel` writes of each chunk.
        how: what the direction is rescaled to, the decay inside it, and the step size.
        radii: of the spheres; one that is NaN is measured, and written.
    """
    for t in range(begin, end):
        piece = merged(partials, first[t], ends[t], exponent, scale == MATCHED or how[0] != NO_LENGTH)
        norms[t], factors[t] = summed(piece, exponent, scale)
        if how[0] != NO_LENGTH:
            factors[t], rows[t, kernels.INSIDE], rows[t, kernels.STRETCH] = rescaled(
                piece, norms[t], exponent, scale, how, radii, t
            )
        powers_cached = powers_cached and within(norms[t]) == 1
    for t in range(begin, end):
        # Signs do not depend on the size: beside an infinite entry the others keep theirs.
        size = 1.0 if exponent == 0 or norms[t] == 0 else norms[t]
        factor = factors[t] / size**exponent if powers_cached else factors[t]
        rows[t, kernels.SHIFT] = within(size)
        rows[t, kernels.SIZE] = 1 / (size * within(size))
        rows[t, kernels.FACTOR] = factor * within(factor)
        rows[t, kernels.LIFT] = 1 / within(factor)
    return powers_cached


@compiled(**OPTIONS)
def within(x):
    """A power of two by which x > 0 becomes a normal float32; 1 for one, and for 0, ∞ and NaN."""
    if 0 < x < TINY:
        return 2.0**64
    return 2.0**-64 if LARGEST < x < np.inf else 1.0


@compiled(**OPTIONS)
def summed(piece, exponent, scale):
    """(‖c‖⋆, the factor), from the result of `merged`."""
    top, total, squares, powers, _ = piece
    norm = top * total ** (1 / (1 + exponent))
    if scale == DUAL:
        return norm, norm
    if scale == UNIT:
        return norm, 1.0
    if not norm > 0:
        return norm, norm
    length = (top / norm) ** exponent * math.sqrt(powers)
    return norm, top * math.sqrt(squares) / (length if length > 0 else 1.0)


@compiled(**OPTIONS)
def rescaled(piece, norm, exponent, scale, how, radii, t):
    """(the factor of D(c), of the weight in u, of the updated weight) of tensor t, whose u gets another length."""
    top, _, squares, powers, cross = piece
    length, decay, step_size = how
    w = top * math.sqrt(squares)
    unit = (top / norm) ** exponent if norm > 0 else norm  # of D(c), which is 0 where c is
    factor = norm if scale == DUAL else norm**exponent if scale == POWER else 1.0
    product = factor * unit * cross
    square = (factor * unit) ** 2 * powers + 2 * decay * product + (decay * w) ** 2
    own = 0.0 if square < 0 else math.sqrt(square)
    goal = own if w == 0 else w
    if length == SPHERE:
        goal = radii[t] = goal if np.isnan(radii[t]) else radii[t]
    ratio = goal / own if own > 0 else own
    if length != SPHERE:
        return factor * ratio, decay * ratio, 1.0
    step = step_size * ratio
    after = w**2 - 2 * step * (product + decay * w**2) + (step * own) ** 2  # ‖w − ηru‖²
    return factor * ratio, decay * ratio, goal / math.sqrt(after) if after > 0 else after * 0


@compiled(**OPTIONS)
def merged(partials, first, end, exponent, more):
    """M and the sums relative to it of the pieces ``first`` to ``end``; only the first one unless ``more``."""
    top = 0.0
    for j in range(first, end):
        top = max(top, partials[j, 0])  # a power of two, never NaN
    total, squares, powers, cross = 0.0, 0.0, 0.0, 0.0
    for j in range(first, end):
        ratio = partials[j, 0] / top
        total += partials[j, 1] * ratio ** (1 + exponent)
        if more:
            squares += partials[j, 2] * ratio**2
            powers += partials[j, 3] * ratio ** (2 * exponent)
            cross += partials[j, 4] * ratio**exponent
    return top, total, squares, powers, cross


@compiled(**OPTIONS)
def merge_each(partials, first, ends, exponent, more, found):
    """Write the result of `merged` for each tensor's chunks to ``found``, shape [n, 5]."""
    for t in range(len(first)):
        found[t, 0], found[t, 1], found[t, 2], found[t, 3], found[t, 4] = merged(
            partials, first[t], ends[t], exponent, more
        )
