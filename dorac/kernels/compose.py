"""``y = g * (base + s * lora) + b`` on CUDA, with or without the low-rank up-projection inside, and its backward pass.

With ``h = x lora_A^T`` given instead of ``lora = h lora_B^T`` the kernel is a small product with this epilogue, and the
low-rank branch's output is never written. The backward pass goes once over dy and inner; its column sums are written
per strip of rows and added in a fixed order, so that two runs give the same bits.

Legend: T tokens, O out_features, R rank, S strips of rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dorac.kernels.configs import ColumnConfig, TileConfig, column_config, pointwise_config, tile_config
from dorac.kernels.tiles import load_tile, magnitude_scale, product, store_tile

GROUP = tl.constexpr(8)  # row blocks that run side by side share tiles of lora_B in L2


@triton.jit
def compose_kernel(
    base_ptr,
    lora_ptr,  # lora [T, O], or h [T, R] with PROJECT
    b_ptr,
    magnitude_ptr,
    norm_ptr,
    scaling_ptr,
    bias_ptr,
    y_ptr,
    inner_ptr,
    T,
    O,
    R,
    stride_base_t,
    stride_base_o,
    stride_lora_t,
    stride_lora_o,
    stride_bo,
    stride_br,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
    EVEN: tl.constexpr,  # no tile reaches over an edge
    PROJECT: tl.constexpr,
    HAS_LORA: tl.constexpr,
    HAS_NORM: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DELTA: tl.constexpr,
    WANT_Y: tl.constexpr,
    WANT_INNER: tl.constexpr,
    SPLIT: tl.constexpr,
    DESCRIPTORS: tl.constexpr,  # the five matrices are tensor descriptors, which handle the edges
    STAGES: tl.constexpr,
):
    program = tl.program_id(0)
    blocks_t, blocks_o = tl.cdiv(T, BLOCK_T), tl.cdiv(O, BLOCK_O)
    group = program // (GROUP * blocks_o)
    group_size = tl.minimum(blocks_t - group * GROUP, GROUP)
    start_t = (group * GROUP + program % (GROUP * blocks_o) % group_size) * BLOCK_T
    start_o = (program % (GROUP * blocks_o) // group_size) * BLOCK_O

    if PROJECT:
        acc_TO = tl.zeros([BLOCK_T, BLOCK_O], dtype=tl.float32)
        for start_r in tl.range(0, R, BLOCK_R, num_stages=STAGES):
            h_TR = load_tile(
                lora_ptr, start_t, start_r, T, R, stride_lora_t, stride_lora_o, BLOCK_T, BLOCK_R, EVEN, DESCRIPTORS
            )
            b_OR = load_tile(b_ptr, start_o, start_r, O, R, stride_bo, stride_br, BLOCK_O, BLOCK_R, EVEN, DESCRIPTORS)
            acc_TO = product(h_TR, b_OR.T, acc_TO, SPLIT)
    base_TO = load_tile(
        base_ptr, start_t, start_o, T, O, stride_base_t, stride_base_o, BLOCK_T, BLOCK_O, EVEN, DESCRIPTORS
    ).to(tl.float32)
    if HAS_LORA:
        if not PROJECT:
            acc_TO = load_tile(
                lora_ptr, start_t, start_o, T, O, stride_lora_t, stride_lora_o, BLOCK_T, BLOCK_O, EVEN, False
            ).to(tl.float32)
        lora_TO = tl.load(scaling_ptr).to(tl.float32) * acc_TO
        inner_TO = base_TO + lora_TO
    else:
        inner_TO = base_TO
    if WANT_INNER:
        store_tile(inner_ptr, inner_TO, start_t, start_o, T, O, BLOCK_T, BLOCK_O, EVEN, DESCRIPTORS)
    if WANT_Y:
        cols_O = start_o + tl.arange(0, BLOCK_O)
        g_O = magnitude_scale(magnitude_ptr, norm_ptr, cols_O, cols_O < O, HAS_NORM)[None, :]
        if DELTA:
            y_TO = (g_O - 1) * base_TO + g_O * lora_TO
        else:
            y_TO = g_O * inner_TO
        if HAS_BIAS:
            y_TO += tl.load(bias_ptr + cols_O, mask=cols_O < O, other=0.0).to(tl.float32)[None, :]
        store_tile(y_ptr, y_TO, start_t, start_o, T, O, BLOCK_T, BLOCK_O, EVEN, DESCRIPTORS)


def _describable(*tensors: Tensor | None) -> bool:
    """Whether the tensor memory accelerator can address these: Hopper or later, rows contiguous, 16-byte aligned."""
    if torch.cuda.get_device_capability(tensors[0].device) < (9, 0):
        return False
    return all(
        t is None
        or (
            t.stride(1) == 1 and t.stride(0) * t.element_size() % 16 == 0 and t.data_ptr() % 16 == 0 and t.stride(0) > 0
        )
        for t in tensors
    )


def compose(
    base: Tensor,
    lora: Tensor | None,
    lora_B: Tensor | None,
    magnitude: Tensor | None,
    weight_norm: Tensor | None,
    scaling: Tensor | None,
    bias: Tensor | None,
    *,
    delta: bool = False,
    want_y: bool = True,
    want_inner: bool = False,
    config: TileConfig | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """``inner = base + s * lora`` and ``y = g * inner + b`` (or its delta form), both in the dtype of ``base``.

    Args:
        base: ``[T, O]``, any strides.
        lora: ``[T, O]``; ``h [T, R]`` if ``lora_B`` is given; None for ``inner = base``.
        lora_B: ``[O, R]``, the dtype of ``h``.
        magnitude: ``[O]``; g itself where ``weight_norm`` is None.
        scaling: one element on the device.
        config: how to launch; None chooses it.
    """
    tokens, out_features = base.shape
    y = torch.empty_like(base, memory_format=torch.contiguous_format) if want_y else None
    inner = torch.empty_like(base, memory_format=torch.contiguous_format) if want_inner else None
    if not base.numel():
        return y, inner
    project = lora_B is not None
    rank = lora_B.shape[1] if project else 1
    if config is None:
        config = (
            tile_config(tokens, out_features, rank, lora.dtype, base.dtype) if project else pointwise_config(tokens)
        )
    matrices = [base, lora, lora_B, y, inner]
    if descriptors := config.descriptors and _describable(*matrices):
        blocks = {id(lora): [config.block_t, config.block_r], id(lora_B): [config.block_o, config.block_r]}
        tile = [config.block_t, config.block_o]
        matrices = [t if t is None else TensorDescriptor.from_tensor(t, blocks.get(id(t), tile)) for t in matrices]
    grid = (triton.cdiv(tokens, config.block_t) * triton.cdiv(out_features, config.block_o),)
    compose_kernel[grid](
        *matrices[:3],
        magnitude,
        weight_norm,
        scaling,
        bias,
        *matrices[3:],
        tokens,
        out_features,
        rank,
        *base.stride(),
        *((0, 0) if lora is None else lora.stride()),
        *((0, 0) if lora_B is None else lora_B.stride()),
        BLOCK_T=config.block_t,
        BLOCK_O=config.block_o,
        BLOCK_R=config.block_r,
        EVEN=not (tokens % config.block_t or out_features % config.block_o or (project and rank % config.block_r)),
        PROJECT=project,
        HAS_LORA=lora is not None,
        HAS_NORM=weight_norm is not None,
        HAS_BIAS=bias is not None,
        DELTA=delta,
        WANT_Y=want_y,
        WANT_INNER=want_inner,
        SPLIT=project and lora.dtype is torch.float32 and base.dtype is not torch.float32,
        DESCRIPTORS=descriptors,
        STAGES=config.stages,
        num_warps=config.warps,
    )
    return y, inner


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
    HAS_NORM: tl.constexpr,
    DELTA: tl.constexpr,
    WANT_LORA: tl.constexpr,
    STAGES: tl.constexpr,
):
    strip = tl.program_id(1)
    cols_O = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    long_O, mask_O = cols_O.to(tl.int64), cols_O < O
    g_O = magnitude_scale(magnitude_ptr, norm_ptr, cols_O, mask_O, HAS_NORM)
    if WANT_LORA:
        lora_scale_O = g_O * tl.load(scaling_ptr).to(tl.float32)
    if DELTA:
        g_O -= 1
    acc_TO = tl.zeros([BLOCK_T, BLOCK_O], dtype=tl.float32)
    begin = strip * rows_per_program
    for start in tl.range(begin, tl.minimum(begin + rows_per_program, T), BLOCK_T, num_stages=STAGES):
        rows_T = (start + tl.arange(0, BLOCK_T)).to(tl.int64)
        mask = (rows_T < T)[:, None] & mask_O[None, :]
        dy_TO = tl.load(dy_ptr + rows_T[:, None] * stride_dt + long_O[None, :] * stride_do, mask=mask, other=0.0)
        inner_TO = tl.load(inner_ptr + rows_T[:, None] * stride_it + long_O[None, :] * stride_io, mask=mask, other=0.0)
        dy_TO = dy_TO.to(tl.float32)
        acc_TO += dy_TO * inner_TO.to(tl.float32)
        target = rows_T[:, None] * O + cols_O[None, :]
        tl.store(d_base_ptr + target, (g_O[None, :] * dy_TO).to(d_base_ptr.dtype.element_ty), mask=mask)
        if WANT_LORA:
            d_lora_TO = lora_scale_O[None, :] * dy_TO
            tl.store(d_lora_ptr + target, d_lora_TO.to(d_lora_ptr.dtype.element_ty), mask=mask)
    tl.store(partial_ptr + strip.to(tl.int64) * O + cols_O, tl.sum(acc_TO, axis=0), mask=mask_O)


@triton.jit
def column_sum_kernel(partial_ptr, norm_ptr, out_ptr, O, strips, HAS_NORM: tl.constexpr, BLOCK: tl.constexpr):
    """``sum over S of partial[S, O]`` in the order of S: dg; divided by the norm (0 on zero rows): dm."""
    cols_O = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = cols_O < O
    total_O = tl.zeros([BLOCK], dtype=tl.float32)
    pointers = partial_ptr + cols_O
    for _ in range(strips):
        total_O += tl.load(pointers, mask=mask, other=0.0)
        pointers += O
    if HAS_NORM:
        norm_O = tl.load(norm_ptr + cols_O, mask=mask, other=1.0).to(tl.float32)
        total_O = tl.where(norm_O <= 1e-12, 0.0, total_O / norm_O)
    tl.store(out_ptr + cols_O, total_O.to(out_ptr.dtype.element_ty), mask=mask)


def compose_backward(
    dy: Tensor,
    inner: Tensor,
    magnitude: Tensor,
    weight_norm: Tensor | None,
    scaling: Tensor | None = None,
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
    config = config or column_config(tokens, out_features)
    strips = triton.cdiv(tokens, config.rows)
    partial = magnitude.new_empty(strips, out_features, dtype=torch.float32)
    compose_backward_kernel[(triton.cdiv(out_features, config.block_o), strips)](
        dy,
        inner,
        magnitude,
        weight_norm,
        scaling,
        d_base,
        d_lora,
        partial,
        tokens,
        out_features,
        config.rows,
        *dy.stride(),
        *inner.stride(),
        BLOCK_T=config.block_t,
        BLOCK_O=config.block_o,
        HAS_NORM=weight_norm is not None,
        DELTA=delta,
        WANT_LORA=d_lora is not None,
        STAGES=config.stages,
        num_warps=config.warps,
    )
    has_norm = weight_norm is not None
    column_sum_kernel[(triton.cdiv(out_features, 64),)](
        partial, weight_norm, d_magnitude, out_features, strips, HAS_NORM=has_norm, BLOCK=64, num_warps=2
    )
    return d_base, d_lora, d_magnitude
