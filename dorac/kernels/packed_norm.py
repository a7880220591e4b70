"""The row norm ``||W + s * lora_B @ lora_A||`` on CUDA, of a weight that is read packed as it lies in memory.

As ``kernels/norm.py``, whose pieces it takes: ``B @ A`` on the tensor cores, squares in float32 registers. Of W a tile
of bytes is loaded and decoded in registers (``kernels/packed_tiles.py``); nothing of its size exists elsewhere. A byte
with two numbers belongs to two columns: lora_A's even columns are put before its odd ones, and the two halves of a tile
are taken one after the other, since a sum of squares asks for no order.

Legend: E experts, O out_features, C stored columns (bytes of a row), R rank, S column splits.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from dorac import packed
from dorac.kernels import target
from dorac.kernels.configs import NormConfig, packed_norm_config
from dorac.kernels.launch import Launch, cdiv
from dorac.kernels.norm import SHRINK, finish_kernel, in_registers, row_length, split_factors
from dorac.kernels.packed_tiles import decoded, in_lanes, scale_and_zero
from dorac.kernels.tiles import load_tile, number, product


@triton.jit
def _squares(
    codes_ptr,
    table_ptr,
    scales,
    a_ptr,
    b_ptr,
    scaling,
    start_o,
    start_s,
    begin,
    end,
    O,
    OS,
    C,
    R,
    groups,
    stride_so,
    stride_sg,
    stride_ar,
    stride_ai,
    stride_bo,
    stride_br,
    FORMAT: tl.constexpr,
    DTYPE: tl.constexpr,
    NESTED: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    SWIZZLED: tl.constexpr,
    HALVES: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    CHUNKS: tl.constexpr,
    EVEN: tl.constexpr,
    REGISTERS: tl.constexpr,
    STAGES: tl.constexpr,
    FACTOR: tl.constexpr,
):
    """The sums of squares of a program's rows times FACTOR."""
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
    table = in_lanes(table_ptr, FORMAT) if HALVES == 2 else None
    square_O = tl.zeros([BLOCK_O], dtype=tl.float32)
    for start in tl.range(begin, end, BLOCK_C, num_stages=STAGES):
        codes_OC = load_tile(codes_ptr, start_o, start, O, C, C, 1, BLOCK_O, BLOCK_C, EVEN, False)
        scale_OC, zero_OC = scale_and_zero(
            scales,
            start_s,
            start,
            OS,
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
        for half in tl.static_range(HALVES):
            half_ptr = a_ptr + half * tl.cast(C, tl.int64) * stride_ai
            acc_OC = tl.zeros([BLOCK_O, BLOCK_C], dtype=tl.float32)
            if CHUNKS >= 1:
                a_RC = load_tile(half_ptr, 0, start, R, C, stride_ar, stride_ai, BLOCK_R, BLOCK_C, EVEN, False)
                acc_OC = product(b0, a_RC, acc_OC, False)
            if CHUNKS >= 2:
                a_RC = load_tile(half_ptr, BLOCK_R, start, R, C, stride_ar, stride_ai, BLOCK_R, BLOCK_C, EVEN, False)
                acc_OC = product(b1, a_RC, acc_OC, False)
            if CHUNKS >= 3:
                a_RC = load_tile(
                    half_ptr, 2 * BLOCK_R, start, R, C, stride_ar, stride_ai, BLOCK_R, BLOCK_C, EVEN, False
                )
                acc_OC = product(b2, a_RC, acc_OC, False)
            if CHUNKS == 0:
                for rank in tl.range(0, R, BLOCK_R):
                    b_OR = load_tile(b_ptr, start_o, rank, O, R, stride_bo, stride_br, BLOCK_O, BLOCK_R, EVEN, False)
                    a_RC = load_tile(half_ptr, rank, start, R, C, stride_ar, stride_ai, BLOCK_R, BLOCK_C, EVEN, False)
                    acc_OC = product(b_OR, a_RC, acc_OC, False)
            v_OC = (
                decoded(codes_OC, scale_OC, zero_OC, table, FORMAT, half, DTYPE, scales[1] is not None)
                + scaling * acc_OC
            )
            if scales[1] is not None and not EVEN:  # beyond the edge stands 0 less a zero
                v_OC = tl.where((start + tl.arange(0, BLOCK_C))[None, :] < C, v_OC, 0.0)
            if FACTOR != 1.0:
                v_OC *= FACTOR
            square_O += tl.sum(v_OC * v_OC, axis=1)
    return square_O


@triton.jit
def packed_norm_kernel(
    codes_ptr,
    table_ptr,
    scale_ptr,
    zero_ptr,
    scale_table_ptr,
    scale_scale_ptr,
    scale_offset_ptr,
    a_ptr,
    b_ptr,
    scaling_ptr,  # or a number
    out_ptr,
    O,
    C,
    R,
    groups,  # blocks of a row, each with a scale
    stride_se,
    stride_so,
    stride_sg,
    stride_ss,  # from one expert's scale of scales to the next
    stride_ae,
    stride_ar,
    stride_ai,
    stride_be,
    stride_bo,
    stride_br,
    columns_per_split,
    FORMAT: tl.constexpr,  # see packed_tiles
    DTYPE: tl.constexpr,  # what each value of the weight is rounded to
    NESTED: tl.constexpr,  # scales that share one of their own; 0: they are not quantised
    ROWS: tl.constexpr,  # of a scale
    GROUP: tl.constexpr,  # stored columns of a scale
    SWIZZLED: tl.constexpr,  # scales in blocks of 128 x 4, of all experts' rows together
    HALVES: tl.constexpr,  # numbers in a byte
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    CHUNKS: tl.constexpr,  # of lora_B kept resident; 0: more than 3 are loaded anew for every tile
    EVEN: tl.constexpr,  # no tile reaches over an edge
    REGISTERS: tl.constexpr,  # the resident chunks wait in registers, not in shared memory
    STAGES: tl.constexpr,
):
    """The norms over each range of columns, ``out[S, E, O]``."""
    expert = tl.program_id(2).to(tl.int64)
    split = tl.program_id(1)
    start_o = tl.program_id(0) * BLOCK_O
    scaling = number(scaling_ptr)
    codes_ptr += expert * O * C
    scale_ptr += expert * stride_se
    if zero_ptr is not None:
        zero_ptr += expert * stride_se
    if scale_scale_ptr is not None:
        scale_scale_ptr += expert * stride_ss
    scales = (scale_ptr, zero_ptr, scale_table_ptr, scale_scale_ptr, scale_offset_ptr)
    a_ptr += expert * stride_ae
    b_ptr += expert * stride_be
    before = expert * O if SWIZZLED else 0  # rows in front of the expert's first, as its scales count them
    begin = split * columns_per_split
    end = tl.minimum(begin + columns_per_split, C)
    square_O = _squares(
        codes_ptr,
        table_ptr,
        scales,
        a_ptr,
        b_ptr,
        scaling,
        start_o,
        start_o + before,
        begin,
        end,
        O,
        O + before,
        C,
        R,
        groups,
        stride_so,
        stride_sg,
        stride_ar,
        stride_ai,
        stride_bo,
        stride_br,
        FORMAT,
        DTYPE,
        NESTED,
        ROWS,
        GROUP,
        SWIZZLED,
        HALVES,
        BLOCK_O,
        BLOCK_C,
        BLOCK_R,
        CHUNKS,
        EVEN,
        REGISTERS,
        STAGES,
        1.0,
    )
    shrunk_O = square_O
    if tl.max((square_O == float("inf")).to(tl.int32), axis=0) > 0:  # rare: the squares are too large
        shrunk_O = _squares(
            codes_ptr,
            table_ptr,
            scales,
            a_ptr,
            b_ptr,
            scaling,
            start_o,
            start_o + before,
            begin,
            end,
            O,
            O + before,
            C,
            R,
            groups,
            stride_so,
            stride_sg,
            stride_ar,
            stride_ai,
            stride_bo,
            stride_br,
            FORMAT,
            DTYPE,
            NESTED,
            ROWS,
            GROUP,
            SWIZZLED,
            HALVES,
            BLOCK_O,
            16,  # small tiles, so that the kernel needs no more registers for this
            16,
            0,
            EVEN,
            False,
            1,
            SHRINK,
        )
    rows_O = start_o + tl.arange(0, BLOCK_O)
    target = (split.to(tl.int64) * tl.num_programs(2) + expert) * O + rows_O
    tl.store(out_ptr + target, row_length(square_O, shrunk_O), mask=rows_O < O)


def arranged(lora_A: Tensor) -> Tensor:
    """lora_A's even columns before its odd ones, for bytes of two numbers."""
    return lora_A.unflatten(-1, (lora_A.shape[-1] // 2, 2)).mT.contiguous().flatten(-2)


def packed_row_norm(
    weight: packed.Packed, lora_A: Tensor, lora_B: Tensor, scaling: Tensor | float, config: NormConfig | None = None
) -> Tensor:
    """``||W + s * lora_B @ lora_A||`` per row.

    Args:
        weight: a packed weight whose ``form()`` is not None.
        lora_A: ``[(E,) r, in]``. lora_B: ``[(E,) out, r]``. float32 ones are split (``kernels/norm.py``).
        scaling: a number, or one element on the device.
        config: how to launch; None takes :func:`packed_norm_config`'s.

    Returns:
        ``[(E,) out]``, float32.
    """
    *batch, out_features, in_features = weight.shape
    norm = lora_B.new_empty(*batch, out_features, dtype=torch.float32)
    if not norm.numel():
        return norm
    if not in_features:
        return norm.zero_()
    form, pieces = weight.form()
    if lora_A.dtype is torch.float32:
        lora_A, lora_B = split_factors(lora_A, lora_B, form.halves)
    elif form.halves == 2:
        lora_A = arranged(lora_A)
    rank, experts = lora_A.shape[-2], batch[0] if batch else 1
    if config is None:
        config = packed_norm_config(experts, out_features, in_features, form.halves, rank, target.of(lora_B))
    strides = tuple(s for t in (lora_A, lora_B) for s in (t.stride(0) if batch else 0, t.stride(-2), t.stride(-1)))
    columns = in_features // form.halves
    splits, launch, finish = packed_norm_launches(experts, out_features, columns, rank, strides, form, config)
    out = norm if splits == 1 else norm.new_empty(splits, experts, out_features)
    launch(*pieces, lora_A, lora_B, scaling, out)
    if splits > 1:
        finish(out, norm)
    return norm


@functools.lru_cache(maxsize=4096)
def packed_norm_launches(
    experts: int,
    out_features: int,
    columns: int,
    rank: int,
    strides: tuple[int, ...],
    form: packed.Form,
    config: NormConfig,
) -> tuple[int, Launch, Launch | None]:
    """Over how many programs the columns are split, the launch, and the one that puts them together."""
    chunks = cdiv(rank, config.block_r)
    tiles = cdiv(columns, config.block_i)
    tiles_per_split = cdiv(tiles, config.splits)
    splits = cdiv(tiles, tiles_per_split)
    groups = cdiv(columns, form.group)
    launch = Launch(
        packed_norm_kernel,
        (cdiv(out_features, config.block_o), splits, experts),
        (out_features, columns, rank, groups, *form.strides, *strides, tiles_per_split * config.block_i),
        config.warps,
        FORMAT=form.name,
        DTYPE=form.dtype,
        NESTED=form.nested,
        ROWS=form.rows,
        GROUP=form.group,
        SWIZZLED=form.swizzled,
        HALVES=form.halves,
        BLOCK_O=config.block_o,
        BLOCK_C=config.block_i,
        BLOCK_R=config.block_r,
        CHUNKS=chunks if chunks <= 3 else 0,
        EVEN=not (out_features % config.block_o or columns % config.block_i or rank % config.block_r),
        REGISTERS=config.registers,
        STAGES=config.stages,
    )
    if splits == 1:
        return splits, launch, None
    size = experts * out_features
    return splits, launch, Launch(finish_kernel, (cdiv(size, 256), 1, 1), (size, splits), 4, BLOCK=256)
