"""How each kernel is launched: frozen records and the pure functions that choose them for a card.

The tiles are the fastest of sweeps on an H100 over bfloat16 tensors and factors of rank 16, 64 and 384; those of other
dtypes and the thresholds between these ranks follow from registers and shared memory. ``python -m dorac.bench tune``
prints the candidates beside the chosen ones. Other cards take the H100's as far as their shared memory
(:func:`fits`) and registers hold it, and else the next in line; nothing was timed on them.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterable
from typing import TypeVar

import torch

from dorac.kernels.target import CARDS, Target

SCRATCH = 2048  # bytes, at least, for sums over a program's warps and the barriers of its copies
DEFAULT_STAGES = {"cuda": 3, "hip": 2}  # of a loop that names none


def _buffers(stages: int, target: Target, dtype: torch.dtype, *, product: bool) -> int:
    """How many tiles of a pipelined loop are in shared memory at once: one for each step ahead.

    What a product reads there while the program goes on needs one more, as Triton 3.6 to 3.9 have it, and on gfx950
    what is copied there past the registers.
    """
    longer = (target.products_from_shared and dtype.itemsize == 2) or target.copies_to_shared
    return max(1, stages - 1 + (product and longer))


def _converted(tile: int, target: Target) -> int:
    """Bytes of a tile that changes threads beside those that are read ahead: where products take registers."""
    return 0 if target.products_from_shared else tile


def _total(tiles: int, target: Target) -> int:
    """Bytes of tiles as they lie in shared memory: what AMD's cards copy there is padded, row by row."""
    return tiles + (tiles // 16 if target.copies_to_shared else 0) + SCRATCH


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

    def shared_memory(self, target: Target, rank: int, dtype: torch.dtype, halves: int | None = None) -> int:
        """Bytes at most, for a weight of this dtype; with ``halves`` for a packed one, factors of this dtype."""
        chunks, size = -(-rank // self.block_r), dtype.itemsize
        a = self.block_r * self.block_i * size * (halves or 1)
        b = self.block_o * self.block_r * size
        w = self.block_o * self.block_i * (size if halves is None else 1)
        more = 2 * SCRATCH * (halves or 0)  # tiles of bytes change threads, and once more for each half
        if chunks > 3:  # a loop of its own over tiles of both factors
            ahead = _buffers(DEFAULT_STAGES[target.backend], target, dtype, product=True)
            return _total(ahead * (a // (halves or 1) + b) + w, target) + more
        ahead = _buffers(self.stages, target, dtype, product=True) * chunks * a
        if target.backend == "hip":
            return _total(ahead + w, target) + more
        ahead += _buffers(self.stages, target, dtype, product=False) * w
        if not self.registers or target.generation == 10:  # whose products take no operand from registers
            return _total(ahead + chunks * b, target) + more
        before = chunks * b + self.block_r * self.block_r * size  # lora_B on its way, and what it is multiplied with
        return _total(max(ahead + (0 if target.products_from_shared else b), before), target) + more


@dataclasses.dataclass(frozen=True)
class StackNormConfig:
    """The same for several adapters ``together`` over one weight, all ranks in one step."""

    block_o: int
    block_i: int
    block_r: int
    together: int
    splits: int
    warps: int
    stages: int

    def shared_memory(self, target: Target, dtype: torch.dtype) -> int:
        """Bytes at most."""
        factors = (self.block_o + self.block_i) * self.block_r * self.together
        w = self.block_o * self.block_i
        ahead = _buffers(self.stages, target, dtype, product=True)
        return _total(ahead * (factors + w) * dtype.itemsize, target) + SCRATCH


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

    def shared_memory(self, target: Target, h_dtype: torch.dtype, base_dtype: torch.dtype) -> int:
        """Bytes at most."""
        tile = self.block_t * self.block_o * 4  # the product, as it changes threads to be written
        step = (self.block_t + self.block_o) * self.block_r * h_dtype.itemsize
        if h_dtype is torch.float32 and base_dtype.itemsize == 2:
            step *= 2  # high and low
        if self.rows > self.block_t:  # lora_B stays, tiles of h and base come
            b, of_base = self.block_o * self.block_r * h_dtype.itemsize, tile // 4 * base_dtype.itemsize
            ahead = _buffers(self.stages, target, base_dtype, product=True) * (step - b + of_base)
            return _total(b + max(ahead + _converted(of_base, target), tile), target)
        return _total(max(_buffers(self.stages, target, base_dtype, product=True) * step, tile), target)


@dataclasses.dataclass(frozen=True)
class ColumnConfig:
    """A program's columns and rows of activations; it walks its rows in steps of ``block_t``."""

    block_t: int
    block_o: int
    rows: int
    warps: int
    stages: int

    def shared_memory(self, target: Target, dtype: torch.dtype) -> int:
        """Bytes at most."""
        tile = self.block_t * self.block_o * dtype.itemsize
        return _total(2 * _buffers(self.stages, target, dtype, product=False) * tile, target)


@dataclasses.dataclass(frozen=True)
class LoraBConfig(ColumnConfig):
    """The same with all ranks beside them, in ``chunks`` of ``block_r``."""

    block_r: int = 16
    chunks: int = 1

    def shared_memory(self, target: Target, dtype: torch.dtype = torch.bfloat16) -> int:
        """Bytes at most."""
        tile, h = self.block_t * self.block_o * 2, self.block_t * self.block_r * self.chunks * 2
        ahead = _buffers(self.stages, target, dtype, product=True)
        behind = 0 if target.backend == "hip" else 2 * max(2, ahead - 1)  # dy once more, and inner: loaded a step later
        more = target.backend == "cuda" and self.chunks > 1  # Triton 3.8 has one of these once more
        return _total(max(ahead * (tile + h) + (behind + more) * tile, self.block_o * self.block_r * 4), target)


@dataclasses.dataclass(frozen=True)
class MlpConfig(ColumnConfig):
    """The same with all ranks beside them; without products where ``block_r`` is 0."""

    block_r: int = 0

    def shared_memory(self, target: Target, dtype: torch.dtype = torch.bfloat16) -> int:
        """Bytes at most."""
        if not self.block_r:
            return super().shared_memory(target, dtype)
        factors = 2 * self.block_o * self.block_r * 2
        step = 2 * self.block_t * (self.block_o + self.block_r) * 2
        tiles = factors + _buffers(self.stages, target, dtype, product=True) * step
        return _total(tiles + _converted(self.block_t * self.block_o * 2, target), target)


@dataclasses.dataclass(frozen=True)
class MlpBackwardConfig(MlpConfig):
    """The same; ``block_r`` is the ranks that are taken along."""

    def shared_memory(self, target: Target, dtype: torch.dtype = torch.bfloat16) -> int:
        """Bytes at most."""
        tile = self.block_t * self.block_o * 2
        if not self.block_r:
            return _total(3 * _buffers(self.stages, target, dtype, product=False) * tile, target)
        h = 3 * _buffers(self.stages, target, dtype, product=True) * self.block_t * self.block_r * 2
        return _total(max(h + 4 * tile, self.block_o * self.block_r * 4), target)


@dataclasses.dataclass(frozen=True)
class SegmentConfig(ColumnConfig):
    """The same over rows sorted by segment, with ``block_r`` ranks beside them; others are other programs'."""

    block_r: int = 16

    def shared_memory(self, target: Target, dtype: torch.dtype, h_dtype: torch.dtype) -> int:
        """Bytes at most, for activations and for h of these dtypes."""
        size = dtype.itemsize
        tile, h = self.block_t * self.block_o * size, self.block_t * self.block_r * h_dtype.itemsize
        ahead = _buffers(self.stages, target, dtype, product=True)
        behind = 0 if target.backend == "hip" else max(2, ahead - (size == 2))  # as of LoraBConfig
        pieces = 3 * self.block_t * self.block_r * 2 if h_dtype.itemsize > size else 0
        return _total(max(ahead * (tile + h) + behind * 2 * tile, self.block_o * self.block_r * 4) + pieces, target)


@dataclasses.dataclass(frozen=True)
class ProductConfig:
    """A program's rows and ranks, the columns of a step, and over how many programs the columns are split."""

    block_t: int
    block_i: int
    block_r: int
    splits: int
    warps: int
    stages: int

    def shared_memory(self, target: Target, dtype: torch.dtype, factor_dtype: torch.dtype) -> int:
        """Bytes at most, for rows and factors of these dtypes."""
        x, a = self.block_t * self.block_i * dtype.itemsize, self.block_r * self.block_i * factor_dtype.itemsize
        # Times g, and three bfloat16 numbers for one of float32.
        pieces = self.block_r * self.block_i * (6 if factor_dtype.itemsize > dtype.itemsize else factor_dtype.itemsize)
        ahead = _buffers(self.stages, target, dtype, product=True) * (x + a) + pieces
        return _total(max(ahead, self.block_t * self.block_r * 4), target)


@dataclasses.dataclass(frozen=True)
class MixedConfig:
    """How tokens become tiles (``kernels/mixed.py``), and the tiles of both launches.

    The first: ``block_t`` tokens, of "counted" one, a step's ``block_i`` inputs, ``block_r`` ranks, the inputs split
    over ``splits`` programs. The second: ``block_t`` tokens, ``columns`` outputs in steps of ``block_o``, ``up_r``
    ranks of a step; of long rows ``rows`` tokens, a multiple of ``up_t``, in steps of these, and ``block_o`` outputs.
    """

    form: str
    block_t: int
    block_i: int
    block_r: int
    splits: int
    down_warps: int
    stages: int
    block_o: int
    up_r: int
    up_warps: int
    up_t: int = 16
    rows: int = 16
    columns: int = 128
    up_stages: int = 3

    def shared_memory(self, target: Target, factor_dtype: torch.dtype, base_dtype: torch.dtype) -> int:
        """Bytes at most."""
        size = max(factor_dtype.itemsize, base_dtype.itemsize)
        step = (self.block_t + self.block_r) * self.block_i * size
        if factor_dtype is torch.float32 and base_dtype.itemsize == 2:
            step *= 2  # high and low
        if self.form == "long":
            up = max((self.up_t + self.block_o) * self.up_r * size, self.up_t * self.block_o * 4)
        else:
            ahead = _buffers(self.up_stages, target, base_dtype, product=True)
            tiles = (self.block_o * self.up_r + self.block_t * self.block_o) * size + 2 * self.block_o * 4
            up = ahead * tiles + self.block_t * max(self.up_r * size, self.block_o * 4)
        return _total(max(_buffers(self.stages, target, base_dtype, product=True) * step, up), target)


Config = NormConfig | StackNormConfig | TileConfig | ColumnConfig | ProductConfig | MixedConfig
_Config = TypeVar("_Config", bound=Config)


class DoesNotFitError(ValueError):
    """A card on which no config of a kernel can be launched."""


def fits(config: Config, target: Target, *of: object, programs: int = 1) -> bool:
    """Whether ``programs`` of this config have room on a processor of the card.

    ``of``: what else the config's ``shared_memory`` asks for: rank and dtypes.
    """
    return programs * config.shared_memory(target, *of) <= target.shared_memory


def _first(candidates: Iterable[_Config], target: Target, *of: object, programs: int = 1) -> _Config:
    """The first candidate of which so many programs fit, or one."""
    candidates = list(candidates)
    for wanted in dict.fromkeys((programs, 1)):
        for config in candidates:
            if fits(config, target, *of, programs=wanted):
                return config
    least = min(config.shared_memory(target, *of) for config in candidates)
    raise DoesNotFitError(
        f"{candidates[-1]} needs {least} bytes of shared memory, {target.name} has {target.shared_memory}"
    )


def _fewer_stages(config: _Config, least: int = 2) -> list[_Config]:
    return [dataclasses.replace(config, stages=stages) for stages in range(config.stages, least - 1, -1)]


def _power(value: int, low: int, high: int) -> int:
    """The least power of two that holds ``value``, between ``low`` and ``high``."""
    return max(low, min(high, 1 << max(0, value - 1).bit_length()))


@functools.lru_cache(maxsize=1024)
def norm_config(
    experts: int, out_features: int, in_features: int, rank: int, weight_dtype: torch.dtype, target: Target
) -> NormConfig:
    """Wide tiles where the weight's bytes are the limit, factors in registers where the product is."""
    block_r = _power(rank, 16, 128)
    if weight_dtype is torch.float32:  # no tensor cores: small tiles, or the product spills
        candidates = [NormConfig(32, 32, min(block_r, 32), 1, 4, 2)]
    elif rank <= 64:
        candidates = _fewer_stages(NormConfig(64, 128, block_r, 1, 8 if rank <= 16 else 4, 3))
    elif rank <= (384 if target.products_from_shared else 256):  # or it spills
        candidates = _fewer_stages(NormConfig(128, 64, block_r, 1, 8, 3, registers=True))
    else:
        candidates = []
    if weight_dtype is not torch.float32:
        candidates.append(NormConfig(64, 64, min(block_r, 64), 1, 4, 3))
    config = _first(candidates, target, rank, weight_dtype)
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
    block_r, most = _power(rank, 16, 64), _power(adapters, 2, 4)
    if weight_dtype is torch.float32:  # no tensor cores: small tiles, or the product spills
        candidates = [StackNormConfig(32, 32, block_r, 2, 1, 4, 2)]
    else:
        candidates = [
            StackNormConfig(64, 128, block_r, together, 1, 8, stages)
            for together, stages in ((most, 3), (most, 2), (2, 2))
            if target.products_from_shared or block_r < 64  # or it spills
        ]
        candidates.append(StackNormConfig(64, 64, block_r, 2, 1, 4, 2))
    config = _first(candidates, target, weight_dtype)
    programs = -(-adapters // config.together) * -(-out_features // config.block_o)
    splits = _splits(programs, -(-in_features // config.block_i), 2 * target.processors, 1)
    return dataclasses.replace(config, splits=splits)


@functools.lru_cache(maxsize=1024)
def packed_norm_config(
    experts: int, out_features: int, in_features: int, halves: int, rank: int, target: Target
) -> NormConfig:
    """Tiles of bytes, ``block_i`` of them in a row; of two numbers each there are two products in a step."""
    block_r = _power(rank, 16, 128)
    if rank <= 64:
        candidates = _fewer_stages(NormConfig(64, 64, block_r, 1, 4, 3))
    elif rank <= 384 and target.products_from_shared:  # or it spills
        block_i = 32 if halves == 2 and rank > 128 else 64  # or lora_B leaves too few registers
        candidates = _fewer_stages(NormConfig(128, block_i, block_r, 1, 8, 4 - halves, registers=True))
    else:
        candidates = []
    # Of two numbers a byte, a product that is summed outside the registers spills at 64.
    block_i = 32 if halves == 2 and target.generation == 10 else 64
    candidates.append(NormConfig(64, block_i, min(block_r, 64), 1, 4, 4 - halves))
    config = _first(candidates, target, rank, torch.bfloat16, halves)
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
    block_t = _power(tokens, 16, 32)
    if base_dtype is torch.float32:
        config = TileConfig(block_t, 64, 16, 4, 2)
    elif rank <= 64 and h_dtype.itemsize == 2 and tokens > 32:
        # A program that walks down its rows reads lora_B once, as long as there are programs enough.
        tile, warps, stages, rows = ((32, 128), 4, 3, 256) if rank <= 32 else ((64, 128), 8, 4, 512)
        while rows > tile[0] and -(-tokens // rows) * -(-out_features // tile[1]) < 256:
            rows //= 2
        config = TileConfig(*tile, _power(rank, 16, 64), warps, stages, rows=rows)
    elif rank <= 64 or tokens <= 32:
        config = TileConfig(block_t, 128, _power(rank, 16, 64 if h_dtype.itemsize == 2 else 32), 4, 2)
    elif h_dtype is torch.float32:
        config = TileConfig(64, 128, 32, 4, 2)
    elif target.products_from_shared:
        config = TileConfig(128, 128, 64, 4 if target.generation == 9 else 8, 3, descriptors=True)
    else:
        config = TileConfig(64, 128, 64, 4, 3)
    return _first(_fewer_stages(config), target, h_dtype, base_dtype)


@functools.lru_cache(maxsize=1024)
def pointwise_config(tokens: int) -> TileConfig:
    """Compose without a product."""
    return TileConfig(_power(tokens, 1, 16), 256, 16, 4, 1)


@functools.lru_cache(maxsize=1024)
def column_config(tokens: int, out_features: int, dtype: torch.dtype, target: Target) -> ColumnConfig:
    """One pass over dy and inner: tall strips where there are enough of them, shorter ones where there are not."""
    rows = 256
    while rows > 32 and -(-tokens // rows) * -(-out_features // 128) < 512:
        rows //= 2
    config = ColumnConfig(min(32, rows), 128, _launchable(tokens, rows), 4, 4)
    return _first(_fewer_stages(config), target, dtype, programs=2)


def _launchable(tokens: int, rows: int) -> int:
    """More rows to a strip where there would be more strips than a grid's second axis holds."""
    while -(-tokens // rows) > 65_535:
        rows *= 2
    return rows


@functools.lru_cache(maxsize=1024)
def lora_b_config(tokens: int, out_features: int, rank: int, target: Target) -> LoraBConfig:
    """The backward pass with lora_B's gradient: about one program per processor, in one strip where that fills them.

    A program reads all of h for its columns, and each strip writes a gradient of its own.
    """
    block_r = _power(rank, 16, 128)
    chunks = min(-(-rank // block_r), 3)
    processors = target.processors
    block_o = 64 if processors // 2 < -(-out_features // 64) <= processors else 128
    if (chunks > 1 and not target.products_from_shared) or (block_r > 64 and target.backend == "hip"):
        block_o = 64  # or the sums spill, and AMD's need more shared memory at the end than there may be
    strips = max(1, min(processors // -(-out_features // block_o), tokens // 256))
    rows = -(-tokens // (32 * strips)) * 32
    config = LoraBConfig(32, block_o, rows, 4 if block_r <= 64 else 8, 4, block_r, chunks)
    return _first(_fewer_stages(config), target)


# Up to which rank an MLP's kernels take the products with factors along; beyond they are cuBLAS's, which goes over the
# activations once more for each.
MLP_RANK = 64


@functools.lru_cache(maxsize=1024)
def mlp_config(tokens: int, features: int, rank: int, training: bool, target: Target) -> MlpConfig:
    """gate and up with their up-projections, of ranks up to ``rank``: small tiles that a program walks down."""
    if rank == 0 or rank > MLP_RANK:
        config = MlpConfig(_power(tokens, 1, 16), 128, 64, 4, 3)
    else:
        config = MlpConfig(16, 128, 256 if rank > 32 else 128, 4, 4 if training else 3, _power(rank, 16, 64))
    rows = config.rows
    while rows > config.block_t and -(-tokens // rows) * -(-features // config.block_o) < 8 * target.processors:
        rows //= 2
    config = dataclasses.replace(config, rows=_launchable(tokens, rows))
    return _first(_fewer_stages(config), target)


@functools.lru_cache(maxsize=1024)
def mlp_backward_config(tokens: int, features: int, rank: int, target: Target) -> MlpBackwardConfig:
    """About two programs per processor where products are taken along, whose sums stay in registers for a strip."""
    if rank == 0 or rank > MLP_RANK:
        rows = dataclasses.asdict(column_config(tokens, features, torch.bfloat16, target))
        return _first(_fewer_stages(MlpBackwardConfig(**rows | {"block_t": 16})), target)
    # Or the sums spill; elsewhere than on Hopper so would these without more warps, or smaller tiles.
    block_t, block_o = (16, 128) if rank <= 16 else (32, 64 if target.products_from_shared else 32)
    warps = 4 if target.generation == 9 or block_o == 32 else 8
    strips = max(1, min(2 * target.processors // -(-features // block_o), tokens // 256))
    rows = -(-tokens // (block_t * strips)) * block_t
    config = MlpBackwardConfig(block_t, block_o, _launchable(tokens, rows), warps, 3, _power(rank, 16, 64))
    return _first(_fewer_stages(config), target)


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
    """:func:`tile_config` for rows sorted by segment: a tile holds rows of one alone."""
    each = max(1, -(-rows // max(1, segments)))  # rows of a segment, if they were as many in all
    block_t = _power(each, 16, 32)
    if base_dtype is torch.float32:
        config = TileConfig(block_t, 64, 16, 4, 2)
    elif rank <= 64 and h_dtype.itemsize == 2 and each > 32:
        tile, warps, walked, programs = ((16, 128), 4, 128, 512) if rank <= 32 else ((64, 128), 8, 512, 256)
        while walked > tile[0] and -(-rows // walked) * -(-out_features // tile[1]) < programs:
            walked //= 2
        config = TileConfig(*tile, _power(rank, 16, 64), warps, 2, rows=walked)
    elif rank <= 64 or each <= 32:
        config = TileConfig(block_t, 128, _power(rank, 16, 64 if h_dtype.itemsize == 2 else 32), 4, 2)
    else:
        config = TileConfig(*((32, 128, 32) if h_dtype is torch.float32 else (64, 128, 64)), 4, 2)  # or it spills
    return _first(_fewer_stages(config, 1), target, h_dtype, base_dtype)


@functools.lru_cache(maxsize=1024)
def segment_product_config(
    rows: int, segments: int, in_features: int, rank: int, dtype: torch.dtype, a_dtype: torch.dtype, target: Target
) -> ProductConfig:
    """Long rows times few columns: split where the tiles of rows do not fill the card."""
    each = max(1, -(-rows // max(1, segments)))
    if dtype is torch.float32:  # no tensor cores: small tiles, or the product spills
        config = ProductConfig(_power(each, 16, 32), 32, _power(rank, 16, 32), 1, 4, 3)
    else:
        wide = a_dtype is torch.float32
        block_t = 64 if target.products_from_shared or not (wide or rank > 64) else 32  # or it spills
        config = ProductConfig(_power(each, 16, block_t), 64 if wide else 128, _power(rank, 16, 64), 1, 4, 4)
    config = _first(_fewer_stages(config, 1), target, dtype, a_dtype)
    tiles = (-(-rows // config.block_t) + min(rows, segments)) * -(-rank // config.block_r)
    steps = -(-in_features // config.block_i)
    splits = max(1, min(2 * target.processors // tiles, steps // 8, 32))
    return dataclasses.replace(config, splits=splits)


@functools.lru_cache(maxsize=1024)
def segment_backward_config(
    rows: int, out_features: int, rank: int, dtype: torch.dtype, h_dtype: torch.dtype, target: Target
) -> SegmentConfig:
    """:func:`lora_b_config` for rows sorted by segment: enough strips even where one segment has all rows."""
    block_r = _power(rank, 16, 128 if h_dtype.itemsize == 2 else 32)
    wide, processors = h_dtype is torch.float32, target.processors
    block_o = 64 if processors // 2 < -(-out_features // 64) <= processors else 128
    if wide or (block_r > 64 and target.backend == "hip"):
        block_o = 64
    strips = max(1, min(processors // -(-out_features // block_o), rows // 256))
    walked = -(-rows // (32 * strips)) * 32
    lean = target.products_from_shared
    warps, stages = 4 if block_r <= (64 if lean else 32) else 8, 4 if lean else 3  # or it spills
    config = SegmentConfig(32, block_o, max(32, walked), warps, stages, block_r)
    return _first(_fewer_stages(config, 1), target, dtype, h_dtype)


# Of mixed rows: up to how many tokens each is a tile, and up to how many a program counts in all of them.
SINGLE, COUNTED = 8, 256
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
    """Few tokens: as many programs as are resident, or bytes come too slowly. Many: as :func:`tile_config`."""
    tokens = batch * row_tokens
    half = factor_dtype.itemsize == base_dtype.itemsize == 2
    up_r = _power(rank, 16, 64 if half else 32)
    wide_warps = 4 if base_dtype is torch.float32 and rank > 32 else 8  # or it spills
    if tokens <= COUNTED or row_tokens < 16:
        form = "single" if tokens <= SINGLE else "counted" if tokens <= COUNTED else "listed"
        count = min(tokens, adapters + 1)
        count = tokens if form == "single" else count + (tokens - count) // 16
        block_o = columns = 64 if tokens <= 2 else 256 if rank <= 32 and half else 128
        while columns < min(out_features, 1024) and count * -(-out_features // columns) > 8 * target.processors:
            columns *= 2
        stages = 1
        if columns == 1024:
            block_o, stages = 128, 3
        down = 256 if half else 64, up_r, 16 if rank <= 32 else 8, 4, 3
        if form != "listed":
            down = 256 if half else 128, 16, 32, 4, 3 if tokens > 64 else 1
        up = block_o, min(up_r, 32) if form == "single" else up_r, 4 if half else wide_warps
        config = MixedConfig(form, 1 if form == "single" else 16, *down, *up, columns=columns, up_stages=stages)
        count = count if form == "listed" else tokens
    else:
        block_t = _power(row_tokens, 16, 64)
        up = {"up_t": 16, "up_warps": 4, "rows": 128} if rank <= 32 else {"up_t": 64, "up_warps": 8, "rows": 512}
        if not half:
            up = {"up_t": 16, "up_warps": wide_warps, "rows": 128}
        while up["rows"] > up["up_t"] and batch * -(-row_tokens // up["rows"]) * -(-out_features // 128) < 512:
            up["rows"] //= 2
        config = MixedConfig("long", block_t, 128 if half else 32, up_r, 4, 4, 3, block_o=128, up_r=up_r, **up)
        count = batch * -(-row_tokens // block_t)
    candidates = [*_fewer_stages(config, 1), dataclasses.replace(config, block_i=config.block_i // 2, stages=1)]
    config = _first(candidates, target, factor_dtype, base_dtype)
    programs = max(1, count * -(-rank // config.block_r))
    splits = min(config.splits, max(1, 4 * target.processors // programs), max(1, in_features // config.block_i))
    splits = 1 << splits.bit_length() - 1
    while splits > 1 and splits * tokens * rank * 4 > PARTIAL_BYTES:
        splits //= 2
    return dataclasses.replace(config, splits=splits)


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
