"""``y = g * (base + s * lora) + b`` on CUDA, with or without the low-rank up-projection inside.

With ``h = x lora_A^T`` given instead of ``lora = h lora_B^T`` the kernel is a small product with this epilogue, and the
low-rank branch's output is never written.

Legend: T tokens, O out_features, R rank.
"""

import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dorac.kernels import target
from dorac.kernels.configs import TileConfig, pointwise_config, tile_config
from dorac.kernels.launch import Bound, Launch, cdiv, contiguous, traced
from dorac.kernels.tiles import load_tile, magnitude_scale, number, product, store_tile

GROUP = tl.constexpr(8)  # row blocks that run side by side share tiles of lora_B in L2


@triton.jit
def compose_kernel(
    base_ptr,
    lora_ptr,  # lora [T, O], or h [T, R] with PROJECT
    b_ptr,
    magnitude_ptr,
    norm_ptr,
    scaling_ptr,  # or a number
    bias_ptr,
    y_ptr,
    inner_ptr,
    T,
    O,
    R,
    rows_per_program,
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
    HOLDS_BIAS: tl.constexpr,  # base has the bias in it already
    DELTA: tl.constexpr,
    WANT_INNER: tl.constexpr,
    SPLIT: tl.constexpr,
    DESCRIPTORS: tl.constexpr,  # the five matrices are tensor descriptors, which handle the edges
    STAGES: tl.constexpr,
    WALK: tl.constexpr,  # down several tiles of rows, with all ranks in one step, or it loops over ranks
):
    program = tl.program_id(0)
    blocks_t, blocks_o = tl.cdiv(T, rows_per_program), tl.cdiv(O, BLOCK_O)
    group = program // (GROUP * blocks_o)
    group_size = tl.minimum(blocks_t - group * GROUP, GROUP)
    begin = (group * GROUP + program % (GROUP * blocks_o) % group_size) * rows_per_program
    start_o = (program % (GROUP * blocks_o) // group_size) * BLOCK_O

    if WALK:  # lora_B and g are read once
        b_OR = load_tile(b_ptr, start_o, 0, O, R, stride_bo, stride_br, BLOCK_O, BLOCK_R, EVEN, False)
        cols_O = start_o + tl.arange(0, BLOCK_O)
        g_O = magnitude_scale(magnitude_ptr, norm_ptr, cols_O, cols_O < O, HAS_NORM)
        for start_t in tl.range(begin, tl.minimum(begin + rows_per_program, T), BLOCK_T, num_stages=STAGES):
            h_TR = load_tile(lora_ptr, start_t, 0, T, R, stride_lora_t, stride_lora_o, BLOCK_T, BLOCK_R, EVEN, False)
            base_TO = load_tile(
                base_ptr, start_t, start_o, T, O, stride_base_t, stride_base_o, BLOCK_T, BLOCK_O, EVEN, False
            )
            acc_TO = product(h_TR, b_OR.T, tl.zeros([BLOCK_T, BLOCK_O], dtype=tl.float32), SPLIT)
            _write(
                base_TO,
                acc_TO,
                g_O,
                scaling_ptr,
                bias_ptr,
                y_ptr,
                inner_ptr,
                start_t,
                start_o,
                T,
                O,
                BLOCK_T,
                BLOCK_O,
                EVEN,
                True,
                HAS_BIAS,
                HOLDS_BIAS,
                DELTA,
                WANT_INNER,
                False,
            )
    else:
        acc_TO = tl.zeros([BLOCK_T, BLOCK_O], dtype=tl.float32)
        if PROJECT:
            for start_r in tl.range(0, R, BLOCK_R, num_stages=STAGES):
                h_TR = load_tile(
                    lora_ptr, begin, start_r, T, R, stride_lora_t, stride_lora_o, BLOCK_T, BLOCK_R, EVEN, DESCRIPTORS
                )
                b_OR = load_tile(
                    b_ptr, start_o, start_r, O, R, stride_bo, stride_br, BLOCK_O, BLOCK_R, EVEN, DESCRIPTORS
                )
                acc_TO = product(h_TR, b_OR.T, acc_TO, SPLIT)
        elif HAS_LORA:
            acc_TO = load_tile(
                lora_ptr, begin, start_o, T, O, stride_lora_t, stride_lora_o, BLOCK_T, BLOCK_O, EVEN, False
            ).to(tl.float32)
        base_TO = load_tile(
            base_ptr, begin, start_o, T, O, stride_base_t, stride_base_o, BLOCK_T, BLOCK_O, EVEN, DESCRIPTORS
        )
        cols_O = start_o + tl.arange(0, BLOCK_O)
        g_O = magnitude_scale(magnitude_ptr, norm_ptr, cols_O, cols_O < O, HAS_NORM)
        _write(
            base_TO,
            acc_TO,
            g_O,
            scaling_ptr,
            bias_ptr,
            y_ptr,
            inner_ptr,
            begin,
            start_o,
            T,
            O,
            BLOCK_T,
            BLOCK_O,
            EVEN,
            HAS_LORA,
            HAS_BIAS,
            HOLDS_BIAS,
            DELTA,
            WANT_INNER,
            DESCRIPTORS,
        )


@triton.jit
def _write(
    base_TO,
    acc_TO,
    g_O,
    scaling_ptr,
    bias_ptr,
    y_ptr,
    inner_ptr,
    start_t,
    start_o,
    T,
    O,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    EVEN: tl.constexpr,
    HAS_LORA: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HOLDS_BIAS: tl.constexpr,
    DELTA: tl.constexpr,
    WANT_INNER: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """y and inner of a tile."""
    base_TO, g_O = base_TO.to(tl.float32), g_O[None, :]
    if HAS_LORA:
        lora_TO = number(scaling_ptr) * acc_TO
        inner_TO = base_TO + lora_TO
    else:
        inner_TO = base_TO
    if HAS_BIAS:
        cols_O = start_o + tl.arange(0, BLOCK_O)
        bias_O = tl.load(bias_ptr + cols_O, mask=cols_O < O, other=0.0).to(tl.float32)[None, :]
        if HOLDS_BIAS:
            bias_O = tl.where(tl.abs(bias_O) < float("inf"), bias_O, 0.0)  # base has what is not finite
    if WANT_INNER:
        without_TO = inner_TO - bias_O if HOLDS_BIAS else inner_TO
        store_tile(inner_ptr, without_TO, start_t, start_o, T, O, BLOCK_T, BLOCK_O, EVEN, DESCRIPTORS)
    if DELTA:
        y_TO = (g_O - 1) * base_TO + g_O * lora_TO
    else:
        y_TO = g_O * inner_TO
    if HAS_BIAS:
        y_TO += (1 - g_O) * bias_O if HOLDS_BIAS else bias_O
    store_tile(y_ptr, y_TO, start_t, start_o, T, O, BLOCK_T, BLOCK_O, EVEN, DESCRIPTORS)


def _describable(*tensors: Tensor | None) -> bool:
    """Whether the tensor memory accelerator can address these: contiguous rows, 16-byte aligned."""
    return all(
        t is None
        or (
            t.stride(1) == 1 and t.stride(0) * t.element_size() % 16 == 0 and t.data_ptr() % 16 == 0 and t.stride(0) > 0
        )
        for t in tensors
    )


@functools.lru_cache(maxsize=4096)
def compose_launch(
    tokens: int,
    out_features: int,
    strides: tuple[tuple[int, int] | None, ...],
    rank: int | None,
    config: TileConfig,
    *,
    has_norm: bool,
    has_bias: bool,
    delta: bool,
    want_inner: bool,
    split: bool,
    descriptors: bool,
    holds_bias: bool = False,
) -> Launch:
    """The launch for ``base``, ``lora`` and ``lora_B`` of these strides, None for those that there are not.

    Its tensors: base, lora, lora_B, magnitude, weight_norm, scaling, bias, y, inner.
    """
    project = rank is not None
    walk = project and config.rows > config.block_t
    assert not walk or (rank <= config.block_r and not descriptors)
    rows = config.rows if walk else config.block_t
    edges = tokens % config.block_t or out_features % config.block_o or (project and rank % config.block_r)
    return Launch(
        compose_kernel,
        (cdiv(tokens, rows) * cdiv(out_features, config.block_o), 1, 1),
        (tokens, out_features, rank or 1, rows, *(s for pair in strides for s in pair or (0, 0))),
        config.warps,
        BLOCK_T=config.block_t,
        BLOCK_O=config.block_o,
        BLOCK_R=config.block_r,
        EVEN=not edges,
        PROJECT=project,
        HAS_LORA=strides[1] is not None,
        HAS_NORM=has_norm,
        HAS_BIAS=has_bias,
        HOLDS_BIAS=holds_bias,
        DELTA=delta,
        WANT_INNER=want_inner,
        SPLIT=split,
        DESCRIPTORS=descriptors,
        STAGES=config.stages,
        WALK=walk,
    )


def _descriptors(config: TileConfig, base, h, lora_B, y, inner) -> list[TensorDescriptor | None]:
    tile = [config.block_t, config.block_o]
    blocks = tile, [config.block_t, config.block_r], [config.block_o, config.block_r], tile, tile
    matrices = base, h, lora_B, y, inner
    return [t if t is None else TensorDescriptor.from_tensor(t, b) for t, b in zip(matrices, blocks, strict=True)]


def composer(config: TileConfig, launch: Callable[..., Launch]) -> Callable[..., None]:
    """The launch with descriptors, made of the tensors in every call; without them where they cannot be described.

    Its tensors are those of :func:`compose_launch`, activations of any leading shape, contiguous.
    """
    with_descriptors, without = launch(descriptors=True), Bound(launch(descriptors=False))

    def run(base, h, lora_B, magnitude, weight_norm, scaling, bias, y, inner):
        rows = (t if t is None else t.view(-1, t.shape[-1]) for t in (base, h, y, inner))
        base, h, y, inner = rows
        vectors = magnitude, weight_norm, scaling, bias
        if _describable(base, h, lora_B):
            base, h, lora_B, y, inner = _descriptors(config, base, h, lora_B, y, inner)
            with_descriptors(base, h, lora_B, *vectors, y, inner)
        else:
            without(base, h, lora_B, *vectors, y, inner)

    return run


def compose(
    base: Tensor,
    lora: Tensor | None,
    lora_B: Tensor | None,
    magnitude: Tensor,
    weight_norm: Tensor | None,
    scaling: Tensor | float | None,
    bias: Tensor | None,
    *,
    delta: bool = False,
    holds_bias: bool = False,
    want_inner: bool = False,
    over_base: bool = False,
    config: TileConfig | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``inner = base + s * lora`` and ``y = g * inner + b`` (or its delta form), both in the dtype of ``base``.

    Args:
        base: ``[T, O]``, any strides, like all tensors here.
        lora: ``[T, O]``; ``h [T, R]`` if ``lora_B`` is given; None for ``inner = base``.
        lora_B: ``[O, R]``, the dtype of ``h``.
        magnitude: ``[O]``; g itself where ``weight_norm`` is None.
        scaling: a number, or one element on the device.
        holds_bias: base has the bias in it already: ``y = g * (base + s * lora) + (1 - g) * b``, inner without it.
        over_base: write inner where ``base`` is, which has to be contiguous.
        config: how to launch; None chooses it.
    """
    tokens, out_features = base.shape
    y = torch.empty_like(base, memory_format=torch.contiguous_format)
    inner = None
    if want_inner:
        inner = base if over_base else torch.empty_like(base, memory_format=torch.contiguous_format)
    if not base.numel():
        return y, inner
    rank = None if lora_B is None else lora_B.shape[1]
    if config is None:
        config = (
            pointwise_config(tokens)
            if rank is None
            else tile_config(tokens, out_features, rank, lora.dtype, base.dtype, target.of(base))
        )
    magnitude, weight_norm, bias = contiguous(magnitude, weight_norm, bias)
    matrices = [base, lora, lora_B, y, inner]
    # Torch cannot trace the making of descriptors, which traced code would use from 33 to 64 tokens alone.
    descriptors = config.descriptors and not traced(base) and _describable(*matrices)
    launch = compose_launch(
        tokens,
        out_features,
        tuple(None if t is None else t.stride() for t in matrices[:3]),
        rank,
        config,
        has_norm=weight_norm is not None,
        has_bias=bias is not None,
        delta=delta,
        holds_bias=holds_bias,
        want_inner=want_inner,
        split=rank is not None and lora.dtype is torch.float32 and base.dtype is not torch.float32,
        descriptors=descriptors,
    )
    if descriptors:
        matrices = _descriptors(config, *matrices)
    launch(*matrices[:3], magnitude, weight_norm, scaling, bias, *matrices[3:])
    return y, inner
