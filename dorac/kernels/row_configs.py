"""How the kernels over rows of several layers are launched: experts' (``segments.py``), mixed rows' (``mixed.py``)."""

import dataclasses
import functools

import torch

from dorac.kernels.config_records import (
    GateBackwardConfig,
    GateConfig,
    MixedConfig,
    ProductConfig,
    SegmentConfig,
    TileConfig,
    fewer_stages,
    first_fitting,
    power_of_two,
)
from dorac.kernels.target import Target


@functools.lru_cache(maxsize=1024)
def segment_tile_config(
    rows: int,
    segments: int,
    out_features: int,
    rank: int,
    h_dtype: torch.dtype,
    base_dtype: torch.dtype,
    target: Target,
) -> TileConfig:
    """:func:`dorac.kernels.configs.tile_config` for rows sorted by segment: a tile holds rows of one alone."""
    each = max(1, -(-rows // max(1, segments)))  # rows of a segment, if they were as many in all
    block_t = power_of_two(each, 16, 32)
    if base_dtype is torch.float32:
        config = TileConfig(block_t, 64, 16, 4, 2)
    elif rank <= 64 and h_dtype.itemsize == 2 and each > 32:
        tile, warps, walked, programs = ((16, 128), 4, 128, 512) if rank <= 32 else ((64, 128), 8, 512, 256)
        while walked > tile[0] and -(-rows // walked) * -(-out_features // tile[1]) < programs:
            walked //= 2
        config = TileConfig(*tile, power_of_two(rank, 16, 64), warps, 2, rows=walked)
    elif rank <= 64 or each <= 32:
        config = TileConfig(block_t, 128, power_of_two(rank, 16, 64 if h_dtype.itemsize == 2 else 32), 4, 2)
    else:
        config = TileConfig(*((32, 128, 32) if h_dtype is torch.float32 else (64, 128, 64)), 4, 2)  # or it spills
    return first_fitting(fewer_stages(config, 1), target, h_dtype, base_dtype)


@functools.lru_cache(maxsize=1024)
def segment_product_config(
    rows: int, segments: int, in_features: int, rank: int, dtype: torch.dtype, a_dtype: torch.dtype, target: Target
) -> ProductConfig:
    """Long rows times few columns: split where the tiles of rows do not fill the card."""
    each = max(1, -(-rows // max(1, segments)))
    if dtype is torch.float32:  # no tensor cores: small tiles, or the product spills
        config = ProductConfig(power_of_two(each, 16, 32), 32, power_of_two(rank, 16, 32), 1, 4, 3)
    else:
        wide, lean = a_dtype is torch.float32, target.products_from_shared
        block_t = 64 if lean or not (wide or rank > 32) else 32  # or it spills
        block_i = 64 if wide or target.backend == "hip" else 128  # as well
        config = ProductConfig(power_of_two(each, 16, block_t), block_i, power_of_two(rank, 16, 64), 1, 4, 4)
    config = first_fitting(fewer_stages(config, 1), target, dtype, a_dtype)
    tiles = (-(-rows // config.block_t) + min(rows, segments)) * -(-rank // config.block_r)
    steps = -(-in_features // config.block_i)
    splits = max(1, min(2 * target.processors // tiles, steps // 8, 32))
    return dataclasses.replace(config, splits=splits)


@functools.lru_cache(maxsize=1024)
def segment_backward_config(
    rows: int, out_features: int, rank: int, dtype: torch.dtype, h_dtype: torch.dtype, target: Target
) -> SegmentConfig:
    """``configs.lora_b_config`` for rows sorted by segment: enough strips even where one segment has all rows."""
    block_r = power_of_two(rank, 16, 128 if h_dtype.itemsize == 2 else 32)
    wide, processors = h_dtype is torch.float32, target.processors
    block_o = 64 if processors // 2 < -(-out_features // 64) <= processors else 128
    if wide or (block_r > 64 and (target.backend == "hip" or target.generation != 9)):
        block_o = 64  # or it spills, and AMD's cards need more shared memory than there may be
    strips = max(1, min(processors // -(-out_features // block_o), rows // 256))
    walked = -(-rows // (32 * strips)) * 32
    lean = target.products_from_shared
    few = block_r <= 64 if lean else block_r <= 32 and dtype.itemsize == 2
    warps, stages = 4 if few else 8, 4 if lean else 3  # or it spills
    config = SegmentConfig(32, block_o, max(32, walked), warps, stages, block_r)
    return first_fitting(fewer_stages(config, 1), target, dtype, h_dtype)


@functools.lru_cache(maxsize=1024)
def segment_gate_config(
    rows: int, segments: int, features: int, rank: int, h_dtype: torch.dtype, target: Target
) -> GateConfig:
    """``configs.mlp_config`` for rows sorted by segment: small tiles that a program walks down."""
    each, half = max(1, -(-rows // max(1, segments))), h_dtype.itemsize == 2
    if each > 32 and rank <= (64 if half else 32):
        block_f, walked = 128 if half else 64, 256 if rank > 32 else 128
        while walked > 16 and -(-rows // walked) * -(-features // block_f) < 8 * target.processors:
            walked //= 2
        config = GateConfig(16, block_f, power_of_two(rank, 16, 64), 4, 2, rows=walked)
    else:
        block_t, block_r = (power_of_two(each, 16, 32), 64) if half else (16, 32)  # or it spills
        config = GateConfig(block_t, 64, power_of_two(rank, 16, block_r), 4, 2)
    return first_fitting(fewer_stages(config, 1), target, h_dtype)


@functools.lru_cache(maxsize=1024)
def segment_gate_backward_config(
    rows: int, features: int, rank: int, h_dtype: torch.dtype, target: Target
) -> GateBackwardConfig:
    """``configs.mlp_backward_config`` for rows sorted by segment, of any rank."""
    half = h_dtype.itemsize == 2
    block_f = 128 if rank <= 16 and half and target.generation == 9 else 64  # or it spills
    strips = max(1, min(2 * target.processors // -(-features // block_f), rows // 256))
    walked = max(16, -(-rows // (16 * strips)) * 16)
    config = GateBackwardConfig(16, block_f, walked, 4, 3, power_of_two(rank, 16, 64 if half else 32))
    return first_fitting(fewer_stages(config, 1), target, h_dtype)


# Of mixed rows: up to how many tokens each is a tile, whatever they share, and up to how many a program counts.
SINGLE, COUNTED = 16, 256
PARTIAL_BYTES = 2**21  # of the partial sums, where there is more than one split


@functools.lru_cache(maxsize=1024)
def mixed_config(
    batch: int,
    row_tokens: int,
    adapters: int,
    out_features: int,
    in_features: int,
    rank: int,
    factor_dtype: torch.dtype,
    base_dtype: torch.dtype,
    target: Target,
) -> MixedConfig:
    """Few tokens: as many programs as are resident, or bytes come too slowly. Many: as ``configs.tile_config``."""
    tokens = batch * row_tokens
    half = factor_dtype.itemsize == base_dtype.itemsize == 2
    up_r = power_of_two(rank, 16, 64 if half else 32)
    wide_warps = 4 if base_dtype is torch.float32 and rank > 32 else 8  # or it spills
    if tokens <= COUNTED and (tokens <= SINGLE or (rank <= 32 and tokens <= 2 * adapters)):
        few, count, resident = tokens <= SINGLE, tokens, 8
        block_o = 64 if tokens <= 2 else 256 if rank <= 32 and half else 128
        down = 256 if half else 128, 16, 32, 4, 1 if few else 3
        up = block_o, min(up_r, 32), wide_warps if not half else 4 if few else 2
        config = MixedConfig("single", 1, *down, *up, columns=block_o if few else 512, up_stages=1)
    elif tokens <= COUNTED or row_tokens < 16:
        form, resident = ("counted", 6) if tokens <= COUNTED else ("listed", 4)
        count = min(tokens, adapters + 1)
        count += (tokens - count) // 16
        columns = 256
        while columns < min(out_features, 1024) and count * -(-out_features // columns) > 10 * target.processors:
            columns *= 2
        down = 128 if half else 64, up_r, 16, 4, 3
        lean_r = 32 if target.backend == "hip" and rank > 64 else up_r  # or it spills
        up = 128, lean_r, 4 if half and rank <= 64 else wide_warps
        stages = 3 if columns > 256 or rank > 32 else 1
        config = MixedConfig(form, 16, *down, *up, columns=columns, up_stages=stages)
    else:
        block_t = power_of_two(row_tokens, 16, 64)
        up = {"up_t": 16, "up_warps": 4, "rows": 128} if rank <= 32 else {"up_t": 64, "up_warps": 8, "rows": 512}
        if not half:
            up = {"up_t": 16, "up_warps": wide_warps, "rows": 128}
        while up["rows"] > up["up_t"] and batch * -(-row_tokens // up["rows"]) * -(-out_features // 128) < 512:
            up["rows"] //= 2
        config = MixedConfig("long", block_t, 128 if half else 32, up_r, 4, 4, 3, block_o=128, up_r=up_r, **up)
        count, resident = batch * -(-row_tokens // block_t), 4
    candidates = [*fewer_stages(config, 1), dataclasses.replace(config, block_i=config.block_i // 2, stages=1)]
    config = first_fitting(candidates, target, factor_dtype, base_dtype)
    programs = max(1, count * -(-rank // config.block_r))
    splits = min(config.splits, max(1, resident * target.processors // programs), max(1, in_features // config.block_i))
    splits = 1 << splits.bit_length() - 1
    while splits > 1 and splits * tokens * rank * 4 > PARTIAL_BYTES:
        splits //= 2
    return dataclasses.replace(config, splits=splits)
