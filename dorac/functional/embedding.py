"""The embedding: a lookup in the adapted table, whose norm is taken over the vocabulary."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dorac import checks, ops
from dorac.functional.linear import compose
from dorac.functional.norm import magnitude_scale, norm_factored, scaling_tensor
from dorac.numerics import accumulate_dtype

# A table is tall: the buffers of its norm stay small beside it, and small chunks are the faster ones on the CPU.
EMBEDDING_BUDGET = 16 * 2**20


def dora_embedding(
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
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
    budget: int = EMBEDDING_BUDGET,
) -> Tensor:
    """An embedding with DoRA: ``y = g * (weight[x] + s * lora_A^T[x] lora_B^T)``, ``g = m / ||W + s BA||_row``.

    The matrix W that DoRA adapts is ``weight^T [dim, vocab]``, as in PEFT: there is a magnitude for each of the ``dim``
    features, and its norm runs over the vocabulary. Only the rows that are looked up are computed, and nothing of the
    table's size is allocated.

    ``F.embedding``'s ``max_norm`` is missing on purpose: it rewrites rows of the weight in every call, and with them
    the norm. A scaled embedding (Gemma's ``embed_scale``) multiplies the result; the norm does not see its scale.

    Args:
        x: indices ``[*]``, int64 or int32.
        weight: ``[vocab, dim]``, any strides; usually frozen, receives its gradient (with n held constant) if it
            requires one.
        lora_A: ``[r, vocab]``. lora_B: ``[dim, r]``. Any strides (a transposed view is not copied), one dtype, which
            may differ from the weight's; the low-rank branch runs in it. These are PEFT's ``lora_embedding_A`` and
            ``lora_embedding_B`` as stored; its layers pass the transposes around.
        magnitude: m, ``[dim]``, any float dtype; best kept in float32.
        scaling: s, a finite number or a 0-d tensor.
        weight_norm: n, ``[dim]``, if it is known, from ``norm_factored(weight.T, lora_A, lora_B, scaling)``.
        norm_grad: whether gradient flows through the norm too, to all columns of ``lora_A``; see :func:`norm_factored`.
        padding_idx: an index that adds nothing to the gradients of ``lora_A`` and ``weight``, whose row there stays as
            it is; its output is that of any row, and lora_B and the magnitude see it, as in PEFT.
        scale_grad_by_freq: divides what an index adds to the gradients of ``lora_A`` and ``weight`` by how often it
            occurs in x.
        sparse: gives ``lora_A`` a sparse COO gradient of the columns looked up, for optimisers that take one, and
            ``weight`` that of ``F.embedding``. Under ``torch.func`` the gradient of ``lora_A`` is dense; with
            ``norm_grad``, whose part of them reaches every column, both are.
        budget: bytes for the buffers of the norm, see :func:`norm_factored`.

    Returns:
        ``[*, dim]`` in the dtype of ``weight``. Gradients flow to lora_A, lora_B, magnitude and weight, through the
        norm only if ``norm_grad`` says so.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit, factors in another layout, a scaling that is
            not finite, a padding_idx outside the vocabulary, ``sparse`` with ``scale_grad_by_freq`` (torch has no such
            gradient).
        IndexError: an index outside the vocabulary, as ``F.embedding`` raises it (on CUDA a device-side assertion).

    Source: arXiv 2402.09353, sections 4.1 and 4.3; the axis of the norm is PEFT's.
    """
    checks.check_embedding(x, weight, lora_A, lora_B, magnitude, weight_norm)
    checks.check_lookup(padding_idx, scale_grad_by_freq, sparse, weight.shape[0])
    scaling = checks.check_scaling(scaling)
    checks.check_norm_grad(norm_grad, weight_norm)
    budget = checks.check_budget(budget)
    sparse = sparse and not norm_grad  # a sum of sparse and dense is dense, and Inductor fails at it
    # Before the norm, so that an index out of range costs nothing.
    base = F.embedding(x, weight, padding_idx, scale_grad_by_freq=scale_grad_by_freq, sparse=sparse)
    s = scaling_tensor(scaling, weight, accumulate_dtype(weight, lora_A, lora_B))
    if weight_norm is None:
        weight_norm = norm_factored(weight.t(), lora_A, lora_B, s, norm_grad=norm_grad, budget=budget)
    if sparse:
        h = _sparse_lookup(x, lora_A, padding_idx)
    else:
        h = F.embedding(x, lora_A.t(), padding_idx, scale_grad_by_freq=scale_grad_by_freq)
    return compose(base, F.linear(h, lora_B), magnitude_scale(magnitude, weight_norm), s)


def _sparse_lookup(x: Tensor, lora_A: Tensor, padding_idx: int | None) -> Tensor:
    """``F.embedding(x, lora_A.T, padding_idx, sparse=True)``, if autograd could transpose its gradient."""
    h = ops.embedding.sparse_columns(lora_A, x.reshape(-1)).reshape(*x.shape, lora_A.shape[0])
    if padding_idx is None:
        return h
    padding = (x == padding_idx % lora_A.shape[1])[..., None]
    return torch.where(padding, h.detach(), h)
