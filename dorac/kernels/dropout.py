"""Dropout's mask at one bit an element, and what is multiplied with it, on CUDA.

Element i of a tensor, in the order of its rows, has bit i % 8 of byte i // 8. Products are rounded as torch's are.

Legend: B bytes of the mask, E the 8 elements of each, N elements in all.
"""

import triton
import triton.language as tl

from dorac.kernels.launch import Launch, cdiv
from dorac.kernels.tiles import number

BLOCK = 512  # bytes of a program


@triton.jit
def _elements(BLOCK: tl.constexpr):
    """The program's bytes, and the elements of each."""
    bytes_B = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    return bytes_B, bytes_B[:, None] * 8 + tl.arange(0, 8)[None, :]


@triton.jit
def pack_kernel(mask_ptr, bits_ptr, N, BLOCK: tl.constexpr):
    bytes_B, elements_BE = _elements(BLOCK)
    kept_BE = tl.load(mask_ptr + elements_BE, mask=elements_BE < N, other=0).to(tl.int32)
    bits_B = tl.sum(kept_BE << tl.arange(0, 8)[None, :], axis=1)
    tl.store(bits_ptr + bytes_B, bits_B.to(tl.uint8), mask=bytes_B * 8 < N)


@triton.jit
def drop_kernel(values_ptr, bits_ptr, scale, out_ptr, N, BLOCK: tl.constexpr):
    bytes_B, elements_BE = _elements(BLOCK)
    inside_BE = elements_BE < N
    bits_B = tl.load(bits_ptr + bytes_B, mask=bytes_B * 8 < N, other=0).to(tl.int32)
    kept_BE = (bits_B[:, None] >> tl.arange(0, 8)[None, :]) & 1
    values_BE = tl.load(values_ptr + elements_BE, mask=inside_BE, other=0.0).to(tl.float32)
    dropped_BE = values_BE * kept_BE.to(tl.float32) * number(scale)
    tl.store(out_ptr + elements_BE, dropped_BE.to(out_ptr.dtype.element_ty), mask=inside_BE)


def pack_launch(size: int) -> Launch:
    """Packs a mask of ``size`` bytes, each 0 or 1, contiguous: its tensors are the mask and the bits, both uint8."""
    return Launch(pack_kernel, (cdiv(size, 8 * BLOCK), 1, 1), (size,), 4, BLOCK=BLOCK)


def drop_launch(size: int) -> Launch:
    """``out = values * mask * scale`` over ``size`` elements, both contiguous; out may be values.

    Its tensors: values, bits, scale (a number), out.
    """
    return Launch(drop_kernel, (cdiv(size, 8 * BLOCK), 1, 1), (size,), 4, BLOCK=BLOCK)
