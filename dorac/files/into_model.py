"""What ``load_adapter`` reads: PEFT's two files, or a file of another format as they would be for the model."""

from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from dorac import adapter_config
from dorac.files import peft, registry, storage
from dorac.files.base import Model
from dorac.files.parts import Given
from dorac.files.places import place
from dorac.files.storage import CONFIG_NAME


class AdapterFile(NamedTuple):
    """What PEFT's two files hold: the config, and the tensors under PEFT's keys."""

    path: Path
    config: dict
    tensors: dict[str, Tensor]


def read(model: nn.Module, path: Path, given: Given, component: str | None = None) -> AdapterFile:
    """PEFT's files as they are, or a file of another format as PEFT's with the same adapter, for the model's modules.

    Raises:
        OSError, ValueError, TypeError: see :func:`dorac.files.read`; a config that is no DoRA adapter's; layers
            that are not in the model or do not fit it, tensors that belong to no layer, what PEFT has nothing for.
    """
    given.check()
    if _is_pefts(path, given):
        return _read_pefts(path, given, component)
    return _read_others(model, path, given, component)


def _is_pefts(path: Path, given: Given) -> bool:
    """Whether ``path`` is to be read as PEFT's pair of files: a directory that holds nothing of another format."""
    if not path.is_dir():
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


def _read_pefts(directory: Path, given: Given, component: str | None) -> AdapterFile:
    if named := [name for name, value in (*given._asdict().items(), ("component", component)) if value is not None]:
        raise ValueError(
            f"{directory} holds PEFT's files, which say all that is needed: {named[0]}= has no place there"
        )
    config = adapter_config.read_config(directory / CONFIG_NAME)
    weights = directory / storage.WEIGHTS_NAME
    if not weights.is_file() and not (weights := directory / storage.PICKLE_NAME).is_file():
        raise FileNotFoundError(f"no {storage.WEIGHTS_NAME} in {directory}")
    raw = storage.read(weights)
    peft.check_config(directory / CONFIG_NAME, config, raw)
    try:
        return AdapterFile(directory, config, peft.one_adapter(raw.tensors))
    except ValueError as error:
        raise ValueError(f"{weights}: {error}") from None


def _read_others(model: nn.Module, path: Path, given: Given, component: str | None) -> AdapterFile:
    raw = storage.read(path)
    contents = registry.read_raw(raw, given)
    base = Model(model)
    try:
        registry.refuse_others(contents)
        layers = tuple(
            base.completed(layer) for layer in place(contents, base.modules, base.config, component=component)
        )
        tensors = {key: tensor for layer in layers for key, tensor in peft.tensors_of(layer).items()}
    except ValueError as error:
        raise ValueError(f"{raw.path}: {error}") from None
    more = dict(contents.config) if contents.format == peft.NAME else {}
    return AdapterFile(path, peft.config_of(layers, more), tensors)
