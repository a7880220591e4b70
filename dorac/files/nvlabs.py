"""NVlabs' own implementation of the paper (github.com/NVlabs/DoRA)."""

from dorac.files import parts
from dorac.files.layers import Contents
from dorac.files.parts import Given
from dorac.files.peft import PREFIX
from dorac.files.storage import CONFIG_NAME, Raw

NAME = "NVlabs/DoRA"
_ROLES = {"lora_A.weight": "lora_A", "lora_B.weight": "lora_B", "weight_m_wdecomp.weight": "weight_m_wdecomp"}


def recognise(raw: Raw) -> bool:
    return any(key.endswith(".weight_m_wdecomp.weight") for key in raw.tensors)


def read(raw: Raw, given: Given) -> Contents:
    config = raw.config or {}
    if config.get("fan_in_fan_out"):
        raise ValueError(
            f"{NAME}: {CONFIG_NAME} has fan_in_fan_out, with which it takes norms over another axis in training"
        )
    modules, others = parts.grouped(raw.tensors, _ROLES)
    layers = []
    for key, tensors in modules.items():
        name = key.removeprefix(PREFIX)
        (magnitude,) = parts.need(NAME, name, tensors, "weight_m_wdecomp")
        if len(tensors) == 1:  # one of Wdecompose_target_modules
            layers.append(parts.build(NAME, name, None, None, magnitude, 1.0))
            continue
        lora_A, lora_B = parts.factors(NAME, name, tensors, "lora_A", "lora_B")
        s = parts.scaling(NAME, given, lora_A.shape[0], config.get("lora_alpha"))
        layers.append(parts.build(NAME, name, lora_A, lora_B, magnitude, s))
    return Contents(NAME, tuple(layers), config, others)
