"""int8 and float8 numbers with one scale per row, group of columns, block or matrix: torchao's, and transformers' FP8.

torchao's linear layer with one scale per row multiplies with the numbers and scales the product, and so does float8's:
the weight is number times scale, not rounded. With groups it multiplies with the dequantised weight, which is.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dorac.packed.pieces import check_piece, repeated, scaled

NUMBERS = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)


class Scaled8bit(NamedTuple):
    """``w = (q - zero) * scale``, rounded to ``dtype``.

    Attributes:
        codes: q ``[(E,) out, in]``, int8 or float8.
        scale: ``[(E,) out / block_rows, in / block_columns]`` rounded up, float32.
        zero: int8 with the shape of scale, or None.
        shape: of the weight. dtype: float32 for number times scale; or what its dequantisation returns.
        block_rows, block_columns: of a scale.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    shape: tuple[int, ...]
    dtype: torch.dtype
    block_rows: int
    block_columns: int

    NAME = "int8 or float8 weight"
    PIECES = 3
    SCRATCH = 12  # bytes that rows() takes per element

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def check(self) -> None:
        """Whether the pieces fit together.

        Raises:
            TypeError, ValueError: with what does not fit.
        """
        name = self.NAME
        if len(self.shape) not in (2, 3) or not self.dtype.is_floating_point:
            raise ValueError(f"{name}: expected a shape [out, in], or [E, out, in], got {list(self.shape)}")
        if self.block_rows < 1 or self.block_columns < 1:
            raise ValueError(f"{name}: got a block of {self.block_rows} x {self.block_columns}")
        *experts, out_features, in_features = self.shape
        check_piece(name, "codes", self.codes, NUMBERS, self.shape, self.codes)
        blocks = (*experts, -(-out_features // self.block_rows), -(-in_features // self.block_columns))
        check_piece(name, "scale", self.scale, (torch.float32,), blocks, self.codes)
        if self.zero is not None:
            check_piece(name, "zero", self.zero, (torch.int8,), blocks, self.codes)

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop``, of every expert."""
        values, columns = self.codes[..., start:stop, :].float(), self.shape[-1]
        if self.zero is not None:
            values = values - repeated(self._of_rows(self.zero, start, stop).float(), self.block_columns, columns)
        scale = self._of_rows(self.scale, start, stop)
        return scaled(values, scale, min(self.block_columns, columns)).to(self.dtype)

    def _of_rows(self, blocks: Tensor, start: int, stop: int) -> Tensor:
        """Of each row the blocks that it lies in."""
        size = self.block_rows
        blocks = blocks[..., start // size : -(-stop // size), :]
        if size == 1:
            return blocks
        rows = repeated(blocks.mT, min(size, self.shape[-2])).mT  # a block may be taller than the weight
        return rows[..., start % size :, :][..., : stop - start, :]
