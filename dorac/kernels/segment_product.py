"""``h = x A_e^T`` of rows sorted by segment: long rows, few columns. See ``segments.py``."""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from dorac.kernels import target
from dorac.kernels.backward import strip_sum_kernel
from dorac.kernels.configs import ProductConfig, segment_product_config
from dorac.kernels.launch import Launch, cdiv, contiguous
from dorac.kernels.segment_tiles import (
    exact_product,
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
        BLOCK_E=looked_at(segments),
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
        each=scales_each(scaling),
        stride_norm=None if weight_norm is None else weight_norm.stride(0),
    )
    to = y if add is None else y.new_empty(splits * rows, rank, dtype=torch.float32)
    launch(x, lora_A, magnitude, weight_norm, scaling, offsets, order, to)
    if add is not None:
        add(to, None, y)
    return y
