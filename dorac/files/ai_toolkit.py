"""Ostris' ai-toolkit: factors in kohya's or PEFT's spelling, a ``magnitude``, and no alpha."""

from dorac.files import parts
from dorac.files.layers import Contents
from dorac.files.parts import Given
from dorac.files.storage import Raw

NAME = "ai-toolkit"
_ROLES = {
    "lora_down.weight": "lora_down",
    "lora_up.weight": "lora_up",
    "lora_A.weight": "lora_down",
    "lora_B.weight": "lora_up",
    "magnitude": "magnitude",
    "alpha": "alpha",
}


def recognise(raw: Raw) -> bool:
    names = {key[: -len(".magnitude")] for key in raw.tensors if key.endswith(".magnitude")}
    return any(f"{name}.{factor}.weight" in raw.tensors for name in names for factor in ("lora_down", "lora_A"))


def read(raw: Raw, given: Given) -> Contents:
    modules, others = parts.grouped(raw.tensors, _ROLES)
    layers = []
    for name, tensors in modules.items():
        down, up = parts.factors(NAME, name, tensors, "lora_down", "lora_up")
        s = parts.scaling(NAME, given, up.shape[1], tensors.get("alpha"))
        layers.append(parts.build(NAME, name, down, up, tensors.get("magnitude"), s))
    return Contents(NAME, tuple(layers), dict(raw.metadata), others)
