"""bitsandbytes int8 (LLM.int8()): one scale per row."""

from typing import NamedTuple

import torch
from torch import Tensor

from dorac.packed.pieces import check_piece

PER_127 = 7.874015718698502e-3  # 1 / 127 as bitsandbytes writes it


class BnbInt8(NamedTuple):
    """``w = CB * SCB / 127``.

    Attributes:
        codes: CB ``[out, in]`` int8. scale: SCB ``[out]`` float32.
        shape: ``(out, in)``. dtype: float32, what ``int8_vectorwise_dequant`` returns.
    """

    codes: Tensor
    scale: Tensor
    shape: tuple[int, int]
    dtype: torch.dtype

    NAME = "bitsandbytes int8 weight"
    PIECES = 2
    SCRATCH = 8  # bytes that rows() takes per element

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
        if len(self.shape) != 2:
            raise ValueError(f"{self.NAME}: expected a shape [out, in], got {list(self.shape)}")
        check_piece(self.NAME, "codes (CB)", self.codes, (torch.int8,), self.shape, self.codes)
        check_piece(self.NAME, "scale (SCB)", self.scale, (torch.float32,), self.shape[:1], self.codes)

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` as ``int8_vectorwise_dequant`` has them, bit for bit."""
        return self.codes[start:stop] * self.scale[start:stop, None] * PER_127
