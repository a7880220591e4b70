"""The kernels replaced by nothing: what the routes of a GPU cost the CPU can be worked on where there is no GPU."""

import contextlib
import types
from collections.abc import Iterator
from unittest import mock

import torch
from torch import Tensor

from dorac.kernels import (
    backward,
    compose,
    faint,
    lora_b,
    mixed,
    mlp,
    mlp_backward,
    norm,
    packed_dense,
    packed_norm,
    segments,
    stack_norm,
    target,
)
from dorac.kernels.launch import Launch
from dorac.ops import eager, front, library

_LAUNCHERS = (
    backward,
    compose,
    faint,
    lora_b,
    mixed,
    mlp,
    mlp_backward,
    norm,
    packed_dense,
    packed_norm,
    segments,
    stack_norm,
)


@contextlib.contextmanager
def stubbed_kernels() -> Iterator[None]:
    """CPU tensors take the routes of CUDA tensors, and the launches at their end do nothing.

    Checks, routes, allocations, autograd, dispatcher and launch keys run as on a GPU; what a kernel would have written
    stays as the memory was. Needs triton. Empties the compiler's cache before and after.
    """
    _forget()
    try:
        with contextlib.ExitStack() as stack:
            leaves = stack.enter_context(torch.library._scoped_library("dorac", "IMPL"))
            for name, body in library.CUDA_BODIES.items():
                leaves.impl(name, body, "CPU")
            for owner, name, stub in (
                (front, "has_kernels", _has_kernels),
                (library, "on_gpu", lambda tensor: True),
                (Launch, "_compile", lambda *arguments: _NOTHING),
                (torch._C, "_cuda_getCurrentRawStream", lambda device: 0),
                (torch._C, "_cuda_getDevice", lambda: None),
            ):
                stack.enter_context(mock.patch.object(owner, name, stub, create=True))
            yield
    finally:
        _forget()


def _forget() -> None:
    """Drops what was compiled, and what was prepared for a launch."""
    torch._dynamo.reset()
    eager.forget_plans()
    Launch.known.clear()
    for module in _LAUNCHERS:
        for value in vars(module).values():
            if hasattr(value, "cache_clear"):
                value.cache_clear()


def _has_kernels(*tensors: Tensor | None) -> bool:
    """:func:`front.has_kernels` for the CPU, with as many questions."""
    return all(t is None or (t.is_cpu and t.dtype is not torch.float64 and _known(t.device)) for t in tensors)


def _known(device: torch.device) -> bool:
    return not target.is_given() or target.of_device(device) is not None


# Stands for a ``triton.compiler.CompiledKernel``.
_NOTHING = types.SimpleNamespace(run=lambda *arguments: None, function=None, packed_metadata=None)
