"""torchtune's adapter checkpoints (``adapter_0.pt``, ``adapter_model.bin``), in its own names."""

from dorac.files import parts
from dorac.files.layers import Contents
from dorac.files.parts import Given
from dorac.files.storage import Raw

NAME = "torchtune"
_ROLES = {"lora_a.weight": "lora_a", "lora_b.weight": "lora_b", "magnitude": "magnitude"}


def recognise(raw: Raw) -> bool:
    return any(key.endswith(".lora_a.weight") for key in raw.tensors)


def read(raw: Raw, given: Given) -> Contents:
    modules, others = parts.grouped(raw.tensors, _ROLES)
    config = raw.config or {}
    layers = []
    for name, tensors in modules.items():
        lora_a, lora_b = parts.factors(NAME, name, tensors, "lora_a", "lora_b")
        s = parts.scaling(NAME, given, lora_a.shape[0], config.get("lora_alpha"))
        layers.append(parts.build(NAME, name, lora_a, lora_b, tensors.get("magnitude"), s))
    return Contents(NAME, tuple(layers), config, others, names_of="torchtune")
