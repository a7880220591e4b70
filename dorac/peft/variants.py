"""PEFT's DoRA variants (``peft.tuners.lora.variants``): how an adapter is written into the base weight and taken out.

Their ``init`` and ``forward`` are PEFT's, which call the layers of :mod:`dorac.peft.dora`.
"""

import torch
from peft.tuners.lora import variants
from torch import Tensor, nn

from dorac import functional
from dorac.peft.weights import dense_weight, gathered, whole

__all__ = [
    "DoraConv1dVariant",
    "DoraConv2dVariant",
    "DoraConv3dVariant",
    "DoraEmbeddingVariant",
    "DoraLinearVariant",
]


def factors(module: nn.Module, adapter: str) -> tuple[Tensor, Tensor]:
    """The adapter's factors as PEFT stores them; a ``RuntimeError`` if FSDP1 holds them in parts now."""
    if adapter in module.lora_embedding_A:
        return whole(module.lora_embedding_A[adapter]), whole(module.lora_embedding_B[adapter])
    return whole(module.lora_A[adapter].weight), whole(module.lora_B[adapter].weight)


def matrices(module: nn.Module, adapter: str, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The weight as the matrix ``[out, in]`` that DoRA adapts, and the factors of its change."""
    lora_A, lora_B = (factor.to(weight.device) for factor in factors(module, adapter))
    if weight.ndim >= 3:  # PEFT merges no grouped convolution
        return functional.conv_matrices(weight.contiguous(), lora_A.contiguous(), lora_B)
    return module.lora_magnitude_vector[adapter]._matrix(weight), lora_A, lora_B


def as_stored(module: nn.Module, adapter: str, matrix: Tensor, weight: Tensor) -> Tensor:
    """``matrix [out, in]`` in the shape and the strides of the base layer's ``weight``."""
    stored = torch.empty_like(weight)
    if weight.ndim >= 3:
        return stored.copy_(matrix.view(weight.shape))
    module.lora_magnitude_vector[adapter]._matrix(stored).copy_(matrix)
    return stored


@torch.no_grad()
def merged(module: nn.Module, adapter: str, *, safe_merge: bool) -> Tensor:
    """``g * (W' + s * BA)`` where W' is the base weight with what is merged into it; g is that of W alone.

    The norm is kept for :func:`unmerged`, under the key and in the shape that stock PEFT keeps it.
    """
    magnitude = module.lora_magnitude_vector[adapter]
    scaling = module.scaling[adapter]
    with module._unmerged_base_weight(safe_merge=safe_merge) as base_weight:
        norm = magnitude.factored_norm(
            base_weight, *(f.to(base_weight.device) for f in factors(module, adapter)), scaling
        )
    module._cache_store(f"{adapter}-weight_norm", norm)
    weight = dense_weight(module.get_base_layer()).detach()
    matrix, _ = functional.merge_weight(
        *matrices(module, adapter, weight),
        whole(magnitude.weight, norm.numel()).flatten().to(weight.device),
        scaling=scaling,
        weight_norm=norm.flatten().to(weight.device),
    )
    return as_stored(module, adapter, matrix, weight)


@torch.no_grad()
def unmerged(module: nn.Module, adapter: str, weight: Tensor) -> Tensor:
    """``W' / g - s * BA``, W' the weight that :func:`merged` gave.

    Raises:
        ValueError: rows whose g is zero or not finite; the adapter stays merged.
    """
    norm = module._caches[f"{adapter}-weight_norm"].flatten().to(weight.device)
    magnitude = whole(module.lora_magnitude_vector[adapter].weight, norm.numel()).flatten().to(weight.device)
    try:
        matrix = functional.unmerge_weight(
            *matrices(module, adapter, weight),
            magnitude,
            scaling=module.scaling[adapter],
            weight_norm=norm.to(torch.promote_types(norm.dtype, torch.float32)),
        )
    except ValueError:
        module.merged_adapters.append(adapter)  # PEFT has already taken it off
        raise
    module._cache_pop(f"{adapter}-weight_norm")
    return as_stored(module, adapter, matrix, weight)


class OnDorac:
    """The three ways in which PEFT asks a variant for weights."""

    @staticmethod
    def merge_safe(module: nn.Module, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return merged(module, active_adapter, safe_merge=True).to(orig_weight.dtype)

    @staticmethod
    def merge_unsafe(module: nn.Module, active_adapter: str, orig_weight: Tensor) -> None:
        orig_weight.data = merged(module, active_adapter, safe_merge=False).to(orig_weight.dtype)

    @staticmethod
    def unmerge(module: nn.Module, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return unmerged(module, active_adapter, orig_weight.detach())


class DoraLinearVariant(OnDorac, variants.DoraLinearVariant):
    """Linear layers."""


class DoraEmbeddingVariant(OnDorac, variants.DoraEmbeddingVariant):
    """Embeddings."""

    @staticmethod
    def forward(module: nn.Module, *, active_adapter: str, x: Tensor, result: Tensor, **kwargs) -> Tensor:
        # Stock PEFT's forward transposes the factors; of a parted one autograd would remember that it has no elements.
        with gathered(factors(module, active_adapter)):
            return variants.DoraEmbeddingVariant.forward(
                module, active_adapter=active_adapter, x=x, result=result, **kwargs
            )


class DoraConv1dVariant(OnDorac, variants.DoraConv1dVariant):
    """Convolutions of one dimension."""


class DoraConv2dVariant(OnDorac, variants.DoraConv2dVariant):
    """Convolutions of two dimensions."""


class DoraConv3dVariant(OnDorac, variants.DoraConv3dVariant):
    """Convolutions of three dimensions."""
