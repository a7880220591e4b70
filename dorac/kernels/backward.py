"""The backward pass of ``y = g * inner + b`` on CUDA, together with the low-rank branch's products where that pays.

It goes once over dy and inner: up to rank 16 with both products of d_inner, by h and by lora_B, up to rank 384 with the
first, which is lora_B's gradient. Sums over rows or columns are written per strip and added in a fixed order by a
second kernel, so that two runs give the same bits.

Strips of rows, or where there are few the rows of a strip, are taken from the last to the first: of what the kernel
before has written, its end is still in L2, and the next kernel, which begins with the first rows, finds these there.

Legend: T tokens, O out_features, R rank, S strips of rows (or of columns).
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from dorac.kernels.configs import (
    ColumnConfig,
    LoraBConfig,
    LowRankConfig,
    column_config,
    lora_b_config,
    low_rank_config,
)
from dorac.kernels.launch import Launch, cdiv, contiguous
from dorac.kernels.tiles import load_tile, magnitude_scale, number, product, store_tile, strip_sum


@triton.jit
def compose_backward_kernel(
    dy_ptr,
    inner_ptr,
    magnitude_ptr,
    norm_ptr,
    scaling_ptr,
    d_base_ptr,
    d_lora_ptr,
    partial_ptr,
    T,
    O,
    rows_per_program,
    stride_dt,
    stride_do,
    stride_it,
    stride_io,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    EVEN: tl.constexpr,  # no tile reaches over an edge
    HAS_NORM: tl.constexpr,
    DELTA: tl.constexpr,
    WANT_LORA: tl.constexpr,
    STAGES: tl.constexpr,
):
    strip = tl.num_programs(1) - 1 - tl.program_id(1)
    start_o = tl.program_id(0) * BLOCK_O
    cols_O = start_o + tl.arange(0, BLOCK_O)
    mask_O = cols_O < O
    g_O = magnitude_scale(magnitude_ptr, norm_ptr, cols_O, mask_O, HAS_NORM)
    if WANT_LORA:
        lora_scale_O = g_O * number(scaling_ptr)
    if DELTA:
        g_O -= 1
    acc_TO = tl.zeros([BLOCK_T, BLOCK_O], dtype=tl.float32)
    begin = strip * rows_per_program
    for start in tl.range(begin, tl.minimum(begin + rows_per_program, T), BLOCK_T, num_stages=STAGES):
        dy_TO = load_tile(dy_ptr, start, start_o, T, O, stride_dt, stride_do, BLOCK_T, BLOCK_O, EVEN, False)
        inner_TO = load_tile(inner_ptr, start, start_o, T, O, stride_it, stride_io, BLOCK_T, BLOCK_O, EVEN, False)
        dy_TO = dy_TO.to(tl.float32)
        acc_TO += dy_TO * inner_TO.to(tl.float32)
        store_tile(d_base_ptr, g_O[None, :] * dy_TO, start, start_o, T, O, BLOCK_T, BLOCK_O, EVEN, False)
        if WANT_LORA:
            d_lora_TO = lora_scale_O[None, :] * dy_TO
            store_tile(d_lora_ptr, d_lora_TO, start, start_o, T, O, BLOCK_T, BLOCK_O, EVEN, False)
    tl.store(partial_ptr + strip.to(tl.int64) * O + cols_O, tl.sum(acc_TO, axis=0), mask=mask_O)


@triton.jit
def low_rank_backward_kernel(
    dy_ptr,
    inner_ptr,
    magnitude_ptr,
    norm_ptr,
    h_ptr,
    b_ptr,
    d_inner_ptr,
    partial_m_ptr,
    partial_h_ptr,
    partial_b_ptr,
    T,
    O,
    R,
    rows_per_program,
    stride_dt,
    stride_do,
    stride_it,
    stride_io,
    stride_ht,
    stride_hr,
    stride_bo,
    stride_br,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
):
    strip_o, strip_t = tl.program_id(0), tl.num_programs(1) - 1 - tl.program_id(1)
    start_o = strip_o * BLOCK_O
    cols_O = start_o + tl.arange(0, BLOCK_O)
    mask_O = cols_O < O
    ranks_R = tl.arange(0, BLOCK_R)
    g_O = magnitude_scale(magnitude_ptr, norm_ptr, cols_O, mask_O, True)
    b_OR = load_tile(b_ptr, start_o, 0, O, R, stride_bo, stride_br, BLOCK_O, BLOCK_R, EVEN, False)
    acc_TO = tl.zeros([BLOCK_T, BLOCK_O], dtype=tl.float32)
    acc_OR = tl.zeros([BLOCK_O, BLOCK_R], dtype=tl.float32)
    begin = strip_t * rows_per_program
    rows = tl.minimum(rows_per_program, T - begin)
    for done in tl.range(0, rows, BLOCK_T, num_stages=STAGES):
        start = begin + (tl.cdiv(rows - done, BLOCK_T) - 1) * BLOCK_T
        dy_TO = load_tile(dy_ptr, start, start_o, T, O, stride_dt, stride_do, BLOCK_T, BLOCK_O, EVEN, False)
        inner_TO = load_tile(inner_ptr, start, start_o, T, O, stride_it, stride_io, BLOCK_T, BLOCK_O, EVEN, False)
        h_TR = load_tile(h_ptr, start, 0, T, R, stride_ht, stride_hr, BLOCK_T, BLOCK_R, EVEN, False)
        dy_TO = dy_TO.to(tl.float32)
        acc_TO += dy_TO * inner_TO.to(tl.float32)
        d_inner_TO = (g_O[None, :] * dy_TO).to(d_inner_ptr.dtype.element_ty)
        store_tile(d_inner_ptr, d_inner_TO, start, start_o, T, O, BLOCK_T, BLOCK_O, EVEN, False)
        acc_OR = product(d_inner_TO.T, h_TR, acc_OR, False)
        d_h_TR = product(d_inner_TO, b_OR, tl.zeros([BLOCK_T, BLOCK_R], dtype=tl.float32), False)
        rows_T = start + tl.arange(0, BLOCK_T)
        target = (strip_o.to(tl.int64) * T + rows_T)[:, None] * R + ranks_R[None, :]
        tl.store(partial_h_ptr + target, d_h_TR, mask=(rows_T < T)[:, None] & (ranks_R < R)[None, :])
    target_O = strip_t.to(tl.int64) * O + cols_O
    tl.store(partial_m_ptr + target_O, tl.sum(acc_TO, axis=0), mask=mask_O)
    target_OR = target_O[:, None] * R + ranks_R[None, :]
    tl.store(partial_b_ptr + target_OR, acc_OR, mask=mask_O[:, None] & (ranks_R < R)[None, :])


@triton.jit
def lora_b_backward_kernel(
    dy_ptr,
    again_ptr,  # dy once more: see below
    inner_ptr,
    magnitude_ptr,
    norm_ptr,
    h_ptr,
    scaling_ptr,
    d_inner_ptr,
    d_m_ptr,
    d_b_ptr,
    T,
    O,
    R,
    rows_per_program,
    stride_dt,
    stride_do,
    stride_it,
    stride_io,
    stride_ht,
    stride_hr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
    CHUNKS: tl.constexpr,  # of BLOCK_R ranks, at most 3
    EVEN: tl.constexpr,
    FINISH: tl.constexpr,  # one strip: write the gradients themselves
    SCALE_B: tl.constexpr,
    STAGES: tl.constexpr,
):
    """d_inner, and d_magnitude ``[O]`` and d_lora_B ``[O, R]`` or without FINISH their strips.

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
        h_TR = load_tile(h_ptr, start, 0, T, R, stride_ht, stride_hr, BLOCK_T, BLOCK_R, EVEN, False)
        acc0_OR = product(dy_OT, h_TR, acc0_OR, False)
        if CHUNKS >= 2:
            h_TR = load_tile(h_ptr, start, BLOCK_R, T, R, stride_ht, stride_hr, BLOCK_T, BLOCK_R, EVEN, False)
            acc1_OR = product(dy_OT, h_TR, acc1_OR, False)
        if CHUNKS >= 3:
            h_TR = load_tile(h_ptr, start, 2 * BLOCK_R, T, R, stride_ht, stride_hr, BLOCK_T, BLOCK_R, EVEN, False)
            acc2_OR = product(dy_OT, h_TR, acc2_OR, False)
        dy_TO = load_tile(again_ptr, start, start_o, T, O, stride_dt, stride_do, BLOCK_T, BLOCK_O, EVEN, False)
        inner_TO = load_tile(inner_ptr, start, start_o, T, O, stride_it, stride_io, BLOCK_T, BLOCK_O, EVEN, False)
        dy_TO = dy_TO.to(tl.float32)
        acc_TO += dy_TO * inner_TO.to(tl.float32)
        store_tile(d_inner_ptr, g_O[None, :] * dy_TO, start, start_o, T, O, BLOCK_T, BLOCK_O, EVEN, False)
    d_m_O = tl.sum(acc_TO, axis=0)
    if FINISH:
        d_m_O = _per_norm(d_m_O, norm_ptr, cols_O, mask_O)
    tl.store(d_m_ptr + strip.to(tl.int64) * O + cols_O, d_m_O.to(d_m_ptr.dtype.element_ty), mask=mask_O)
    if SCALE_B:
        g_O *= number(scaling_ptr)
    d_b_ptr += strip.to(tl.int64) * O * R
    store_tile(d_b_ptr, g_O[:, None] * acc0_OR, start_o, 0, O, R, BLOCK_O, BLOCK_R, EVEN, False)
    if CHUNKS >= 2:
        store_tile(d_b_ptr, g_O[:, None] * acc1_OR, start_o, BLOCK_R, O, R, BLOCK_O, BLOCK_R, EVEN, False)
    if CHUNKS >= 3:
        store_tile(d_b_ptr, g_O[:, None] * acc2_OR, start_o, 2 * BLOCK_R, O, R, BLOCK_O, BLOCK_R, EVEN, False)


@triton.jit
def _per_norm(d_g, norm_ptr, index, mask):
    """dm of dg: divided by the norm, 0 on zero rows."""
    norm = tl.load(norm_ptr + index, mask=mask, other=1.0).to(tl.float32)
    return tl.where(norm <= 1e-12, 0.0, d_g / norm)


@triton.jit
def _store_d_magnitude(partial_ptr, norm_ptr, out_ptr, block, size, strips, HAS_NORM, BLOCK):
    """The summed strips: dg; per norm: dm."""
    index = block * BLOCK + tl.arange(0, BLOCK)
    mask = index < size
    total = strip_sum(partial_ptr, index, mask, size, strips)
    if HAS_NORM:
        total = _per_norm(total, norm_ptr, index, mask)
    tl.store(out_ptr + index, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _store_scaled(partial_ptr, scaling_ptr, out_ptr, block, size, strips, HAS_SCALING, BLOCK):
    """The summed strips, times s."""
    index = block * BLOCK + tl.arange(0, BLOCK)
    mask = index < size
    total = strip_sum(partial_ptr, index, mask, size, strips)
    if HAS_SCALING:
        total *= number(scaling_ptr)
    tl.store(out_ptr + index, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def strip_sum_kernel(partial_ptr, norm_ptr, out_ptr, size, strips, HAS_NORM: tl.constexpr, BLOCK: tl.constexpr):
    _store_d_magnitude(partial_ptr, norm_ptr, out_ptr, tl.program_id(0).to(tl.int64), size, strips, HAS_NORM, BLOCK)


@triton.jit
def low_rank_strip_sum_kernel(
    partial_m_ptr,
    partial_h_ptr,
    partial_b_ptr,
    norm_ptr,
    scaling_ptr,
    d_m_ptr,
    d_h_ptr,
    d_b_ptr,
    size_m,
    size_h,
    size_b,
    strips_t,
    strips_o,
    HAS_H: tl.constexpr,
    SCALE_B: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The sums of the kernels above in one launch: first the blocks of d_h, if there is one, then d_b's and d_m's."""
    block = tl.program_id(0).to(tl.int64)
    blocks_h, blocks_b = tl.cdiv(size_h, BLOCK), tl.cdiv(size_b, BLOCK)
    if block < blocks_h:
        if HAS_H:
            _store_scaled(partial_h_ptr, scaling_ptr, d_h_ptr, block, size_h, strips_o, True, BLOCK)
    elif block < blocks_h + blocks_b:
        block -= blocks_h
        _store_scaled(partial_b_ptr, scaling_ptr, d_b_ptr, block, size_b, strips_t, SCALE_B, BLOCK)
    else:
        block -= blocks_h + blocks_b
        _store_d_magnitude(partial_m_ptr, norm_ptr, d_m_ptr, block, size_m, strips_t, True, BLOCK)


@functools.lru_cache(maxsize=4096)
def compose_backward_launches(
    tokens: int,
    out_features: int,
    strides: tuple[tuple[int, int], ...],
    config: ColumnConfig,
    *,
    has_norm: bool,
    delta: bool,
    want_lora: bool,
) -> tuple[int, Launch, Launch]:
    """How many strips there are, the launch for dy and inner of these strides, and the one that sums the strips."""
    strips = cdiv(tokens, config.rows)
    launch = Launch(
        compose_backward_kernel,
        (cdiv(out_features, config.block_o), strips, 1),
        (tokens, out_features, config.rows, *strides[0], *strides[1]),
        config.warps,
        BLOCK_T=config.block_t,
        BLOCK_O=config.block_o,
        EVEN=not (tokens % config.block_t or out_features % config.block_o),
        HAS_NORM=has_norm,
        DELTA=delta,
        WANT_LORA=want_lora,
        STAGES=config.stages,
    )
    grid = cdiv(out_features, 64), 1, 1
    return strips, launch, Launch(strip_sum_kernel, grid, (out_features, strips), 2, HAS_NORM=has_norm, BLOCK=64)


@functools.lru_cache(maxsize=4096)
def low_rank_backward_launches(
    tokens: int,
    out_features: int,
    rank: int,
    strides: tuple[tuple[int, int], ...],
    config: LowRankConfig,
    *,
    scale_b: bool,
) -> tuple[tuple[int, int], Launch, Launch]:
    """How many strips of rows and of columns there are, the launch for dy, inner, h and lora_B, and the sums'."""
    if rank > config.block_r:
        raise ValueError(f"rank must be at most {config.block_r} here, got {rank}")
    strips = cdiv(tokens, config.rows), cdiv(out_features, config.block_o)
    launch = Launch(
        low_rank_backward_kernel,
        (strips[1], strips[0], 1),
        (tokens, out_features, rank, config.rows, *(s for pair in strides for s in pair)),
        config.warps,
        BLOCK_T=config.block_t,
        BLOCK_O=config.block_o,
        BLOCK_R=config.block_r,
        EVEN=not (tokens % config.block_t or out_features % config.block_o or rank % config.block_r),
        STAGES=config.stages,
    )
    sizes = out_features, tokens * rank, out_features * rank
    return strips, launch, _sums(sizes, strips, has_h=True, scale_b=scale_b, block=128)


@functools.lru_cache(maxsize=4096)
def lora_b_backward_launches(
    tokens: int,
    out_features: int,
    rank: int,
    strides: tuple[tuple[int, int], ...],
    config: LoraBConfig,
    *,
    scale_b: bool,
) -> tuple[int, Launch, Launch | None]:
    """How many strips there are, the launch for dy, inner and h, and where there are several the one that sums them."""
    if rank > config.block_r * config.chunks:
        raise ValueError(f"rank must be at most {config.block_r * config.chunks} here, got {rank}")
    strips = cdiv(tokens, config.rows)
    edges = tokens % config.block_t or out_features % config.block_o or rank != config.block_r * config.chunks
    launch = Launch(
        lora_b_backward_kernel,
        (cdiv(out_features, config.block_o), strips, 1),
        (tokens, out_features, rank, config.rows, *(s for pair in strides for s in pair)),
        config.warps,
        BLOCK_T=config.block_t,
        BLOCK_O=config.block_o,
        BLOCK_R=config.block_r,
        CHUNKS=config.chunks,
        EVEN=not edges,
        FINISH=strips == 1,
        SCALE_B=scale_b,
        STAGES=config.stages,
    )
    if strips == 1:
        return strips, launch, None
    sizes = out_features, 0, out_features * rank
    return strips, launch, _sums(sizes, (strips, 0), has_h=False, scale_b=False, block=512)  # few strips, long ones


def _sums(sizes: tuple[int, int, int], strips: tuple[int, int], *, has_h: bool, scale_b: bool, block: int) -> Launch:
    """Sums the strips of d_magnitude, d_h (or None) and d_lora_B, of ``sizes``; then come norm, scaling, gradients."""
    return Launch(
        low_rank_strip_sum_kernel,
        (sum(cdiv(size, block) for size in sizes), 1, 1),
        (*sizes, *strips),
        4,
        HAS_H=has_h,
        SCALE_B=scale_b,
        BLOCK=block,
    )


def compose_backward(
    dy: Tensor,
    inner: Tensor,
    magnitude: Tensor,
    weight_norm: Tensor | None,
    scaling: Tensor | float | None = None,
    *,
    delta: bool = False,
    lora_dtype: torch.dtype | None = None,
    config: ColumnConfig | None = None,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """``d_base = g * dy`` (with ``delta`` ``(g - 1) * dy``), ``d_lora = g * s * dy``, and the magnitude's gradient.

    Args:
        dy, inner: ``[T, O]``, any strides.
        magnitude: ``[O]``; g itself where ``weight_norm`` is None, and the gradient is then that of g.
        lora_dtype: of ``d_lora``; None for no ``d_lora`` (in the full form it is ``s * d_base``).
    """
    tokens, out_features = dy.shape
    d_base = torch.empty_like(inner, memory_format=torch.contiguous_format)
    d_lora = None if lora_dtype is None else torch.empty_like(d_base, dtype=lora_dtype)
    d_magnitude = torch.empty_like(magnitude, memory_format=torch.contiguous_format)
    if not dy.numel():
        return d_base, d_lora, d_magnitude.zero_()
    magnitude, weight_norm = contiguous(magnitude, weight_norm)
    strips, launch, add = compose_backward_launches(
        tokens,
        out_features,
        (dy.stride(), inner.stride()),
        config or column_config(tokens, out_features),
        has_norm=weight_norm is not None,
        delta=delta,
        want_lora=lora_dtype is not None,
    )
    partial = magnitude.new_empty(strips, out_features, dtype=torch.float32)
    launch(dy, inner, magnitude, weight_norm, scaling, d_base, d_lora, partial)
    add(partial, weight_norm, d_magnitude)
    return d_base, d_lora, d_magnitude


def low_rank_backward(
    dy: Tensor,
    inner: Tensor,
    magnitude: Tensor,
    weight_norm: Tensor,
    h: Tensor,
    lora_B: Tensor,
    scaling: Tensor | float,
    *,
    h_is_scaled: bool,
    config: LowRankConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`compose_backward` with the two products of d_inner by low-rank matrices in the same pass.

    Args:
        dy, inner: ``[T, O]``, any strides. h: ``[T, R]``, or ``s * h`` with ``h_is_scaled``. lora_B: ``[O, R]``.

    Returns:
        ``d_inner = g * dy [T, O]``, ``d_magnitude [O]``, ``d_h = s * d_inner lora_B [T, R]`` (of h without its scaling)
        and ``d_lora_B = s * d_inner^T h [O, R]``. Partial sums take ``r / 64`` of the memory of dy meanwhile.
    """
    (tokens, out_features), rank = dy.shape, h.shape[1]
    d_inner = torch.empty_like(inner, memory_format=torch.contiguous_format)
    d_magnitude = torch.empty_like(magnitude, memory_format=torch.contiguous_format)
    d_h, d_b = h.new_empty(h.shape), lora_B.new_empty(lora_B.shape)
    if not dy.numel():
        return d_inner, d_magnitude.zero_(), d_h.zero_(), d_b.zero_()
    magnitude, weight_norm = contiguous(magnitude, weight_norm)
    strides = dy.stride(), inner.stride(), h.stride(), lora_B.stride()
    config = config or low_rank_config(tokens, out_features, rank)
    (strips_t, strips_o), launch, add = low_rank_backward_launches(
        tokens, out_features, rank, strides, config, scale_b=not h_is_scaled
    )
    partial_m = magnitude.new_empty(strips_t, out_features, dtype=torch.float32)
    partial_h = magnitude.new_empty(strips_o, tokens, rank, dtype=torch.float32)
    partial_b = magnitude.new_empty(strips_t, out_features, rank, dtype=torch.float32)
    launch(dy, inner, magnitude, weight_norm, h, lora_B, d_inner, partial_m, partial_h, partial_b)
    add(partial_m, partial_h, partial_b, weight_norm, scaling, d_magnitude, d_h, d_b)
    return d_inner, d_magnitude, d_h, d_b


def lora_b_backward(
    dy: Tensor,
    inner: Tensor,
    magnitude: Tensor,
    weight_norm: Tensor,
    h: Tensor,
    scaling: Tensor | float,
    *,
    h_is_scaled: bool,
    config: LoraBConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`compose_backward` with lora_B's gradient in the same pass.

    Args:
        dy, inner: ``[T, O]``, any strides. h: ``[T, R]``, or ``s * h`` with ``h_is_scaled``, of the same half dtype.

    Returns:
        ``d_inner = g * dy [T, O]``, ``d_magnitude [O]`` and ``d_lora_B = s * d_inner^T h [O, R]``. Partial sums take at
        most ``66 * r`` KiB meanwhile.
    """
    (tokens, out_features), rank = dy.shape, h.shape[1]
    d_inner = torch.empty_like(inner, memory_format=torch.contiguous_format)
    d_magnitude = torch.empty_like(magnitude, memory_format=torch.contiguous_format)
    d_b = h.new_empty(out_features, rank)
    if not dy.numel():
        return d_inner, d_magnitude.zero_(), d_b.zero_()
    magnitude, weight_norm = contiguous(magnitude, weight_norm)
    strides = dy.stride(), inner.stride(), h.stride()
    config = config or lora_b_config(tokens, out_features, rank)
    strips, launch, add = lora_b_backward_launches(tokens, out_features, rank, strides, config, scale_b=not h_is_scaled)
    if add is None:
        partial_m, partial_b = d_magnitude, d_b
    else:
        partial_m = magnitude.new_empty(strips, out_features, dtype=torch.float32)
        partial_b = magnitude.new_empty(strips, out_features, rank, dtype=torch.float32)
    launch(dy, dy, inner, magnitude, weight_norm, h, scaling, d_inner, partial_m, partial_b)
    if add is not None:
        add(partial_m, None, partial_b, weight_norm, scaling, d_magnitude, None, d_b)
    return d_inner, d_magnitude, d_b
