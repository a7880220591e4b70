"""The ``dorac`` operator library, and the one way in which each kind of op is registered.

Registering returns what is to be called in place of the op: in eager, where nobody looks on (no mode that sees ops, no
transform, no tracer), that is the body itself, since each way through the dispatcher costs as much as a launch.
"""

import hashlib
from collections.abc import Callable
from importlib import resources

import torch

from dorac.ops import front

lib = torch.library.Library("dorac", "DEF")

CUDA_BODIES: dict[str, Callable] = {}  # what each leaf op runs on CUDA tensors


def _digest() -> int:
    """Of all code that an op's body may decompose to."""
    digest = hashlib.blake2s(digest_size=4)
    package = resources.files("dorac")
    for folder in (package / "ops", package / "kernels"):
        for file in sorted(folder.iterdir(), key=lambda entry: entry.name):
            if file.is_file():
                digest.update(file.read_bytes())
    digest.update((package / "numerics.py").read_bytes())
    return int.from_bytes(digest.digest(), "big")


# An argument of every public op. The compiler's caches on disk know a graph by its ops and their arguments, and would
# go on running an old decomposition.
REVISION = _digest()


def register_composite(schema: str, body: Callable) -> Callable:
    """Defines a public op whose Python ``body`` is its implementation for autograd, every backend and vmap.

    The op has an argument more than the ``schema``, :data:`REVISION`. Returns what to call it by.
    """
    name, _, arguments = schema.partition("(")
    arguments, _, results = arguments.partition(")")
    lib.define(f"{name}({arguments}, *, int revision=0){results}", tags=(torch.Tag.pt2_compliant_tag,))

    def implementation(*args, revision=0):
        return body(*args)

    lib.impl(name, implementation, "CompositeImplicitAutograd")
    lib.impl(name, implementation, "FuncTorchBatchedDecomposition")
    op = getattr(torch.ops.dorac, name)

    def call(*args):
        if not torch.compiler.is_compiling() and front.unobserved():
            return body(*args)
        return op(*args, revision=REVISION)

    return call


def on_gpu(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda


def register_leaf(name: str, aten: Callable, cuda: Callable) -> Callable:
    """Implements a leaf op: ``cuda`` on CUDA tensors for which there are kernels, ``aten`` everywhere else.

    Results are contiguous whatever the strides of the arguments, as the op's fake says. Returns what to call it by.
    """

    def in_aten(*args):
        result = aten(*args)
        return tuple(t.contiguous() for t in result) if isinstance(result, tuple) else result.contiguous()

    def on_cuda(*args):
        tensors = (a for a in args if isinstance(a, torch.Tensor))
        return (cuda if front.has_kernels(*tensors) else in_aten)(*args)

    CUDA_BODIES[name] = on_cuda
    lib.impl(name, in_aten, "CompositeExplicitAutograd")
    lib.impl(name, on_cuda, "CUDA")
    op = getattr(torch.ops.dorac, name)

    def call(*args):
        if front.unobserved():
            return (on_cuda if on_gpu(args[0]) else in_aten)(*args)
        return op(*args)

    return call
