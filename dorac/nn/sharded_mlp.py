"""An MLP of layers that :mod:`dorac.parallel` has spread, computed as one on each rank's parts of them.

gate and up hold rows of their weights, down the columns of its own that go with these, so that nothing moves in
between: x comes in, y goes out as each layer's would, and one all-reduce in backward sums all gradients that are due.
"""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from dorac import functional
from dorac.functional.blocks import checked_mlp
from dorac.nn import norm_cache, shared
from dorac.nn.layer import parameter
from dorac.nn.linear import DoraLinear
from dorac.ops import collectives, eager_parts
from dorac.ops.collectives import local


def mlp(x: Tensor, gate: DoraLinear | None, up: DoraLinear, down: DoraLinear, activation: str) -> Tensor | None:
    """``down(activation(gate(x)) * up(x))`` as the layers give it, or None if each is to be called.

    That is asked of what is the same on all ranks, since the collectives differ.
    """
    layers = [layer for layer in (gate, up, down) if layer is not None]
    if not all(type(layer) is DoraLinear and layer.shards is not None and _joins(layer) for layer in layers):
        return None
    if not _fit(x, layers):
        return None
    shards, group = down.shards, down.shards.mesh.get_group()
    adapter, due, norms = [], [], {}
    for layer in layers:
        own, weight = layer.shards._adapter(layer), layer.base_layer.weight
        norms[layer] = norm_cache.known_norm(layer, (weight, *own[:2])) if layer.caches_norm else None
        adapter += own
        due += layer.shards._adapter_due
    entry = collectives.Entry(group, due, [layer.base_layer.weight for layer in layers], adapter)
    x = up.shards._moved_in(x, group)

    def projections(parts: tuple[Tensor, ...]) -> list[functional.Projection | None]:
        parts, found = iter(parts), [] if gate is not None else [None]
        for layer in layers:
            lora_A, lora_B, magnitude = (next(parts) for _ in range(3))
            matrix, bias = local(layer.base_layer.weight), parameter(layer.base_layer, "bias")
            matrix = matrix.t() if layer.fan_in_fan_out else matrix
            if norms[layer] is None and layer is down:
                with torch.no_grad():
                    *_, norms[down] = shards._operands(down, matrix, (lora_A, lora_B, magnitude), None, group)
            bias = None if bias is None or layer is down else local(bias)  # down's is added to the sum
            tensors = matrix, lora_A, lora_B, magnitude, bias, norms[layer]
            found.append(functional.Projection(*tensors, layer._scaling))
        return found

    trained = [p.requires_grad for p in adapter] if torch.is_grad_enabled() else [False]
    y = None
    if all(trained):
        of_parts = projections(entry.parts())
        y = eager_parts.dora_mlp(entry, x, of_parts, activation, lambda: checked_mlp(x, *of_parts))
    if y is None:
        parts = collectives.Enter.apply(entry, *adapter) if any(trained) else entry.parts()
        y = functional.dora_mlp(x, *projections(parts), activation=activation)
    bias = parameter(down.base_layer, "bias")
    return shards._leave(y, down.out_features, group, None if bias is None else local(bias))


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


def _fit(x: Tensor, layers: list[DoraLinear]) -> bool:
    """Whether what the first layers give is what the last one takes, and no DTensor."""
    *first, down = (layer.shards for layer in layers)
    return (
        type(x) is not DTensor
        and down.columns
        and _parts_features(down.given, x.ndim)
        and all(
            s.mesh == down.mesh
            and not s.columns
            and s.returns_local
            and s.given == first[0].given
            and s._parts_features(x.ndim)
            for s in first
        )
    )


def _parts_features(placement: object, ndim: int) -> bool:
    return placement.is_shard() and placement.dim % ndim == ndim - 1
