"""Files of kohya's scripts and LyCORIS with ``dora_scale``, which OneTrainer, ComfyUI and InvokeAI share."""

import torch
from torch import Tensor

from dorac.files import parts
from dorac.files.layers import Contents, Layer
from dorac.files.parts import Given
from dorac.files.storage import Raw

NAME = "LyCORIS"
# What LyCORIS adds to the norm: the epsilon of the dtype that it trains in, as a rule float32.
EPS = 2.0**-23
_ROLES = {
    "lora_down.weight": "lora_down",
    "lora_up.weight": "lora_up",
    "lora_A.weight": "lora_down",
    "lora_B.weight": "lora_up",
    "lora_mid.weight": "lora_mid",
    "alpha": "alpha",
    "dora_scale": "dora_scale",
}
# Endings of what else LyCORIS trains beside a dora_scale.
_OTHER_KINDS = {
    "hada_w1_a": "LoHa",
    "lokr_w1": "LoKr",
    "lokr_w1_a": "LoKr",
    "oft_blocks": "OFT",
    "oft_diag": "OFT",
    "a1.weight": "GLoRA",
    "diff": "a full difference",
}
_MEANS = 0.1  # share of negative magnitudes above which they cannot be norms


def recognise(raw: Raw) -> bool:
    if any(key.endswith(".dora_scale") for key in raw.tensors):
        return True
    names = {key.rpartition(".")[0] for key in raw.tensors if key.endswith(".alpha")}
    return any(key.endswith(".lora_down.weight") and key[: -len(".lora_down.weight")] in names for key in raw.tensors)


def read(raw: Raw, given: Given) -> Contents:
    for key in raw.tensors:
        for ending, kind in _OTHER_KINDS.items():
            if key.endswith(f".{ending}"):
                name = key[: -len(ending) - 1]
                raise ValueError(f"{NAME}: {name} is trained as {kind}, of which there is no lora_down and lora_up")
    modules, others = parts.grouped(raw.tensors, _ROLES)
    layers = [_layer(name, tensors, given) for name, tensors in modules.items()]
    if given.norm_axis is None:
        _refuse_means(layers)
    return Contents(NAME, tuple(layers), dict(raw.metadata), others)


def _layer(name: str, tensors: dict[str, Tensor], given: Given) -> Layer:
    down, up = parts.factors(NAME, name, tensors, "lora_down", "lora_up")
    s = parts.scaling(NAME, given, up.shape[1], tensors.get("alpha"))
    if "lora_mid" in tensors:
        down, up = _untuckered(name, tensors["lora_mid"], down, up)
    scale = tensors.get("dora_scale")
    axis = "out" if scale is None else _axis(name, scale, up.shape[0], down.shape[1], given)
    eps = EPS if given.eps is None else given.eps
    return parts.build(NAME, name, down, up, scale, s, norm_axis=axis, eps=0.0 if scale is None else eps)


def _untuckered(name: str, mid: Tensor, down: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """The factors whose product is ``sum_ij mid[i, j, k...] up[:, i] down[j, :]``: mid goes into lora_A."""
    if mid.ndim < 3 or mid.shape[0] != up.shape[1] or mid.shape[1] != down.shape[0] or down[0, 0].numel() != 1:
        shapes = f"lora_mid {list(mid.shape)}, lora_down {list(down.shape)}, lora_up {list(up.shape)}"
        raise ValueError(f"{NAME}: the Tucker factors of {name} do not go together: {shapes}")
    wide = torch.promote_types(mid.dtype, torch.float32)
    lora_A = torch.einsum("ij...,jr->ir...", mid.to(wide), down.flatten(1).to(wide))
    return lora_A, up.to(wide).view(*up.shape[:2], *[1] * (mid.ndim - 2))


def _axis(name: str, scale: Tensor, rows: int, columns: int, given: Given) -> str:
    """ "out" for ``[out, 1...]``, "in" for ``[1, in, 1...]``.

    Raises:
        ValueError: neither, or both and the caller does not say which.
    """
    shape = list(scale.shape)
    if scale.ndim == 1:
        possible = [axis for axis, size in (("out", rows), ("in", columns)) if size == shape[0]]
    else:
        ones = [1] * (scale.ndim - 2)
        possible = [axis for axis, own in (("out", [rows, 1, *ones]), ("in", [1, columns, *ones])) if own == shape]
    if given.norm_axis is not None:
        possible = [axis for axis in possible if axis == given.norm_axis]
    if not possible:
        axis = "neither axis" if given.norm_axis is None else f"not the axis {given.norm_axis!r}"
        raise ValueError(f"{NAME}: the dora_scale {shape} of {name} fits {axis} of [out, in] = [{rows}, {columns}]")
    if len(possible) > 1:
        raise ValueError(
            f"{NAME}: the dora_scale {shape} of {name} fits both axes of [out, in] = [{rows}, {columns}]: pass "
            "norm_axis='out' or 'in' (--axis)"
        )
    return possible[0]


def _refuse_means(layers: list[Layer]) -> None:
    scales = [layer.magnitude for layer in layers if layer.norm_axis == "in"]
    count = sum(scale.numel() for scale in scales)
    if count and sum(int((scale < 0).sum()) for scale in scales) > _MEANS * count:
        raise ValueError(
            f"{NAME}: many dora_scales are negative, as the means are that LyCORIS 2.2 had in its first days in the "
            "place of norms, which dorac does not compute; pass norm_axis='in' (--axis) if they are norms all the same"
        )


def file_tensors(contents: Contents, prefix: str) -> dict[str, Tensor]:
    """The tensors under LyCORIS' keys, ``<prefix>_<module with _ for dots>``."""
    tensors = {}
    for layer in contents.layers:
        if layer.kind == "embedding" or layer.lora_A is None:
            what = "an embedding" if layer.kind == "embedding" else "a magnitude alone"
            raise ValueError(f"{layer.name} is {what}, for which {NAME} has no DoRA")
        key = f"{prefix}_{layer.name.replace('.', '_')}"
        if f"{key}.alpha" in tensors:
            raise ValueError(f"{layer.name} and another module are both {key} in {NAME}'s names")
        tensors[f"{key}.lora_down.weight"] = layer.lora_A
        tensors[f"{key}.lora_up.weight"] = layer.lora_B
        tensors[f"{key}.alpha"] = torch.tensor(layer.scaling * layer.rank)
        if layer.magnitude is not None:
            ones = [1] * (layer.lora_A.ndim - 2)
            shape = (-1, 1, *ones) if layer.norm_axis == "out" else (1, -1, *ones)
            tensors[f"{key}.dora_scale"] = layer.magnitude.view(shape)
    return tensors
