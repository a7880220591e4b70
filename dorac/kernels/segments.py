"""Rows that are sorted by segment, each segment with a layer of its own: experts, or the adapters of a mixed batch.

The host knows how many rows and segments there are, the offsets lie on the device and are never read from there. So a
grid has as many tiles of rows as any offsets may need, and a program finds out which segment its tile belongs to;
programs past the last tile end at once. Every sum has one order, wherever the segments end.

``offsets [E]`` are the rows' ends, not decreasing. Rows past the last belong to no segment: they are the tail, which
gets zeros, or with ``plain_tail`` is the layer without an adapter. With ``order [S]`` the sorted row i is row
``order[i]`` of every activation: a batch in any order, and nothing is moved. Offsets that are wrong make no program
read or write out of bounds, but leave rows unwritten.

Three kernels, each with two uses in a layer:

- :func:`segment_compose`: ``y = g_e * (base + s_e h B_e^T) + b_e``; without g it adds ``s_e h B_e^T`` to a product, as
  the gradient of x has it, ``d_base W_e + s_e d_h A_e``;
- :func:`segment_product`: ``h = x A_e^T``, and ``d_h = dy (g_e B_e)``: long rows, few columns;
- :func:`segment_backward`: ``g_e * dy`` with the gradients of magnitude, lora_B and bias in one pass over dy and inner,
  and without these lora_A's, ``s_e d_h^T x``.

Legend: S rows, E segments, O out_features, I in_features, R rank, T rows of a tile.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from dorac.kernels import target
from dorac.kernels.backward import strip_sum_kernel
from dorac.kernels.configs import (
    ProductConfig,
    SegmentConfig,
    TileConfig,
    segment_backward_config,
    segment_product_config,
    segment_tile_config,
)
from dorac.kernels.launch import Launch, cdiv, contiguous
from dorac.kernels.tiles import magnitude_scale, number, product, to_bfloat16

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


@triton.jit
def segment_compose_kernel(
    h_ptr,
    base_ptr,  # or None: zero
    b_ptr,
    magnitude_ptr,  # or None: g is 1
    norm_ptr,  # or None: magnitude is g
    scaling_ptr,  # or a number
    bias_ptr,
    offsets_ptr,
    order_ptr,
    y_ptr,
    inner_ptr,
    S,
    O,
    R,
    E,
    rows_per_tile,
    stride_base_t,
    stride_base_o,
    stride_ht,
    stride_hr,
    stride_be,
    stride_bo,
    stride_br,
    stride_norm,  # from one segment's norms to the next's
    stride_bias,  # the same of biases; 0 where they share one
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
    EVEN_O: tl.constexpr,  # no tile reaches over the last column
    EVEN_R: tl.constexpr,
    DELTA: tl.constexpr,
    SPLIT: tl.constexpr,
    EACH: tl.constexpr,  # a scaling for every segment
    PLAIN: tl.constexpr,  # the tail is base + b
    WALK: tl.constexpr,  # all ranks are in one step
    STAGES: tl.constexpr,
):
    blocks_o = tl.cdiv(O, BLOCK_O)
    tile, start_o = tl.program_id(0) // blocks_o, tl.program_id(0) % blocks_o * BLOCK_O
    segment, _, end, begin = find_segment(offsets_ptr, tile, S, E, rows_per_tile, BLOCK_E)
    end = tl.minimum(end, begin + rows_per_tile)
    if begin >= end:
        return
    cols_O = start_o + tl.arange(0, BLOCK_O)
    mask_O = cols_O < O
    if segment == E:
        for start in tl.range(begin, end, BLOCK_T, num_stages=1):
            rows_T, mask_T = rows_of_tile(order_ptr, start, end, BLOCK_T)
            zero_TO = tl.zeros([BLOCK_T, BLOCK_O], dtype=tl.float32)
            tail_TO = zero_TO
            if PLAIN:
                base_TO = load_rows(base_ptr, rows_T, mask_T, start_o, O, stride_base_t, stride_base_o, BLOCK_O, EVEN_O)
                tail_TO += base_TO.to(tl.float32)
                if bias_ptr is not None:
                    tail_TO += tl.load(bias_ptr + cols_O, mask=mask_O, other=0.0).to(tl.float32)[None, :]
            if inner_ptr is not None:  # which may lie where base is
                store_rows(inner_ptr, zero_TO, rows_T, mask_T, start_o, O, O, BLOCK_O, EVEN_O)
            store_rows(y_ptr, tail_TO, rows_T, mask_T, start_o, O, O, BLOCK_O, EVEN_O)
        return
    s = scaling_of(scaling_ptr, segment, EACH)
    if magnitude_ptr is not None:
        g_O = scale_of(magnitude_ptr, norm_ptr, segment, O, stride_norm, cols_O, mask_O)
    if bias_ptr is not None:
        of_bias = segment.to(tl.int64) * stride_bias
        bias_O = tl.load(bias_ptr + of_bias + cols_O, mask=mask_O, other=0.0).to(tl.float32)
    if WALK:
        b_OR = load_of_segment(
            b_ptr,
            segment,
            start_o,
            0,
            O,
            R,
            stride_be,
            stride_bo,
            stride_br,
            BLOCK_O,
            BLOCK_R,
            EVEN_O and EVEN_R,
        )
    for start in tl.range(begin, end, BLOCK_T, num_stages=1):
        rows_T, mask_T = rows_of_tile(order_ptr, start, end, BLOCK_T)
        acc_TO = tl.zeros([BLOCK_T, BLOCK_O], dtype=tl.float32)
        if base_ptr is None:
            base_TO = acc_TO
        elif WALK:
            base_TO = load_rows(base_ptr, rows_T, mask_T, start_o, O, stride_base_t, stride_base_o, BLOCK_O, EVEN_O)
        if WALK:
            h_TR = load_rows(h_ptr, rows_T, mask_T, 0, R, stride_ht, stride_hr, BLOCK_R, EVEN_R)
            acc_TO = product(h_TR, b_OR.T, acc_TO, SPLIT)
        else:
            for start_r in tl.range(0, R, BLOCK_R, num_stages=STAGES):
                h_TR = load_rows(h_ptr, rows_T, mask_T, start_r, R, stride_ht, stride_hr, BLOCK_R, EVEN_R)
                b_OR = load_of_segment(
                    b_ptr,
                    segment,
                    start_o,
                    start_r,
                    O,
                    R,
                    stride_be,
                    stride_bo,
                    stride_br,
                    BLOCK_O,
                    BLOCK_R,
                    EVEN_O and EVEN_R,
                )
                acc_TO = product(h_TR, b_OR.T, acc_TO, SPLIT)
            if base_ptr is not None:
                base_TO = load_rows(base_ptr, rows_T, mask_T, start_o, O, stride_base_t, stride_base_o, BLOCK_O, EVEN_O)
        base_TO, lora_TO = base_TO.to(tl.float32), s * acc_TO
        if inner_ptr is not None:
            store_rows(inner_ptr, base_TO + lora_TO, rows_T, mask_T, start_o, O, O, BLOCK_O, EVEN_O)
        if DELTA:
            y_TO = (g_O[None, :] - 1) * base_TO + g_O[None, :] * lora_TO
        elif magnitude_ptr is not None:
            y_TO = g_O[None, :] * (base_TO + lora_TO)
        else:
            y_TO = base_TO + lora_TO
        if bias_ptr is not None:
            y_TO += bias_O[None, :]
        store_rows(y_ptr, y_TO, rows_T, mask_T, start_o, O, O, BLOCK_O, EVEN_O)


def row_tiles(rows: int, segments: int, rows_per_tile: int) -> int:
    """At most as many tiles as there are, of ``rows`` in ``segments`` and the tail."""
    parts = segments + 1
    return rows if rows <= parts else (rows - parts) // rows_per_tile + parts


def _block_e(segments: int) -> int:
    return min(BLOCK_E, 1 << segments.bit_length())


def _scales(scaling: Tensor | float | None) -> bool:
    return isinstance(scaling, Tensor) and scaling.ndim == 1


def norms_in_rows(weight_norm: Tensor | None) -> Tensor | None:
    """The norms as kernels index them: each segment's side by side, however far the segments lie apart."""
    return weight_norm if weight_norm is None or weight_norm.stride(1) == 1 else weight_norm.contiguous()


@functools.lru_cache(maxsize=4096)
def segment_compose_launch(
    rows: int,
    segments: int,
    out_features: int,
    rank: int,
    strides: tuple[tuple[int, ...], ...],
    config: TileConfig,
    *,
    delta: bool,
    split: bool,
    each: bool,
    stride_norm: int | None = None,
    shared_bias: bool = False,
    plain_tail: bool = False,
) -> Launch:
    """The launch for base, h and lora_B of these strides.

    Its tensors: h, base, lora_B, magnitude, weight_norm, scaling, bias, offsets, order, y, inner; g is 1 where there is
    no magnitude, and of base, bias, order and inner each may be None.
    """
    walk = rank <= config.block_r
    per_tile = max(config.rows, config.block_t) if walk else config.block_t
    blocks = cdiv(out_features, config.block_o)
    return Launch(
        segment_compose_kernel,
        (row_tiles(rows, segments, per_tile) * blocks, 1, 1),
        (
            rows,
            out_features,
            rank,
            segments,
            per_tile,
            *(s for of_one in strides for s in of_one),
            stride_norm or out_features,
            0 if shared_bias else out_features,
        ),
        config.warps,
        BLOCK_T=config.block_t,
        BLOCK_O=config.block_o,
        BLOCK_R=config.block_r,
        BLOCK_E=_block_e(segments),
        EVEN_O=out_features % config.block_o == 0,
        EVEN_R=rank % config.block_r == 0,
        DELTA=delta,
        SPLIT=split,
        EACH=each,
        PLAIN=plain_tail,
        WALK=walk,
        STAGES=config.stages,
    )


def segment_compose(
    base: Tensor | None,
    h: Tensor,
    lora_B: Tensor,
    magnitude: Tensor | None,
    weight_norm: Tensor | None,
    scaling: Tensor | float,
    bias: Tensor | None,
    offsets: Tensor,
    order: Tensor | None = None,
    *,
    delta: bool = False,
    want_inner: bool = False,
    plain_tail: bool = False,
    over_base: bool = False,
    config: TileConfig | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``inner = base + s_e h B_e^T`` and ``y = g_e * inner + b_e`` (or its delta form), in the dtype of ``base``.

    Args:
        base: ``[S, O]``, h: ``[S, R]``, lora_B: ``[E, O, R]``, any strides. h and lora_B of one dtype, that of base or
            float32. Without a base, for which there is 0, the result has theirs.
        magnitude: ``[E, O]``; g itself where ``weight_norm`` is None; None for ``g = 1``.
        scaling: a number, one element on the device, or ``[E]``.
        bias: ``[E, O]``, or ``[O]`` for all segments and a plain tail.
        offsets: ``[E]``, int32 or int64. order: ``[S]``, int32 or int64.
        want_inner: write inner too, zero in the tail.
        over_base: write y where base is, which has to be contiguous; with ``want_inner`` inner.
        config: how to launch; None chooses it.
    """
    rows, (segments, out_features, rank) = h.shape[0], lora_B.shape
    like = h if base is None else base
    y = base if over_base and not want_inner else like.new_empty(rows, out_features)
    inner = None
    if want_inner:
        inner = base if over_base else torch.empty_like(y)
    if not y.numel():
        return y, inner
    if not rank or not segments:
        raise ValueError(f"lora_B must have segments and ranks, got {list(lora_B.shape)}")
    shared_bias = bias is not None and bias.ndim == 1
    magnitude, bias = contiguous(magnitude, bias)
    weight_norm = norms_in_rows(weight_norm)
    launch = segment_compose_launch(
        rows,
        segments,
        out_features,
        rank,
        ((0, 0) if base is None else base.stride(), h.stride(), lora_B.stride()),
        config or segment_tile_config(rows, segments, out_features, rank, lora_B.dtype, like.dtype, target.of(h)),
        delta=delta,
        split=lora_B.dtype is torch.float32 and like.dtype is not torch.float32,
        each=_scales(scaling),
        stride_norm=None if weight_norm is None else weight_norm.stride(0),
        shared_bias=shared_bias,
        plain_tail=plain_tail,
    )
    launch(h, base, lora_B, magnitude, weight_norm, scaling, bias, offsets, order, y, inner)
    return y, inner


@triton.jit
def segment_product_kernel(
    x_ptr,
    a_ptr,
    magnitude_ptr,  # of the columns of x, or None
    norm_ptr,
    scaling_ptr,
    offsets_ptr,
    order_ptr,
    y_ptr,  # with splits their sums, [splits, S, R]
    S,
    I,
    R,
    E,
    splits,
    columns_per_split,
    stride_xt,
    stride_xi,
    stride_ae,
    stride_ar,
    stride_ai,
    stride_norm,
    BLOCK_T: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
    EVEN: tl.constexpr,  # no tile reaches over the last column or rank
    WIDE: tl.constexpr,  # float32 factors
    EACH: tl.constexpr,
    STAGES: tl.constexpr,
):
    blocks_r = tl.cdiv(R, BLOCK_R)
    tile, rest = tl.program_id(0) // (blocks_r * splits), tl.program_id(0) % (blocks_r * splits)
    split, start_r = rest // blocks_r, rest % blocks_r * BLOCK_R
    segment, _, end, begin = find_segment(offsets_ptr, tile, S, E, BLOCK_T, BLOCK_E)
    if begin >= end:
        return
    rows_T, mask_T = rows_of_tile(order_ptr, begin, end, BLOCK_T)
    acc_TR = tl.zeros([BLOCK_T, BLOCK_R], dtype=tl.float32)
    if segment < E:
        first = split * columns_per_split
        for start_i in tl.range(first, tl.minimum(first + columns_per_split, I), BLOCK_I, num_stages=STAGES):
            x_TI = load_rows(x_ptr, rows_T, mask_T, start_i, I, stride_xt, stride_xi, BLOCK_I, EVEN)
            a_RI = load_of_segment(
                a_ptr, segment, start_r, start_i, R, I, stride_ae, stride_ar, stride_ai, BLOCK_R, BLOCK_I, EVEN
            )
            if magnitude_ptr is not None:
                cols_I = start_i + tl.arange(0, BLOCK_I)
                g_I = scale_of(magnitude_ptr, norm_ptr, segment, I, stride_norm, cols_I, cols_I < I)
                a_RI = (a_RI.to(tl.float32) * g_I[None, :]).to(a_RI.dtype)
            acc_TR = exact_product(x_TI, a_RI.T, acc_TR, WIDE)
        if scaling_ptr is not None:
            acc_TR *= scaling_of(scaling_ptr, segment, EACH)
    y_ptr += split.to(tl.int64) * S * R
    store_rows(y_ptr, acc_TR, rows_T, mask_T, start_r, R, R, BLOCK_R, EVEN)


@functools.lru_cache(maxsize=4096)
def segment_product_launches(
    rows: int,
    segments: int,
    in_features: int,
    rank: int,
    strides: tuple[tuple[int, ...], ...],
    config: ProductConfig,
    *,
    wide: bool,
    each: bool,
    stride_norm: int | None = None,
) -> tuple[int, Launch, Launch | None]:
    """Over how many splits, the launch for x and A of these strides, and what adds several splits up.

    ``stride_norm``: from one segment's norms to the next's, None for as many as there are.

    Its tensors: x, A, magnitude, weight_norm, scaling, offsets, order, y or the splits; the other's: the splits, None,
    y.
    """
    steps = cdiv(in_features, config.block_i)
    per_split = cdiv(steps, config.splits) * config.block_i
    splits = max(1, cdiv(in_features, per_split))
    tiles = row_tiles(rows, segments, config.block_t)
    launch = Launch(
        segment_product_kernel,
        (tiles * splits * cdiv(rank, config.block_r), 1, 1),
        (rows, in_features, rank, segments, splits, per_split, *strides[0], *strides[1], stride_norm or in_features),
        config.warps,
        BLOCK_T=config.block_t,
        BLOCK_I=config.block_i,
        BLOCK_R=config.block_r,
        BLOCK_E=_block_e(segments),
        EVEN=in_features % config.block_i == 0 and rank % config.block_r == 0,
        WIDE=wide,
        EACH=each,
        STAGES=config.stages,
    )
    if splits == 1:
        return 1, launch, None
    size = rows * rank
    add = Launch(strip_sum_kernel, (cdiv(size, 256), 1, 1), (size, splits), 4, HAS_NORM=False, BLOCK=256)
    return splits, launch, add


def segment_product(
    x: Tensor,
    lora_A: Tensor,
    offsets: Tensor,
    order: Tensor | None = None,
    *,
    magnitude: Tensor | None = None,
    weight_norm: Tensor | None = None,
    scaling: Tensor | float | None = None,
    config: ProductConfig | None = None,
) -> Tensor:
    """``h = s_e x (g_e A_e)^T [S, R]`` in the dtype of A, zero in the tail.

    Args:
        x: ``[S, I]``, lora_A: ``[E, R, I]``, any strides; A of x's dtype or float32, with which products are exact.
        magnitude, weight_norm: ``[E, I]``, of ``g = m / n`` over the columns, or g itself and None; None for 1.
        scaling: a number, one element on the device, ``[E]``, or None for 1.
        offsets, order: as of :func:`segment_compose`.
    """
    (rows, in_features), (segments, rank, _) = x.shape, lora_A.shape
    y = lora_A.new_empty(rows, rank)
    if not rows or not rank:
        return y
    (magnitude,), weight_norm = contiguous(magnitude), norms_in_rows(weight_norm)
    splits, launch, add = segment_product_launches(
        rows,
        segments,
        in_features,
        rank,
        (x.stride(), lora_A.stride()),
        config or segment_product_config(rows, segments, in_features, rank, x.dtype, lora_A.dtype, target.of(x)),
        wide=lora_A.dtype is torch.float32,
        each=_scales(scaling),
        stride_norm=None if weight_norm is None else weight_norm.stride(0),
    )
    to = y if add is None else y.new_empty(splits * rows, rank, dtype=torch.float32)
    launch(x, lora_A, magnitude, weight_norm, scaling, offsets, order, to)
    if add is not None:
        add(to, None, y)
    return y


@triton.jit
def segment_backward_kernel(
    dy_ptr,
    again_ptr,  # dy once more: see lora_b_backward_kernel
    inner_ptr,  # these three None: lora_A's gradient, of x and d_h
    magnitude_ptr,
    norm_ptr,
    h_ptr,
    scaling_ptr,
    offsets_ptr,
    order_ptr,
    d_base_ptr,
    d_m_ptr,
    d_b_ptr,
    d_bias_ptr,  # or None
    parts_m_ptr,  # of segments with more than one strip: a row for every strip
    parts_b_ptr,
    parts_bias_ptr,
    S,
    O,
    R,
    E,
    rows_per_strip,
    stride_dt,
    stride_do,
    stride_it,
    stride_io,
    stride_ht,
    stride_hr,
    stride_be,
    stride_bo,
    stride_br,
    stride_norm,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
    EVEN_O: tl.constexpr,
    EVEN_R: tl.constexpr,
    DELTA: tl.constexpr,
    WIDE: tl.constexpr,  # float32 h
    EACH: tl.constexpr,
    BLOCKS_R: tl.constexpr,  # programs for the ranks; the first of them has all the rest
    PLAIN: tl.constexpr,  # the tail's d_base is dy
    STAGES: tl.constexpr,
):
    """``d_base [S, O]`` of a strip, and its sums for ``d_magnitude``, ``d_bias`` and ``d_lora_B``.

    A segment in one strip gets its gradients here; what more strips have, and zeros for a segment without rows, are
    left to :func:`segment_sum_kernel`.
    """
    blocks = tl.cdiv(O, BLOCK_O) * BLOCKS_R
    strip, rest = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    start_o, start_r = rest // BLOCKS_R * BLOCK_O, rest % BLOCKS_R * BLOCK_R
    segment, first, end, begin = find_segment(offsets_ptr, strip, S, E, rows_per_strip, BLOCK_E)
    alone = end - first <= rows_per_strip
    end = tl.minimum(end, begin + rows_per_strip)
    if begin >= end:
        return
    cols_O = start_o + tl.arange(0, BLOCK_O)
    mask_O = cols_O < O
    if segment == E:
        if d_base_ptr is not None and start_r == 0:
            for start in tl.range(begin, end, BLOCK_T, num_stages=1):
                rows_T, mask_T = rows_of_tile(order_ptr, start, end, BLOCK_T)
                tail_TO = tl.zeros([BLOCK_T, BLOCK_O], dtype=tl.float32)
                if PLAIN:
                    dy_TO = load_rows(dy_ptr, rows_T, mask_T, start_o, O, stride_dt, stride_do, BLOCK_O, EVEN_O)
                    tail_TO += dy_TO.to(tl.float32)
                store_rows(d_base_ptr, tail_TO, rows_T, mask_T, start_o, O, O, BLOCK_O, EVEN_O)
        return
    of_segment = segment.to(tl.int64) * O
    if magnitude_ptr is not None:
        g_O = scale_of(magnitude_ptr, norm_ptr, segment, O, stride_norm, cols_O, mask_O)
        base_O = g_O - 1 if DELTA else g_O
        acc_TO = tl.zeros([BLOCK_T, BLOCK_O], dtype=tl.float32)
        if d_bias_ptr is not None:
            bias_O = tl.zeros([BLOCK_O], dtype=tl.float32)
    acc_OR = tl.zeros([BLOCK_O, BLOCK_R], dtype=tl.float32)
    for start in tl.range(begin, end, BLOCK_T, num_stages=STAGES):
        rows_T, mask_T = rows_of_tile(order_ptr, start, end, BLOCK_T)
        dy_OT = load_rows(dy_ptr, rows_T, mask_T, start_o, O, stride_dt, stride_do, BLOCK_O, EVEN_O).T
        h_TR = load_rows(h_ptr, rows_T, mask_T, start_r, R, stride_ht, stride_hr, BLOCK_R, EVEN_R)
        acc_OR = exact_product(dy_OT, h_TR, acc_OR, WIDE)
        # The first is the compiler's to answer.
        if magnitude_ptr is not None:  # noqa: SIM102
            if start_r == 0:
                dy_TO = load_rows(again_ptr, rows_T, mask_T, start_o, O, stride_dt, stride_do, BLOCK_O, EVEN_O)
                inner_TO = load_rows(inner_ptr, rows_T, mask_T, start_o, O, stride_it, stride_io, BLOCK_O, EVEN_O)
                dy_TO = dy_TO.to(tl.float32)
                acc_TO += dy_TO * inner_TO.to(tl.float32)
                if d_bias_ptr is not None:
                    bias_O += tl.sum(dy_TO, axis=0)
                store_rows(d_base_ptr, base_O[None, :] * dy_TO, rows_T, mask_T, start_o, O, O, BLOCK_O, EVEN_O)
    if magnitude_ptr is not None:
        of_norm = segment.to(tl.int64) * stride_norm
        norm_O = tl.load(norm_ptr + of_norm + cols_O, mask=mask_O, other=1.0).to(tl.float32)
        d_m_O = tl.where(norm_O <= 1e-12, 0.0, tl.sum(acc_TO, axis=0) / norm_O)
        if start_r == 0:
            of_strip = strip.to(tl.int64) * O
            if alone:
                tl.store(d_m_ptr + of_segment + cols_O, rounded(d_m_O, d_m_ptr), mask=mask_O)
                if d_bias_ptr is not None:
                    tl.store(d_bias_ptr + of_segment + cols_O, rounded(bias_O, d_bias_ptr), mask=mask_O)
            else:
                tl.store(parts_m_ptr + of_strip + cols_O, d_m_O, mask=mask_O)
                if d_bias_ptr is not None:
                    tl.store(parts_bias_ptr + of_strip + cols_O, bias_O, mask=mask_O)
        acc_OR *= g_O[:, None]
    acc_OR *= scaling_of(scaling_ptr, segment, EACH)
    cols_R = start_r + tl.arange(0, BLOCK_R)
    mask_OR = mask_O[:, None] & (cols_R < R)[None, :]
    rows_O, cols_R = cols_O.to(tl.int64)[:, None], cols_R.to(tl.int64)[None, :]
    if alone:
        to = d_b_ptr + segment.to(tl.int64) * stride_be + rows_O * stride_bo + cols_R * stride_br
        tl.store(to, rounded(acc_OR, d_b_ptr), mask=mask_OR)
    else:
        tl.store(parts_b_ptr + strip.to(tl.int64) * O * R + rows_O * R + cols_R, acc_OR, mask=mask_OR)


@triton.jit
def segment_sum_kernel(
    parts_b_ptr,
    parts_m_ptr,  # None without magnitudes
    parts_bias_ptr,
    offsets_ptr,
    d_m_ptr,
    d_b_ptr,
    d_bias_ptr,
    S,
    O,
    R,
    E,
    rows_per_strip,
    stride_be,
    stride_bo,
    stride_br,
    BLOCK_E: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Adds up the strips of segments that have several, in their order; zeros where there is none."""
    blocks_m = tl.cdiv(O, BLOCK) if d_m_ptr is not None else 0
    blocks = blocks_m + tl.cdiv(O * R, BLOCK)
    segment, block = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    strips, before = find_tiles(offsets_ptr, segment, S, E, rows_per_strip, BLOCK_E)
    if strips == 1:
        return
    index = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    first, segment = tl.cast(before, tl.int64), tl.cast(segment, tl.int64)
    if block < blocks_m:
        index += block * BLOCK
        mask = index < O
        if d_m_ptr is not None:
            for strip in range(strips):
                total += tl.load(parts_m_ptr + (first + strip) * O + index, mask=mask, other=0.0)
            tl.store(d_m_ptr + segment * O + index, rounded(total, d_m_ptr), mask=mask)
        if d_bias_ptr is not None:
            total = tl.zeros([BLOCK], dtype=tl.float32)
            for strip in range(strips):
                total += tl.load(parts_bias_ptr + (first + strip) * O + index, mask=mask, other=0.0)
            tl.store(d_bias_ptr + segment * O + index, rounded(total, d_bias_ptr), mask=mask)
    else:
        index += (block - blocks_m) * BLOCK
        mask = index < O * R
        for strip in range(strips):
            total += tl.load(parts_b_ptr + (first + strip) * O * R + index, mask=mask, other=0.0)
        to = d_b_ptr + segment * stride_be + (index // R).to(tl.int64) * stride_bo + (index % R) * stride_br
        tl.store(to, rounded(total, d_b_ptr), mask=mask)


@functools.lru_cache(maxsize=4096)
def segment_backward_launches(
    rows: int,
    segments: int,
    out_features: int,
    rank: int,
    strides: tuple[tuple[int, ...], ...],
    config: SegmentConfig,
    *,
    magnitudes: bool,
    delta: bool,
    wide: bool,
    each: bool,
    plain_tail: bool = False,
    stride_norm: int | None = None,
) -> tuple[int, Launch, Launch]:
    """How many strips there are at most, the launch for dy, inner, h and d_lora_B of these strides, and what adds up.

    The first's tensors: dy, dy, inner, magnitude, weight_norm, h, scaling, offsets, order, d_base, d_magnitude,
    d_lora_B, d_bias, and the strips of these three; the second's: the strips of lora_B, magnitude and bias, offsets,
    and the three gradients in the first's order. Without ``magnitudes`` theirs are None, and inner's strides zeros.
    """
    strips = row_tiles(rows, segments, config.rows)
    block_e = _block_e(segments)
    launch = Launch(
        segment_backward_kernel,
        (strips * cdiv(out_features, config.block_o) * cdiv(rank, config.block_r), 1, 1),
        (
            rows,
            out_features,
            rank,
            segments,
            config.rows,
            *(s for of_one in strides for s in of_one),
            stride_norm or out_features,
        ),
        config.warps,
        BLOCK_T=config.block_t,
        BLOCK_O=config.block_o,
        BLOCK_R=config.block_r,
        BLOCK_E=block_e,
        EVEN_O=out_features % config.block_o == 0,
        EVEN_R=rank % config.block_r == 0,
        DELTA=delta,
        WIDE=wide,
        EACH=each,
        BLOCKS_R=cdiv(rank, config.block_r),
        PLAIN=plain_tail,
        STAGES=config.stages,
    )
    block = 512
    blocks = cdiv(out_features * rank, block) + (cdiv(out_features, block) if magnitudes else 0)
    add = Launch(
        segment_sum_kernel,
        (segments * blocks, 1, 1),
        (rows, out_features, rank, segments, config.rows, *strides[3]),
        4,
        BLOCK_E=block_e,
        BLOCK=block,
    )
    return strips, launch, add


def segment_backward(
    dy: Tensor,
    inner: Tensor | None,
    magnitude: Tensor | None,
    weight_norm: Tensor | None,
    h: Tensor,
    scaling: Tensor | float,
    offsets: Tensor,
    order: Tensor | None = None,
    *,
    delta: bool = False,
    bias_dtype: torch.dtype | None = None,
    d_lora_B: Tensor | None = None,
    plain_tail: bool = False,
    config: SegmentConfig | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor | None]:
    """``d_base = g_e * dy`` (with ``delta`` ``(g_e - 1) * dy``), and the gradients of magnitude, lora_B and bias.

    Without inner, magnitude and norm it is ``s_e dy_e^T h_e`` alone: of x and d_h lora_A's gradient, transposed.

    Args:
        dy, inner: ``[S, O]``, h: ``[S, R]``, any strides. h of the dtype of dy or float32, with which products are
            exact. magnitude, weight_norm: ``[E, O]``.
        scaling: a number, one element on the device, or ``[E]``.
        bias_dtype: of the bias's gradient, None for none.
        d_lora_B: where lora_B's gradient ``[E, O, R]`` is written to, of any strides; None makes it, of h's dtype.

    Returns:
        ``d_base [S, O]``, ``d_magnitude [E, O]``, ``d_lora_B [E, O, R]`` and ``d_bias [E, O]``. Zero in the tail, or
        with ``plain_tail`` dy, and for segments without rows.
    """
    (rows, out_features), rank, segments = dy.shape, h.shape[1], offsets.shape[0]
    d_b = h.new_empty(segments, out_features, rank) if d_lora_B is None else d_lora_B
    d_base = d_m = d_bias = None
    if magnitude is not None:
        d_base = torch.empty_like(inner, memory_format=torch.contiguous_format)
        d_m = torch.empty_like(magnitude, memory_format=torch.contiguous_format)
        d_bias = None if bias_dtype is None else magnitude.new_empty(magnitude.shape, dtype=bias_dtype)
    if not dy.numel() or not rank:
        for gradient in (d_b, d_m, d_bias):
            if gradient is not None:
                gradient.zero_()
        return d_base, d_m, d_b, d_bias
    (magnitude,), weight_norm = contiguous(magnitude), norms_in_rows(weight_norm)
    strips, launch, add = segment_backward_launches(
        rows,
        segments,
        out_features,
        rank,
        (dy.stride(), (0, 0) if inner is None else inner.stride(), h.stride(), d_b.stride()),
        config or segment_backward_config(rows, out_features, rank, dy.dtype, h.dtype, target.of(dy)),
        magnitudes=magnitude is not None,
        delta=delta,
        wide=h.dtype is torch.float32,
        each=_scales(scaling),
        plain_tail=plain_tail,
        stride_norm=None if weight_norm is None else weight_norm.stride(0),
    )
    parts_b = h.new_empty(strips, out_features, rank, dtype=torch.float32)
    parts_m = None if d_m is None else h.new_empty(strips, out_features, dtype=torch.float32)
    parts_bias = None if d_bias is None else torch.empty_like(parts_m)
    gradients = d_m, d_b, d_bias
    launch(
        dy,
        dy,
        inner,
        magnitude,
        weight_norm,
        h,
        scaling,
        offsets,
        order,
        d_base,
        *gradients,
        parts_m,
        parts_b,
        parts_bias,
    )
    add(parts_b, parts_m, parts_bias, offsets, *gradients)
    return d_base, d_m, d_b, d_bias


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
