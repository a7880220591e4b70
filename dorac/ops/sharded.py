"""The norm of a weight that is sharded over a device mesh, and what sharded arguments have to look like.

The public ops' bodies come here with DTensors. The layer itself is plain aten there, which DTensor propagates well. The
norm is not left to it: a slice of a weight's sharded columns would gather the whole weight. Here each rank takes the
norm of its shard with the same op as without sharding (on CUDA a Triton kernel). Only then do ranks talk, if the
columns are sharded: one all-reduce of the ``[out]`` sums of squares.

    weight             lora_A             lora_B             norm, magnitude, bias
    Shard(out)         Replicate          Shard(out)         Shard(out)
    Shard(in)          Shard(in)          Replicate          Replicate (the sums of squares are Partial)
    Replicate          Replicate          Replicate          Replicate
    Shard(experts)     Shard(experts)     Shard(experts)     Shard(experts)

Factors in another layout, such as FSDP2's ``Shard(0)`` of lora_A's rank, are brought into this one; the weight never
moves.
"""

import sys

import torch
from torch import Tensor


def any_sharded(*tensors: Tensor | None) -> bool:
    """Whether any of them is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")  # whoever made a DTensor has imported it
    return module is not None and any(isinstance(t, module.DTensor) for t in tensors)


def whole(tensor: Tensor) -> Tensor:
    """The plain tensor, gathered or summed if it is a DTensor: then every rank of its mesh has to call this.

    Only so do all ranks decide alike on a value: ``bool`` of a DTensor reads this rank's part of it.
    """
    return tensor.full_tensor() if any_sharded(tensor) else tensor


def replicated(tensor: Tensor) -> Tensor:
    """A DTensor that every rank holds whole, so that any view of it is possible; a plain tensor as it is."""
    if not any_sharded(tensor):
        return tensor
    from torch.distributed.tensor import Replicate

    return tensor.redistribute(placements=[Replicate()] * tensor.device_mesh.ndim)


def like(tensor: Tensor, other: Tensor) -> Tensor:
    """A plain tensor that every rank holds, as a DTensor in the layout of ``other`` if that is one."""
    if not any_sharded(other):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    tensor = tensor.to(other.device)
    return distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)


def check_sharded(**tensors: Tensor | None) -> None:
    """All of them are DTensors on the mesh of ``weight``, which is itself not a sum still to be made."""
    from torch.distributed.tensor import DTensor

    for name, tensor in tensors.items():
        if tensor is not None and not isinstance(tensor, DTensor):
            sharded = ", ".join(k for k, t in tensors.items() if isinstance(t, DTensor))
            raise TypeError(
                f"{name} must be a DTensor like {sharded}, got a plain tensor: shard a layer as a "
                "whole, after wrapping it (dorac.parallel for tensor parallelism, fully_shard for FSDP2)"
            )
    mesh = tensors["weight"].device_mesh
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device_mesh != mesh:
            raise ValueError(f"{name} must be on the mesh of weight, {mesh}, got {tensor.device_mesh}")
    if any(p.is_partial() for p in tensors["weight"].placements):
        raise ValueError(f"weight must be sharded or replicated, got placements {tensors['weight'].placements}")


def layouts(weight: Tensor) -> tuple[list, list]:
    """The placements that go with the weight's: lora_A's, and those of lora_B and of vectors over the rows."""
    from torch.distributed.tensor import Replicate

    rows, columns = weight.ndim - 2, weight.ndim - 1
    lora_A = [Replicate() if getattr(p, "dim", None) == rows else p for p in weight.placements]
    lora_B = [Replicate() if getattr(p, "dim", None) == columns else p for p in weight.placements]
    return lora_A, lora_B


def local_shards(weight: Tensor, lora_A: Tensor, lora_B: Tensor, *vectors: Tensor | None) -> tuple[Tensor | None, ...]:
    """This rank's shards, with the factors and the vectors over the rows brought into the weight's layout."""
    for_a, for_b = layouts(weight)
    moved = [lora_A.redistribute(placements=for_a)]
    moved += [t if t is None else t.redistribute(placements=for_b) for t in (lora_B, *vectors)]
    return tuple(t if t is None else t.to_local() for t in (weight, *moved))


def from_shard(local: Tensor, like: Tensor, placements: list) -> Tensor:
    """The DTensor of which ``local`` is this rank's shard: of the shape of ``like``, or of its rows."""
    from torch.distributed.tensor import DTensor

    shape = like.shape[: local.ndim]
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, like.device_mesh, placements, run_check=False, shape=shape, stride=stride)


def row_norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: Tensor, budget: int) -> Tensor:
    """``||W + s * lora_B @ lora_A||_row`` of DTensors that carry no gradient."""
    from torch.distributed.tensor import Partial

    check_sharded(weight=weight, lora_A=lora_A, lora_B=lora_B)
    norm = torch.ops.dorac.norm_factored(*local_shards(weight, lora_A, lora_B), whole(scaling), None, budget)
    rows = layouts(weight)[1]
    columns = weight.ndim - 1
    if all(getattr(p, "dim", None) != columns for p in weight.placements):
        return from_shard(norm, weight, rows)
    partial = [Partial() if getattr(p, "dim", None) == columns else p for p in weight.placements]
    square = from_shard(norm.to(torch.float64).square(), weight, partial)
    return square.redistribute(placements=rows).sqrt().to(norm.dtype)
