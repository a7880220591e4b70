"""Which packed weights the kernels read, and how: the constants and strides that a format is made of."""

import dataclasses

import torch
from torch import Tensor

from dorac import packed


@dataclasses.dataclass(frozen=True)
class Form:
    """The kernel's constants that a format is made of, and the strides of its scales."""

    name: str
    dtype: str
    halves: int = 1
    group: int = 1 << 30
    nested: int = 0
    rows: int = 1
    swizzled: bool = False
    strides: tuple[int, int, int, int] = (0, 1, 0, 0)  # expert, row, block; of the scale of scales


def described(weight: packed.Packed) -> tuple[Form, tuple[Tensor | None, ...]] | None:
    """How the kernel reads a weight: its form and the seven pieces. None: it does not."""
    kind, dtype = type(weight), str(weight.dtype).removeprefix("torch.")
    *experts, _, in_features = weight.shape
    codes, scale, none = weight.codes, weight[1], None
    if not codes.is_contiguous():
        return None
    if kind is packed.Bnb4bit:
        nested, block = weight.nested_blocksize, weight.blocksize
        if in_features % block or nested & (nested - 1):
            return None  # blocks reach over the end of a row
        form = Form("bnb_4bit", dtype, 2, block // 2, nested, strides=(0, in_features // block, 1, 0))
        return form, (codes.view(torch.uint8), weight.code, scale, none, *weight[3 : weight.PIECES])
    if kind is packed.BnbInt8:
        return Form("bnb_int8", dtype), (codes, none, scale, none, none, none, none)
    if kind is packed.Scaled8bit:
        block = weight.block_columns
        whole = block >= in_features
        if (block & (block - 1) and not whole) or not _alike(weight.zero, scale):
            return None
        strides = scale.stride(0) if experts else 0, *scale.stride()[-2:], 0
        form = Form("number", dtype, 1, 1 << 30 if whole else block, rows=weight.block_rows, strides=strides)
        return form, (codes, none, scale, weight.zero, none, none, none)
    if kind is packed.TorchaoInt4:
        block = weight.block
        if block & (block - 1) or not _alike(weight.zero, scale):
            return None
        strides = scale.stride(0) if experts else 0, scale.stride(-1), scale.stride(-2), 0
        form = Form("int4", dtype, 2, block // 2, strides=strides)
        return form, (codes.view(torch.uint8), none, scale, weight.zero, none, none, none)
    if kind is packed.Mxfp4:
        strides = scale.stride(0) if experts else 0, *scale.stride()[-2:], 0
        return Form("mxfp4", dtype, 2, 16, strides=strides), (codes, none, scale, none, none, none, none)
    if kind is packed.Nvfp4:
        whole = weight.tensor_scale
        of_whole = 1 if whole is not None and whole.ndim else 0
        if weight.swizzled:
            strides = 0, -(-in_features // 64), 1, of_whole
        else:
            strides = scale.stride(0) if experts else 0, *scale.stride()[-2:], of_whole
        form = Form("nvfp4", dtype, 2, 8, swizzled=bool(weight.swizzled), strides=strides)
        return form, (codes.view(torch.uint8), none, scale, none, none, whole, none)
    return None


def _alike(zero: Tensor | None, scale: Tensor) -> bool:
    return zero is None or zero.stride() == scale.stride()


def has_kernel(weight: packed.Packed) -> bool:
    """Whether the kernel reads this weight."""
    return described(weight) is not None
