"""One batch whose rows use different adapters over one base weight."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dorac import checks, ops
from dorac.functional.norm import magnitude_scale, norm_factored, scaling_tensor
from dorac.numerics import accumulate_dtype
from dorac.ops import front
from dorac.ops.compose import compose_aten, finite_part, takes_bias
from dorac.ops.norm import DEFAULT_BUDGET


def dora_linear_mixed(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    bias: Tensor | None = None,
    *,
    adapter_index: Tensor,
    scaling: float | Tensor,
    weight_norm: Tensor | None = None,
    norm_grad: bool = False,
    budget: int = DEFAULT_BUDGET,
) -> Tensor:
    """:func:`dora_linear` where each row of the batch names one of K adapters of one base weight, or none.

    ``y[i] = g_k * (x[i] W^T + s_k (x[i] A_k^T) B_k^T) + b`` with ``k = adapter_index[i]``, and ``x[i] W^T + b`` where k
    is -1. The product with W is computed once for the whole batch.

    Args:
        x: ``[N, *, in]``. weight: ``[out, in]``. bias: ``[out]``, shared by all adapters.
        lora_A: ``[K, r, in]``. lora_B: ``[K, out, r]``. magnitude: ``[K, out]``. :func:`stack_adapters` makes the three
            from adapters of any rank.
        adapter_index: ``[N]``, int32 or int64, each in ``[-1, K)``.
        scaling: s, a finite number or a 0-d tensor for all adapters, or ``[K]``, one each.
        weight_norm: n of every adapter, ``[K, out]``, from :func:`mixed_norm`. Best given when serving: all K norms
            are computed otherwise, whether an adapter is used or not.
        norm_grad: whether gradient flows through the norms too, not with ``weight_norm``; see :func:`norm_factored`.
        budget: bytes for the buffers of the norm, see :func:`norm_factored`. Dtypes: as in :func:`dora_linear`.

    Returns:
        ``[N, *, out]`` in the dtype of ``x W^T``. Gradients reach the adapters that the index names, those of the
        others are zero; through the norm only if asked for.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit; adapters that are not in one stack, as those
            of different rank are not unless they are padded. IndexError: an index out of range, as torch raises it
            (RuntimeError where Inductor indexes, an assertion on the device on CUDA).
    """
    checks.check_mixed(x, weight, lora_A, lora_B, magnitude, bias, weight_norm, adapter_index)
    checks.check_norm_grad(norm_grad, weight_norm)
    budget = checks.check_budget(budget)
    adapters = lora_A.shape[0]
    s = _scalings(scaling, adapters, weight, accumulate_dtype(weight, lora_A))
    if weight_norm is None:
        weight_norm = mixed_norm(weight, lora_A, lora_B, scaling, norm_grad=norm_grad, budget=budget)
    plain = adapter_index == -1
    index = torch.where(adapter_index < -1, adapters, adapter_index.clamp(min=0))  # torch takes -2 for the last but one

    def chosen(stack: Tensor, plain_value: float) -> Tensor:
        """An entry per row; a plain row sees no entry, whatever it holds, and sends it no gradient."""
        entries = ops.take.take(stack, index)
        return torch.where(plain.view(-1, *[1] * (entries.ndim - 1)), plain_value, entries)

    rows = x.reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1])
    lora = rows.to(lora_A.dtype) @ chosen(lora_A, 0.0).mT @ chosen(lora_B, 0.0).mT
    g = magnitude_scale(chosen(magnitude, 1.0), chosen(weight_norm, 1.0)).unsqueeze(1)
    s = ops.take.take(s, index).view(-1, 1, 1)
    holds_bias = front.autocast_dtype(x) is None and takes_bias(x, bias)
    base = F.linear(x, weight, finite_part(bias) if holds_bias else None)
    return compose_aten(base.reshape(lora.shape), lora, g, s, bias, False, holds_bias).view(base.shape)


def mixed_norm(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float | Tensor,
    *,
    norm_grad: bool = False,
    budget: int = DEFAULT_BUDGET,
) -> Tensor:
    """:func:`norm_factored` of K adapters over one weight: ``n[k] = ||W + s_k * B_k @ A_k||_row``.

    Args:
        weight: ``[out, in]``, not copied. lora_A: ``[K, r, in]``. lora_B: ``[K, out, r]``.
        scaling: s, a finite number or a 0-d tensor for all adapters, or ``[K]``, one each. norm_grad, budget: see
            there.

    Returns:
        ``[K, out]``, float32 (float64 if any input is float64).

    Raises:
        TypeError, ValueError: see :func:`norm_factored`.
    """
    checks.check_stack(weight, lora_A, lora_B)
    if isinstance(scaling, Tensor) and scaling.ndim == 1:
        acc = accumulate_dtype(weight, lora_A)
        lora_A, lora_B = (
            lora_A.to(acc),
            lora_B.to(acc) * _scalings(scaling, lora_A.shape[0], weight, acc).view(-1, 1, 1),
        )
        scaling = 1.0
    return norm_factored(
        weight.expand(lora_A.shape[0], *weight.shape), lora_A, lora_B, scaling, norm_grad=norm_grad, budget=budget
    )


def _scalings(scaling: float | Tensor, adapters: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """The scaling of every adapter, ``[K]``."""
    if isinstance(scaling, Tensor) and scaling.ndim == 1:
        checks.check_scalings(scaling, adapters, like)
        return scaling.to(dtype)
    scaling = checks.check_scaling(scaling)
    return scaling_tensor(scaling, like, dtype).expand(adapters)
