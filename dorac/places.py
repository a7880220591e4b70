"""Where a model holds its modules and parameters: what surgery, checkpoints and merging share."""

import functools
from collections.abc import Iterator

from torch import Tensor, nn

from dorac import offload
from dorac.nn import DoraLayer
from dorac.ops import sharded


def named_places(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """``named_modules`` where a module held in several places has the name of each, but a place has one name only.

    What is put there by name is put there once: below a module that is held twice there are not twice the places.
    """
    yield "", model
    seen = {model}
    waiting = [(name, child) for name, child in reversed(model._modules.items())]
    while waiting:
        name, module = waiting.pop()
        if module is None:
            continue
        yield name, module
        if module not in seen:
            seen.add(module)
            waiting += [(f"{name}.{key}", child) for key, child in reversed(module._modules.items())]


def dora_layers(model: nn.Module) -> dict[str, DoraLayer]:
    """The DoRA layers of a model by name; one that is held in several places has several names."""
    return {name: module for name, module in named_places(model) if isinstance(module, DoraLayer)}


class Index:
    """All names that a state dict has for the modules and parameters of a model, in its order.

    Parameters are told by identity, or by where their memory begins. The index is of the model as it was.
    """

    def __init__(self, model: nn.Module) -> None:
        self._named = list(model.named_modules(remove_duplicate=False))

    @functools.cached_property
    def modules(self) -> dict[nn.Module, list[str]]:
        """The names of each module."""
        names: dict[nn.Module, list[str]] = {}
        for name, module in self._named:
            names.setdefault(module, []).append(name)
        return names

    def names(self, parameter: Tensor) -> list[str]:
        """Of this parameter; none if the model does not have it."""
        return self._by_identity.get(id(parameter), [])

    def names_in_memory(self, parameter: Tensor) -> list[str]:
        """Of all parameters that begin where this one of the model does; of an offloaded one, where its original does.

        Raises:
            KeyError: the model does not have it.
        """
        memories, names = self._by_memory
        return names[memories[id(parameter)]]

    @functools.cached_property
    def _by_identity(self) -> dict[int, list[str]]:
        names: dict[int, list[str]] = {}
        for name, module in self._named:
            for key, parameter in module._parameters.items():
                if parameter is not None:
                    names.setdefault(id(parameter), []).append(f"{name}.{key}" if name else key)
        return names

    @functools.cached_property
    def _by_memory(self) -> tuple[dict[int, tuple[str, int]], dict[tuple[str, int], list[str]]]:
        memories: dict[int, tuple[str, int]] = {}
        names: dict[tuple[str, int], list[str]] = {}
        for name, module in self._named:
            originals = offload.originals(module)
            for key, parameter in module.named_parameters(recurse=False):
                kept = originals.get(key)
                memories[id(parameter)] = memory = _memory(parameter if kept is None else kept)
                names.setdefault(memory, []).append(f"{name}.{key}".lstrip("."))
        return memories, names


def _memory(parameter: Tensor) -> tuple[str, int]:
    """Where the parameter's memory begins (of a DTensor, this rank's shard), or which it is if it has none."""
    local = parameter.to_local() if sharded.any_sharded(parameter) else parameter
    if local.numel() and not local.is_meta and (address := local.data_ptr()):  # 0: it consists of other tensors
        return "address", address
    return "id", id(parameter)
