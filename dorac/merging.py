"""Merge a model's adapters into its base weights, and take them out again."""

import contextlib
from collections.abc import Iterator, Mapping

from torch import nn

from dorac import lora_config, notices, pretrained
from dorac.nn import DoraLayer, blocks, loading, merging, starts
from dorac.nn.shelf import SHELF_ATTRIBUTE
from dorac.ops import sharded
from dorac.undo import Undo
from dorac.wrapped import (
    SAVED_ATTRIBUTE,
    bare,
    refuse_offloaded_as_parts,
    refuse_tied,
    replace,
    require_layers,
    reshard,
)

_LEFT_BY_WRAPPING = (SAVED_ATTRIBUTE, lora_config.RECORD_ATTRIBUTE, SHELF_ATTRIBUTE)


def merge(model: nn.Module, *, unload: bool = False) -> nn.Module | None:
    """Writes every adapter into its base weight: ``W' = g * (W + s * lora_B @ lora_A)``.

    A quantised weight is quantised anew, in its own format, with the error that this makes, and kept until the adapter
    is unmerged or dropped: see :class:`dorac.nn.DoraQuantLinear`.

    Args:
        model: a model with adapted layers (:class:`dorac.nn.DoraLayer`), or one such layer.
        unload: also put the plain layers back in place of the wrappers. What is left is the model's own classes, its
            parameters still frozen but for those in ``modules_to_save``. Adapters that are not active are gone.

    Returns:
        With ``unload`` the plain model: ``model``, or the plain layer if ``model`` itself is an adapted layer. Else
        None, since the change is made in place. A ``RuntimeWarning`` names layers whose weight the code of the model
        can read past their forward: that will see the merged one.

    Raises:
        ValueError: no adapter in the model; a base weight that another module also uses (tied weights): merging would
            change both; an adapter that is not finite: it would destroy the base weight; a grouped convolution whose
            lora_A sees all channels: it has no merged form; a format that cannot be quantised anew here (mxfp4,
            transformers' float8, int4 without torchao's kernels); a merged weight that overflows its dtype; a base
            weight that accelerate offloads to disk (on the host it is written). Refused by name.
            Then, and whatever else is raised, the model is what it was, bit for bit. (For that the base weights are
            kept until all are written: on their device while half of its free memory holds them, then on the host.)
    """
    root, model = model, bare(model)
    layers = require_layers(model)
    refuse_offloaded_as_parts(model, layers)
    reshard(model)
    for name, layer in layers.items():
        starts.settle(layer)
        if reason := layer.cannot_merge():
            raise ValueError(f"{name or type(layer).__name__}: {reason}")
    refuse_tied(model, layers.values(), "merging")
    for name, layer in layers.items():
        finite = all(p.is_meta or sharded.all_finite(p.detach()) for p in layer.parameters(recurse=False))
        if not layer.merged and not finite:
            raise ValueError(
                f"{name or type(layer).__name__}: the adapter is not finite, merging would destroy the weight"
            )
    notices.warn_read_past_forward(model, layers, merging=True)
    norms = {}
    for name, layer in layers.items():
        if not layer.merged:
            with _blaming(name, layer):
                norms[name] = merging.decide_merge(layer)
    with Undo() as log:
        for name, layer in layers.items():
            if not layer.merged:
                with _blaming(name, layer):
                    merging.write_merged(layer, norms.pop(name), log)
        if unload:
            _unload(model, layers, log)
            return layers[""].base_layer if "" in layers else root  # in the block: nothing raises once it has ended
        log.keep_module(model)
        loading.guard(model)
        return None


@contextlib.contextmanager
def _blaming(name: str, layer: DoraLayer) -> Iterator[None]:
    """Names the layer in what is said of its values."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name or type(layer).__name__}: {error}") from None


def _unload(model: nn.Module, layers: Mapping[str, DoraLayer], log: Undo) -> None:
    """Puts the base layers in the places of their wrappers, and takes what wrapping left on the modules."""
    if "" in layers:
        return
    replace(model, {name: layer.base_layer for name, layer in layers.items()}, log)
    blocks.restore(model.modules(), log)
    for module in model.modules():
        left = [name for name in _LEFT_BY_WRAPPING if name in vars(module)]
        if left or loading.is_guarded(module) or pretrained.is_installed(module):
            log.keep_module(module)
            for name in left:
                delattr(module, name)
            loading.unguard(module)
            pretrained.remove(module)


def unmerge(model: nn.Module) -> None:
    """Takes every merged adapter out of its base weight again, to ``2 eps * max(|V|, |W|)``; a quantised one exactly.

    Raises:
        ValueError: no adapter in the model; a layer with rows of g = 0, which cannot be restored (named). Then, and
            whatever else is raised, the model is what it was.
    """
    layers = {name: layer for name, layer in require_layers(bare(model)).items() if layer.merged}
    refuse_offloaded_as_parts(bare(model), layers)
    reshard(bare(model))
    for name, layer in layers.items():
        with _blaming(name, layer):
            merging.decide_unmerge(layer)
    with Undo() as log:
        for name, layer in layers.items():
            if layer.merged:  # not yet unmerged under another name
                with _blaming(name, layer):
                    merging.write_unmerged(layer, log)
