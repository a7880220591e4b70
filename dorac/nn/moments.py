"""Where tensors lie and how often they were written: by what an eager forward sees that a kept norm has passed.

A write through ``.data`` leaves no trace in either: see :mod:`dorac.nn.norm_cache`.
"""

import weakref
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dorac import packed
from dorac.dense import PLAIN
from dorac.ops import front
from dorac.ops.packed_product import Held

plainly = torch._C.DisableTorchFunctionSubclass  # some packed weights answer slowly through their __torch_function__


class Moment:
    """The state of tensors, as far as the host sees it: where they lie, their versions, and the grad mode."""

    __slots__ = ("grad_mode", "is_shared", "places", "spread", "state", "storages")

    def __init__(self, tensors: Sequence[Tensor], grad_mode: bool | None = None) -> None:
        self.places = [i for i, tensor in enumerate(tensors) if _has_memory(tensor)]
        self.spread = any(_part(tensors[i]) is not tensors[i] for i in self.places)
        self.state = self._of(tensors)
        self.storages = [weakref.ref(_part(tensors[i]).untyped_storage()) for i in self.places]
        # Whether other processes may write to them, which leaves no trace here. On a GPU every tensor says so.
        parts = [_part(tensors[i]) for i in self.places]
        self.is_shared = any(part.device.type == "cpu" and part.is_shared() for part in parts)
        self.grad_mode = grad_mode  # of the last eager forward; None: it is yet to come

    def _of(self, tensors: Sequence[Tensor]) -> tuple:
        """Flat: what lies apart in memory takes its time in every forward."""
        tensors = [tensors[i] for i in self.places]
        # Of DTensors, which have no memory of their own: see _part.
        parts = [getattr(t, "_local_tensor", t) for t in tensors] if self.spread else tensors
        try:
            state = *map(_address, parts), *map(_written, tensors), *map(_strides, tensors)
            return (*state, *map(_written, parts)) if self.spread else state
        except RuntimeError:  # of a tensor of inference mode, which has no version
            return *map(_address, parts), *map(version, tensors), *map(_strides, tensors), *map(version, parts)

    def passed(self, tensors: Sequence[Tensor]) -> bool:
        """Whether the tensors have been written to since; others may follow them."""
        # Where a storage lies that is alive, no other one does.
        return self._of(tensors) != self.state or None in [storage() for storage in self.storages]

    def in_other_grad_mode(self) -> bool:
        """Whether gradients are on where they were off in the last forward, or the other way round.

        Not so where a checkpointed forward, which ran without, runs again within backward.
        """
        grad_mode = torch.is_grad_enabled()
        if self.grad_mode is None:
            self.grad_mode = grad_mode
        return grad_mode != self.grad_mode and not front.in_backward()


_address, _strides = torch._C.TensorBase.data_ptr, torch._C.TensorBase.stride
_written = torch._C.TensorBase._version.__get__


class PackedMoment(Moment):
    """That of a packed weight, whose pieces are asked of the module that holds them each time, and its factors."""

    __slots__ = ("pieces",)

    def __init__(
        self, tensors: Sequence[Tensor], grad_mode: bool | None, base: nn.Module, earlier: "Moment | None"
    ) -> None:
        weight, *factors = tensors
        with plainly():
            stored = packed.stored(base)
            lasts = type(earlier) is PackedMoment and earlier.pieces.base() is base
            lasts = lasts and not earlier.pieces.replaced(weight, stored)
            self.pieces = earlier.pieces if lasts else Pieces(weight, base, stored)
            super().__init__([weight, *stored, *factors], grad_mode)

    def passed(self, tensors: Sequence[Tensor]) -> bool:
        weight, *others = tensors
        if (base := self.pieces.base()) is None:
            return True
        stored = packed.stored(base)
        return self.pieces.differ(weight, stored) or super().passed([weight, *stored, *others])


class Pieces(Moment):
    """That of a packed weight alone, and what was found in it: they last longer than its factors.

    What is written to the weight as a whole counts in its own version, not in that of its pieces.
    """

    __slots__ = ("base", "count", "held", "version")

    def __init__(self, weight: Tensor, base: nn.Module, stored: list[Tensor]) -> None:
        super().__init__([weight, *stored])
        self.count, self.base = len(stored), weakref.ref(base)
        self.version = None if _has_memory(weight) else version(weight)  # else its state has it
        self.held: Held | None = None  # the weight; None: not looked at yet

    def differ(self, weight: Tensor, stored: list[Tensor]) -> bool:
        """Whether these are more or fewer, or the weight was written to as a whole where that is not in its state."""
        return len(stored) != self.count or (self.version is not None and version(weight) != self.version)

    def replaced(self, weight: Tensor, stored: list[Tensor]) -> bool:
        """Whether the weight or a piece of it has been written to, or another one stands in its place."""
        return self.differ(weight, stored) or self.passed([weight, *stored])


def versions(tensors: Sequence[Tensor]) -> list[int | None]:
    """How often each has been written to."""
    try:
        return [*map(_written, tensors)]
    except RuntimeError:
        return [*map(version, tensors)]


def version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version  # inference tensors have none


def _part(tensor: Tensor) -> Tensor:
    """What has the tensor's memory: of a DTensor this rank's part, which counts its writes in a version of its own."""
    return tensor if type(tensor) in PLAIN else getattr(tensor, "_local_tensor", tensor)


def _has_memory(tensor: Tensor) -> bool:
    """Whether the tensor is one of its own; what others hold is their affair."""
    kind = type(_part(tensor))
    return kind in PLAIN or kind.__torch_dispatch__ is Tensor.__torch_dispatch__
