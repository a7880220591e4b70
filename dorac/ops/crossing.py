"""A layer's parameters, as local tensors within the layer and as DTensors for whoever trains them.

:func:`enter` unwraps them in one ``autograd.Function``: in backward the gradients of those that the ranks hold are
summed in one all-reduce. :func:`lasting` does it for compiled code, whose graphs no DTensor enters.
``ops/eager_parts.py`` has the layer's own for both.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_map_only

from dorac.ops.collectives import Group, Sums, add_up, local, sums
from dorac.ops.gradient_sums import gradient_sums


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

    def watch(self) -> None:
        """From now on they must not change."""
        try:
            self.versions = [*map(_version, self.watched)]
        except RuntimeError:  # of a tensor of inference mode, which has no version
            self.versions = [None if t.is_inference() else t._version for t in self.watched]

    def parts(self) -> tuple[Tensor, ...]:
        """This rank's parts of the parameters, as tensors that autograd has not seen; :meth:`watch` them."""
        self.watch()
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
            add_up(together, self.group)
            for i in due:
                part, dtype = gradients[i], self.parameters[i].dtype
                if part.dtype is not dtype:
                    gradients[i] = part.to(dtype)
                elif i != due[0]:
                    gradients[i] = part.clone()
        elif due:
            summed = [gradients[i] for i in due]
            summed = Sums.apply(self.group, *summed) if torch.is_grad_enabled() else sums(summed, self.group)
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


def are_on(mesh: DeviceMesh, tensors: Sequence[Tensor]) -> bool:
    """Whether these are DTensors on this mesh and no other one (as FSDP2's)."""
    return all(isinstance(t, DTensor) and t.device_mesh == mesh for t in tensors)


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
    if summed and group.size() > 1:
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

    Leaves without gradients that nobody watches get them here, as autograd's nodes of them would set them: such a node
    asks the gradient for a ``detach()``, which costs a DTensor as much as a kernel's launch.
    """
    again = torch.is_grad_enabled()
    unwatched, left = not again and _are_unwatched(parameters, edges), []
    for gradient, parameter in zip(gradients, parameters, strict=True):
        if gradient is not None:
            part = parameter._local_tensor
            if gradient.stride() != part.stride():
                gradient = torch.empty_like(part).copy_(gradient)
            if again:
                layout = {"shape": parameter.shape, "stride": parameter.stride()}
                mesh, placements = parameter.device_mesh, parameter.placements
                gradient = DTensor.from_local(gradient, mesh, placements, run_check=False, **layout)
            elif unwatched and parameter.grad is None and gradient.dtype is part.dtype:
                parameter.grad, gradient = _dtensor(gradient, parameter._spec), None
            else:
                gradient = _dtensor(gradient, parameter._spec, _Fresh)
        left.append(gradient)
    return tuple(left)


def _are_unwatched(parameters: Sequence[DTensor], edges: Sequence[tuple]) -> bool:
    """Within backward: whether all that would become of the gradients is those of these, which are leaves.

    Not so with hooks on a leaf, nor where ``torch.autograd.grad`` returns a gradient or ``inputs`` leaves one out; nor
    on a side stream, which the engine lets others wait for if it has seen the gradients there.
    """
    for parameter in parameters:
        if not parameter.is_leaf or parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            return False
    part = parameters[0]._local_tensor
    if part.is_cuda and torch._C._cuda_getCurrentRawStream(part.device.index):
        return False
    nodes = [node for node, _ in edges if node is not None]
    if len(nodes) < len(parameters):  # some are not trained
        return False
    try:
        return all(map(torch._C._will_engine_execute_node, nodes[len(nodes) - len(parameters) :]))
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
        return None, *gradient_sums(gradients, ctx.group)
