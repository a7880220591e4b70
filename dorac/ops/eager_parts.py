"""The eager layer and MLP (``ops/eager.py``, ``ops/eager_mlp.py``) of adapters that are DTensors, on this rank's parts.

What the parts' metadata settle is a plan of those modules'. Their Functions are called within ones that autograd gives
the DTensors, so that they cross with the layer: nothing else is between them and their gradients.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dorac.ops import eager, eager_mlp
from dorac.ops.collectives import Enter, Entry
from dorac.ops.eager_linears import LORA_A, MAGNITUDE, TENSORS


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
        return dx, None, *ctx.entry.leave(of_adapter), *(None,) * 9


_apply = super(torch.autograd.Function, _OfParts).apply  # as in eager.py


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

    return eager.dora_linear(x, weight, *parts, *others, apply=apply)


class _MLPOfParts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, scalings, plan, *tensors):  # in this order for ctx.needs_input_grad
        *_, ctx.entry, of_parts = tensors
        return eager_mlp.MLP.forward(ctx, x, scalings, plan, *of_parts)

    @staticmethod
    def backward(ctx, dy):
        if dy is None:
            return (None,) * len(ctx.needs_input_grad)
        entry = ctx.entry
        entry.check()
        if torch.is_grad_enabled():  # as above
            ctx.trained = Enter.apply(entry, *entry.parameters)
        dx, _, _, *gradients = eager_mlp.MLP.backward(ctx, dy)
        places = _places(len(entry.parameters))
        for place, gradient in zip(places, entry.leave([gradients[i] for i in places]), strict=True):
            gradients[place] = gradient
        return dx, None, None, *gradients, None, None


def _places(parameters: int) -> list[int]:
    """Where the adapters' tensors are among those of gate, up and down, of which gate may not be there."""
    places = [i for i in range(3 * TENSORS) if LORA_A <= i % TENSORS <= MAGNITUDE]
    return places[len(places) - parameters :]


_apply_mlp = super(torch.autograd.Function, _MLPOfParts).apply


def dora_mlp(
    entry: Entry, x: Tensor, projections: Sequence[tuple | None], activation: str, check: Callable[[], object]
) -> Tensor | None:
    """:func:`dorac.ops.eager_mlp.dora_mlp`, or None.

    Args:
        entry: of lora_A, lora_B and the magnitude of gate (if there is one), up and down, all of them trained.
        projections: gate, up and down, which hold ``entry.parts()``; their biases nothing trains; autograd is on.
    """
    for projection in projections:
        if projection is not None:
            for part in projection[LORA_A : MAGNITUDE + 1]:
                part.requires_grad_()  # as plans ask for

    def apply(x: Tensor, scalings: list[float], plan: eager_mlp.Plan, *of_parts: Tensor | None) -> Tensor:
        tensors = [*of_parts]
        for place, parameter in zip(_places(len(entry.parameters)), entry.parameters, strict=True):
            tensors[place] = parameter
        return _apply_mlp(x, scalings, plan, *tensors, entry, of_parts)

    return eager_mlp.dora_mlp(x, *projections, activation, check, apply=apply)
