"""The ``dorac`` operator library, and the one way in which each kind of op is registered.

Registering returns what is to be called in place of the op: in eager, where nothing observes ops (no mode, no
transform, no tracer), that is the body itself, since each dispatch costs as much as a launch.
"""

import hashlib
from collections.abc import Callable
from importlib import resources

import torch

from dorac.dense import PLAIN
from dorac.ops import front

lib = torch.library.Library("dorac", "DEF")

CUDA_BODIES: dict[str, Callable] = {}  # what each leaf op runs on CUDA tensors
# What the compiler generates code from instead of a call of the leaf op, see ``ops/inductor.py``.
inlined: dict[torch._ops.OpOverload, Callable] = {}


def key_caches() -> None:
    """Keys the compiler's caches on disk by the sources that ops and kernels are compiled from.

    They know a graph by its ops' names, which stay the same when what is generated for the ops changes. A tag that
    is set later replaces this one.
    """
    digest = hashlib.sha256()
    package = resources.files("dorac")
    for folder in (package / "ops", package / "kernels"):
        for file in sorted(folder.iterdir(), key=lambda entry: entry.name):
            if file.is_file():
                digest.update(file.read_bytes())
    digest.update((package / "numerics.py").read_bytes())
    config, tag = torch.compiler.config, f"dorac:{digest.hexdigest()}"
    if tag not in config.cache_key_tag:
        config.cache_key_tag += tag


def register_composite(schema: str, body: Callable) -> Callable:
    """Defines a public op whose Python ``body`` is its implementation for autograd, every backend and vmap.

    Returns what to call it by.
    """
    lib.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    name = schema.partition("(")[0]
    lib.impl(name, body, "CompositeImplicitAutograd")
    lib.impl(name, body, "FuncTorchBatchedDecomposition")
    op = getattr(torch.ops.dorac, name)

    def call(*args):
        if front.unobserved() and _all_plain(args):
            return body(*args)
        return op(*args)

    return call


def _all_plain(args: tuple) -> bool:
    """Whether no argument is of a subclass of tensors, which sees ops."""
    return all(type(a) in PLAIN or not isinstance(a, torch.Tensor) for a in args)


def on_gpu(tensor: torch.Tensor) -> bool:
    return tensor.is_cuda


def register_leaf(name: str, aten: Callable, cuda: Callable, *, inline: bool = False) -> Callable:
    """Implements a leaf op: ``cuda`` on CUDA tensors for which there are kernels, ``aten`` everywhere else.

    Results are contiguous whatever the strides of the arguments, as the op's fake says. ``inline``: ``cuda`` is
    allocations and launches of Triton kernels, which the compiler takes over into its own code. Returns what to call
    the op by.
    """

    def in_aten(*args):
        result = aten(*args)
        return tuple(t.contiguous() for t in result) if isinstance(result, tuple) else result.contiguous()

    def on_cuda(*args):
        tensors = (a for a in args if isinstance(a, torch.Tensor))
        return (cuda if front.has_kernels(*tensors) else in_aten)(*args)

    CUDA_BODIES[name] = on_cuda
    if inline:
        inlined[getattr(torch.ops.dorac, name).default] = cuda
    lib.impl(name, in_aten, "CompositeExplicitAutograd")
    lib.impl(name, on_cuda, "CUDA")
    op = getattr(torch.ops.dorac, name)

    def call(*args):
        if front.unobserved() and _all_plain(args):
            return (on_cuda if on_gpu(args[0]) else in_aten)(*args)
        return op(*args)

    return call
