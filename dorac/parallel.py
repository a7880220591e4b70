"""Tensor parallelism of adapted layers: torch's own styles, which also take ``dorac.nn``.

``parallelize_module(model, mesh, plan)`` with these styles in the plan shards a :class:`dorac.nn.DoraLinear` as torch
shards an ``nn.Linear``, its factors and magnitude along with the weight:

    style              adapted W [out, in]     lora_A [r, in]   lora_B [out, r]   magnitude, bias [out]
    ColwiseParallel    Shard(0)                Replicate        Shard(0)          Shard(0)
    RowwiseParallel    Shard(1)                Shard(1)         Replicate         Replicate

(An embedding keeps W as ``weight^T``.) The parameters stay DTensors; forward runs on each rank's part of them, which
:mod:`dorac.nn.tensor_parallel` describes. Gradients come in the layouts of their parameters, those of replicated ones
summed over the ranks. The rank is never sharded, so a layer has the collectives of plain LoRA in that layout:

    style              forward                   backward
    ColwiseParallel    none                      all-reduce of dx, one for all layers that are called with one x (in
                                                 compiled code one for each, without torch's ``PrepareModuleInput``);
                                                 of lora_A's gradient, r * in elements
    RowwiseParallel    all-reduce of y; unless   all-reduce of the gradients of lora_B and the magnitude together,
                       the norm is kept, of its  (r + 1) * out elements
                       [out] squares, float64

Between layers whose lines are sharded (``Shard(1)``, sequence parallelism) an all-gather of x and a reduce-scatter of y
take the place of the all-reduces of dx and y, and in backward the inverse. With ``norm_grad`` over columns the
gradient of the norm is summed too, ``out`` elements.
"""

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel as _ColwiseParallel
from torch.distributed.tensor.parallel import RowwiseParallel as _RowwiseParallel
from torch.distributed.tensor.parallel.style import ParallelStyle
from torch.distributed.tensor.placement_types import Placement

from dorac.nn import DoraEmbedding, DoraLayer, DoraLinear, DoraQuantLinear, norm_cache
from dorac.nn.tensor_parallel import Shards


class ColwiseParallel(_ColwiseParallel):
    """``torch.distributed.tensor.parallel.ColwiseParallel``, also for ``DoraLinear`` and ``DoraEmbedding``.

    Every rank holds some of the output features of all five tensors but lora_A, which it holds whole. The input is
    replicated, the output sharded on its last dimension, unless ``input_layouts`` and ``output_layouts`` say otherwise.

    Args: see torch's class.

    Raises:
        ValueError: another adapted layer, or one that is merged.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, DoraLayer):
            return super()._apply(module, device_mesh)
        return _distribute(self, module, device_mesh, Shard(0))


class RowwiseParallel(_RowwiseParallel):
    """``torch.distributed.tensor.parallel.RowwiseParallel``, also for ``DoraLinear`` and ``DoraEmbedding``.

    Every rank holds some of the input features (of an embedding some rows of the vocabulary) of the base weight and of
    lora_A, and the rest whole. The input is sharded on its last dimension (indices are replicated: they need
    ``input_layouts=Replicate()``, as with torch's), the output summed and replicated, unless ``input_layouts`` and
    ``output_layouts`` say otherwise.

    Args: see torch's class.

    Raises:
        ValueError: another adapted layer, or one that is merged.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, DoraLayer):
            return super()._apply(module, device_mesh)
        return _distribute(self, module, device_mesh, Shard(1))


def _check_embedding(kind: str, layer: DoraEmbedding, mesh: DeviceMesh, over_vocabulary: bool) -> None:
    base, ranks = layer.base_layer, mesh.size()
    if base.sparse:
        raise ValueError(
            f"{kind}: a sparse gradient cannot be summed over the ranks; build the embedding without sparse"
        )
    if over_vocabulary and base.scale_grad_by_freq:
        raise ValueError(
            f"{kind}: scale_grad_by_freq counts indices, of which a rank sees some; shard the features: ColwiseParallel"
        )
    if over_vocabulary and layer.num_embeddings <= -(-layer.num_embeddings // ranks) * (ranks - 1):
        raise ValueError(f"{kind}: {layer.num_embeddings} rows are too few for {ranks} ranks to have one each")


def _distribute(style: ParallelStyle, layer: DoraLayer, mesh: DeviceMesh, matrix: Placement) -> nn.Module:
    """Distributes the layer's parameters, ``matrix`` being the layout of the ``[out, in]`` matrix that it adapts."""
    kind = type(style).__name__
    if not isinstance(layer, (DoraLinear, DoraEmbedding)):
        raise ValueError(f"{kind} shards linear layers and embeddings, got {type(layer).__name__}")
    if isinstance(layer, DoraQuantLinear):
        raise ValueError(f"{kind}: a quantised base weight ({type(layer.base_layer).__name__}) cannot be sharded")
    if layer.merged:
        raise ValueError(f"{kind}: the adapter is merged; unmerge it before sharding, or unload it (dorac.merge)")
    if mesh.ndim != 1:
        raise ValueError(f"{kind} needs a mesh of one dimension, as mesh['tp'] of a larger one, got {mesh}")
    if isinstance(layer, DoraEmbedding):
        _check_embedding(kind, layer, mesh, matrix == Shard(1))
    transposed = isinstance(layer, DoraEmbedding) or layer.fan_in_fan_out  # the weight is stored [in, out]
    in_features, rows = (Replicate(), Shard(0)) if matrix == Shard(0) else (Shard(1), Replicate())
    lora_A, lora_B, magnitude = layer.PEFT_KEYS
    placements = {
        "base_layer.weight": Shard(1 - matrix.dim) if transposed else matrix,
        "base_layer.bias": rows,
        lora_A: in_features,
        lora_B: rows,
        magnitude: rows,
        "initial_lora_A": in_features,  # see dorac.nn.residual
        "initial_lora_B": rows,
    }

    def partition(name: str, module: nn.Module, mesh: DeviceMesh) -> None:
        for key, parameter in module.named_parameters(recurse=False):
            placement = placements[f"{name}.{key}".lstrip(".")]
            shards = distribute_tensor(parameter, mesh, [placement], src_data_rank=style.src_data_rank)
            module.register_parameter(key, nn.Parameter(shards, requires_grad=parameter.requires_grad))

    distribute_module(layer, mesh, partition)
    layer.shards = Shards(mesh, matrix == Shard(1), *style.input_layouts, *style.output_layouts, style.use_local_output)
    norm_cache.refresh([layer])
    return layer
