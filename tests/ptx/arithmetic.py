"""What single instructions compute, on NumPy arrays of threads or scalars."""

from collections.abc import Callable
from typing import Any

import numpy as np

u32, u64 = np.uint32, np.uint64
_SMALLEST_NORMAL = 2.0**-126

approximation_ulps = 0  # by which ex2, lg2 and approximate divisions are off: what depends on their last bits shows


def fma32(a: Any, b: Any, c: Any) -> Any:
    """a * b + c, rounded once."""
    product = np.multiply(a, b, dtype=np.float64)  # exact
    total = np.asarray(product + c)
    between = (total.view(np.int64) & 0x1FFFFFFF) == 0x10000000  # as near to one float as to the next one
    if np.any(between | (np.abs(total) < _SMALLEST_NORMAL)):
        total = _rounded_to_odd(product, np.asarray(c, np.float64), total)
    return total.astype(np.float32)


def _rounded_to_odd(a: Any, b: Any, total: Any) -> Any:
    """a + b in float64 such that a second rounding, to float32, sees on which side the exact sum lies."""
    back = total - a
    lost = (a - (total - back)) + (b - back)
    bits = total.view(np.int64)
    wrong = (lost != 0) & np.isfinite(total) & ((bits & 1) == 0)
    return np.where(wrong, bits + np.where((lost > 0) == (total > 0), 1, -1), bits).view(np.float64)


def round_toward_zero(exact: Any) -> Any:
    rounded = exact.astype(np.float32)
    return np.where(np.abs(rounded) > np.abs(exact), np.nextafter(rounded, np.float32(0)), rounded)


def ftz(x: Any) -> Any:
    """Subnormal numbers become 0."""
    return np.where(np.abs(x) < np.float32(_SMALLEST_NORMAL), np.copysign(np.float32(0), x), x)


def approximate(result: Any, x: Any) -> Any:
    """The result, off by up to ``approximation_ulps``, always the same for the same ``x``."""
    if approximation_ulps == 0:
        return result
    result, x = np.broadcast_arrays(np.asarray(result, np.float32), np.asarray(x, np.float32))
    mixed = (x.view(u32) * u32(2654435761)) >> u32(16)
    delta = (mixed % u32(2 * approximation_ulps + 1)).astype(np.int32) - approximation_ulps
    usual = np.isfinite(result) & (np.abs(result) > 2 * _SMALLEST_NORMAL) & (np.abs(result) < 1e38) & (x != 0)
    return np.where(usual, (result.view(np.int32) + delta).view(np.float32), result)


def ex2(x: Any, flush: bool) -> Any:
    x = ftz(x) if flush else x
    result = np.exp2(np.asarray(x, np.float64)).astype(np.float32)
    return approximate(ftz(result) if flush else result, x)


def lg2(x: Any, flush: bool) -> Any:
    x = ftz(x) if flush else x
    return approximate(np.log2(np.asarray(x, np.float64)).astype(np.float32), x)


def quotient(a: Any, b: Any, batch: Any, line: int) -> Any:
    """Of integers, toward 0."""
    b = _divisor(b, batch, line)
    if a.dtype.kind == "u":
        return a // b
    down = a // b
    return np.where((a - down * b != 0) & ((a < 0) != (b < 0)), down + a.dtype.type(1), down)


def remainder(a: Any, b: Any, batch: Any, line: int) -> Any:
    return a - quotient(a, b, batch, line) * _divisor(b, batch, line)


def _divisor(b: Any, batch: Any, line: int) -> Any:
    if np.any(b == 0):
        batch.report("division by zero", line)
        return np.where(b == 0, np.ones_like(b), b)
    return b


def to_half(x: Any) -> Any:
    half = np.asarray(x).astype(np.float16).view(np.uint16)
    return np.where(x != x, np.uint16(0x7FFF), half)


def from_half(bits: Any) -> Any:
    return np.asarray(bits).view(np.float16).astype(np.float32)


def to_brain(x: Any) -> Any:
    bits = np.asarray(x, np.float32).view(u32)
    rounded = ((bits + u32(0x7FFF) + ((bits >> u32(16)) & u32(1))) >> u32(16)).astype(np.uint16)
    return np.where(x != x, np.uint16(0x7FFF), rounded)


def from_brain(bits: Any) -> Any:
    return (np.asarray(bits).astype(u32) << u32(16)).view(np.float32)


def to_tf32(x: Any) -> Any:
    """The nearest number of ten bits behind the point, the larger one of two."""
    bits = np.asarray(x, np.float32).view(u32)
    finite = (bits & u32(0x7F800000)) != u32(0x7F800000)
    return np.where(finite, (bits + u32(0x1000)) & u32(0xFFFFE000), bits)


def pack16(low: Any, high: Any) -> Any:
    return low.astype(u32) | (high.astype(u32) << u32(16))


_ROUNDINGS: dict[str, Callable] = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}


def round_to_integer(x: Any, mode: str) -> Any:
    """As a floating-point number."""
    return _ROUNDINGS[mode](x)


def float_to_int(x: Any, dtype: Any, mode: str) -> Any:
    """Clamped to the integers that there are; NaN becomes 0."""
    rounded = _ROUNDINGS[mode](np.asarray(x, np.float64))
    info = np.iinfo(dtype)
    low, high = rounded <= float(info.min), rounded >= float(info.max)
    result = np.where(low | high | (x != x), 0, rounded).astype(dtype)
    return np.where(x != x, dtype(0), np.where(low, dtype(info.min), np.where(high, dtype(info.max), result)))


def prmt(a: Any, b: Any, selectors: Any) -> Any:
    """Four bytes out of the eight of (b, a)."""
    both = a.astype(u64) | (np.asarray(b).astype(u64) << u64(32))
    result = u32(0)
    for i in range(4):
        selector = (np.asarray(selectors) >> u32(4 * i)) & u32(15)
        byte = (both >> ((selector & u32(7)).astype(u64) * u64(8))).astype(u32) & u32(255)
        sign = np.where(byte & u32(128), u32(255), u32(0))
        result = result | (np.where(selector & u32(8), sign, byte) << u32(8 * i))
    return result


def bfe(a: Any, start: Any, length: Any, dtype: Any) -> Any:
    """A field of bits, with its sign if the type has one."""
    bits = a.dtype.itemsize * 8
    start, length = np.asarray(start) & u32(255), np.minimum(np.asarray(length) & u32(255), u32(bits))
    word = np.asarray(a).view(u32 if bits == 32 else u64)
    t = word.dtype.type
    shifted = np.where(start >= bits, t(0), word >> start.astype(word.dtype))
    mask = np.where(length >= bits, t(2**bits - 1), (t(1) << length.astype(word.dtype)) - t(1))
    result = shifted & mask
    if np.dtype(dtype).kind == "i":
        top = np.minimum(start + length - u32(1), u32(bits - 1)).astype(word.dtype)
        sign = np.where(length == 0, t(0), (word >> top) & t(1))
        result = np.where(sign == 1, result | ~mask, result)
    return result


def bfi(a: Any, b: Any, start: Any, length: Any) -> Any:
    """b with a field of bits from a."""
    start, length = np.asarray(start) & u32(255), np.minimum(np.asarray(length) & u32(255), u32(32))
    mask = np.where(length >= 32, u32(0xFFFFFFFF), (u32(1) << length) - u32(1))
    mask = np.where(start >= 32, u32(0), mask << start)
    return (b & ~mask) | ((a << start) & mask)


def lop3(a: Any, b: Any, c: Any, table: int) -> Any:
    """Any function of three bits."""
    result = u32(0)
    for i in range(8):
        if table >> i & 1:
            result = result | ((a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c))
    return result


def clz(a: Any) -> Any:
    """Leading zeros of 32 bits."""
    value = np.asarray(a).astype(np.float64)
    highest = np.floor(np.log2(np.where(value == 0, 1, value))).astype(u32)
    return np.where(value == 0, u32(32), u32(31) - highest)


def funnel_shift(low: Any, high: Any, amount: Any, left: bool, wrap: bool) -> Any:
    """32 of the 64 bits (high, low)."""
    amount = (amount & u32(31)) if wrap else np.minimum(amount, u32(32))
    both = np.asarray(low).astype(u64) | (np.asarray(high).astype(u64) << u64(32))
    shift = np.asarray(amount).astype(u64)
    return (((both << shift) >> u64(32)) if left else (both >> shift)).astype(u32)


def shift_left(a: Any, b: Any) -> Any:
    bits = a.dtype.itemsize * 8
    return np.where(b >= bits, a.dtype.type(0), a << np.minimum(b, u32(bits - 1)).astype(a.dtype))


def shift_right(a: Any, b: Any) -> Any:
    bits = a.dtype.itemsize * 8
    shifted = a >> np.minimum(b, u32(bits - 1)).astype(a.dtype)
    return shifted if a.dtype.kind == "i" else np.where(b >= bits, a.dtype.type(0), shifted)


def mul_hi(a: Any, b: Any) -> Any:
    """The upper half of a product."""
    size = a.dtype.itemsize
    signed = a.dtype.kind == "i"
    if size < 8:
        wide = np.dtype(f"{a.dtype.kind}{2 * size}").type
        return ((a.astype(wide) * b.astype(wide)) >> wide(8 * size)).astype(a.dtype)
    mask, half = u64(0xFFFFFFFF), u64(32)
    x, y = np.asarray(a).view(u64), np.asarray(b).view(u64)
    x_low, x_high, y_low, y_high = x & mask, x >> half, y & mask, y >> half
    middle = (x_low * y_low >> half) + ((x_high * y_low) & mask) + ((x_low * y_high) & mask)
    result = x_high * y_high + (x_high * y_low >> half) + (x_low * y_high >> half) + (middle >> half)
    if signed:
        result = result - np.where(a < 0, y, u64(0)) - np.where(b < 0, x, u64(0))
    return result.view(a.dtype)


FUNCTIONS = {
    **{f.__name__: f for f in (fma32, round_toward_zero, ftz, approximate, ex2, lg2, quotient, remainder, to_half)},
    **{f.__name__: f for f in (from_half, to_brain, from_brain, pack16, round_to_integer, float_to_int, prmt, bfe)},
    **{f.__name__: f for f in (to_tf32, bfi, lop3, clz, funnel_shift, shift_left, shift_right, mul_hi)},
}
