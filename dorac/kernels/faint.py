"""The end of the backward pass where y is kept in place of inner, over a packed weight.

``d_m = colsum(dy * y) / m`` (``kernels/lora_b.py``) says nothing of a row with m = 0, or of another whose g is too
small for y to tell it. For such rows ``inner = x W^T + s h lora_B^T`` is computed again, from the packed storage:
slowly, and rarely. The kernel that adds up the strips does that too; where there is one strip it is all it does,
and a program without such a row ends at once.

Legend: T tokens, O out_features, C stored columns, R rank.
"""

import functools

import triton
import triton.language as tl

from dorac.kernels.launch import Launch, cdiv
from dorac.kernels.of_y import FAINT
from dorac.kernels.packed_tiles import decoded, in_lanes, scale_and_zero
from dorac.kernels.tiles import ZERO_ROW_NORM, load_tile, number, product, strip_sum
from dorac.packed import Form

BLOCK_O, BLOCK_C, BLOCK_B = 16, 64, 512


@triton.jit
def finish_kernel(
    partial_m_ptr,  # these two not read without SUMS
    partial_b_ptr,
    dy_ptr,
    magnitude_ptr,
    norm_ptr,
    h_ptr,
    scaling_ptr,  # or a number
    x_ptr,
    b_ptr,
    codes_ptr,
    table_ptr,
    scale_ptr,
    zero_ptr,
    scale_table_ptr,
    scale_scale_ptr,
    scale_offset_ptr,
    d_m_ptr,
    d_b_ptr,
    T,
    O,
    C,
    R,
    groups,
    strips,
    stride_so,
    stride_sg,
    stride_dt,
    stride_do,
    stride_bo,
    stride_br,
    FORMAT: tl.constexpr,  # to HALVES: see packed_norm_kernel
    DTYPE: tl.constexpr,
    NESTED: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    SWIZZLED: tl.constexpr,
    HALVES: tl.constexpr,
    SUMS: tl.constexpr,  # add up the strips: first the blocks of d_magnitude, then those of d_lora_B
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    block = tl.program_id(0)
    if SUMS:
        blocks_m = tl.cdiv(O, BLOCK_O)
        if block >= blocks_m:
            index = (block - blocks_m).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
            size = tl.cast(O, tl.int64) * R
            total = strip_sum(partial_b_ptr, index, index < size, size, strips)
            tl.store(d_b_ptr + index, total.to(d_b_ptr.dtype.element_ty), mask=index < size)
            return
    start_o = block * BLOCK_O
    cols_O = start_o + tl.arange(0, BLOCK_O)
    mask_O = cols_O < O
    m_O = tl.load(magnitude_ptr + cols_O, mask=mask_O, other=1.0).to(tl.float32)
    norm_O = tl.load(norm_ptr + cols_O, mask=mask_O, other=0.0).to(tl.float32)
    faint_O = (tl.abs(m_O) < norm_O * FAINT) & (norm_O > ZERO_ROW_NORM)
    if SUMS:
        dot_O = strip_sum(partial_m_ptr, cols_O, mask_O, O, strips)
        d_m_O = tl.where(norm_O <= ZERO_ROW_NORM, 0.0, dot_O / tl.where(faint_O, 1.0, m_O))
        tl.store(d_m_ptr + cols_O, d_m_O.to(d_m_ptr.dtype.element_ty), mask=mask_O & ~faint_O)
    if tl.max(faint_O.to(tl.int32), axis=0) > 0:
        scales = (scale_ptr, zero_ptr, scale_table_ptr, scale_scale_ptr, scale_offset_ptr)
        table = in_lanes(table_ptr, FORMAT) if HALVES == 2 else None
        total_O = tl.zeros([BLOCK_O], dtype=tl.float32)
        for start in tl.range(0, T, 16, num_stages=1):
            inner_TO = tl.zeros([16, BLOCK_O], dtype=tl.float32)
            for rank in tl.range(0, R, 16, num_stages=1):
                h_TR = load_tile(h_ptr, start, rank, T, R, R, 1, 16, 16, False, False)
                b_OR = load_tile(b_ptr, start_o, rank, O, R, stride_bo, stride_br, BLOCK_O, 16, False, False)
                inner_TO = product(h_TR, b_OR.T, inner_TO, False)
            inner_TO *= number(scaling_ptr)
            for column in tl.range(0, C, BLOCK_C, num_stages=1):
                codes_OC = load_tile(codes_ptr, start_o, column, O, C, C, 1, BLOCK_O, BLOCK_C, False, False)
                scale_OC, zero_OC = scale_and_zero(
                    scales,
                    start_o,
                    column,
                    O,
                    groups,
                    stride_so,
                    stride_sg,
                    FORMAT,
                    NESTED,
                    ROWS,
                    GROUP,
                    SWIZZLED,
                    BLOCK_O,
                    BLOCK_C,
                )
                for half in tl.static_range(HALVES):
                    x_TC = load_tile(x_ptr + half, start, column, T, C, C * HALVES, HALVES, 16, BLOCK_C, False, False)
                    w_OC = decoded(codes_OC, scale_OC, zero_OC, table, FORMAT, half, DTYPE, scales[1] is not None)
                    w_OC = tl.broadcast_to(w_OC, [BLOCK_O, BLOCK_C])
                    inner_TO = product(x_TC.to(tl.float32), w_OC.T, inner_TO, False)
            dy_TO = load_tile(dy_ptr, start, start_o, T, O, stride_dt, stride_do, 16, BLOCK_O, False, False)
            total_O += tl.sum(dy_TO.to(tl.float32) * inner_TO, axis=0)
        d_m_O = total_O / tl.where(faint_O, norm_O, 1.0)
        tl.store(d_m_ptr + cols_O, d_m_O.to(d_m_ptr.dtype.element_ty), mask=faint_O)


@functools.lru_cache(maxsize=4096)
def finish_launch(
    tokens: int,
    out_features: int,
    in_features: int,
    rank: int,
    strips: int,
    form: Form,
    dy: tuple[int, int],
    b: tuple[int, int],
) -> Launch:
    """The launch for a weight of this form, x and h contiguous, dy and lora_B of these strides.

    Its tensors: the strips of both gradients (with one strip the gradients themselves, which are done but for the rows
    of a faint g), dy, magnitude, norm, h, scaling, x, lora_B, the weight's seven pieces, and the gradients of magnitude
    and lora_B.
    """
    columns = in_features // form.halves
    blocks = cdiv(out_features, BLOCK_O) + (cdiv(out_features * rank, BLOCK_B) if strips > 1 else 0)
    return Launch(
        finish_kernel,
        (blocks, 1, 1),
        (tokens, out_features, columns, rank, cdiv(columns, form.group), strips, *form.strides[1:3], *dy, *b),
        4,
        FORMAT=form.name,
        DTYPE=form.dtype,
        NESTED=form.nested,
        ROWS=form.rows,
        GROUP=form.group,
        SWIZZLED=form.swizzled,
        HALVES=form.halves,
        SUMS=strips > 1,
        BLOCK_O=BLOCK_O,
        BLOCK_C=BLOCK_C,
        BLOCK_B=BLOCK_B,
    )
