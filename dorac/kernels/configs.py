"""How each kernel is launched: frozen records and the pure functions that choose them.

The tiles are the fastest of sweeps on an H100 over bfloat16 tensors and factors of rank 16, 64 and 384; those of other
dtypes and the thresholds between these ranks follow from registers and shared memory. ``python -m dorac.bench tune``
prints the candidates beside the chosen ones.
"""

import dataclasses
import functools

import torch

PROCESSORS = 132  # of an H100: what full waves of programs are counted in


@dataclasses.dataclass(frozen=True)
class NormConfig:
    """A program's rows, the columns and ranks of a step, and over how many programs the columns are split."""

    block_o: int
    block_i: int
    block_r: int
    splits: int
    warps: int
    stages: int
    registers: bool = False  # lora_B is kept in registers


@dataclasses.dataclass(frozen=True)
class TileConfig:
    """A program's tile of activations, and the ranks of a step of its product.

    With ``rows``, a multiple of ``block_t``, it walks down so many, and all ranks are in one step.
    """

    block_t: int
    block_o: int
    block_r: int
    warps: int
    stages: int
    descriptors: bool = False  # load and store through the tensor memory accelerator
    rows: int = 0


@dataclasses.dataclass(frozen=True)
class ColumnConfig:
    """A program's columns and rows of activations; it walks its rows in steps of ``block_t``."""

    block_t: int
    block_o: int
    rows: int
    warps: int
    stages: int


@dataclasses.dataclass(frozen=True)
class LoraBConfig(ColumnConfig):
    """The same with all ranks beside them, in ``chunks`` of ``block_r``."""

    block_r: int = 16
    chunks: int = 1


@dataclasses.dataclass(frozen=True)
class MlpConfig(ColumnConfig):
    """The same with all ranks beside them; without products where ``block_r`` is 0."""

    block_r: int = 0


@dataclasses.dataclass(frozen=True)
class MlpBackwardConfig(MlpConfig):
    """The same; ``block_r`` is the ranks that are taken along."""

    down: bool = False  # so is down's low-rank part of dz


def _power(value: int, low: int, high: int) -> int:
    """The least power of two that holds ``value``, between ``low`` and ``high``."""
    return max(low, min(high, 1 << max(0, value - 1).bit_length()))


@functools.lru_cache(maxsize=1024)
def norm_config(experts: int, out_features: int, in_features: int, rank: int, weight_dtype: torch.dtype) -> NormConfig:
    """Wide tiles where the weight's bytes are the limit, factors in registers where the product is."""
    block_r = _power(rank, 16, 128)
    if weight_dtype is torch.float32:  # no tensor cores: small tiles, or the product spills
        config = NormConfig(32, 32, min(block_r, 32), 1, 4, 2)
    elif rank <= 64:
        config = NormConfig(64, 128, block_r, 1, 8 if rank <= 16 else 4, 3)
    elif rank <= 384:
        config = NormConfig(128, 64, block_r, 1, 8, 3, registers=True)
    else:
        config = NormConfig(64, 64, 64, 1, 4, 3)
    resident = 1 if rank > 64 and weight_dtype.itemsize == 2 else 2  # programs at once on a processor
    row_blocks = max(1, experts * -(-out_features // config.block_o))
    start = 3 if config.registers else 1
    tiles = -(-in_features // config.block_i)
    return dataclasses.replace(config, splits=_splits(row_blocks, tiles, PROCESSORS * resident, start))


@functools.lru_cache(maxsize=1024)
def packed_norm_config(experts: int, out_features: int, in_features: int, halves: int, rank: int) -> NormConfig:
    """Tiles of bytes, ``block_i`` of them in a row; of two numbers each there are two products in a step."""
    block_r = _power(rank, 16, 128)
    if rank <= 64:
        config = NormConfig(64, 64, block_r, 1, 4, 3)
    elif rank <= 384:
        block_i = 32 if halves == 2 and rank > 128 else 64  # or lora_B leaves too few registers
        config = NormConfig(128, block_i, block_r, 1, 8, 4 - halves, registers=True)
    else:
        config = NormConfig(64, 64, 64, 1, 4, 4 - halves)
    row_blocks = max(1, experts * -(-out_features // config.block_o))
    tiles = -(-in_features // halves // config.block_i)
    resident = 1 if config.registers else 4 if rank <= 16 else 3  # programs at once on a processor
    splits = _splits(row_blocks, tiles, PROCESSORS * resident, 3 if config.registers else 1)
    return dataclasses.replace(config, splits=splits)


def _splits(row_blocks: int, tiles: int, slots: int, start: int) -> int:
    """The fewest column splits, of at least four tiles, with the least time: waves of programs times tiles of each.

    ``start`` is what a program does before its first tile, in tiles.
    """

    def time(splits: int) -> int:
        return -(-row_blocks * splits // slots) * (-(-tiles // splits) + start)

    return min(range(1, max(1, min(tiles // 4, 64)) + 1), key=time)


@functools.lru_cache(maxsize=1024)
def tile_config(tokens: int, out_features: int, rank: int, h_dtype: torch.dtype, base_dtype: torch.dtype) -> TileConfig:
    """The up-projection with its epilogue: many small tiles where bytes are the limit, large ones where flops are."""
    block_t = _power(tokens, 16, 32)
    if base_dtype is torch.float32:
        return TileConfig(block_t, 64, 16, 4, 2)
    if rank <= 64 and h_dtype.itemsize == 2 and tokens > 32:
        # A program that walks down its rows reads lora_B once, as long as there are programs enough.
        tile, warps, rows, programs = ((16, 128), 4, 128, 512) if rank <= 32 else ((64, 128), 8, 512, 256)
        while rows > tile[0] and -(-tokens // rows) * -(-out_features // tile[1]) < programs:
            rows //= 2
        return TileConfig(*tile, _power(rank, 16, 64), warps, 2, rows=rows)
    if rank <= 64 or tokens <= 32:
        return TileConfig(block_t, 128, _power(rank, 16, 64 if h_dtype.itemsize == 2 else 32), 4, 2)
    if h_dtype is torch.float32:
        return TileConfig(64, 128, 32, 4, 2)
    return TileConfig(128, 128, 64, 4, 3, descriptors=True)


@functools.lru_cache(maxsize=1024)
def pointwise_config(tokens: int) -> TileConfig:
    """Compose without a product."""
    return TileConfig(_power(tokens, 1, 16), 256, 16, 4, 1)


@functools.lru_cache(maxsize=1024)
def column_config(tokens: int, out_features: int) -> ColumnConfig:
    """One pass over dy and inner: tall strips where there are enough of them, shorter ones where there are not."""
    rows = 256
    while rows > 32 and -(-tokens // rows) * -(-out_features // 128) < 512:
        rows //= 2
    return ColumnConfig(min(32, rows), 128, _launchable(tokens, rows), 4, 4)


def _launchable(tokens: int, rows: int) -> int:
    """More rows to a strip where there would be more strips than a grid's second axis holds."""
    while -(-tokens // rows) > 65_535:
        rows *= 2
    return rows


@functools.lru_cache(maxsize=1024)
def lora_b_config(tokens: int, out_features: int, rank: int) -> LoraBConfig:
    """The backward pass with lora_B's gradient: about one program per processor, in one strip where that fills them.

    A program reads all of h for its columns, and each strip writes a gradient of its own.
    """
    block_r = _power(rank, 16, 128)
    chunks = min(-(-rank // block_r), 3)
    block_o = 64 if PROCESSORS // 2 < -(-out_features // 64) <= PROCESSORS else 128
    strips = max(1, min(PROCESSORS // -(-out_features // block_o), tokens // 256))
    rows = -(-tokens // (32 * strips)) * 32
    return LoraBConfig(32, block_o, rows, 4 if block_r <= 64 else 8, 4, block_r, chunks)


# Up to which rank an MLP's kernels take the products with factors along; beyond they are cuBLAS's, which goes over the
# activations once more for each.
MLP_RANK = 64


@functools.lru_cache(maxsize=1024)
def mlp_config(tokens: int, features: int, rank: int, training: bool) -> MlpConfig:
    """gate and up with their up-projections, of ranks up to ``rank``: small tiles, a few of which a program walks down.

    The next tiles are asked for ahead where that leaves registers enough, or where a step takes long.
    """
    if rank == 0 or rank > MLP_RANK:
        config = MlpConfig(_power(tokens, 1, 16), 128, 64, 4, 3)
    else:
        stages = 2 if training and rank > 32 else 1
        config = MlpConfig(16, 128, 128, 4, stages, _power(rank, 16, 64))
    rows = config.rows
    while rows > config.block_t and -(-tokens // rows) * -(-features // config.block_o) < 8 * PROCESSORS:
        rows //= 2
    return dataclasses.replace(config, rows=_launchable(tokens, rows))


@functools.lru_cache(maxsize=1024)
def mlp_backward_config(tokens: int, features: int, rank: int) -> MlpBackwardConfig:
    """About two programs per processor where products are taken along, whose sums stay in registers for a strip."""
    if rank == 0 or rank > MLP_RANK:
        return MlpBackwardConfig(**dataclasses.asdict(column_config(tokens, features)) | {"block_t": 16})
    block_t, block_o = (16, 128) if rank <= 16 else (32, 64)  # or the sums spill
    strips = max(1, min(2 * PROCESSORS // -(-features // block_o), tokens // 256))
    rows = -(-tokens // (block_t * strips)) * block_t
    return MlpBackwardConfig(block_t, block_o, _launchable(tokens, rows), 4, 3, _power(rank, 16, 64))
