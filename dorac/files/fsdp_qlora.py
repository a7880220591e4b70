"""Answer.AI's fsdp_qlora, whose QDoRA has no scaling: s is 1."""

from dorac.files import parts
from dorac.files.layers import Contents
from dorac.files.parts import Given
from dorac.files.storage import Raw

NAME = "fsdp_qlora"
_ROLES = {
    "dora_layer.lora_A.weight": "lora_A",
    "dora_layer.lora_B.weight": "lora_B",
    "magnitude_layer.magnitude": "magnitude",
}


def recognise(raw: Raw) -> bool:
    return any(".dora_layer.lora_" in key or key.endswith(".magnitude_layer.magnitude") for key in raw.tensors)


def read(raw: Raw, given: Given) -> Contents:
    modules, others = parts.grouped(raw.tensors, _ROLES)
    layers = []
    for name, tensors in modules.items():
        lora_A, lora_B = parts.factors(NAME, name, tensors, "lora_A", "lora_B")
        (magnitude,) = parts.need(NAME, name, tensors, "magnitude")
        s = parts.scaling(NAME, given, lora_A.shape[0], lora_A.shape[0])
        layers.append(parts.build(NAME, name, lora_A, lora_B, magnitude, s))
    return Contents(NAME, tuple(layers), raw.config or {}, others)
