"""PEFT's DoRA variants (``peft.tuners.lora.variants``): how an adapter is written into the base weight and taken out.

Their ``init`` and ``forward`` are PEFT's, which call the layers of :mod:`dorac.peft.dora`, but where one adapter of a
linear layer is alone (:mod:`dorac.peft.over`) or dropout is on the low-rank branch alone, of which PEFT knows nothing.
"""

from collections.abc import Iterator
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from dorac import functional, stock_peft
from dorac.nn import merging
from dorac.peft import dora, over
from dorac.peft.dora_linear import is_zero
from dorac.peft.weights import dense_weight, gathered, is_plain, whole
from dorac.stock_peft import LoraLayer

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
    scaling, strength = magnitude.split(module.scaling[adapter])
    with module._unmerged_base_weight(safe_merge=safe_merge) as base_weight:
        norm = magnitude.factored_norm(
            base_weight, *(f.to(base_weight.device) for f in factors(module, adapter)), scaling
        )
    module._cache_store(f"{adapter}-weight_norm", norm)
    if strength is not None:  # whatever PEFT's scaling is when it is unmerged
        module._cache_store(f"{adapter}-strength", strength)
    weight = dense_weight(module.get_base_layer()).detach()
    part, norm = _part(module, adapter, weight, norm, strength)
    matrix, _ = functional.merge_weight(*part, scaling=scaling, weight_norm=norm)
    return as_stored(module, adapter, matrix, weight)


def _part(
    module: nn.Module, adapter: str, weight: Tensor, norm: Tensor, strength: float | Tensor | None
) -> tuple[tuple[Tensor, ...], Tensor]:
    """The matrix, the factors and the magnitude, and the norm, that give the weight at a strength."""
    norm = norm.flatten().to(weight.device)
    magnitude = whole(module.lora_magnitude_vector[adapter].weight, norm.numel()).flatten().to(weight.device)
    return merging.at_strength((*matrices(module, adapter, weight), magnitude), norm, strength)


@torch.no_grad()
def unmerged(module: nn.Module, adapter: str, weight: Tensor) -> Tensor:
    """``W' / g - s * BA``, W' the weight that :func:`merged` gave.

    Raises:
        ValueError: rows whose g is zero or not finite; the adapter stays merged.
    """
    norm = module._caches[f"{adapter}-weight_norm"]
    scaling, _ = module.lora_magnitude_vector[adapter].split(module.scaling[adapter])
    strength = module._caches.get(f"{adapter}-strength")
    norm = norm.to(torch.promote_types(norm.dtype, torch.float32))
    try:
        part, norm = _part(module, adapter, weight, norm, strength)
        merging.refuse_lost(*part[3:], norm, strength)
        matrix = functional.unmerge_weight(*part, scaling=scaling, weight_norm=norm)
    except BaseException:
        module.merged_adapters.append(adapter)  # PEFT has already taken it off the end
        raise
    module._cache_pop(f"{adapter}-weight_norm")
    module._caches.pop(f"{adapter}-strength", None)
    return as_stored(module, adapter, matrix, weight)


def with_names(function: FunctionType, names: dict[str, Any]) -> FunctionType:
    """A copy of a function that finds these under their names in place of what its module has."""
    copy = FunctionType(
        function.__code__,
        {**function.__globals__, **names},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def _with_layers(variant: type, name: str) -> staticmethod:
    """A static method of PEFT's variant over the magnitude layers of :mod:`dorac.peft.dora`."""
    return staticmethod(with_names(getattr(variant, name), {layer: getattr(dora, layer) for layer in dora.__all__}))


def _init(variant: type) -> staticmethod:
    """PEFT's ``init`` of a variant, over dorac's layers; the scaling is the adapter's own then."""
    build = _with_layers(variant, "init").__func__

    def init(module: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        build(module, adapter_name, **kwargs)
        module.lora_magnitude_vector[adapter_name].own_scaling = module.scaling[adapter_name]

    return staticmethod(init)


def overflows(merged_weight: Tensor, *origins: Tensor) -> bool:
    """Whether a weight is not finite that was made of finite ones; of DTensors this is not asked."""
    if not is_plain(origins[0]) or merged_weight.isfinite().all():
        return False
    return all(bool(origin.isfinite().all()) for origin in origins)


class OnDorac:
    """One adapter of a layer: what its dropout is on, and the three ways in which PEFT asks for weights."""

    dropout_on = "adapter"  # what ``enable()`` says

    def supports_lora_conversion(self) -> bool:
        """No: PEFT's ``convert_to_lora`` takes ``s * BA`` for the change and leaves the magnitude out."""
        return False

    @staticmethod
    def merge_safe(module: nn.Module, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return merged(module, active_adapter, safe_merge=True).to(orig_weight.dtype)

    @staticmethod
    def merge_unsafe(module: nn.Module, active_adapter: str, orig_weight: Tensor) -> None:
        new = merged(module, active_adapter, safe_merge=False).to(orig_weight.dtype)
        if overflows(new, orig_weight, *factors(module, active_adapter)):
            raise ValueError(
                f"the merged weight overflows {new.dtype}, of which unmerging could not recover the base weight: "
                "convert the model to a wider dtype before it is merged"
            )
        orig_weight.data = new

    @staticmethod
    def unmerge(module: nn.Module, active_adapter: str, orig_weight: Tensor) -> Tensor:
        return unmerged(module, active_adapter, orig_weight.detach())


def adapters_on_dorac(root: nn.Module, adapter: str | None = None) -> Iterator[tuple[str, LoraLayer, str]]:
    """The layers below ``root`` whose adapter, or with None each of whose adapters, runs on dorac; by name, with it."""
    for name, layer in root.named_modules():
        if isinstance(layer, LoraLayer):
            for other, variant in layer.lora_variant.items():
                if isinstance(variant, OnDorac) and adapter in (None, other):
                    yield name, layer, other


def lone_adapter(module: nn.Module, args: tuple, kwargs: dict) -> str | None:
    """The active adapter, if there is one alone, it is DoRA's, and it is not merged or switched off."""
    if args or kwargs or module._disable_adapters or module.merged_adapters:
        return None
    active = module._active_adapter
    if not isinstance(active, str):
        if len(active) != 1:
            active = [name for name in active if name in module.scaling]  # others have no part in this layer
        if len(active) != 1:
            return None
        active = active[0]
    return active if isinstance(module.lora_variant.get(active), OnDorac) else None


def _is_off(module: nn.Module, adapter: str) -> bool:
    """Whether the adapter is at strength 0."""
    return is_zero(module.lora_magnitude_vector[adapter].split(module.scaling[adapter])[1])


def _of_dropped(variant: type) -> staticmethod:
    """PEFT's ``forward`` of a variant, or with dropout on the low-rank branch the change to the output there is."""

    def forward(module: nn.Module, active_adapter: str, x: Tensor, result: Tensor, **kwargs) -> Tensor:
        if _is_off(module, active_adapter):
            return result
        if module.lora_variant[active_adapter].dropout_on == "adapter":
            return variant.forward(module, active_adapter=active_adapter, x=x, result=result, **kwargs)
        return result + module.lora_magnitude_vector[active_adapter](
            module.lora_dropout[active_adapter](x),
            lora_A=module.lora_A[active_adapter],
            lora_B=module.lora_B[active_adapter],
            scaling=module.scaling[active_adapter],
            base_layer=module.get_base_layer(),
            base_result=result,
            adapter_name=active_adapter,
        )

    return staticmethod(forward)


class DoraLinearVariant(OnDorac, stock_peft.DoraLinearVariant):
    """Linear layers."""

    init = _init(stock_peft.DoraLinearVariant)
    added = _of_dropped(stock_peft.DoraLinearVariant)

    @staticmethod
    def forward(module: nn.Module, active_adapter: str, x: Tensor, result: Tensor, **kwargs) -> Tensor:
        if _is_off(module, active_adapter):
            return result
        if lone_adapter(module, (), {}) == active_adapter:
            y = over.adapted(module, active_adapter, x, result)
            if y is not None:
                return y
        return DoraLinearVariant.added(module, active_adapter=active_adapter, x=x, result=result, **kwargs)


_embedding_stock = stock_peft.DoraEmbeddingVariant.forward


class DoraEmbeddingVariant(OnDorac, stock_peft.DoraEmbeddingVariant):
    """Embeddings."""

    init = _init(stock_peft.DoraEmbeddingVariant)

    @staticmethod
    def forward(module: nn.Module, *, active_adapter: str, x: Tensor, result: Tensor, **kwargs) -> Tensor:
        if _is_off(module, active_adapter):
            return result
        # Stock PEFT's forward transposes the factors; of a parted one autograd would remember that it has no elements.
        with gathered(factors(module, active_adapter)):
            return _embedding_stock(module, active_adapter=active_adapter, x=x, result=result, **kwargs)


class DoraConv1dVariant(OnDorac, stock_peft.DoraConv1dVariant):
    """Convolutions of one dimension."""

    init = _init(stock_peft.DoraConv1dVariant)
    forward = _of_dropped(stock_peft.DoraConv1dVariant)


class DoraConv2dVariant(OnDorac, stock_peft.DoraConv2dVariant):
    """Convolutions of two dimensions."""

    init = _init(stock_peft.DoraConv2dVariant)
    forward = _of_dropped(stock_peft.DoraConv2dVariant)


class DoraConv3dVariant(OnDorac, stock_peft.DoraConv3dVariant):
    """Convolutions of three dimensions."""

    init = _init(stock_peft.DoraConv3dVariant)
    forward = _of_dropped(stock_peft.DoraConv3dVariant)


_BY_STOCK = {getattr(stock_peft, name): globals()[name] for name in __all__}
COVERED = tuple(_BY_STOCK)  # PEFT's own


class TakesVariants:
    """A LoRA layer that takes dorac's variants where PEFT's class has PEFT's."""

    def resolve_lora_variant(self, **kwargs: Any) -> stock_peft.LoraVariant | None:
        variant = super().resolve_lora_variant(**kwargs)
        return _BY_STOCK[type(variant)]() if type(variant) in _BY_STOCK else variant
