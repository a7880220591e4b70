"""The ``dorac`` operator library, and the one way in which each kind of op is registered."""

from collections.abc import Callable

import torch

from dorac.ops import front

lib = torch.library.Library("dorac", "DEF")

# An argument of every public op, to be raised with every change of what an op's body decomposes to: the compiler's
# caches on disk know a graph by its ops and their arguments, and would go on running the old decomposition.
REVISION = 9


def register_composite(schema: str, body: Callable) -> None:
    """Defines a public op whose Python ``body`` is its implementation for autograd, every backend and vmap."""
    lib.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    name = schema.partition("(")[0]
    lib.impl(name, body, "CompositeImplicitAutograd")
    lib.impl(name, body, "FuncTorchBatchedDecomposition")


def register_leaf(name: str, aten: Callable, cuda: Callable) -> None:
    """Implements a leaf op: ``cuda`` on CUDA tensors for which there are kernels, ``aten`` everywhere else.

    Results are contiguous whatever the strides of the arguments, as the op's fake says.
    """

    def in_aten(*args):
        result = aten(*args)
        return tuple(t.contiguous() for t in result) if isinstance(result, tuple) else result.contiguous()

    def on_cuda(*args):
        tensors = (a for a in args if isinstance(a, torch.Tensor))
        return (cuda if front.has_kernels(*tensors) else in_aten)(*args)

    lib.impl(name, in_aten, "CompositeExplicitAutograd")
    lib.impl(name, on_cuda, "CUDA")
