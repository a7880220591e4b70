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
from dorac.kernels.configs import ColumnConfig, column_config
from dorac.kernels.launch import Launch, cdiv, contiguous
from dorac.kernels.tiles import ZERO_ROW_NORM, load_tile, magnitude_scale, number, store_tile, strip_sum


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
def per_norm(d_g, norm_ptr, index, mask):
    """dm of dg: divided by the norm, 0 on zero rows."""
    norm = tl.load(norm_ptr + index, mask=mask, other=1.0).to(tl.float32)
    return tl.where(norm <= ZERO_ROW_NORM, 0.0, d_g / norm)


@triton.jit
def strip_sum_kernel(partial_ptr, norm_ptr, out_ptr, size, strips, HAS_NORM: tl.constexpr, BLOCK: tl.constexpr):
    """The summed strips: dg; per norm: dm."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < size
    total = strip_sum(partial_ptr, index, mask, size, strips)
    if HAS_NORM:
        total = per_norm(total, norm_ptr, index, mask)
    tl.store(out_ptr + index, total.to(out_ptr.dtype.element_ty), mask=mask)


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
