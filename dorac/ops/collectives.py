"""Moves of local tensors between the ranks of a tensor-parallel layer, with their gradients.

A tensor of a group of ranks is *held* (each rank has all of it), *parted* along a dimension, or *due*: a sum of which
each rank has a summand. The gradient of what is held and used by ranks for parts of their own is due, that of what is
due is held:

    way        forward                      backward
    share      held to held, no collective  due to held, all-reduce
    reduce     due to held, all-reduce      held to held, no collective
    spread     parted to held, all-gather   due to parted, reduce-scatter
    scatter    due to parted, its inverse   parted to held, all-gather
    gather     parted to held, all-gather   held to parted, no collective
    slice      held to parted, its inverse  parted to held, all-gather

``spread`` is for who computes parts from what was gathered, ``gather`` for who computes all of it. Of one rank alone
nothing moves.

In eager these are c10d's collectives; in traced code, and where a mode over ops is active, the functional ones.
"""

import functools
import operator
import threading
import weakref
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

Group = "torch.distributed.ProcessGroup"
INVERSE = {"share": "reduce", "spread": "scatter", "gather": "slice"}
INVERSE |= {inverse: way for way, inverse in INVERSE.items()}


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, unseen by autograd; waits for a collective that is under way."""
    part = tensor._local_tensor
    return part if type(part) is Tensor or torch.compiler.is_compiling() else part.wait()


def _functional(tensor: Tensor) -> bool:
    """Whether somebody traces this, or a mode is active (a checkpoint that chooses what it saves): nothing in place."""
    return torch.compiler.is_compiling() or type(tensor) is not Tensor or torch._C._len_torch_dispatch_stack() > 0


def add_up(tensor: Tensor, group: Group) -> Tensor:
    """The sum over the ranks, which eager code writes to the tensor."""
    if group.size() == 1:
        return tensor
    if _functional(tensor):
        return _wait(torch.ops._c10d_functional.all_reduce(tensor.contiguous(), "sum", group.group_name))
    tensor = tensor.contiguous()
    dist.all_reduce(tensor, group=group)
    return tensor


def _wait(tensor: Tensor) -> Tensor:
    return torch.ops._c10d_functional.wait_tensor(tensor)


def _gathered(part: Tensor, dim: int, group: Group) -> Tensor:
    part, ranks = part.contiguous(), group.size()
    if ranks == 1:
        return part
    if _functional(part):
        parts = _wait(torch.ops._c10d_functional.all_gather_into_tensor(part, ranks, group.group_name))
    else:
        parts = part.new_empty(ranks * part.shape[0], *part.shape[1:])
        dist.all_gather_into_tensor(parts, part, group=group)
    # A copy only where a dimension before has more than one element.
    return parts.view(ranks, *part.shape).movedim(0, dim).flatten(dim, dim + 1)


def _scattered(tensor: Tensor, dim: int, group: Group) -> Tensor:
    ranks = group.size()
    if ranks == 1:
        return tensor
    parts = tensor.unflatten(dim, (ranks, tensor.shape[dim] // ranks)).movedim(dim, 0).contiguous()
    if _functional(tensor):
        part = torch.ops._c10d_functional.reduce_scatter_tensor(parts, "sum", ranks, group.group_name)
        return _wait(part).squeeze(0)
    part = parts.new_empty(parts.shape[1:])
    dist.reduce_scatter_tensor(part, parts.flatten(0, 1), group=group)
    return part


def _moved(tensor: Tensor, way: str, dim: int, group: Group) -> Tensor:
    """A move that autograd does not see; ``reduce`` may overwrite the tensor."""
    dim %= tensor.ndim
    if way == "reduce":
        return add_up(tensor, group)
    if way == "share":
        return tensor
    if way == "scatter":
        return _scattered(tensor, dim, group)
    if way == "slice":
        size = tensor.shape[dim] // group.size()
        return tensor.narrow(dim, group.rank() * size, size)
    return _gathered(tensor, dim, group)


class _Move(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, way, dim, group):
        ctx.way, ctx.dim, ctx.group = way, dim, group
        own = tensor.clone(memory_format=torch.contiguous_format) if way == "reduce" else tensor
        moved = _moved(own, way, dim, group)
        return moved.view_as(moved) if moved is tensor else moved

    @staticmethod
    def backward(ctx, gradient):
        inverse = INVERSE[ctx.way], ctx.dim, ctx.group
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return _moved(gradient, *inverse), None, None, None  # the gradient of what only layers use is nobody else's
        return _Move.apply(gradient, *inverse), None, None, None


def move(tensor: Tensor, way: str, dim: int, group: Group) -> Tensor:
    """The tensor after such a move of the ranks, each of which calls this."""
    return _Move.apply(tensor, way, dim, group)


class _Last:
    """The last tensor that was moved, by a weak reference, and what came of it, while that tensor lives."""

    __slots__ = ("key", "moved", "tensor")

    def __init__(self) -> None:
        self.tensor = self.key = self.moved = None

    def forget(self, tensor: weakref.ref) -> None:
        if self.tensor is tensor:
            self.__init__()


class _Here(threading.local):
    def __init__(self) -> None:
        self.last = _Last()


_here = _Here()


def move_once(tensor: Tensor, way: str, dim: int, group: Group) -> Tensor:
    """:func:`move`, of which layers that are called one after the other with one tensor, as q, k and v, get one result.

    So their gradients add up before they are moved: one collective each way for all of them. Compiled code moves the
    tensor for each layer; give it a DTensor (torch's ``PrepareModuleInput``), whose parts the compiler moves once.
    """
    if way == "share" and not (tensor.requires_grad and torch.is_grad_enabled()):
        return tensor
    if torch.compiler.is_compiling() or tensor.is_inference():
        return move(tensor, way, dim, group)
    last, key = _here.last, (way, dim, group.group_name, tensor._version, torch.is_grad_enabled())
    if last.tensor is None or last.tensor() is not tensor or last.key != key:
        moved = move(tensor, way, dim, group)
        last.tensor = weakref.ref(tensor, last.forget)  # first: the end of what was moved before forgets that one
        last.key, last.moved = key, moved
        return moved
    return last.moved


def sum_in_place(tensor: Tensor, group: Group) -> Tensor:
    """``reduce`` of a tensor that nothing else uses or has saved: its gradient is the sum's, untold to autograd."""
    if group.size() == 1:
        return tensor
    if _functional(tensor) or not tensor.is_contiguous():
        return move(tensor, "reduce", 0, group)
    dist.all_reduce(tensor.detach(), group=group)
    return tensor


def widest(tensors: Sequence[Tensor]) -> torch.dtype:
    """The dtype that holds the values of all of these."""
    return functools.reduce(torch.promote_types, [tensor.dtype for tensor in tensors])


def sums(tensors: Sequence[Tensor], group: Group) -> list[Tensor]:
    """The sums of several tensors over the ranks, in one collective, in the widest of their dtypes.

    A single one may be overwritten.
    """
    if len(tensors) < 2:
        return [add_up(tensor, group) for tensor in tensors]
    dtype = widest(tensors)
    # The first stays where it is summed. The others leave: a DTensor of a tensor that begins within its storage cannot
    # be copied (deepcopy).
    order = sorted(range(len(tensors)), key=lambda i: (tensors[i].dtype is not dtype, -tensors[i].numel()))
    parts = [tensors[i] for i in order]
    sizes = [part.numel() for part in parts]
    if _functional(parts[0]):
        summed = add_up(torch.cat([part.reshape(-1) for part in parts]), group).split_with_sizes(sizes)
        summed = [total.view(part.shape) for total, part in zip(summed, parts, strict=True)]
        summed[1:] = [total.to(part.dtype, copy=True) for total, part in zip(summed[1:], parts[1:], strict=True)]
        summed[0] = summed[0].to(parts[0].dtype)
    else:
        flat = parts[0].new_empty(sum(sizes), dtype=dtype)
        summed = [place.view(part.shape) for place, part in zip(flat.split_with_sizes(sizes), parts, strict=True)]
        _copy(summed, parts)
        add_up(flat, group)
        stays = parts[0].dtype is dtype
        left = [torch.empty_like(part) for part in parts[stays:]]
        _copy(left, summed[stays:])
        summed[stays:] = left
    return [total for _, total in sorted(zip(order, summed, strict=True), key=operator.itemgetter(0))]


def _copy(to: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
    """Copies each to its place: on a GPU in one launch those of one dtype."""
    pairs: dict[tuple, tuple[list, list]] = {}
    for place, tensor in zip(to, tensors, strict=True):
        places, own = pairs.setdefault((place.dtype, tensor.dtype), ([], []))
        places.append(place)
        own.append(tensor)
    for places, own in pairs.values():
        torch._foreach_copy_(places, own)


class Sums(torch.autograd.Function):
    """``reduce`` of several tensors, in one collective."""

    @staticmethod
    def forward(ctx, group, *tensors):
        ctx.group = group
        return tuple(sums([tensor.clone() for tensor in tensors], group))

    @staticmethod
    def backward(ctx, *gradients):
        return None, *gradients


class _TotalNorm(torch.autograd.Function):
    """``sqrt`` of the sum of the squares of what the ranks have; zeros, infinities and NaNs are constants."""

    @staticmethod
    def forward(ctx, norm, group):
        total = add_up(norm.double().square(), group).sqrt().to(norm.dtype)
        ctx.save_for_backward(norm, total)
        ctx.group = group
        return total

    @staticmethod
    def backward(ctx, d_total):
        norm, total = ctx.saved_tensors
        constant = (total == 0) | ~total.isfinite()
        share = torch.where(constant, 0.0, norm / torch.where(constant, 1.0, total))
        return share * move(d_total, "reduce", 0, ctx.group), None


def total_norm(norm: Tensor, group: Group) -> Tensor:
    """The norm of rows of which each rank has the norm of some columns; summed in float64. Differentiable."""
    return _TotalNorm.apply(norm, group)


def total_norms(norms: Sequence[Tensor], group: Group) -> list[Tensor]:
    """:func:`total_norm` of several, in one collective, without gradients."""
    squares = sums([norm.double().square() for norm in norms], group)
    return [square.sqrt().to(norm.dtype) for square, norm in zip(squares, norms, strict=True)]
