"""The row norms of many adapters over one weight on CUDA, which is read once for several of them.

As in ``norm.py``, of which this is the form for small ranks: a program owns ``BLOCK_O`` rows and a range of columns,
and takes the norms of ``TOGETHER`` adapters. A tile of W stays in registers while each adapter's tile of ``B @ A`` is
added to it and squared. Programs of the same tile run side by side, so that it is read from memory once.

Legend: K adapters, O out_features, I in_features, R rank, S column splits.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from dorac.kernels import target
from dorac.kernels.configs import StackNormConfig, stack_norm_config
from dorac.kernels.launch import Launch, cdiv
from dorac.kernels.norm import finish_kernel, needs_split, row_length, shrunk_squares, split_factors
from dorac.kernels.tiles import load_tile, number, product


@triton.jit
def stack_norm_kernel(
    w_ptr,
    a_ptr,
    b_ptr,
    scaling_ptr,  # or a number
    out_ptr,
    O,
    I,
    R,
    K,
    stride_wo,
    stride_wi,
    stride_ak,
    stride_ar,
    stride_ai,
    stride_bk,
    stride_bo,
    stride_br,
    columns_per_split,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_R: tl.constexpr,  # all ranks
    TOGETHER: tl.constexpr,
    EVEN: tl.constexpr,  # no tile reaches over an edge
    EACH: tl.constexpr,  # a scaling for every adapter
    STAGES: tl.constexpr,
):
    """The norms over each range of columns, ``out[S, K, O]``."""
    first, start_o, split = tl.program_id(0) * TOGETHER, tl.program_id(1) * BLOCK_O, tl.program_id(2)
    place_K = tl.arange(0, TOGETHER)
    square_KO = tl.zeros([TOGETHER, BLOCK_O], dtype=tl.float32)
    begin = split * columns_per_split
    end = tl.minimum(begin + columns_per_split, I)
    for start in tl.range(begin, end, BLOCK_I, num_stages=STAGES):
        w_OI = load_tile(w_ptr, start_o, start, O, I, stride_wo, stride_wi, BLOCK_O, BLOCK_I, EVEN, False)
        w_OI = w_OI.to(tl.float32)
        for place in tl.static_range(TOGETHER):
            k = tl.minimum(first + place, K - 1).to(tl.int64)  # the last once more where there is none
            a_RI = load_tile(a_ptr + k * stride_ak, 0, start, R, I, stride_ar, stride_ai, BLOCK_R, BLOCK_I, EVEN, False)
            b_OR = load_tile(
                b_ptr + k * stride_bk, start_o, 0, O, R, stride_bo, stride_br, BLOCK_O, BLOCK_R, EVEN, False
            )
            acc_OI = product(b_OR, a_RI, tl.zeros([BLOCK_O, BLOCK_I], dtype=tl.float32), False)
            v_OI = w_OI + _scaling(scaling_ptr, k, EACH) * acc_OI
            square_KO += tl.where((place_K == place)[:, None], tl.sum(v_OI * v_OI, axis=1)[None, :], 0.0)

    shrunk_KO = square_KO
    if tl.max(tl.max((square_KO == float("inf")).to(tl.int32), axis=1), axis=0) > 0:  # rare
        for place in range(TOGETHER):
            k = tl.minimum(first + place, K - 1).to(tl.int64)
            shrunk_O = shrunk_squares(
                w_ptr,
                a_ptr + k * stride_ak,
                b_ptr + k * stride_bk,
                _scaling(scaling_ptr, k, EACH),
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
            shrunk_KO = tl.where((place_K == place)[:, None], shrunk_O[None, :], shrunk_KO)
    rows_O, adapter_K = start_o + tl.arange(0, BLOCK_O), first + place_K
    to_KO = (split.to(tl.int64) * K + adapter_K)[:, None] * O + rows_O[None, :]
    tl.store(out_ptr + to_KO, row_length(square_KO, shrunk_KO), mask=(adapter_K < K)[:, None] & (rows_O < O)[None, :])


@triton.jit
def _scaling(scaling_ptr, k, EACH: tl.constexpr):
    if EACH:
        return tl.load(scaling_ptr + k).to(tl.float32)
    else:
        return number(scaling_ptr)


def takes(weight: Tensor, lora_A: Tensor) -> bool:
    """Whether norms are computed here: of several adapters of small rank over one weight, which is expanded."""
    expanded = weight.ndim == 3 and weight.shape[0] > 1 and weight.stride(0) == 0 and weight.numel() > 0
    return expanded and lora_A.shape[1] * (3 if needs_split(weight.dtype, lora_A.dtype) else 1) <= 64


def stack_norm(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: Tensor | float, config: StackNormConfig | None = None
) -> Tensor:
    """``||W + s_k * lora_B_k @ lora_A_k||`` per row, ``[K, O]`` in float32.

    Args:
        weight: ``[O, I]``, any strides. lora_A: ``[K, R, I]``. lora_B: ``[K, O, R]``; of a rank up to 64, a third of
            that for float32 factors of another weight.
        scaling: a number, one element on the device, or ``[K]``.
        config: how to launch; None chooses it.
    """
    if needs_split(weight.dtype, lora_A.dtype):
        lora_A, lora_B = split_factors(lora_A, lora_B)
    (out_features, in_features), (adapters, rank, _) = weight.shape, lora_A.shape
    norm = weight.new_empty(adapters, out_features, dtype=torch.float32)
    each = isinstance(scaling, Tensor) and scaling.ndim == 1
    scaling = scaling.contiguous() if each else scaling
    if config is None:
        config = stack_norm_config(adapters, out_features, in_features, rank, weight.dtype, target.of(weight))
    splits, launch, finish = stack_norm_launches(
        adapters,
        out_features,
        in_features,
        rank,
        (weight.stride(), lora_A.stride(), lora_B.stride()),
        config,
        each=each,
    )
    out = norm if splits == 1 else norm.new_empty(splits, adapters, out_features)
    launch(weight, lora_A, lora_B, scaling, out)
    if finish is not None:
        finish(out, norm)
    return norm


@functools.lru_cache(maxsize=4096)
def stack_norm_launches(
    adapters: int,
    out_features: int,
    in_features: int,
    rank: int,
    strides: tuple[tuple[int, ...], ...],
    config: StackNormConfig,
    *,
    each: bool,
) -> tuple[int, Launch, Launch | None]:
    """Over how many programs the columns are split, the launch, and the one that puts them together."""
    tiles_per_split = cdiv(cdiv(in_features, config.block_i), config.splits)
    splits = cdiv(cdiv(in_features, config.block_i), tiles_per_split)
    launch = Launch(
        stack_norm_kernel,
        (cdiv(adapters, config.together), cdiv(out_features, config.block_o), splits),
        (
            out_features,
            in_features,
            rank,
            adapters,
            *(s for of_one in strides for s in of_one),
            tiles_per_split * config.block_i,
        ),
        config.warps,
        BLOCK_O=config.block_o,
        BLOCK_I=config.block_i,
        BLOCK_R=config.block_r,
        TOGETHER=config.together,
        EVEN=not (out_features % config.block_o or in_features % config.block_i or rank % config.block_r),
        EACH=each,
        STAGES=config.stages,
    )
    if splits == 1:
        return splits, launch, None
    size = adapters * out_features
    return splits, launch, Launch(finish_kernel, (cdiv(size, 256), 1, 1), (size, splits), 4, BLOCK=256)
