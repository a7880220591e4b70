"""DoRA with the norm over the other axis: one magnitude per input, as in the files of LyCORIS' first years and of mlx's
embeddings."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dorac import checks
from dorac.functional.merge import merge_weight
from dorac.functional.norm import magnitude_scale, norm_factored, scaling_tensor
from dorac.numerics import accumulate_dtype
from dorac.ops.norm import DEFAULT_BUDGET


def column_norm(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float | Tensor,
    *,
    norm_grad: bool = False,
    budget: int = DEFAULT_BUDGET,
) -> Tensor:
    """``n = ||W + s * lora_B @ lora_A||_column``: one L2 norm per input, without the product.

    It is :func:`norm_factored` of the transposes, ``W^T + s * lora_A^T @ lora_B^T``, with its kernels.

    Args:
        weight: ``[out, in]``, or ``[E, out, in]`` and every other tensor with E too. lora_A: ``[r, in]``. lora_B:
            ``[out, r]``. Dtypes and strides as in :func:`norm_factored`.
        scaling, norm_grad, budget: see :func:`norm_factored`.

    Returns:
        ``[in]``, float32 (float64 if any input is float64), a constant in backprop unless ``norm_grad``.

    Raises:
        TypeError, ValueError: see :func:`norm_factored`.
    """
    checks.check_factors(weight, lora_A, lora_B)
    return norm_factored(weight.mT, lora_B.mT, lora_A.mT, scaling, norm_grad=norm_grad, budget=budget)


def dora_linear_columns(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    bias: Tensor | None = None,
    *,
    scaling: float | Tensor,
    weight_norm: Tensor | None = None,
    norm_grad: bool = False,
    budget: int = DEFAULT_BUDGET,
) -> Tensor:
    """A linear layer with a magnitude per input: ``y = (g x) W^T + s ((g x) lora_A^T) lora_B^T + b``, ``g = m / n``.

    That is ``x W'^T + b`` with ``W' = (W + s BA) * g``, where g scales the columns. No :func:`dora_linear` of a low
    rank computes it. It is plain aten on every device; the norm has its kernel.

    Args:
        x: ``[*, in]``, the dtype of ``weight`` (under autocast any float dtype).
        weight: ``[out, in]``, any strides. lora_A: ``[r, in]``. lora_B: ``[out, r]``. The low-rank branch runs in the
            factors' dtype.
        magnitude: m, ``[in]``, any float dtype; best kept in float32.
        bias: ``[out]``.
        scaling: s, a finite number or a 0-d tensor.
        weight_norm: n, ``[in]``, if it is known, from :func:`column_norm`.
        norm_grad, budget: see :func:`dora_linear`.

    Returns:
        ``[*, out]`` in the dtype of ``x W^T``. ``g * x`` is rounded to the dtype of x. Where ``lora_B = 0`` and
        ``m = n`` it is ``F.linear(x, weight, bias)``. Gradients flow to all tensors, through the norm only if
        ``norm_grad`` or a ``weight_norm`` that requires a gradient says so.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit, a scaling that is not finite.

    Source: lycoris/modules/locon.py of KohakuBlueleaf/LyCORIS, ``wd_on_out=False``.
    """
    scaling = checks.check_scaling(scaling)
    checks.check_linear_columns(x, weight, lora_A, lora_B, magnitude, bias, weight_norm)
    checks.check_norm_grad(norm_grad, weight_norm)
    if weight_norm is None:
        weight_norm = column_norm(weight, lora_A, lora_B, scaling, norm_grad=norm_grad, budget=budget)
    scaled = (magnitude_scale(magnitude, weight_norm) * x).to(x.dtype)
    base = F.linear(scaled, weight, bias)
    lora = F.linear(F.linear(scaled.to(lora_A.dtype), lora_A), lora_B)
    acc = accumulate_dtype(weight, lora_A, lora_B)
    return (base.to(acc) + scaling_tensor(scaling, weight, acc) * lora.to(acc)).to(base.dtype)


def dora_embedding_columns(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    *,
    scaling: float | Tensor,
    weight_norm: Tensor | None = None,
    norm_grad: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """An embedding with a magnitude per token: ``y = g[x] * v``, ``v = weight[x] + s * lora_A^T[x] lora_B^T``.

    ``g = m / n`` with n the norm of the token's own vector v, so that only what is looked up is computed.

    Args:
        x: indices ``[*]``, int64 or int32.
        weight: ``[vocab, dim]``. lora_A: ``[r, vocab]``. lora_B: ``[dim, r]``. See :func:`dora_embedding`.
        magnitude: m, ``[vocab]``, any float dtype.
        scaling: s, a finite number or a 0-d tensor.
        weight_norm: n, ``[vocab]``, if it is known, from ``column_norm(weight.T, lora_A, lora_B, scaling)``.
        norm_grad: whether gradient flows through the norm too.
        padding_idx: see :func:`dora_embedding`.

    Returns:
        ``[*, dim]`` in the dtype of ``weight``; a row with ``n <= 1e-12`` has ``g = 1``.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit, a scaling that is not finite, a padding_idx
            outside the vocabulary. IndexError: an index outside it.

    Source: mlx_lm/tuner/dora.py of ml-explore/mlx-lm, ``DoRAEmbedding``.
    """
    scaling = checks.check_scaling(scaling)
    checks.check_embedding_columns(x, weight, lora_A, lora_B, magnitude, weight_norm)
    checks.check_lookup(padding_idx, False, False, weight.shape[0])
    checks.check_norm_grad(norm_grad, weight_norm)
    acc = accumulate_dtype(weight, lora_A, lora_B)
    base = F.embedding(x, weight, padding_idx)
    lora = F.linear(F.embedding(x, lora_A.t(), padding_idx), lora_B)
    adapted = base.to(acc) + scaling_tensor(scaling, weight, acc) * lora.to(acc)
    if weight_norm is None:
        norm = torch.linalg.vector_norm(adapted if norm_grad else adapted.detach(), dim=-1)
    else:
        norm = _looked_up(x, weight_norm)
    g = magnitude_scale(_looked_up(x, magnitude).flatten(), norm.flatten()).view(x.shape)
    return (g[..., None] * adapted).to(base.dtype)


def _looked_up(x: Tensor, vector: Tensor) -> Tensor:
    """``vector[x]``, for indices of either type."""
    return F.embedding(x, vector[:, None]).squeeze(-1)


@torch.no_grad()
def merge_columns(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    *,
    scaling: float | Tensor,
    weight_norm: Tensor | None = None,
    budget: int = DEFAULT_BUDGET,
) -> tuple[Tensor, Tensor]:
    """``W' = (W + s * lora_B @ lora_A) * g``, g scaling the columns: the plain weight of :func:`dora_linear_columns`.

    Args: as there; of :func:`dora_embedding_columns` ``weight.T``. Not differentiable.

    Returns:
        ``(W', n)``: ``[out, in]`` in the weight's dtype, rounded once, and the norm ``[in]``.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit, a scaling that is not finite.
    """
    checks.check_factors(weight, lora_A, lora_B)
    transposed = weight.mT, lora_B.mT, lora_A.mT, magnitude
    merged, norm = merge_weight(*transposed, scaling=scaling, weight_norm=weight_norm, budget=budget)
    return merged.mT, norm
