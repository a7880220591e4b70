"""``z = act(gate) * up`` of rows sorted by segment, backward: of the rounded inner that ``segment_gate.py`` wrote.

One pass over dz and inner gives ``d_base = g_e * dy`` and the gradients of magnitude, lora_B and bias. y and dy are
nowhere. What several strips of a segment have is added up by ``segment_sum_kernel``.

Legend: as there.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from dorac.kernels import target
from dorac.kernels.configs import GateBackwardConfig, segment_gate_backward_config
from dorac.kernels.launch import Launch, cdiv
from dorac.kernels.segment_backward import segment_sum_launch
from dorac.kernels.segment_gate import Gate, gated, parted, scale_and_bias
from dorac.kernels.segment_tiles import (
    exact_product,
    find_segment,
    load_rows,
    looked_at,
    rounded,
    row_tiles,
    rows_of_tile,
    scales_each,
    scaling_of,
    store_factor,
    store_rows,
    store_vectors,
)


@triton.jit
def _tiles(
    dz_ptr,
    inner_ptr,
    start,
    end,
    start_f,
    F,
    stride_dt,
    stride_df,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
    EVEN_F: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """dz, and inner of gate and up beside each other, or of gate and of up."""
    rows_T, mask_T = rows_of_tile(None, start, end, BLOCK_T)
    dz_TF = load_rows(dz_ptr, rows_T, mask_T, start_f, F, stride_dt, stride_df, BLOCK_F, EVEN_F)
    if INTERLEAVED:
        inner_TO = load_rows(inner_ptr, rows_T, mask_T, 2 * start_f, 2 * F, 2 * F, 1, 2 * BLOCK_F, EVEN_F)
        return dz_TF, inner_TO, inner_TO
    else:
        gate_TF = load_rows(inner_ptr, rows_T, mask_T, start_f, F, 2 * F, 1, BLOCK_F, EVEN_F)
        up_TF = load_rows(inner_ptr, rows_T, mask_T, F + start_f, 2 * F, 2 * F, 1, BLOCK_F, EVEN_F)
        return dz_TF, gate_TF, up_TF


@triton.jit
def _taken(
    d_TO,
    g_O,
    h_TR,
    acc_OR,
    d_base_ptr,
    rows_T,
    mask_T,
    start_o,
    end_o,
    O,
    writes,
    BLOCK_O: tl.constexpr,
    EVEN_F: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Writes ``d_base = g * dy``, and adds its rounded value's product with h to the sum for lora_B."""
    d_TO = g_O[None, :] * d_TO
    if writes:
        store_rows(d_base_ptr, d_TO, rows_T, mask_T, start_o, end_o, O, BLOCK_O, EVEN_F)
    return exact_product(rounded(d_TO, d_base_ptr).T, h_TR, acc_OR, WIDE)


@triton.jit
def segment_gate_backward_kernel(
    dz_ptr,
    inner_ptr,  # contiguous, as h and d_base
    magnitude_ptr,
    norm_ptr,
    bias_ptr,  # or None
    h_ptr,
    scaling_ptr,
    offsets_ptr,
    d_base_ptr,
    d_m_ptr,
    d_b_ptr,
    d_bias_ptr,  # or None
    parts_m_ptr,  # of segments with more than one strip: a row for every strip
    parts_b_ptr,
    parts_bias_ptr,
    S,
    F,
    R,
    E,
    rows_per_strip,
    stride_dt,
    stride_df,
    stride_be,
    stride_bo,
    stride_br,
    stride_norm,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
    EVEN_F: tl.constexpr,
    EVEN_R: tl.constexpr,
    WIDE: tl.constexpr,  # float32 h
    EACH: tl.constexpr,
    BLOCKS_R: tl.constexpr,  # programs for the ranks; the first of them writes all the rest
    INTERLEAVED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    SHIFT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A strip's d_base, and its sums for the gradients; what is zero without rows is left to the other kernel.

    Triton's pipeline does not load ahead what reaches a product through registers alone: the tiles of the next step
    are asked for by hand.
    """
    O = 2 * F
    blocks = tl.cdiv(F, BLOCK_F) * BLOCKS_R
    strip, rest = tl.program_id(0) // blocks, tl.program_id(0) % blocks
    start_f, start_r = rest // BLOCKS_R * BLOCK_F, rest % BLOCKS_R * BLOCK_R
    segment, first, end, begin = find_segment(offsets_ptr, strip, S, E, rows_per_strip, BLOCK_E)
    alone = end - first <= rows_per_strip
    end = tl.minimum(end, begin + rows_per_strip)
    if begin >= end:
        return
    writes = start_r == 0
    BLOCK_O: tl.constexpr = 2 * BLOCK_F if INTERLEAVED else BLOCK_F
    start_o = 2 * start_f if INTERLEAVED else start_f
    end_o = O if INTERLEAVED else F
    if segment == E:
        if writes:
            for start in tl.range(begin, end, BLOCK_T, num_stages=1):
                rows_T, mask_T = rows_of_tile(None, start, end, BLOCK_T)
                zero_TO = tl.zeros([BLOCK_T, BLOCK_O], dtype=tl.float32)
                store_rows(d_base_ptr, zero_TO, rows_T, mask_T, start_o, end_o, O, BLOCK_O, EVEN_F)
                if not INTERLEAVED:
                    store_rows(d_base_ptr, zero_TO, rows_T, mask_T, F + start_f, O, O, BLOCK_O, EVEN_F)
        return
    of_g = magnitude_ptr, norm_ptr, bias_ptr, segment
    g_O, b_O = scale_and_bias(*of_g, start_o, end_o, O, stride_norm, BLOCK_O)
    acc_TO = tl.zeros([BLOCK_T, BLOCK_O], dtype=tl.float32)
    bias_O = tl.zeros([BLOCK_O], dtype=tl.float32)
    acc_OR = tl.zeros([BLOCK_O, BLOCK_R], dtype=tl.float32)
    if not INTERLEAVED:
        g_up_O, b_up_O = scale_and_bias(*of_g, F + start_f, O, O, stride_norm, BLOCK_O)
        acc_up_TO = tl.zeros([BLOCK_T, BLOCK_O], dtype=tl.float32)
        bias_up_O = tl.zeros([BLOCK_O], dtype=tl.float32)
        acc_up_OR = tl.zeros([BLOCK_O, BLOCK_R], dtype=tl.float32)
    where = start_f, F, stride_dt, stride_df
    tiles = _tiles(dz_ptr, inner_ptr, begin, end, *where, BLOCK_T, BLOCK_F, EVEN_F, INTERLEAVED)
    for start in tl.range(begin, end, BLOCK_T, num_stages=STAGES):
        rows_T, mask_T = rows_of_tile(None, start, end, BLOCK_T)
        dz_TF, inner_TO, inner_up_TO = tiles
        after = start + BLOCK_T  # past the end there is nothing
        tiles = _tiles(dz_ptr, inner_ptr, after, end, *where, BLOCK_T, BLOCK_F, EVEN_F, INTERLEAVED)
        h_TR = load_rows(h_ptr, rows_T, mask_T, start_r, R, R, 1, BLOCK_R, EVEN_R)
        dz_TF, inner_TO, inner_up_TO = dz_TF.to(tl.float32), inner_TO.to(tl.float32), inner_up_TO.to(tl.float32)
        y_TO = g_O[None, :] * inner_TO + b_O[None, :]
        if INTERLEAVED:
            gate_TF, up_TF = parted(y_TO, BLOCK_T, BLOCK_F)
        else:
            gate_TF, up_TF = y_TO, g_up_O[None, :] * inner_up_TO + b_up_O[None, :]
        _, by_gate_TF, by_up_TF = gated(gate_TF, up_TF, ACTIVATION, LIMIT, ALPHA, SHIFT)
        by_gate_TF, by_up_TF = dz_TF * by_gate_TF, dz_TF * by_up_TF
        if INTERLEAVED:
            d_TO = tl.reshape(tl.join(by_gate_TF, by_up_TF), [BLOCK_T, BLOCK_O])
        else:
            d_TO = by_gate_TF
            acc_up_TO += by_up_TF * inner_up_TO
            if d_bias_ptr is not None:
                bias_up_O += tl.sum(by_up_TF, axis=0)
            of_up = h_TR, acc_up_OR, d_base_ptr, rows_T, mask_T, F + start_f, O
            acc_up_OR = _taken(by_up_TF, g_up_O, *of_up, O, writes, BLOCK_O, EVEN_F, WIDE)
        acc_TO += d_TO * inner_TO
        if d_bias_ptr is not None:
            bias_O += tl.sum(d_TO, axis=0)
        of_gate = h_TR, acc_OR, d_base_ptr, rows_T, mask_T, start_o, end_o
        acc_OR = _taken(d_TO, g_O, *of_gate, O, writes, BLOCK_O, EVEN_F, WIDE)
    s = scaling_of(scaling_ptr, segment, EACH)
    to, parts = (norm_ptr, d_m_ptr, d_bias_ptr, parts_m_ptr, parts_bias_ptr), (d_b_ptr, parts_b_ptr)
    mine, of_b = (segment, strip, alone), (O, start_r, R, stride_be, stride_bo, stride_br)
    if writes:
        store_vectors(tl.sum(acc_TO, axis=0), bias_O, *to, *mine, start_o, end_o, O, stride_norm, BLOCK_O)
    store_factor(s * acc_OR, *parts, *mine, start_o, end_o, *of_b, BLOCK_O, BLOCK_R)
    if not INTERLEAVED:
        if writes:
            store_vectors(tl.sum(acc_up_TO, axis=0), bias_up_O, *to, *mine, F + start_f, O, O, stride_norm, BLOCK_O)
        store_factor(s * acc_up_OR, *parts, *mine, F + start_f, O, *of_b, BLOCK_O, BLOCK_R)


@functools.lru_cache(maxsize=4096)
def segment_gate_backward_launches(
    rows: int,
    segments: int,
    features: int,
    rank: int,
    strides: tuple[tuple[int, ...], ...],
    gate: Gate,
    config: GateBackwardConfig,
    *,
    wide: bool,
    each: bool,
    stride_norm: int,
) -> tuple[int, Launch, Launch]:
    """How many strips there are at most, the launch for dz and d_lora_B of these strides, and what adds up.

    The first's tensors: dz, inner, magnitude, weight_norm, bias, h, scaling, offsets, d_base, d_magnitude, d_lora_B,
    d_bias, and the strips of these three; the second's are those of ``segment_backward_launches``.

    Args:
        gate, each, stride_norm: as of ``segment_gate_launch``. wide: float32 factors.
    """
    activation, interleaved, limit, alpha, shift = gate
    strips, blocks_r = row_tiles(rows, segments, config.rows), cdiv(rank, config.block_r)
    of_dz, of_b = strides
    launch = Launch(
        segment_gate_backward_kernel,
        (strips * cdiv(features, config.block_o) * blocks_r, 1, 1),
        (rows, features, rank, segments, config.rows, *of_dz, *of_b, stride_norm),
        config.warps,
        BLOCK_T=config.block_t,
        BLOCK_F=config.block_o,
        BLOCK_R=config.block_r,
        BLOCK_E=looked_at(segments),
        EVEN_F=features % config.block_o == 0,
        EVEN_R=rank % config.block_r == 0,
        WIDE=wide,
        EACH=each,
        BLOCKS_R=blocks_r,
        INTERLEAVED=interleaved,
        ACTIVATION=activation,
        LIMIT=limit,
        ALPHA=alpha,
        SHIFT=shift,
        STAGES=config.stages,
    )
    return strips, launch, segment_sum_launch(rows, segments, 2 * features, rank, of_b, config.rows, magnitudes=True)


def segment_gate_backward(
    dz: Tensor,
    inner: Tensor,
    magnitude: Tensor,
    weight_norm: Tensor,
    bias: Tensor | None,
    h: Tensor,
    scaling: Tensor | float,
    offsets: Tensor,
    lora_B: Tensor,
    gate: Gate,
    *,
    bias_dtype: torch.dtype | None = None,
    config: GateBackwardConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """``d_base [S, 2 F] = g_e * dy``, and the gradients of magnitude, lora_B and, with a dtype for it, bias.

    dz is ``[S, F]`` of any strides, inner what ``segment_gate`` wrote over base, the others are as there. Zero in the
    tail and for segments without rows.
    """
    rows, segments, features, rank = h.shape[0], len(offsets), inner.shape[1] // 2, h.shape[1]
    d_base, d_m, d_b = torch.empty_like(inner), torch.empty_like(magnitude), torch.empty_like(lora_B)
    d_bias = None if bias_dtype is None else torch.empty_like(magnitude, dtype=bias_dtype)
    strips, launch, add = segment_gate_backward_launches(
        rows,
        segments,
        features,
        rank,
        (dz.stride(), d_b.stride()),
        gate,
        config or segment_gate_backward_config(rows, features, rank, h.dtype, target.of(h)),
        wide=h.dtype is torch.float32,
        each=scales_each(scaling),
        stride_norm=weight_norm.stride(0),
    )
    parts_m = h.new_empty(strips, 2 * features, dtype=torch.float32)
    parts_b = h.new_empty(strips, 2 * features, rank, dtype=torch.float32)
    parts_bias = None if d_bias is None else torch.empty_like(parts_m)
    layer = dz, inner, magnitude, weight_norm, bias, h, scaling, offsets
    launch(*layer, d_base, d_m, d_b, d_bias, parts_m, parts_b, parts_bias)
    add(parts_b, parts_m, parts_bias, offsets, d_m, d_b, d_bias)
    return d_base, d_m, d_b, d_bias
