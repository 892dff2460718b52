# mypy: disable-error-code="no-untyped-def, untyped-decorator"
"""The fused kernels on CUDA, compiled by Triton: AGR's sums, the norms' sums, and the update, over tables of tensors.

One program works on one chunk of one tensor, whose address it finds in a table. A sum over a tensor is kept chunk by
chunk; those of groups of chunks are added by a program each, and theirs by one for each tensor. There are no atomics,
and every step is repeated bit by bit. A step is one launch; AGR adds two, and so does a norm over tensors, and where a
tensor is larger than a group, three. The launch for the norm stores the momentum where that is c, and the update reads
it instead of the gradient: with "dual" a step moves 24 bytes an entry, 28 with AGR.

Nothing is read on the host, and a number that changes from step to step recompiles nothing: numbers come to the kernels
in a table too. A table is replaced when its contents change and never overwritten, so that a captured graph,
which keeps its own, stays valid whatever is stepped between its replays.

Arithmetic on entries is in float32, in sums too: those of a chunk are added in trees, 23 roundings in a row at most.
Only what there is one of for a chunk or for a tensor is in float64. Roots and powers are not left to the hardware's
approximations, and divisions only where that is harmless.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from normopt.kernels import flags as choices
from normopt.kernels.flags import Flags, Numbers
from normopt.kernels.tables import CHUNK, Array, Chunks, Phase, Tables, nothing
from normopt.sharding.layout import Layout

BLOCK = tl.constexpr(CHUNK)  # entries of a chunk, the last one of a tensor excepted
SUMMED = tl.constexpr(128)  # chunks whose sums are added at once
OPTIONS = {"num_warps": 8, "enable_fp_fusion": True}
FEW = OPTIONS | {"num_warps": 1}  # for kernels in which every thread does the same for the most part

# A kernel may read no global but a constant of Triton's.
SIGN, LINEAR, SQRT, SQUARE = (tl.constexpr(x) for x in (choices.SIGN, choices.LINEAR, choices.SQRT, choices.SQUARE))
STOCHASTIC, KAHAN = tl.constexpr(choices.STOCHASTIC), tl.constexpr(choices.KAHAN)
STRAIGHT, BOTH_SIDES = tl.constexpr(choices.STRAIGHT), tl.constexpr(choices.BOTH_SIDES)
INFINITY = tl.constexpr(math.inf)
LARGEST, TINY = tl.constexpr(float(np.finfo(np.float32).max)), tl.constexpr(float(np.finfo(np.float32).tiny))
SMALLEST = tl.constexpr(2.0**-149)  # above 0

# The bits of FLAGS: four of the momentum rule, the switches of a step, and two more. A kernel asks for one by
# ``BIT & FLAGS``, in this order: in Triton's interpreter FLAGS is an int, which does not know the constants' operators.
# They are not a NamedTuple, because the Triton of PyTorch 2.6 and 2.7 finds no attributes in a constant.
RUNS, OLD, GRADIENT_NOW, NEW = (tl.constexpr(x) for x in (choices.RUNS, choices.OLD, choices.GRADIENT, choices.NEW))
# Names in `Flags`.
NAMES = "smoothed sums matched lengths agr coupled maximize corrected metric_max differs coupling"
NAMES += " sphere inside scales_weight decay decay_inverse decay_wide cautious"
SWITCHES = {name: tl.constexpr(1 << i) for i, name in enumerate(NAMES.split(), 5)}
SMOOTHED, SUMS, MATCHED, LENGTHS, AGR, COUPLED, MAXIMIZE, CORRECTED, METRIC_MAX, DIFFERS, *_REST = SWITCHES.values()
COUPLING, SPHERE, INSIDE, SCALES_WEIGHT, DECAYS, DECAY_INVERSE, DECAY_WIDE, CAUTIOUS = _REST
# Tensors are at multiples of 16 bytes; this launch is for the norm; it stores the state; an earlier one did, c is m.
ALIGNED, MEASURING, STORES, KNOWN = (tl.constexpr(1 << i) for i in range(24, 28))

# Columns of the tables, which are int64: of tensors, of chunks, and of the chunks that a sum is over.
WEIGHT, GRADIENT, STATE, COMPENSATION, *_MORE = (tl.constexpr(i) for i in range(6 + len(choices.BUFFERS)))
SQUARES, LARGEST_SQUARES, AVERAGE, PREVIOUS, ITERATE, FRESH, TENSOR = _MORE  # the last is the number of columns
NEW_MOMENTUM, NEW_PREVIOUS = tl.constexpr(1), tl.constexpr(2)  # bits of FRESH: made in this step
OF, BEGIN, COUNT, WIDE, CHUNKS = (tl.constexpr(i) for i in range(5))
FIRST, MANY, SIZE, SPAN = (tl.constexpr(i) for i in range(4))
# Places of the numbers, which are float64.
PLACES = [tl.constexpr(i) for i in range(len(Numbers._fields))]
STEP_SIZE, KEEP, TAKE, FIRST_TAKE, FROM_OLD, FROM_GRADIENT, FROM_NEW = PLACES[:7]
DECAY, WEIGHT_FACTOR, DECAY_STRENGTH, EXPONENT, EPS, DECAY_EXPONENT = PLACES[7:13]
METRIC_KEEP, METRIC_TAKE, METRIC_EPS, DIFFERENCE_KEEP, DIFFERENCE_TAKE, PULL, RATE = PLACES[13:]
SHARES = tl.constexpr(3)  # of c, √v and differences of gradients
COLUMNS = tl.constexpr(5)  # the sums of a chunk
# What is known of each vector that a norm is over, float64: the dual norm, the factor of D(c), and what an entry of c
# is divided by before its power, and that multiplied by; both in two parts, the first a power of two. Then what of the
# weight is added to u, and what the updated weight is multiplied by.
DUAL, FACTOR, SHIFT, DIVISOR, LIFT, MULTIPLIER, ADDED, STRETCH, MEASURED = (tl.constexpr(i) for i in range(9))

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def number(numbers, place):
    """A number, in float32."""
    return tl.load(numbers + place).to(tl.float32)


@triton.jit
def exponent_of(numbers, PLACE: tl.constexpr):
    """An exponent as a float32 of 12 bits, and another for the rest."""
    x = tl.load(numbers + PLACE)
    high = (x.to(tl.float32).to(tl.int32, bitcast=True) & -4096).to(tl.float32, bitcast=True)
    return high, (x - high.to(tl.float64)).to(tl.float32)


@triton.jit
def chunk_of(chunks, j):
    """Return the tensor of chunk j, its first entry and its number of entries."""
    row = chunks + j * CHUNKS
    return tl.load(row + OF), tl.multiple_of(tl.load(row + BEGIN), BLOCK), tl.load(row + COUNT)


@triton.jit
def entries(table, t, COLUMN: tl.constexpr, begin, DTYPE: tl.constexpr, FLAGS: tl.constexpr):
    """Return the addresses of the entries of a chunk of tensor t that starts at ``begin``."""
    tensor = tl.load(table + t * TENSOR + COLUMN).to(tl.pointer_type(DTYPE))
    if ALIGNED & FLAGS:
        tensor = tl.multiple_of(tensor, 16)  # and so is begin: then loads and stores are of 128 bits
    return tensor + begin + tl.arange(0, BLOCK)


@triton.jit
def loaded(addresses, mask):
    """The entries at these addresses in float32, and 0 outside of the mask."""
    return tl.load(addresses, mask, other=0).to(tl.float32)


@triton.jit
def gradient_of(table, t, begin, mask, unscale, DTYPE: tl.constexpr, FLAGS: tl.constexpr):
    """The gradient of a chunk, unscaled."""
    x = loaded(entries(table, t, GRADIENT, begin, DTYPE, FLAGS), mask)
    if unscale is not None:
        x *= tl.load(unscale).to(tl.float32)
    return x


@triton.jit
def cut_off(x, carry):
    """The bfloat16 of x's upper 16 bits, to the lower of which ``carry`` is added first; ∞ and NaN stay."""
    bits = x.to(tl.int32, bitcast=True)
    upper = tl.where(tl.abs(x) < INFINITY, bits + carry, tl.where(x != x, 0x7FC00000, bits)) >> 16
    return upper.to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def stored(x, dtype: tl.constexpr):
    """x in another dtype, rounded to nearest, ties to even."""
    carry = 0x7FFF + ((x.to(tl.int32, bitcast=True) >> 16) & 1)  # Triton's interpreter would cut off
    return cut_off(x, carry) if dtype == tl.bfloat16 else x.to(dtype)


@triton.jit
def noise(seed, j):
    """16 random bits for each entry of chunk j: every draw of 128 bits is shared by 8 of them."""
    a, b, c, d = tl.randint4x(seed, j * (BLOCK // 8) + tl.arange(0, BLOCK // 8))
    words = tl.join(tl.join(a, b), tl.join(c, d)).to(tl.uint32, bitcast=True)
    return tl.reshape(tl.join(words & 0xFFFF, words >> 16), [BLOCK]).to(tl.int32, bitcast=True)


# log₂ of m in [√½, √2) as an odd series in (m−1)/(m+1), and 2^r on [−½, ½]: both to 2e-8.
SQRT_HALF = tl.constexpr(0x3F3504F3)
L1, L3, L5, L7, L9 = (tl.constexpr(2 / math.log(2) / k) for k in (1, 3, 5, 7, 9))
E1, E2, E3, E4, E5, E6, E7 = (tl.constexpr(math.log(2) ** k / math.factorial(k)) for k in range(1, 8))
ROUNDS = tl.constexpr(1.5 * 2**23)  # adding and subtracting it rounds to an integer


@triton.jit
def pow_f32(a, high, low):
    """``a^(high + low)`` for a ≥ 0; 0, ∞ and NaN as ``pow`` has them, denormals too.

    To 2e-7 relative for exponents up to 1, and 1.5e-7 times the exponent beyond.
    ``high`` has 12 bits, so that its product with the binary exponent is exact.
    """
    small = a < TINY
    bits = tl.where(small, a * 16777216.0, a).to(tl.int32, bitcast=True)
    k = (bits - SQRT_HALF) >> 23
    m = (bits - (k << 23)).to(tl.float32, bitcast=True)
    k = tl.where(small, k - 24, k).to(tl.float32)
    s = (m - 1) / (m + 1)  # on a GPU to two units in the last place
    z = s * s
    log = s * (L1 + z * (L3 + z * (L5 + z * (L7 + z * L9))))
    product = high * k
    rest = low * k + (high + low) * log
    n = ((product + rest) + ROUNDS) - ROUNDS
    r = (product - n) + rest
    y = 1 + r * (E1 + r * (E2 + r * (E3 + r * (E4 + r * (E5 + r * (E6 + r * E7))))))
    n = tl.minimum(tl.maximum(n, -252.0), 252.0).to(tl.int32)  # beyond which the result is 0 or ∞
    half = n >> 1  # in two factors, because one may leave the range of an exponent
    y *= ((half + 127) << 23).to(tl.float32, bitcast=True)
    y *= ((n - half + 127) << 23).to(tl.float32, bitcast=True)
    inverse = tl.where(a > 0, 0.0, a + INFINITY)
    end = tl.where(high > 0, a, tl.where(high < 0, inverse, tl.where(a == a, 1.0, a)))
    return tl.where((a > 0) & (a < INFINITY), y, end)


@triton.jit
def power(a, high, low, MODE: tl.constexpr):
    """``a^exponent`` for a ≥ 0, but 0 at exponent 0 where a is."""
    if MODE == SIGN:
        y = tl.where(a > 0, 1.0, a)
    elif MODE == LINEAR:
        y = a
    elif MODE == SQRT:
        y = tl.sqrt_rn(a)
    elif MODE == SQUARE:
        y = a * a
    else:  # exact where a tensor p is at ∞ or 2
        y = tl.where(high == 0, tl.where(a > 0, 1.0, a), pow_f32(a, high, low))
        y = tl.where((high == 1) & (low == 0), a, y)
    return y


@triton.jit
def signed(a, c):
    """a ≥ 0 with the sign of c."""
    return tl.where(c < 0, -a, a)


@triton.jit
def decay_factor(a, high, low, decay_strength, MODE: tl.constexpr, INVERSE: tl.constexpr):
    """The factor of ℓp decay for |w| = a."""
    one = tl.full(a.shape, 1.0, tl.float32)
    x = tl.where(a == a, one, a) if MODE == SIGN else power(a, high, low, MODE)  # 0⁰ and ∞⁰ are 1 here
    if INVERSE:
        factor = tl.div_rn(one, 1 + decay_strength * x)
    else:
        x = tl.where(x > LARGEST, LARGEST, x)  # ∞/∞ would be NaN
        factor = tl.where(decay_strength == 0, 1.0, tl.div_rn(x, x + decay_strength))
    return factor


@triton.jit
def regularized(x, regularizers, t):
    """x times the part that the other entries have in Σ|g|.

    The largest comes apart from the rest, all scaled by a power of two: where x is the largest, their difference is
    exactly 0.
    """
    row = regularizers + 4 * t
    scale, top, rest, inverse = tl.load(row), tl.load(row + 1), tl.load(row + 2), tl.load(row + 3)
    return x * (((top - tl.abs(x) * scale) + rest) * inverse)


@triton.jit
def momentum_step(states, x, table, t, numbers, mask, keeps, DTYPE: tl.constexpr, FLAGS: tl.constexpr):
    """Return c of the momentum rule, and store the new momentum where ``STORES``."""
    old_m = loaded(states, mask)
    fresh = tl.load(table + t * TENSOR + FRESH) & NEW_MOMENTUM != 0
    take = tl.where(fresh, number(numbers, FIRST_TAKE), number(numbers, TAKE))
    m = number(numbers, KEEP) * old_m + take * x
    c = tl.zeros_like(x)
    if OLD & FLAGS:
        c = number(numbers, FROM_OLD) * old_m
    if GRADIENT_NOW & FLAGS:
        c += number(numbers, FROM_GRADIENT) * x
    if NEW & FLAGS:
        c += number(numbers, FROM_NEW) * m
    if STORES & FLAGS:
        tl.store(states, stored(m, DTYPE), keeps)
    return c


@triton.jit
def difference_step(c, x, table, t, begin, numbers, shares, mask, keeps, FLAGS: tl.constexpr):
    """Return c with the average of gradient differences, and what the metric sees; stored where ``STORES``."""
    beta = number(numbers, DIFFERENCE_KEEP)
    averages = entries(table, t, AVERAGE, begin, tl.float32, FLAGS)
    average = loaded(averages, mask)
    if not (KNOWN & FLAGS):
        previous = entries(table, t, PREVIOUS, begin, tl.float32, FLAGS)
        fresh = tl.load(table + t * TENSOR + FRESH) & NEW_PREVIOUS != 0
        difference = tl.where(fresh, 0.0, x - loaded(previous, mask))
        average = beta * average + number(numbers, DIFFERENCE_TAKE) * difference
        if STORES & FLAGS:
            tl.store(averages, average, keeps)
            tl.store(previous, x, keeps)
        x += beta * difference
    if CORRECTED & FLAGS:
        average *= number(shares, SHARES * t + 2)
    return c + beta * average, x


@triton.jit
def metric_step(x, table, t, begin, numbers, shares, mask, keeps, METRIC: tl.constexpr, FLAGS: tl.constexpr):
    """Return P, or its root under ``BOTH_SIDES``, after v has taken x², which is stored where ``STORES``."""
    squares = entries(table, t, SQUARES, begin, tl.float32, FLAGS)
    if METRIC_MAX & FLAGS:
        largest = entries(table, t, LARGEST_SQUARES, begin, tl.float32, FLAGS)
    if not (KNOWN & FLAGS):
        v = number(numbers, METRIC_KEEP) * loaded(squares, mask) + number(numbers, METRIC_TAKE) * x * x
        if STORES & FLAGS:
            tl.store(squares, v, keeps)
        if METRIC_MAX & FLAGS:
            top = loaded(largest, mask)
            v = tl.where((v < top) | (top != top), top, v)  # NaN stays
            if STORES & FLAGS:
                tl.store(largest, v, keeps)
    else:
        v = loaded(largest if METRIC_MAX & FLAGS else squares, mask)
    root = tl.sqrt_rn(v)
    if CORRECTED & FLAGS:
        root *= number(shares, SHARES * t + 1)
    root += number(numbers, METRIC_EPS)
    return tl.sqrt_rn(root) if METRIC == BOTH_SIDES else root


@triton.jit
def above(x):
    """The power of two at x or above, of a normal x up to 2^127."""
    return ((x.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def relative(x):
    """x and its size, a power of two by which it is divided: no float32 has the squares of what is tiny or huge."""
    size = above(tl.minimum(tl.maximum(tl.max(tl.abs(x), 0), TINY), 2.0**126))
    return x * tl.div_rn(1.0, size), size.to(tl.float64)


@triton.jit
def store_sums(sums, j, c, w, root, high, low, MODE: tl.constexpr, METRIC: tl.constexpr, FLAGS: tl.constexpr):
    """Write the sums of chunk j: M, Σ(|c|/M)^q, and for "matched" Σ(|c|/M)² and Σ(|c|/M)^(2·exponent).

    M is the power of two at max|c| or above, so that no quotient is rounded, here and where sums of chunks are added;
    max|c| itself where that is denormal or the exponent so large that powers of ½ are.
    For the lengths of weights Σ(w/M)² instead, and also Σw·D with D = sign(c)·(|c|/M)^exponent. In adaptive coordinates
    the terms of all but the first two are divided by P.
    """
    a = tl.abs(c)
    # Off 0 and ∞, for 0/0 and ∞/∞ are NaN. Triton 3.2 takes SMALLEST for a float64.
    top = tl.minimum(tl.maximum(tl.max(a, 0), SMALLEST), LARGEST).to(tl.float32)
    top = tl.where((top < TINY) | (high > 60), top, above(tl.minimum(top, 2.0**127)))
    r = tl.div_rn(a, tl.broadcast_to(top, [BLOCK]))
    y = power(r, high, low, MODE)
    row = sums + COLUMNS * j
    tl.store(row, top.to(tl.float64))
    tl.store(row + 1, tl.sum(r * y, 0).to(tl.float64))
    if (MATCHED & FLAGS) or (LENGTHS & FLAGS):
        size, length = 1.0, 1.0
        if METRIC == BOTH_SIDES:
            r, length = relative(tl.div_rn(r, root))
            y, size = relative(tl.div_rn(y, root))
        tl.store(row + 3, tl.sum(y * y, 0).to(tl.float64) * size * size)
        if LENGTHS & FLAGS:
            r, length = relative(w)
            tl.store(row + 4, tl.sum(signed(y, c) * r, 0).to(tl.float64) * length * size)
            length /= top.to(tl.float64)
        tl.store(row + 2, tl.sum(r * r, 0).to(tl.float64) * length * length)


@triton.jit
def direction(c, numbers, measured, t, high, low, MODE: tl.constexpr, FLAGS: tl.constexpr):
    """D(c) of a chunk of tensor t."""
    if SMOOTHED & FLAGS:
        u = c * pow_f32(tl.abs(c) + number(numbers, EPS), high, low)
    elif SUMS & FLAGS:
        known = measured + t * MEASURED
        a = tl.abs(c) * number(known, SHIFT)
        r = tl.div_rn(a, tl.broadcast_to(number(known, DIVISOR), [BLOCK]))
        u = signed(power(r, high, low, MODE), c) * number(known, MULTIPLIER) * number(known, LIFT)
    else:
        u = signed(power(tl.abs(c), high, low, MODE), c)
    return u


@triton.jit
def stepped(w, u, chunks, j, numbers, DECAY_MODE: tl.constexpr, FLAGS: tl.constexpr):
    """The weights of chunk j after a step along u, decayed."""
    old = w
    if CAUTIOUS & FLAGS:
        spared = ((u < 0) & (w > 0)) | ((u > 0) & (w < 0))
    if SCALES_WEIGHT & FLAGS:
        scale = number(numbers, WEIGHT_FACTOR)
        w *= tl.where(spared, 1.0, scale) if CAUTIOUS & FLAGS else scale
    w -= number(numbers, STEP_SIZE) * u
    if DECAYS & FLAGS:
        high, low = exponent_of(numbers, DECAY_EXPONENT)
        strength = number(numbers, DECAY_STRENGTH)
        factor = decay_factor(tl.abs(old), high, low, strength, DECAY_MODE, DECAY_INVERSE & FLAGS)
        if CAUTIOUS & FLAGS:
            factor = tl.where(spared, 1.0, factor)
        w *= tl.where((tl.load(chunks + j * CHUNKS + WIDE) != 0) | (not (DECAY_WIDE & FLAGS)), factor, 1.0)
    return w


@triton.jit
def coupled_step(w, u, c, table, t, begin, chunks, j, numbers, mask, DECAY_MODE: tl.constexpr, FLAGS: tl.constexpr):
    """`stepped`, by (1−τ)u, and pulled to the second iterate z, after that has taken a step along c."""
    iterates = entries(table, t, ITERATE, begin, tl.float32, FLAGS)
    z = loaded(iterates, mask) - number(numbers, RATE) * c
    tl.store(iterates, z, mask)
    pull = number(numbers, PULL)
    return stepped(w, (1 - pull) * u, chunks, j, numbers, DECAY_MODE, FLAGS) + pull * (z - w)


@triton.jit
def step_kernel(
    table,
    chunks,
    numbers,
    unscale,
    found_inf,
    seed,
    regularizers,
    measured,
    shares,
    sums,
    FLAGS: tl.constexpr,
    MODE: tl.constexpr,
    METRIC: tl.constexpr,
    DECAY_MODE: tl.constexpr,
    ROUNDING: tl.constexpr,
    WEIGHT_TYPE: tl.constexpr,
    GRADIENT_TYPE: tl.constexpr,
    STATE_TYPE: tl.constexpr,
):
    """Step a chunk, or, ``MEASURING``, only compute c and write its sums."""
    j = tl.program_id(0)
    t, begin, count = chunk_of(chunks, j)
    if found_inf is not None and not (MEASURING & FLAGS):
        count = tl.where(tl.load(found_inf) == 0, count, 0)  # a step that is skipped has no entries
    high, low = exponent_of(numbers, EXPONENT)

    # Twice the same code: whole chunks are read and written without a mask, so that 128 bits go at a time.
    for partial in tl.static_range(2):
        if (count < BLOCK) == (partial == 1):
            mask = tl.arange(0, BLOCK) < count if partial else tl.full([BLOCK], True, tl.int1)

            keeps = mask
            if found_inf is not None and (MEASURING & FLAGS):
                keeps = tl.where(tl.load(found_inf) == 0, mask, False)

            if KNOWN & FLAGS:
                x = loaded(entries(table, t, STATE, begin, STATE_TYPE, FLAGS), mask)
            else:
                x = gradient_of(table, t, begin, mask, unscale, GRADIENT_TYPE, FLAGS)
                if MAXIMIZE & FLAGS:
                    x = -x
                if AGR & FLAGS:
                    x = regularized(x, regularizers, t)

            if (COUPLED & FLAGS) or (LENGTHS & FLAGS) or not (MEASURING & FLAGS):
                weights = entries(table, t, WEIGHT, begin, WEIGHT_TYPE, FLAGS)
                w = loaded(weights, mask)
                if ROUNDING == KAHAN:
                    lost = entries(table, t, COMPENSATION, begin, WEIGHT_TYPE, FLAGS)
                    w += loaded(lost, mask)
                if (COUPLED & FLAGS) and not (KNOWN & FLAGS):
                    x += number(numbers, DECAY) * w

            c = x
            if (RUNS & FLAGS) and not (KNOWN & FLAGS):
                states = entries(table, t, STATE, begin, STATE_TYPE, FLAGS)
                c = momentum_step(states, x, table, t, numbers, mask, keeps, STATE_TYPE, FLAGS)
            if CORRECTED & FLAGS:
                c *= number(shares, SHARES * t)
            if DIFFERS & FLAGS:
                c, x = difference_step(c, x, table, t, begin, numbers, shares, mask, keeps, FLAGS)
            root = c
            if METRIC != 0:
                root = metric_step(x, table, t, begin, numbers, shares, mask, keeps, METRIC, FLAGS)
                c = tl.div_rn(c, root)

            if MEASURING & FLAGS:
                store_sums(sums, j, c, w if LENGTHS & FLAGS else c, root, high, low, MODE, METRIC, FLAGS)
            else:
                u = direction(c, numbers, measured, t, high, low, MODE, FLAGS)
                if METRIC == BOTH_SIDES:
                    u = tl.div_rn(u, root)
                if INSIDE & FLAGS:
                    u += (number(measured, t * MEASURED + ADDED) if SUMS & FLAGS else number(numbers, DECAY)) * w
                if COUPLING & FLAGS:
                    w = coupled_step(w, u, c, table, t, begin, chunks, j, numbers, mask, DECAY_MODE, FLAGS)
                else:
                    w = stepped(w, u, chunks, j, numbers, DECAY_MODE, FLAGS)
                if SPHERE & FLAGS:
                    w *= number(measured, t * MEASURED + STRETCH)
                if ROUNDING == STOCHASTIC:
                    tl.store(weights, cut_off(w, noise(tl.load(seed), j)), mask)
                else:
                    near = stored(w, WEIGHT_TYPE)
                    tl.store(weights, near, mask)
                    if ROUNDING == KAHAN:
                        seen = near.to(tl.float32)
                        kept = tl.where(tl.abs(seen) < INFINITY, w - seen, 0.0)
                        tl.store(lost, stored(kept, WEIGHT_TYPE), mask)


@triton.jit
def gradient_sums(table, chunks, unscale, sums, DTYPE: tl.constexpr, FLAGS: tl.constexpr):
    """The largest |g| of each chunk, and the sum of the others: what is beside a dominant entry must not be lost.

    The sum is in float32, a tree, of which huge terms are scaled: to 1.4e-6 relative at worst and 3e-7 as a rule.
    """
    j = tl.program_id(0)
    t, begin, count = chunk_of(chunks, j)
    for partial in tl.static_range(2):
        if (count < BLOCK) == (partial == 1):
            mask = tl.arange(0, BLOCK) < count if partial else tl.full([BLOCK], True, tl.int1)
            a = tl.abs(gradient_of(table, t, begin, mask, unscale, DTYPE, FLAGS))
            top = tl.max(a, 0)
            is_top = (a == top) & mask
            equals = tl.sum(is_top.to(tl.int32), 0) - 1
            scale = tl.where(top > 2.0**100, 2.0**-16, 1.0)
            others = tl.sum(tl.where(is_top, 0.0, a * scale), 0).to(tl.float64) / scale
            tl.store(sums + 2 * j, top.to(tl.float64))
            tl.store(sums + 2 * j + 1, others + tl.where(equals > 0, equals * top.to(tl.float64), 0.0))


@triton.jit
def largest_and_others(spans, sums):
    """The largest |g| of all chunks in this program's span, and the sum of the others."""
    span = spans + tl.program_id(0) * SPAN
    first, many = tl.load(span + FIRST), tl.load(span + MANY)
    tops = tl.zeros([SUMMED], tl.float64)
    others = tl.zeros([SUMMED], tl.float64)
    for i in range(0, many, SUMMED):
        k = i + tl.arange(0, SUMMED)
        a = tl.load(sums + 2 * (first + k), k < many, other=0)
        larger = a > tops
        # The smaller of two candidates joins the others; a NaN is in a chunk's others already.
        others += tl.where(larger, tops, a) + tl.load(sums + 2 * (first + k) + 1, k < many, other=0)
        tops = tl.where(larger, a, tops)
    top = tl.max(tops, 0)
    is_top = tops == top
    equals = tl.sum(is_top.to(tl.int32), 0) - 1
    rest = tl.sum(others, 0) + tl.sum(tl.where(is_top, 0.0, tops), 0) + tl.where(equals > 0, equals * top, 0.0)
    return top, rest


@triton.jit
def merge_gradients(spans, sums, merged):
    """Write the result of `largest_and_others` of each span."""
    top, rest = largest_and_others(spans, sums)
    tl.store(merged + 2 * tl.program_id(0), top)
    tl.store(merged + 2 * tl.program_id(0) + 1, rest)


@triton.jit
def regularizer(spans, sums, regularizers):
    """Compute for each tensor a power of two s near 1/Σ|g|, s·max|g|, s times the sum of the others, and 1/(s·Σ|g|).

    Where AGR leaves the tensor alone they are such that its factor is 1.
    """
    t = tl.program_id(0)
    top, rest = largest_and_others(spans, sums)
    total = top + rest
    idle = (total == 0) | (tl.load(spans + t * SPAN + SIZE) == 1)
    e = ((total.to(tl.int64, bitcast=True) >> 52) - 1022).to(tl.int32)
    e = tl.minimum(tl.maximum(e, -126), 126)  # where a float32 has both the power and its inverse
    scale = tl.where(total < INFINITY, ((127 - e) << 23).to(tl.float32, bitcast=True), 1.0)
    wide = scale.to(tl.float64)
    tl.store(regularizers + 4 * t, tl.where(idle, 0.0, scale))
    tl.store(regularizers + 4 * t + 1, tl.where(idle, 1.0, top * wide).to(tl.float32))
    tl.store(regularizers + 4 * t + 2, tl.where(idle, 0.0, rest * wide).to(tl.float32))
    tl.store(regularizers + 4 * t + 3, tl.where(idle, 1.0, 1 / (total * wide)).to(tl.float32))


@triton.jit
def within(x):
    """A power of two by which x > 0 becomes a normal float32; 1 for one, and for 0, ∞ and NaN."""
    large = tl.where((x > LARGEST) & (x < INFINITY), 2.0**-64, 1.0)
    return tl.where((x > 0) & (x < TINY), 2.0**64, large).to(tl.float64)


@triton.jit
def norm_sums(spans, sums, numbers, MORE: tl.constexpr):
    """M and the sums relative to it of all chunks in this program's span, those of the last columns if ``MORE``."""
    span = spans + tl.program_id(0) * SPAN
    first, many = tl.load(span + FIRST), tl.load(span + MANY)
    high, low = exponent_of(numbers, EXPONENT)
    tops = tl.full([SUMMED], SMALLEST, tl.float32)
    for i in range(0, many, SUMMED):
        k = i + tl.arange(0, SUMMED)
        tops = tl.maximum(tops, tl.load(sums + COLUMNS * (first + k), k < many, other=SMALLEST).to(tl.float32))
    top = tl.max(tops, 0)
    totals = tl.zeros([SUMMED], tl.float64)
    squares = tl.zeros([SUMMED], tl.float64)
    powers = tl.zeros([SUMMED], tl.float64)
    products = tl.zeros([SUMMED], tl.float64)
    for i in range(0, many, SUMMED):
        k = i + tl.arange(0, SUMMED)
        mine = sums + COLUMNS * (first + k)
        ratio = tl.div_rn(loaded(mine, k < many), tl.broadcast_to(top, [SUMMED]))
        factor = pow_f32(ratio, high, low).to(tl.float64)
        totals += tl.load(mine + 1, k < many, other=0) * ratio * factor
        if MORE:
            squares += tl.load(mine + 2, k < many, other=0) * ratio * ratio
            powers += tl.load(mine + 3, k < many, other=0) * factor * factor
            products += tl.load(mine + 4, k < many, other=0) * factor
    return top.to(tl.float64), tl.sum(totals, 0), tl.sum(squares, 0), tl.sum(powers, 0), tl.sum(products, 0)


@triton.jit
def merge_norms(spans, sums, merged, numbers, MORE: tl.constexpr):
    """Write the result of `norm_sums` of each span."""
    top, total, square, powered, product = norm_sums(spans, sums, numbers, MORE)
    row = merged + COLUMNS * tl.program_id(0)
    tl.store(row, top)
    tl.store(row + 1, total)
    tl.store(row + 2, square)
    tl.store(row + 3, powered)
    tl.store(row + 4, product)


@triton.jit
def measure(
    spans,
    sums,
    numbers,
    radii,
    measured,
    IS_MATCHED: tl.constexpr,
    IS_DUAL: tl.constexpr,
    IS_POWER: tl.constexpr,
    IS_RELATIVE: tl.constexpr,
    IS_SPHERE: tl.constexpr,
    IS_INSIDE: tl.constexpr,
):
    """The dual norm of each vector and how its direction is made, from the sums of its chunks.

    A radius that is NaN is measured, and written.
    """
    v = tl.program_id(0)
    exponent = tl.load(numbers + EXPONENT)
    q = 1 + exponent
    more: tl.constexpr = IS_MATCHED or IS_RELATIVE or IS_SPHERE
    top, total, squares, powers, products = norm_sums(spans, sums, numbers, more)
    norm = top * tl.exp2(tl.log2(total) / q)
    factor = tl.where(norm == norm, 1.0, norm)
    if IS_DUAL:
        factor = norm
    if IS_POWER:
        factor = tl.where(exponent == 0, factor, tl.exp2(exponent * tl.log2(norm)))
    length = top * tl.sqrt(squares)
    unit = tl.where(exponent == 0, 1.0, tl.exp2(exponent * tl.log2(top / norm)))
    if IS_MATCHED:
        factor = tl.where(norm == 0, norm, length / (unit * tl.sqrt(powers)))
    # A tensor p may be at an end: at ∞ a direction is the signs, whatever the size, and at 2 that of "dual" is c.
    itself = (exponent == 1) & IS_DUAL
    divisor = tl.where((exponent == 0) | itself | (norm == 0), 1.0, norm)
    multiplier = tl.where(itself, 1.0, factor)
    known = measured + v * MEASURED
    if IS_RELATIVE or IS_SPHERE:  # of the weight, and of u, which is D(c) times the factor, and what is added to it
        decay = tl.load(numbers + DECAY) if IS_INSIDE else 0.0
        scaled = factor * tl.where(norm == 0, norm, unit)
        product = scaled * products
        square = scaled * scaled * powers + 2 * decay * product + decay * decay * length * length
        own = tl.sqrt(tl.where(square < 0, 0.0, square))
        goal = tl.where(length == 0, own, length)
        if IS_SPHERE:
            radius = tl.load(radii + v)
            goal = tl.where(radius == radius, radius, goal)
            tl.store(radii + v, goal)
        ratio = tl.where(own == 0, own, goal / own)
        factor *= ratio
        multiplier *= ratio
        tl.store(known + ADDED, decay * ratio)
        if IS_SPHERE:
            step = tl.load(numbers + STEP_SIZE) * ratio
            after = length * length - 2 * step * (product + decay * length * length) + step * step * own * own
            tl.store(known + STRETCH, tl.where(after > 0, goal / tl.sqrt(after), 0 * after))
    tl.store(known + DUAL, norm)
    tl.store(known + FACTOR, factor)
    tl.store(known + SHIFT, within(divisor))
    tl.store(known + DIVISOR, divisor * within(divisor))
    tl.store(known + LIFT, 1 / within(multiplier))
    tl.store(known + MULTIPLIER, multiplier * within(multiplier))


class Step:
    """One step of a batch, in place.

    Args:
        flags, numbers: the stages' parts of the step.
        tables: the tensors, and what else the step is given.

    Attributes:
        measured: after the step ``‖c‖⋆`` and the factor of D(c) of each tensor, float64 [n]; None if it needs no sums.

    Raises:
        RuntimeError: a graph is captured of the first step of these tensors.
    """

    def __init__(self, flags: Flags, numbers: Numbers, tables: Tables) -> None:
        device, chunks, n = tables.device, tables.chunks, len(tables.weights)
        kept = Kept(tables.cache, device)
        rows = _rows(flags, tables)
        self.aligned = not (rows[:, : FRESH.value] & 15).any()
        self.flags, self.device, self.chunks, self.n = flags, device, chunks, n
        parts = [rows, np.array([math.nan if isinstance(x, Tensor) else x for x in numbers])]
        seed = tables.seed if flags.rounding == choices.STOCHASTIC else None
        if seed is not None and not isinstance(seed, Tensor):
            parts.append(np.array([seed]))
        self.table, self.values, *sent = kept.changing(parts)
        for i, x in enumerate(numbers):
            if isinstance(x, Tensor):  # copied by the device, at every step and at every replay
                self.values[i].copy_(x.reshape(()), non_blocking=True)
        self.cuts, *self.spans = kept.constant("chunks", lambda: [_cuts(chunks), *_spans(chunks, tables.layouts)])
        self.unscale, self.shares = tables.unscale, tables.shares
        self.given = self.table, self.cuts, self.values, tables.unscale, tables.found_inf, sent[0] if sent else seed
        self.radii = tables.radii
        self.regularizers: Tensor | None = None
        self.norms: Tensor | None = None
        self.measured: tuple[Tensor, Tensor] | None = None
        self.is_sharded = bool(tables.layouts)

    def phases(self) -> list[Phase]:
        """Return the phases: AGR's sums, the norms' sums, and the update."""
        agr = [Phase(self._sums, self._set_agr)] if self.flags.agr else []
        norms = [Phase(self._norms, self._set_norms)] if self.flags.sums else []
        return [*agr, *norms, Phase(nothing, self._update)]

    def _launched(self) -> AbstractContextManager[None]:
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()

    def _merged(self, sums: Tensor, kernel: Any, *more: Any) -> Tensor | None:
        """Merge the sums of chunks, until `regularizer` or `measure` takes them; return them if ranks have to."""
        for spans in self.spans[:-1]:
            merged = sums.new_empty(len(spans), sums.shape[1])
            kernel[len(spans),](spans, sums, merged, *more, **FEW)
            sums = merged
        self.sums = sums
        return sums if self.is_sharded else None

    def _sums(self, _: Any) -> Tensor | None:
        chunks = self.chunks
        sums = torch.empty(len(chunks), 2, dtype=torch.float64, device=self.device)
        constants = TYPES[self.flags.gradient], ALIGNED.value * self.aligned
        with self._launched():
            if len(chunks):
                gradient_sums[len(chunks),](self.table, self.cuts, self.unscale, sums, *constants, **OPTIONS)
            return self._merged(sums, merge_gradients)

    def _set_agr(self, _: Any, found: Tensor | None) -> None:
        sums = self.sums if found is None else found.flatten(0, 1).contiguous()
        self.regularizers = torch.empty(self.n, 4, dtype=torch.float32, device=self.device)
        with self._launched():
            regularizer[self.n,](self.spans[-1], sums, self.regularizers, **FEW)

    def _norms(self, _: Any) -> Tensor | None:
        sums = torch.empty(len(self.chunks), COLUMNS.value, dtype=torch.float64, device=self.device)
        with self._launched():
            self._launch_step(None, sums, measuring=True)
            return self._merged(sums, merge_norms, self.values, self.flags.matched or self.flags.lengths)

    def _set_norms(self, _: Any, found: Tensor | None) -> None:
        sums, flags = self.sums if found is None else found.flatten(0, 1).contiguous(), self.flags
        self.norms = torch.empty(self.n, MEASURED.value, dtype=torch.float64, device=self.device)
        how = flags.matched, flags.dual, not flags.scaled, flags.relative, flags.sphere, flags.inside
        with self._launched():
            measure[self.n,](self.spans[-1], sums, self.values, self.radii, self.norms, *how, **FEW)
        if flags.scaled:
            dual, factor = self.norms[:, : SHIFT.value].unbind(1)
            self.measured = dual, factor

    def _update(self, _: Any, __: Tensor | None) -> None:
        with self._launched():
            self._launch_step(self.norms, None, measuring=False)

    def _launch_step(self, norms: Tensor | None, sums: Tensor | None, measuring: bool) -> None:
        if len(self.chunks):
            launch = step_kernel[len(self.chunks),]
            constants = constants_of(self.flags, self.aligned, measuring)
            options = options_of(self.flags)
            launch(*self.given, self.regularizers, norms, self.shares, sums, **constants, **options)


def _cuts(chunks: Chunks) -> Array:
    """The table of chunks."""
    return np.stack([chunks.tensor, chunks.start, chunks.count, chunks.wide[chunks.tensor]], axis=1)


def _spans(chunks: Chunks, layouts: Sequence[Layout]) -> list[Array]:
    """Return tables of spans, the first one's of chunks, each further one's of the spans before.

    They are groups of chunks, if a tensor has more than are added at once, tensors, and the parts that ranks have.
    """
    first, many, sizes = chunks.first, chunks.ends - chunks.first, chunks.sizes
    found = []
    if many.max() > SUMMED.value:
        groups = Chunks([torch.Size([x]) for x in many.tolist()], SUMMED.value)
        found.append((first[groups.tensor] + groups.start, groups.count, groups.count))
        first, many = groups.first, groups.ends - groups.first
    if layouts:
        found.append((first, many, sizes))
        ranks = np.full(len(layouts), layouts[0].ranks)
        first, many, sizes = np.cumsum(ranks) - ranks, ranks, np.array([lay.shape.numel() for lay in layouts])
    return [np.stack(columns, axis=1) for columns in (*found, (first, many, sizes))]


def options_of(flags: Flags) -> dict[str, Any]:
    """Return the options of `step_kernel`: with more state than all but Adan has, half the entries a thread."""
    return OPTIONS | {"num_warps": 16} if flags.differs else OPTIONS


def constants_of(flags: Flags, aligned: bool, measuring: bool = False) -> dict[str, Any]:
    """Return the constants of `step_kernel`."""
    early = flags.sums and flags.momentum & choices.SAME and flags.state == torch.float32
    return {
        "FLAGS": (flags.momentum & ~choices.SAME)
        + sum(bit.value for name, bit in SWITCHES.items() if getattr(flags, name))
        + ALIGNED.value * aligned
        + MEASURING.value * measuring
        + (STORES.value if measuring == bool(early) else KNOWN.value * (not measuring)),
        "MODE": flags.mode,
        "METRIC": flags.metric,
        "DECAY_MODE": flags.decay_mode,
        "ROUNDING": flags.rounding,
        "WEIGHT_TYPE": TYPES[flags.weight],
        "GRADIENT_TYPE": TYPES[flags.gradient],
        "STATE_TYPE": TYPES[flags.state],
    }


def _rows(flags: Flags, tables: Tables) -> Array:
    """Return the table of tensors: the addresses of each, and which of its state has just been made."""
    rows = np.zeros((len(tables.weights), TENSOR.value), dtype=np.int64)
    rows[:, WEIGHT.value], rows[:, GRADIENT.value] = tables.weights, tables.gradients
    kept = map(tables.buffers.get, choices.BUFFERS)
    for column, addresses in enumerate((tables.states, tables.compensations, *kept), STATE.value):
        if addresses is not None:
            rows[:, column] = addresses
    for bit, name in (NEW_MOMENTUM, "momentum_buffer"), (NEW_PREVIOUS, "previous_grad"):
        rows[tables.new.get(name, []), FRESH.value] |= bit.value
    return rows


class Kept:
    """Tables of a batch on a device, kept from step to step."""

    def __init__(self, kept: dict[str, Any], device: torch.device) -> None:
        self.kept: dict[str, Any] = kept.setdefault(str(device), {})
        self.device = device
        self.capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        if self.capturing and not self.kept:
            raise RuntimeError("the first step makes what later ones keep: take it before capturing a graph")

    def constant(self, name: str, make: Callable[[], list[Array]]) -> list[Tensor]:
        """Tables of int64 that never change, made once."""
        if name not in self.kept:
            self.kept[name] = [self._sent(x.ravel()).view(x.shape) for x in make()]
        return cast(list[Tensor], self.kept[name])

    def changing(self, parts: Sequence[Array]) -> list[Tensor]:
        """Tables of int64 or float64 that may be others at the next step: all are sent to another place then, at once.

        A graph that is captured goes on reading what it read, wherever later steps read.
        """
        rooms = [x.size + x.size % 2 for x in parts]  # so that each begins at a multiple of 16 bytes
        ends = np.cumsum(rooms)
        values = np.zeros(ends[-1], np.int64)
        for x, begin in zip(parts, ends - rooms, strict=True):
            values[begin : begin + x.size] = x.ravel().view(np.int64)
        old, tables = self.kept.get("changing", (None, None))
        if old is None or not np.array_equal(old, values):
            cut = zip(torch.split(self._sent(values), rooms), parts, strict=True)
            tables = [y[: x.size].view(torch.from_numpy(x).dtype).view(x.shape) for y, x in cut]
            self.kept["changing"] = values, tables
        if self.capturing:
            self.kept.setdefault("captured", []).append(tables)
        return cast(list[Tensor], tables)

    def _sent(self, values: Array) -> Tensor:
        """A copy on the device of integers, on which nothing waits."""
        if not self.capturing:
            # PyTorch hands out pinned memory again only after the event that it records behind a copy from there.
            host = torch.empty(len(values), dtype=torch.int64, pin_memory=self.device.type == "cuda")
            host.numpy()[:] = values
            return host.to(self.device, non_blocking=True)
        # As arguments of kernels, which a graph holds itself: it would read a host's memory again at every replay.
        table = torch.zeros(len(values), dtype=torch.int64, device=self.device)
        torch._foreach_add_(list(table), values.tolist())
        return table
