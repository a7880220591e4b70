"""``y = g_e * (base + s_e h B_e^T) + b_e`` of rows sorted by segment: see ``segments.py``."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from dorac.kernels import target
from dorac.kernels.configs import TileConfig, segment_tile_config
from dorac.kernels.launch import Launch, cdiv, contiguous
from dorac.kernels.segment_tiles import (
    find_segment,
    load_of_segment,
    load_rows,
    looked_at,
    norms_in_rows,
    row_tiles,
    rows_of_tile,
    scale_of,
    scales_each,
    scaling_of,
    store_rows,
)
from dorac.kernels.tiles import product


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
        BLOCK_E=looked_at(segments),
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
        each=scales_each(scaling),
        stride_norm=None if weight_norm is None else weight_norm.stride(0),
        shared_bias=shared_bias,
        plain_tail=plain_tail,
    )
    launch(h, base, lora_B, magnitude, weight_norm, scaling, bias, offsets, order, y, inner)
    return y, inner
