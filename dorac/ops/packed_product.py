"""Packed weights in eager: how they are held for backward, made dense, and multiplied with.

A product is of a dense copy, which is made again for backward and never kept.

``x W^T`` with W as its library makes it dense, rounded to the packed weight's dtype and cast to x's, as the library's
layer multiplies. A kernel makes it dense in one pass (``kernels/packed_dense.py``). Where none may, bitsandbytes' own
kernels do for its 4-bit weights where it is imported, and else the format's definition (``rows``), which is what is
traced, too. All give the same bits.
"""

import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from dorac import packed
from dorac.ops import eager, eager_plan, front

_NESTED_BLOCK = 64  # the smallest that the library's kernels for a GPU read right; it makes blocks of 256
_tables = WeakTensorKeyDictionary()  # of a table of 4-bit numbers: its version, and the library's name for it


def dense(weight: "packed.Packed | Held", dtype: torch.dtype) -> Tensor:
    """The weight ``[out, in]`` in ``dtype``."""
    held = weight if type(weight) is Held else Held(weight)
    if front.unobserved() and (made := _by_kernel(held, dtype)) is not None:
        return made
    weight = held.weight
    if type(weight) is packed.Bnb4bit and front.unobserved(but_by_modes=True) and front.all_eager(weight.codes):
        kind = None if 0 < weight.nested_blocksize < _NESTED_BLOCK else _table(weight.code)
        if kind is not None:
            return _by_bitsandbytes(weight, kind).to(dtype)
    return weight.rows(0, weight.shape[0]).to(dtype)


def _by_kernel(held: "Held", dtype: torch.dtype) -> Tensor | None:
    """None where no kernel of ours reads it, or writes this dtype."""
    reading = held.reading()
    if reading is None or not reading.aligned:
        return None
    key = "dense", reading.key, dtype
    launch = eager.plans.get(key, False)
    if launch is False:
        launch = eager.keep_plan(key, _launch(reading.form, held.shape, dtype))
    if launch is None:
        return None
    made = torch.empty(held.shape, dtype=dtype, device=reading.pieces[0].device)
    launch(*reading.pieces, made)
    return made


def _launch(form: packed.Form, shape: tuple[int, int], dtype: torch.dtype) -> Callable | None:
    if dtype.itemsize > 4 or 0 in shape:
        return None

    from dorac.kernels.packed_dense import packed_dense_launch

    rows, columns = shape[0], shape[1] // form.halves
    return eager_plan.bound(packed_dense_launch(1, rows, columns, 0, rows, form))


def _table(code: Tensor) -> str | None:
    """What bitsandbytes calls these 16 numbers; None where it is not imported, or they are not its own."""
    library = sys.modules.get("bitsandbytes")
    if library is None or front.capturing():
        return None if library is None else _tables.get(code, (0, None))[1]
    seen_at, kind = _tables.get(code, (None, None))
    if seen_at is None or seen_at != version(code):
        names = (n for n in ("nf4", "fp4") if torch.equal(code, library.functional.get_4bit_type(n, code.device)))
        kind = next(names, None)
        _tables[code] = version(code), kind
    return kind


def _by_bitsandbytes(weight: packed.Bnb4bit, kind: str) -> Tensor:
    absmax, library = weight.absmax, torch.ops.bitsandbytes
    if weight.nested_code is not None:
        nested = weight.nested_absmax, weight.nested_code, weight.nested_blocksize
        absmax = library.dequantize_blockwise.default(absmax, *nested, torch.float32) + weight.nested_offset
    return library.dequantize_4bit.default(weight.codes, absmax, weight.blocksize, kind, weight.shape, weight.dtype)


def version(tensor: Tensor | None) -> int:
    """0 of one that has none."""
    return 0 if tensor is None or tensor.is_inference() else tensor._version


class Reading(NamedTuple):
    """How kernels read a packed weight."""

    key: object  # as Held.key, for plans that depend on this, too
    form: object
    pieces: tuple[Tensor | None, ...]
    aligned: bool  # these, to 16 bytes


class Held:
    """A packed weight that is looked at once for many calls, in its place in a projection or in ``dora_over``.

    Backward reads it again, and refuses, as autograd does, one that has been written to. It is held, not saved: each of
    its many tensors would take the time that saving takes, most of all under a checkpoint.
    """

    __slots__ = ("_key", "_reading", "versions", "weight")

    def __init__(self, weight: packed.Packed) -> None:
        self.weight, self.versions = weight, [version(t) for t in weight[: weight.PIECES]]
        self._key = self._reading = None

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def key(self) -> object:
        """The same of two weights that are alike in all that checks and plans depend on."""
        if self._key is None:
            weight = self.weight
            of_pieces = [t if t is None else (t.shape, t.dtype, t.device) for t in weight[: weight.PIECES]]
            self._key = _interned((type(weight), *weight[weight.PIECES :], *of_pieces))
        return self._key

    def reading(self) -> Reading | None:
        """None where no kernel reads it."""
        if self._reading is None:
            self._reading = _reading(self) or False
        return self._reading or None

    def _unchanged(self) -> None:
        weight = self.weight
        if [version(t) for t in weight[: weight.PIECES]] != self.versions:
            raise RuntimeError(MODIFIED.format(weight.NAME, list(weight.shape)))

    def dense(self, dtype: torch.dtype) -> Tensor:
        """For backward."""
        self._unchanged()
        return dense(self, dtype)

    def read(self) -> tuple[Tensor | None, ...]:
        """For backward: the pieces that kernels read."""
        self._unchanged()
        return self.reading().pieces


MODIFIED = (
    "one of the variables needed for gradient computation has been modified by an inplace operation: the {} {} of a "
    "layer"
)


def forward_dense(weight: Tensor | Held, dtype: torch.dtype) -> Tensor:
    """For forward; a dense weight itself."""
    return dense(weight, dtype) if type(weight) is Held else weight


def backward_dense(weight: Tensor | Held, dtype: torch.dtype) -> Tensor:
    """As :func:`forward_dense`, for backward."""
    return weight.dense(dtype) if type(weight) is Held else weight


_keys: dict[tuple, object] = {}
_KEYS = 4096  # kept; beyond, all are dropped


def _interned(metadata: tuple) -> object:
    """What stands for this in the keys of plans, where it would be hashed in every call."""
    if len(_keys) >= _KEYS:
        _keys.clear()
    return _keys.setdefault(metadata, object())


def _reading(held: Held) -> Reading | None:
    weight = held.weight
    if len(weight.shape) != 2 or not front.has_packed_kernels(*weight[: weight.PIECES]):
        return None
    found = weight.form()
    if found is None:
        return None
    form, pieces = found
    bits = 0
    for tensor in pieces:
        if tensor is not None:
            bits |= tensor.data_ptr()
    aligned = not bits & 15
    return Reading(_interned((held.key, form, aligned)), form, pieces, aligned)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.held = Held(weight)
        return F.linear(x, dense(ctx.held, x.dtype))

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
