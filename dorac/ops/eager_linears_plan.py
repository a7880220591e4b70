"""``Plan``: how several layers of one x are computed in eager, by the metadata of their tensors.

``ops/eager_linears.py`` runs it. A plan holds no tensors. A layer's tensors are, in this order, ``weight, lora_A,
lora_B, magnitude, bias, weight_norm``.
"""

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dorac.ops import eager_plan, front
from dorac.ops.packed_product import Held

WEIGHT, LORA_A, LORA_B, MAGNITUDE, BIAS, NORM, TENSORS = range(7)


@dataclasses.dataclass(frozen=True, slots=True)
class Layer:
    """How one of them is computed."""

    dora: eager_plan.Plan | None  # with a magnitude
    adapter: int | None  # its place among the adapted ones
    keeps_y: bool = False  # for backward, in place of inner


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """How layers of certain metadata are computed."""

    training: bool
    dtype: torch.dtype  # of the products
    autocast: str | None  # the device type for which it is on
    layers: tuple[Layer, ...]
    adapted: tuple[int, ...]  # places of the adapted ones among the layers
    ranks: tuple[int, ...]  # of these
    casts: bool  # the factors, into one buffer
    sizes: tuple[int, ...]  # in which lie A of all layers, and B of each
    dropout_on: str | None  # None without dropout
    pack: Callable | None  # see eager_plan.Plan
    drop: Callable | None
    in_ops: bool = False  # which modes see


def make_plan(
    x: Tensor, tensors: Sequence[Sequence[Tensor | Held | None]], projections: Sequence[tuple], dropout_on: str
) -> Plan | None:
    """The plan for tensors of layers that passed the checks; None if they are not computed here."""
    given = [x, *(t for of_layer in tensors for t in of_layer if t is not None and type(t) is not Held)]
    if not front.all_eager(*given) or not front.has_kernels(*given) or not all(t.numel() for t in given):
        return None
    adapted = [i for i, t in enumerate(tensors) if t[LORA_A] is not None]
    factors = [tensors[i][k] for i in adapted for k in (LORA_A, LORA_B)]
    autocast = front.autocast_dtype(x)
    dtype = autocast or x.dtype
    casts = any(t.dtype is not dtype for t in factors)
    if dtype.itemsize != 2 or (casts and autocast is None):
        return None
    if any(t[WEIGHT].dtype is not dtype for t in tensors if type(t[WEIGHT]) is not Held):
        return None
    training = torch.is_grad_enabled() and any(t.requires_grad for t in given)
    if training and not all(map(trained_as_usual, tensors)):
        return None
    dropped = {bool(projections[i][TENSORS + 1]) for i in adapted}
    if len(dropped) > 1 or not adapted:  # frozen layers alone are torch's
        return None
    if not any(dropped):
        dropout_on = None
    ranks = [tensors[i][LORA_A].shape[0] for i in adapted]
    layers = []
    for i, (of_layer, projection) in enumerate(zip(tensors, projections, strict=True)):
        magnitude, bias = of_layer[MAGNITUDE], of_layer[BIAS]
        place = adapted.index(i) if i in adapted else None
        if magnitude is None:
            if bias is not None and bias.dtype is not dtype:
                return None
            layers.append(Layer(None, place))
            continue
        of_b = (of_layer[LORA_B].shape[1], 1) if casts else of_layer[LORA_B].stride()
        save_output = bool(projection[TENSORS + 2])
        if type(of_layer[WEIGHT]) is Held:
            if of_layer[NORM] is None:
                return None
            of_layer = x.new_empty((), dtype=dtype).expand(of_layer[WEIGHT].shape), *of_layer[1:]
        dora = eager_plan.make_plan(x, *of_layer, training, dropout_on, save_output, (sum(ranks), 1), of_b)
        if dora is None:
            return None
        layers.append(Layer(dora, place, dora.keeps_y))

    from dorac.kernels.dropout import drop_launch, pack_launch

    return Plan(
        training=training,
        dtype=dtype,
        autocast=None if autocast is None else x.device.type,
        layers=tuple(layers),
        adapted=tuple(adapted),
        ranks=tuple(ranks),
        casts=casts,
        sizes=(sum(t.numel() for t in factors[::2]), *(t.numel() for t in factors[1::2])),
        dropout_on=dropout_on,
        pack=eager_plan.bound(pack_launch(x.numel()) if dropout_on else None),
        drop=eager_plan.bound(drop_launch(x.numel()) if dropout_on else None),
    )


def trained_as_usual(of_layer: Sequence[Tensor | None]) -> bool:
    weight, lora_A, lora_B, magnitude, _, norm = of_layer
    if (type(weight) is not Held and weight.requires_grad) or (norm is not None and norm.requires_grad):
        return False
    return lora_A is None or all(t is None or t.requires_grad for t in (lora_A, lora_B, magnitude))
