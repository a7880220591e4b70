"""Adapters as values: made stronger or weaker, added up, stacked.

DoRA moves a weight by its delta ``s * lora_B @ lora_A``, which starts at 0, and by its magnitude, which starts at
``||W||_row``. Strength and weights multiply these two distances from the base; the norm is that of the new delta,
computed wherever the adapter is used. Strength 0 is the base layer, strength 1 the adapter, and in between

    V = W + a * s * lora_B @ lora_A      m_a = ||W|| + a * (m - ||W||)      W' = m_a / ||V|| * V

PEFT does something else, and says nothing: ``set_scale`` and ``scale_layer`` scale the delta and leave m (at 0 the
layer is ``m / ||W|| * W``, not W); ``add_weighted_adapter`` combines factors and not magnitudes (PEFT issue 3761).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dorac import checks
from dorac.functional.norm import norm_factored, scaling_tensor
from dorac.numerics import accumulate_dtype


class Adapter(NamedTuple):
    """What :func:`dora_linear`, :func:`merge_weight` and the rest take beside the weight."""

    lora_A: Tensor
    lora_B: Tensor
    magnitude: Tensor
    scaling: float | Tensor


def scale_adapter(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    strength: float | Tensor,
    *,
    scaling: float | Tensor,
) -> Adapter:
    """The adapter at a strength: delta ``a * s * lora_B @ lora_A``, magnitude ``||W|| + a * (m - ||W||)``.

    Args:
        weight: ``[out, in]`` or, with experts, ``[E, out, in]``; the factors and the magnitude as in
            :func:`dora_linear`.
        strength: a, a finite number or a 0-d tensor. 0 is the base layer's function (g = 1 to a rounding of the norm;
            zero rows too), 1 the adapter, bit for bit. Others extrapolate: above 1 a magnitude may turn negative, which
            mirrors its row.
        scaling: s.

    Returns:
        The same factors, not copied and in their own dtype; a magnitude in float32 (float64 if any input is
        float64); the scaling ``a * s``. In a :class:`dorac.nn.DoraLinear`, set its ``scaling`` and copy the magnitude.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit, a strength or scaling that is not finite.
    """
    checks.check_adapter(weight, lora_A, lora_B, magnitude, None)
    scaling = checks.check_scaling(scaling)
    strength = checks.check_scaling(strength, "strength")
    base = norm_factored(weight, lora_A, lora_B, 0.0)
    moved = (1 - strength) * base + strength * magnitude.to(base.dtype)
    return Adapter(lora_A, lora_B, moved, strength * scaling)


def combine_adapters(weight: Tensor, adapters: Sequence[Adapter], weights: Sequence[float | Tensor]) -> Adapter:
    """The weighted sum of adapters over one weight: delta ``sum w_i s_i B_i A_i``, ``||W|| + sum w_i (m_i - ||W||)``.

    Args:
        weight: ``[out, in]`` or, with experts, ``[E, out, in]``.
        adapters: ``(lora_A, lora_B, magnitude, scaling)`` each, of any ranks.
        weights: w, a finite number or a 0-d tensor for each. Of one adapter this is :func:`scale_adapter`; a weight of
            1 and else zeros give that adapter back.

    Returns:
        Factors of rank ``sum r_i``, ``[A_1; A_2; ...]`` and ``[w_1 s_1 B_1, w_2 s_2 B_2, ...]``, and the magnitude, all
        in float32 (float64 if any input is float64): in half precision the weighting would round each lora_B again.
        The scaling is 1.

    Raises:
        TypeError, ValueError: no adapters, not as many weights; an adapter that does not fit the weight.
    """
    if len(adapters) != len(weights) or not adapters:
        raise ValueError(
            f"weights must be one number for each of at least one adapter, got {len(weights)} for {len(adapters)}"
        )
    for adapter in adapters:
        checks.check_adapter(weight, *adapter[:3], None)
    scalings = [checks.check_scaling(adapter[3]) for adapter in adapters]
    weights = [checks.check_scaling(share, "weights") for share in weights]
    acc = accumulate_dtype(weight, *(t for adapter in adapters for t in adapter[:3]))
    lora_A = torch.cat([adapter[0].to(acc) for adapter in adapters], dim=-2)
    base = norm_factored(weight, adapters[0][0], adapters[0][1], 0.0).to(acc)
    magnitude = (1 - sum(weights)) * base
    scaled = []
    for (_, lora_B, m, _), scaling, share in zip(adapters, scalings, weights, strict=True):
        scaled.append(lora_B.to(acc) * scaling_tensor(share * scaling, weight, acc))
        magnitude = magnitude + share * m.to(acc)
    return Adapter(lora_A, torch.cat(scaled, dim=-1), magnitude, 1.0)


def stack_adapters(adapters: Sequence[Adapter]) -> Adapter:
    """One stack for :func:`dora_linear_mixed`: every tensor with a leading K, the scalings as a ``[K]`` tensor.

    Adapters of smaller rank are padded with zeros, rows of lora_A and columns of lora_B, which leaves
    ``lora_B @ lora_A`` and with it the function as they were. A scaling ``alpha / r`` keeps the r before the padding.

    Raises:
        ValueError: no adapters, or adapters whose other sizes, dtypes or devices differ.
    """
    if not adapters:
        raise ValueError("adapters must hold at least one adapter, got none")
    factors = [(a, b) for a, b, *_ in adapters]
    kinds = {
        (a.shape[-1], b.shape[:-1], m.shape, a.dtype, b.dtype, m.dtype, a.device, b.device, m.device)
        for a, b, m, _ in adapters
    }
    if len(kinds) > 1 or any(a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] for a, b in factors):
        shapes = [[list(t.shape) for t in adapter[:3]] for adapter in adapters]
        raise ValueError(f"adapters must share in, out, dtypes and device and may differ in rank, got shapes {shapes}")
    rank = max(a.shape[0] for a, _ in factors)
    pad = torch.nn.functional.pad
    magnitude = torch.stack([m for _, _, m, _ in adapters])
    acc = accumulate_dtype(*(t for pair in factors for t in pair), magnitude)
    return Adapter(
        torch.stack([pad(a, (0, 0, 0, rank - a.shape[0])) for a, _ in factors]),
        torch.stack([pad(b, (0, rank - b.shape[1])) for _, b in factors]),
        magnitude,
        torch.stack([scaling_tensor(checks.check_scaling(scaling), magnitude, acc) for *_, scaling in adapters]),
    )
