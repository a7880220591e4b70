"""Blocks of layers that :mod:`dorac.parallel` has spread, computed as one on each rank's parts of them.

Of an MLP gate and up hold rows of their weights, down the columns of its own that go with these, so that nothing moves
in between; q, k and v hold rows of theirs. x comes in and y goes out as each layer's would, and one all-reduce in
backward sums all gradients that are due.

Whether layers are computed together is asked of what is the same on all ranks, since the collectives differ.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement

from dorac import functional
from dorac.functional import blocks as of_parts
from dorac.nn import norm_cache, shared
from dorac.nn.layer import parameter
from dorac.nn.linear import DoraLinear
from dorac.ops import crossing, eager_parts
from dorac.ops.collectives import local


def mlp(x: Tensor, gate: nn.Module | None, up: nn.Module, down: nn.Module, activation: str) -> Tensor | None:
    """``down(activation(gate(x)) * up(x))`` as the layers give it, or None if each is to be called."""
    layers = [layer for layer in (gate, up, down) if layer is not None]
    if not _join(layers) or not _share_x(x, layers[:-1]):
        return None
    shards, group = down.shards, down.shards.group
    if not shards.columns or shards.mesh != up.shards.mesh or not _parts_features(shards.given, x.ndim):
        return None

    def three(projections: Iterable) -> list[functional.Projection | None]:
        return [*([None] if gate is None else []), *projections]

    def in_kernels(entry: crossing.Entry, x: Tensor, projections: list[functional.Projection]) -> Tensor | None:
        own = three(projections)
        return eager_parts.dora_mlp(entry, x, own, activation, lambda: of_parts.checked_mlp(x, *own))

    def anyhow(x: Tensor, projections: list[functional.Projection]) -> Tensor:
        return functional.dora_mlp(x, *three(projections), activation=activation)

    y = _computed(x, layers, in_kernels, anyhow)
    bias = parameter(down.base_layer, "bias")
    return shards._leave(y, down, group, None if bias is None else local(bias))


def linears(x: Tensor, layers: Sequence[nn.Module]) -> list[Tensor] | None:
    """What these layers give for one x, or None if each is to be called."""
    if not _join(layers) or not _share_x(x, layers):
        return None

    def in_kernels(
        entry: crossing.Entry, x: Tensor, projections: list[functional.Projection]
    ) -> tuple[Tensor, ...] | None:
        return eager_parts.dora_linears(entry, x, projections, lambda: of_parts.checked_linears(x, projections))

    return [*_computed(x, layers, in_kernels, functional.dora_linears)]


def _computed(x: Tensor, layers: Sequence[DoraLinear], in_kernels: Callable, anyhow: Callable) -> object:
    """What one of these two makes of this rank's x and projections, the first where the adapters are trained whole."""
    group = layers[0].shards.group
    adapter, due, norms = [], [], []
    for layer in layers:
        own, weight = layer.shards._adapter(layer), layer.base_layer.weight
        norms.append(norm_cache.known_norm(layer, (weight, *own[:2])))
        adapter += own
        due += layer.shards.adapter_due
    entry = crossing.Entry(group, due, [layer.base_layer.weight for layer in layers], adapter)
    x = layers[0].shards._moved_in(x, group)

    def projections(parts: tuple[Tensor, ...]) -> list[functional.Projection]:
        found = []
        for i, layer in enumerate(layers):
            shards, own = layer.shards, parts[3 * i : 3 * i + 3]
            matrix, bias = local(layer.base_layer.weight), parameter(layer.base_layer, "bias")
            matrix = matrix.t() if layer.fan_in_fan_out else matrix
            if norms[i] is None and shards.columns:
                with torch.no_grad():
                    *_, norms[i] = shards._operands(layer, matrix, own, None, group)
            bias = None if bias is None or shards.columns else local(bias)  # else it is added to the sum
            saves = layer.save_output and shards._gives_y(x.ndim)
            found.append(functional.Projection(matrix, *own, bias, norms[i], layer._scaling, save_output=saves))
        return found

    trained = [p.requires_grad for p in adapter] if torch.is_grad_enabled() else [False]
    y = in_kernels(entry, x, projections(entry.parts())) if all(trained) else None
    if y is None:
        parts = crossing.Enter.apply(entry, *adapter) if any(trained) else entry.parts()
        y = anyhow(x, projections(parts))
    return y


def _join(layers: Sequence[nn.Module]) -> bool:
    return all(type(layer) is DoraLinear and layer.shards is not None and _joins(layer) for layer in layers)


def _joins(layer: DoraLinear) -> bool:
    """Whether a call of the layer adapts its frozen base by a norm that is a constant, at full strength."""
    bias = parameter(layer.base_layer, "bias")
    return (
        layer.merged_norm is None
        and not layer.runs_base
        and not layer.norm_grad
        and layer._strength is None
        and not (layer.training and layer.lora_dropout)
        and not layer.base_layer.weight.requires_grad
        and (bias is None or not bias.requires_grad)
        and shared.is_plainly_called(layer)
    )


def _share_x(x: Tensor, layers: Sequence[DoraLinear]) -> bool:
    """Whether these take x, which is no DTensor, alike, and each gives its part of the features as it is."""
    first = layers[0].shards
    return type(x) is not DTensor and all(
        s.mesh == first.mesh
        and not s.columns
        and s.given == first.given
        and s.returns_local
        and _parts_features(s.wanted, x.ndim)
        for s in (layer.shards for layer in layers)
    )


def _parts_features(placement: Placement, ndim: int) -> bool:
    """Whether a tensor of so many dimensions is parted along its last."""
    return placement.is_shard() and placement.dim % ndim == ndim - 1
