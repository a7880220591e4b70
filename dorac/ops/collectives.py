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
:func:`enter` unwraps a layer's parameters in one ``autograd.Function``: in backward the gradients of those that the
ranks hold are summed in one all-reduce. ``ops/eager_parts.py`` has the layer's own for both.
"""

import functools
import operator
import threading
import weakref
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only

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


def _sum(tensor: Tensor, group: Group) -> Tensor:
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
        return _sum(tensor, group)
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


def sums(tensors: Sequence[Tensor], group: Group) -> list[Tensor]:
    """The sums of several tensors over the ranks, in one collective, in the widest of their dtypes.

    A single one may be overwritten.
    """
    if len(tensors) < 2:
        return [_sum(tensor, group) for tensor in tensors]
    dtype = functools.reduce(torch.promote_types, [tensor.dtype for tensor in tensors])
    # The first stays where it is summed. The others leave: a DTensor of a tensor that begins within its storage cannot
    # be copied (deepcopy).
    order = sorted(range(len(tensors)), key=lambda i: (tensors[i].dtype is not dtype, -tensors[i].numel()))
    parts = [tensors[i] for i in order]
    sizes = [part.numel() for part in parts]
    if _functional(parts[0]):
        summed = _sum(torch.cat([part.reshape(-1) for part in parts]), group).split_with_sizes(sizes)
        summed = [total.view(part.shape) for total, part in zip(summed, parts, strict=True)]
        summed[1:] = [total.to(part.dtype, copy=True) for total, part in zip(summed[1:], parts[1:], strict=True)]
        summed[0] = summed[0].to(parts[0].dtype)
    else:
        flat = parts[0].new_empty(sum(sizes), dtype=dtype)
        summed = [place.view(part.shape) for place, part in zip(flat.split_with_sizes(sizes), parts, strict=True)]
        _copy(summed, parts)
        _sum(flat, group)
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


class _Sums(torch.autograd.Function):
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
        total = _sum(norm.double().square(), group).sqrt().to(norm.dtype)
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


class Entry:
    """DTensors on their way into a layer in eager, and their gradients on the way out.

    Args:
        due: of each parameter whether its gradient is; these are summed over the ranks in one collective.
        watched: DTensors that must not change until backward, with the parameters: autograd counts the writes to a
            DTensor in a version of its own, not in that of the part that the layer saves.
    """

    __slots__ = ("due", "group", "parameters", "versions", "watched")

    def __init__(
        self, group: Group, due: Sequence[bool], watched: Sequence[DTensor], parameters: Sequence[DTensor]
    ) -> None:
        self.group, self.due, self.parameters, self.watched = group, due, parameters, (*watched, *parameters)

    def parts(self) -> tuple[Tensor, ...]:
        """This rank's parts of the parameters, unseen by autograd; from now on these must not change."""
        try:
            self.versions = [*map(_version, self.watched)]
        except RuntimeError:  # of a tensor of inference mode, which has no version
            self.versions = [None if t.is_inference() else t._version for t in self.watched]
        return tuple([local(p).detach() for p in self.parameters])

    def check(self) -> None:
        """Raises RuntimeError if they have changed."""
        if None not in self.versions and [*map(_version, self.watched)] == self.versions:
            return
        for tensor, version in zip(self.watched, self.versions, strict=True):
            if version is not None and tensor._version != version:
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an inplace operation: "
                    f"a parameter {list(tensor.shape)} of a DoRA layer is at version {tensor._version}; expected "
                    f"{version}"
                )

    def leave(
        self, gradients: Sequence[Tensor | None], edges: Sequence[tuple], together: Tensor | None = None
    ) -> tuple[DTensor | None, ...]:
        """The gradients of the parts as those of the parameters.

        Args:
            edges: the ``next_functions`` of who calls this in its backward. The parameters are its last tensors that
                have any.
            together: what those that are due lie in, the first of them at its beginning.
        """
        gradients = [*gradients]
        due = [i for i, is_due in enumerate(self.due) if is_due and gradients[i] is not None]
        if together is not None:
            _sum(together, self.group)
            for i in due:
                gradients[i] = gradients[i].to(self.parameters[i].dtype, copy=i > due[0])
        elif due:
            summed = [gradients[i] for i in due]
            summed = _Sums.apply(self.group, *summed) if torch.is_grad_enabled() else sums(summed, self.group)
            for i, total in zip(due, summed, strict=True):
                gradients[i] = total
        return _left(gradients, self.parameters, edges)


_version = torch._C.TensorBase._version.__get__


class Enter(torch.autograd.Function):
    """``Enter.apply(entry, *entry.parameters)`` is ``entry.parts()`` as autograd sees them."""

    @staticmethod
    def forward(ctx, entry, *parameters):
        ctx.entry = entry
        ctx.set_materialize_grads(False)
        return entry.parts()

    @staticmethod
    def backward(ctx, *gradients):
        ctx.entry.check()
        needed = ctx.needs_input_grad[1:]
        gradients = [g if needs else None for g, needs in zip(gradients, needed, strict=True)]
        return None, *ctx.entry.leave(gradients, ctx.next_functions)


def enter(
    group: Group, due: Sequence[bool], watched: Sequence[DTensor], parameters: Sequence[DTensor]
) -> tuple[Tensor, ...]:
    """This rank's parts of the parameters, whose gradients come back in their layouts. See :class:`Entry`."""
    if torch.compiler.is_compiling():  # which knows how DTensors cross, and watches its inputs itself
        # The gradient is the same on all ranks by then, if they hold it.
        return summed_in_backward(group, due, [p.to_local() for p in parameters])
    return Enter.apply(Entry(group, due, watched, parameters), *parameters)


def summed_in_backward(group: Group, due: Sequence[bool], parts: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The parts; those whose gradients are due have them summed, together. For code that is traced."""
    parts = [*parts]
    summed = [i for i, is_due in enumerate(due) if is_due and parts[i].requires_grad]
    if summed:
        for i, part in zip(summed, _Traced.apply(group, *(parts[i] for i in summed)), strict=True):
            parts[i] = part
    return tuple(parts)


class _Lasting(torch.autograd.Function):
    """The parts as they are, time and again: it keeps nothing of a forward, so that its backward may run any often."""

    @staticmethod
    def forward(ctx, *parameters):
        ctx.parameters = parameters
        ctx.set_materialize_grads(False)
        return tuple([local(p).detach() for p in parameters])

    @staticmethod
    def backward(ctx, *gradients):
        return _left(gradients, ctx.parameters, ctx.next_functions)


def lasting(parameters: Sequence[DTensor]) -> tuple[Tensor, ...]:
    """This rank's parts of leaves, for every forward until others are in their place or hold their values.

    A graph that they are inputs of has no DTensor at its edge. They keep the leaves' nodes of autograd alive, so that
    torch refuses to swap the leaves: forget these first.
    """
    return _Lasting.apply(*parameters)


def _left(
    gradients: Sequence[Tensor | None], parameters: Sequence[DTensor], edges: Sequence[tuple]
) -> tuple[DTensor | None, ...]:
    """The gradients in the parameters' layouts and strides, for the engine; None of one that its leaf has already.

    A leaf without a gradient that nobody watches gets it here, as autograd's node of it would set it: that node asks
    the gradient for a ``detach()``, which costs a DTensor as much as a kernel's launch.
    """
    again = torch.is_grad_enabled()
    nodes = [node for node, _ in edges if node is not None]
    nodes = [*nodes[len(nodes) - len(parameters) :]] if len(nodes) >= len(parameters) else [None] * len(parameters)
    left = []
    for gradient, parameter, node in zip(gradients, parameters, nodes, strict=True):
        if gradient is not None:
            part = parameter._local_tensor
            if gradient.stride() != part.stride():
                gradient = torch.empty_like(part).copy_(gradient)
            if again:
                layout = {"shape": parameter.shape, "stride": parameter.stride()}
                mesh, placements = parameter.device_mesh, parameter.placements
                gradient = DTensor.from_local(gradient, mesh, placements, run_check=False, **layout)
            elif _is_unwatched(parameter, node, gradient):
                parameter.grad, gradient = _dtensor(gradient, parameter._spec), None
            else:
                gradient = _dtensor(gradient, parameter._spec, _Fresh)
        left.append(gradient)
    return tuple(left)


def _is_unwatched(parameter: DTensor, node: object, gradient: Tensor) -> bool:
    """Within backward: whether all that would become of the gradient is that of this leaf, which has none.

    Not so with hooks on the leaf, nor where ``torch.autograd.grad`` returns the gradient or ``inputs`` leaves it out;
    nor on a side stream, which the engine lets others wait for if it has seen the gradient there.
    """
    if (
        not parameter.is_leaf
        or parameter.grad is not None
        or parameter._backward_hooks
        or parameter._post_accumulate_grad_hooks
        or gradient.dtype is not parameter.dtype
        or (gradient.is_cuda and torch._C._cuda_getCurrentRawStream(gradient.device.index))
    ):
        return False
    try:
        return torch._C._will_engine_execute_node(node)
    except (RuntimeError, TypeError):  # torch.autograd.grad returns it; or this is not the engine's call
        return False


def _dtensor(part: Tensor, spec: object, kind: type[DTensor] = DTensor) -> DTensor:
    """``DTensor(...)`` without its ``__init__``, which does nothing at the price of as much again."""
    return DTensor.__new__(kind, part, spec, requires_grad=False)


class _Fresh(DTensor):
    """A gradient on its way to its leaf, which takes it by ``detach()`` and has a DTensor then.

    DTensors answer that by what they ask for every op, at several times the price. Any other op is a DTensor's; and in
    torch 2.11, which asks no subclass, that one, too.
    """

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is _detach:
            return _dtensor(args[0]._local_tensor, args[0]._spec)
        args, kwargs = tree_map_only(_Fresh, lambda t: _dtensor(t._local_tensor, t._spec), (args, kwargs or {}))
        return func(*args, **kwargs)


_detach = torch.ops.aten.detach.default


class _Traced(torch.autograd.Function):
    """The parts as they are; their gradients summed in one collective."""

    @staticmethod
    def forward(ctx, group, *parts):
        ctx.group = group
        return tuple(part.view_as(part) for part in parts)

    @staticmethod
    def backward(ctx, *gradients):
        return None, *sums(gradients, ctx.group)
