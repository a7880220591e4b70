"""Projections of one input that a block computes together, while the block's own forward stays what it is.

An attention module's forward calls q, k and v one after the other. A fused one (:mod:`dorac.nn.blocks`) says for the
time of its forward which layers these are: :class:`Together`, one for each forward, in a variable of the thread. The
first layer that is called computes what all of them give for its very x, the others find theirs there. So nothing is
known of the forward, and nothing taken for granted: another x (another tensor, or the same one after a write), another
grad mode or autocast, and the layer computes for itself. What nobody came for is dropped when the block's forward ends.

:func:`apart` is for who looks at single layers.

Compiled code computes layer by layer, and does not look at the thread's variable.
"""

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from dorac import functional
from dorac.hooks import unhooked


class Fusable(Protocol):
    """A layer whose class is in :data:`classes`.

    Its forward, where it is not compiled, returns ``shared.here.together.take(self, x)`` if there is such a block and
    that is no None.
    """

    in_features: int
    out_features: int
    weight: Tensor

    def projection(self, x: Tensor) -> tuple[functional.Projection, str] | None:
        """What :func:`functional.dora_linears` needs for this x, and what dropout is on; None: call the layer."""


classes: set[type[nn.Module]] = set()  # these, no subclass: that may compute something else


def fusable(cls: type[nn.Module]) -> type[nn.Module]:
    """Says of a class that its instances are :class:`Fusable`, or those of which its ``in_blocks()`` says so."""
    classes.add(cls)
    return cls


def is_fusable(module: nn.Module | None) -> bool:
    """Whether the module may ever be computed together with others."""
    if type(module) not in classes:
        return False
    in_blocks = getattr(module, "in_blocks", None)
    return in_blocks is None or in_blocks()


class _Here(threading.local):
    """What holds in this thread."""

    together: "Together | None" = None
    apart: bool = False


here = _Here()


@contextlib.contextmanager
def apart() -> Iterator[None]:
    """Every layer computes for itself in the block, in this thread."""
    before, here.apart = here.apart, True
    try:
        yield
    finally:
        here.apart = before


def is_apart() -> bool:
    """Whether someone asks for that, or has hooks on all modules."""
    return here.apart or _has_any_global_hook()


@contextlib.contextmanager
def together(layers: Sequence[nn.Module]) -> Iterator[None]:
    """These layers are computed together in the block, in this thread."""
    before, here.together = here.together, Together(layers)
    try:
        yield
    finally:
        here.together = before


class Together:
    """The layers of one forward that were not called yet, and outputs that they have not come for yet."""

    __slots__ = ("outputs", "state", "waiting", "x")

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        self.waiting = list(layers)
        self.outputs: dict[nn.Module, Tensor] = {}
        self.x: Tensor | None = None
        self.state: tuple | None = None

    def take(self, layer: Fusable, x: Tensor) -> Tensor | None:
        if layer not in self.waiting:  # another layer, or a second call
            return None
        if self.x is not x or self.state != _state(x):
            self._compute(x)
        y = self.outputs.pop(layer, None)
        if self.waiting:
            self.waiting.remove(layer)
        if not self.outputs:
            self.x = None
        return y

    def _compute(self, x: Tensor) -> None:
        self.x, self.outputs, state = None, {}, _state(x)
        if len(self.waiting) < 2:
            return
        ys = None if state is None else _computed(self.waiting, x)
        if ys is None:
            self.waiting = []  # each for itself, to the end of this forward
            return
        self.x, self.state, self.outputs = x, state, dict(zip(self.waiting, ys, strict=True))


def _computed(layers: Sequence[nn.Module], x: Tensor) -> list[Tensor] | None:
    """What these layers give for x, or None if each must be called."""
    if any(getattr(layer, "shards", None) is not None for layer in layers):
        from dorac.nn import sharded_blocks  # which imports torch.distributed

        return sharded_blocks.linears(x, layers)
    found = projections(layers, x)
    if found is None:
        return None
    operands, dropout_on = found
    ys = functional.dora_linears(x, operands, dropout_on=dropout_on)
    return [as_called(y, x, p) for y, p in zip(ys, operands, strict=True)]


def _state(x: object) -> tuple | None:
    """What the output for x depends on beside x; None where a write to it would not be seen."""
    if not isinstance(x, Tensor) or x.is_inference():
        return None
    device = x.device.type
    return (
        x._version,
        x.requires_grad,
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device),
    )


def projections(layers: Sequence[nn.Module], x: Tensor) -> tuple[list[functional.Projection], str] | None:
    """Of layers that are called with tensors like x, and what their dropout is on; None if each must be called."""
    found, dropout_on = [], None
    for layer in layers:
        if type(layer) not in classes or not is_plainly_called(layer):
            return None
        answer = layer.projection(x)
        if answer is None:
            return None
        projection, on = answer
        if projection.dropout_p:
            if dropout_on not in (None, on):
                return None
            dropout_on = on
        found.append(projection)
    return found, dropout_on or "adapter"


def as_called(y: Tensor, x: Tensor, projection: functional.Projection) -> Tensor:
    """``y`` of a block as the layer itself returns it: one over a packed weight casts it to x's dtype."""
    return y if isinstance(projection.weight, Tensor) else y.to(x.dtype)


def is_plainly_called(module: nn.Module) -> bool:
    """Whether a call runs the forward of the module's class, in eager, and nothing else."""
    return unhooked(module) and module._compiled_call_impl is None


def fits(x: Tensor, weight: Tensor) -> bool:
    """Whether the product of x and this weight is one of plain tensors, which the layer alone would compute, too."""
    if not is_plain(weight) or x.device != weight.device:
        return False
    return x.dtype == weight.dtype or (x.is_floating_point() and torch.is_autocast_enabled(x.device.type))


def is_plain(tensor: Tensor) -> bool:
    """Whether it is a dense tensor as it lies there: no DTensor, no packed weight, no fake."""
    return type(tensor) in (nn.Parameter, Tensor) and tensor.is_floating_point()
