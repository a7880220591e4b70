"""What a compiled layer makes of its parameters alone: g, and under autocast its factors in the products' dtype.

Each is a pass over kilobytes whose price is its launch. As ops of their own those of all layers of a graph go into one
launch, and so do the factors' gradients on their way back to the parameters' dtype: see ``ops/inductor.py``.
"""

from collections.abc import Container

import torch
from torch import Tensor, fx

from dorac.numerics import accumulate_dtype
from dorac.ops import front
from dorac.ops.compose import magnitude_scale
from dorac.ops.library import lib, register_leaf

lib.define("mag_scale(Tensor magnitude, Tensor weight_norm) -> Tensor")
lib.define("cast(Tensor tensor, ScalarType dtype) -> Tensor")
lib.define("flat(Tensor[] tensors, ScalarType dtype) -> Tensor")


@torch.library.register_fake("dorac::mag_scale", lib=lib)
def _mag_scale_fake(magnitude, weight_norm):
    return magnitude.new_empty(magnitude.shape, dtype=accumulate_dtype(magnitude, weight_norm))


@torch.library.register_fake("dorac::cast", lib=lib)
def _cast_fake(tensor, dtype):
    return torch.empty_like(tensor, dtype=dtype)


@torch.library.register_fake("dorac::flat", lib=lib)
def _flat_fake(tensors, dtype):
    return tensors[0].new_empty(sum(tensor.numel() for tensor in tensors), dtype=dtype)


def copy(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A copy in the dtype, which may be the tensor's own, in its strides."""
    return tensor.to(dtype, copy=True)


# ``g = m / n`` as :func:`magnitude_scale`, but no gradient; in generated code a buffer. Inlined into what uses y, the
# division runs for every element of y, and on an H100 it can take longer than the traffic of the fused kernel.
mag_scale = register_leaf("mag_scale", magnitude_scale, magnitude_scale)
lib.impl("cast", copy, "CompositeExplicitAutograd")
copied = torch.ops.dorac.cast


def _flat(tensors, dtype):
    return torch.cat([tensor.reshape(-1).to(dtype) for tensor in tensors])


# All elements one after the other; in generated code one launch, where that of ``cat`` is one a tensor beyond a few.
lib.impl("flat", _flat, "CompositeExplicitAutograd")
flat = torch.ops.dorac.flat


def late(graph: fx.Graph) -> None:
    """Puts each pass over an input of the graph before its first reader, with the views of it that lie between.

    The compiler orders inference by locality, which leaves all of them at the front: the GPU would wait until all their
    results are allocated, and hold them until the last layer.
    """
    written = {read for node in graph.nodes if _is_in_place(node) for read in node.all_input_nodes}
    for node in reversed([*graph.nodes]):
        first = min(node.users, default=None)  # by where they are now
        if first is not None and first.op != "output" and _reads_inputs_alone(node, written):
            first.prepend(node)


def _is_in_place(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def _reads_inputs_alone(node: fx.Node, written: Container[fx.Node]) -> bool:
    """Whether the node is a pass over inputs of the graph that nothing in it writes to, or a view of one."""
    if node.target in (torch.ops.dorac.mag_scale.default, torch.ops.dorac.cast.default):
        return all(read.op == "placeholder" and read not in written for read in node.all_input_nodes)
    is_view = isinstance(node.target, torch._ops.OpOverload) and node.target.is_view
    return is_view and all(_reads_inputs_alone(read, written) for read in node.all_input_nodes)


def cast(factor: Tensor, dtype: torch.dtype) -> Tensor:
    """``factor.to(dtype)``, by the op where it is traced for a GPU."""
    traced = front.all_plain(factor) and not front.all_eager(factor) and front.has_kernels(factor)
    if factor.dtype is dtype or not traced or front.under_transform() or front.exporting():
        return factor.to(dtype)
    return _Cast.apply(factor, dtype)


class _Cast(torch.autograd.Function):
    @staticmethod
    def forward(ctx, factor, dtype):
        ctx.dtype = factor.dtype
        return copied(factor, dtype)

    @staticmethod
    def backward(ctx, gradient):
        if torch.is_grad_enabled() or front.under_transform():  # the op can be neither differentiated nor batched
            return gradient.to(ctx.dtype), None
        return copied(gradient, ctx.dtype), None
