"""The backward pass of ``y = g * inner + b`` on CUDA, together with lora_B's gradient where that pays.

It goes once over dy and inner, up to rank 384 with the product of both with h. Sums over rows or columns are written
per strip and added in a fixed order by a second kernel, so that two runs give the same bits.

Strips of rows, or where there are few the rows of a strip, are taken from the last to the first: of what the kernel
before has written, its end is still in L2, and the next kernel, which begins with the first rows, finds these there.

Legend: T tokens, O out_features, R rank, S strips of rows.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from dorac.kernels import target
from dorac.kernels.configs import ColumnConfig, LoraBConfig, column_config, lora_b_config
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


FAINT = tl.constexpr(2.0**-6)  # below such a g, y = g * inner may have fewer digits than inner: float16's smallest


@triton.jit
def _of_y(
    dot_O,
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
    BLOCK_O: tl.constexpr,
):
    """The magnitude's gradient from ``dot = colsum(dy * y)``, ``y = g * inner``: ``dot / m``.

    Rows whose g is too small for that, zero as a rule, have it from inner, which is computed again for them: slowly,
    hardly ever, and in small tiles that leave the rest of the kernel its registers. Over a packed weight ``faint.py``
    does that.
    """
    cols_O = start_o + tl.arange(0, BLOCK_O)
    mask_O = cols_O < O
    m_O = tl.load(magnitude_ptr + cols_O, mask=mask_O, other=1.0).to(tl.float32)
    norm_O = tl.load(norm_ptr + cols_O, mask=mask_O, other=1.0).to(tl.float32)
    faint_O = tl.abs(m_O) < norm_O * FAINT
    d_m_O = dot_O / tl.where(faint_O, 1.0, m_O)
    # The first is the compiler's to answer; without a weight such rows have theirs from another kernel.
    if w_ptr is not None:  # noqa: SIM102
        if tl.max(faint_O.to(tl.int32), axis=0) > 0:
            total_O = tl.zeros([BLOCK_O], dtype=tl.float32)
            for start in tl.range(0, T, 16, num_stages=1):
                low_TO = tl.zeros([16, BLOCK_O], dtype=tl.float32)
                for rank in tl.range(0, R, 16, num_stages=1):
                    h_TR = load_tile(h_ptr, start, rank, T, R, stride_ht, stride_hr, 16, 16, False, False)
                    b_OR = load_tile(b_ptr, start_o, rank, O, R, stride_bo, stride_br, BLOCK_O, 16, False, False)
                    low_TO = product(h_TR, b_OR.T, low_TO, False)
                inner_TO = low_TO * number(scaling_ptr)
                for column in tl.range(0, I, 16, num_stages=1):
                    x_TI = load_tile(x_ptr, start, column, T, I, stride_xt, stride_xi, 16, 16, False, False)
                    w_OI = load_tile(w_ptr, start_o, column, O, I, stride_wo, stride_wi, BLOCK_O, 16, False, False)
                    inner_TO = product(x_TI, w_OI.T, inner_TO, False)
                dy_TO = load_tile(dy_ptr, start, start_o, T, O, stride_dt, stride_do, 16, BLOCK_O, False, False)
                total_O += tl.sum(dy_TO.to(tl.float32) * inner_TO, axis=0)
            d_m_O = tl.where(faint_O, total_O / norm_O, d_m_O)
    return tl.where(norm_O <= 1e-12, 0.0, d_m_O)


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
            d_m_O = _of_y(
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
            d_m_O = _per_norm(d_m_O, norm_ptr, cols_O, mask_O)
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
def _per_norm(d_g, norm_ptr, index, mask):
    """dm of dg: divided by the norm, 0 on zero rows."""
    norm = tl.load(norm_ptr + index, mask=mask, other=1.0).to(tl.float32)
    return tl.where(norm <= 1e-12, 0.0, d_g / norm)


@triton.jit
def strip_sum_kernel(partial_ptr, norm_ptr, out_ptr, size, strips, HAS_NORM: tl.constexpr, BLOCK: tl.constexpr):
    """The summed strips: dg; per norm: dm."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < size
    total = strip_sum(partial_ptr, index, mask, size, strips)
    if HAS_NORM:
        total = _per_norm(total, norm_ptr, index, mask)
    tl.store(out_ptr + index, total.to(out_ptr.dtype.element_ty), mask=mask)


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
            d_m_O = _of_y(
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
            d_m_O = _per_norm(dot_O, norm_ptr, cols_O, mask_O)
        tl.store(d_m_ptr + cols_O, d_m_O.to(d_m_ptr.dtype.element_ty), mask=mask_O)
    else:
        index = (block - blocks_m) * BLOCK_B + tl.arange(0, BLOCK_B)
        size = tl.cast(O, tl.int64) * R
        total = strip_sum(partial_b_ptr, index, index < size, size, strips)
        tl.store(d_b_ptr + index, total.to(d_b_ptr.dtype.element_ty), mask=index < size)


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
        config or column_config(tokens, out_features, dy.dtype, target.of(dy)),
        has_norm=weight_norm is not None,
        delta=delta,
        want_lora=lora_dtype is not None,
    )
    partial = magnitude.new_empty(strips, out_features, dtype=torch.float32)
    launch(dy, inner, magnitude, weight_norm, scaling, d_base, d_lora, partial)
    add(partial, weight_norm, d_magnitude)
    return d_base, d_lora, d_magnitude


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
