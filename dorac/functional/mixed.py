"""One batch whose rows use different adapters over one base weight."""

import torch
from torch import Tensor

from dorac import checks, ops
from dorac.functional.norm import norm_factored, scaling_tensor
from dorac.numerics import accumulate_dtype
from dorac.ops import eager_mixed, front
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
    ranks: Tensor | None = None,
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
        ranks: ``[K]``, int32 or int64: beyond these rows of lora_A and columns of lora_B are zeros, which the kernels
            then do not read. That is not checked.
        budget: bytes for the buffers of the norm, see :func:`norm_factored`. Dtypes: as in :func:`dora_linear`.

    Returns:
        ``[N, *, out]`` in the dtype of ``x W^T``. Gradients reach the adapters that the index names, those of the
        others are zero; through the norm only if asked for.

        No factor is copied. On GPUs with the kernels there are two launches beside the product with W, which nothing
        waits for and a CUDA graph may hold, and without gradients no memory beyond the result but 2 MiB and
        ``[N, *, r]``. On the CPU the rows of an adapter are multiplied together. Under ``torch.func``, in
        ``torch.export`` and for tensor subclasses every row gets copies of its adapter's factors.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit; adapters that are not in one stack, as those
            of different rank are not unless they are padded. IndexError: an index out of range, by name on the
            CPU, elsewhere as torch raises it (RuntimeError where Inductor indexes, an assertion on the device on CUDA).
    """
    tensors = x, weight, lora_A, lora_B, magnitude, bias, weight_norm, adapter_index
    if norm_grad is False and budget == DEFAULT_BUDGET:
        y = eager_mixed.mixed_linear(*tensors, scaling, ranks)
        if y is not None:
            return y
    checks.check_mixed(*tensors, ranks)
    checks.check_norm_grad(norm_grad, weight_norm)
    budget = checks.check_budget(budget)
    adapters = lora_A.shape[0]
    s = _scalings(scaling, adapters, weight, accumulate_dtype(weight, lora_A))
    if weight_norm is None:
        weight_norm = mixed_norm(weight, lora_A, lora_B, scaling, norm_grad=norm_grad, budget=budget)
    return ops.mixed.mixed_linear(x, weight, lora_A, lora_B, magnitude, weight_norm, s, bias, adapter_index, ranks)


def scaled_linear_mixed(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    mag_scale: Tensor,
    bias: Tensor | None,
    *,
    adapter_index: Tensor,
    scaling: Tensor,
    ranks: Tensor | None,
) -> Tensor:
    """:func:`dora_linear_mixed` of ``g [K, out]`` instead of magnitudes and norms, and scalings ``[K]``."""
    y = eager_mixed.mixed_linear(
        x, weight, lora_A, lora_B, mag_scale, bias, None, adapter_index, scaling, ranks, is_scale=True
    )
    if y is not None:
        return y
    checks.check_mixed(x, weight, lora_A, lora_B, mag_scale, bias, None, adapter_index, ranks)
    s = _scalings(scaling, lora_A.shape[0], weight, accumulate_dtype(weight, lora_A))
    return ops.mixed.mixed_linear(x, weight, lora_A, lora_B, mag_scale, None, s, bias, adapter_index, ranks)


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
    stacked, acc = weight.expand(lora_A.shape[0], *weight.shape), accumulate_dtype(weight, lora_A)
    if isinstance(scaling, Tensor) and scaling.ndim == 1:
        s = _scalings(scaling, lora_A.shape[0], weight, acc)
        if not norm_grad and front.all_plain(weight, lora_A, lora_B, s):
            budget = checks.check_budget(budget)
            with front.autocast_off(weight):
                return ops.norm.norm_factored(stacked, lora_A, lora_B, s, None, budget)
        lora_A, lora_B, scaling = lora_A.to(acc), lora_B.to(acc) * s.view(-1, 1, 1), 1.0
    return norm_factored(stacked, lora_A, lora_B, scaling, norm_grad=norm_grad, budget=budget)


def _scalings(scaling: float | Tensor, adapters: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """The scaling of every adapter, ``[K]``."""
    if isinstance(scaling, Tensor) and scaling.ndim == 1:
        checks.check_scalings(scaling, adapters, like)
        return scaling.to(dtype)
    scaling = checks.check_scaling(scaling)
    return scaling_tensor(scaling, like, dtype).expand(adapters)
