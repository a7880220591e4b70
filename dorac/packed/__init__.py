"""Packed weights: what quantised layers of other libraries keep, as pure values of tensors.

A value is a ``NamedTuple`` of the pieces as they lie in memory, a pytree that the compiler traces, with ``shape``,
``dtype``, ``device``, ``rows(start, stop)``, the dense rows that the layer multiplies with, ``check()`` and ``form()``,
how kernels read it. :func:`of` recognises what a module or a weight holds, :func:`holder` the layers that hold one,
both without importing the library that made it. A format is a file of its own and its lines in ``formats.py``.
"""

import torch

from dorac.packed.bnb_4bit import Bnb4bit, Bnb4bitCpu
from dorac.packed.bnb_int8 import BnbInt8
from dorac.packed.float4 import Mxfp4, Nvfp4
from dorac.packed.form import Form
from dorac.packed.formats import FORMATS, HOLDERS, Packed
from dorac.packed.holder import Holder
from dorac.packed.recognise import IN_PARTS, holder, of, restore, stored, unreadable, weight_of
from dorac.packed.scaled_8bit import Scaled8bit
from dorac.packed.torchao_int4 import TorchaoInt4


def is_packed(weight: object) -> bool:
    """Whether ``weight`` is one of these values."""
    return isinstance(weight, tuple) and FORMATS.get(type(weight).__name__) is type(weight)


def flatten(weight: Packed) -> tuple:
    """``(format, pieces, shape, dtype, sizes)``, what an op takes in place of the value."""
    pieces = type(weight).PIECES
    return type(weight).__name__, list(weight[:pieces]), list(weight.shape), weight.dtype, list(weight[pieces + 2 :])


def unflatten(kind: str, pieces: list, shape: list[int], dtype: torch.dtype, sizes: list[int]) -> Packed:
    """The value that :func:`flatten` took apart."""
    return FORMATS[kind](*pieces, tuple(shape), dtype, *sizes)


__all__ = [
    "FORMATS",
    "HOLDERS",
    "IN_PARTS",
    "Bnb4bit",
    "Bnb4bitCpu",
    "BnbInt8",
    "Form",
    "Holder",
    "Mxfp4",
    "Nvfp4",
    "Packed",
    "Scaled8bit",
    "TorchaoInt4",
    "flatten",
    "holder",
    "is_packed",
    "of",
    "restore",
    "stored",
    "unflatten",
    "unreadable",
    "weight_of",
]
