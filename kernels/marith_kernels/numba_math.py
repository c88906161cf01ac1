"""Arithmetic for the compiled CPU backend: what numba lacks, and what it does too slowly.

Loops over these functions vectorise because there is no call in them: `exp` is a polynomial here (libm's is
scalar without SVML) and `maximum` is the LLVM instruction. Of fast-math, `ninf` and `nnan` stay out: -inf
is data.

Nothing here is cached on its own: numba would not notice that an inner function has changed. See
`numba_disk`.
"""

from __future__ import annotations

import math

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, overload

NEG_INF = np.float32(-np.inf)
ZERO = np.float32(0)
ONE = np.float32(1)
SHORTFALL = np.float32(2.0**112)

BLOCK = 1024  # tokens between two looks at the running maximum
# an exponential may lie this far above the running maximum; BLOCK * exp(60) is finite
HEADROOM = np.float32(60)

FAST = {"contract", "reassoc"}
inline = njit(fastmath=FAST, nogil=True, error_model="numpy")  # a division by 0 must not end the task


@intrinsic
def pointer(typingctx, address, like):
    """The integer `address` as a pointer to elements of `like`'s type."""
    result = types.CPointer(like)

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(result))

    return result(address, like), codegen


@intrinsic
def take(typingctx, address):
    """Atomically fetch the int64 at `address` and add one to it."""

    def codegen(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], ir.PointerType(ir.IntType(64)))
        return builder.atomic_rmw("add", pointer, ir.Constant(ir.IntType(64), 1), "monotonic")

    return types.int64(types.int64), codegen


@intrinsic
def maximum(typingctx, a, b):
    """llvm.maxnum, which vectorises also as a reduction; for -inf an ordinary maximum."""

    def codegen(context, builder, signature, args):
        f32 = ir.FloatType()
        function = builder.module.declare_intrinsic("llvm.maxnum", [f32], ir.FunctionType(f32, [f32, f32]))
        return builder.call(function, args, fastmath=("nsz", "nnan"))

    return types.float32(types.float32, types.float32), codegen


def widen(value):
    """A stored logit as float32. bfloat16 is stored as uint16 and float16 as int16, which numba does have."""
    raise NotImplementedError("compiled code only")


@overload(widen)
def _widen(value):
    if value == types.uint16:
        return lambda value: np.uint32(np.uint32(value) << np.uint32(16)).view(np.float32)
    if value == types.int16:

        def from_float16(value):
            bits = np.uint32(np.uint16(value))
            # the 15 bits under the sign, moved to float32's place, are the value short of 2 ** (127 - 15)
            size = np.uint32((bits & np.uint32(0x7FFF)) << np.uint32(13)).view(np.float32) * SHORTFALL
            size = -NEG_INF if (bits & np.uint32(0x7C00)) == np.uint32(0x7C00) else size
            return -size if (bits & np.uint32(0x8000)) != np.uint32(0) else size

        return from_float16
    return lambda value: value


@inline
def exp(x):
    """exp(x) for x <= HEADROOM to 1e-7 relative, after Cephes' expf; below -87 it stays at exp(-87)."""
    x = max(x, np.float32(-87.0))
    n = np.float32(np.rint(x * np.float32(1.4426950408889634)))
    f = (x - n * np.float32(0.693145751953125)) - n * np.float32(1.42860682030941723212e-6)
    p = np.float32(1.9875691500e-4)
    p = p * f + np.float32(1.3981999507e-3)
    p = p * f + np.float32(8.3334519073e-3)
    p = p * f + np.float32(4.1665795894e-2)
    p = p * f + np.float32(1.6666665459e-1)
    p = p * f + np.float32(5.0000001201e-1)
    p = p * f * f + f + ONE
    return p * np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)


@inline
def times(weight, ban, value):
    """weight * value; `ban` is what -inf counts as: -inf whatever the weight's sign, 0 under the weight 0."""
    return ban if value == NEG_INF else weight * value


@inline
def log1p(x):
    """ln(1 + x) for 0 <= x <= 1 to 1e-7 relative, after Cephes' logf."""
    high = x > np.float32(0.41421356237309504880)  # then ln(1 + x) = ln 2 + ln(1 + (x - 1) / 2)
    x = (x - ONE) * np.float32(0.5) if high else x
    p = np.float32(7.0376836292e-2)
    p = p * x - np.float32(1.1514610310e-1)
    p = p * x + np.float32(1.1676998740e-1)
    p = p * x - np.float32(1.2420140846e-1)
    p = p * x + np.float32(1.4249322787e-1)
    p = p * x - np.float32(1.6668057665e-1)
    p = p * x + np.float32(2.0000714765e-1)
    p = p * x - np.float32(2.4999993993e-1)
    p = p * x + np.float32(3.3333331174e-1)
    square = x * x
    p = p * x * square - np.float32(0.5) * square + x
    return p + np.float32(0.69314718055994530942) if high else p


@inline
def log(x):
    """ln x for normal x > 0 to 1e-7 relative or absolute, whichever is less strict."""
    bits = np.float32(x).view(np.int32)
    exponent = (bits >> np.int32(23)) - np.int32(127)
    mantissa = np.int32((bits & np.int32(0x7FFFFF)) | np.int32(0x3F800000)).view(np.float32)
    return np.float32(exponent) * np.float32(0.69314718055994530942) + log1p(mantissa - ONE)


@inline
def max_and_sum(x):
    """(max x, sum exp(x - max x)); (-inf, 0) where everything is -inf. One read but for the first block."""
    return _max_and_sum_from(x, _max_of(x[:BLOCK]))


@inline
def shift_max_and_sum(x, shift):
    """`max_and_sum` after adding `shift` to x in place."""
    high = NEG_INF
    for i in range(x.size):
        x[i] += shift
        high = maximum(high, x[i])
    return _max_and_sum_from(x, high)


@inline
def _max_and_sum_from(x, peak):
    """`max_and_sum` that begins with `peak`, the maximum of the first block at least."""
    total = ZERO
    for lo in range(0, x.size, BLOCK):
        block = x[lo : lo + BLOCK]
        high, subtotal = _max_and_sum_above(block, peak)
        if high > peak + HEADROOM:  # the exponentials have overflown, or there was no peak yet
            total *= ZERO if peak == NEG_INF else np.float32(math.exp(peak - high))
            peak = high
            high, subtotal = _max_and_sum_above(block, peak)
        if peak > NEG_INF:
            total += subtotal
        if high > peak:
            total *= np.float32(math.exp(peak - high))
            peak = high
    return peak, total


@inline
def _max_of(x):
    high = NEG_INF
    for i in range(x.size):
        high = maximum(high, widen(x[i]))
    return high


@inline
def _max_and_sum_above(x, peak):
    """(max x, sum exp(x - peak)) in one pass; the sum holds up to max x = peak + HEADROOM."""
    high, total = NEG_INF, ZERO
    for i in range(x.size):
        value = widen(x[i])
        high = maximum(high, value)
        total += exp(value - peak)
    return high, total
