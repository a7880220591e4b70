"""DoRA as the paper writes it (arXiv 2402.09353): dense, readable, any float dtype. The oracle of every test.

Every function computes in the dtype of its inputs: pass float64 for the truth, another dtype for what dense arithmetic
    of that dtype gives.
"""

import torch
from torch import Tensor


def adapted_weight(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """``V = W + s * B A``, ``[out, in]``."""
    return weight + scaling * (lora_B @ lora_A)


def row_norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """``n = ||V||_row``, ``[out]``; differentiable, callers detach it where the paper does (section 4.3)."""
    return torch.linalg.vector_norm(adapted_weight(weight, lora_A, lora_B, scaling), dim=1)


def magnitude_scale(magnitude: Tensor, weight_norm: Tensor) -> Tensor:
    """``g = m / n``, and 1 for a row with ``n <= 1e-12``."""
    zero_row = weight_norm <= 1e-12
    return torch.where(zero_row, torch.ones_like(magnitude), magnitude / weight_norm.masked_fill(zero_row, 1))


def compose(base: Tensor, lora: Tensor, mag_scale: Tensor, scaling: float, bias: Tensor | None = None) -> Tensor:
    """``g * (base + s * lora) + b``."""
    y = mag_scale * (base + scaling * lora)
    return y if bias is None else y + bias


def compose_delta(base: Tensor, lora: Tensor, mag_scale: Tensor, scaling: float) -> Tensor:
    """``(g - 1) * base + g * s * lora``."""
    return (mag_scale - 1) * base + mag_scale * scaling * lora


def dora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    bias: Tensor | None = None,
    *,
    scaling: float,
    weight_norm: Tensor | None = None,
    norm_grad: bool = False,
) -> Tensor:
    """``y = x (g V)^T + b`` with n held constant in backprop unless ``norm_grad``."""
    if weight_norm is None:
        norm = row_norm(weight, lora_A, lora_B, scaling)
        weight_norm = norm if norm_grad else norm.detach()
    y = x @ merge_weight(weight, lora_A, lora_B, magnitude, scaling=scaling, weight_norm=weight_norm).T
    return y if bias is None else y + bias


def merge_weight(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor, *, scaling: float, weight_norm: Tensor
) -> Tensor:
    """``W' = g * V``, ``[out, in]``."""
    return magnitude_scale(magnitude, weight_norm)[:, None] * adapted_weight(weight, lora_A, lora_B, scaling)


def unmerge_weight(
    merged: Tensor, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor, *, scaling: float, weight_norm: Tensor
) -> Tensor:
    """``W = W' / g - s * B A``, ``[out, in]``."""
    return merged / magnitude_scale(magnitude, weight_norm)[:, None] - scaling * (lora_B @ lora_A)
