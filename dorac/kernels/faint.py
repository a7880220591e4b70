"""The magnitude's gradient of rows whose g is too small for y to tell it, over a packed weight.

Where y is saved in place of inner, ``d_m = colsum(dy * y) / m`` (``kernels/backward.py``) says nothing of a row with
m = 0. For such rows ``inner = x W^T + s h lora_B^T`` is computed again, from the packed storage: slowly, and hardly
ever; a program without one ends at once.

Legend: T tokens, O out_features, C stored columns, R rank.
"""

import functools

import triton
import triton.language as tl

from dorac.kernels.backward import FAINT
from dorac.kernels.launch import Launch, cdiv
from dorac.kernels.packed_norm import Form
from dorac.kernels.packed_tiles import decoded, in_lanes, load_scales
from dorac.kernels.tiles import load_tile, number, product

BLOCK_C = 64


@triton.jit
def faint_kernel(
    codes_ptr,
    table_ptr,
    scale_ptr,
    zero_ptr,
    scale_table_ptr,
    scale_scale_ptr,
    scale_offset_ptr,
    dy_ptr,
    x_ptr,
    h_ptr,
    b_ptr,
    magnitude_ptr,
    norm_ptr,
    scaling_ptr,  # or a number
    d_m_ptr,
    T,
    O,
    C,
    R,
    groups,
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
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    start_o = tl.program_id(0) * BLOCK_O
    cols_O = start_o + tl.arange(0, BLOCK_O)
    m_O = tl.load(magnitude_ptr + cols_O, mask=cols_O < O, other=1.0).to(tl.float32)
    norm_O = tl.load(norm_ptr + cols_O, mask=cols_O < O, other=0.0).to(tl.float32)
    faint_O = (tl.abs(m_O) < norm_O * FAINT) & (norm_O > 1e-12)
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
                scale_OC = load_scales(
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
                    False,
                    BLOCK_O,
                    BLOCK_C,
                )
                zero_OC = None
                if zero_ptr is not None:
                    zero_OC = load_scales(
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
                        True,
                        BLOCK_O,
                        BLOCK_C,
                    )
                for half in tl.static_range(HALVES):
                    x_TC = load_tile(x_ptr + half, start, column, T, C, C * HALVES, HALVES, 16, BLOCK_C, False, False)
                    w_OC = decoded(codes_OC, scale_OC, zero_OC, table, FORMAT, half, DTYPE)
                    w_OC = tl.broadcast_to(w_OC, [BLOCK_O, BLOCK_C])
                    inner_TO = product(x_TC.to(tl.float32), w_OC.T, inner_TO, False)
            dy_TO = load_tile(dy_ptr, start, start_o, T, O, stride_dt, stride_do, 16, BLOCK_O, False, False)
            total_O += tl.sum(dy_TO.to(tl.float32) * inner_TO, axis=0)
        d_m_O = total_O / tl.where(faint_O, norm_O, 1.0)
        tl.store(d_m_ptr + cols_O, d_m_O.to(d_m_ptr.dtype.element_ty), mask=faint_O)


@functools.lru_cache(maxsize=4096)
def faint_launch(
    tokens: int, out_features: int, in_features: int, rank: int, form: Form, dy: tuple[int, int], b: tuple[int, int]
) -> Launch:
    """The launch for a weight of this form, x and h contiguous, dy and lora_B of these strides.

    Its tensors: the weight's seven pieces, dy, x, h, lora_B, magnitude, norm, scaling and d_magnitude, which has the
    other rows' values.
    """
    columns = in_features // form.halves
    return Launch(
        faint_kernel,
        (cdiv(out_features, 16), 1, 1),
        (tokens, out_features, columns, rank, cdiv(columns, form.group), *form.strides[1:3], *dy, *b),
        4,
        FORMAT=form.name,
        DTYPE=form.dtype,
        NESTED=form.nested,
        ROWS=form.rows,
        GROUP=form.group,
        SWIZZLED=form.swizzled,
        HALVES=form.halves,
        BLOCK_O=16,
        BLOCK_C=BLOCK_C,
    )
