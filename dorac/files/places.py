"""The modules of a model that a file's layers belong to."""

import collections
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from dorac.files import families
from dorac.files.families import Heads, Translation
from dorac.files.layers import Contents, Layer, expected_shape, fits
from dorac.names import endings

# A pipeline's parts by the prefixes that files have for them.
_PREFIXES = {
    "lora_unet_": ("unet", "transformer"),
    "lora_transformer_": ("transformer",),
    "lora_te_": ("text_encoder",),
    "lora_te1_": ("text_encoder",),
    "lora_te2_": ("text_encoder_2",),
    "lora_te3_": ("text_encoder_3",),
    "lycoris_": (),
    "lora_": (),
    "base_model.model.": (),
    "model.diffusion_model.": ("unet", "transformer"),
    "diffusion_model.": ("unet", "transformer"),
    "unet.": ("unet",),
    "transformer.": ("transformer",),
    "transformer_2.": ("transformer_2",),
    "text_encoder.": ("text_encoder",),
    "text_encoder_2.": ("text_encoder_2",),
    "text_encoder_3.": ("text_encoder_3",),
}
# Families whose rotary halves torchtune keeps in Meta's order, and those that it keeps in transformers'.
_META_ORDER = ("llama", "mistral", "gemma", "gemma2")
_SAME_ORDER = ("qwen2", "qwen3")


class Module(NamedTuple):
    """A module's weight: its shape, of a linear layer ``[out, in]``, and whether it is stored as ``[in, out]``."""

    shape: torch.Size
    transposed: bool = False


def component_of(name: str) -> tuple[str, ...]:
    """The parts of a pipeline that a file's name can be of; empty where it does not say."""
    return next((parts for prefix, parts in _PREFIXES.items() if name.startswith(prefix)), ())


def place(
    contents: Contents,
    modules: Mapping[str, Module],
    config: Mapping[str, object],
    *,
    component: str | None = None,
) -> tuple[Layer, ...]:
    """The layers under the model's names, with the rows in the model's order.

    Args:
        modules: the model's, by name. config: the model's ``config.json``, where heads have to be known.
        component: takes the layers of one part of a pipeline alone: "unet", "transformer", "text_encoder", ...

    Raises:
        ValueError: layers that the model has no module for, or one of another shape: the first three and their number;
            what the file's rows need and the config does not say.
    """
    index = _Index(modules)
    heads = Heads.of(config)
    layers = [
        layer
        if layer.name in modules and layer.name not in contents.meta_rows  # of torchtune's own model
        else _in_order(layer, contents, config, heads)
        for layer in contents.layers
    ]
    if component is not None:
        layers = [layer for layer in layers if component in component_of(layer.name)]
        if not layers:
            raise ValueError(f"{contents.format}: no layer of the file is of the component {component!r}")
    placed, absent, unfit = [], [], []
    for layer in layers:
        targets, rows = index.find(layer.name, contents.names_of, heads)
        if not targets:
            absent.append(layer.name)
            continue
        for part in _divided(layer, targets, rows, modules):
            if not fits(part, modules[part.name].shape):
                wanted, own = expected_shape(part), list(modules[part.name].shape)
                count = 0 if part.magnitude is None else part.magnitude.numel()
                unfit.append(f"{part.name} is {own} in the model, {wanted} with {count} magnitudes in the file")
            placed.append(part)
    _refuse(contents, layers, placed, absent, unfit, modules)
    return tuple(placed)


def _refuse(
    contents: Contents,
    layers: Sequence[Layer],
    placed: Sequence[Layer],
    absent: Sequence[str],
    unfit: Sequence[str],
    modules: Mapping[str, Module],
) -> None:
    if absent:
        names = ", ".join(absent[:3])
        others = {part for name in absent for part in component_of(name)}
        hint = (
            "; component= (--component) takes one part of a pipeline alone"
            if others and len(absent) < len(layers)
            else ""
        )
        raise ValueError(
            f"{contents.format}: the model has no module for {len(absent)} of the file's {len(layers)} layers: {names}"
            f"{hint}; it has {len(modules)}, such as {', '.join(list(modules)[:2]) or 'none'}"
        )
    counts = collections.Counter(layer.name for layer in placed)
    if twice := next((name for name, count in counts.items() if count > 1), None):
        raise ValueError(f"{contents.format}: several layers of the file belong to {twice}")
    if unfit:
        raise ValueError(
            f"{contents.format}: {len(unfit)} of the file's {len(layers)} layers do not fit the model: "
            f"{'; '.join(unfit[:3])}"
        )


def _in_order(layer: Layer, contents: Contents, config: Mapping[str, object], heads: Heads | None) -> Layer:
    """The layer with the rows of q and k in transformers' order and, of torchtune's own, transformers' name."""
    if contents.names_of == "torchtune":
        name = families.from_torchtune(layer.name)
        if name is None:
            return layer
        layer = layer._replace(name=name)
        whole = True
    elif layer.name in contents.meta_rows:
        whole = False
    else:
        return layer
    last = layer.name.rpartition(".")[2]
    if last not in ("q_proj", "k_proj"):
        return layer
    kind = config.get("model_type")
    if heads is None or kind not in (*_META_ORDER, *_SAME_ORDER):
        raise ValueError(
            f"{contents.format}: the rows of {layer.name} are in torchtune's order: the model's config must say its "
            f"heads and a model_type among {', '.join((*_META_ORDER, *_SAME_ORDER))}, got {kind!r}"
        )
    if kind in _SAME_ORDER:
        return layer
    rows = families.rotary_rows(heads.queries if last == "q_proj" else heads.keys, heads.size)
    if len(rows) != layer.lora_B.shape[0]:
        raise ValueError(
            f"{contents.format}: {layer.name} has {layer.lora_B.shape[0]} rows, {len(rows)} by the model's heads"
        )
    magnitude = None if layer.magnitude is None else layer.magnitude[rows]
    return layer._replace(lora_B=layer.lora_B[rows] if whole else layer.lora_B, magnitude=magnitude)


def _divided(layer: Layer, targets: tuple[str, ...], rows, modules: Mapping[str, Module]) -> list[Layer]:
    """The layer of each target.

    Raises:
        ValueError: rows that are not the targets', or a norm that goes over the rows of several.
    """
    if len(targets) == 1 and rows is None:
        return [_reshaped(layer._replace(name=targets[0]), modules[targets[0]].shape)]
    sizes = [modules[target].shape[0] for target in targets]
    count = layer.lora_B.shape[0] if layer.lora_B is not None else layer.magnitude.numel()
    parts = rows(sizes) if rows else list(torch.arange(sum(sizes)).split(sizes))
    if sum(sizes) != count or any(len(part) != size for part, size in zip(parts, sizes, strict=True)):
        raise ValueError(f"{layer.name} has {count} rows, the modules {', '.join(targets)} together {sum(sizes)}")
    if layer.norm_axis == "in" and len(targets) > 1:
        raise ValueError(
            f"{layer.name} has norms over the rows of {', '.join(targets)} together, which are layers apart here"
        )
    divided = []
    for target, part in zip(targets, parts, strict=True):
        magnitude = layer.magnitude if layer.magnitude is None or layer.norm_axis == "in" else layer.magnitude[part]
        lora_B = None if layer.lora_B is None else layer.lora_B[part]
        divided.append(layer._replace(name=target, lora_B=lora_B, magnitude=magnitude))
    return divided


def _reshaped(layer: Layer, shape: torch.Size) -> Layer:
    """A linear layer's factors for a convolution of one tap, and the other way round."""
    if layer.lora_A is None or layer.kind == "embedding" or layer.lora_A.ndim == len(shape):
        return layer
    taps = layer.lora_A.shape[2:]
    if len(shape) == 2 and all(size == 1 for size in taps):
        return layer._replace(kind="linear", lora_A=layer.lora_A.flatten(1), lora_B=layer.lora_B.flatten(1))
    if layer.lora_A.ndim == 2 and all(size == 1 for size in shape[2:]):
        ones = [1] * (len(shape) - 2)
        lora_A, lora_B = (t.view(*t.shape, *ones) for t in (layer.lora_A, layer.lora_B))
        return layer._replace(kind="conv", lora_A=lora_A, lora_B=lora_B)
    return layer


class _Index:
    """Modules by their names, with ``_`` for dots, and by the endings of these."""

    def __init__(self, modules: Mapping[str, Module]) -> None:
        self._modules = modules
        self._whole: dict[str, list[str]] = {}
        self._ends: dict[str, list[str]] = {}
        for name in modules:
            self._whole.setdefault(name.replace(".", "_"), []).append(name)
            for ending in endings(name):
                self._ends.setdefault(ending.replace(".", "_"), []).append(name)

    def find(self, name: str, names_of: str, heads: Heads | None) -> tuple[tuple[str, ...], object]:
        """The modules that a file's layer is, and how its rows are divided; none where that cannot be told."""
        if name in self._modules:
            return (name,), None
        components = component_of(name)
        plain = name
        for prefix in _PREFIXES:
            if plain.startswith(prefix):
                plain = plain.removeprefix(prefix)
                break
        underscored = plain.replace(".", "_")
        translations = [Translation((name.replace(".", "_"),)), Translation((underscored,))]
        if names_of == "megatron":
            translations = [families.from_megatron(name, heads)]
        else:
            translations += [families.from_ldm(underscored), families.from_flux(underscored)]
        for translation in filter(None, translations):
            found = [self._one(target, components) for target in translation.targets]
            if all(found):
                return tuple(found), translation.rows
        return (), None

    def _one(self, underscored: str, components: tuple[str, ...]) -> str | None:
        for table in (self._whole, self._ends):
            names = table.get(underscored, [])
            of_component = [name for name in names if name.partition(".")[0] in components]
            names = of_component or names
            if len(names) == 1:
                return names[0]
        return None
