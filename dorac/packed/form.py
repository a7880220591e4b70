"""How kernels read a packed weight: the constants and strides that a format is made of."""

import dataclasses

from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Form:
    """The kernel's constants that a format is made of, and the strides of its scales.

    Beside it a format's ``form()`` gives the seven pieces that the kernel reads, None in place of those that it lacks:
    codes, table, scale, zero, and of quantised scales their table, scale and offset.
    """

    name: str  # of the decoding, see kernels/packed_tiles.py
    dtype: str
    halves: int = 1
    group: int = 1 << 30
    nested: int = 0
    rows: int = 1
    swizzled: bool = False
    strides: tuple[int, int, int, int] = (0, 1, 0, 0)  # expert, row, block; of the scale of scales


Pieces = tuple[Tensor | None, ...]


def alike(zero: Tensor | None, scale: Tensor) -> bool:
    """Whether the strides of the scale are those of the zero, too."""
    return zero is None or zero.stride() == scale.stride()
