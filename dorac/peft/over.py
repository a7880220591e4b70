"""One adapter over what the base layer itself computed: quantised, offloaded and hooked layers, in full form.

PEFT calls the base layer, then the variant with its result. Where that adapter is all that is active, the result is the
product of DoRA's formula, and the layer is ``functional.dora_over``; several adapters, and PEFT's dropout, add changes
to it instead (:mod:`dorac.peft.dora`).
"""

import torch
from torch import Tensor, nn

from dorac import functional
from dorac.nn import linear4bit, norm_cache, shared
from dorac.numerics import FLOAT_DTYPES
from dorac.peft import dora
from dorac.peft.direct import dropout_p, plain_weight, unhooked
from dorac.peft.dora_linear import is_zero
from dorac.peft.weights import dense_weight, is_partitioned
from dorac.stock_peft import BaseTunerLayer


def adapted(module: nn.Module, adapter: str, x: Tensor, result: Tensor) -> Tensor | None:
    """The output of a layer with this adapter alone, from the base layer's; None where PEFT's sequence has to run."""
    parts = _parts(module, adapter)
    if parts is None:
        return None
    lora_A, lora_B, magnitude, dropout, p = parts
    if p and module.lora_variant[adapter].dropout_on == "adapter":
        return None
    base, m = module._modules["base_layer"], magnitude.current()
    if "base_layer" in base._modules and isinstance(base, BaseTunerLayer):  # isinstance of an ABC is slow
        base = base.get_base_layer()
    bias = _own(base, "bias")
    if result.dtype not in FLOAT_DTYPES or x.dtype not in FLOAT_DTYPES:
        return None
    if is_partitioned(m) or is_partitioned(bias) or is_partitioned(_own(base, "weight")):
        return None
    scaling, strength = magnitude.split(module.scaling[adapter])
    norm = magnitude.known_norm(base, lora_A, lora_B, scaling)
    save_output = module.__dict__.get("save_output", False) and torch.is_grad_enabled()  # see dorac.save_outputs
    weight = None
    if norm is None or save_output:
        weight = norm_cache.packed_weight(magnitude.keeper, base, norm)
        if weight is None:
            weight = dense_weight(base)
            save_output = save_output and weight is _own(base, "weight")  # a copy is not to be kept
    if norm is None:
        norm = magnitude.factored_norm(weight, lora_A, lora_B, scaling, adapter_name=adapter, base_layer=base)
    if p:
        x = dropout(x)
    if strength is not None:
        lora_B, m, norm = functional.at_strength(lora_B, m.to(norm.device), norm, strength)
    device = result.device
    if not (device == x.device == lora_A.device == lora_B.device == m.device == norm.device):
        x, lora_A, lora_B, m, norm = (t.to(device) for t in (x, lora_A, lora_B, m, norm))
    return functional.dora_over(
        result,
        x,
        lora_A,
        lora_B,
        m,
        bias,
        weight_norm=norm,
        scaling=scaling,
        base_has_bias=bias is not None,
        save_output=save_output,
        weight=weight,
    )


def projection(module: nn.Module, adapter: str, x: Tensor) -> tuple[functional.Projection, str] | None:
    """See :class:`dorac.nn.shared.Fusable`: of a layer over one of bitsandbytes' that takes x into a block."""
    parts = _parts(module, adapter)
    if parts is None:
        return None
    lora_A, lora_B, magnitude, _, p = parts
    base, m = module._modules["base_layer"], magnitude.current()
    scaling, strength = magnitude.split(module.scaling[adapter])
    if any(not shared.is_plain(t) or t.device != x.device for t in (lora_A, lora_B, m)) or is_zero(strength):
        return None
    if is_partitioned(m) or is_partitioned(_own(base, "bias")) or is_partitioned(_own(base, "weight")):
        return None
    norm = magnitude.known_norm(base, lora_A, lora_B, scaling)
    weight = linear4bit.weight_for(base, x, magnitude.keeper, norm)
    if weight is None:
        return None
    if norm is None:
        norm = magnitude.factored_norm(weight, lora_A, lora_B, scaling, adapter_name=adapter, base_layer=base)
    if strength is not None:
        lora_B, m, norm = functional.at_strength(lora_B, m, norm, strength)
    operands = weight, lora_A, lora_B, m, _own(base, "bias"), norm, scaling, p
    save_output = module.__dict__.get("save_output", False)
    return functional.Projection(*operands, save_output), module.lora_variant[adapter].dropout_on


def _parts(module: nn.Module, adapter: str) -> tuple[Tensor, Tensor, nn.Module, nn.Module, float] | None:
    """The factors, the magnitude's module, dropout and its probability; None if another class or a hook is there."""
    modules = module._modules
    magnitude = modules["lora_magnitude_vector"]._modules[adapter]
    lora_A = plain_weight(modules["lora_A"]._modules.get(adapter), nn.Linear)
    lora_B = plain_weight(modules["lora_B"]._modules.get(adapter), nn.Linear)
    if lora_A is None or lora_B is None or type(magnitude) is not dora.DoraLinearLayer or not unhooked(magnitude):
        return None
    dropout = modules["lora_dropout"]._modules[adapter]
    p = dropout_p(dropout, module.training)
    return None if p is None else (lora_A, lora_B, magnitude, dropout, p)


def _own(base: nn.Module, name: str) -> Tensor | None:
    """``getattr(base, name, None)``, which takes ten times as long for a parameter; GPTQ's bias is a buffer."""
    parameters = base._parameters
    return parameters[name] if name in parameters else getattr(base, name, None)
