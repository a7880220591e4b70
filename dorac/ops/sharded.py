"""The norm and the linear layer of a weight that is sharded over a device mesh, and how its arguments are laid out.

The public ops' bodies come here with DTensors. Left to aten on DTensors, a slice of a weight's sharded columns would
gather the whole weight, and the magnitude's gradient sum a whole activation over the ranks. So each rank runs the same
op on its shards as without sharding (on CUDA the same kernels), and what it computes is declared: a shard, or a part of
a sum (``Partial``) that is made where it is needed. The norm makes one itself, if the columns are sharded: an
all-reduce of the ``[out]`` sums of squares.

    weight             lora_A             lora_B             norm, magnitude, bias
    Shard(out)         Replicate          Shard(out)         Shard(out)
    Shard(in)          Shard(in)          Replicate          Replicate (the sums of squares are Partial)
    Replicate          Replicate          Replicate          Replicate
    Shard(experts)     Shard(experts)     Shard(experts)     Shard(experts)

Factors in another layout, such as FSDP2's ``Shard(0)`` of lora_A's rank, are brought into this one; the weight never
moves. :func:`linear_layout` says what comes out of the linear layer.
"""

import dataclasses
import sys

import torch
from torch import Tensor

Placements = tuple  # of one DTensor: a Placement for each dimension of the mesh


def any_sharded(*tensors: Tensor | None) -> bool:
    """Whether any of them is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")  # whoever made a DTensor has imported it
    return module is not None and any(isinstance(t, module.DTensor) for t in tensors)


def whole(tensor: Tensor) -> Tensor:
    """The plain tensor, gathered or summed if it is a DTensor: then every rank of its mesh has to call this.

    Only so do all ranks decide alike on a value: ``bool`` of a DTensor reads this rank's part of it.
    """
    return tensor.full_tensor() if any_sharded(tensor) else tensor


def all_finite(tensor: Tensor) -> bool:
    """Whether no element on any rank is infinite or NaN. Waits for the device."""
    if not any_sharded(tensor):
        return bool(tensor.isfinite().all())
    from torch.distributed.tensor import Partial

    # Counted by hand: for ``all()`` torch 2.14 gathers the tensor.
    mesh, lost = tensor.device_mesh, to_shard(tensor, tensor.placements).isfinite().logical_not().sum()
    return not from_shard(lost, mesh, (Partial(),) * mesh.ndim, lost.shape).full_tensor()


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
                "whole, after wrapping it: fully_shard for FSDP2; for tensor parallelism dorac.parallel, which takes "
                "dorac.nn's layers, not PEFT's (dorac.apply_dora, dorac.load_adapter)"
            )
    mesh = tensors["weight"].device_mesh
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device_mesh != mesh:
            raise ValueError(f"{name} must be on the mesh of weight, {mesh}, got {tensor.device_mesh}")
    if any(p.is_partial() for p in tensors["weight"].placements):
        raise ValueError(f"weight must be sharded or replicated, got placements {tensors['weight'].placements}")


def layouts(weight: Tensor) -> tuple[Placements, Placements]:
    """The placements that go with the weight's: lora_A's, and those of lora_B and of vectors over the rows."""
    from torch.distributed.tensor import Replicate

    rows, columns = weight.ndim - 2, weight.ndim - 1
    lora_A = tuple(Replicate() if getattr(p, "dim", None) == rows else p for p in weight.placements)
    lora_B = tuple(Replicate() if getattr(p, "dim", None) == columns else p for p in weight.placements)
    return lora_A, lora_B


class _ToShard(torch.autograd.Function):
    """``to_local``, waiting for a collective that is under way; the gradient comes back in the placements given.

    Saving the DTensor makes autograd notice a change in place before backward: the shard has a version of its own.
    """

    @staticmethod
    def forward(ctx, tensor, d_placements):
        from torch.distributed._functional_collectives import AsyncCollectiveTensor

        ctx.save_for_backward(tensor)
        ctx.d_placements = d_placements
        local = tensor.to_local()
        local = local.wait() if isinstance(local, AsyncCollectiveTensor) else local
        return local.view_as(local)  # a tensor of its own, for autograd to mark

    @staticmethod
    def backward(ctx, d_local):
        (tensor,) = ctx.saved_tensors
        # A gradient in another layout than its leaf is copied into that; torch 2.11 gathers uneven shards for it.
        if tensor.ndim == 2 and tensor.t().is_contiguous() and not tensor.is_contiguous():
            d_local, stride = d_local.t().contiguous().t(), tensor.stride()
        else:
            d_local, stride = d_local.contiguous(), None
        return _FromShard.apply(d_local, tensor.device_mesh, ctx.d_placements, tensor.shape, stride), None


class _FromShard(torch.autograd.Function):
    """``from_local``: the DTensor of which ``local`` is this rank's shard or summand.

    In backward every summand has the gradient of the sum: what is ``Partial`` has a gradient that all ranks hold.
    """

    @staticmethod
    def forward(ctx, local, mesh, placements, shape, stride):
        from torch.distributed.tensor import DTensor

        ctx.placements = placements
        stride = torch.empty(shape, device="meta").stride() if stride is None else stride
        return DTensor.from_local(local, mesh, placements, run_check=False, shape=shape, stride=stride)

    @staticmethod
    def backward(ctx, d_tensor):
        from torch.distributed.tensor import Replicate

        held = tuple(Replicate() if p.is_partial() else p for p in ctx.placements)
        return to_shard(d_tensor, held, ctx.placements), None, None, None, None


def to_shard(tensor: Tensor, placements: Placements, d_placements: Placements | None = None) -> Tensor:
    """This rank's shard of a DTensor once that has these placements. Its gradient has ``d_placements``, or the same."""
    if tensor.placements != placements:
        tensor = tensor.redistribute(placements=placements)
    return _ToShard.apply(tensor, placements if d_placements is None else d_placements)


def from_shard(
    local: Tensor, mesh: "torch.distributed.DeviceMesh", placements: Placements, shape: torch.Size
) -> Tensor:
    """The DTensor of this shape of which ``local`` is this rank's shard or, where it is ``Partial``, summand."""
    return _FromShard.apply(local, mesh, placements, shape, None)


def local_shards(weight: Tensor, lora_A: Tensor, lora_B: Tensor, *vectors: Tensor | None) -> tuple[Tensor | None, ...]:
    """This rank's shards, with the factors and the vectors over the rows brought into the weight's layout."""
    for_a, for_b = layouts(weight)
    rows = (t if t is None else to_shard(t, for_b) for t in (lora_B, *vectors))
    return to_shard(weight, weight.placements), to_shard(lora_A, for_a), *rows


def row_norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: Tensor, budget: int) -> Tensor:
    """``||W + s * lora_B @ lora_A||_row`` of DTensors that carry no gradient."""
    from torch.distributed.tensor import Partial

    check_sharded(weight=weight, lora_A=lora_A, lora_B=lora_B)
    norm = torch.ops.dorac.norm_factored(*local_shards(weight, lora_A, lora_B), whole(scaling), None, budget)
    rows = layouts(weight)[1]
    columns, norm_shape = weight.ndim - 1, weight.shape[:-1]
    if all(getattr(p, "dim", None) != columns for p in weight.placements):
        return from_shard(norm, weight.device_mesh, rows, norm_shape)
    partial = tuple(Partial() if getattr(p, "dim", None) == columns else p for p in weight.placements)
    square = from_shard(norm.to(torch.float64).square(), weight.device_mesh, partial, norm_shape)
    return square.redistribute(placements=rows).sqrt().to(norm.dtype)


@dataclasses.dataclass(frozen=True)
class LinearLayout:
    """The placements of what comes out of a linear layer that each rank computes on its shards, and of gradients."""

    y: Placements
    d_x: Placements
    d_weight: Placements
    d_lora_A: Placements
    d_rows: Placements  # of lora_B, magnitude, norm and bias


def linear_layout(x: Tensor, weight: Tensor) -> LinearLayout | None:
    """What these two give, the rest being laid out as :func:`layouts` says; None where a rank needs more than that.

    One line for each dimension of the mesh, K being any dimension of x but the last:

    weight     x           y          d_x        d_weight   d_lora_A   d_rows
    Shard(0)   Replicate   Shard(-1)  Partial    Shard(0)   Partial    Shard(0)
    Shard(1)   Shard(-1)   Partial    Shard(-1)  Shard(1)   Shard(1)   Partial
    Replicate  Replicate   Replicate  Replicate  Replicate  Replicate  Replicate
    Replicate  Shard(K)    Shard(K)   Shard(K)   Partial    Partial    Partial
    """
    from torch.distributed.tensor import Partial, Replicate, Shard

    last, replicate, partial = Shard(x.ndim - 1), Replicate(), Partial()
    lines = []  # in the order of LinearLayout's fields
    for of_weight, of_x in zip(weight.placements, x.placements, strict=True):
        if not {type(of_weight), type(of_x)} <= {Shard, Replicate}:  # a sum still to be made, or FSDP2's strided shards
            return None
        if of_weight == Shard(0) and of_x == replicate:
            lines.append((last, partial, of_weight, partial, of_weight))
        elif of_weight == Shard(1) and of_x == last:
            lines.append((partial, last, of_weight, of_weight, partial))
        elif of_weight == replicate == of_x:
            lines.append((replicate,) * 5)
        elif of_weight == replicate and of_x != last:
            lines.append((of_x, of_x, partial, partial, partial))
        else:
            return None
    return LinearLayout(*zip(*lines, strict=True))
