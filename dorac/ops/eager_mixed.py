"""Rows of different adapters in eager on a GPU with kernels, without gradients: the base product and two launches.

``functional.dora_linear_mixed`` asks here first. What the tensors' metadata settle is settled once for each
combination, in a :class:`Plan`, which is kept with those of ``ops/eager.py`` and holds no tensors.
"""

import dataclasses
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dorac import checks
from dorac.numerics import LARGEST_SCALING
from dorac.ops import eager, eager_plan, front


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """How layers of certain metadata are computed."""

    dtype: torch.dtype  # of the products
    autocast: str | None  # the device type for which it is on
    partial: tuple[int, ...]  # the shape of h's splits
    tiles: tuple[int, int] | None  # of the list that the first launch writes
    list_tiles: Callable | None  # of the index, where that is made beforehand
    down: Callable  # of x, lora_A, index, ranks, tiles and h's splits
    up: Callable  # of base, these, lora_B, magnitude, norm, scaling, bias, index, ranks, tiles and y


def mixed_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    bias: Tensor | None,
    weight_norm: Tensor | None,
    index: Tensor,
    scaling: float | Tensor,
    ranks: Tensor | None,
    is_scale: bool = False,
) -> Tensor | None:
    """The layer, or None if it is not to be computed here; errors are ``check_mixed``'s.

    ``is_scale``: the magnitude is g, and there is no norm.
    """
    if (weight_norm is None and not is_scale) or not front.unobserved():
        return None
    try:
        if torch.is_grad_enabled() and (
            lora_B.requires_grad
            or magnitude.requires_grad
            or lora_A.requires_grad
            or x.requires_grad
            or weight.requires_grad
            or (weight_norm is not None and weight_norm.requires_grad)
            or (bias is not None and bias.requires_grad)
            or (isinstance(scaling, Tensor) and scaling.requires_grad)
        ):
            return None
        key = (
            "mixed",
            x.stride(),
            *eager.metadata(x, weight, lora_A, lora_B, magnitude, bias, weight_norm),
            *_of(index),
            *(_of(scaling) if isinstance(scaling, Tensor) else (type(scaling),)),
            ranks if ranks is None else _of(ranks),
        )
        plan = eager.plans.get(key, False)
        bits = lora_A.data_ptr() | lora_B.data_ptr() | magnitude.data_ptr()
        bits |= x.data_ptr() | index.data_ptr() | weight.data_ptr()
        if bias is not None:
            bits |= bias.data_ptr()
        if weight_norm is not None:
            bits |= weight_norm.data_ptr()
        if isinstance(scaling, Tensor):
            bits |= scaling.data_ptr()
        if ranks is not None:
            bits |= ranks.data_ptr()
    except (AttributeError, RuntimeError, TypeError):  # no tensor, or one of no strides, symbolic sizes or no memory
        return None
    if plan is False:
        plan = _make_plan(x, weight, lora_A, lora_B, magnitude, bias, weight_norm, index, scaling, ranks)
        plan = eager.keep_plan(key, plan)
    if plan is None or bits & 15:  # plans are for tensors aligned to 16 bytes
        return None
    if not isinstance(scaling, Tensor):
        scaling = float(scaling)
        if not abs(scaling) <= LARGEST_SCALING:
            return None
    return _run(plan, x, weight, lora_A, lora_B, magnitude, bias, weight_norm, index, scaling, ranks)


def _of(t: Tensor) -> tuple:
    return type(t), t.shape, t.dtype, t.device, t.stride()


def _make_plan(x, weight, lora_A, lora_B, magnitude, bias, weight_norm, index, scaling, ranks) -> Plan | None:
    checks.check_mixed(x, weight, lora_A, lora_B, magnitude, bias, weight_norm, index, ranks)
    adapters, rank, in_features = lora_A.shape
    if isinstance(scaling, Tensor) and scaling.ndim:
        checks.check_scalings(scaling, adapters, weight)
    else:
        checks.check_scaling(scaling)
    given = [t for t in (x, weight, lora_A, lora_B, magnitude, bias, weight_norm, scaling) if isinstance(t, Tensor)]
    if not front.all_eager(*given, index, ranks) or not front.has_kernels(*given):
        return None
    if not x.numel() or not weight.numel() or not x.is_contiguous():
        return None
    if not all(t.is_contiguous() for t in (magnitude, weight_norm, bias, index, ranks) if t is not None):
        return None
    autocast = front.autocast_dtype(x)
    dtype = autocast or x.dtype

    from dorac.kernels import mixed, target
    from dorac.kernels.configs import mixed_config

    out_features, batch, tokens = weight.shape[0], index.shape[0], math.prod(x.shape[:-1])
    sizes, row_tokens = (adapters, out_features, in_features, rank), tokens // batch
    config = mixed_config(batch, row_tokens, *sizes, lora_A.dtype, dtype, target.of(x))
    of_scaling = scaling.expand(adapters) if isinstance(scaling, Tensor) else scaling
    strides = (
        (in_features, 1),
        lora_A.stride(),
        lora_B.stride(),
        mixed.vector_strides(magnitude, weight_norm, of_scaling),
    )
    splits, down, up = mixed.mixed_launches(
        batch,
        row_tokens,
        sizes,
        strides,
        config,
        has_bias=bias is not None,
        want_inner=False,
        rounds=autocast is not None,
        splits_products=autocast is None and mixed.needs_split(dtype, lora_A.dtype),
    )
    return Plan(
        dtype=dtype,
        autocast=None if autocast is None else x.device.type,
        partial=(splits, tokens, rank),
        tiles=(up.grid[0], 1 + config.block_t) if config.form == "counted" else None,
        list_tiles=_lister(row_tokens, adapters, config.block_t) if config.form == "listed" else None,
        down=eager_plan.bound(down),
        up=eager_plan.bound(up),
    )


def _lister(row_tokens: int, adapters: int, block_t: int) -> Callable:
    from dorac.kernels.mixed_tiles import list_tiles

    return lambda index: list_tiles(index, row_tokens, adapters, block_t)


@eager.without_autocast
def _run(plan, x, weight, lora_A, lora_B, magnitude, bias, weight_norm, index, scaling, ranks):
    if plan.autocast is not None:
        x, weight = x.to(plan.dtype), weight.to(plan.dtype)
    base, partial = F.linear(x, weight), x.new_empty(plan.partial, dtype=torch.float32)
    if plan.tiles is not None:
        tiles = index.new_empty(plan.tiles, dtype=torch.int32)
    else:
        tiles = None if plan.list_tiles is None else plan.list_tiles(index)
    plan.down(x, lora_A, index, ranks, tiles, partial)
    plan.up(base, partial, lora_B, magnitude, weight_norm, scaling, bias, index, ranks, tiles, base, None, None)
    return base
