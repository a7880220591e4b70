"""``z = act(gate) * up`` of a projection of rows sorted by segment that is gate and up in one: see ``segments.py``.

``inner = base + s_e h B_e^T`` is rounded to the activations' dtype, in training written over base and kept. All else,
``y = g_e * inner + b_e``, its halves and z, is computed of the rounded inner in float32, without another rounding;
backward (``segment_gate_backward.py``) computes it again. y is nowhere.

A program has BLOCK_F columns of z. Where gate and up are interleaved, these are of one tile of y twice as wide, which
is parted in registers; else there are two tiles.

Legend: S rows, E segments, O out_features, F = O / 2 columns of z, R rank, T rows of a tile.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from dorac.kernels import target
from dorac.kernels.configs import GateConfig, segment_gate_config
from dorac.kernels.launch import Launch, cdiv
from dorac.kernels.mlp import activated
from dorac.kernels.segment_tiles import (
    find_segment,
    load_of_segment,
    load_rows,
    looked_at,
    rounded,
    row_tiles,
    rows_of_tile,
    scale_of,
    scales_each,
    scaling_of,
    store_rows,
)
from dorac.kernels.tiles import product

# The attributes of dorac.functional.Gate, in their order.
Gate = tuple[str, bool, float | None, float, float]


@triton.jit
def bounded(x, LOWER: tl.constexpr, UPPER: tl.constexpr):
    """x within the bounds, and whether it was; a bound that is None is none. NaN stays, and was not."""
    inside = x == x
    if UPPER is not None:
        inside = inside & (x <= UPPER)
        x = tl.where(x > UPPER, UPPER, x)
    if LOWER is not None:
        inside = inside & (x >= LOWER)
        x = tl.where(x < LOWER, LOWER, x)
    return x, inside


@triton.jit
def gated(gate, up, ACTIVATION: tl.constexpr, LIMIT: tl.constexpr, ALPHA: tl.constexpr, SHIFT: tl.constexpr):
    """z, and its derivatives by gate and by up."""
    if LIMIT is not None:
        gate, gate_inside = bounded(gate, None, LIMIT)
        up, up_inside = bounded(up, -LIMIT, LIMIT)
    up += SHIFT
    if ALPHA == 1:
        act, slope = activated(gate, ACTIVATION)
    else:  # silu
        sigmoid = tl.sigmoid(ALPHA * gate)
        act, slope = gate * sigmoid, sigmoid * (1 + ALPHA * gate * (1 - sigmoid))
    by_gate, by_up = slope * up, act
    if LIMIT is not None:
        by_gate, by_up = tl.where(gate_inside, by_gate, 0.0), tl.where(up_inside, by_up, 0.0)
    return act * up, by_gate, by_up


@triton.jit
def parted(tile_TO, BLOCK_T: tl.constexpr, BLOCK_F: tl.constexpr):
    """The even and the odd columns."""
    return tl.split(tl.reshape(tile_TO, [BLOCK_T, BLOCK_F, 2]))


@triton.jit
def scale_and_bias(magnitude_ptr, norm_ptr, bias_ptr, segment, start_o, end_o, O, stride_norm, BLOCK_O: tl.constexpr):
    """g and b of a segment's columns."""
    cols_O = start_o + tl.arange(0, BLOCK_O)
    mask_O = cols_O < end_o
    g_O = scale_of(magnitude_ptr, norm_ptr, segment, O, stride_norm, cols_O, mask_O)
    if bias_ptr is None:
        return g_O, tl.zeros([BLOCK_O], tl.float32)
    else:
        return g_O, tl.load(bias_ptr + segment.to(tl.int64) * O + cols_O, mask=mask_O, other=0.0).to(tl.float32)


@triton.jit
def _scaled(
    base_ptr,
    inner_ptr,  # or None
    h_ptr,
    b_ptr,
    b_OR,
    g_O,
    bias_O,
    s,
    segment,
    rows_T,
    mask_T,
    start_o,
    end_o,
    O,
    R,
    stride_be,
    stride_bo,
    stride_br,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
    EVEN_F: tl.constexpr,
    EVEN_R: tl.constexpr,
    SPLIT: tl.constexpr,
    STAGES: tl.constexpr,
):
    """A tile of y; inner is written."""
    base_TO = load_rows(base_ptr, rows_T, mask_T, start_o, end_o, O, 1, BLOCK_O, EVEN_F)
    acc_TO = tl.zeros([BLOCK_T, BLOCK_O], dtype=tl.float32)
    if b_OR is not None:
        h_TR = load_rows(h_ptr, rows_T, mask_T, 0, R, R, 1, BLOCK_R, EVEN_R)
        acc_TO = product(h_TR, b_OR.T, acc_TO, SPLIT)
    else:
        for start_r in tl.range(0, R, BLOCK_R, num_stages=STAGES):
            h_TR = load_rows(h_ptr, rows_T, mask_T, start_r, R, R, 1, BLOCK_R, EVEN_R)
            b_step_OR = load_of_segment(
                b_ptr,
                segment,
                start_o,
                start_r,
                end_o,
                R,
                stride_be,
                stride_bo,
                stride_br,
                BLOCK_O,
                BLOCK_R,
                EVEN_F and EVEN_R,
            )
            acc_TO = product(h_TR, b_step_OR.T, acc_TO, SPLIT)
    inner_TO = base_TO.to(tl.float32) + s * acc_TO
    if inner_ptr is not None:
        store_rows(inner_ptr, inner_TO, rows_T, mask_T, start_o, end_o, O, BLOCK_O, EVEN_F)
    return g_O[None, :] * rounded(inner_TO, base_ptr).to(tl.float32) + bias_O[None, :]


@triton.jit
def segment_gate_kernel(
    h_ptr,  # contiguous, as base, inner and z
    base_ptr,
    b_ptr,
    magnitude_ptr,
    norm_ptr,
    scaling_ptr,  # or a number
    bias_ptr,  # or None
    offsets_ptr,
    inner_ptr,  # may be base; or None
    z_ptr,
    S,
    F,
    R,
    E,
    rows_per_tile,
    stride_be,
    stride_bo,
    stride_br,
    stride_norm,  # from one segment's norms to the next's
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_E: tl.constexpr,
    EVEN_F: tl.constexpr,  # no tile reaches over the last column
    EVEN_R: tl.constexpr,
    SPLIT: tl.constexpr,
    EACH: tl.constexpr,  # a scaling for every segment
    WALK: tl.constexpr,  # all ranks are in one step
    INTERLEAVED: tl.constexpr,
    ACTIVATION: tl.constexpr,
    LIMIT: tl.constexpr,
    ALPHA: tl.constexpr,
    SHIFT: tl.constexpr,
    STAGES: tl.constexpr,
):
    O = 2 * F
    blocks_f = tl.cdiv(F, BLOCK_F)
    tile, start_f = tl.program_id(0) // blocks_f, tl.program_id(0) % blocks_f * BLOCK_F
    segment, _first, end, begin = find_segment(offsets_ptr, tile, S, E, rows_per_tile, BLOCK_E)
    end = tl.minimum(end, begin + rows_per_tile)
    if begin >= end:
        return
    BLOCK_O: tl.constexpr = 2 * BLOCK_F if INTERLEAVED else BLOCK_F
    start_o = 2 * start_f if INTERLEAVED else start_f
    end_o = O if INTERLEAVED else F
    if segment == E:
        for start in tl.range(begin, end, BLOCK_T, num_stages=1):
            rows_T, mask_T = rows_of_tile(None, start, end, BLOCK_T)
            if inner_ptr is not None:
                zero_TO = tl.zeros([BLOCK_T, BLOCK_O], dtype=tl.float32)
                store_rows(inner_ptr, zero_TO, rows_T, mask_T, start_o, end_o, O, BLOCK_O, EVEN_F)
                if not INTERLEAVED:
                    store_rows(inner_ptr, zero_TO, rows_T, mask_T, F + start_f, O, O, BLOCK_O, EVEN_F)
            zero_TF = tl.zeros([BLOCK_T, BLOCK_F], dtype=tl.float32)
            store_rows(z_ptr, zero_TF, rows_T, mask_T, start_f, F, F, BLOCK_F, EVEN_F)
        return
    s = scaling_of(scaling_ptr, segment, EACH)
    of_g = magnitude_ptr, norm_ptr, bias_ptr, segment
    strides = stride_be, stride_bo, stride_br
    g_O, bias_O = scale_and_bias(*of_g, start_o, end_o, O, stride_norm, BLOCK_O)
    b_OR = None
    b_up_OR = None
    if WALK:
        b_OR = load_of_segment(b_ptr, segment, start_o, 0, end_o, R, *strides, BLOCK_O, BLOCK_R, EVEN_F and EVEN_R)
    if not INTERLEAVED:
        g_up_O, bias_up_O = scale_and_bias(*of_g, F + start_f, O, O, stride_norm, BLOCK_O)
        if WALK:
            b_up_OR = load_of_segment(
                b_ptr, segment, F + start_f, 0, O, R, *strides, BLOCK_O, BLOCK_R, EVEN_F and EVEN_R
            )
    for start in tl.range(begin, end, BLOCK_T, num_stages=1):
        rows_T, mask_T = rows_of_tile(None, start, end, BLOCK_T)
        of_tile = s, segment, rows_T, mask_T
        y_TO = _scaled(
            base_ptr,
            inner_ptr,
            h_ptr,
            b_ptr,
            b_OR,
            g_O,
            bias_O,
            *of_tile,
            start_o,
            end_o,
            O,
            R,
            *strides,
            BLOCK_T,
            BLOCK_O,
            BLOCK_R,
            EVEN_F,
            EVEN_R,
            SPLIT,
            STAGES,
        )
        if INTERLEAVED:
            gate_TF, up_TF = parted(y_TO, BLOCK_T, BLOCK_F)
        else:
            gate_TF = y_TO
            up_TF = _scaled(
                base_ptr,
                inner_ptr,
                h_ptr,
                b_ptr,
                b_up_OR,
                g_up_O,
                bias_up_O,
                *of_tile,
                F + start_f,
                O,
                O,
                R,
                *strides,
                BLOCK_T,
                BLOCK_O,
                BLOCK_R,
                EVEN_F,
                EVEN_R,
                SPLIT,
                STAGES,
            )
        z_TF, _, _ = gated(gate_TF, up_TF, ACTIVATION, LIMIT, ALPHA, SHIFT)
        store_rows(z_ptr, z_TF, rows_T, mask_T, start_f, F, F, BLOCK_F, EVEN_F)


@functools.lru_cache(maxsize=4096)
def segment_gate_launch(
    rows: int,
    segments: int,
    features: int,
    rank: int,
    of_b: tuple[int, int, int],
    gate: Gate,
    config: GateConfig,
    *,
    split: bool,
    each: bool,
    stride_norm: int,
) -> Launch:
    """The launch for ``features`` columns of z and lora_B of these strides.

    Its tensors: h, base, lora_B, magnitude, weight_norm, scaling, bias, offsets, inner, z; bias and inner may be None.

    Args:
        gate: the attributes of :class:`dorac.functional.Gate`, in their order.
        split: float32 factors. each: a scaling for every segment. stride_norm: from one segment's norms to the next's.
    """
    activation, interleaved, limit, alpha, shift = gate
    walk = rank <= config.block_r
    per_tile = max(config.rows, config.block_t) if walk else config.block_t
    return Launch(
        segment_gate_kernel,
        (row_tiles(rows, segments, per_tile) * cdiv(features, config.block_o), 1, 1),
        (rows, features, rank, segments, per_tile, *of_b, stride_norm),
        config.warps,
        BLOCK_T=config.block_t,
        BLOCK_F=config.block_o,
        BLOCK_R=config.block_r,
        BLOCK_E=looked_at(segments),
        EVEN_F=features % config.block_o == 0,
        EVEN_R=rank % config.block_r == 0,
        SPLIT=split,
        EACH=each,
        WALK=walk,
        INTERLEAVED=interleaved,
        ACTIVATION=activation,
        LIMIT=limit,
        ALPHA=alpha,
        SHIFT=shift,
        STAGES=config.stages,
    )


def segment_gate(
    base: Tensor,
    h: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    weight_norm: Tensor,
    scaling: Tensor | float,
    bias: Tensor | None,
    offsets: Tensor,
    gate: Gate,
    *,
    want_inner: bool = False,
    config: GateConfig | None = None,
) -> Tensor:
    """``z [S, F]`` of ``inner = base + s_e h B_e^T``, zero in the tail; inner is written over base with ``want_inner``.

    Args:
        base: ``[S, 2 F]``, bfloat16, h: ``[S, R]``, contiguous. lora_B: ``[E, 2 F, R]``, any strides, of h's dtype,
            bfloat16 or float32.
        magnitude, bias: ``[E, 2 F]``, contiguous. weight_norm: the same, contiguous rows.
        scaling: a number, one element on the device, or ``[E]``. offsets: ``[E]``, int32 or int64.
        config: how to launch; None chooses it.
    """
    sizes = h.shape[0], len(offsets), base.shape[1] // 2, h.shape[1]
    z = base.new_empty(sizes[0], sizes[2])
    launch = segment_gate_launch(
        *sizes,
        lora_B.stride(),
        gate,
        config or segment_gate_config(*sizes, h.dtype, target.of(h)),
        split=h.dtype is torch.float32,
        each=scales_each(scaling),
        stride_norm=weight_norm.stride(0),
    )
    inner = base if want_inner else None
    launch(h, base, lora_B, magnitude, weight_norm, scaling, bias, offsets, inner, z)
    return z
