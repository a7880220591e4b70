"""PEFT's LoRA layers (``peft.tuners.lora.layer``) with one more path: the whole adapted layer in one functional call.

Stock PEFT runs the base layer and adds to its output. Where one DoRA adapter is all that is active and everything it
needs lies there as plain tensors, these classes compute base and adapter together; everywhere else (several adapters,
quantised or sharded weights, hooks) they do what PEFT does, with the layers of :mod:`dorac.peft.dora`.
"""

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling
from torch.nn.modules.module import _has_any_global_hook
from transformers.pytorch_utils import Conv1D

from dorac import functional, offload, stock_peft
from dorac.nn import offloaded, shared
from dorac.numerics import FLOAT_DTYPES
from dorac.ops.front import autocast_dtype
from dorac.ops.norm import DEFAULT_BUDGET
from dorac.peft import dora, mixed, variants
from dorac.peft.direct import dropout_p, parameter, plain_weight, unhooked
from dorac.peft.dora_linear import is_zero
from dorac.peft.merging import Merging
from dorac.peft.norms import AdapterNorm
from dorac.peft.variants import lone_adapter
from dorac.peft.weights import is_plain, whole

__all__ = ["Conv1d", "Conv2d", "Conv3d", "Embedding", "Linear"]


class _Layer(Merging, mixed.MixedBatch, variants.TakesVariants):
    """What the layers have in common: how they merge, which variants they take, and when they compute as one.

    What the answer rests on may change between any two calls and is asked in every one, of the modules' dictionaries:
    so nothing is prepared that could go stale, and nothing has to be told of a change.
    """

    MAGNITUDE: type[nn.Module]  # the class of its magnitude vectors

    def _move_adapter_to_device_of_base_layer(self, *args, **kwargs) -> None:
        with offload.onloaded(self.get_base_layer()):  # to where it computes, not to meta
            super()._move_adapter_to_device_of_base_layer(*args, **kwargs)

    def _norm_keepers(self) -> list[AdapterNorm]:
        return [keeper for magnitude in self.lora_magnitude_vector.values() for keeper in magnitude._keepers()]

    def _magnitude(self, adapter: str, device: torch.device) -> tuple[dora.DoraLinearLayer, Tensor] | None:
        """The module and its weight on this device; None if it has another class or hooks."""
        module = self._modules["lora_magnitude_vector"]._modules.get(adapter)
        if type(module) is not self.MAGNITUDE or not unhooked(module):
            return None
        weight = module.current()
        return module, weight if weight.device == device else weight.to(device)

    def _parts(self, x: Tensor, adapter: str, base_kind: type[nn.Module], kind: type[nn.Module]) -> tuple | None:
        """``base layer, magnitude's module, (weight, lora_A, lora_B), magnitude, dropout's probability``.

        None if one of the modules has another class or hooks, or a tensor is not plain: PEFT's way takes them all.
        """
        modules = self._modules
        base, dropout = modules["base_layer"], modules["lora_dropout"]._modules.get(adapter)
        weight = plain_weight(base, base_kind)
        lora_A = plain_weight(modules["lora_A"]._modules.get(adapter), kind)
        lora_B = plain_weight(modules["lora_B"]._modules.get(adapter), kind)
        if weight is None or lora_A is None or lora_B is None or _has_any_global_hook():
            return None
        device, p = x.device, dropout_p(dropout, self.training)
        if p is None or not (device == weight.device == lora_A.device == lora_B.device) or lora_A.dtype != lora_B.dtype:
            return None
        if x.dtype != weight.dtype and (x.dtype not in FLOAT_DTYPES or autocast_dtype(x) is None):
            return None  # the base layer alone would not run on x
        magnitude = self._magnitude(adapter, device)
        return None if magnitude is None else (base, magnitude[0], (weight, lora_A, lora_B), magnitude[1], p)


@shared.fusable
class Linear(_Layer, stock_peft.Linear):
    """``y = g * (x W^T + s (x lora_A^T) lora_B^T) + b`` over an ``nn.Linear`` or GPT-2 ``Conv1D``."""

    MAGNITUDE = dora.DoraLinearLayer
    save_output = False  # see dorac.save_outputs

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        if "_hf_hook" in self._modules["base_layer"].__dict__:
            return offloaded.forward(self, self._norm_keepers(), x, *args, **kwargs)
        if not is_dynamo_compiling() and shared.here.together is not None and not (args or kwargs):
            y = shared.here.together.take(self, x)
            if y is not None:
                return y
        adapter = lone_adapter(self, args, kwargs)
        found = None if adapter is None else self._operands(x, adapter)
        if found is None:
            return super().forward(x, *args, **kwargs)
        tensors, options = found
        return functional.dora_linear(x, *tensors, **options) if tensors else self._modules["base_layer"](x)

    def _mixed_batch_forward(self, x: Tensor, *args, adapter_names: list[str], **kwargs) -> Tensor:
        if not args and all(value is None for value in kwargs.values()):
            first = adapter_names[0] if len(set(adapter_names)) == 1 else None
            found = self._operands(x, first) if isinstance(self.lora_variant.get(first), variants.OnDorac) else None
            if found is not None:
                tensors, options = found
                return functional.dora_linear(x, *tensors, **options) if tensors else self._modules["base_layer"](x)
            y = mixed.linear(self, x, adapter_names, Conv1D if self.fan_in_fan_out else nn.Linear)
            if y is not None:
                return y
        return super()._mixed_batch_forward(x, *args, adapter_names=adapter_names, **kwargs)

    def _operands(self, x: Tensor, adapter: str) -> tuple[tuple, dict] | None:
        """What ``dora_linear`` gets of the layer with this adapter alone, beside x; None: PEFT's way computes it.

        No tensors: the base layer alone does.
        """
        parts = self._parts(x, adapter, Conv1D if self.fan_in_fan_out else nn.Linear, nn.Linear)
        if parts is None:
            return None
        base, module, (weight, lora_A, lora_B), magnitude, p = parts
        scaling, strength = module.split(self.scaling[adapter])
        norm = module.known_norm(base, lora_A, lora_B, scaling)
        if norm is None and (strength is not None or module.keeps_norms()):  # else the function takes it
            norm = module.factored_norm(weight, lora_A, lora_B, scaling, adapter_name=adapter)
        if strength is not None:
            if is_zero(strength):
                return (), {}
            lora_B, magnitude, norm = functional.at_strength(lora_B, magnitude, norm, strength)
        if self.fan_in_fan_out:
            weight = weight.t()
        return (weight, lora_A, lora_B, magnitude, parameter(base, "bias")), {
            "scaling": scaling,
            "weight_norm": norm,
            "dropout_p": p,
            "dropout_on": self.lora_variant[adapter].dropout_on,
            "save_output": self.save_output,
            "budget": module.norm_budget,
        }

    def projection(self, x: Tensor) -> tuple[functional.Projection, str] | None:
        """See :class:`dorac.nn.shared.Fusable`."""
        adapter = None if "_hf_hook" in self._modules["base_layer"].__dict__ else lone_adapter(self, (), {})
        found = None if adapter is None else self._operands(x, adapter)
        if not (found and found[0]) or not shared.fits(x, found[0][0]):
            return None
        tensors, options = found
        if options["budget"] != DEFAULT_BUDGET and options["weight_norm"] is None:
            return None
        settings = (options[name] for name in ("weight_norm", "scaling", "dropout_p", "save_output"))
        return functional.Projection(*tensors, *settings), options["dropout_on"]


class Embedding(_Layer, stock_peft.Embedding):
    """``y = g * (weight[x] + s * lora_A^T[x] lora_B^T)`` over an ``nn.Embedding``."""

    MAGNITUDE = dora.DoraEmbeddingLayer

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        if "_hf_hook" in self._modules["base_layer"].__dict__:
            return offloaded.forward(self, self._norm_keepers(), x, *args, **kwargs)
        adapter = lone_adapter(self, args, kwargs)
        parts = None if adapter is None else self._parts(x, adapter)
        if parts is None:
            return super().forward(x, *args, **kwargs)
        base, module, (weight, lora_A, lora_B), magnitude = parts
        scaling, strength = module.split(self.scaling[adapter])
        norm = module.known_norm(base, lora_A, lora_B, scaling)
        if norm is None and (strength is not None or module.keeps_norms()):  # else the function takes it
            norm = module.factored_norm(weight, lora_A, lora_B, scaling, adapter_name=adapter)
        if strength is not None:
            if is_zero(strength):
                return base(x)
            lora_B, magnitude, norm = functional.at_strength(lora_B, magnitude, norm, strength)
        return functional.dora_embedding(
            x,
            weight,
            lora_A,
            lora_B,
            magnitude,
            scaling=scaling,
            weight_norm=norm,
            padding_idx=base.padding_idx,
            scale_grad_by_freq=base.scale_grad_by_freq,
            sparse=base.sparse,
            budget=module.norm_budget,
        )

    def scale_layer(self, scale: float) -> None:
        """As that of the other layers, where PEFT's passes an embedding by."""
        for adapter in filter(self.scaling.__contains__, self.active_adapters):
            self.scaling[adapter] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """As that of the other layers: divides, or puts the adapter's own scaling back."""
        for adapter in filter(self.scaling.__contains__, self.active_adapters):
            if scale is None:
                self.set_scale(adapter, 1.0)
            else:
                self.scaling[adapter] /= scale

    def _parts(self, x: Tensor, adapter: str) -> tuple | None:
        """As of the other layers, without a dropout: PEFT has none on an embedding."""
        base = self._modules["base_layer"]
        weight = plain_weight(base, nn.Embedding)
        if weight is None or adapter in self.input_fns or _has_any_global_hook():  # input_fns: tensor parallelism
            return None
        lora_A = parameter(self._modules["lora_embedding_A"], adapter)
        lora_B = parameter(self._modules["lora_embedding_B"], adapter)
        if not (
            base.max_norm is None
            and not (base.sparse and base.scale_grad_by_freq)
            and is_plain(lora_A)
            and is_plain(lora_B)
            and lora_A.dtype == lora_B.dtype
            and x.device == weight.device == lora_A.device == lora_B.device
        ):
            return None
        magnitude = self._magnitude(adapter, x.device)
        return None if magnitude is None else (base, magnitude[0], (weight, whole(lora_A), whole(lora_B)), magnitude[1])


class _ConvNd(_Layer):
    """``y = g * (conv(x, W) + s * conv_1x1(conv(x, lora_A), lora_B)) + b``: what the three classes share."""

    STOCK: type[nn.Module]
    FUNCTION: str

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        if "_hf_hook" in self._modules["base_layer"].__dict__:
            return offloaded.forward(self, self._norm_keepers(), x, *args, **kwargs)
        adapter = lone_adapter(self, args, kwargs)
        parts = None if adapter is None else self._parts(x, adapter, self.STOCK, self.STOCK)
        if parts is None:
            return super().forward(x, *args, **kwargs)
        base, module, (weight, lora_A, lora_B), magnitude, p = parts
        groups, magnitude = base.groups, magnitude.flatten()
        scaling, strength = module.split(self.scaling[adapter])
        norm = module.known_norm(base, lora_A, lora_B, scaling)
        if norm is None and (strength is not None or module.keeps_norms()):
            norm = module.factored_norm(weight, lora_A, lora_B, scaling, groups=groups, adapter_name=adapter)
        norm = None if norm is None else norm.flatten()
        if strength is not None:
            if is_zero(strength):
                return base(x)
            lora_B, magnitude, norm = functional.at_strength(lora_B, magnitude, norm, strength)
        return getattr(functional, self.FUNCTION)(
            x,
            weight,
            lora_A,
            lora_B,
            magnitude,
            parameter(base, "bias"),
            scaling=scaling,
            stride=base.stride,
            padding=base.padding,
            dilation=base.dilation,
            groups=groups,
            padding_mode=base.padding_mode,
            weight_norm=norm,
            dropout_p=p,
            dropout_on=self.lora_variant[adapter].dropout_on,
        )


class Conv1d(_ConvNd, stock_peft.Conv1d):
    STOCK, MAGNITUDE, FUNCTION = nn.Conv1d, dora.DoraConv1dLayer, "dora_conv1d"


class Conv2d(_ConvNd, stock_peft.Conv2d):
    STOCK, MAGNITUDE, FUNCTION = nn.Conv2d, dora.DoraConv2dLayer, "dora_conv2d"


class Conv3d(_ConvNd, stock_peft.Conv3d):
    STOCK, MAGNITUDE, FUNCTION = nn.Conv3d, dora.DoraConv3dLayer, "dora_conv3d"
