"""torchao's int4 in its plain layout: two numbers in a byte, the first in its low half, with a scale and a zero."""

from typing import NamedTuple

import torch
from torch import Tensor

from dorac.packed.pieces import check_piece, looked_up, repeated, scaled


class TorchaoInt4(NamedTuple):
    """``w = q * scale + zero``, rounded to ``dtype``; q from -8 to 7.

    Attributes:
        codes: ``[(E,) out, in / 2]`` int8 or uint8.
        scale, zero: ``[(E,) in / block, out]``, columns before rows, in ``dtype``.
        shape: of the weight. dtype: of scale and zero, and of the tensor. block: columns of a scale.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype
    block: int

    NAME = "torchao int4 weight"
    PIECES = 3
    SCRATCH = 16  # bytes that rows() takes per element

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
        if len(self.shape) not in (2, 3) or self.shape[-1] % 2 or self.block < 2:
            raise ValueError(
                f"{name}: expected a shape [out, in], or [E, out, in], with an even in, and a block size of at least "
                f"2, got {list(self.shape)} and {self.block}"
            )
        *experts, out_features, in_features = self.shape
        codes = (*experts, out_features, in_features // 2)
        check_piece(name, "codes", self.codes, (torch.int8, torch.uint8), codes, self.codes)
        blocks = (*experts, -(-in_features // self.block), out_features)
        for piece, tensor in (("scale", self.scale), ("zero", self.zero)):
            check_piece(name, piece, tensor, (self.dtype,), blocks, self.codes)

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop``, of every expert."""
        table = ((torch.arange(16, dtype=torch.int32, device=self.codes.device) ^ 8) - 8).float()
        values = looked_up(self.codes[..., start:stop, :].view(torch.uint8), table, high_first=False)
        scale, zero = (t[..., start:stop].mT.float() for t in (self.scale, self.zero))
        return (scaled(values, scale, self.block) + repeated(zero, self.block, self.shape[-1])).to(self.dtype)
