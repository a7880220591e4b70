"""int8 and float8 numbers with one scale per row, group of columns, block or matrix: torchao's, and transformers' FP8.

torchao's linear layer with one scale per row multiplies with the numbers and scales the product, and so does float8's:
the weight is number times scale, not rounded. With groups it multiplies with the dequantised weight, which is.
"""

import sys
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dorac.packed.form import Form, Pieces, alike
from dorac.packed.holder import LEAST, Holder, finite, frozen
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

    def form(self) -> tuple[Form, Pieces] | None:
        """See :meth:`dorac.packed.Bnb4bit.form`."""
        block, scale = self.block_columns, self.scale
        whole = block >= self.shape[-1]
        if (block & (block - 1) and not whole) or not self.codes.is_contiguous() or not alike(self.zero, scale):
            return None
        dtype = str(self.dtype).removeprefix("torch.")
        strides = scale.stride(0) if len(self.shape) == 3 else 0, *scale.stride()[-2:], 0
        form = Form("number", dtype, 1, 1 << 30 if whole else block, rows=self.block_rows, strides=strides)
        return form, (self.codes, None, scale, self.zero, None, None, None)

    def _of_rows(self, blocks: Tensor, start: int, stop: int) -> Tensor:
        """Of each row the blocks that it lies in."""
        size = self.block_rows
        blocks = blocks[..., start // size : -(-stop // size), :]
        if size == 1:
            return blocks
        rows = repeated(blocks.mT, min(size, self.shape[-2])).mT  # a block may be taller than the weight
        return rows[..., start % size :, :][..., : stop - start, :]


def _read(weight: Tensor, _: object) -> Scaled8bit | None:
    if getattr(weight, "act_pre_scale", None) is not None:
        return None
    shape, scale = tuple(weight.qdata.shape), weight.scale
    if weight.block_size:
        block_rows, block_columns = weight.block_size[-2:]
    else:
        block_rows, block_columns = shape[-2:]
    if scale.dtype is not torch.float32:
        scale = scale.float()
    scale = scale.reshape(*shape[:-2], -(-shape[-2] // block_rows), -(-shape[-1] // block_columns))
    grouped = weight.qdata.dtype is torch.int8 and block_columns < shape[-1]
    zero = weight.zero_point.reshape(scale.shape) if grouped and weight.zero_point is not None else None
    dtype = weight.dtype if grouped else torch.float32
    return Scaled8bit(weight.qdata, scale, zero, shape, dtype, block_rows, block_columns)


def _read_fp8_linear(weight: Tensor, source: nn.Module) -> Scaled8bit | None:
    if weight.element_size() > 1:
        return None  # dense
    shape = tuple(weight.shape)
    block_rows, block_columns = source.block_size or shape
    scale = source.weight_scale_inv.detach().float()
    scale = scale.reshape(-(-shape[0] // block_rows), -(-shape[1] // block_columns))
    return Scaled8bit(weight.detach(), scale, None, shape, torch.float32, block_rows, block_columns)


def _granularity(block: list[int] | None, shape: torch.Size) -> object:
    """torchao's, of which a scale covers ``block``."""
    classes = sys.modules["torchao.quantization.granularity"]
    if not block or list(block) == list(shape):
        return classes.PerTensor()
    if block[0] > 1:
        return classes.PerBlock(list(block))
    return classes.PerRow() if block[1] == shape[1] else classes.PerGroup(block[1])


def _int8(module: nn.Module, dense: Tensor) -> dict[str, object]:
    old = module.weight
    options = {}
    if old.zero_point is not None and old.zero_point.any():
        mapping = sys.modules["torchao.quantization.quant_primitives"].MappingType
        options["mapping_type"] = mapping.ASYMMETRIC
    granularity = _granularity(old.block_size, old.shape)
    return frozen(type(old).from_hp(finite(dense, old.dtype), granularity, **options))


def _float8(module: nn.Module, dense: Tensor) -> dict[str, object]:
    old = module.weight
    options = {} if old.kernel_preference.name == "MSLK" else {"hp_value_lb": LEAST}  # which MSLK's kernels do not take
    new = type(old).from_hp(
        finite(dense, old.dtype),
        float8_dtype=old.qdata.dtype,
        granularity=_granularity(old.block_size, old.shape),
        mm_config=old.mm_config,
        kernel_preference=old.kernel_preference,
        **options,
    )
    return frozen(new)


INT8 = Holder("torchao int8 weight", read=_read, requantised=_int8)
FLOAT8 = Holder("torchao float8 weight", read=_read, requantised=_float8)
FP8_LINEAR = Holder("float8 weight of transformers", read=_read_fp8_linear, differentiable=False)
