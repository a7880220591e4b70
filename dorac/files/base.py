"""Base models whose weights are read one at a time: a checkpoint on disk, or a model in memory."""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from dorac import hub, offload, packed
from dorac.files import storage
from dorac.files.layers import Layer, completed
from dorac.files.places import Module
from dorac.names import plain_name
from dorac.nn import DoraLayer, layer_class
from dorac.nn.linear import is_conv1d
from dorac.ops import sharded
from dorac.places import named_places

_CONFIGS = ("config.json", "model_index.json")
# transformers' models whose linear layers of these names are Conv1D, with weights [in, out].
_CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_CONV1D_NAMES = ("c_attn", "c_proj", "c_fc", "q_attn")
_WITH_HEADS = ("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")
_HEADS = ("lm_head", "embed_out", "output")
_SUFFIX = ".weight"


class _Base:
    """What both have: weights that are read when they are needed."""

    def completed(self, layer: Layer) -> Layer:
        """The layer with all that PEFT's has; one with a magnitude per input stays as it is."""
        lacks = layer.lora_A is None or layer.magnitude is None or layer.eps
        if not lacks or layer.norm_axis == "in":
            return layer
        with self.weight(layer.name) as weight:
            return completed(layer, weight)


class Checkpoint(_Base):
    """A model's weights in safetensors files: a file, a directory of them, or a pipeline's directories.

    Args:
        path: what the user named; the id of a repository on the Hub too.

    Raises:
        OSError: there is none. ValueError: a damaged file, or a directory without safetensors files.
    """

    def __init__(self, path: str) -> None:
        self.path = hub.local(path, ("*.safetensors", "*.json", "*/*.safetensors", "*/*.json", "*.model", "*.txt"))
        self.files = self._found()
        self.config = next(
            (storage.read_json(file) for name in _CONFIGS if (file := Path(self._folder, name)).is_file()), {}
        )
        self._shapes: dict[str, torch.Size] = {}
        self._file_of: dict[str, Path] = {}
        self._opened = {file: storage.opened(file) for file in self.files}  # kept: each opening reads all keys
        for file, prefix in self.files.items():
            opened = self._opened[file]
            for key in opened.keys():  # noqa: SIM118
                if other := self._file_of.get(prefix + key):
                    raise ValueError(f"{prefix + key} is in two files, {other} and {file}: name the one that is meant")
                self._shapes[prefix + key] = torch.Size(opened.get_slice(key).get_shape())
                self._file_of[prefix + key] = file
        self.modules = {
            key.removesuffix(_SUFFIX): Module(self._shape_of_matrix(key), self._is_transposed(key))
            for key, shape in self._shapes.items()
            if key.endswith(_SUFFIX) and len(shape) >= 2
        }

    @property
    def _folder(self) -> Path:
        return self.path if self.path.is_dir() else self.path.parent

    def _found(self) -> dict[Path, str]:
        """The files, with the component of a pipeline that each is of before its keys."""
        if self.path.is_file():
            if self.path.suffix != ".safetensors":
                raise ValueError(
                    f"{self.path} is no safetensors file; save the base model with safe_serialization=True"
                )
            return {self.path: ""}
        if not self.path.is_dir():
            raise FileNotFoundError(f"there is no base model {self.path}")
        if Path(self.path, "model_index.json").is_file():
            nested = {file: f"{file.parent.name}." for file in sorted(self.path.glob("*/*.safetensors"))}
            if nested:
                return nested
        files = sorted(self.path.glob("*.safetensors"))
        if index := next(self.path.glob("*.safetensors.index.json"), None):  # what it does not name is another copy
            named = set(storage.read_json(index).get("weight_map", {}).values())
            files = [file for file in files if file.name in named]
        files = [file for file in files if not file.name.startswith("adapter")]
        if not files:
            raise ValueError(
                f"{self.path} holds no safetensors file of a base model; save it with safe_serialization=True"
            )
        return dict.fromkeys(files, "")

    def _is_transposed(self, key: str) -> bool:
        name = key.removesuffix(_SUFFIX).rpartition(".")[2]
        return self.config.get("model_type") in _CONV1D_MODELS and name in _CONV1D_NAMES

    def _shape_of_matrix(self, key: str) -> torch.Size:
        shape = self._shapes[key]
        return torch.Size(reversed(shape)) if self._is_transposed(key) else shape

    def place(self, name: str) -> tuple[Path, str]:
        """The file that holds a module's weight, and its key there."""
        file = self._file_of[name + _SUFFIX]
        return file, (name + _SUFFIX).removeprefix(self.files[file])

    def is_tied(self) -> bool:
        """Whether the embedding's weight is the head's, too: as the config says, or else as there is no other head."""
        nested = self.config.get("text_config")
        for config in (nested if isinstance(nested, Mapping) else {}, self.config):
            if "tie_word_embeddings" in config:
                return bool(config["tie_word_embeddings"])
        generates = any(str(name).endswith(_WITH_HEADS) for name in self.config.get("architectures") or ())
        return generates and not any(name.rpartition(".")[2] in _HEADS for name in self.modules)

    @contextlib.contextmanager
    def weight(self, name: str) -> Iterator[Tensor]:
        """A module's weight, of a linear layer ``[out, in]``, read now.

        Raises:
            ValueError: it is no floating-point tensor.
        """
        path, key = self.place(name)
        tensor = self._opened[path].get_tensor(key)
        if not tensor.is_floating_point() or tensor.element_size() < 2:
            raise ValueError(f"the base weight {key} is {tensor.dtype}, quantised: take the model it was made from")
        yield tensor.t() if self.modules[name].transposed else tensor


class Model(_Base):
    """A model in memory as a base: adapted layers count as the layers inside them, compiled blocks as plain ones."""

    def __init__(self, model: nn.Module) -> None:
        self._bases: dict[str, nn.Module] = {}
        adapted: set[str] = set()
        for name, module in named_places(model):
            if isinstance(module, DoraLayer):
                adapted.add(name)
                module = module.base_layer
            elif name.rpartition(".")[0] in adapted:
                continue
            if name and layer_class(module) is not None:
                self._bases[plain_name(name)] = module
        self.modules = {name: Module(_matrix_shape(module), is_conv1d(module)) for name, module in self._bases.items()}
        config = getattr(model, "config", None)
        self.config: Mapping[str, object] = config.to_dict() if hasattr(config, "to_dict") else {}

    def module(self, name: str) -> nn.Module:
        """The layer of that name, without its adapter."""
        return self._bases[name]

    @contextlib.contextmanager
    def weight(self, name: str) -> Iterator[Tensor]:
        """A module's weight, of a linear layer ``[out, in]``, where it lies; an offloaded one is brought in meanwhile.

        Raises:
            ValueError: it has no values, or is quantised in a way that cannot be undone here.
        """
        module = self._bases[name]
        with offload.onloaded(module):
            weight = packed.of(module) if packed.holder(module) is not None else module.weight
            if packed.is_packed(weight):
                weight = weight.rows(0, weight.shape[-2])
            if weight.is_meta:
                raise ValueError(f"{name} is on meta and has no values: load the base weights first")
            weight = sharded.whole(weight.detach())  # of a sharded model, on every rank
            yield weight.t() if self.modules[name].transposed else weight


def _matrix_shape(module: nn.Module) -> torch.Size:
    if packed.holder(module) is not None:
        return torch.Size((module.out_features, module.in_features))
    shape = getattr(module, "weight", torch.empty(0)).shape  # experts have none of this name
    return torch.Size(reversed(shape)) if is_conv1d(module) else shape
