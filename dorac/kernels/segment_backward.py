"""``g_e * dy`` and the gradients of each segment's magnitude, lora_B and bias: see ``segments.py``."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from dorac.kernels import target
from dorac.kernels.configs import SegmentConfig, segment_backward_config
from dorac.kernels.launch import Launch, cdiv, contiguous
from dorac.kernels.segment_tiles import (
    exact_product,
    find_segment,
    find_tiles,
    load_rows,
    looked_at,
    norms_in_rows,
    rounded,
    row_tiles,
    rows_of_tile,
    scale_of,
    scales_each,
    scaling_of,
    store_factor,
    store_rows,
    store_vectors,
)


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
    if magnitude_ptr is not None:
        g_O = scale_of(magnitude_ptr, norm_ptr, segment, O, stride_norm, cols_O, mask_O)
        base_O = g_O - 1 if DELTA else g_O
        acc_TO = tl.zeros([BLOCK_T, BLOCK_O], dtype=tl.float32)
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
        if start_r == 0:
            store_vectors(
                tl.sum(acc_TO, axis=0),
                bias_O,
                norm_ptr,
                d_m_ptr,
                d_bias_ptr,
                parts_m_ptr,
                parts_bias_ptr,
                segment,
                strip,
                alone,
                start_o,
                O,
                O,
                stride_norm,
                BLOCK_O,
            )
        acc_OR *= g_O[:, None]
    acc_OR *= scaling_of(scaling_ptr, segment, EACH)
    store_factor(
        acc_OR,
        d_b_ptr,
        parts_b_ptr,
        segment,
        strip,
        alone,
        start_o,
        O,
        O,
        start_r,
        R,
        stride_be,
        stride_bo,
        stride_br,
        BLOCK_O,
        BLOCK_R,
    )


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


def segment_sum_launch(
    rows: int, segments: int, out_features: int, rank: int, of_b: tuple[int, ...], walked: int, *, magnitudes: bool
) -> Launch:
    """What adds up strips of ``walked`` rows, for d_lora_B of these strides."""
    block = 512
    blocks = cdiv(out_features * rank, block) + (cdiv(out_features, block) if magnitudes else 0)
    return Launch(
        segment_sum_kernel,
        (segments * blocks, 1, 1),
        (rows, out_features, rank, segments, walked, *of_b),
        4,
        BLOCK_E=looked_at(segments),
        BLOCK=block,
    )


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
        BLOCK_E=looked_at(segments),
        EVEN_O=out_features % config.block_o == 0,
        EVEN_R=rank % config.block_r == 0,
        DELTA=delta,
        WIDE=wide,
        EACH=each,
        BLOCKS_R=cdiv(rank, config.block_r),
        PLAIN=plain_tail,
        STAGES=config.stages,
    )
    add = segment_sum_launch(rows, segments, out_features, rank, strides[3], config.rows, magnitudes=magnitudes)
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
        each=scales_each(scaling),
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
