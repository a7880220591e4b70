"""The backward pass of ``y = g * inner + b`` on CUDA with lora_B's gradient: once over dy and inner, or dy and y.

Up to rank 384, of which a program holds all columns of the product of both with h. Sums over rows are written per strip
and added in a fixed order by a second kernel, so that two runs give the same bits. Strips of rows are taken from the
last to the first, see ``kernels/backward.py``.

Legend: T tokens, I in_features, O out_features, R rank, S strips of rows.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from dorac.kernels import target
from dorac.kernels.backward import per_norm
from dorac.kernels.configs import LoraBConfig, lora_b_config
from dorac.kernels.launch import Launch, cdiv, contiguous
from dorac.kernels.of_y import of_y
from dorac.kernels.tiles import load_tile, magnitude_scale, number, product, store_tile, strip_sum


@triton.jit
def lora_b_backward_kernel(
    dy_ptr,
    again_ptr,  # dy once more: see below
    kept_ptr,  # inner, or y
    magnitude_ptr,
    norm_ptr,
    h_ptr,
    scaling_ptr,  # or a number
    x_ptr,  # these three with y
    w_ptr,
    b_ptr,
    d_inner_ptr,
    d_m_ptr,
    d_b_ptr,
    T,
    O,
    R,
    I,
    rows_per_program,
    stride_dt,
    stride_do,
    stride_it,
    stride_io,
    stride_ht,
    stride_hr,
    stride_xt,
    stride_xi,
    stride_wo,
    stride_wi,
    stride_bo,
    stride_br,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
    CHUNKS: tl.constexpr,  # of BLOCK_R ranks, at most 3
    EVEN: tl.constexpr,  # no tile of activations reaches over an edge
    EVEN_R: tl.constexpr,  # nor one of h that is within its rows
    OF_Y: tl.constexpr,
    DELTA: tl.constexpr,
    FINISH: tl.constexpr,  # one strip: write the gradients themselves
    SCALE_B: tl.constexpr,
    STAGES: tl.constexpr,
):
    """d_inner, with DELTA d_base, and d_magnitude ``[O]`` and d_lora_B ``[O, R]`` or without FINISH their strips.

    lora_B's gradient is ``diag(g) dy^T h``: dy goes to the tensor cores as it is in shared memory, and g waits for the
    end. They may still read a tile when the next iteration begins, for which Triton gives what a product alone reads
    one buffer more, but not what is also read into registers. Hence the tile is loaded for each of the two by itself,
    through two arguments, because two loads through one would be merged.
    """
    start_o = tl.program_id(0) * BLOCK_O
    strip = tl.program_id(1)
    cols_O = start_o + tl.arange(0, BLOCK_O)
    mask_O = cols_O < O
    g_O = magnitude_scale(magnitude_ptr, norm_ptr, cols_O, mask_O, True)
    base_O = g_O - 1 if DELTA else g_O
    acc_TO = tl.zeros([BLOCK_T, BLOCK_O], dtype=tl.float32)
    acc0_OR = tl.zeros([BLOCK_O, BLOCK_R], dtype=tl.float32)
    if CHUNKS >= 2:
        acc1_OR = tl.zeros([BLOCK_O, BLOCK_R], dtype=tl.float32)
    if CHUNKS >= 3:
        acc2_OR = tl.zeros([BLOCK_O, BLOCK_R], dtype=tl.float32)
    begin = strip * rows_per_program
    rows = tl.minimum(rows_per_program, T - begin)
    for done in tl.range(0, rows, BLOCK_T, num_stages=STAGES):
        start = begin + (tl.cdiv(rows - done, BLOCK_T) - 1) * BLOCK_T
        dy_OT = load_tile(dy_ptr, start, start_o, T, O, stride_dt, stride_do, BLOCK_T, BLOCK_O, EVEN, False).T
        h_TR = load_tile(h_ptr, start, 0, T, R, stride_ht, stride_hr, BLOCK_T, BLOCK_R, EVEN and EVEN_R, False)
        acc0_OR = product(dy_OT, h_TR, acc0_OR, False)
        if CHUNKS >= 2:
            h_TR = load_tile(
                h_ptr, start, BLOCK_R, T, R, stride_ht, stride_hr, BLOCK_T, BLOCK_R, EVEN and EVEN_R, False
            )
            acc1_OR = product(dy_OT, h_TR, acc1_OR, False)
        if CHUNKS >= 3:
            h_TR = load_tile(
                h_ptr, start, 2 * BLOCK_R, T, R, stride_ht, stride_hr, BLOCK_T, BLOCK_R, EVEN and EVEN_R, False
            )
            acc2_OR = product(dy_OT, h_TR, acc2_OR, False)
        dy_TO = load_tile(again_ptr, start, start_o, T, O, stride_dt, stride_do, BLOCK_T, BLOCK_O, EVEN, False)
        kept_TO = load_tile(kept_ptr, start, start_o, T, O, stride_it, stride_io, BLOCK_T, BLOCK_O, EVEN, False)
        dy_TO = dy_TO.to(tl.float32)
        acc_TO += dy_TO * kept_TO.to(tl.float32)
        store_tile(d_inner_ptr, base_O[None, :] * dy_TO, start, start_o, T, O, BLOCK_T, BLOCK_O, EVEN, False)
    d_m_O = tl.sum(acc_TO, axis=0)
    if FINISH:
        if OF_Y:
            d_m_O = of_y(
                d_m_O,
                dy_ptr,
                magnitude_ptr,
                norm_ptr,
                h_ptr,
                scaling_ptr,
                x_ptr,
                w_ptr,
                b_ptr,
                start_o,
                T,
                O,
                R,
                I,
                stride_dt,
                stride_do,
                stride_ht,
                stride_hr,
                stride_xt,
                stride_xi,
                stride_wo,
                stride_wi,
                stride_bo,
                stride_br,
                BLOCK_O,
            )
        else:
            d_m_O = per_norm(d_m_O, norm_ptr, cols_O, mask_O)
    tl.store(d_m_ptr + strip.to(tl.int64) * O + cols_O, d_m_O.to(d_m_ptr.dtype.element_ty), mask=mask_O)
    if SCALE_B:
        g_O *= number(scaling_ptr)
    d_b_ptr += strip.to(tl.int64) * O * R
    store_tile(d_b_ptr, g_O[:, None] * acc0_OR, start_o, 0, O, R, BLOCK_O, BLOCK_R, EVEN and EVEN_R, False)
    if CHUNKS >= 2:
        store_tile(d_b_ptr, g_O[:, None] * acc1_OR, start_o, BLOCK_R, O, R, BLOCK_O, BLOCK_R, EVEN and EVEN_R, False)
    if CHUNKS >= 3:
        store_tile(
            d_b_ptr, g_O[:, None] * acc2_OR, start_o, 2 * BLOCK_R, O, R, BLOCK_O, BLOCK_R, EVEN and EVEN_R, False
        )


@triton.jit
def lora_b_sum_kernel(
    partial_m_ptr,
    partial_b_ptr,
    dy_ptr,
    magnitude_ptr,
    norm_ptr,
    h_ptr,
    scaling_ptr,
    x_ptr,
    w_ptr,
    b_ptr,
    d_m_ptr,
    d_b_ptr,
    T,
    O,
    R,
    I,
    strips,
    stride_dt,
    stride_do,
    stride_ht,
    stride_hr,
    stride_xt,
    stride_xi,
    stride_wo,
    stride_wi,
    stride_bo,
    stride_br,
    OF_Y: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    """Adds up the strips of the kernel above: first the blocks of d_magnitude, then those of d_lora_B."""
    block = tl.program_id(0).to(tl.int64)
    blocks_m = tl.cdiv(O, BLOCK_O)
    if block < blocks_m:
        cols_O = (block * BLOCK_O).to(tl.int32) + tl.arange(0, BLOCK_O)
        mask_O = cols_O < O
        dot_O = strip_sum(partial_m_ptr, cols_O, mask_O, O, strips)
        if OF_Y:
            d_m_O = of_y(
                dot_O,
                dy_ptr,
                magnitude_ptr,
                norm_ptr,
                h_ptr,
                scaling_ptr,
                x_ptr,
                w_ptr,
                b_ptr,
                (block * BLOCK_O).to(tl.int32),
                T,
                O,
                R,
                I,
                stride_dt,
                stride_do,
                stride_ht,
                stride_hr,
                stride_xt,
                stride_xi,
                stride_wo,
                stride_wi,
                stride_bo,
                stride_br,
                BLOCK_O,
            )
        else:
            d_m_O = per_norm(dot_O, norm_ptr, cols_O, mask_O)
        tl.store(d_m_ptr + cols_O, d_m_O.to(d_m_ptr.dtype.element_ty), mask=mask_O)
    else:
        index = (block - blocks_m) * BLOCK_B + tl.arange(0, BLOCK_B)
        size = tl.cast(O, tl.int64) * R
        total = strip_sum(partial_b_ptr, index, index < size, size, strips)
        tl.store(d_b_ptr + index, total.to(d_b_ptr.dtype.element_ty), mask=index < size)


@functools.lru_cache(maxsize=4096)
def lora_b_backward_launches(
    tokens: int,
    out_features: int,
    rank: int,
    strides: tuple[tuple[int, int], ...],
    config: LoraBConfig,
    *,
    scale_b: bool,
    delta: bool = False,
    in_features: int | None = None,
) -> tuple[int, Launch, Launch | None]:
    """How many strips there are, the launch, and where there are several the one that sums them.

    The strides are those of dy, inner and h; with ``in_features`` of dy, y, h, x, weight and lora_B, without these
    three if it is 0.
    """
    if rank > config.block_r * config.chunks:
        raise ValueError(f"rank must be at most {config.block_r * config.chunks} here, got {rank}")
    of_y = in_features is not None
    dy, kept, h, *others = (*strides, *[(0, 0)] * (6 - len(strides)))
    others = [stride for pair in others for stride in pair]
    strips = cdiv(tokens, config.rows)
    launch = Launch(
        lora_b_backward_kernel,
        (cdiv(out_features, config.block_o), strips, 1),
        (tokens, out_features, rank, in_features or 0, config.rows, *dy, *kept, *h, *others),
        config.warps,
        BLOCK_T=config.block_t,
        BLOCK_O=config.block_o,
        BLOCK_R=config.block_r,
        CHUNKS=config.chunks,
        EVEN=not (tokens % config.block_t or out_features % config.block_o),
        EVEN_R=rank == config.block_r * config.chunks,
        OF_Y=of_y,
        DELTA=delta,
        FINISH=strips == 1,
        SCALE_B=scale_b,
        STAGES=config.stages,
    )
    if strips == 1:
        return strips, launch, None
    return (
        strips,
        launch,
        Launch(
            lora_b_sum_kernel,
            (cdiv(out_features, 64) + cdiv(out_features * rank, 512), 1, 1),
            (tokens, out_features, rank, in_features or 0, strips, *dy, *h, *others),
            4,
            OF_Y=of_y,
            BLOCK_O=64,
            BLOCK_B=512,  # few strips, many elements
        ),
    )


def lora_b_backward(
    dy: Tensor,
    inner: Tensor,
    magnitude: Tensor,
    weight_norm: Tensor,
    h: Tensor,
    scaling: Tensor | float,
    *,
    h_is_scaled: bool,
    delta: bool = False,
    of_y: tuple[Tensor, Tensor, Tensor] | None = None,
    config: LoraBConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`compose_backward` with lora_B's gradient in the same pass.

    Args:
        dy, inner: ``[T, O]``, any strides. h: ``[T, R]``, or ``s * h`` with ``h_is_scaled``, of the same half dtype.
        delta: return ``d_base = (g - 1) * dy`` in place of d_inner.
        of_y: x ``[T, I]``, weight and lora_B where ``inner`` is not that but ``y = g * inner``, h not scaled: then
            ``d_magnitude = colsum(dy * y) / m``, and for rows of a g below 2^-6 inner is computed again.

    Returns:
        ``d_inner = g * dy [T, O]``, ``d_magnitude [O]`` and ``d_lora_B = s * d_inner^T h [O, R]``. Partial sums take at
        most ``r / 2`` KiB meanwhile for each of the card's processors.
    """
    (tokens, out_features), rank = dy.shape, h.shape[1]
    d_inner = torch.empty_like(inner, memory_format=torch.contiguous_format)
    d_magnitude = torch.empty_like(magnitude, memory_format=torch.contiguous_format)
    d_b = h.new_empty(out_features, rank)
    if not dy.numel():
        return d_inner, d_magnitude.zero_(), d_b.zero_()
    magnitude, weight_norm = contiguous(magnitude, weight_norm)
    matrices = (dy, inner, h, *(of_y or ()))
    strips, launch, add = lora_b_backward_launches(
        tokens,
        out_features,
        rank,
        tuple(t.stride() for t in matrices),
        config or lora_b_config(tokens, out_features, rank, target.of(dy)),
        scale_b=not h_is_scaled,
        delta=delta,
        in_features=None if of_y is None else of_y[0].shape[1],
    )
    if add is None:
        parts_m, parts_b = d_magnitude, d_b
    else:
        parts_m = magnitude.new_empty(strips, out_features, dtype=torch.float32)
        parts_b = magnitude.new_empty(strips, out_features, rank, dtype=torch.float32)
    others = of_y or (None, None, None)
    launch(dy, dy, inner, magnitude, weight_norm, h, scaling, *others, d_inner, parts_m, parts_b)
    if add is not None:
        add(parts_m, parts_b, dy, magnitude, weight_norm, h, scaling, *others, d_magnitude, d_b)
    return d_inner, d_magnitude, d_b
