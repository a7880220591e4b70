"""An adapter that begins as a part of its base weight: ``W`` becomes ``W - s * lora_B0 @ lora_A0``.

The factors that it began with are kept, frozen, beside those that are trained: the layer's state dict is whole, and

    W_res + s * lora_B @ lora_A  =  W + s * [lora_B, -lora_B0] @ [lora_A; lora_A0]

is an adapter of twice the rank over the original weight, with the same magnitude. That is what adapter files hold.
"""

import torch
from torch import Tensor, nn

from dorac.nn.layer import DoraLayer
from dorac.numerics import accumulate_dtype
from dorac.ops import sharded
from dorac.undo import Undo

INITIAL = {"lora_A": "initial_lora_A", "lora_B": "initial_lora_B"}


def has_residual(layer: DoraLayer) -> bool:
    """Whether a part of the layer's base weight has been taken out of it."""
    return all(name in layer._parameters for name in INITIAL.values())


def saved_rank(layer: DoraLayer) -> int:
    """The rank of the layer's adapter over the original weight."""
    return 2 * layer.r if has_residual(layer) else layer.r


@torch.no_grad()
def take_out(layer: DoraLayer, log: Undo) -> None:
    """Takes the layer's present product out of its base weight, which then holds the residual."""
    log.keep_module(layer)
    layer.keep_base(log)
    _change(layer, (-1, layer.lora_A, layer.lora_B))
    for name, initial in INITIAL.items():
        setattr(layer, initial, nn.Parameter(getattr(layer, name).detach().clone(), requires_grad=False))


def _change(layer: DoraLayer, *products: tuple[int, Tensor, Tensor]) -> None:
    """Adds ``sign * s * lora_B @ lora_A`` of each to the base weight, rounded once."""
    matrix = layer._matrix()
    dtype = accumulate_dtype(matrix, *products[0][1:])
    changed = matrix.to(dtype)
    for sign, lora_A, lora_B in products:
        changed = changed + sign * layer.scaling * (lora_B.to(dtype) @ lora_A.to(dtype))
    layer.write_part("weight", changed)


@torch.no_grad()
def put_back(layer: DoraLayer, log: Undo) -> None:
    """Puts back what was taken out, rounded once; the layer's adapter is not one over that."""
    layer.keep_base(log)
    _change(layer, (1, *(getattr(layer, name) for name in INITIAL.values())))


def over_original(lora_A: Tensor, lora_B: Tensor, initial_A: Tensor, initial_B: Tensor) -> tuple[Tensor, Tensor]:
    """Factors over the residual as factors over the original weight."""
    return torch.cat([lora_A, initial_A]), torch.cat([lora_B, -initial_B], dim=1)


@torch.no_grad()
def adopt(layer: DoraLayer, lora_A: Tensor, lora_B: Tensor, log: Undo) -> tuple[Tensor, Tensor]:
    """The factors over the residual that these, of twice the rank and over the original weight, stand for.

    Where they began as others than the layer did, its base weight becomes the residual of theirs.
    """
    old = [getattr(layer, name) for name in INITIAL.values()]
    parts = (lora_A[layer.r :], -lora_B[:, layer.r :])
    new = [sharded.like(part, t).to(t.device, t.dtype) for part, t in zip(parts, old, strict=True)]
    if not all(torch.equal(sharded.whole(a), sharded.whole(b)) for a, b in zip(old, new, strict=True)):
        layer.keep_base(log)
        log.keep(*old)
        _change(layer, (1, *old), (-1, *new))
        for parameter, value in zip(old, new, strict=True):
            parameter.copy_(value)
    return lora_A[: layer.r], lora_B[:, : layer.r]
