"""diffusers' ``pytorch_lora_weights.safetensors``: PEFT's tensors by a pipeline's parts, settings in the header."""

import json
from collections.abc import Mapping

from dorac.bounded import Bounded
from dorac.files import parts, peft
from dorac.files.layers import Contents
from dorac.files.parts import Given
from dorac.files.storage import Raw
from dorac.names import Pattern

NAME = "diffusers"
METADATA_KEY = "lora_adapter_metadata"
_ROLES = {
    "lora_A.weight": "lora_A",
    "lora_B.weight": "lora_B",
    "lora.down.weight": "lora_A",
    "lora.up.weight": "lora_B",
    "lora_magnitude_vector": "magnitude",
    "alpha": "alpha",
}


def recognise(raw: Raw) -> bool:
    endings = (".lora_A.weight", ".lora.down.weight", ".lora_A.default.weight")
    found = [key for key in raw.tensors if key.endswith(endings)]
    return bool(found) and any(".lora_magnitude_vector" in key for key in raw.tensors)


def read(raw: Raw, given: Given) -> Contents:
    modules, others = parts.grouped(peft.one_adapter(raw.tensors), _ROLES)
    settings = _settings(raw)
    compile = Bounded().compile
    layers = []
    for name, tensors in modules.items():
        lora_A, lora_B = parts.factors(NAME, name, tensors, "lora_A", "lora_B")
        component, _, inner = name.partition(".")
        own = settings.get(component, {})
        alpha = tensors.get("alpha", own.get("lora_alpha"))
        if own.get("alpha_pattern"):
            alpha = Pattern(f"{NAME}: alpha_pattern", own["alpha_pattern"], compile).value(inner, alpha)
        s = parts.scaling(NAME, given, lora_A.shape[0], alpha, bool(own.get("use_rslora")))
        layers.append(parts.build(NAME, name, lora_A, lora_B, tensors.get("magnitude"), s))
    return Contents(NAME, tuple(layers), settings, others)


def _settings(raw: Raw) -> dict[str, dict]:
    """The header's settings, ``<component>.<field>`` in one JSON object, by component."""
    if METADATA_KEY not in raw.metadata:
        return {}
    try:
        flat = json.loads(raw.metadata[METADATA_KEY])
        assert isinstance(flat, Mapping)
    except (ValueError, RecursionError, AssertionError):
        raise ValueError(f"{raw.path}: its metadata {METADATA_KEY!r} are no JSON object") from None
    settings: dict[str, dict] = {}
    for key, value in flat.items():
        component, _, field = key.partition(".")
        settings.setdefault(component, {})[field] = value
    return settings
