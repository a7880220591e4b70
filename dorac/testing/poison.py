"""Fills with NaN what dorac allocates without a value, so that what reads unwritten memory fails in every test."""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

ALLOCATORS = (
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (torch, "empty_permuted"),
    (Tensor, "new_empty"),
    (Tensor, "new_empty_strided"),
)


def poison_of(dtype: torch.dtype) -> float | int | bool:
    """NaN, the largest integer, or True."""
    if dtype.is_floating_point or dtype.is_complex:
        return float("nan")
    return True if dtype is torch.bool else torch.iinfo(dtype).max


def _poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(allocate)
    def wrapper(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        if torch.compiler.is_compiling():  # first, so that Dynamo sees the allocation and nothing else
            return tensor
        caller = sys._getframe(1).f_globals.get("__name__", "")
        # No stand-in of the compiler, wrapper of a transform or tensor without memory.
        plain = type(tensor) is Tensor and tensor.device.type in ("cpu", "cuda")
        if caller.startswith("dorac.") and plain and torch._C._functorch.maybe_current_level() is None:
            with torch.no_grad():
                tensor.fill_(poison_of(tensor.dtype))
        return tensor

    return wrapper


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """While this lasts, dorac's own calls of ``torch.empty`` and its kind return no memory but poison."""
    with torch.device("cpu"):  # remembers torch.empty as it is, for every other `with torch.device(...)`
        torch.empty(())
    allocators = [(owner, name, getattr(owner, name)) for owner, name in ALLOCATORS]
    own = {name for owner, name, _ in allocators if name in vars(owner)}
    for owner, name, allocate in allocators:
        setattr(owner, name, _poisoned(allocate))
    try:
        yield
    finally:
        for owner, name, allocate in allocators:
            if name in own:
                setattr(owner, name, allocate)
            else:  # inherited from C
                delattr(owner, name)
