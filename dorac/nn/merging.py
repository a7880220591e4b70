"""The adapter of a layer written into its base weight, and taken out: first decided, then written.

What a layer's values decide is decided without changing it, for every layer of a model before the first is written. The
writes are told to an :class:`dorac.undo.Undo`, so that neither an interruption nor a lack of memory leaves a part.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dorac import functional, offload
from dorac.nn import norm_cache
from dorac.numerics import accumulate_dtype
from dorac.ops import front, sharded
from dorac.undo import Undo

if TYPE_CHECKING:
    from dorac.nn.layer import DoraLayer


# Below this share of itself a base weight that is merged at a strength is gone in the rounding of what was added to it.
LOST = 1e-6


def unwritable(layer: "DoraLayer") -> str | None:
    """Why the base weights cannot be written now, or None if they can."""
    if torch.is_inference_mode_enabled() or not any(weight.is_inference() for weight in layer.base_weights()):
        return None
    return "its base weight was made in torch.inference_mode, and only there torch lets it be written"


@torch.no_grad()
def decide_merge(layer: "DoraLayer") -> list[Tensor]:
    """The norms that the parts of an unmerged layer are merged with, if nothing speaks against merging.

    Raises:
        ValueError: see :meth:`dorac.nn.DoraLayer.merge`.
    """
    if front.exporting_module():
        raise ValueError(
            f"{type(layer).__name__}.merge cannot be exported: it changes the layer and reads values of the merged "
            "weight; merge before exporting"
        )
    if layer.disabled:
        raise ValueError("the adapter is switched off: leave dorac.disabled before merging")
    if reason := layer.cannot_merge() or unwritable(layer):
        raise ValueError(reason)
    with offload.onloaded(layer, layer.base_layer):
        return _norms(layer)


def _norms(layer: "DoraLayer") -> list[Tensor]:
    norms = []
    for name, (matrix, lora_A, lora_B, magnitude) in layer.parts().items():
        norm = functional.norm_factored(matrix, lora_A, lora_B, layer.scaling, budget=layer.norm_budget)
        # No element of a row is larger than its norm: |g V| <= |m|. Only where that says too little is V computed.
        bound = (2 * magnitude).to(matrix.dtype)
        if not norm.is_meta and not (
            layer._strength is None and sharded.all_finite(norm) and sharded.all_finite(bound)
        ):
            _merged(layer, name, norm)
        norms.append(norm)
    return norms


def _merged(layer: "DoraLayer", name: str, norm: Tensor) -> tuple[Tensor, Tensor]:
    """The merged matrix of a part and its norm."""
    part, scale_norm = at_strength(layer.parts()[name], norm, layer._strength)
    merged, _ = functional.merge_weight(*part, scaling=layer.scaling, weight_norm=scale_norm, budget=layer.norm_budget)
    if not merged.is_meta and not sharded.all_finite(merged):
        raise ValueError(f"the merged {name} is not finite in {merged.dtype}: the adapter is not, or g is too large")
    return merged, norm


def at_strength(part: tuple[Tensor, ...], norm: Tensor, strength: float | Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
    """The part and the norm that give its weight at a strength, None for 1; the factors are rounded nowhere."""
    if strength is None:
        return part, norm
    matrix, lora_A, lora_B, magnitude = part
    wide = accumulate_dtype(lora_A, lora_B)
    lora_B, magnitude, norm = functional.at_strength(lora_B.to(wide), magnitude, norm, strength)
    return (matrix, lora_A.to(wide), lora_B, magnitude), norm


def refuse_lost(magnitude: Tensor, norm: Tensor, strength: float | Tensor | None) -> None:
    """Raises a ``ValueError`` that names rows which no longer hold their base weight; both as for that strength."""
    if strength is not None:
        magnitude = magnitude.where(magnitude.abs() >= LOST, 0.0)
    functional.invertible_scale(magnitude, norm)


@torch.no_grad()
def write_merged(layer: "DoraLayer", norms: list[Tensor], log: Undo) -> None:
    """Merges the layer with the norms that :func:`decide_merge` gave."""
    layer.keep_base(log)
    log.keep_module(layer)
    known = []
    with offload.written(log, layer.base_layer), offload.onloaded(layer):
        for name, norm in zip(layer.parts(), norms, strict=True):
            merged, norm = _merged(layer, name, norm)
            layer.write_part(name, merged)
            known.append(norm)
    with torch.inference_mode(False):  # what was made in inference mode could not be moved or copied to outside it
        layer.merged_norm = layer.joined_norms(known).clone()


@torch.no_grad()
def decide_unmerge(layer: "DoraLayer") -> None:
    """Raises what unmerging a merged layer would (see :meth:`dorac.nn.DoraLayer.unmerge`)."""
    if layer.replaced_base is not None:
        return
    if offload.is_on_disk(layer.base_layer):
        raise ValueError(offload.ON_DISK)
    if reason := unwritable(layer):
        raise ValueError(reason)
    with offload.onloaded(layer, layer.base_layer):
        _refuse_zero_scales(layer)


def _refuse_zero_scales(layer: "DoraLayer") -> None:
    parts = layer.parts()
    for (name, part), norm in zip(parts.items(), layer.parted_norms(layer.merged_norm), strict=True):
        part, norm = at_strength(part, norm, layer._strength)
        magnitude, norm = sharded.replicated(part[3]), sharded.replicated(norm)
        if len(parts) == 1:  # a convolution's rows are its output channels, not those of a group's matrix
            magnitude, norm = magnitude.flatten(), norm.flatten()
        try:
            refuse_lost(magnitude, norm, layer._strength)
        except ValueError as error:
            raise ValueError(f"{name}: {error}" if len(parts) > 1 else str(error)) from None


@torch.no_grad()
def write_unmerged(layer: "DoraLayer", log: Undo) -> None:
    """Unmerges a merged layer."""
    layer.keep_base(log)
    layer.keep_norm(log)
    if layer.replaced_base is not None:
        layer.take_back_base()
    else:
        with offload.written(log, layer.base_layer), offload.onloaded(layer):
            _write_unmerged_parts(layer)
    layer.merged_norm = None
    norm_cache.refresh([layer])


def _write_unmerged_parts(layer: "DoraLayer") -> None:
    for (name, part), norm in zip(layer.parts().items(), layer.parted_norms(layer.merged_norm), strict=True):
        part, norm = at_strength(part, norm, layer._strength)
        matrix = functional.unmerge_weight(*part, scaling=layer.scaling, weight_norm=norm, budget=layer.norm_budget)
        layer.write_part(name, matrix)
