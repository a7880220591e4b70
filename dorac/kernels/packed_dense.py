"""A packed weight made dense on CUDA in one pass, each value rounded as the format's own dequantisation rounds it.

Legend: E experts, O out_features, C stored columns (bytes of a row), I in_features: C, or 2C of two numbers a byte.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from dorac import packed
from dorac.kernels.launch import Launch, cdiv
from dorac.kernels.packed_tiles import decoded, in_lanes, scale_and_zero
from dorac.kernels.tiles import load_tile, store_tile, to_bfloat16


@triton.jit
def packed_dense_kernel(
    codes_ptr,
    table_ptr,
    scale_ptr,
    zero_ptr,
    scale_table_ptr,
    scale_scale_ptr,
    scale_offset_ptr,
    dense_ptr,
    O,
    C,
    first,  # of the rows that are made dense, of every expert
    stop,
    groups,  # blocks of a row, each with a scale
    stride_se,
    stride_so,
    stride_sg,
    stride_ss,  # from one expert's scale of scales to the next
    FORMAT: tl.constexpr,  # see packed_tiles
    DTYPE: tl.constexpr,  # what each value of the weight is rounded to
    NESTED: tl.constexpr,  # scales that share one of their own; 0: they are not quantised
    ROWS: tl.constexpr,  # of a scale
    GROUP: tl.constexpr,  # stored columns of a scale
    SWIZZLED: tl.constexpr,  # scales in blocks of 128 x 4, of all experts' rows together
    HALVES: tl.constexpr,  # numbers in a byte
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
    EVEN: tl.constexpr,  # no tile reaches over an edge
):
    expert = tl.program_id(2).to(tl.int64)
    start_o, start = first + tl.program_id(0) * BLOCK_O, tl.program_id(1) * BLOCK_C
    codes_ptr += expert * O * C
    dense_ptr += expert * (stop - first) * C * HALVES
    scale_ptr += expert * stride_se
    if zero_ptr is not None:
        zero_ptr += expert * stride_se
    if scale_scale_ptr is not None:
        scale_scale_ptr += expert * stride_ss
    before = expert * O if SWIZZLED else 0  # rows in front of the expert's first, as its scales count them
    scales = (scale_ptr, zero_ptr, scale_table_ptr, scale_scale_ptr, scale_offset_ptr)
    table = in_lanes(table_ptr, FORMAT) if HALVES == 2 else None
    codes_OC = load_tile(codes_ptr, start_o, start, stop, C, C, 1, BLOCK_O, BLOCK_C, EVEN, False)
    scale_OC, zero_OC = scale_and_zero(
        scales,
        start_o + before,
        start,
        stop + before,
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
    dense_OI = decoded(codes_OC, scale_OC, zero_OC, table, FORMAT, 0, DTYPE, scales[1] is not None)
    if HALVES == 2:
        second_OC = decoded(codes_OC, scale_OC, zero_OC, table, FORMAT, 1, DTYPE, scales[1] is not None)
        dense_OI = tl.join(dense_OI, second_OC).reshape(BLOCK_O, 2 * BLOCK_C)
    if dense_ptr.dtype.element_ty == tl.bfloat16:
        dense_OI = to_bfloat16(dense_OI)
    rows, I, start_i = stop - first, C * HALVES, start * HALVES
    store_tile(dense_ptr, dense_OI, start_o - first, start_i, rows, I, BLOCK_O, BLOCK_C * HALVES, EVEN, False)


@functools.lru_cache(maxsize=4096)
def packed_dense_launch(
    experts: int, out_features: int, columns: int, first: int, stop: int, form: packed.Form
) -> Launch:
    """Its tensors: the weight's seven pieces, and the dense one. ``columns``: bytes of a row."""
    block_o, block_c = (16, 128) if form.halves == 2 else (8, 256)
    return Launch(
        packed_dense_kernel,
        (cdiv(stop - first, block_o), cdiv(columns, block_c), experts),
        (out_features, columns, first, stop, cdiv(columns, form.group), *form.strides),
        4,
        FORMAT=form.name,
        DTYPE=form.dtype,
        NESTED=form.nested,
        ROWS=form.rows,
        GROUP=form.group,
        SWIZZLED=form.swizzled,
        HALVES=form.halves,
        BLOCK_O=block_o,
        BLOCK_C=block_c,
        EVEN=not ((stop - first) % block_o or columns % block_c),
    )


def packed_dense(weight: packed.Packed, dtype: torch.dtype, first: int = 0, stop: int | None = None) -> Tensor:
    """Rows ``[(E,) stop - first, in]`` in ``dtype``, the numbers that ``weight.rows(first, stop).to(dtype)`` has.

    Args:
        weight: a packed weight whose ``form()`` is not None.
        dtype: float32, bfloat16 or float16.
        first, stop: rows of every expert; all of them unless given.
    """
    *batch, out_features, in_features = weight.shape
    stop = out_features if stop is None else stop
    form, pieces = weight.form()
    dense = torch.empty(*batch, stop - first, in_features, dtype=dtype, device=weight.device)
    if dense.numel():
        experts, columns = batch[0] if batch else 1, in_features // form.halves
        packed_dense_launch(experts, out_features, columns, first, stop, form)(*pieces, dense)
    return dense
