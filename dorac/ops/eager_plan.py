"""``Plan``: how the linear layer is computed in eager, by the metadata of its tensors: launches, casts, what is kept.

``ops/eager.py`` runs it. A plan holds no tensors.

Legend: T tokens, I in_features, O out_features, R rank.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from dorac.ops import front
from dorac.ops.linear_leaves import LORA_B_RANK


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """How layers of certain metadata are computed."""

    dtype: torch.dtype  # of the products
    casts_factors: bool
    cast: Callable | None  # of the factors and what they become in the dtype of the products; None: torch casts them
    dropout_on: str | None  # None without dropout
    keeps_y: bool  # for backward, in place of inner
    autocast: str | None  # the device type for which it is on
    norm: tuple | None  # what splits the factors, column splits, launch, finish; None where the norm is given
    compose: Callable  # of base, h, lora_B, magnitude, norm, scaling, bias, y and inner, which it writes
    backward: Callable[[tuple, tuple], tuple]  # of dy's strides, and for y those of weight and lora_B: strips, launches
    scale_b: Callable  # of lora_B's strides: (g lora_B)^T of compose's arguments, for PEFT's meaning of dropout
    pack: Callable | None  # of dropout's mask, a byte an element, and its bits, which it writes
    drop: Callable | None  # of rows, bits, 1 / (1 - p) and the result, which may be the rows
    together: bool = False  # the gradients of lora_B and the magnitude lie in one float32 tensor, in this order
    in_ops: bool = False  # which modes see


def bound(launch):
    from dorac.kernels.launch import Bound

    return None if launch is None else Bound(launch)


def cast_of(lora_A: Tensor, lora_B: Tensor) -> Callable | None:
    from dorac.kernels.cast import cast_launch

    contiguous = lora_A.is_contiguous() and lora_B.is_contiguous()
    return bound(cast_launch(lora_A.numel(), lora_B.numel())) if contiguous else None


def metadata(x, weight, lora_A, lora_B, magnitude, bias, weight_norm) -> tuple:
    """All that the checks and a plan look at."""
    device = x.device
    kind = device.type
    return (
        type(x),
        x.shape,
        x.dtype,
        device,
        type(weight),
        weight.shape,
        weight.dtype,
        weight.device,
        weight.stride(),
        type(lora_A),
        lora_A.shape,
        lora_A.dtype,
        lora_A.device,
        lora_A.stride(),
        type(lora_B),
        lora_B.shape,
        lora_B.dtype,
        lora_B.device,
        lora_B.stride(),
        type(magnitude),
        magnitude.shape,
        magnitude.dtype,
        magnitude.device,
        magnitude.stride(),
        bias if bias is None else (type(bias), bias.shape, bias.dtype, bias.device, bias.stride()),
        weight_norm
        if weight_norm is None
        else (type(weight_norm), weight_norm.shape, weight_norm.dtype, weight_norm.device, weight_norm.stride()),
        torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind),
    )


def make_plan(
    x,
    weight,
    lora_A,
    lora_B,
    magnitude,
    bias,
    weight_norm,
    training: bool,
    dropout_on: str | None,
    save_output: bool,
    of_h: tuple[int, int] | None = None,
    of_b: tuple[int, int] | None = None,
) -> Plan | None:
    """The plan for tensors that passed the checks; None if they are not computed here.

    Args:
        of_h, of_b: strides of h and of lora_B in the dtype of the products, where the caller makes these.
    """
    given = [t for t in (x, weight, lora_A, lora_B, magnitude, bias, weight_norm) if t is not None]
    if weight.ndim != 2 or not x.numel() or not weight.numel():
        return None
    if not front.all_eager(*given) or not front.has_kernels(*given):
        return None
    autocast = front.autocast_dtype(x)
    dtype = autocast or weight.dtype
    casts_factors = lora_A.dtype is not dtype
    if dtype.itemsize != 2 or weight.dtype is not dtype or (casts_factors and autocast is None):
        return None
    if not all(t.is_contiguous() for t in (magnitude, bias, weight_norm) if t is not None):
        return None
    if lora_A.shape[0] > LORA_B_RANK:
        return None

    from dorac.kernels import configs, lora_b, target
    from dorac.kernels.compose import compose_launch, composer
    from dorac.kernels.dropout import drop_launch, pack_launch
    from dorac.kernels.norm import needs_split, norm_launches, split_factors

    (out_features, in_features), rank, tokens = weight.shape, lora_A.shape[0], math.prod(x.shape[:-1])
    activation, h, b = (out_features, 1), of_h or (rank, 1), of_b or torch.empty_like(lora_B, dtype=dtype).stride()
    card = target.of(x)
    config = configs.tile_config(tokens, out_features, rank, dtype, dtype, card)
    delta = dropout_on == "adapter"
    keeps_y = training and save_output and bias is None and not delta
    flags = {"has_norm": True, "has_bias": bias is not None, "delta": delta, "split": False}
    flags |= {"want_inner": training and not keeps_y}
    launch = functools.partial(compose_launch, tokens, out_features, (activation, h, b), rank, config, **flags)
    norm = None
    if weight_norm is None:
        split, of_norm, strides = None, rank, (lora_A.stride(), lora_B.stride())
        if needs_split(weight.dtype, lora_A.dtype):
            split, of_norm, strides = split_factors, 3 * rank, ((in_features, 1), (3 * rank, 1))
        sizes = 1, out_features, in_features, of_norm
        strides = tuple((0, *pair) for pair in (weight.stride(), *strides))
        splits, *launches = norm_launches(*sizes, strides, configs.norm_config(*sizes, weight.dtype, card))
        norm = split, splits, *map(bound, launches)

    @functools.lru_cache(maxsize=16)
    def backward_launches(strides: tuple[int, int], of_y: tuple[tuple[int, int], ...]) -> tuple:
        strips, *launches = lora_b.lora_b_backward_launches(
            tokens,
            out_features,
            rank,
            (strides, activation, h, *(((in_features, 1), *of_y) if of_y else ())),
            configs.lora_b_config(tokens, out_features, rank, card),
            scale_b=True,
            delta=delta,
            in_features=in_features if of_y else None,
        )
        return strips, *map(bound, launches)

    @functools.lru_cache(maxsize=16)
    def scale_b_launch(strides: tuple[int, int]) -> Callable:
        flags = {"has_norm": True, "has_bias": False, "delta": False, "split": False, "want_inner": False}
        strides, config = (strides[::-1], None, None), configs.pointwise_config(rank)
        return bound(compose_launch(rank, out_features, strides, None, config, **flags, descriptors=False))

    return Plan(
        dtype=dtype,
        casts_factors=casts_factors,
        cast=cast_of(lora_A, lora_B) if casts_factors else None,
        dropout_on=dropout_on,
        keeps_y=keeps_y,
        autocast=None if autocast is None else x.device.type,
        norm=norm,
        compose=composer(config, launch) if config.descriptors else bound(launch(descriptors=False)),
        backward=backward_launches,
        scale_b=scale_b_launch,
        pack=bound(pack_launch(x.numel()) if dropout_on else None),
        drop=bound(drop_launch(x.numel()) if dropout_on else None),
    )
