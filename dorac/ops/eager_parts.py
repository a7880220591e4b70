"""The eager layer (:mod:`dorac.ops.eager`) of adapters that are DTensors, computed with this rank's parts of them.

What the parts' metadata settle is a plan of that module's. Its Function is called within one that autograd gives the
DTensors, so that they cross with the layer: nothing else is between them and their gradients.
"""

import torch
from torch import Tensor

from dorac.ops import eager
from dorac.ops.collectives import Enter, Entry


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
