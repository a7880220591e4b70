"""The row norm ``||W + s * lora_B @ lora_A||`` on CUDA, formed tile by tile in registers and squared there.

A program owns ``BLOCK_O`` rows and a range of columns. Its rows of lora_B stay with it, tiles of lora_A stream through
L2, ``B @ A`` runs on the tensor cores, and ``W + s * BA`` is squared and summed in float32 registers: nothing of size
out x in or out x r exists in memory, and nothing cancels. With several column ranges per row block the norms over each
are written out and put together in a fixed order by a second kernel, so that two runs give the same bits.

A program whose squares overflow goes over its rows once more, times 2^-64, before it ends: no other program waits.

The same launch takes the norms of many layers, each with tensors of its own.

Legend: E experts or layers, O out_features, I in_features, R rank, S column splits.
"""

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from dorac.kernels import target
from dorac.kernels.configs import NormConfig, norm_config
from dorac.kernels.launch import Launch, cdiv
from dorac.kernels.tiles import load_tile, number, product, to_bfloat16

SHRINK = tl.constexpr(2.0**-64)  # exact; as in dorac/ops/norm.py


@triton.jit
def in_registers(tile, N: tl.constexpr):
    """The tile as what a product leaves in registers, from where the next product takes its left operand.

    What comes from memory Triton keeps in shared memory instead, whose bandwidth is the limit at large ranks.
    """
    identity = (tl.arange(0, N)[:, None] == tl.arange(0, N)[None, :]).to(tl.float32).to(tile.dtype)
    return product(tile, identity, tl.zeros(tile.shape, dtype=tl.float32), False).to(tile.dtype)


@triton.jit
def shrunk_squares(
    w_ptr,
    a_ptr,
    b_ptr,
    scaling,
    start_o,
    begin,
    end,
    O,
    I,
    R,
    stride_wo,
    stride_wi,
    stride_ar,
    stride_ai,
    stride_bo,
    stride_br,
    BLOCK_O: tl.constexpr,
    BLOCK: tl.constexpr,  # of columns and of ranks: small, so that the kernel needs no more registers for this
    EVEN: tl.constexpr,
):
    """The sums of squares of a program's rows times 2^-64."""
    square_O = tl.zeros([BLOCK_O], dtype=tl.float32)
    for start in tl.range(begin, end, BLOCK, num_stages=1):
        acc_OI = tl.zeros([BLOCK_O, BLOCK], dtype=tl.float32)
        for rank in tl.range(0, R, BLOCK, num_stages=1):
            b_OR = load_tile(b_ptr, start_o, rank, O, R, stride_bo, stride_br, BLOCK_O, BLOCK, EVEN, False)
            a_RI = load_tile(a_ptr, rank, start, R, I, stride_ar, stride_ai, BLOCK, BLOCK, EVEN, False)
            acc_OI = product(b_OR, a_RI, acc_OI, False)
        w_OI = load_tile(w_ptr, start_o, start, O, I, stride_wo, stride_wi, BLOCK_O, BLOCK, EVEN, False)
        v_OI = (w_OI.to(tl.float32) + scaling * acc_OI) * SHRINK
        square_O += tl.sum(v_OI * v_OI, axis=1)
    return square_O


@triton.jit
def row_length(square, shrunk_square):
    """The norm of a sum of squares, of the shrunk ones where that is not finite; inf for what never is."""
    length = tl.where(square < float("inf"), tl.sqrt_rn(square), tl.sqrt_rn(shrunk_square) / SHRINK)
    return tl.where(length == length, length, float("inf"))


@triton.jit
def row_norm_kernel(
    w_ptr,
    a_ptr,
    b_ptr,
    scaling_ptr,  # or a number, without offsets
    offsets_ptr,  # None, or int64 [E, 3]: where each layer's tensors begin, in elements from the first's, 16 by 16
    out_ptr,
    O,
    I,
    R,
    stride_we,
    stride_wo,
    stride_wi,
    stride_ae,
    stride_ar,
    stride_ai,
    stride_be,
    stride_bo,
    stride_br,
    columns_per_split,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_R: tl.constexpr,
    CHUNKS: tl.constexpr,  # of lora_B kept resident; 0: more than 3 are loaded anew for every tile
    EVEN: tl.constexpr,  # no tile reaches over an edge
    EACH: tl.constexpr,  # a scaling for every expert
    REGISTERS: tl.constexpr,  # the resident chunks wait in registers, not in shared memory
    STAGES: tl.constexpr,
):
    """The norms over each range of columns, ``out[S, E, O]``."""
    expert = tl.program_id(2).to(tl.int64)
    split = tl.program_id(1)
    start_o = tl.program_id(0) * BLOCK_O
    if offsets_ptr is None:
        if EACH:
            scaling = tl.load(scaling_ptr + expert).to(tl.float32)
        else:
            scaling = number(scaling_ptr)
        w_ptr += expert * stride_we
        a_ptr += expert * stride_ae
        b_ptr += expert * stride_be
    else:
        scaling = tl.load(scaling_ptr + expert).to(tl.float32)
        w_ptr += tl.multiple_of(tl.load(offsets_ptr + 3 * expert), 16)
        a_ptr += tl.multiple_of(tl.load(offsets_ptr + 3 * expert + 1), 16)
        b_ptr += tl.multiple_of(tl.load(offsets_ptr + 3 * expert + 2), 16)

    if CHUNKS >= 1:
        b0 = load_tile(b_ptr, start_o, 0, O, R, stride_bo, stride_br, BLOCK_O, BLOCK_R, EVEN, False)
    if CHUNKS >= 2:
        b1 = load_tile(b_ptr, start_o, BLOCK_R, O, R, stride_bo, stride_br, BLOCK_O, BLOCK_R, EVEN, False)
    if CHUNKS >= 3:
        b2 = load_tile(b_ptr, start_o, 2 * BLOCK_R, O, R, stride_bo, stride_br, BLOCK_O, BLOCK_R, EVEN, False)
    if REGISTERS:
        if CHUNKS >= 1:
            b0 = in_registers(b0, BLOCK_R)
        if CHUNKS >= 2:
            b1 = in_registers(b1, BLOCK_R)
        if CHUNKS >= 3:
            b2 = in_registers(b2, BLOCK_R)

    square_O = tl.zeros([BLOCK_O], dtype=tl.float32)
    begin = split * columns_per_split
    end = tl.minimum(begin + columns_per_split, I)
    for start in tl.range(begin, end, BLOCK_I, num_stages=STAGES):
        w_OI = load_tile(w_ptr, start_o, start, O, I, stride_wo, stride_wi, BLOCK_O, BLOCK_I, EVEN, False)
        acc_OI = tl.zeros([BLOCK_O, BLOCK_I], dtype=tl.float32)
        if CHUNKS >= 1:
            a_RI = load_tile(a_ptr, 0, start, R, I, stride_ar, stride_ai, BLOCK_R, BLOCK_I, EVEN, False)
            acc_OI = product(b0, a_RI, acc_OI, False)
        if CHUNKS >= 2:
            a_RI = load_tile(a_ptr, BLOCK_R, start, R, I, stride_ar, stride_ai, BLOCK_R, BLOCK_I, EVEN, False)
            acc_OI = product(b1, a_RI, acc_OI, False)
        if CHUNKS >= 3:
            a_RI = load_tile(a_ptr, 2 * BLOCK_R, start, R, I, stride_ar, stride_ai, BLOCK_R, BLOCK_I, EVEN, False)
            acc_OI = product(b2, a_RI, acc_OI, False)
        if CHUNKS == 0:
            for rank in tl.range(0, R, BLOCK_R):
                b_OR = load_tile(b_ptr, start_o, rank, O, R, stride_bo, stride_br, BLOCK_O, BLOCK_R, EVEN, False)
                a_RI = load_tile(a_ptr, rank, start, R, I, stride_ar, stride_ai, BLOCK_R, BLOCK_I, EVEN, False)
                acc_OI = product(b_OR, a_RI, acc_OI, False)
        v_OI = w_OI.to(tl.float32) + scaling * acc_OI
        square_O += tl.sum(v_OI * v_OI, axis=1)

    shrunk_O = square_O
    if tl.max((square_O == float("inf")).to(tl.int32), axis=0) > 0:  # rare: the squares are too large
        shrunk_O = shrunk_squares(
            w_ptr,
            a_ptr,
            b_ptr,
            scaling,
            start_o,
            begin,
            end,
            O,
            I,
            R,
            stride_wo,
            stride_wi,
            stride_ar,
            stride_ai,
            stride_bo,
            stride_br,
            BLOCK_O,
            16,
            EVEN,
        )
    rows_O = start_o + tl.arange(0, BLOCK_O)
    target = (split.to(tl.int64) * tl.num_programs(2) + expert) * O + rows_O
    tl.store(out_ptr + target, row_length(square_O, shrunk_O), mask=rows_O < O)


@triton.jit
def finish_kernel(partial_ptr, out_ptr, size, splits, BLOCK: tl.constexpr):
    """``out = sqrt(sum over S of partial[S, size]^2)``."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = index < size
    square = tl.zeros([BLOCK], dtype=tl.float32)
    shrunk_square = tl.zeros([BLOCK], dtype=tl.float32)
    pointers = partial_ptr + index
    for _ in range(splits):
        length = tl.load(pointers, mask=mask, other=0.0)
        square += length * length
        shrunk_square += (length * SHRINK) * (length * SHRINK)
        pointers += size
    tl.store(out_ptr + index, row_length(square, shrunk_square), mask=mask)


@triton.jit
def split_kernel(
    a_ptr,
    b_ptr,
    a3_ptr,
    b3_ptr,
    R,
    I,
    O,
    stride_ae,
    stride_ar,
    stride_ai,
    stride_be,
    stride_bo,
    stride_br,
    HALVES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """``[high; high; low]`` of lora_A's rows and ``[high, low, high]`` of lora_B's columns, contiguous.

    With two HALVES lora_A's even columns are put before its odd ones.
    """
    expert = tl.program_id(1).to(tl.int64)
    block = tl.program_id(0).to(tl.int64)
    blocks_a = tl.cdiv(R * I, BLOCK)
    if block < blocks_a:
        index = block * BLOCK + tl.arange(0, BLOCK)
        mask = index < R * I
        rows, columns = index // I, index % I
        value = tl.load(a_ptr + expert * stride_ae + rows * stride_ar + columns * stride_ai, mask=mask)
        high = to_bfloat16(value)
        target = a3_ptr + expert * 3 * R * I + rows * I + columns % HALVES * (I // HALVES) + columns // HALVES
        tl.store(target, high, mask=mask)
        tl.store(target + R * I, high, mask=mask)
        tl.store(target + 2 * R * I, to_bfloat16(value - high.to(tl.float32)), mask=mask)
    else:
        index = (block - blocks_a) * BLOCK + tl.arange(0, BLOCK)
        mask = index < O * R
        rows, columns = index // R, index % R
        value = tl.load(b_ptr + expert * stride_be + rows * stride_bo + columns * stride_br, mask=mask)
        high = to_bfloat16(value)
        target = b3_ptr + expert * 3 * O * R + rows * 3 * R + columns
        tl.store(target, high, mask=mask)
        tl.store(target + R, to_bfloat16(value - high.to(tl.float32)), mask=mask)
        tl.store(target + 2 * R, high, mask=mask)


def needs_split(weight_dtype: torch.dtype, factor_dtype: torch.dtype) -> bool:
    """Whether the norm is that of :func:`split_factors`: the tensor cores take no float32."""
    return factor_dtype is torch.float32 and weight_dtype is not torch.float32


def split_factors(lora_A: Tensor, lora_B: Tensor, halves: int = 1) -> tuple[Tensor, Tensor]:
    """bfloat16 factors of three times the rank, whose product is that of float32 factors to 16 bits of each.

    ``B A = [B_high, B_low, B_high] [A_high; A_high; A_low]``: of a number, high is its rounding and low that of the
    rest; low times low is below the last bit that is kept. The first r rows and columns are the rounded factors. With
    two ``halves`` A's even columns come before its odd ones.
    """
    batch, rank, in_features = lora_A.shape[:-2], lora_A.shape[-2], lora_A.shape[-1]
    out_features, half = lora_B.shape[-2], {"dtype": torch.bfloat16}
    a3, b3 = (
        lora_A.new_empty(*batch, 3 * rank, in_features, **half),
        lora_B.new_empty(*batch, out_features, 3 * rank, **half),
    )
    strides = tuple(s for t in (lora_A, lora_B) for s in (t.stride(0) if batch else 0, t.stride(-2), t.stride(-1)))
    split_launch(batch.numel(), rank, in_features, out_features, strides, halves)(lora_A, lora_B, a3, b3)
    return a3, b3


@functools.lru_cache(maxsize=4096)
def split_launch(
    experts: int, rank: int, in_features: int, out_features: int, strides: tuple[int, ...], halves: int
) -> Launch:
    blocks = cdiv(rank * in_features, 1024) + cdiv(out_features * rank, 1024)
    sizes = rank, in_features, out_features, *strides
    return Launch(split_kernel, (blocks, experts, 1), sizes, 4, HALVES=halves, BLOCK=1024)


def row_norm(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: Tensor | float, config: NormConfig | None = None
) -> Tensor:
    """``||W + s * lora_B @ lora_A||`` per row.

    Args:
        weight: ``[out, in]`` or ``[E, out, in]``, any strides. lora_A: ``[(E,) r, in]``. lora_B: ``[(E,) out, r]``.
        scaling: a number, one element on the device, or ``[E]``.
        config: how to launch; None takes :func:`norm_config`'s.

    Returns:
        ``[(E,) out]``, float32.
    """
    batch = weight.shape[:-2]
    if needs_split(weight.dtype, lora_A.dtype):
        lora_A, lora_B = split_factors(lora_A, lora_B)
    strides = tuple((t.stride(0) if batch else 0, t.stride(-2), t.stride(-1)) for t in (weight, lora_A, lora_B))
    norm = weight.new_empty(weight.shape[:-1], dtype=torch.float32)
    return _row_norm(weight, lora_A, lora_B, scaling, None, strides, batch.numel(), norm, config)


def row_norms(layers: Sequence[tuple[Tensor, Tensor, Tensor]], scalings: Sequence[float]) -> Tensor:
    """:func:`row_norm` of every layer in one launch, with the same bits.

    Args:
        layers: ``weight [out, in]``, ``lora_A [r, in]`` and ``lora_B [out, r]`` of each, all with the shapes, dtypes,
            strides and device of the first's, and at distances of multiples of 64 bytes from them. No factors that are
            split first (:func:`needs_split`).
        scalings: of each.

    Returns:
        ``[layers, out]``, float32.
    """
    weight, lora_A, lora_B = first = layers[0]
    offsets = [
        [
            (tensor.data_ptr() - start.data_ptr()) // start.element_size()
            for tensor, start in zip(layer, first, strict=True)
        ]
        for layer in layers
    ]
    # Made on the CPU, whatever the default device, and copied in the stream's order: the CPU need not wait for the GPU.
    offsets = torch.tensor(offsets, dtype=torch.int64, device="cpu").to(weight.device, non_blocking=True)
    scaling = torch.tensor(scalings, dtype=torch.float32, device="cpu").to(weight.device, non_blocking=True)
    strides = tuple((0, *t.stride()) for t in first)
    norm = weight.new_empty(len(layers), weight.shape[0], dtype=torch.float32)
    card = target.of(weight)
    config = norm_config(1, *weight.shape, lora_A.shape[0], weight.dtype, card)  # one layer's: its bits
    return _row_norm(weight, lora_A, lora_B, scaling, offsets, strides, len(layers), norm, config)


def _row_norm(weight, lora_A, lora_B, scaling, offsets, strides, experts, norm, config):
    """Writes and returns ``norm``. ``experts``: how many norms are taken, by strides or by ``offsets``."""
    out_features, in_features = weight.shape[-2:]
    if not norm.numel():
        return norm
    if not in_features:
        return norm.zero_()
    rank = lora_A.shape[-2]
    if config is None:
        config = norm_config(experts, out_features, in_features, rank, weight.dtype, target.of(weight))
    each = offsets is None and isinstance(scaling, Tensor) and scaling.ndim == 1
    scaling = scaling.contiguous() if each else scaling
    splits, launch, finish = norm_launches(experts, out_features, in_features, rank, strides, config, each)
    out = norm if splits == 1 else norm.new_empty(splits, experts, out_features)
    launch(weight, lora_A, lora_B, scaling, offsets, out)
    if splits > 1:
        finish(out, norm)
    return norm


@functools.lru_cache(maxsize=4096)
def norm_launches(
    experts: int,
    out_features: int,
    in_features: int,
    rank: int,
    strides: tuple[tuple[int, int, int], ...],
    config: NormConfig,
    each: bool = False,
) -> tuple[int, Launch, Launch | None]:
    """Over how many programs the columns are split, the launch, and the one that puts them together."""
    chunks = cdiv(rank, config.block_r)
    tiles = cdiv(in_features, config.block_i)
    tiles_per_split = cdiv(tiles, config.splits)
    splits = cdiv(tiles, tiles_per_split)
    launch = Launch(
        row_norm_kernel,
        (cdiv(out_features, config.block_o), splits, experts),
        (out_features, in_features, rank, *strides[0], *strides[1], *strides[2], tiles_per_split * config.block_i),
        config.warps,
        BLOCK_O=config.block_o,
        BLOCK_I=config.block_i,
        BLOCK_R=config.block_r,
        CHUNKS=chunks if chunks <= 3 else 0,
        EVEN=not (out_features % config.block_o or in_features % config.block_i or rank % config.block_r),
        EACH=each,
        REGISTERS=config.registers,
        STAGES=config.stages,
    )
    if splits == 1:
        return splits, launch, None
    size = experts * out_features
    return splits, launch, Launch(finish_kernel, (cdiv(size, 256), 1, 1), (size, splits), 4, BLOCK=256)
