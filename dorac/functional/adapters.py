"""Adapters as values: made stronger or weaker, added up, stacked.

An adapter changes a weight W to ``W' = g * (W + s * lora_B @ lora_A)``. Strength and weights multiply that change:

    W_a = W + a * (W' - W) = h * (W + s * (a * g / h) * lora_B @ lora_A)      h = 1 + a * (g - 1), one value per row

which is an adapter with the row scale h and rows of lora_B scaled by ``a * g / h``. Strength 0 is the base layer,
strength 1 the adapter. Where h is zero beside its terms no DoRA adapter computes W_a: there h is moved by one rounding
of its terms.

:func:`scale_in_norm` and :func:`combine_in_norm` move delta and magnitude each for itself and take the norm of the new
delta. PEFT does a third thing, and says nothing: ``set_scale`` and ``scale_layer`` scale the delta and leave m (at 0
the layer is ``m / ||W|| * W``, not W); ``add_weighted_adapter`` combines factors and not magnitudes (PEFT issue 3761).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dorac import checks
from dorac.functional.norm import magnitude_scale, norm_factored, scaling_tensor
from dorac.numerics import accumulate_dtype
from dorac.ops import front


class Adapter(NamedTuple):
    """What :func:`dora_linear`, :func:`merge_weight` and the rest take beside the weight."""

    lora_A: Tensor
    lora_B: Tensor
    magnitude: Tensor
    scaling: float | Tensor


class AdapterStack(NamedTuple):
    """K adapters of one layer as :func:`dora_linear_mixed` takes them, of :func:`stack_adapters`."""

    lora_A: Tensor
    lora_B: Tensor
    magnitude: Tensor
    scaling: Tensor
    ranks: Tensor | None  # None where all are alike


def at_strength(
    lora_B: Tensor, magnitude: Tensor, weight_norm: Tensor, strength: float | Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """``lora_B``, ``magnitude`` and ``weight_norm`` of ``W + a (W' - W)``, for any function that takes these three.

    No norm is computed: the adapter's own, ``weight_norm``, is enough, and the layer is one call::

        b, m, n = at_strength(lora_B, magnitude, weight_norm, a)
        y = dora_linear(x, weight, lora_A, b, m, bias, scaling=s, weight_norm=n)

    Args:
        lora_B: ``[out, r, *]``, or ``[E, out, r]`` with experts.
        magnitude: m, ``[out]`` or ``[E, out]``.
        weight_norm: n of these factors and their scaling, as many.
        strength: a, a finite number or a 0-d tensor.

    Returns:
        ``a g / h * lora_B`` in its dtype, h, and ones, both in float32 (float64 if m or n is); ``h = 1 + a (g - 1)``.
        Gradients flow to lora_B, magnitude, strength and a norm that carries one. ``|a g / h|`` is at most 1 where a
        lies in [0, 1] and g is positive, else at most 2^24 (2^53 in float64, 2^11 for float16 products): h is moved by
        that share of ``|1 - a| + |a g|`` where it is smaller. That is a rounding of the result.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit, a strength that is not finite.
    """
    checks.check_scaled_rows(lora_B, magnitude, weight_norm)
    strength = checks.check_scaling(strength, "strength")
    g = magnitude_scale(magnitude, weight_norm)
    base_scale, (share,) = _shares([strength], [g], _least_scale(lora_B, g.dtype))
    share = share.view(*share.shape, *[1] * (lora_B.ndim - share.ndim))
    return (share * lora_B).to(lora_B.dtype), base_scale, torch.ones_like(base_scale)


def _shares(weights: Sequence[float | Tensor], scales: Sequence[Tensor], least: float) -> tuple[Tensor, list[Tensor]]:
    """``h = 1 + sum w_i (g_i - 1)`` and each ``w_i g_i / h``, with ``|h|`` at least ``least`` times its terms."""
    acc = accumulate_dtype(*scales)
    if torch.compiler.is_compiling() or any(isinstance(weight, Tensor) for weight in weights):
        weights = [scaling_tensor(weight, scales[0], acc) for weight in weights]
    parts = [weight * g.to(acc) for weight, g in zip(weights, scales, strict=True)]
    rest = (1 - sum(weights)) * torch.ones_like(parts[0])
    h = rest + sum(parts)
    floor = (least * (rest.abs() + sum(part.abs() for part in parts))).clamp(min=1e-20)
    moved = torch.where(h.abs() < floor, torch.copysign(floor, h), h)
    h = h + (moved - h).detach()  # the gradient is that of h
    return h, [part / h for part in parts]


def _least_scale(lora_B: Tensor, acc: torch.dtype) -> float:
    """The least ``|h|`` relative to its terms: lora_B times its inverse neither overflows nor drowns the base."""
    if torch.float16 in (lora_B.dtype, front.autocast_dtype(lora_B)):
        return 2**-11
    return torch.finfo(acc).eps / 2


def scale_adapter(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    strength: float | Tensor,
    *,
    scaling: float | Tensor,
) -> Adapter:
    """The adapter whose weight is ``W + a * (W' - W)``, W' that of this one: the field's meaning of a strength.

    In a forward :func:`at_strength` does the same without a norm; ``layer.strength`` of ``dorac.nn`` is that.

    Args:
        weight: ``[out, in]`` or, with experts, ``[E, out, in]``; the factors and the magnitude as in
            :func:`dora_linear`.
        strength: a, a finite number or a 0-d tensor. 0 is the base layer's function (g = 1 to a rounding of the norm;
            zero rows too), 1 the adapter, bit for bit for the number 1. Others extrapolate.
        scaling: s.

    Returns:
        lora_A as it is, lora_B with scaled rows, both in float32 where a half-precision lora_B would be rounded again
        (the number 1 scales nothing); a magnitude in float32 (float64 if any input is float64); the scaling s.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit, a strength or scaling that is not finite.
    """
    checks.check_adapter(weight, lora_A, lora_B, magnitude, None)
    scaling = checks.check_scaling(scaling)
    strength = checks.check_scaling(strength, "strength")
    acc = accumulate_dtype(weight, lora_A, lora_B, magnitude)
    if not isinstance(strength, Tensor) and strength == 1:
        return Adapter(lora_A, lora_B, magnitude.to(acc), scaling)
    norm = norm_factored(weight, lora_A, lora_B, scaling)
    wide = accumulate_dtype(lora_A, lora_B)
    lora_A, lora_B, base_scale = lora_A.to(wide), *at_strength(lora_B.to(wide), magnitude, norm, strength)[:2]
    moved = base_scale.to(acc) * norm_factored(weight, lora_A, lora_B, scaling).to(acc)
    return Adapter(lora_A, lora_B, moved, scaling)


def combine_adapters(weight: Tensor, adapters: Sequence[Adapter], weights: Sequence[float | Tensor]) -> Adapter:
    """The adapter whose weight is ``W + sum w_i (W'_i - W)``, as ``add_weighted_adapter`` of the drop-in makes it.

    Args:
        weight: ``[out, in]`` or, with experts, ``[E, out, in]``.
        adapters: ``(lora_A, lora_B, magnitude, scaling)`` each, of any ranks.
        weights: w, a finite number or a 0-d tensor for each. Of one adapter this is :func:`scale_adapter`.

    Returns:
        Factors of rank ``sum r_i``, ``[A_1; A_2; ...]`` and ``[w_1 g_1 s_1 / h * B_1, ...]``, ``h = 1 + sum w_i
        (g_i - 1)``, and the magnitude ``h * ||V||``, all in float32 (float64 if any input is float64). The scaling is
        1.

    Raises:
        TypeError, ValueError: no adapters, not as many weights; an adapter that does not fit the weight.
    """
    scalings, weights = _check_combination(weight, adapters, weights)
    acc = accumulate_dtype(weight, *(t for adapter in adapters for t in adapter[:3]))
    norms = [norm_factored(weight, *adapter[:2], s) for adapter, s in zip(adapters, scalings, strict=True)]
    scales = [magnitude_scale(adapter[2], norm).to(acc) for adapter, norm in zip(adapters, norms, strict=True)]
    base_scale, shares = _shares(weights, scales, torch.finfo(acc).eps / 2)
    lora_A = torch.cat([adapter[0].to(acc) for adapter in adapters], dim=-2)
    lora_B = torch.cat(
        [
            adapter[1].to(acc) * (share * scaling_tensor(s, weight, acc))[..., None]
            for adapter, share, s in zip(adapters, shares, scalings, strict=True)
        ],
        dim=-1,
    )
    return Adapter(lora_A, lora_B, base_scale * norm_factored(weight, lora_A, lora_B, 1.0).to(acc), 1.0)


def _check_combination(weight: Tensor, adapters: Sequence[Adapter], weights: Sequence[float | Tensor]) -> tuple:
    """The scalings and the weights, checked."""
    if len(adapters) != len(weights) or not adapters:
        raise ValueError(
            f"weights must be one number for each of at least one adapter, got {len(weights)} for {len(adapters)}"
        )
    for adapter in adapters:
        checks.check_adapter(weight, *adapter[:3], None)
    scalings = [checks.check_scaling(adapter[3]) for adapter in adapters]
    return scalings, [checks.check_scaling(share, "weights") for share in weights]


def scale_in_norm(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    strength: float | Tensor,
    *,
    scaling: float | Tensor,
) -> Adapter:
    """Delta and magnitude at a strength: ``V = W + a * s * lora_B @ lora_A``, ``m_a = ||W|| + a * (m - ||W||)``.

    The weight is ``m_a / ||V|| * V``: it turns from W to W' where :func:`scale_adapter` goes straight.

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


def combine_in_norm(weight: Tensor, adapters: Sequence[Adapter], weights: Sequence[float | Tensor]) -> Adapter:
    """The weighted sum of adapters over one weight: delta ``sum w_i s_i B_i A_i``, ``||W|| + sum w_i (m_i - ||W||)``.

    Args:
        weight: ``[out, in]`` or, with experts, ``[E, out, in]``.
        adapters: ``(lora_A, lora_B, magnitude, scaling)`` each, of any ranks.
        weights: w, a finite number or a 0-d tensor for each. Of one adapter this is :func:`scale_in_norm`; a weight of
            1 and else zeros give that adapter back.

    Returns:
        Factors of rank ``sum r_i``, ``[A_1; A_2; ...]`` and ``[w_1 s_1 B_1, w_2 s_2 B_2, ...]``, and the magnitude, all
        in float32 (float64 if any input is float64): in half precision the weighting would round each lora_B again.
        The scaling is 1.

    Raises:
        TypeError, ValueError: no adapters, not as many weights; an adapter that does not fit the weight.
    """
    scalings, weights = _check_combination(weight, adapters, weights)
    acc = accumulate_dtype(weight, *(t for adapter in adapters for t in adapter[:3]))
    lora_A = torch.cat([adapter[0].to(acc) for adapter in adapters], dim=-2)
    base = norm_factored(weight, adapters[0][0], adapters[0][1], 0.0).to(acc)
    magnitude = (1 - sum(weights)) * base
    scaled = []
    for (_, lora_B, m, _), scaling, share in zip(adapters, scalings, weights, strict=True):
        scaled.append(lora_B.to(acc) * scaling_tensor(share * scaling, weight, acc))
        magnitude = magnitude + share * m.to(acc)
    return Adapter(lora_A, torch.cat(scaled, dim=-1), magnitude, 1.0)


def stack_adapters(adapters: Sequence[Adapter]) -> AdapterStack:
    """One stack for :func:`dora_linear_mixed`: every tensor with a leading K, the scalings as a ``[K]`` tensor.

    Adapters of smaller rank are padded with zeros, rows of lora_A and columns of lora_B, which leaves
    ``lora_B @ lora_A`` and with it the function as they were. A scaling ``alpha / r`` keeps the r before the padding,
    and ``ranks [K]``, int32, tells it to the kernels, which then do not read the zeros.

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
    of_each = [a.shape[0] for a, _ in factors]
    rank, ranks = max(of_each), None
    if min(of_each) < rank:
        ranks = torch.tensor(of_each, dtype=torch.int32, device=adapters[0][2].device)
    pad = torch.nn.functional.pad
    magnitude = torch.stack([m for _, _, m, _ in adapters])
    acc = accumulate_dtype(*(t for pair in factors for t in pair), magnitude)
    return AdapterStack(
        torch.stack([pad(a, (0, 0, 0, rank - a.shape[0])) for a, _ in factors]),
        torch.stack([pad(b, (0, rank - b.shape[1])) for _, b in factors]),
        magnitude,
        torch.stack([scaling_tensor(checks.check_scaling(scaling), magnitude, acc) for *_, scaling in adapters]),
        ranks,
    )
