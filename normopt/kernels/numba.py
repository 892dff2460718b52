"""The fused step's kernels on CPUs, compiled by Numba: AGR's sums, the norms' sums, and the update of every entry.

A kernel is made for one set of `Flags`, which are constants to its compiler. It takes the chunks ``begin`` to ``end``
of its tables and releases the interpreter's lock, so that threads of Python can share the chunks. Sums are kept chunk
by chunk: no result depends on the number of threads.

Arithmetic is in float32; a bfloat16 is the upper half of one. Constants and counters are wrapped in NumPy's types,
because a bare Python number would make everything that it touches 64 bits wide. Compiled functions have no type hints:
the compiler infers their types.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic, overload

from normopt.kernels.compiling import can_cache, compiled
from normopt.kernels.flags import (
    ABOVE,
    BOTH_SIDES,
    GRADIENT,
    KAHAN,
    LINEAR,
    NEW,
    OLD,
    SIGN,
    SQRT,
    SQUARE,
    STOCHASTIC,
    STRAIGHT,
    Flags,
)
from normopt.kernels.tables import CHUNK

Kernel = Callable[..., None]

# Columns of the table of tensors: AGR's four, what |c| is multiplied by and its power too, powers of two for both where
# float32 does not have the number, the gradient's weight in the momentum, whether the decay's factor acts on it, what
# c, √v and the average of differences are multiplied by, whether there is a previous gradient, what of the weight is
# added to u, and what the updated weight is multiplied by.
AGR_SCALE, AGR_TOP, AGR_OTHERS, AGR_INVERSE, SIZE, FACTOR, SHIFT, LIFT, TAKE, WIDE = range(10)
SHARE, ROOT_SHARE, DIFFERENCE_SHARE, BEGUN, INSIDE, STRETCH = range(10, 16)
# Places in the table of the numbers that all tensors share: the gradients' scale, the fields of `Numbers`, and then two
# of `exponent_at`.
UNSCALE, STEP_SIZE, KEEP, _, _, FROM_OLD, FROM_GRADIENT, FROM_NEW, COUPLED, WEIGHT_FACTOR, DECAY_STRENGTH = range(11)
_, EPS, _, METRIC_KEEP, METRIC_TAKE, METRIC_EPS, DIFFERENCE_KEEP, DIFFERENCE_TAKE = range(11, 19)
COUPLING, COUPLING_RATE, EXPONENT, DECAY_EXPONENT = 19, 20, 21, 33


class Exponent(NamedTuple):
    """An exponent for `pow_f32`, in float32.

    Attributes:
        high, low: in two parts, the first of 12 bits, so that its product with a float's own exponent is exact.
        logs: the coefficients of the logarithm's polynomial (`LOGARITHM`), each times the exponent.
        floor, ceiling: up to the one its power is 0, from the other on ∞: it is no normal float32 there.
    """

    high: Any
    low: Any
    logs: tuple[Any, ...]
    floor: Any
    ceiling: Any


# A product and a sum may become one operation; nothing else of floating point is given away, but in sums: their terms
# may be put in another order, once and for all when they are compiled.
EXACT: Any = {"nogil": True, "cache": can_cache(), "error_model": "numpy", "fastmath": {"contract"}}
EXACT |= {"no_cfunc_wrapper": True}  # an entry for C, which nothing calls, takes time to compile
SUMS: Any = {**EXACT, "fastmath": {"contract", "reassoc"}}
INLINE: Any = {**EXACT, "forceinline": True}  # a loop that calls is not vectorized

F, J, U = np.float32, np.int32, np.uint32
ZERO, ONE = F(0), F(1)
NO_BITS, DENORMAL = U(0xFFFFFFFF), U(0x007FFFFF)  # the bits of 0 less 1; those of a denormal less 1 are below
INFINITY, LARGEST, TINY = F(np.inf), F(np.finfo(F).max), F(np.finfo(F).tiny)
LARGEST_BITS, SMALLEST_BITS = J(0x7F7FFFFF), J(1)
NO, YES = J(0), J(1)


def constants(*flags: int) -> Any:
    """Return flags of no literal type: the functions that they are given to are compiled once for all values."""
    return tuple(map(J, flags))


@intrinsic
def pointer(_context: Any, address: Any) -> Any:
    """An address as a pointer that ``carray`` takes."""

    def generate(context: Any, builder: Any, _: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), generate


@intrinsic
def bits_of(_context: Any, x: Any) -> Any:
    """The bits of a float32 as an int32."""
    return types.int32(types.float32), lambda _c, builder, _s, a: builder.bitcast(a[0], ir.IntType(32))


@intrinsic
def float_of(_context: Any, x: Any) -> Any:
    """The float32 of an int32's bits."""
    return types.float32(types.int32), lambda _c, builder, _s, a: builder.bitcast(a[0], ir.FloatType())


def load(x):
    """A stored number as float32."""
    raise NotImplementedError("only compiled code calls this")


@overload(load)
def _load(x):
    if x == types.uint16:
        return lambda x: float_of(J(x) << J(16))
    return lambda x: x


def entries(address, start, n, is_16_bit):
    """The entries of a chunk: n from ``start`` on of the tensor at an address."""
    raise NotImplementedError("only compiled code calls this")


@overload(entries, prefer_literal=True)
def _entries(address, start, n, is_16_bit):
    if is_16_bit.literal_value:
        return lambda address, start, n, is_16_bit: carray(pointer(address + 2 * start), (n,), np.uint16)
    return lambda address, start, n, is_16_bit: carray(pointer(address + 4 * start), (n,), np.float32)


@compiled(**INLINE)
def size_bits(x):
    """The bits of |x|: as integers in the order of the sizes, ∞ and then NaN at the end, of which maxima are fast."""
    return J(bits_of(x) & J(0x7FFFFFFF))


@compiled(**INLINE)
def scale_of(largest):
    """(2^k, 2^−k) near the float of these bits, both within the range of normal numbers."""
    k = min(max(J((largest >> J(23)) - J(127)), J(-126)), J(126))
    return float_of(J(J(k + J(127)) << J(23))), float_of(J(J(J(127) - k) << J(23)))


@compiled(**INLINE)
def scale_guess(a):
    """`scale_of` a first guess, or of 1 if that is 0."""
    return scale_of(bits_of(F(a if a > ZERO else ONE)))


@compiled(**INLINE)
def bfloat16(x):
    """The bits of the nearest bfloat16, ties to even."""
    b = bits_of(x)
    rounded = J(b + J(0x7FFF) + ((b >> J(16)) & J(1))) >> J(16)
    kept = J(b >> J(16)) | J(0x40)  # NaN stays one
    return np.uint16(kept if x != x else rounded)


@compiled(**INLINE)
def bfloat16_at_random(x, counter):
    """The bfloat16 above or below, by chance, so that the mean is x: random bits are added below, then cut off."""
    h = U(counter)
    h = U((h ^ (h >> U(16))) * U(0x7FEB352D))
    h = U((h ^ (h >> U(15))) * U(0x846CA68B))
    noise = J((h ^ (h >> U(16))) & U(0xFFFF))
    up_or_down = np.uint16(J(bits_of(x) + noise) >> J(16))
    return up_or_down if abs(x) < INFINITY else bfloat16(x)


def chebyshev_fit(function: Callable[[Any], Any], low: float, high: float, degree: int) -> list[Any]:
    """The coefficients of a polynomial near a function on an interval, by interpolation at Chebyshev's points."""
    near = np.polynomial.Chebyshev.interpolate(function, degree, domain=[low, high])
    return [F(x) for x in near.convert(kind=np.polynomial.Polynomial, domain=[-1, 1]).coef]


# log₂(1 + f)/f where 1 + f is in [√½, √2), to 1e-7 of the logarithm, and 2^r where r is in [−½, ½], to 1e-7.
LOGARITHM = chebyshev_fit(lambda f: np.log2(1 + f) / f, math.sqrt(0.5) - 1, math.sqrt(2) - 1, 7)
E0, E1, E2, E3, E4, E5 = chebyshev_fit(np.exp2, -0.5, 0.5, 5)
SQRT_HALF = J(0x3F3504F3)
ROUNDS = F(1.5 * 2**23)  # adding and subtracting it rounds to an integer
UP = F(2.0**24)
LEAST, MOST = F(2.0**-30), F(2.0**40)  # a sum between them has lost nothing that counts, and its squares would not


@compiled(**INLINE)
def exponent_at(numbers, i):
    """The `Exponent` that the table of numbers has from place i on: high, low, floor, ceiling and the logarithm's."""
    x = numbers[i : i + 12]
    logs = x[4], x[5], x[6], x[7], x[8], x[9], x[10], x[11]
    return Exponent(x[0], x[1], logs, x[2], x[3])


@compiled(**INLINE)
def pow_f32(a, e, normal, finite):
    """``a^exponent`` for a ≥ 0, to 6e-7 relative, by the `Exponent` e; 0, ∞, NaN and denormals as ``pow`` has them.

    ``normal``: a is no denormal, or the exponent is above 1, so that the power of one is 0. ``finite``: so is a.
    """
    if normal:
        k = J(bits_of(a) - SQRT_HALF) >> J(23)
        f = float_of(J(bits_of(a) - J(k << J(23)))) - ONE
        kf = F(k)
    else:
        small = a < TINY
        b = bits_of(a * UP if small else a)
        k = J(b - SQRT_HALF) >> J(23)
        f = float_of(J(b - J(k << J(23)))) - ONE
        kf = F(J(k - J(24)) if small else k)
    l0, l1, l2, l3, l4, l5, l6, l7 = e.logs
    log = l0 + f * (l1 + f * (l2 + f * (l3 + f * (l4 + f * (l5 + f * (l6 + f * l7))))))
    product = e.high * kf
    rest = e.low * kf + f * log
    n = (product + rest) + ROUNDS  # its lowest bits are an integer's
    r = (product - (n - ROUNDS)) + rest
    y = E0 + r * (E1 + r * (E2 + r * (E3 + r * (E4 + r * E5))))
    y = float_of(J(bits_of(y) + J(bits_of(n) << J(23))))
    y = y if a > e.floor else ZERO
    return y if finite or a < e.ceiling else a + INFINITY


@compiled(**INLINE)
def power(a, mode, e):
    """``a^exponent`` for a ≥ 0; at exponent 0 that of 0 is 0."""
    if mode == SIGN:
        return ONE if a > ZERO else a
    if mode == LINEAR:
        return a
    if mode == SQRT:
        return F(math.sqrt(a))
    if mode == SQUARE:
        return F(a * a)
    return pow_f32(a, e, J(mode == ABOVE), NO)


@compiled(**INLINE)
def signed(a, c):
    """a with the sign of c."""
    return F(math.copysign(a, c))


@compiled(**INLINE)
def gradient_of(g, w, maximize, agr, coupled, numbers):
    """Return the gradient after the stages before the momentum: unscaled, negated, regularized, with coupled decay."""
    unscale, decay, scale, top, rest, inverse = numbers
    x = F(load(g) * unscale)
    if maximize:
        x = -x
    if agr and scale != ZERO:
        # x times the part that the other entries have in Σ|g|. The largest comes apart from the rest, all scaled by
        # a power of two: where x is the largest, their difference is exactly 0.
        x = F(x * (((top - abs(x) * scale) + rest) * inverse))
    if coupled:
        x = F(x + decay * w)
    return x


@compiled(**INLINE)
def momentum_step(m, x, rule, numbers):
    """(c, the new m) of a momentum rule with these bits and coefficients."""
    keep, take, from_old, from_gradient, from_new = numbers
    if rule == 0:
        return x, m
    after = F(keep * m + take * x)
    c = ZERO
    if rule & OLD:
        c = F(from_old * m)
    if rule & GRADIENT:
        c = F(c + from_gradient * x)
    if rule & NEW:
        c = F(c + from_new * after)
    return c, after


@compiled(**INLINE)
def floats(buffers, t, start, n):
    """A chunk's entries of each of the `BUFFERS`."""
    a, b, c, d, e = buffers
    first = entries(a[t], start, n, False), entries(b[t], start, n, False), entries(c[t], start, n, False)
    return *first, entries(d[t], start, n, False), entries(e[t], start, n, False)


@compiled(**INLINE)
def difference_step(differences, previous, i, x, is_known, numbers):
    """(βd of one entry, what the metric sees); d takes in x unless ``is_known``: then it has."""
    beta, take, share, begun = numbers
    d, seen = differences[i], x
    if not is_known:
        change = F(x - previous[i]) if begun != ZERO else ZERO
        d = F(beta * d + take * change)
        seen = F(x + beta * change)
        differences[i], previous[i] = d, x
    return F(F(beta * share) * d), seen


@compiled(**INLINE)
def metric_step(v, largest, i, x, metric_max, is_known, numbers):
    """P = √v̂ + ε of one entry; v takes in x² unless ``is_known``: then it has."""
    keep, take, eps, share = numbers
    square = largest[i] if metric_max and is_known else v[i]
    if not is_known:
        square = F(keep * square + F(take * x) * x)
        v[i] = square
        if metric_max:
            square = largest[i] if largest[i] >= square else square  # a NaN is taken
            largest[i] = square
    return F(F(math.sqrt(square)) * share + eps)


@compiled(**INLINE)
def numbers_of(row, numbers):
    """What the stages before the direction read of a tensor's row and of the numbers that all share, by stages."""
    agr = row[AGR_SCALE], row[AGR_TOP], row[AGR_OTHERS], row[AGR_INVERSE]
    momentum = numbers[KEEP], row[TAKE], numbers[FROM_OLD], numbers[FROM_GRADIENT], numbers[FROM_NEW]
    difference = numbers[DIFFERENCE_KEEP], numbers[DIFFERENCE_TAKE], row[DIFFERENCE_SHARE], row[BEGUN]
    metric = numbers[METRIC_KEEP], numbers[METRIC_TAKE], numbers[METRIC_EPS], row[ROOT_SHARE]
    return (numbers[UNSCALE], numbers[COUPLED], *agr), momentum, row[SHARE], difference, metric


@compiled(**INLINE)
def coordinates(i, w, g, m, kept, numbers, stages, momentum_known, known):
    """(c in the coordinates of the norm, the new m, what the direction is divided by again) of one entry.

    Args:
        i: its place.
        w: its weight.
        g, m, kept: the arrays of the gradient, the momentum and the `BUFFERS`, which are updated.
        numbers: the result of `numbers_of`.
        stages: the flags of the stages before the direction.
        momentum_known, known: whether the momentum, which is c then, and the buffers are updated already.
    """
    rule, maximize, agr, coupled, corrected, differs, metric, metric_max = stages
    of_gradient, of_momentum, share, of_difference, of_metric = numbers
    v, largest, differences, previous, _ = kept
    x = ZERO
    c = m1 = load(m[i]) if rule != 0 else ZERO
    if not momentum_known:
        x = gradient_of(g[i], w, maximize, agr, coupled, of_gradient)
        c, m1 = momentum_step(m1, x, rule, of_momentum)
    if corrected:
        c = F(c * share)
    if differs:
        d, x = difference_step(differences, previous, i, x, known, of_difference)
        c = F(c + d)
    root = ONE
    if metric != 0:
        root = metric_step(v, largest, i, x, metric_max, known, of_metric)
        root = root if metric == STRAIGHT else F(math.sqrt(root))
        c = F(c / root)
    return c, m1, root


def stages_of(f: Flags) -> tuple[Any, ...]:
    """Return the flags of the stages before the direction, in the order of `coordinates`."""
    return constants(f.momentum, f.maximize, f.agr, f.coupled, f.corrected, f.differs, f.metric, f.metric_max)


@compiled(**INLINE)
def direction(c, mode, smoothed, scaled, exponent, eps, shift, size, factor, lift):
    """D(c) of one entry."""
    if smoothed:
        a = F(abs(c) + eps)
        if mode == SIGN:
            return F(c / a)
        return F(c / F(math.sqrt(a))) if mode == SQRT else F(c * pow_f32(a, exponent, NO, NO))
    if scaled:
        u = F(signed(power(F(F(abs(c) * shift) * size), mode, exponent), c) * factor)
        return F(u * lift)
    return signed(power(abs(c), mode, exponent), c)


@compiled(**INLINE)
def decay_factor(a, mode, inverse, decay_strength, e):
    """The factor of ℓp decay for |w| = a."""
    x = power(a, mode, e)
    if inverse and mode == SIGN:
        x = ONE if a == a else a  # 0⁰ = 1
    if inverse:
        return ONE / (ONE + decay_strength * x)
    x = LARGEST if x > LARGEST else x  # ∞/∞ would be NaN; a NaN stays
    return x / (x + decay_strength) if decay_strength != ZERO else ONE


@cache
def factor_kernel(weight16: bool, mode: int, inverse: bool) -> Kernel:
    """Return a kernel of ℓp decay's factor of each weight, in float32."""
    decay_mode, decay_inverse = constants(mode, inverse)

    @compiled(**EXACT)
    def factors(addresses, chunks, begin, end, strength, numbers):
        (weights, results), (tensor, start, count) = addresses, chunks
        exponent = exponent_at(numbers, 0)
        for j in range(begin, end):
            t, s, n = tensor[j], start[j], count[j]
            w, found = entries(weights[t], s, n, weight16), entries(results[t], s, n, False)
            for i in range(n):
                found[i] = decay_factor(abs(load(w[i])), decay_mode, decay_inverse, strength, exponent)

    return factors


@compiled(**INLINE)
def weight(w, k, i, kahan):
    """A weight, with what its rounding has lost."""
    return F(load(w[i]) + load(k[i])) if kahan else load(w[i])


@compiled(**INLINE)
def store(values, i, x, is_16_bit):
    """Write an entry, rounded to nearest."""
    if is_16_bit:
        values[i] = bfloat16(x)
    else:
        values[i] = x


@compiled(**INLINE)
def store_kahan(w, k, i, x):
    """Write a weight, and what its rounding has lost."""
    b = bfloat16(x)
    near = load(b)
    w[i] = b
    k[i] = bfloat16(F(x - near) if abs(near) < INFINITY else ZERO)


@compiled(**INLINE)
def sum_is_safe(total):
    """Return whether a sum of unscaled terms is as accurate as one of scaled terms."""
    return total > F(2.0**-80) and total < F(2.0**100)


@cache
def agr_kernel(gradient16: bool) -> Kernel:
    """Return a kernel that computes each chunk's largest |g| and the sum of the others, which it must not absorb."""

    @compiled(**SUMS)
    def sums(addresses, _, chunks, begin, end, unscale, partials):
        (_, gradients, _, _), (tensor, start, count) = addresses, chunks
        for j in range(begin, end):
            n = count[j]
            g = entries(gradients[tensor[j]], start[j], n, gradient16)
            near, relative = scale_guess(abs(load(g[0]) * unscale))
            largest, total = J(0), ZERO
            for i in range(n):
                a = F(load(g[i]) * unscale)
                largest = max(largest, size_bits(a))
                total += abs(a) * relative
            top = float_of(largest)
            others = F(total - top * relative)
            # A small difference of two sums has the accuracy of neither: then the others are summed by themselves.
            if not (others > top * relative and total > LEAST and total < MOST):
                near, relative = scale_of(largest)
                others, tops = ZERO, J(0)
                for i in range(n):
                    a = abs(F(load(g[i]) * unscale))
                    others += ZERO if a == top else F(a * relative)
                    tops += J(1) if a == top else J(0)
                others = F(others + F(max(tops - J(1), J(0))) * F(top * relative))
            partials[j, 0] = top
            partials[j, 1] = np.float64(others) * near

    return sums


@compiled(**SUMS, forceinline=True)
def summed(n, w, g, m, k, kept, numbers, exponent, powered, near, relative, again, flags):
    """A chunk's (largest entry's bits, least entry's bits less 1, Σ(|c|/M)^q and the three of lengths).

    ``flags`` are those of `norm_kernel`, ``near`` is M and ``relative`` 1/M. If ``again`` it has been here before, and
    no special case is left out.
    """
    stages, (mode, matched, lengths, kahan, momentum_written, powers_cached) = flags
    coupled, metric = stages[3], stages[6]
    relative_power = power(relative, mode, exponent)
    largest, least, sum_q, sum_2, sum_d = J(0), NO_BITS, ZERO, ZERO, ZERO
    wide_2, wide_d, cross = np.float64(0), np.float64(0), np.float64(0)  # the metric's squares are of any size
    for i in range(n):
        old = weight(w, k, i, kahan) if coupled or lengths else ZERO
        c, m1, root = coordinates(i, old, g, m, kept, numbers, stages, momentum_written & again, again)
        if momentum_written and not again:
            m[i] = m1
        a = abs(c)
        if powers_cached:
            y = pow_f32(a, exponent, J(not again), J(not again))
            powered[i] = signed(y, c)
            if again:
                largest = max(largest, size_bits(a))
                a, y = F(a * relative), F(y * relative_power)
            else:
                least = min(least, U(bits_of(a) - J(1)))
        else:
            largest = max(largest, size_bits(c))
            a = F(a / near) if again else F(a * relative)
            y = power(a, mode, exponent)
        sum_q += a * y
        if lengths or (matched and metric != 0):
            if metric == BOTH_SIDES:
                a, y = F(a / root), F(y / root)
            b = old if lengths else a
            wide_2 += np.float64(b) * b
            wide_d += np.float64(y) * y
            if lengths:
                cross += np.float64(signed(y, c)) * old
        elif matched:
            sum_2 += a * a
            sum_d += y * y
    return largest, least, sum_q, sum_2 + wide_2, sum_d + wide_d, cross


@cache
def norm_kernel(f: Flags, momentum_written: bool, powers_cached: bool) -> Kernel:
    """Return a kernel for each chunk's Σ(|c|/M)^q, and for "matched" Σ(|c|/M)² and Σ(|c|/M)^(2·exponent).

    Where u gets a weight's length they are Σ(|w|/M)², the same as before, and Σ sign(c)(|c|/M)^exponent·w.
    M is a power of two, so that no quotient is rounded, or max |c|: at p near 1 the power of what is above 1 overflows.
    If ``momentum_written``, the momentum is c and is stored already here; if ``powers_cached``, so is
    sign(c)·|c|^exponent, which the update then reads.
    """
    weight16, gradient16, state16 = (d == torch.bfloat16 for d in (f.weight, f.gradient, f.state))
    matched, kahan = f.matched, f.rounding == KAHAN
    metric, lengths = f.metric, f.lengths
    flags = stages_of(f), constants(f.mode, matched, lengths, kahan, momentum_written, powers_cached)

    @compiled(**SUMS)
    def sums(addresses, buffers, chunks, begin, end, rows, numbers, partials, powers, place):
        (weights, gradients, states, lost), (tensor, start, count) = addresses, chunks
        exponent = exponent_at(numbers, EXPONENT)
        for j in range(begin, end):
            t, s, n = tensor[j], start[j], count[j]
            known = numbers_of(rows[t], numbers)
            w, g = entries(weights[t], s, n, weight16), entries(gradients[t], s, n, gradient16)
            m, k, kept = entries(states[t], s, n, state16), entries(lost[t], s, n, True), floats(buffers, t, s, n)
            powered = powers[place[j] : place[j] + n] if powers_cached else powers
            # By a guess of the size, or unscaled where the powers are kept. Where a sum or an entry shows that this was
            # wrong, once more with the largest entry's.
            near, relative = ONE, ONE
            if not powers_cached:
                guess = abs(load(g[0]) * numbers[UNSCALE])
                if metric != 0:
                    v = numbers[METRIC_KEEP] * kept[0][0] + numbers[METRIC_TAKE] * guess * guess
                    root = F(math.sqrt(v) + numbers[METRIC_EPS])
                    guess = guess / (root if metric == STRAIGHT else F(math.sqrt(root)))
                near, relative = scale_guess(guess * rows[t, TAKE])
            largest, least, sum_q, sum_2, sum_d, cross = summed(
                n, w, g, m, k, kept, known, exponent, powered, near, relative, NO, flags
            )
            if powers_cached:
                fine = least == NO_BITS or (least >= DENORMAL and sum_is_safe(sum_q))
                if matched and metric == 0 and least != NO_BITS:
                    fine = fine and sum_is_safe(sum_2) and sum_is_safe(sum_d)
            else:
                fine = sum_q > LEAST and sum_q < MOST
            if not fine:
                if powers_cached:
                    largest = summed(n, w, g, m, k, kept, known, exponent, powered, near, relative, YES, flags)[0]
                    near, relative = scale_of(largest)
                else:
                    near = float_of(min(max(largest, SMALLEST_BITS), LARGEST_BITS))
                _, _, sum_q, sum_2, sum_d, cross = summed(
                    n, w, g, m, k, kept, known, exponent, powered, near, relative, YES, flags
                )
            partials[j, 0] = near
            partials[j, 1] = sum_q
            partials[j, 2] = sum_2 / (np.float64(near) * near) if lengths else sum_2
            partials[j, 3] = sum_d
            partials[j, 4] = cross

    return sums


@cache
def update_kernel(f: Flags, momentum_written: bool, powers_cached: bool) -> Kernel:
    """Return a kernel of the whole step, entry by entry: gradient, momentum, direction, decay, write.

    If ``momentum_written``, c is the momentum; if ``powers_cached``, its powers are given.
    """
    weight16, gradient16, state16 = (d == torch.bfloat16 for d in (f.weight, f.gradient, f.state))
    stages, (kahan, momentum_known) = stages_of(f), constants(f.rounding == KAHAN, momentum_written)
    mode, smoothed, scaled, decay_mode, decay_inverse = constants(
        f.mode, f.smoothed, f.sums, f.decay_mode, f.decay_inverse
    )
    scales_weight, decays, stochastic, chunk = f.scales_weight, f.decay, f.rounding == STOCHASTIC, CHUNK
    rule, metric, inside, cautious = f.momentum, f.metric, f.inside, f.cautious
    coupling, sphere = f.coupling, f.sphere

    @compiled(**EXACT)
    def update(addresses, buffers, chunks, begin, end, rows, numbers, seed, powers, place):
        (weights, gradients, states, lost), (tensor, start, count) = addresses, chunks
        exponent, decay_exponent = exponent_at(numbers, EXPONENT), exponent_at(numbers, DECAY_EXPONENT)
        eps, tau, alpha = numbers[EPS], numbers[COUPLING], numbers[COUPLING_RATE]
        step_size, weight_factor, decay_strength = numbers[STEP_SIZE], numbers[WEIGHT_FACTOR], numbers[DECAY_STRENGTH]
        for j in range(begin, end):
            t, s, n = tensor[j], start[j], count[j]
            known = numbers_of(rows[t], numbers)
            size, factor, shift, lift = rows[t, SIZE], rows[t, FACTOR], rows[t, SHIFT], rows[t, LIFT]
            pulled = decay_strength if rows[t, WIDE] != ZERO else ZERO
            w, g = entries(weights[t], s, n, weight16), entries(gradients[t], s, n, gradient16)
            m, k, kept = entries(states[t], s, n, state16), entries(lost[t], s, n, True), floats(buffers, t, s, n)
            z, added, stretch = kept[4], rows[t, INSIDE], rows[t, STRETCH]
            powered = powers[place[j] : place[j] + n] if powers_cached else powers
            drawn = J(seed + j * chunk)
            for i in range(n):
                old = weight(w, k, i, kahan)
                c, m1, root = coordinates(i, old, g, m, kept, known, stages, momentum_known, scaled)
                if powers_cached:
                    u = F(powered[i] * factor)
                else:
                    u = direction(c, mode, smoothed, scaled, exponent, eps, shift, size, factor, lift)
                if metric == BOTH_SIDES:
                    u = F(u / root)
                if inside:
                    u = F(u + added * old)
                if coupling:
                    u = F((ONE - tau) * u)
                # By signs, because a product may underflow.
                aligned = not (cautious and ((u > ZERO and old < ZERO) or (u < ZERO and old > ZERO)))
                after = F((weight_factor * old if scales_weight and aligned else old) - step_size * u)
                if decays:
                    pull = decay_factor(abs(old), decay_mode, decay_inverse, pulled, decay_exponent)
                    after = F(after * pull) if aligned else after
                if coupling:
                    z1 = F(z[i] - alpha * c)
                    z[i] = z1
                    after = F(after + tau * F(z1 - old))
                if sphere:
                    after = F(after * stretch)
                if rule != 0 and not momentum_written:
                    store(m, i, m1, state16)
                if stochastic:
                    w[i] = bfloat16_at_random(after, J(drawn + J(i)))
                elif kahan:
                    store_kahan(w, k, i, after)
                else:
                    store(w, i, after, weight16)

    return update
