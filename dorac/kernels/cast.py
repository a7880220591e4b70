"""A layer's factors in the dtype of its products, both in one launch.

Legend: N elements.
"""

import triton
import triton.language as tl

from dorac.kernels.launch import Launch, cdiv
from dorac.kernels.tiles import to_bfloat16

BLOCK = 1024


@triton.jit
def _cast(source_ptr, target_ptr, start, N, BLOCK: tl.constexpr):
    index = start + tl.arange(0, BLOCK)
    values = tl.load(source_ptr + index, mask=index < N, other=0.0).to(tl.float32)
    if target_ptr.dtype.element_ty == tl.bfloat16:
        values = to_bfloat16(values)
    tl.store(target_ptr + index, values.to(target_ptr.dtype.element_ty), mask=index < N)


@triton.jit
def cast_kernel(a_ptr, b_ptr, a_cast_ptr, b_cast_ptr, N_A, N_B, BLOCK: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    blocks_a = tl.cdiv(N_A, BLOCK)
    if block < blocks_a:
        _cast(a_ptr, a_cast_ptr, block * BLOCK, N_A, BLOCK)
    else:
        _cast(b_ptr, b_cast_ptr, (block - blocks_a) * BLOCK, N_B, BLOCK)


def cast_launch(size_a: int, size_b: int) -> Launch:
    """The launch that rounds two contiguous tensors of these sizes to nearest. Its tensors: both, then both results."""
    blocks = cdiv(size_a, BLOCK) + cdiv(size_b, BLOCK)
    return Launch(cast_kernel, (blocks, 1, 1), (size_a, size_b), 4, BLOCK=BLOCK)
