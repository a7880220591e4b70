"""A file of another format as PEFT's two would be for a model in memory."""

import contextlib
from pathlib import Path

from torch import Tensor, nn

from dorac.files import peft, registry, storage
from dorac.files.base import Model
from dorac.files.layers import Contents, Layer, completed
from dorac.files.parts import Given
from dorac.files.places import place
from dorac.files.storage import CONFIG_NAME
from dorac.names import plain_name


def is_pefts(path: Path, given: Given) -> bool:
    """Whether ``path`` is to be read as PEFT's pair of files: a directory that holds nothing of another format."""
    if path.is_file():
        return False
    config_path = Path(path, CONFIG_NAME)
    try:
        weights = storage.find(path)
        config = storage.read_json(config_path) if config_path.is_file() else None
    except (OSError, ValueError):  # for the reader of PEFT's files to say
        return True
    if config is None:  # of PEFT's two files one is missing, unless the caller says what it would
        return weights.stem == "adapter_model" and given.lora_alpha is None and given.scaling is None
    if config.get("peft_type") == "LORA":
        return "use_dora" in config or not any("lora_magnitude_vector" in key for key in storage.keys(weights))
    return config.get("peft_type") != peft.NVLABS_TYPE and "fine_tune_type" not in config and "r" not in config


def read(
    model: nn.Module, path: Path, given: Given, component: str | None = None
) -> tuple[dict[str, object], dict[str, Tensor]]:
    """The config and the tensors of PEFT's files with the same adapter, for the model's modules.

    Raises:
        OSError, ValueError, TypeError: see :func:`dorac.files.read`; layers that are not in the model or do not fit it,
            tensors that belong to no layer, and what PEFT has nothing for.
    """
    given.check()
    raw = storage.read(path)
    contents = registry.read_raw(raw, given)
    base = Model(model)
    try:
        registry.refuse_others(contents)
        layers = tuple(_whole(base, layer) for layer in place(contents, base.modules, base.config, component=component))
        tensors = {key: tensor for layer in layers for key, tensor in peft.tensors_of(layer).items()}
    except ValueError as error:
        raise ValueError(f"{raw.path}: {error}") from None
    return peft.config_of(layers, _neutral(contents)), tensors


def _whole(base: Model, layer: Layer) -> Layer:
    """The layer with all that PEFT's has, under the name that it has where nothing is compiled."""
    lacks = layer.lora_A is None or layer.magnitude is None or layer.eps
    with base.weight(layer.name) if lacks and layer.norm_axis == "out" else contextlib.nullcontext() as weight:
        whole = layer if weight is None else completed(layer, weight)
    return whole._replace(name=plain_name(layer.name))


def _neutral(contents: Contents) -> dict[str, object]:
    """What PEFT's own config says besides."""
    return dict(contents.config) if contents.format == peft.NAME else {}
