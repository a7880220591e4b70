"""bitsandbytes nf4 and fp4: 4-bit numbers of a table of 16, one scale per block, which may be quantised itself.

The numbers of all rows follow one another, two in a byte, the first in its high half; so do the blocks. In eval mode a
layer on a CPU with bf16 instructions packs its weight again, for these.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from dorac.packed.form import Form, Pieces
from dorac.packed.holder import Holder, class_beside, finite, unquantised
from dorac.packed.pieces import check_piece, check_size, looked_up, repeated, scaled

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)


class Bnb4bit(NamedTuple):
    """``w = code[q] * absmax``, rounded to ``dtype``; with nested statistics ``absmax = nested_code[absmax] *
    nested_absmax + nested_offset``.

    Attributes:
        codes: out x in / 2 bytes, in whatever shape and dtype.
        absmax: ``[blocks]``, float32; uint8 where nested.
        code: ``[16]`` float32, nf4's or fp4's.
        nested_code: ``[256]`` float32, or None. nested_absmax: one per ``nested_blocksize`` of absmax.
        nested_offset: float32, 0-d.
        shape: ``(out, in)``. dtype: what ``dequantize_4bit`` returns. blocksize: elements of one absmax.
    """

    codes: Tensor
    absmax: Tensor
    code: Tensor
    nested_code: Tensor | None
    nested_absmax: Tensor | None
    nested_offset: Tensor | None
    shape: tuple[int, int]
    dtype: torch.dtype
    blocksize: int
    nested_blocksize: int

    NAME = "bitsandbytes 4-bit weight"
    PIECES = 6
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
        if len(self.shape) != 2 or self.dtype not in FLOATS or self.blocksize not in BLOCK_SIZES:
            raise ValueError(
                f"{name}: expected a shape [out, in], a 16 or 32-bit float dtype and a block size of {BLOCK_SIZES}, "
                f"got {list(self.shape)}, {self.dtype} and {self.blocksize}"
            )
        numel = self.shape[0] * self.shape[1]
        check_piece(name, "codes", self.codes, (torch.uint8, *FLOATS), self.codes.shape, self.codes)
        check_size(name, "codes", self.codes, -(-numel // 2) // self.codes.element_size())
        check_piece(name, "code", self.code, (torch.float32,), (16,), self.codes)
        blocks = -(-numel // self.blocksize)
        nested = [self.nested_code is None, self.nested_absmax is None, self.nested_offset is None]
        if any(nested) != all(nested):
            raise ValueError(f"{name}: of the nested statistics (code, absmax, offset) some are missing")
        if all(nested):
            if self.absmax.dtype is torch.uint8:
                raise ValueError(f"{name}: absmax is uint8, but its nested statistics are missing")
            check_piece(name, "absmax", self.absmax, (torch.float32,), (blocks,), self.codes)
            return
        check_piece(name, "absmax", self.absmax, (torch.uint8,), (blocks,), self.codes)
        check_piece(name, "nested_code", self.nested_code, (torch.float32,), (256,), self.codes)
        if self.nested_blocksize < 1:
            raise ValueError(f"{name}: nested_blocksize must be at least 1, got {self.nested_blocksize}")
        groups = (-(-blocks // self.nested_blocksize),)
        check_piece(name, "nested_absmax", self.nested_absmax, (torch.float32,), groups, self.codes)
        check_piece(name, "nested_offset", self.nested_offset, (torch.float32,), (), self.codes)

    def scales(self, start: int, stop: int) -> Tensor:
        """The absmax of blocks ``start`` to ``stop``, float32."""
        absmax = self.absmax[start:stop]
        if self.nested_code is None:
            return absmax
        size = self.nested_blocksize
        groups = self.nested_absmax[start // size : -(-stop // size)]
        groups = repeated(groups, size)[start % size :][: stop - start]
        return self.nested_code.index_select(0, absmax.int()) * groups + self.nested_offset

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` as ``dequantize_4bit`` has them, bit for bit."""
        in_features, size = self.shape[1], self.blocksize
        first, last = start * in_features, stop * in_features
        packed = self.codes.reshape(-1).view(torch.uint8)[first // 2 : -(-last // 2)]
        values = looked_up(packed, self.code, high_first=True)[first % 2 :][: last - first]
        scales = self.scales(first // size, -(-last // size))
        if first % size:
            values = values * repeated(scales, size)[first % size :][: last - first]
        else:
            values = scaled(values, scales, size)
        return values.to(self.dtype).view(stop - start, in_features)

    def form(self) -> tuple[Form, Pieces] | None:
        """How the kernel reads it; None: it does not."""
        in_features, block, nested = self.shape[1], self.blocksize, self.nested_blocksize
        if in_features % block or nested & (nested - 1) or not self.codes.is_contiguous():
            return None  # blocks reach over the end of a row
        dtype = str(self.dtype).removeprefix("torch.")
        form = Form("bnb_4bit", dtype, 2, block // 2, nested, strides=(0, in_features // block, 1, 0))
        nested_pieces = self.nested_code, self.nested_absmax, self.nested_offset
        return form, (self.codes.view(torch.uint8), self.code, self.absmax, None, *nested_pieces)


class Bnb4bitCpu(NamedTuple):
    """The 4-bit weight as a layer in eval mode packs it for the CPU's bf16 instructions: 32 rows beside one another.

    The product there is that with ``bfloat16(code[q]) * absmax``, not rounded again.

    Attributes:
        codes: ``[out, in / 2]`` uint8: of every 32 rows the bytes of each pair of columns follow one another, and the
            numbers of 16 rows are the low halves of what holds those of the next 16 in its high halves.
        absmax: ``[in / blocksize, out]`` bfloat16.
        code: ``[16]`` float32.
        shape: ``(out, in)``. dtype: float32, which holds the products. blocksize: elements of one absmax.
    """

    codes: Tensor
    absmax: Tensor
    code: Tensor
    shape: tuple[int, int]
    dtype: torch.dtype
    blocksize: int

    NAME = "bitsandbytes 4-bit weight, packed for the CPU"
    PIECES = 3
    SCRATCH = 12

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def check(self) -> None:
        """See :meth:`Bnb4bit.check`."""
        name = self.NAME
        if len(self.shape) != 2 or self.shape[0] % 32 or self.shape[1] % 2 or self.shape[1] % self.blocksize:
            raise ValueError(
                f"{name}: expected a shape [out, in] with out a multiple of 32 and in of the block size, "
                f"got {list(self.shape)} and {self.blocksize}"
            )
        out_features, in_features = self.shape
        check_piece(name, "codes", self.codes, (torch.uint8,), (out_features, in_features // 2), self.codes)
        blocks = (in_features // self.blocksize, out_features)
        check_piece(name, "absmax", self.absmax, (torch.bfloat16,), blocks, self.codes)
        check_piece(name, "code", self.code, (torch.float32,), (16,), self.codes)

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop``, float32."""
        first, last = start // 32, -(-stop // 32)
        half = self.shape[1] // 2
        packed = self.codes[first * 32 : last * 32].reshape(last - first, half, 32)
        # Each 32 bytes hold [32 rows, 2 columns], the first half of these in the low nibbles.
        numbers = torch.cat([packed & 15, packed >> 4], dim=-1).view(last - first, half, 32, 2)
        numbers = numbers.transpose(1, 2).reshape((last - first) * 32, 2 * half)[start % 32 :][: stop - start]
        values = self.code.to(torch.bfloat16).float().index_select(0, numbers.int().flatten()).view(numbers.shape)
        return scaled(values, self.absmax.mT[start:stop].float(), self.blocksize)

    def form(self) -> None:
        """No kernel reads it."""


def _read(weight: Tensor, source: nn.Module | Tensor) -> Bnb4bit | Bnb4bitCpu:
    state = getattr(weight, "quant_state", None)
    if state is None:  # the parameter was converted, by FSDP for one; the layer keeps the state too
        state = getattr(source, "quant_state", None)
    if state is None:
        raise ValueError(unquantised("4-bit", source))
    with torch._C.DisableTorchFunctionSubclass():  # through which it answers slowly
        codes = weight.data
    shape = tuple(state.shape)
    if getattr(state, "packing_format_for_cpu", False):
        return Bnb4bitCpu(codes, state.absmax, state.code, shape, torch.float32, state.blocksize)
    nested = state.state2 if state.nested else None
    if nested is None:
        return Bnb4bit(codes, state.absmax, state.code, None, None, None, shape, state.dtype, state.blocksize, 0)
    return Bnb4bit(
        codes,
        state.absmax,
        state.code,
        nested.code,
        nested.absmax,
        state.offset,
        shape,
        state.dtype,
        state.blocksize,
        nested.blocksize,
    )


def _requantised(module: nn.Module, dense: Tensor) -> dict[str, object]:
    old = module.weight
    state = getattr(old, "quant_state", None) or module.quant_state
    options = {name: getattr(old, name) for name in ("blocksize", "compress_statistics", "quant_type", "quant_storage")}
    new = class_beside(module, "Linear4bit", "Params4bit")(
        finite(dense, state.dtype), requires_grad=False, **options
    ).to(old.device)
    new.module = module  # which has the state too
    return {"weight": new, "quant_state": new.quant_state}


HOLDER = Holder("bitsandbytes 4-bit weight", read=_read, requantised=_requantised)
