"""Pieces that several kernels share."""

import triton
import triton.language as tl

from dorac import numerics

ZERO_ROW_NORM = tl.constexpr(numerics.ZERO_ROW_NORM)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def number(source):
    """A float32, given as it is or as a pointer to it."""
    if INTERPRETED:  # which leaves a number as it is
        return source if isinstance(source, float) else tl.load(source).to(tl.float32)
    elif source.dtype.is_ptr():
        return tl.load(source).to(tl.float32)
    else:
        return source.to(tl.float32)


@triton.jit
def to_bfloat16(x):
    """float32 ``x`` rounded to nearest, which the interpreter would truncate."""
    if INTERPRETED:
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    return x.to(tl.bfloat16)


@triton.jit
def load_tile(
    source,
    start_m,
    start_n,
    M,
    N,
    stride_m,
    stride_n,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EVEN: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
):
    """The tile at ``(start_m, start_n)`` of an ``[M, N]`` matrix, zero beyond its edges."""
    if DESCRIPTOR:
        return source.load([start_m, start_n])
    else:
        rows = (start_m + tl.arange(0, BLOCK_M)).to(tl.int64)
        cols = (start_n + tl.arange(0, BLOCK_N)).to(tl.int64)
        pointers = source + rows[:, None] * stride_m + cols[None, :] * stride_n
        if EVEN:
            return tl.load(pointers)
        else:
            return tl.load(pointers, mask=(rows < M)[:, None] & (cols < N)[None, :], other=0.0)


@triton.jit
def store_tile(
    target,
    tile,
    start_m,
    start_n,
    M,
    N,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EVEN: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
):
    """Rounds the tile once and writes it to ``(start_m, start_n)`` of a contiguous ``[M, N]`` matrix."""
    if DESCRIPTOR:
        target.store([start_m, start_n], tile.to(target.dtype))
    else:
        rows = (start_m + tl.arange(0, BLOCK_M)).to(tl.int64)
        cols = start_n + tl.arange(0, BLOCK_N)
        pointers = target + rows[:, None] * N + cols[None, :]
        tile = tile.to(target.dtype.element_ty)
        if EVEN:
            tl.store(pointers, tile)
        else:
            tl.store(pointers, tile, mask=(rows < M)[:, None] & (cols < N)[None, :])


@triton.jit
def _dot(left, right, acc):
    if INTERPRETED:  # whose dot takes the bits of bfloat16 numbers for integers
        left, right = left.to(tl.float32), right.to(tl.float32)
    return tl.dot(left, right, acc, input_precision="ieee")


@triton.jit
def product(left, right, acc, SPLIT: tl.constexpr):
    """``acc + left @ right``, accumulated in float32.

    Products of half-precision numbers are exact there. Float32 operands are multiplied in full float32, or with SPLIT
    as pairs of bfloat16 numbers, high and low: 16 bits of each operand on the tensor cores, more than the
    half-precision tensor that the product is added to can tell apart. There an infinite operand gives NaN.
    """
    if SPLIT:
        left_high = left.to(tl.bfloat16)
        right_high = right.to(tl.bfloat16)
        left_low = (left - left_high.to(tl.float32)).to(tl.bfloat16)
        right_low = (right - right_high.to(tl.float32)).to(tl.bfloat16)
        acc = _dot(left_low, right_high, acc)
        acc = _dot(left_high, right_low, acc)
        return _dot(left_high, right_high, acc)
    else:
        return _dot(left, right, acc)


@triton.jit
def magnitude_scale(magnitude_ptr, norm_ptr, index, mask, HAS_NORM: tl.constexpr):
    """``g = m / n``, and 1 where ``n <= 1e-12``; without a norm, g is what ``magnitude_ptr`` holds."""
    g = tl.load(magnitude_ptr + index, mask=mask, other=0.0).to(tl.float32)
    if HAS_NORM:
        norm = tl.load(norm_ptr + index, mask=mask, other=1.0).to(tl.float32)
        g = tl.where(norm <= ZERO_ROW_NORM, 1.0, tl.div_rn(g, norm))
    return g


@triton.jit
def strip_sum(partial_ptr, index, mask, size, strips):
    """``sum over S of partial[S, size]`` at ``index``, in the order of S."""
    total = tl.zeros(index.shape, dtype=tl.float32)
    pointers = partial_ptr + index
    for _ in range(strips):
        total += tl.load(pointers, mask=mask, other=0.0)
        pointers += size
    return total
