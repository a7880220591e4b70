"""DoRA as pure functions of tensors (Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", arXiv 2402.09353).

    V = W + s * lora_B @ lora_A          the adapted direction, section 4.1
    n = ||V||_row                        one L2 norm per output row, a constant in backprop, section 4.3
    g = m / n                            1 where n <= 1e-12
    y = g * (x W^T + s (x lora_A^T) lora_B^T) + b

Neither V nor ``lora_B @ lora_A`` is ever materialised. Norm, g and the compose arithmetic are computed in float32
(float64 for float64 inputs), also under autocast, and the result is rounded once, to the activation's dtype. All
functions trace under ``torch.compile(fullgraph=True)`` and never change their inputs.

Legend: ``*`` any leading shape (also none), ``in``, ``out``, ``r`` the feature sizes and the rank.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from dorac import checks, ops
from dorac.numerics import accumulate_dtype
from dorac.ops import front
from dorac.ops.library import REVISION
from dorac.ops.norm import DEFAULT_BUDGET, column_chunks

__all__ = [
    "compose",
    "dora_linear",
    "init_magnitude",
    "magnitude_scale",
    "merge_weight",
    "norm_factored",
    "unmerge_weight",
]


def _scaling_tensor(scaling: float | Tensor, like: Tensor, dtype: torch.dtype) -> Tensor:
    """``scaling`` as a 0-d tensor. The ops take no Python float: the compiler would compile one graph per value."""
    if isinstance(scaling, Tensor):
        return scaling.to(device=like.device, dtype=dtype)
    if torch.compiler.is_compiling():
        # A product keeps the value symbolic; torch.full would specialise the graph on it.
        return torch.ones((), dtype=dtype, device=like.device) * scaling
    return torch.full((), scaling, dtype=dtype, device=like.device)


def norm_factored(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float | Tensor,
    *,
    weight_sq: Tensor | None = None,
    budget: int = DEFAULT_BUDGET,
) -> Tensor:
    """``n = ||W + s * lora_B @ lora_A||_row``, without the product.

    Args:
        weight: ``[out, in]``, float16 / bfloat16 / float32 / float64, any strides (a transposed view is not copied).
        lora_A: ``[r, in]``, any of these dtypes.
        lora_B: ``[out, r]``, the dtype of ``lora_A``.
        scaling: s, a finite number or a 0-d tensor; zero and negative values are fine.
        weight_sq: ``||W||_row^2 [out]`` if known. It saves a pass over W, but rows of V much shorter than those of W
            lose digits. The Triton kernel, which reads W once at any rate, makes no use of it.
        budget: bytes that all live buffers of the computation may take together. At least one column of W is processed
            at a time, however small the budget; on CUDA the columns come in multiples of 64 where the budget allows.
            The Triton kernel needs no buffers.

    Returns:
        ``[out]``, float32 (float64 if any input is float64). No gradient flows through it (paper, section 4.3),
        also in forward mode.

    Raises:
        TypeError: a tensor that is not of these dtypes (float8 and integer weights are dequantised by the caller).
        ValueError: shapes or devices that do not fit, a scaling that is not finite, a budget below one byte.
    """
    checks.check_factors(weight, lora_A, lora_B)
    checks.check_scaling(scaling)
    checks.check_vector("weight_sq", weight_sq, weight)
    checks.check_budget(budget)
    s = _scaling_tensor(scaling, weight, accumulate_dtype(weight, lora_A, lora_B))
    # The op's body switches autocast off too, but vmap restores the state from before the call for what runs there.
    with front.autocast_off(weight):
        return torch.ops.dorac.norm_factored(weight, lora_A, lora_B, s, weight_sq, budget, REVISION)


def magnitude_scale(magnitude: Tensor, weight_norm: Tensor) -> Tensor:
    """``g = m / n`` per output row, 1 on zero rows (``n <= 1e-12``); gradient flows to ``magnitude``.

    Args:
        magnitude: ``[out]``, any float dtype.
        weight_norm: ``[out]`` from :func:`norm_factored`.

    Returns:
        ``[out]``, float32 (float64 if either input is float64).

    Raises:
        TypeError, ValueError: a magnitude whose dtype, length or device does not fit ``weight_norm``.
    """
    checks.check_vector("magnitude", magnitude, weight_norm)
    return ops.compose.magnitude_scale(magnitude, weight_norm)


def compose(
    base: Tensor,
    lora: Tensor,
    mag_scale: Tensor,
    scaling: float | Tensor,
    *,
    bias: Tensor | None = None,
    delta: bool = False,
) -> Tensor:
    """``g * (base + s * lora) + b``, or with ``delta=True`` the change ``(g - 1) * base + g * s * lora`` to ``base``.

    The delta is computed in that form, never as ``g * (base + s * lora) - base``: g is close to 1 and the difference
    would cancel.

    Args:
        base: ``[*, out]``, the frozen layer's output without its bias.
        lora: ``[*, out]``, the low-rank branch's output before scaling, any float dtype.
        mag_scale: g, ``[out]``, from :func:`magnitude_scale`.
        scaling: s, a finite number or a 0-d tensor.
        bias: ``[out]``; never scaled by g. Not allowed in the delta form, whose ``base`` excludes the bias.

    Returns:
        ``[*, out]`` in the dtype of ``base``. Gradients flow to base, lora, mag_scale and bias; one tensor of the
        size of the output is saved for backward, and none if ``mag_scale`` needs no gradient.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit; a bias in the delta form.
    """
    checks.check_compose(base, lora, mag_scale, bias, delta)
    checks.check_scaling(scaling)
    s = _scaling_tensor(scaling, base, accumulate_dtype(base, lora, mag_scale))
    return torch.ops.dorac.compose(base, lora, mag_scale, s, bias, delta, REVISION)


def dora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    bias: Tensor | None = None,
    *,
    scaling: float | Tensor,
    weight_norm: Tensor | None = None,
    dropout_p: float = 0.0,
    budget: int = DEFAULT_BUDGET,
) -> Tensor:
    """A linear layer with DoRA: ``y = g * (x W^T + s (x lora_A^T) lora_B^T) + b``, ``g = m / ||W + s BA||_row``.

    Args:
        x: ``[*, in]``, the dtype of ``weight`` (under autocast any float dtype).
        weight: ``[out, in]``, any strides; usually frozen, receives its gradient (with n held constant) if it requires
            one.
        lora_A: ``[r, in]``. lora_B: ``[out, r]``. One dtype, which may differ from the weight's; the low-rank branch
            runs in it.
        magnitude: m, ``[out]``, any float dtype; best kept in float32.
        bias: ``[out]``.
        scaling: s, a finite number or a 0-d tensor.
        weight_norm: n, ``[out]``, if it is known, from :func:`norm_factored` on the same weight, factors and scaling.
        dropout_p: probability with which elements of x are zeroed on the adapter's side, as PEFT does: the frozen layer
            sees x, the change that DoRA makes to it sees ``x' = dropout(x)``, so that
            ``y = x W^T + b + (g - 1) x' W^T + g s x' lora_A^T lora_B^T``. Always applied when positive; a module
            passes 0 in eval mode.
        budget: bytes for the buffers of the norm, see :func:`norm_factored`.

    Returns:
        ``[*, out]`` in the dtype of ``x W^T``. Gradients flow to x, lora_A, lora_B, magnitude, bias and weight,
        never through the norm.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit, a scaling that is not finite, a dropout
            outside [0, 1).
    """
    checks.check_linear(x, weight, lora_A, lora_B, magnitude, bias, weight_norm)
    checks.check_scaling(scaling)
    checks.check_dropout(dropout_p)
    s = _scaling_tensor(scaling, weight, accumulate_dtype(weight, lora_A, lora_B))
    if weight_norm is None:
        weight_norm = norm_factored(weight, lora_A, lora_B, s, budget=budget)
    if not dropout_p:
        return torch.ops.dorac.dora_linear(x, weight, lora_A, lora_B, magnitude, weight_norm, s, bias, REVISION)
    x_adapter = F.dropout(x, dropout_p)
    lora = F.linear(F.linear(x_adapter.to(lora_A.dtype), lora_A), lora_B)
    g = magnitude_scale(magnitude, weight_norm)
    return F.linear(x, weight, bias) + compose(F.linear(x_adapter, weight), lora, g, s, delta=True)


def init_magnitude(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float | Tensor) -> Tensor:
    """``m0 = ||W + s * lora_B @ lora_A||_row``: the adapted layer starts with g = 1 exactly (paper, section 4.1).

    Args, Raises: see :func:`norm_factored`.

    Returns:
        ``[out]``, float32 (float64 if any input is float64), whatever the dtype of the factors.
    """
    return norm_factored(weight, lora_A, lora_B, scaling)


def _low_rank_chunks(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float | Tensor, budget: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Chunks of the weight's columns and of ``s * lora_B @ lora_A``, both in the accumulate dtype.

    Merging and unmerging both take the product from here: computed alike, its own rounding errors cancel exactly.
    """
    acc = accumulate_dtype(weight, lora_A, lora_B)
    scaled_b = lora_B.to(acc) * _scaling_tensor(scaling, weight, acc)
    for columns in column_chunks(weight, lora_A, lora_B, None, budget):
        with front.autocast_off(weight):
            product = scaled_b @ lora_A[:, columns].to(acc)
        yield weight[:, columns].to(acc), product


@torch.no_grad()
def merge_weight(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    *,
    scaling: float | Tensor,
    weight_norm: Tensor | None = None,
    budget: int = DEFAULT_BUDGET,
) -> tuple[Tensor, Tensor]:
    """``W' = g * (W + s * lora_B @ lora_A)``: the plain weight of the adapted layer (paper, section 4.1).

    Args: as in :func:`dora_linear`. Not differentiable: the results carry no gradient.

    Returns:
        ``(W', n)``: ``[out, in]`` in the weight's dtype, rounded once, and the norm ``[out]`` that
        :func:`unmerge_weight` needs.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit, a scaling that is not finite.
    """
    if weight_norm is None:
        weight_norm = norm_factored(weight, lora_A, lora_B, scaling, budget=budget)
    checks.check_adapter(weight, lora_A, lora_B, magnitude, weight_norm)
    checks.check_scaling(scaling)
    g = magnitude_scale(magnitude, weight_norm)[:, None]
    chunks = _low_rank_chunks(weight, lora_A, lora_B, scaling, budget)
    return torch.cat([(g * (w + product)).to(weight.dtype) for w, product in chunks], dim=1), weight_norm


def invertible_scale(magnitude: Tensor, weight_norm: Tensor) -> Tensor:
    """:func:`magnitude_scale`, refusing rows whose g is zero or not finite. Reads values: waits for the device."""
    g = magnitude_scale(magnitude, weight_norm)
    lost = ((g == 0) | ~g.isfinite()).nonzero().flatten().tolist()
    if lost:
        rows = ", ".join(map(str, lost[:8])) + (", ..." if len(lost) > 8 else "")
        raise ValueError(
            f"cannot unmerge rows {rows}: their g is 0 or not finite, so the merged rows no longer hold the base weight"
        )
    return g


@torch.no_grad()
def unmerge_weight(
    merged_weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    *,
    scaling: float | Tensor,
    weight_norm: Tensor,
    budget: int = DEFAULT_BUDGET,
) -> Tensor:
    """``W = W' / g - s * lora_B @ lora_A``: undoes :func:`merge_weight` to ``2 eps * max(|V|, |W|)``.

    eps is that of the weight's dtype; the bound holds where ``g * V`` is a normal number of that dtype (float16
    loses digits below 6e-5 and has none above 65504) and for the ``budget`` that the weight was merged with.

    Args: as in :func:`merge_weight`, with the same factors and magnitude, and ``weight_norm`` the norm that it returned
        (it cannot be recomputed from W'). Reads values of g, so it waits for the device.

    Returns:
        ``[out, in]`` in the dtype of ``merged_weight``.

    Raises:
        ValueError: rows whose g is zero or not finite: their merged rows no longer hold the weight; and what
            :func:`merge_weight` refuses.
    """
    checks.check_adapter(merged_weight, lora_A, lora_B, magnitude, weight_norm)
    checks.check_scaling(scaling)
    g = invertible_scale(magnitude, weight_norm)[:, None]
    chunks = _low_rank_chunks(merged_weight, lora_A, lora_B, scaling, budget)
    return torch.cat([(w / g - product).to(merged_weight.dtype) for w, product in chunks], dim=1)
