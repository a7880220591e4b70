"""``model(x, adapter_names=["a", "b", "__base__"])``: one batch whose rows run different adapters, or none.

PEFT does this for inference, and refuses it for DoRA. Here a linear layer with a dense weight is one call of
:func:`dorac.functional.dora_linear_mixed`, in which a plain LoRA adapter is one with g = 1. Every other layer computes
its base product once for the batch, and then the rows of each adapter together, as PEFT does.
"""

import contextlib
import operator
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from dorac import functional, stock_peft
from dorac.functional import Adapter
from dorac.numerics import accumulate_dtype
from dorac.peft import over, stacked
from dorac.peft.direct import dropout_p, parameter, plain_weight
from dorac.peft.dora_linear import is_zero
from dorac.peft.variants import DoraLinearVariant, OnDorac
from dorac.stock_peft import LoraLayer

BASE = "__base__"  # PEFT's word for a row that runs no adapter

_enable_hooks_stock = stock_peft.enable_forward_hooks


class MixedBatch:
    """What dorac's LoRA layers have instead of PEFT's refusal of DoRA."""

    def _check_forward_args(self, x: Tensor, *args, **kwargs) -> None:
        names = kwargs.get("adapter_names")
        if names is not None:
            names = [BASE if isinstance(self.lora_variant.get(name), OnDorac) else name for name in names]
            kwargs = kwargs | {"adapter_names": names}
        super()._check_forward_args(x, *args, **kwargs)

    def _mixed_batch_forward(self, x: Tensor, *args, adapter_names: Sequence[str], **kwargs) -> Tensor:
        others = [BASE if _is_own(self, name) else name for name in adapter_names]
        result = super()._mixed_batch_forward(x, *args, adapter_names=others, **kwargs)
        if all(map(operator.eq, others, adapter_names)):
            return result
        # PEFT writes to the base layer's output in place, which may be a view that autograd lets nobody write.
        parts, order = [], []
        for adapter in dict.fromkeys(adapter_names):
            rows = [row for row, name in enumerate(adapter_names) if name == adapter]
            places = torch.tensor(rows, device=x.device)
            part = result[places]
            parts.append(_with_adapter(self, adapter, x[places], part) if _is_own(self, adapter) else part)
            order += rows
        return torch.cat(parts)[torch.tensor(order, device=x.device).argsort()]


def _is_own(layer: LoraLayer, adapter: str) -> bool:
    """Whether the rows of an adapter are computed here: DoRA's, and those of LoRA as long as it is no embedding's."""
    if adapter in layer.lora_variant:
        return isinstance(layer.lora_variant[adapter], OnDorac)
    return adapter in layer.lora_A


def _with_adapter(layer: LoraLayer, adapter: str, x: Tensor, result: Tensor) -> Tensor:
    """The output of a layer with this adapter, from the base layer's for the same rows."""
    variant = layer.lora_variant.get(adapter)
    if variant is not None and is_zero(layer.lora_magnitude_vector[adapter].split(layer.scaling[adapter])[1]):
        return result
    is_linear = isinstance(variant, DoraLinearVariant)
    if is_linear and (y := over.adapted(layer, adapter, x, result)) is not None:
        return y.to(result.dtype)
    if adapter in layer.lora_A and not torch.is_autocast_enabled(x.device.type):  # as PEFT does
        x = layer._cast_input_dtype(x, layer.lora_A[adapter].weight.dtype)
    if variant is None:
        lora = layer.lora_B[adapter](layer.lora_A[adapter](layer.lora_dropout[adapter](x)))
        y = result + lora * layer.scaling[adapter]
    else:
        forward = variant.added if is_linear else variant.forward
        y = forward(layer, active_adapter=adapter, x=x, result=result)
    return y.to(result.dtype)


def linear(layer: LoraLayer, x: Tensor, names: Sequence[str], base_kind: type[nn.Module]) -> Tensor | None:
    """The output of a linear layer over a dense weight in one call; None where :class:`MixedBatch` has to run."""
    found: dict[str, stacked.Found] = {}
    base = layer._modules["base_layer"]
    for name in dict.fromkeys(names):
        if name not in layer.lora_A:  # "__base__", and adapters of other layers
            continue
        if name not in layer.lora_variant:
            one = _plain(layer, name, x, base_kind)
        elif isinstance(layer.lora_variant[name], OnDorac):
            one = _dora(layer, name, x, base_kind)
        else:
            return None
        if one is None:
            return None
        if one is not BASE:
            found[name] = one
    if len({one.kind() for one in found.values()}) != 1:
        return None
    weight = parameter(base, "weight")
    stack, norms, places = stacked.of(found)
    return functional.dora_linear_mixed(
        x,
        weight.t() if layer.fan_in_fan_out else weight,
        *stack[:3],
        parameter(base, "bias"),
        adapter_index=torch.tensor([places[name] if name in found else -1 for name in names], device=x.device),
        scaling=stack.scaling,
        weight_norm=norms,
        ranks=stack.ranks,
    )


def _dora(layer: LoraLayer, adapter: str, x: Tensor, base_kind: type[nn.Module]) -> stacked.Found | str | None:
    """A DoRA adapter and its norm; ``BASE`` for one at strength 0; None if something is no plain tensor."""
    parts = layer._parts(x, adapter, base_kind, nn.Linear)
    if parts is None or parts[-1]:
        return None
    base, module, (weight, lora_A, lora_B), magnitude, _ = parts
    scaling, strength = module.split(layer.scaling[adapter])
    if is_zero(strength):
        return BASE
    norm = module.known_norm(base, lora_A, lora_B, scaling)
    keeper = None if norm is None or strength is not None else module.keeper
    if norm is None:
        norm = module.factored_norm(weight, lora_A, lora_B, scaling, adapter_name=adapter)
    if strength is not None:
        lora_B, magnitude, norm = functional.at_strength(lora_B, magnitude, norm, strength)
    return stacked.Found(Adapter(lora_A, lora_B, magnitude.to(norm.dtype), scaling), norm, keeper)


def _plain(layer: LoraLayer, adapter: str, x: Tensor, base_kind: type[nn.Module]) -> stacked.Found | None:
    """A LoRA adapter as one of DoRA's with g = 1."""
    weight = plain_weight(layer._modules["base_layer"], base_kind)
    lora_A, lora_B = (plain_weight(getattr(layer, name)[adapter], nn.Linear) for name in ("lora_A", "lora_B"))
    if weight is None or lora_A is None or lora_B is None or lora_A.dtype != lora_B.dtype:
        return None
    if layer.lora_B[adapter].bias is not None or dropout_p(layer.lora_dropout[adapter], layer.training) != 0:
        return None
    if not (x.device == weight.device == lora_A.device == lora_B.device):
        return None
    ones = torch.ones(lora_B.shape[0], dtype=accumulate_dtype(weight, lora_A), device=x.device)
    return stacked.Found(Adapter(lora_A, lora_B, ones, layer.scaling[adapter]), ones)


@contextlib.contextmanager
def enable_peft_forward_hooks(self, *args, **kwargs) -> Iterator[None]:
    """PEFT's, whose hooks hand the names to the layers; whatever is raised in the block, they are gone.

    Raises:
        ValueError: a layer, by name, whose class takes no rows of different DoRA adapters; and what PEFT refuses.
    """
    names = kwargs.get("adapter_names")
    if names is None:
        with _enable_hooks_stock(self, *args, **kwargs):
            yield
        return
    _refuse_others(self.model, names)
    before = [(module, set(module._forward_pre_hooks)) for module in self.modules()]
    try:
        with _enable_hooks_stock(self, *args, **kwargs):
            yield
    except BaseException:
        for module, kept in before:
            for key in module._forward_pre_hooks.keys() - kept:
                del module._forward_pre_hooks[key]
                module._forward_pre_hooks_with_kwargs.pop(key, None)
        raise


def _refuse_others(root: nn.Module, names: Sequence[str]) -> None:
    for name, layer in root.named_modules():
        if isinstance(layer, LoraLayer) and not isinstance(layer, MixedBatch):
            for adapter in dict.fromkeys(names):
                if layer.use_dora.get(adapter, False):
                    raise ValueError(
                        f"{name} ({type(layer).__name__}) takes no adapter_names with the DoRA adapter {adapter!r}: "
                        "run the rows of each adapter by themselves, after set_adapter"
                    )
