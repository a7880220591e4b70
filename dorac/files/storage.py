"""Files of tensors: found, read without running what is in them, and written whole or not at all."""

import json
import os
import pickle
import re
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"  # PEFT's
PICKLE_NAME = "adapter_model.bin"
# What the libraries call their files, in the order in which they are looked for.
WEIGHTS_NAMES = (
    WEIGHTS_NAME,
    PICKLE_NAME,
    "adapters.safetensors",
    "pytorch_lora_weights.safetensors",
    "pytorch_lora_weights.bin",
)
# What torch.load's error says of the pickle itself.
_REASON = re.compile(r"unsupported \w+:? [^\n]+", re.IGNORECASE)
_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")


class Raw(NamedTuple):
    """A file of tensors as it is, what its metadata say, and the ``adapter_config.json`` beside it, if there is one."""

    path: Path
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    config: Mapping[str, object] | None


def find(path: Path) -> Path:
    """The file of weights: ``path`` itself, or in a directory the one that a library would have written.

    Raises:
        OSError: there is none. ValueError: a directory with several.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise FileNotFoundError(f"there is no file or directory {path}")
    found = [file for name in WEIGHTS_NAMES if (file := Path(path, name)).is_file()]
    if found and all(file.stem == found[0].stem for file in found):  # of both kinds of file the safetensors
        return found[0]
    found = found or sorted(file for file in path.iterdir() if file.suffix in _SUFFIXES and file.is_file())
    if len(found) > 1:
        names = ", ".join(file.name for file in found[:5])
        raise ValueError(f"{path} holds {len(found)} files of tensors ({names}): name the one that is meant")
    if not found:
        raise FileNotFoundError(f"{path} holds no adapter: no {', '.join(WEIGHTS_NAMES)} and no other file of tensors")
    return found[0]


def read(path: Path) -> Raw:
    """All that a file holds, on the CPU.

    Raises:
        OSError: it is missing or cannot be read. ValueError: it is damaged, or a pickle of more than tensors.
    """
    weights = find(path)
    config_path = weights.parent / CONFIG_NAME
    config = read_json(config_path) if config_path.is_file() else None
    if weights.suffix == ".safetensors":
        with opened(weights) as file:
            return Raw(weights, {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}, config)  # noqa: SIM118
    return Raw(weights, _unpickled(weights), {}, config)


def keys(path: Path) -> list[str]:
    """The keys of a file, without its tensors where it is a safetensors file.

    Raises:
        OSError, ValueError: see :func:`read`.
    """
    if path.suffix != ".safetensors":
        return list(_unpickled(path))
    with opened(path) as file:
        return list(file.keys())


def opened(path: Path) -> safetensors.safe_open:
    """A safetensors file whose tensors are read when they are asked for. Opening reads the header, with all keys.

    Raises:
        OSError: it is missing or cannot be read. ValueError: it is no whole safetensors file.
    """
    try:
        with path.open("rb"):
            return safetensors.safe_open(path, framework="pt")
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from None


def _unpickled(path: Path) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings(action="ignore"):  # of protocols; what cannot be read is said below
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, MemoryError):
        raise
    except pickle.UnpicklingError as error:
        found = _REASON.search(str(error))  # the rest is advice to unpickle all the same
        reason = f": {found[0]}" if found else ""
        raise ValueError(f"{path} is a pickle that asks for more than tensors, or none at all{reason}") from None
    except Exception as error:  # of damaged bytes the unpickler raises whatever it meets
        raise ValueError(f"{path} is not a whole file of tensors: {_first_line(error)}") from None
    if not isinstance(loaded, dict) or not all(isinstance(key, str) for key in loaded):
        raise ValueError(f"{path} holds no state dict, but {type(loaded).__name__}")
    if wrong := next((key for key, value in loaded.items() if not isinstance(value, Tensor)), None):
        raise ValueError(f"{path} holds no state dict of tensors: {wrong} is {type(loaded[wrong]).__name__}")
    return loaded


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def read_json(path: Path) -> dict:
    """An object in a JSON file.

    Raises:
        OSError: it cannot be read. ValueError: it is none.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds no JSON object")
    return value


def write(directory: Path, files: Mapping[str, Mapping[str, Tensor] | dict | str], metadata: Mapping[str, str]) -> None:
    """Writes files of tensors (``*.safetensors``) and of JSON into a directory, all beside their places first.

    A directory that was not there is there with all of them, or not at all.

    Raises:
        OSError: the directory cannot be made or written; then nothing in it has changed.
    """
    new = not directory.exists()
    beside = directory.parent if new else directory
    beside.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=beside, prefix=".writing-") as scratch:
        written = Path(scratch, "files")  # of the user's umask, unlike scratch
        written.mkdir()
        for name, content in files.items():
            path = written / name
            if name.endswith(".safetensors"):
                save(content, path, metadata)
            else:
                path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        if new:
            os.replace(written, directory)
            return
        for name in files:
            os.replace(written / name, directory / name)


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file beside its place and moves it there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".writing-") as scratch:
        Path(scratch, path.name).write_bytes(content)
        os.replace(Path(scratch, path.name), path)


def save(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """``save_file`` of views too, whose errors are the system's."""
    alone: dict[str, Tensor] = {}
    taken: set[int] = set()
    for key, tensor in tensors.items():
        tensor = _alone(tensor)
        alone[key] = tensor.clone() if tensor.data_ptr() in taken else tensor
        taken.add(tensor.data_ptr())
    try:
        save_file(alone, path, metadata=dict(metadata))
    except safetensors.SafetensorError as error:
        raise OSError(f"cannot write {path}: {error}") from None


def _alone(tensor: Tensor) -> Tensor:
    """The tensor, contiguous and in memory of its own: safetensors refuses what is shared."""
    tensor = tensor.detach().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
