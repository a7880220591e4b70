"""PEFT's LoRA layers (``peft.tuners.lora.layer``) with one more path: the whole adapted layer in one functional call.

Stock PEFT runs the base layer and adds to its output. Where one DoRA adapter is all that is active and everything it
needs lies there as plain tensors, these classes compute base and adapter together; everywhere else (several adapters,
quantised or sharded weights, hooks) they do what PEFT does, with the layers of :mod:`dorac.peft.dora`.
"""

from peft.tuners.lora import layer
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformers.pytorch_utils import Conv1D

from dorac import functional
from dorac.numerics import FLOAT_DTYPES
from dorac.ops.front import autocast_dtype
from dorac.peft import variants
from dorac.peft.merging import Merging
from dorac.peft.weights import is_fsdp_unit, is_plain

__all__ = ["Conv1d", "Conv2d", "Conv3d", "Embedding", "Linear"]


def lone_adapter(module: layer.LoraLayer, factors, args: tuple, kwargs: dict) -> str | None:
    """The active adapter, if there is one alone, it is DoRA's, and it is not merged or switched off."""
    if args or kwargs or module.disable_adapters or module.merged:
        return None
    active = [name for name in module.active_adapters if name in factors]
    if len(active) != 1 or not isinstance(module.lora_variant.get(active[0]), variants.OnDorac):
        return None
    return active[0]


def unhooked(*modules: nn.Module) -> bool:
    """Whether nothing but their own forwards would run if these modules were called."""
    return not _has_any_global_hook() and not any(
        m._forward_pre_hooks
        or m._forward_hooks
        or m._backward_hooks
        or m._backward_pre_hooks
        or "forward" in m.__dict__  # accelerate's hooks
        or is_fsdp_unit(m)
        for m in modules
    )


def fit(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> bool:
    """Whether dtypes and devices are such that the base layer alone would run on x, and the factors beside it."""
    return (
        (x.dtype == weight.dtype or (x.dtype in FLOAT_DTYPES and autocast_dtype(x) is not None))
        and lora_A.dtype == lora_B.dtype
        and x.device == weight.device == lora_A.device == lora_B.device
        and is_plain(lora_A)
        and is_plain(lora_B)
    )


def dropout_p(module: layer.LoraLayer, adapter: str) -> float | None:
    """The probability with which PEFT drops elements of the adapter's input now; None for a dropout of another kind."""
    dropout = module.lora_dropout[adapter]
    if type(dropout) is nn.Identity or not module.training or not dropout.training:
        return 0.0
    return dropout.p if type(dropout) is nn.Dropout and dropout.p < 1 else None


class _Layer(Merging, variants.TakesVariants):
    """What the layers have in common: how they merge, and which variants they take."""


class Linear(_Layer, layer.Linear):
    """``y = g * (x W^T + s (x lora_A^T) lora_B^T) + b`` over an ``nn.Linear`` or GPT-2 ``Conv1D``."""

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        adapter = lone_adapter(self, self.lora_A, args, kwargs)
        if adapter is None or not self._is_direct(x, adapter):
            return super().forward(x, *args, **kwargs)
        base, magnitude = self.base_layer, self.lora_magnitude_vector[adapter]
        factors = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        scaling = self.scaling[adapter]
        norm = magnitude.factored_norm(base.weight, *factors, scaling, adapter_name=adapter)
        return functional.dora_linear(
            x,
            base.weight.t() if self.fan_in_fan_out else base.weight,
            *factors,
            magnitude.weight.to(x.device),
            base.bias,
            scaling=scaling,
            weight_norm=norm,
            dropout_p=dropout_p(self, adapter),
        )

    def _is_direct(self, x: Tensor, adapter: str) -> bool:
        base, lora_A, lora_B = self.base_layer, self.lora_A[adapter], self.lora_B[adapter]
        return (
            type(base) is (Conv1D if self.fan_in_fan_out else nn.Linear)
            and type(lora_A) is nn.Linear
            and type(lora_B) is nn.Linear
            and unhooked(base, lora_A, lora_B, self.lora_dropout[adapter], self.lora_magnitude_vector[adapter])
            and is_plain(base.weight)
            and fit(x, base.weight, lora_A.weight, lora_B.weight)
            and dropout_p(self, adapter) is not None
        )


class Embedding(_Layer, layer.Embedding):
    """``y = g * (weight[x] + s * lora_A^T[x] lora_B^T)`` over an ``nn.Embedding``."""

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        adapter = lone_adapter(self, self.lora_embedding_A, args, kwargs)
        if adapter is None or not self._is_direct(x, adapter):
            return super().forward(x, *args, **kwargs)
        base, magnitude = self.base_layer, self.lora_magnitude_vector[adapter]
        factors = self.lora_embedding_A[adapter], self.lora_embedding_B[adapter]
        scaling = self.scaling[adapter]
        return functional.dora_embedding(
            x,
            base.weight,
            *factors,
            magnitude.weight.to(x.device),
            scaling=scaling,
            weight_norm=magnitude.factored_norm(base.weight, *factors, scaling, adapter_name=adapter),
            padding_idx=base.padding_idx,
            scale_grad_by_freq=base.scale_grad_by_freq,
            sparse=base.sparse,
        )

    def _is_direct(self, x: Tensor, adapter: str) -> bool:
        base, lora_A, lora_B = self.base_layer, self.lora_embedding_A[adapter], self.lora_embedding_B[adapter]
        return (
            type(base) is nn.Embedding
            and base.max_norm is None
            and not (base.sparse and base.scale_grad_by_freq)
            and adapter not in self.input_fns  # tensor parallelism
            and unhooked(base, self.lora_magnitude_vector[adapter])
            and is_plain(base.weight)
            and is_plain(lora_A)
            and is_plain(lora_B)
            and lora_A.dtype == lora_B.dtype
            and x.device == base.weight.device == lora_A.device == lora_B.device
        )


class _ConvNd(_Layer):
    """``y = g * (conv(x, W) + s * conv_1x1(conv(x, lora_A), lora_B)) + b``: what the three classes share."""

    STOCK: type[nn.Module]
    FUNCTION: str

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        adapter = lone_adapter(self, self.lora_A, args, kwargs)
        if adapter is None or not self._is_direct(x, adapter):
            return super().forward(x, *args, **kwargs)
        base, magnitude = self.base_layer, self.lora_magnitude_vector[adapter]
        factors = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        scaling = self.scaling[adapter]
        norm = magnitude.factored_norm(base.weight, *factors, scaling, groups=base.groups, adapter_name=adapter)
        return getattr(functional, self.FUNCTION)(
            x,
            base.weight,
            *factors,
            magnitude.weight.flatten().to(x.device),
            base.bias,
            scaling=scaling,
            stride=base.stride,
            padding=base.padding,
            dilation=base.dilation,
            groups=base.groups,
            padding_mode=base.padding_mode,
            weight_norm=norm.flatten(),
            dropout_p=dropout_p(self, adapter),
        )

    def _is_direct(self, x: Tensor, adapter: str) -> bool:
        base, lora_A, lora_B = self.base_layer, self.lora_A[adapter], self.lora_B[adapter]
        return (
            type(base) is self.STOCK
            and type(lora_A) is self.STOCK
            and type(lora_B) is self.STOCK
            and unhooked(base, lora_A, lora_B, self.lora_dropout[adapter], self.lora_magnitude_vector[adapter])
            and is_plain(base.weight)
            and fit(x, base.weight, lora_A.weight, lora_B.weight)
            and dropout_p(self, adapter) is not None
        )


class Conv1d(_ConvNd, layer.Conv1d):
    STOCK, FUNCTION = nn.Conv1d, "dora_conv1d"


class Conv2d(_ConvNd, layer.Conv2d):
    STOCK, FUNCTION = nn.Conv2d, "dora_conv2d"


class Conv3d(_ConvNd, layer.Conv3d):
    STOCK, FUNCTION = nn.Conv3d, "dora_conv3d"
