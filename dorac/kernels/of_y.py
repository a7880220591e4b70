"""The magnitude's gradient where y is kept in place of inner, also of rows whose g is too small for it.

Legend: T tokens, I in_features, O out_features, R rank.
"""

import triton
import triton.language as tl

from dorac.kernels.tiles import ZERO_ROW_NORM, load_tile, number, product

FAINT = tl.constexpr(2.0**-6)  # below such a g, y = g * inner may have fewer digits than inner: float16's smallest


@triton.jit
def of_y(
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
    rarely, and in small tiles that leave the rest of the kernel its registers. Over a packed weight ``faint.py``
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
    return tl.where(norm_O <= ZERO_ROW_NORM, 0.0, d_m_O)
