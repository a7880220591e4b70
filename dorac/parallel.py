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
                       the norm is kept, of its  (r + 1) * out elements (compiled, where nothing but the adapter is
                       [out] squares, float64    trained and without dropout, lora_B's alone)

Experts (:class:`dorac.nn.DoraExperts`) are spread by :class:`ExpertParallel`, each of them whole.

A block that :func:`dorac.fuse` has made one (an MLP; q, k and v) sums the gradients of its layers together: two
collectives in backward, that of dx and that one. So do all layers of a graph that Inductor compiles, in one collective
for every 25 MiB.

Between layers whose lines are sharded (``Shard(1)``, sequence parallelism) an all-gather of x and a reduce-scatter of y
take the place of the all-reduces of dx and y, and in backward the inverse. With ``norm_grad`` over columns the
gradient of the norm is summed too, ``out`` elements.

What a training step of one layer sends, in bytes of payload (the larger of what a collective takes and gives), with T
tokens a rank, a bfloat16 base and float32 adapters:

    layout            plain LoRA, forward / backward                          what DoRA adds
    ColwiseParallel   - / all-reduce 2 T in, 4 r in                           nothing
    RowwiseParallel   all-reduce 2 T out / 4 r out                            all-reduce 8 out / 4 out in LoRA's
    FSDP2             all-gather 2 out in + 4 r (in + out) / the same, and    4 out to each of the three
                      reduce-scatter 4 r (in + out)
    both              the first two, and FSDP2's over a rank's shards         likewise

Counted for an MLP 4096 / 16384 at r = 16 and T = 8 (``python -m dorac.bench mesh``, torch's fake process group):

                                  8 ranks             64                  1024                DoRA adds
    tensor parallelism            0.66 MB, 4 calls    0.66 MB             0.66 MB             0.05 MB, 1 call
    FSDP2                         544.7 MB, 3 calls   556.5 MB            792.5 MB            0.25 MB, no call
    FSDP2, in eights parallel     as the first        70.1 MB, 7 calls    78.4 MB             0.12 MB, 1 call

What DoRA adds is the same on every mesh. What grows is LoRA's: FSDP2 shards lora_A along r, and above r ranks pads it
to a row a rank. Nothing grows where that is sharded along its features, on n ranks by ``fully_shard(...,
shard_placement_fn=lambda p: Shard(1) if p.ndim == 2 and p.shape[0] < n else None)``. A norm that is kept
(:func:`dorac.cache_norms`) sends nothing.

On n ranks with the bandwidth B and the latency L of a message, a ring takes about ``2 (n - 1) (L + b / (n B))`` for an
all-reduce of b bytes, half of it to gather or to reduce and scatter. So what DoRA adds is latency: ``8 out`` is 32 KiB
where W is 4096 wide, and a gather beneath it 134 MB. Neither vector is on the way from x to y's product or from dy to
dx's: the norm does not depend on x, and nothing in backward waits for the magnitude's gradient.
"""

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel as _ColwiseParallel
from torch.distributed.tensor.parallel import RowwiseParallel as _RowwiseParallel
from torch.distributed.tensor.parallel.style import ParallelStyle
from torch.distributed.tensor.placement_types import Placement

from dorac import ranks
from dorac.nn import DoraEmbedding, DoraExperts, DoraLayer, DoraLinear, DoraQuantLinear, norm_cache
from dorac.nn.expert_parallel import ExpertShards
from dorac.nn.tensor_parallel import Shards, keep_parts
from dorac.places import dora_layers


class ColwiseParallel(_ColwiseParallel):
    """``torch.distributed.tensor.parallel.ColwiseParallel``, also for ``DoraLinear`` and ``DoraEmbedding``.

    Every rank holds some of the output features of all five tensors but lora_A, which it holds whole. The input is
    replicated, the output sharded on its last dimension, unless ``input_layouts`` and ``output_layouts`` say otherwise.

    Args: see torch's class.

    Raises:
        ValueError: another adapted layer, or one that is merged; one that is another on another rank (on every rank).
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
        ValueError: another adapted layer, or one that is merged; one that is another on another rank (on every rank).
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        if not isinstance(module, DoraLayer):
            return super()._apply(module, device_mesh)
        return _distribute(self, module, device_mesh, Shard(1))


class ExpertParallel(ParallelStyle):
    """Spreads :class:`dorac.nn.DoraExperts` over the ranks by expert: each rank holds ``E / ranks`` of them, whole.

    All tensors of the experts and of their adapters are ``Shard(0)`` over E. Hidden states, the router's choice and the
    result are plain tensors that every rank holds (of Llama 4 all experts' rows), so that the block around the experts
    stays as it is. Forward sums the result, ``tokens * hidden`` elements, once over the ranks, backward the gradients
    of the hidden states and of the router's weights; no gradient of an adapter. (Of Llama 4 the result is gathered, and
    the gradient of the hidden states.) These are the collectives of plain LoRA in that layout.

    Raises:
        ValueError: another layer, one that is merged or whose weights are mxfp4; a number of experts that is no
            multiple of that of the ranks; a mesh of more dimensions; a layer that is another on another rank.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        kind = type(self).__name__
        if not isinstance(module, DoraExperts):
            raise ValueError(f"{kind} spreads dorac.nn.DoraExperts, got {type(module).__name__}")
        if (packed := module.packed_base()) is not None:
            raise ValueError(f"{kind}: the weights of {type(packed).__name__} are mxfp4: dequantise them first")
        _check(kind, module, device_mesh)
        experts, size = module.weight.shape[0], device_mesh.size()
        if experts % size:
            raise ValueError(f"{kind}: {experts} experts cannot be spread evenly over {size} ranks")
        for owner in (module, module.base_layer):
            for name, parameter in [*owner.named_parameters(recurse=False)]:
                parts = distribute_tensor(parameter, device_mesh, [Shard(0)], src_data_rank=self.src_data_rank)
                owner.register_parameter(name, nn.Parameter(parts, requires_grad=parameter.requires_grad))
        module.shards = ExpertShards(device_mesh)
        keep_parts(module)
        norm_cache.refresh([module])
        return module


def _check(kind: str, layer: DoraLayer, mesh: DeviceMesh) -> None:
    if layer.merged:
        raise ValueError(f"{kind}: the adapter is merged; unmerge it before sharding, or unload it (dorac.merge)")
    if mesh.ndim != 1:
        raise ValueError(f"{kind} needs a mesh of one dimension, as mesh['tp'] of a larger one, got {mesh}")
    ranks.refuse_other_adapters({"": layer}, mesh)


def check_ranks(model: nn.Module, mesh: DeviceMesh) -> None:
    """Refuses a model whose adapters are not the same on all ranks, for a call before ``fully_shard``, on every rank.

    ``fully_shard`` does not look. The styles of this module, :func:`dorac.load_adapter` of a sharded model and
    :func:`dorac.cache_norms` under FSDP2 do so by themselves.

    Args:
        model: with DoRA layers. mesh: of the ranks that are to hold it.

    Raises:
        ValueError: no DoRA layer in the model; a layer with another class, rank, scaling, dropout, dtype or size on
            another rank, by name with both. The sentence is the same on every rank.
    """
    layers = dora_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} holds no DoRA layer; wrap it with dorac.apply_dora first")
    ranks.refuse_other_adapters(layers, mesh)


def _check_embedding(kind: str, layer: DoraEmbedding, mesh: DeviceMesh, over_vocabulary: bool) -> None:
    base, size = layer.base_layer, mesh.size()
    if base.sparse:
        raise ValueError(
            f"{kind}: a sparse gradient cannot be summed over the ranks; build the embedding without sparse"
        )
    if over_vocabulary and base.scale_grad_by_freq:
        raise ValueError(
            f"{kind}: scale_grad_by_freq counts indices, of which a rank sees some; shard the features: ColwiseParallel"
        )
    if over_vocabulary and layer.num_embeddings <= -(-layer.num_embeddings // size) * (size - 1):
        raise ValueError(f"{kind}: {layer.num_embeddings} rows are too few for {size} ranks to have one each")


def _distribute(style: ParallelStyle, layer: DoraLayer, mesh: DeviceMesh, matrix: Placement) -> nn.Module:
    """Distributes the layer's parameters, ``matrix`` being the layout of the ``[out, in]`` matrix that it adapts."""
    kind = type(style).__name__
    if not isinstance(layer, (DoraLinear, DoraEmbedding)):
        raise ValueError(f"{kind} shards linear layers and embeddings, got {type(layer).__name__}")
    if isinstance(layer, DoraQuantLinear):
        raise ValueError(f"{kind}: a quantised base weight ({type(layer.base_layer).__name__}) cannot be sharded")
    _check(kind, layer, mesh)
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
    keep_parts(layer)
    norm_cache.refresh([layer])
    return layer
