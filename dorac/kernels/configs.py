"""How each kernel is launched: frozen records and the pure functions that choose them for a card.

The tiles are the fastest of sweeps on an H100 over bfloat16 tensors and factors of rank 16, 64 and 384; those of other
dtypes and the thresholds between these ranks follow from registers and shared memory. ``python -m dorac.bench tune``
prints the candidates beside the chosen ones. Other cards take the H100's as far as their shared memory
(:func:`fits`) and registers hold it, and else the next in line; nothing was timed on them.
"""

import dataclasses
import functools
import itertools

import torch

from dorac.kernels.config_records import (
    ColumnConfig,
    Config,
    DoesNotFitError,
    GateBackwardConfig,
    GateConfig,
    LoraBConfig,
    MixedConfig,
    MlpBackwardConfig,
    MlpConfig,
    NormConfig,
    ProductConfig,
    SegmentConfig,
    StackNormConfig,
    TileConfig,
    fewer_stages,
    first_fitting,
    fits,
    launchable,
    power_of_two,
)
from dorac.kernels.row_configs import (
    mixed_config,
    segment_backward_config,
    segment_gate_backward_config,
    segment_gate_config,
    segment_product_config,
    segment_tile_config,
)
from dorac.kernels.target import CARDS, Target

__all__ = [
    "DTYPES",
    "MLP_RANK",
    "RANKS",
    "ColumnConfig",
    "Config",
    "DoesNotFitError",
    "GateBackwardConfig",
    "GateConfig",
    "LoraBConfig",
    "MixedConfig",
    "MlpBackwardConfig",
    "MlpConfig",
    "NormConfig",
    "ProductConfig",
    "SegmentConfig",
    "StackNormConfig",
    "TileConfig",
    "column_config",
    "fits",
    "lora_b_config",
    "mixed_config",
    "mlp_backward_config",
    "mlp_config",
    "norm_config",
    "packed_norm_config",
    "pointwise_config",
    "segment_backward_config",
    "segment_gate_backward_config",
    "segment_gate_config",
    "segment_product_config",
    "segment_tile_config",
    "stack_norm_config",
    "tile_config",
    "why_no_packed",
    "why_not",
]


@functools.lru_cache(maxsize=1024)
def norm_config(
    experts: int, out_features: int, in_features: int, rank: int, weight_dtype: torch.dtype, target: Target
) -> NormConfig:
    """Wide tiles where the weight's bytes are the limit, factors in registers where the product is."""
    block_r = power_of_two(rank, 16, 128)
    if weight_dtype is torch.float32:  # no tensor cores: small tiles, or the product spills
        candidates = [NormConfig(32, 32, min(block_r, 32), 1, 4, 2)]
    elif rank <= 64:
        candidates = fewer_stages(NormConfig(64, 128, block_r, 1, 8 if rank <= 16 else 4, 3))
    elif rank <= (384 if target.products_from_shared else 256):  # or it spills
        candidates = fewer_stages(NormConfig(128, 64, block_r, 1, 8, 3, registers=True))
    else:
        candidates = []
    if weight_dtype is not torch.float32:
        candidates.append(NormConfig(64, 64, min(block_r, 64), 1, 4, 3))
    config = first_fitting(candidates, target, rank, weight_dtype)
    resident = 1 if rank > 64 and weight_dtype.itemsize == 2 else 2  # programs at once on a processor
    row_blocks = max(1, experts * -(-out_features // config.block_o))
    start = 3 if config.registers else 1
    tiles = -(-in_features // config.block_i)
    return dataclasses.replace(config, splits=_splits(row_blocks, tiles, target.processors * resident, start))


@functools.lru_cache(maxsize=1024)
def stack_norm_config(
    adapters: int, out_features: int, in_features: int, rank: int, weight_dtype: torch.dtype, target: Target
) -> StackNormConfig:
    """Of ranks up to 64."""
    block_r, most = power_of_two(rank, 16, 64), power_of_two(adapters, 2, 4)
    if weight_dtype is torch.float32:  # no tensor cores: small tiles, or the product spills
        candidates = [StackNormConfig(32, 32, block_r, 2, 1, 4, 2)]
    else:
        candidates = [
            StackNormConfig(64, 128, block_r, together, 1, 8, stages)
            for together, stages in ((most, 3), (most, 2), (2, 2))
            if block_r < 64 or (target.products_from_shared and together == 2)  # or it spills, or does not fit
        ]
        candidates.append(StackNormConfig(64, 64, block_r, 2, 1, 4, 2))
    config = first_fitting(candidates, target, weight_dtype)
    programs = -(-adapters // config.together) * -(-out_features // config.block_o)
    splits = _splits(programs, -(-in_features // config.block_i), 2 * target.processors, 1)
    return dataclasses.replace(config, splits=splits)


@functools.lru_cache(maxsize=1024)
def packed_norm_config(
    experts: int, out_features: int, in_features: int, halves: int, rank: int, target: Target
) -> NormConfig:
    """Tiles of bytes, ``block_i`` of them in a row; of two numbers each there are two products in a step."""
    block_r = power_of_two(rank, 16, 128)
    if rank <= 64:
        candidates = fewer_stages(NormConfig(64, 64, block_r, 1, 4, 3))
    elif rank <= 384 and target.products_from_shared:  # or it spills
        block_i = 32 if halves == 2 and rank > 128 else 64  # or lora_B leaves too few registers
        candidates = fewer_stages(NormConfig(128, block_i, block_r, 1, 8, 4 - halves, registers=True))
    else:
        candidates = []
    # Of two numbers a byte, a product that is summed outside the registers spills at 64.
    block_i = 32 if halves == 2 and target.generation == 10 else 64
    candidates.append(NormConfig(64, block_i, min(block_r, 64), 1, 4, 4 - halves))
    config = first_fitting(candidates, target, rank, torch.bfloat16, halves)
    row_blocks = max(1, experts * -(-out_features // config.block_o))
    tiles = -(-in_features // halves // config.block_i)
    resident = 1 if config.registers else 4 if rank <= 16 else 3  # programs at once on a processor
    splits = _splits(row_blocks, tiles, target.processors * resident, 3 if config.registers else 1)
    return dataclasses.replace(config, splits=splits)


def _splits(row_blocks: int, tiles: int, slots: int, start: int) -> int:
    """The fewest column splits, of at least four tiles, with the least time: waves of programs times tiles of each.

    ``start`` is what a program does before its first tile, in tiles.
    """

    def time(splits: int) -> int:
        return -(-row_blocks * splits // slots) * (-(-tiles // splits) + start)

    return min(range(1, max(1, min(tiles // 4, 64)) + 1), key=time)


@functools.lru_cache(maxsize=1024)
def tile_config(
    tokens: int, out_features: int, rank: int, h_dtype: torch.dtype, base_dtype: torch.dtype, target: Target
) -> TileConfig:
    """The up-projection with its epilogue: many small tiles where bytes are the limit, large ones where flops are."""
    block_t = power_of_two(tokens, 16, 32)
    if base_dtype is torch.float32:
        config = TileConfig(block_t, 64, 16, 4, 2)
    elif rank <= 64 and h_dtype.itemsize == 2 and tokens > 32:
        # A program that walks down its rows reads lora_B once, as long as there are programs enough.
        tile, stages, rows, programs = ((32, 128), 3, 256, 512) if rank <= 32 else ((64, 128), 4, 512, 256)
        while rows > tile[0] and -(-tokens // rows) * -(-out_features // tile[1]) < programs:
            rows //= 2
        warps = 8 if rows == 512 else 4
        config = TileConfig(*tile, power_of_two(rank, 16, 64), warps, stages, rows=rows)
    elif rank <= 64 or tokens <= 32:
        config = TileConfig(block_t, 128, power_of_two(rank, 16, 64 if h_dtype.itemsize == 2 else 32), 4, 2)
    elif h_dtype is torch.float32:
        config = TileConfig(64, 128, 32, 4, 2)
    elif target.products_from_shared:
        config = TileConfig(128, 128, 64, 4 if target.generation == 9 else 8, 3, descriptors=True)
    else:
        config = TileConfig(64, 128, 64, 4, 3)
    return first_fitting(fewer_stages(config), target, h_dtype, base_dtype)


@functools.lru_cache(maxsize=1024)
def pointwise_config(tokens: int) -> TileConfig:
    """Compose without a product."""
    return TileConfig(power_of_two(tokens, 1, 16), 256, 16, 4, 1)


@functools.lru_cache(maxsize=1024)
def column_config(tokens: int, out_features: int, dtype: torch.dtype, target: Target) -> ColumnConfig:
    """One pass over dy and inner: tall strips where there are enough of them, shorter ones where there are not."""
    rows = 256
    while rows > 32 and -(-tokens // rows) * -(-out_features // 128) < 512:
        rows //= 2
    config = ColumnConfig(min(32, rows), 128, launchable(tokens, rows), 4, 4)
    return first_fitting(fewer_stages(config), target, dtype, programs=2)


@functools.lru_cache(maxsize=1024)
def lora_b_config(tokens: int, out_features: int, rank: int, target: Target) -> LoraBConfig:
    """The backward pass with lora_B's gradient: about one program per processor, in one strip where that fills them.

    A program reads all of h for its columns, and each strip writes a gradient of its own.
    """
    block_r = power_of_two(rank, 16, 128)
    chunks = min(-(-rank // block_r), 3)
    processors = target.processors
    block_o = 64 if processors // 2 < -(-out_features // 64) <= processors else 128
    if (chunks > 1 and not target.products_from_shared) or (block_r > 64 and target.backend == "hip"):
        block_o = 64  # or the sums spill, and AMD's need more shared memory at the end than there may be
    strips = max(1, min(processors // -(-out_features // block_o), tokens // 256))
    rows = -(-tokens // (32 * strips)) * 32
    config = LoraBConfig(32, block_o, rows, 4 if block_r <= 64 else 8, 4, block_r, chunks)
    return first_fitting(fewer_stages(config), target)


# Up to which rank an MLP's kernels take the products with factors along; beyond they are cuBLAS's, which goes over the
# activations once more for each.
MLP_RANK = 64


@functools.lru_cache(maxsize=1024)
def mlp_config(tokens: int, features: int, rank: int, training: bool, target: Target) -> MlpConfig:
    """gate and up with their up-projections, of ranks up to ``rank``: small tiles that a program walks down."""
    if rank == 0 or rank > MLP_RANK:
        config = MlpConfig(power_of_two(tokens, 1, 16), 128, 64, 4, 3)
    else:
        config = MlpConfig(16, 128, 256 if rank > 32 else 128, 4, 4 if training else 3, power_of_two(rank, 16, 64))
    rows = config.rows
    while rows > config.block_t and -(-tokens // rows) * -(-features // config.block_o) < 8 * target.processors:
        rows //= 2
    config = dataclasses.replace(config, rows=launchable(tokens, rows))
    return first_fitting(fewer_stages(config), target)


@functools.lru_cache(maxsize=1024)
def mlp_backward_config(tokens: int, features: int, rank: int, target: Target) -> MlpBackwardConfig:
    """About two programs per processor where products are taken along, whose sums stay in registers for a strip."""
    if rank == 0 or rank > MLP_RANK:
        rows = dataclasses.asdict(column_config(tokens, features, torch.bfloat16, target))
        return first_fitting(fewer_stages(MlpBackwardConfig(**rows | {"block_t": 16})), target)
    # Or the sums spill; elsewhere than on Hopper so would these without more warps, or smaller tiles.
    block_t, block_o = (16, 128) if rank <= 16 else (32, 64 if target.products_from_shared else 32)
    warps = 4 if target.generation == 9 or block_o == 32 else 8
    strips = max(1, min(2 * target.processors // -(-features // block_o), tokens // 256))
    rows = -(-tokens // (block_t * strips)) * block_t
    config = MlpBackwardConfig(block_t, block_o, launchable(tokens, rows), warps, 3, power_of_two(rank, 16, 64))
    return first_fitting(fewer_stages(config), target)


RANKS = 1, 16, 32, 64, 128, 192, 256, 384, 512  # both sides of each threshold above
DTYPES = torch.bfloat16, torch.float32


@functools.lru_cache(maxsize=16)
def why_not(target: Target | None) -> str | None:
    """Why the card runs no kernels of ours, or None if it runs all that are not for packed weights."""
    if target is None:
        return "no kernels are wanted"
    if target.backend == "cuda" and target.capability < 80:
        return f"{target.name} has no products of bfloat16, which came with sm_80"
    # Of another generation Triton may know nothing: 3.6 has no ptxas for sm_110. Others of one are as its first.
    known = {card.generation for card in CARDS.values()} if target.backend == "cuda" else ()
    if target.generation not in known and target.name not in CARDS:
        return f"nothing was compiled for {target.name} yet"
    size = 4096, 4096
    try:
        for rank, dtype in itertools.product(RANKS, DTYPES):
            norm_config(1, *size, rank, dtype, target)
            stack_norm_config(16, *size, min(rank, 64), dtype, target)
            for base_dtype in (torch.bfloat16, dtype):
                tile_config(*size, rank, dtype, base_dtype, target)
            column_config(*size, dtype, target)
            lora_b_config(*size, min(rank, 384), target)
            for base_dtype in (torch.bfloat16, dtype):
                segment_tile_config(size[0], 8, size[1], rank, dtype, base_dtype, target)
                segment_product_config(size[0], 8, size[1], rank, base_dtype, dtype, target)
                segment_backward_config(*size, rank, base_dtype, dtype, target)
            segment_gate_config(size[0], 8, size[1], rank, dtype, target)
            segment_gate_backward_config(*size, rank, dtype, target)
            for training in (False, True):
                mlp_config(*size, rank, training, target)
            mlp_backward_config(*size, rank, target)
            for halves in (1, 2):
                packed_norm_config(1, *size, halves, rank, target)
            for batch, tokens in ((1, 1), (64, 1), (1024, 1), (8, 512)):
                mixed_config(batch, tokens, 16, *size, rank, dtype, torch.bfloat16, target)
    except DoesNotFitError as error:
        return str(error)
    return None


def why_no_packed(target: Target | None, float8: bool = False) -> str | None:
    """The same of the kernels that read packed weights, or those of them with numbers or scales in float8."""
    if target is not None and target.backend != "cuda":
        return "packed weights are decoded with instructions that only NVIDIA's cards have"
    if target is not None and float8 and target.capability < 89:
        return f"{target.name} has no float8_e4m3fn, which came with sm_89"
    return why_not(target)
