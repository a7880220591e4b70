"""Quantised layers of other libraries, made of dense ones and dequantised by their library, for demo and benchmark."""

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor, nn

from dorac.places import named_places

GROUP = 128  # columns of a scale of int4, torchao's default


def _bnb_4bit(linear: nn.Linear, quant_type: str, storage: torch.dtype = torch.uint8) -> nn.Module:
    from bitsandbytes.nn import Linear4bit, Params4bit

    weight = linear.weight
    options = {"compress_statistics": True, "quant_type": quant_type, "quant_storage": storage}
    with torch.device("meta"):
        layer = Linear4bit(*weight.shape[::-1], bias=False, compute_dtype=weight.dtype, **options)
    layer.bias = linear.bias
    layer.weight = Params4bit(weight.detach(), requires_grad=False, module=layer, **options)
    return layer.to(weight.device)  # which quantises


def _bnb_8bit(linear: nn.Linear) -> nn.Module:
    # It quantises what comes from the CPU.
    layer = _linear_8bit(linear.weight.detach().cpu())
    layer.bias = linear.bias
    return layer.to(linear.weight.device)


def _linear_8bit(weight: Tensor, **statistics: Tensor) -> nn.Module:
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    with torch.device("meta"):
        layer = Linear8bitLt(*weight.shape[::-1], bias=False, has_fp16_weights=False)
    layer.weight = Int8Params(weight, requires_grad=False, has_fp16_weights=False, **statistics)
    return layer


def _torchao(linear: nn.Linear, config: str) -> nn.Module:
    from torchao import quantization

    # The compiler's settings are the process's, everybody's.
    quantization.quantize_(linear, getattr(quantization, config)(set_inductor_config=False))
    return linear


def _torchao_int4(linear: nn.Linear) -> nn.Module:
    """The pieces are made here, since torchao's own way to them needs mslk, as its product does."""
    from torchao.quantization.quantize_.workflows.int4.int4_tensor import Int4Tensor

    weight = linear.weight.detach()
    out_features, in_features = weight.shape
    group = GROUP if in_features % GROUP == 0 else in_features
    groups = weight.float().view(out_features, -1, group)
    least, most = groups.aminmax(dim=-1, keepdim=True)
    scale = ((most - least) / 15).clamp_min(1e-6).to(weight.dtype)
    zero = (least.to(weight.dtype) + 8 * scale).to(weight.dtype)
    numbers = ((groups - zero.float()) / scale.float()).round().clamp(-8, 7).to(torch.int8).view(weight.shape)
    codes = (numbers[:, ::2] & 15) | (numbers[:, 1::2] << 4)
    pieces = (codes.contiguous(), *(t.squeeze(-1).T.contiguous() for t in (scale, zero)))
    linear.weight = nn.Parameter(Int4Tensor(*pieces, [1, group], weight.shape), requires_grad=False)
    return linear


_QUANTISE: dict[str, Callable[..., nn.Module]] = {
    "nf4": lambda linear, **storage: _bnb_4bit(linear, "nf4", **storage),
    "fp4": lambda linear, **storage: _bnb_4bit(linear, "fp4", **storage),
    "int8": _bnb_8bit,
    "torchao-int8": lambda linear: _torchao(linear, "Int8WeightOnlyConfig"),
    "fp8": lambda linear: _torchao(linear, "Float8WeightOnlyConfig"),
    "int4": _torchao_int4,
}
PACKAGES = {name: "bitsandbytes" for name in ("nf4", "fp4", "int8")} | {
    name: "torchao" for name in ("torchao-int8", "fp8", "int4")
}


def has_product(base: str) -> bool:
    """Whether the library can multiply with it here."""
    return base != "int4" or importlib.util.find_spec("mslk") is not None


def quantise(linear: nn.Linear, base: str, **storage: torch.dtype) -> nn.Module:
    """A layer with the weight of ``linear``, which may be it, on the same device; its products are in that dtype.

    ``storage``: of nf4 and fp4, the dtype that the codes lie in; ``fully_shard`` splits floats alone.
    """
    return _QUANTISE[base](linear.requires_grad_(False), **storage)


def quantise_model(model: nn.Module, base: str, besides: nn.Module | None = None) -> None:
    """:func:`quantise` of every linear layer but ``besides``, in place: once of one that is held in several places."""
    quantised: dict[nn.Module, nn.Module] = {}
    for name, module in list(named_places(model)):
        if isinstance(module, nn.Linear) and module is not besides:
            if module not in quantised:
                quantised[module] = quantise(module, base)
            model.set_submodule(name, quantised[module])


def for_one(layer: nn.Module) -> nn.Module:
    """``layer`` for one model, over the same tensors.

    In its first forward bitsandbytes' 8-bit layer takes the scales from its weight, without which PEFT wraps none.
    """
    if type(layer).__name__ != "Linear8bitLt":
        return layer
    copy = _linear_8bit(layer.weight.data, CB=layer.weight.CB, SCB=layer.weight.SCB)
    copy.bias = layer.bias
    return copy


def dequantise(layer: nn.Module) -> Tensor:
    """The dense weight, as the library itself gives it; torchao has none of int4."""
    weight = layer.weight
    if type(weight).__module__.startswith("torchao"):
        return weight.dequantize()
    from bitsandbytes import functional

    if weight.dtype is torch.int8:
        return functional.int8_vectorwise_dequant(weight.data, weight.SCB)
    return functional.dequantize_4bit(weight.data, weight.quant_state)
