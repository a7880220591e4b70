"""mlx-lm's adapters: transposed factors, a scale that is s itself, and embeddings with a magnitude per token."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from dorac.files import parts
from dorac.files.layers import Contents, Layer
from dorac.files.parts import Given
from dorac.files.storage import CONFIG_NAME, Raw

NAME = "mlx-lm"
_ROLES = {"lora_a": "lora_a", "lora_b": "lora_b", "m": "m"}
_BLOCK = re.compile(r"(?:.*\.)?(?:layers|h|blocks)\.\d+\.(.+)")
_EMBEDDINGS = ("embed_tokens", "wte", "tok_embeddings", "embeddings", "word_embeddings")


def recognise(raw: Raw) -> bool:
    return any(key.endswith(".lora_a") for key in raw.tensors)


def read(raw: Raw, given: Given) -> Contents:
    modules, others = parts.grouped(raw.tensors, _ROLES)
    settings = (raw.config or {}).get("lora_parameters")
    scale = settings.get("scale") if isinstance(settings, Mapping) else None
    stated = given.scaling is not None or given.lora_alpha is not None
    if not stated and scale is None:
        raise ValueError(
            f"{NAME}: no {CONFIG_NAME} beside the file gives the scale in lora_parameters: pass scaling= (--scaling)"
        )
    own = None if stated else float(parts.number(NAME, "scale", scale))
    layers = []
    for name, tensors in modules.items():
        lora_a, lora_b = parts.factors(NAME, name, tensors, "lora_a", "lora_b")
        if lora_a.ndim != 2 or lora_b.ndim != 2:
            raise ValueError(
                f"{NAME}: {name} has lora_a {list(lora_a.shape)}, experts, which mlx-lm trains no DoRA for"
            )
        s = parts.scaling(NAME, given, lora_a.shape[1]) if own is None else own
        m = tensors.get("m")
        axis, kind = _place(name, m, lora_a.shape[0], lora_b.shape[1], given)
        layers.append(parts.build(NAME, name, lora_a.t(), lora_b.t(), m, s, kind=kind, norm_axis=axis))
    return Contents(NAME, tuple(layers), raw.config or {}, others)


def _place(name: str, m: Tensor | None, inputs: int, outputs: int, given: Given) -> tuple[str, str]:
    """The axis and the kind: a linear layer's m is ``[out]``, an embedding's ``[vocab]`` (lora_a is ``[vocab, r]``)."""
    if m is None:
        return "out", "linear"
    possible = [axis for axis, size in (("out", outputs), ("in", inputs)) if size == m.numel()]
    if given.norm_axis in possible:
        possible = [given.norm_axis]
    if len(possible) > 1:  # square: only the name tells
        possible = ["in" if name.rpartition(".")[2] in _EMBEDDINGS else "out"]
    if not possible:
        raise ValueError(
            f"{NAME}: the m of {name} has {m.numel()} elements, with {inputs} inputs and {outputs} outputs"
        )
    return (possible[0], "embedding" if possible[0] == "in" else "linear")


def files(contents: Contents) -> tuple[dict[str, object], dict[str, str]]:
    """The two files by their names, and the metadata of the weights. Ranks and scalings are made one.

    Raises:
        ValueError: layers that mlx-lm has no DoRA for.
    """
    rank = max(layer.rank for layer in contents.layers)
    scale = next((layer.scaling for layer in contents.layers if layer.scaling), 1.0)
    tensors: dict[str, Tensor] = {}
    for layer in contents.layers:
        _refuse_what_mlx_lacks(layer)
        lora_A, lora_B = layer.lora_A, layer.lora_B
        if layer.scaling != scale:
            wide = torch.promote_types(lora_B.dtype, torch.float32)  # the quotient is none of half precision
            lora_B = (lora_B.double() * (layer.scaling / scale)).to(wide)
        padding = rank - layer.rank  # columns of zeros add nothing to the product
        tensors[f"{layer.name}.lora_a"] = torch.nn.functional.pad(lora_A.t(), (0, padding))
        tensors[f"{layer.name}.lora_b"] = torch.nn.functional.pad(lora_B.t(), (0, 0, 0, padding))
        if layer.magnitude is not None:
            tensors[f"{layer.name}.m"] = layer.magnitude
    keys = sorted({match[1] if (match := _BLOCK.fullmatch(layer.name)) else layer.name for layer in contents.layers})
    config = {
        "fine_tune_type": "dora",
        "num_layers": -1,  # all: those without an adapter here start, and stay, as the base's
        "lora_parameters": {"rank": rank, "scale": scale, "dropout": 0.0, "keys": keys},
    }
    return {"adapters.safetensors": tensors, CONFIG_NAME: config}, {"format": "mlx"}


def _refuse_what_mlx_lacks(layer: Layer) -> None:
    wanted = "in" if layer.kind == "embedding" else "out"
    if layer.kind == "conv" or layer.lora_A is None or (layer.magnitude is not None and layer.norm_axis != wanted):
        what = {"conv": "a convolution", "embedding": "an embedding with a magnitude per feature"}.get(
            layer.kind, "a magnitude alone" if layer.lora_A is None else "a linear layer with a magnitude per input"
        )
        raise ValueError(f"{layer.name} is {what}, for which {NAME} has no DoRA")
    if layer.magnitude is None:
        raise ValueError(
            f"{layer.name} is plain LoRA, beside which {NAME} has no DoRA: the base model is needed (--base)"
        )
