"""How a program finds its rows, and the segment that they belong to: see ``segments.py``."""

import functools

import triton
import triton.language as tl
from torch import Tensor

from dorac.kernels.launch import Launch, cdiv
from dorac.kernels.tiles import ZERO_ROW_NORM, magnitude_scale, number, product, to_bfloat16

BLOCK_E = 1024  # segments that a program looks at in one step, at most


@triton.jit
def find_segment(offsets_ptr, tile, S, E, rows_per_tile, BLOCK_E: tl.constexpr):
    """Of a tile of rows: its segment, that segment's first row and its end, and the tile's first row.

    The tail is segment E; past the last tile the segment is E + 1 and there are no rows.
    """
    segment, first, end, begin = E + 1, 0, 0, 0
    before = 0  # tiles of the segments that were looked at
    for start in range(0, E + 1, BLOCK_E):
        index = start + tl.arange(0, BLOCK_E)
        ends = tl.load(offsets_ptr + index, mask=index < E, other=S).to(tl.int32)
        starts = tl.load(offsets_ptr + index - 1, mask=(index > 0) & (index <= E), other=0).to(tl.int32)
        ends = tl.minimum(tl.maximum(ends, 0), S)
        starts = tl.minimum(tl.maximum(starts, 0), S)
        counts = tl.where(index <= E, tl.maximum(ends - starts, 0), 0)
        tiles = (counts + rows_per_tile - 1) // rows_per_tile
        until = before + tl.cumsum(tiles, 0)
        mine = (until > tile) & (until - tiles <= tile)
        if tl.sum(mine.to(tl.int32), 0) > 0:
            segment = tl.sum(tl.where(mine, index, 0), 0)
            first = tl.sum(tl.where(mine, starts, 0), 0)
            end = tl.sum(tl.where(mine, ends, 0), 0)
            begin = tl.sum(tl.where(mine, starts + (tile - (until - tiles)) * rows_per_tile, 0), 0)
        before += tl.sum(tiles, 0)
    return segment, first, end, begin


@triton.jit
def find_tiles(offsets_ptr, segment, S, E, rows_per_tile, BLOCK_E: tl.constexpr):
    """How many tiles a segment has, and how many there are before these."""
    of_it, before = 0, 0
    for start in range(0, E, BLOCK_E):
        index = start + tl.arange(0, BLOCK_E)
        ends = tl.load(offsets_ptr + index, mask=index < E, other=0).to(tl.int32)
        starts = tl.load(offsets_ptr + index - 1, mask=(index > 0) & (index < E), other=0).to(tl.int32)
        ends = tl.minimum(tl.maximum(ends, 0), S)
        starts = tl.minimum(tl.maximum(starts, 0), S)
        tiles = (tl.maximum(ends - starts, 0) + rows_per_tile - 1) // rows_per_tile
        of_it += tl.sum(tl.where(index == segment, tiles, 0), 0)
        before += tl.sum(tl.where(index < segment, tiles, 0), 0)
    return of_it, before


@triton.jit
def rows_of_tile(order_ptr, start, end, BLOCK_T: tl.constexpr):
    """The rows' numbers in every activation, and which of them there are."""
    rows_T = start + tl.arange(0, BLOCK_T)
    mask_T = rows_T < end
    if order_ptr is not None:
        rows_T = tl.load(order_ptr + rows_T, mask=mask_T, other=0)
    return rows_T.to(tl.int64), mask_T


@triton.jit
def load_rows(source, rows_T, mask_T, start_n, N, stride_t, stride_n, BLOCK_N: tl.constexpr, EVEN: tl.constexpr):
    cols_N = (start_n + tl.arange(0, BLOCK_N)).to(tl.int64)
    pointers = source + rows_T[:, None] * stride_t + cols_N[None, :] * stride_n
    if EVEN:
        return tl.load(pointers, mask=mask_T[:, None], other=0.0)
    else:
        return tl.load(pointers, mask=mask_T[:, None] & (cols_N < N)[None, :], other=0.0)


@triton.jit
def store_rows(to, tile_TN, rows_T, mask_T, start_n, N, stride_t, BLOCK_N: tl.constexpr, EVEN: tl.constexpr):
    cols_N = start_n + tl.arange(0, BLOCK_N)
    pointers = to + rows_T[:, None] * stride_t + cols_N[None, :]
    tile_TN = rounded(tile_TN, to)
    if EVEN:
        tl.store(pointers, tile_TN, mask=mask_T[:, None])
    else:
        tl.store(pointers, tile_TN, mask=mask_T[:, None] & (cols_N < N)[None, :])


@triton.jit
def rounded(x, to):
    """float32 ``x`` in the dtype of what ``to`` points at."""
    if to.dtype.element_ty == tl.bfloat16:
        return to_bfloat16(x)
    else:
        return x.to(to.dtype.element_ty)


@triton.jit
def load_of_segment(
    source,
    segment,
    start_m,
    start_n,
    M,
    N,
    stride_e,
    stride_m,
    stride_n,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EVEN: tl.constexpr,
):
    """A tile of a segment's ``[M, N]`` matrix, zero beyond its edges."""
    rows_M = (start_m + tl.arange(0, BLOCK_M)).to(tl.int64)
    cols_N = (start_n + tl.arange(0, BLOCK_N)).to(tl.int64)
    pointers = source + segment.to(tl.int64) * stride_e + rows_M[:, None] * stride_m + cols_N[None, :] * stride_n
    if EVEN:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=(rows_M < M)[:, None] & (cols_N < N)[None, :], other=0.0)


@triton.jit
def scaling_of(scaling_ptr, segment, EACH: tl.constexpr):
    """s: a number, an element, or with EACH one per segment."""
    if EACH:
        return tl.load(scaling_ptr + segment).to(tl.float32)
    else:
        return number(scaling_ptr)


@triton.jit
def scale_of(magnitude_ptr, norm_ptr, segment, O, stride_norm, cols_O, mask_O):
    """g of a segment's columns: ``m / n``, or without norms what ``magnitude_ptr`` holds."""
    magnitude_ptr += segment.to(tl.int64) * O
    if norm_ptr is None:
        return magnitude_scale(magnitude_ptr, norm_ptr, cols_O, mask_O, False)
    else:
        return magnitude_scale(magnitude_ptr, norm_ptr + segment.to(tl.int64) * stride_norm, cols_O, mask_O, True)


@triton.jit
def store_vectors(
    acc_O,  # of dy * inner
    bias_O,
    norm_ptr,
    d_m_ptr,
    d_bias_ptr,  # or None
    parts_m_ptr,
    parts_bias_ptr,
    segment,
    strip,
    alone,
    start_o,
    end_o,
    O,
    stride_norm,
    BLOCK_O: tl.constexpr,
):
    """The sums of a strip's columns: the gradients, or where a segment has several strips its row of the parts."""
    cols_O = start_o + tl.arange(0, BLOCK_O)
    mask_O = cols_O < end_o
    of_norm = segment.to(tl.int64) * stride_norm
    norm_O = tl.load(norm_ptr + of_norm + cols_O, mask=mask_O, other=1.0).to(tl.float32)
    d_m_O = tl.where(norm_O <= ZERO_ROW_NORM, 0.0, acc_O / norm_O)
    if alone:
        of_segment = segment.to(tl.int64) * O
        tl.store(d_m_ptr + of_segment + cols_O, rounded(d_m_O, d_m_ptr), mask=mask_O)
        if d_bias_ptr is not None:
            tl.store(d_bias_ptr + of_segment + cols_O, rounded(bias_O, d_bias_ptr), mask=mask_O)
    else:
        of_strip = strip.to(tl.int64) * O
        tl.store(parts_m_ptr + of_strip + cols_O, d_m_O, mask=mask_O)
        if d_bias_ptr is not None:
            tl.store(parts_bias_ptr + of_strip + cols_O, bias_O, mask=mask_O)


@triton.jit
def store_factor(
    acc_OR,
    d_b_ptr,
    parts_b_ptr,
    segment,
    strip,
    alone,
    start_o,
    end_o,
    O,
    start_r,
    R,
    stride_be,
    stride_bo,
    stride_br,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """The same of a factor."""
    rows_O = (start_o + tl.arange(0, BLOCK_O)).to(tl.int64)[:, None]
    cols_R = (start_r + tl.arange(0, BLOCK_R)).to(tl.int64)[None, :]
    mask_OR = (rows_O < end_o) & (cols_R < R)
    if alone:
        to = d_b_ptr + segment.to(tl.int64) * stride_be + rows_O * stride_bo + cols_R * stride_br
        tl.store(to, rounded(acc_OR, d_b_ptr), mask=mask_OR)
    else:
        tl.store(parts_b_ptr + strip.to(tl.int64) * O * R + rows_O * R + cols_R, acc_OR, mask=mask_OR)


@triton.jit
def exact_product(left, right, acc, WIDE: tl.constexpr):
    """``acc + left @ right`` for a left operand in half precision and a right one that with WIDE is float32.

    A float32 number is the sum of three bfloat16 ones, so that their products are those of float32, on the tensor
    cores. float16 beside float32, and float32, are multiplied as float32.
    """
    if WIDE:
        if left.dtype == tl.bfloat16:
            high = right.to(tl.bfloat16)
            rest = right - high.to(tl.float32)
            middle = rest.to(tl.bfloat16)
            low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
            acc = product(left, low, acc, False)
            acc = product(left, middle, acc, False)
            return product(left, high, acc, False)
        else:
            return product(left.to(tl.float32), right.to(tl.float32), acc, False)
    else:
        return product(left, right, acc, False)


def row_tiles(rows: int, segments: int, rows_per_tile: int) -> int:
    """At most as many tiles as there are, of ``rows`` in ``segments`` and the tail."""
    parts = segments + 1
    return rows if rows <= parts else (rows - parts) // rows_per_tile + parts


def looked_at(segments: int) -> int:
    """BLOCK_E of so many segments."""
    return min(BLOCK_E, 1 << segments.bit_length())


def scales_each(scaling: Tensor | float | None) -> bool:
    """Whether each segment has a scaling of its own."""
    return isinstance(scaling, Tensor) and scaling.ndim == 1


def norms_in_rows(weight_norm: Tensor | None) -> Tensor | None:
    """The norms as kernels index them: each segment's side by side, however far the segments lie apart."""
    return weight_norm if weight_norm is None or weight_norm.stride(1) == 1 else weight_norm.contiguous()


@triton.jit
def zero_tail_kernel(y_ptr, offsets_ptr, S, O, E, BLOCK_T: tl.constexpr, BLOCK_O: tl.constexpr):
    last = tl.load(offsets_ptr + E - 1).to(tl.int32)
    start = tl.program_id(0) * BLOCK_T
    if start + BLOCK_T <= last:
        return
    rows_T = (start + tl.arange(0, BLOCK_T)).to(tl.int64)
    mask_T = (rows_T >= last) & (rows_T < S)
    for start_o in tl.range(0, O, BLOCK_O, num_stages=1):
        zero_TO = tl.zeros([BLOCK_T, BLOCK_O], dtype=tl.float32)
        store_rows(y_ptr, zero_TO, rows_T, mask_T, start_o, O, O, BLOCK_O, False)


@functools.lru_cache(maxsize=4096)
def zero_tail_launch(rows: int, segments: int, columns: int) -> Launch:
    grid = cdiv(rows, 16), 1, 1
    return Launch(zero_tail_kernel, grid, (rows, columns, segments), 4, BLOCK_T=16, BLOCK_O=256)


def zero_tail(y: Tensor, offsets: Tensor) -> None:
    """Writes zeros to the tail's rows of a contiguous ``y [S, O]``."""
    if y.numel() and len(offsets):
        zero_tail_launch(y.shape[0], len(offsets), y.shape[1])(y, offsets)
