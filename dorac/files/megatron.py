"""Megatron-Bridge's and NeMo's adapters, in Megatron's names: q, k and v are one layer there, gate and up another."""

from dorac.files import parts
from dorac.files.layers import Contents
from dorac.files.parts import Given
from dorac.files.storage import Raw

NAME = "Megatron-Bridge"
_ROLES = {
    "adapter.linear_in.weight": "linear_in",
    "adapter.linear_out.weight": "linear_out",
    "adapter.weight_magnitude": "weight_magnitude",
}


def recognise(raw: Raw) -> bool:
    return any(key.endswith(".adapter.linear_in.weight") for key in raw.tensors)


def read(raw: Raw, given: Given) -> Contents:
    modules, others = parts.grouped(raw.tensors, _ROLES)
    layers = []
    for name, tensors in modules.items():
        linear_in, linear_out = parts.factors(NAME, name, tensors, "linear_in", "linear_out")
        s = parts.scaling(NAME, given, linear_in.shape[0])
        layers.append(parts.build(NAME, name, linear_in, linear_out, tensors.get("weight_magnitude"), s))
    return Contents(NAME, tuple(layers), raw.config or {}, others, names_of="megatron")
