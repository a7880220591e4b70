"""The product with a packed weight: of a dense copy, which is made again for backward and never kept.

``x W^T`` with W as its library makes it dense, rounded to the packed weight's dtype and cast to x's, as the library's
layer multiplies. bitsandbytes' 4-bit weights are made dense by its own kernels where it is imported, anything else by
the format's definition (``rows``), which is what is traced, too.
"""

import sys

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from dorac import packed
from dorac.ops import front

_tables = WeakTensorKeyDictionary()  # of a table of 4-bit numbers: its version, and the library's name for it


def dense(weight: Tensor | packed.Packed, dtype: torch.dtype) -> Tensor:
    """The weight ``[out, in]`` in ``dtype``; a dense one itself."""
    if not isinstance(weight, tuple):
        return weight.to(dtype)
    if type(weight) is packed.Bnb4bit and front.unobserved(but_by_modes=True) and front.all_eager(weight.codes):
        kind = _table(weight.code)
        if kind is not None:
            return _by_bitsandbytes(weight, kind).to(dtype)
    return weight.rows(0, weight.shape[0]).to(dtype)


def _table(code: Tensor) -> str | None:
    """What bitsandbytes calls these 16 numbers; None where it is not imported, or they are not its own."""
    library = sys.modules.get("bitsandbytes")
    if library is None or front.capturing():
        return None if library is None else _tables.get(code, (0, None))[1]
    version, kind = _tables.get(code, (None, None))
    if version is None or version != _version(code):
        names = (n for n in ("nf4", "fp4") if torch.equal(code, library.functional.get_4bit_type(n, code.device)))
        kind = next(names, None)
        _tables[code] = _version(code), kind
    return kind


def _by_bitsandbytes(weight: packed.Bnb4bit, kind: str) -> Tensor:
    absmax = weight.absmax
    if weight.nested_code is not None:
        sizes = weight.nested_blocksize, torch.float32
        nested = weight.nested_absmax, weight.nested_code, *sizes
        absmax = torch.ops.bitsandbytes.dequantize_blockwise(absmax, *nested) + weight.nested_offset
    return torch.ops.bitsandbytes.dequantize_4bit(
        weight.codes, absmax, weight.blocksize, kind, weight.shape, weight.dtype
    )


def _version(tensor: Tensor | None) -> int:
    return 0 if tensor is None or tensor.is_inference() else tensor._version


class Held:
    """A packed weight that backward reads again, and refuses, as autograd does, where it has been written to."""

    __slots__ = ("versions", "weight")

    def __init__(self, weight: packed.Packed) -> None:
        self.weight, self.versions = weight, [_version(t) for t in weight[: weight.PIECES]]

    def dense(self, dtype: torch.dtype) -> Tensor:
        weight = self.weight
        if [_version(t) for t in weight[: weight.PIECES]] != self.versions:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: the "
                f"{weight.NAME} {list(weight.shape)} of a layer"
            )
        return dense(weight, dtype)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.held = Held(weight)
        return F.linear(x, dense(weight, x.dtype))

    @staticmethod
    def backward(ctx, dy):
        with front.autocast_off(dy):
            return dy @ ctx.held.dense(dy.dtype), None


def product(x: Tensor, weight: packed.Packed) -> Tensor:
    """``x W^T [*, out]`` in x's dtype, under autocast in autocast's."""
    if (dtype := front.autocast_dtype(x)) is not None and x.dtype is not torch.float64:
        x = x.to(dtype)
    with front.autocast_off(x):
        if x.requires_grad and torch.is_grad_enabled() and front.unobserved(but_by_modes=True):
            return _Product.apply(x, weight)
        return F.linear(x, dense(weight, x.dtype))
