"""An adapter merged into a plain model in memory: the way of magnitudes per input, for which there is no layer."""

import os

import torch
from torch import nn

from dorac import hub, offload, packed
from dorac.files import registry, storage
from dorac.files.base import Model
from dorac.files.layers import Layer, merged
from dorac.files.parts import Given
from dorac.files.places import place
from dorac.names import ModuleNames
from dorac.ops import sharded
from dorac.places import Index, dora_layers
from dorac.undo import Undo


def merge_into(
    model: nn.Module,
    path: str | os.PathLike,
    *,
    lora_alpha: float | None = None,
    scaling: float | None = None,
    norm_axis: str | None = None,
    eps: float | None = None,
    component: str | None = None,
) -> list[str]:
    """Merges an adapter of any format into the weights of a model that holds none, ``W' = m (W + s BA) / (n + eps)``.

    :func:`dorac.load_adapter` and :func:`dorac.merge` do it for what can be trained on; this one also takes magnitudes
    per input column. It cannot be unmerged. The old weights are kept until all are written: whatever is raised, the
    model is what it was.

    Args: see :func:`dorac.load_adapter`.

    Returns:
        The names of the modules whose weights are merged.

    Raises:
        OSError, ValueError, TypeError: see :func:`dorac.files.read`; layers that are not in the model or do not fit it;
            a model with adapted layers; weights that are quantised, on ``meta`` or on disk, that other modules share,
            or that cannot hold the result.
    """
    given = Given(lora_alpha, scaling, norm_axis, eps)
    given.check()
    adapted = next(iter(dora_layers(model)), None)
    if adapted is not None:
        raise ValueError(f"the model has adapted layers ({adapted}, ...): merge the file into a plain model")
    raw = storage.read(hub.local(path, (storage.CONFIG_NAME, *storage.WEIGHTS_NAMES)))
    contents = registry.read_raw(raw, given)
    base = Model(model)
    try:
        registry.refuse_others(contents)
        layers = place(contents, base.modules, base.config, component=component)
        _refuse_what_is_not_written(model, base, layers)
        modules = {layer.name: base.module(layer.name) for layer in layers}
        with Undo() as log, offload.written(log, *modules.values()), torch.no_grad():
            for layer in layers:
                _merge(layer, base, modules[layer.name].weight, log)
    except ValueError as error:
        raise ValueError(f"{raw.path}: {error}") from None
    return ModuleNames(modules)


def _merge(layer: Layer, base: Model, parameter: nn.Parameter, log: Undo) -> None:
    with base.weight(layer.name) as weight:
        result = merged(layer, weight)
    if not result.isfinite().all():
        raise ValueError(f"{layer.name}: the merged weight is not finite in {result.dtype}")
    stored = result.t() if base.modules[layer.name].transposed else result
    log.keep(parameter)
    parameter.copy_(sharded.like(stored, parameter))


def _refuse_what_is_not_written(model: nn.Module, base: Model, layers: tuple[Layer, ...]) -> None:
    index = Index(model)
    for layer in layers:
        module = base.module(layer.name)
        if packed.holder(module) is not None or not module.weight.is_floating_point():
            raise ValueError(f"{layer.name} is quantised, and its merged weight would be another format's")
        sharing = index.names(module.weight)
        if len(sharing) > 1:
            raise ValueError(f"{' and '.join(sharing)} are one weight: merging would change both; untie them first")
