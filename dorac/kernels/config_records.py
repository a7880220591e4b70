"""How a kernel is launched, as a value: tiles, warps and stages, and the shared memory that they take of a card."""

import dataclasses
from collections.abc import Iterable
from typing import TypeVar

import torch

from dorac.kernels.target import Target

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
    """Bytes of tiles as they lie in shared memory, and of sums.

    On AMD's cards sums lie where tiles were, only what products read as it is in memory is kept there, and what gfx950
    copies is padded, row by row.
    """
    if target.backend == "hip":
        return max(tiles + (tiles // 16 if target.copies_to_shared else 0), SCRATCH)
    return tiles + SCRATCH


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
        if target.generation == 10:  # whose products take no operand from registers, and wait at barriers of their own
            return _total(ahead + chunks * b, target) + more + SCRATCH
        if not self.registers:
            return _total(ahead + chunks * b, target) + more
        before = chunks * b + self.block_r * self.block_r * size  # lora_B on its way, and what it is multiplied with
        if chunks == 1 and not target.products_from_shared:  # a single chunk is kept there all the same
            ahead += b
        return _total(max(ahead + more, before), target)


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
        a, b = (block * self.block_r * self.together * dtype.itemsize for block in (self.block_i, self.block_o))
        w = self.block_o * self.block_i * dtype.itemsize
        ahead = _buffers(self.stages, target, dtype, product=True)
        if target.backend == "hip":  # lora_B, the same in every step, is in registers
            return _total(ahead * a + w, target)
        return _total(ahead * (a + b + w), target) + SCRATCH


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
        hip, area = target.backend == "hip", self.block_t * self.block_o
        of_base = area * base_dtype.itemsize
        tile = of_base if hip else area * 4  # the product, as it changes threads to be written
        size = h_dtype.itemsize
        if h_dtype is torch.float32 and base_dtype.itemsize == 2:
            size *= 2  # high and low
        h, b = self.block_t * self.block_r * size, self.block_o * self.block_r * size
        ahead = _buffers(self.stages, target, base_dtype, product=True)
        if self.rows <= self.block_t:
            beside = b if base_dtype is torch.float32 else 0  # of one step alone, in Triton 3.6
            return _total(max(ahead * (h + b), tile + beside), target)
        if hip:  # lora_B, which stays, is in registers
            return _total(max(ahead * h + tile, b), target)
        change = _converted(of_base, target) // (2 if target.generation == 12 else 1)  # in two halves
        return _total(b + max(ahead * (h + of_base) + change, tile), target)


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
        if target.backend == "hip":
            return _total(self.block_o * self.warps * 4, target)  # sums over warps alone
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
        if target.backend == "hip":
            return _total(ahead * (tile + h), target)
        # dy once more, and inner: loaded a step later.
        behind = 2 * max(2, ahead - 1) if target.products_from_shared else ahead + 1
        behind += self.chunks > 1  # Triton 3.8 has one of these once more
        return _total(max(ahead * (tile + h) + behind * tile, self.block_o * self.block_r * 4), target)


@dataclasses.dataclass(frozen=True)
class MlpConfig(ColumnConfig):
    """The same with all ranks beside them; without products where ``block_r`` is 0."""

    block_r: int = 0

    def shared_memory(self, target: Target, dtype: torch.dtype = torch.bfloat16) -> int:
        """Bytes at most."""
        if not self.block_r:
            return super().shared_memory(target, dtype)
        factors, h = 2 * self.block_o * self.block_r * 2, 2 * self.block_t * self.block_r * 2
        tile = self.block_t * self.block_o * 2
        ahead = _buffers(self.stages, target, dtype, product=True)
        if target.backend == "hip":  # the factors one after the other, on their way to registers
            return _total(max(ahead * h + tile, factors // 2), target)
        return _total(factors + ahead * (2 * tile + h) + _converted(tile, target), target)


@dataclasses.dataclass(frozen=True)
class MlpBackwardConfig(MlpConfig):
    """The same; ``block_r`` is the ranks that are taken along."""

    def shared_memory(self, target: Target, dtype: torch.dtype = torch.bfloat16) -> int:
        """Bytes at most."""
        tile = self.block_t * self.block_o * 2
        if not self.block_r:
            more = _buffers(self.stages, target, dtype, product=False) * tile if target.backend == "cuda" else 0
            return super().shared_memory(target, dtype) + more
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
        if target.backend == "hip":
            return _total(ahead * (tile + h), target)
        behind = max(2, ahead - (size == 2))  # as of LoraBConfig
        pieces = 3 * self.block_t * self.block_r * 2 if h_dtype.itemsize > size else 0
        return _total(max(ahead * (tile + h) + behind * 2 * tile, self.block_o * self.block_r * 4) + pieces, target)


@dataclasses.dataclass(frozen=True)
class GateConfig(TileConfig):
    """The same of ``act(gate) * up``, with ``block_o`` columns of each; activations are of half precision."""

    def shared_memory(self, target: Target, h_dtype: torch.dtype) -> int:
        """Bytes at most."""
        h, b = (rows * self.block_r * h_dtype.itemsize for rows in (self.block_t, 2 * self.block_o))
        product = self.block_t * 2 * self.block_o * 4  # as it changes threads
        ahead = 1 if self.rows > self.block_t else _buffers(self.stages, target, torch.bfloat16, product=True)
        return _total(ahead * (h + b) + product, target)


@dataclasses.dataclass(frozen=True)
class GateBackwardConfig(SegmentConfig):
    """The same of ``act(gate) * up``, with ``block_o`` columns of each; activations are of half precision."""

    def shared_memory(self, target: Target, h_dtype: torch.dtype) -> int:
        """Bytes at most."""
        h = self.block_t * self.block_r * h_dtype.itemsize
        pieces = 3 * self.block_t * self.block_r * 2 if h_dtype is torch.float32 else 0
        tile = self.block_t * 2 * self.block_o * 6  # in float32 as it changes threads, and as products take it
        ahead = _buffers(self.stages, target, torch.bfloat16, product=True)
        return _total(max(ahead * h + pieces + tile, 2 * self.block_o * self.block_r * 4), target)


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
        size, wide = factor_dtype.itemsize, factor_dtype.itemsize > dtype.itemsize
        x, a = self.block_t * self.block_i * dtype.itemsize, self.block_r * self.block_i * size
        g = 2 * self.block_i * 4  # magnitudes and norms
        ahead = _buffers(self.stages, target, dtype, product=True)
        if target.backend == "hip":  # where what becomes three bfloat16 numbers is in registers
            return _total(ahead * (x + g) + (1 if wide else ahead) * a, target)
        # Times g, and three bfloat16 numbers for one of float32.
        pieces = self.block_r * self.block_i * (6 if wide else size)
        if dtype.itemsize == 2 and not target.products_from_shared:  # which are in registers
            pieces = 0
        return _total(max(ahead * (x + a + g) + pieces, self.block_t * self.block_r * 4), target)


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


def first_fitting(candidates: Iterable[_Config], target: Target, *of: object, programs: int = 1) -> _Config:
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


def fewer_stages(config: _Config, least: int = 2) -> list[_Config]:
    return [dataclasses.replace(config, stages=stages) for stages in range(config.stages, least - 1, -1)]


def power_of_two(value: int, low: int, high: int) -> int:
    """The least power of two that holds ``value``, between ``low`` and ``high``."""
    return max(low, min(high, 1 << max(0, value - 1).bit_length()))


def launchable(tokens: int, rows: int) -> int:
    """More rows to a strip where there would be more strips than a grid's second axis holds."""
    while -(-tokens // rows) > 65_535:
        rows *= 2
    return rows
