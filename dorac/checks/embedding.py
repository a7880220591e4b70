"""The tensors of embeddings, and how their gradients are taken."""

import torch
from torch import Tensor

from dorac.checks.linear import check_adapter, check_columns, check_factors
from dorac.checks.shapes import check_dense, check_device, check_float


def check_embedding(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor, weight_norm: Tensor | None
) -> None:
    """The tensors of ``dora_embedding``: ``weight [vocab, dim]``, ``lora_A [r, vocab]``, ``lora_B [dim, r]``."""
    _check_table(x, weight, lora_A, lora_B)
    check_adapter(weight.t(), lora_A, lora_B, magnitude, weight_norm)


def check_embedding_columns(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor, weight_norm: Tensor | None
) -> None:
    """The tensors of ``dora_embedding_columns``."""
    _check_table(x, weight, lora_A, lora_B)
    check_factors(weight.t(), lora_A, lora_B)
    check_columns(magnitude, weight_norm, weight, "vocab", weight.shape[0])


def _check_table(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> None:
    """Indices, an embedding's weight and factors in PEFT's layout."""
    check_dense("x", x, "a tensor of indices")
    if x.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"x must hold int64 or int32 indices, got {x.dtype}")
    check_float("weight", weight)
    if weight.ndim != 2:
        raise ValueError(f"weight must be [vocab, dim], got shape {list(weight.shape)}")
    check_device("x", x, weight)
    vocab, dim = weight.shape
    for name, tensor, layout, axis, size in (
        ("lora_A", lora_A, f"[r, vocab] = [r, {vocab}]", -1, vocab),
        ("lora_B", lora_B, f"[dim, r] = [{dim}, r]", 0, dim),
    ):
        check_float(name, tensor)
        if tensor.ndim != 2 or tensor.shape[axis] != size:
            raise ValueError(
                f"{name} must be {layout} for an embedding [vocab, dim] = {list(weight.shape)} (PEFT's "
                f"lora_embedding_{name[-1]} as stored, not its transpose), got shape {list(tensor.shape)}"
            )


def check_lookup(padding_idx: int | None, scale_grad_by_freq: bool, sparse: bool, vocab: int) -> None:
    """How an embedding treats the gradients of its table."""
    if padding_idx is not None:
        if isinstance(padding_idx, bool) or not isinstance(padding_idx, (int, torch.SymInt)):
            raise TypeError(f"padding_idx must be an integer or None, got {padding_idx!r}")
        if not -vocab <= padding_idx < vocab:
            raise ValueError(f"padding_idx must be in [{-vocab}, {vocab}), got {padding_idx}")
    if sparse and scale_grad_by_freq:
        raise ValueError("sparse must be False with scale_grad_by_freq: torch does not scale sparse gradients")
