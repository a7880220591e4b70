"""The eager layer and blocks (``ops/eager*.py``) of adapters that are DTensors, computed with this rank's parts.

What the parts' metadata settle is a plan of those modules'. Their Functions are called within ones that autograd gives
the DTensors, so that they cross with the layer: nothing else is between them and their gradients.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dorac.ops import eager, eager_linears, eager_mlp
from dorac.ops.crossing import Enter, Entry
from dorac.ops.eager_linears_plan import LORA_A, MAGNITUDE, TENSORS


class _OfParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, lora_A, lora_B, magnitude, *others):  # in this order for ctx.needs_input_grad
        *others, ctx.entry, parts = others
        return eager.Linear.forward(ctx, x, weight, *parts, *others)

    @staticmethod
    def backward(ctx, dy):
        if dy is None:
            return (None,) * 14
        ctx.entry.check()
        if torch.is_grad_enabled():  # the gradients are differentiated again, and so depend on the DTensors
            ctx.trained = Enter.apply(ctx.entry, *ctx.entry.parameters)
        dx, _, *of_adapter = eager.Linear.backward(ctx, dy)[:5]
        summed, ctx.summed = ctx.summed, None
        return dx, None, *ctx.entry.leave(of_adapter, ctx.next_functions, summed), *(None,) * 9


_apply = super(torch.autograd.Function, _OfParts).apply  # as in eager.py
ROWS_DUE = (False, True, True)  # of lora_A, lora_B and the magnitude


def dora_linear(
    entry: Entry, parts: tuple[Tensor, Tensor, Tensor], x: Tensor, weight: Tensor, *others: object
) -> Tensor | None:
    """:func:`dorac.ops.eager.dora_linear`, or None.

    Args:
        entry: of lora_A, lora_B and the magnitude, all of them trained; autograd is on.
        parts: ``entry.parts()``.
        others: bias, which nothing trains, and what follows.
    """

    def apply(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor, *others: object) -> Tensor:
        return _apply(x, weight, *entry.parameters, *others, entry, (lora_A, lora_B, magnitude))

    return eager.dora_linear(x, weight, *parts, *others, apply=apply, together=entry.due == ROWS_DUE)


def _crossing(function: type[torch.autograd.Function], ahead: int) -> Callable:
    """``function.apply`` of several layers, behind whose arguments the entry follows, and the parts.

    Args:
        function: whose arguments are so many, and then the tensors of each layer.
    """

    class OfParts(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *arguments):  # in the order of the function's, for ctx.needs_input_grad
            *_, ctx.entry, parts = arguments
            return function.forward(ctx, *arguments[:ahead], *parts)

        @staticmethod
        def backward(ctx, *gradients):
            if all(d is None for d in gradients):
                return (None,) * len(ctx.needs_input_grad)
            entry = ctx.entry
            entry.check()
            if torch.is_grad_enabled():  # as above
                ctx.trained = Enter.apply(entry, *entry.parameters)
            gradients = [*function.backward(ctx, *gradients)]
            places = [ahead + place for place in _places(gradients[ahead:], entry)]
            left = entry.leave([gradients[i] for i in places], ctx.next_functions)
            for place, gradient in zip(places, left, strict=True):
                gradients[place] = gradient
            return *gradients, None, None

    return super(torch.autograd.Function, OfParts).apply


def _places(tensors: Sequence, entry: Entry) -> list[int]:
    """Where the adapters' are among the layers' tensors; the first layer may not be there."""
    places = [i for i in range(len(tensors)) if LORA_A <= i % TENSORS <= MAGNITUDE]
    return places[len(places) - len(entry.parameters) :]


def _applying(entry: Entry, projections: Sequence[tuple | None], crossing: Callable, ahead: int) -> Callable:
    """What is called in the place of ``apply``, once the parts in the projections are leaves, as plans ask for."""
    for projection in projections:
        if projection is not None:
            for part in projection[LORA_A : MAGNITUDE + 1]:
                part.requires_grad_()

    def apply(*arguments: object) -> object:
        parts = arguments[ahead:]
        tensors = [*parts]
        for place, parameter in zip(_places(parts, entry), entry.parameters, strict=True):
            tensors[place] = parameter
        return crossing(*arguments[:ahead], *tensors, entry, parts)

    return apply


_BEFORE_MLP, _BEFORE_LINEARS = 3, 6  # arguments
_apply_mlp = _crossing(eager_mlp.MLP, _BEFORE_MLP)
_apply_linears = _crossing(eager_linears.Linears, _BEFORE_LINEARS)


def dora_mlp(
    entry: Entry, x: Tensor, projections: Sequence[tuple | None], activation: str, check: Callable[[], object]
) -> Tensor | None:
    """:func:`dorac.ops.eager_mlp.dora_mlp`, or None.

    Args:
        entry: of lora_A, lora_B and the magnitude of gate (if there is one), up and down, all of them trained.
        projections: gate, up and down, which hold ``entry.parts()``; their biases nothing trains; autograd is on.
    """
    apply = _applying(entry, projections, _apply_mlp, _BEFORE_MLP)
    return eager_mlp.dora_mlp(x, *projections, activation, check, apply=apply)


def dora_linears(
    entry: Entry, x: Tensor, projections: Sequence[tuple], check: Callable[[], object]
) -> tuple[Tensor, ...] | None:
    """:func:`dorac.ops.eager_linears.dora_linears` without dropout, or None.

    Args:
        entry, projections: as :func:`dora_mlp`'s, of each layer.
    """
    apply = _applying(entry, projections, _apply_linears, _BEFORE_LINEARS)
    return eager_linears.dora_linears(x, projections, "adapter", check, apply=apply)
