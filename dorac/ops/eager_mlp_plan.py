"""``Plan``: how an MLP is computed in eager, by the metadata of its tensors; and how its factors lie for products.

``ops/eager_mlp.py`` runs it. A plan holds no tensors.

Legend: I in_features, F features between the layers, O out_features, R rank.
"""

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dorac.ops import eager_plan, front
from dorac.ops.eager_linears_plan import BIAS, LORA_A, LORA_B, MAGNITUDE, NORM, TENSORS, WEIGHT, trained_as_usual
from dorac.ops.packed_product import Held

GATE, UP, DOWN = range(3)


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """How MLPs of certain metadata are computed."""

    training: bool
    dtype: torch.dtype  # of the products
    autocast: str | None  # the device type for which it is on
    activation: str
    dora: tuple[eager_plan.Plan | None, ...]  # of gate, up and down, with a magnitude
    ranks: tuple[int, int, int]  # 0 without factors
    casts: bool  # the factors, into one buffer
    size: int  # of which, in elements
    inside: bool  # forward's kernel makes the up-projections
    join: Callable  # forward's kernel
    along: tuple[bool, bool, bool]  # whose factors have their gradients from backward's kernel
    parts: tuple[int, int, int]  # the shape of its partial sums
    part: Callable
    add: Callable
    in_ops: bool = False  # which modes see


def layers_of(tensors: Sequence[Tensor | None]) -> tuple[Sequence[Tensor | None], ...]:
    return tensors[:TENSORS], tensors[TENSORS : 2 * TENSORS], tensors[2 * TENSORS :]


def make_plan(x: Tensor, tensors: Sequence[Tensor | None], activation: str) -> Plan | None:
    """The plan for tensors that passed the checks; None if they are not computed here."""
    layers = layers_of(tensors)
    given = [x, *(t for t in tensors if t is not None and type(t) is not Held)]
    if not front.all_eager(*given) or not front.has_kernels(*given) or not all(t.numel() for t in given):
        return None
    factors = [t for layer in layers for t in layer[LORA_A : LORA_B + 1] if t is not None]
    autocast = front.autocast_dtype(x)
    dtype = autocast or x.dtype
    casts = any(t.dtype is not dtype for t in factors)
    weights = [layer[WEIGHT] for layer in layers if layer[WEIGHT] is not None and type(layer[WEIGHT]) is not Held]
    if dtype.itemsize != 2 or any(t.dtype is not dtype for t in weights) or (casts and autocast is None):
        return None
    vectors = [t for layer in layers for t in layer[MAGNITUDE : NORM + 1] if t is not None]
    if not factors or not all(t.is_contiguous() for t in vectors):  # frozen layers alone are torch's
        return None
    training = torch.is_grad_enabled() and any(t.requires_grad for t in given)
    if training:
        if not all(layer[WEIGHT] is None or trained_as_usual(layer) for layer in layers):
            return None
        if not x.requires_grad and layers[GATE][LORA_A] is None and layers[UP][LORA_A] is None:
            return None  # nothing before z has a gradient
    ranks = tuple(0 if layer[LORA_A] is None else layer[LORA_A].shape[0] for layer in layers)
    features, tokens = layers[UP][WEIGHT].shape[0], x.numel() // x.shape[-1]
    dora: list[eager_plan.Plan | None] = []
    for i, (layer, rank) in enumerate(zip(layers, ranks, strict=True)):
        if layer[MAGNITUDE] is None:
            if i == DOWN and layer[BIAS] is not None and layer[BIAS].dtype is not dtype:
                return None
            dora.append(None)
            continue
        # z has x's rows; of x a plan looks at the shape alone.
        seen = x.new_empty(()).expand(*x.shape[:-1], features) if i == DOWN else x
        of_b = (rank, 1) if casts else layer[LORA_B].stride()
        if type(layer[WEIGHT]) is Held:  # its product is all that is done with it
            if layer[NORM] is None:
                return None
            layer = x.new_empty((), dtype=dtype).expand(layer[WEIGHT].shape), *layer[1:]
        plan = eager_plan.make_plan(seen, *layer, training, None, False, None, of_b)
        if plan is None:
            return None
        dora.append(plan)

    from dorac.kernels import configs, target
    from dorac.kernels.mlp import mlp_launch
    from dorac.kernels.mlp_backward import mlp_backward_launches

    def strides(factor: Tensor | None) -> tuple[int, int]:
        return (0, 0) if factor is None else (factor.shape[1], 1) if casts else factor.stride()

    card = target.of(x)
    config = configs.mlp_config(tokens, features, max(ranks[:DOWN]), training, card)
    of_b = strides(layers[GATE][LORA_B]), strides(layers[UP][LORA_B])
    join = mlp_launch(tokens, features, ranks[:DOWN], of_b, activation, config, want_inner=training)
    backward = configs.mlp_backward_config(tokens, features, max(ranks), card)
    along = tuple(0 < rank <= backward.block_r for rank in ranks)
    sums = tuple(layer[BIAS] is not None and layer[BIAS].requires_grad for layer in layers[:DOWN])
    parts, *launches = mlp_backward_launches(tokens, features, ranks, along, sums, activation, backward)
    return Plan(
        training=training,
        dtype=dtype,
        autocast=None if autocast is None else x.device.type,
        activation=activation,
        dora=tuple(dora),
        ranks=ranks,
        casts=casts,
        size=sum(t.numel() for t in factors),
        inside=bool(config.block_r),
        join=eager_plan.bound(join),
        along=along,
        parts=parts,
        part=eager_plan.bound(launches[0]),
        add=eager_plan.bound(launches[1]),
    )


def in_order(layers: Sequence[Sequence[Tensor | None]]) -> list[Tensor]:
    """All factors: A of gate and up, their B, A and B of down."""
    gate, up, down = layers
    factors = gate[LORA_A], up[LORA_A], gate[LORA_B], up[LORA_B], down[LORA_A], down[LORA_B]
    return [t for t in factors if t is not None]


def cast_factors(plan: Plan, factors: list[Tensor]) -> tuple[Tensor | None, list[Tensor]]:
    """What holds them all where they are cast, and the factors in the dtype of the products."""
    if not plan.casts:
        return None, factors
    if plan.in_ops:  # where a mode may keep what it saw made, nothing is written to
        cast = torch.cat([t.to(plan.dtype).reshape(-1) for t in factors])
        return cast, of_one(cast, factors)
    cast = factors[0].new_empty(plan.size, dtype=plan.dtype)
    parts = of_one(cast, factors)
    torch._foreach_copy_(parts, factors)
    return cast, parts


def of_one(cast: Tensor | None, factors: list[Tensor]) -> list[Tensor]:
    return factors if cast is None else torch._C._nn.unflatten_dense_tensors(cast, factors)


def for_products(plan: Plan, factors: list[Tensor], cast: Tensor | None) -> list[Tensor | None]:
    """A ``[R, I]`` of gate and up, B of either, A and B of down; None without factors."""
    if 0 not in plan.ranks:
        a_gate, a_up, *others = factors
        if cast is None:
            return [torch.cat((a_gate, a_up)), *others]
        rank, in_features = plan.ranks[GATE] + plan.ranks[UP], a_up.shape[1]
        return [cast[: rank * in_features].view(rank, in_features), *others]
    rest = iter(factors)
    there = [rank > 0 for rank in plan.ranks]
    a_of = [next(rest) for _ in range(sum(there[:DOWN]))]
    a = None if not a_of else a_of[0] if len(a_of) == 1 else torch.cat(a_of)
    return [a, *(next(rest) if t else None for t in (*there, there[DOWN]))]
