"""torchao's int4 in its plain layout: two numbers in a byte, the first in its low half, with a scale and a zero."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from dorac.packed.form import Form, Pieces, alike
from dorac.packed.holder import Holder, finite, frozen
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

    def form(self) -> tuple[Form, Pieces] | None:
        """See :meth:`dorac.packed.Bnb4bit.form`."""
        block, scale = self.block, self.scale
        if block & (block - 1) or not self.codes.is_contiguous() or not alike(self.zero, scale):
            return None
        strides = scale.stride(0) if len(self.shape) == 3 else 0, scale.stride(-1), scale.stride(-2), 0
        form = Form("int4", str(self.dtype).removeprefix("torch."), 2, block // 2, strides=strides)
        return form, (self.codes.view(torch.uint8), None, scale, self.zero, None, None, None)


def _read(weight: Tensor, _: object) -> TorchaoInt4 | None:
    if weight.act_pre_scale is not None:
        return None
    return TorchaoInt4(
        weight.qdata, weight.scale, weight.zero_point, tuple(weight.shape), weight.dtype, weight.block_size[-1]
    )


def _requantised(module: nn.Module, dense: Tensor) -> dict[str, object]:
    old = module.weight
    try:
        new = type(old).from_hp(finite(dense, old.dtype), list(old.block_size), activation_dtype=old.activation_dtype)
    except ImportError as error:  # of the package that has the kernels
        raise ValueError(f"torchao cannot quantise to int4 here: {error}") from None
    return frozen(new)


HOLDER = Holder("torchao int4 weight", read=_read, requantised=_requantised, differentiable=False)
