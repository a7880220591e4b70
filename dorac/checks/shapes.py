"""The checker: tensors against layouts, lines of named dimensions, from which the sentences of errors are made.

A layout is what a shape looks like: ``"out in"``, or ``"* in"`` with any number of dimensions in the place of ``*``.
``"r+ in"`` has an r of at least 1; ``"out?"`` may be None. What follows a ``|`` ends the sentence of an error.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dorac.dense import PLAIN, not_dense
from dorac.numerics import FLOAT_DTYPES
from dorac.packed import Packed

_DTYPE_NAMES = "float64, float32, bfloat16 or float16"


class Layout(NamedTuple):
    """A line, taken apart."""

    written: str  # as errors write it
    ndim: int  # of tensors; at least, if it is open
    is_open: bool
    places: tuple[tuple[int, str, int], ...]  # of each named dimension its place, its name and its least size
    is_optional: bool
    end: str


def layouts(**lines: str) -> dict[str, Layout]:
    """The layout of each tensor, by its name."""
    return {name: _layout(line) for name, line in lines.items()}


def _layout(line: str) -> Layout:
    dims, _, end = line.partition(" | ")
    names = dims.removesuffix("?").split()
    star = names.index("*") if "*" in names else len(names)
    places = [(i if i < star else i - len(names), name) for i, name in enumerate(names) if name != "*"]
    return Layout(
        f"[{', '.join(names).replace('+', '')}]",
        len(places),
        "*" in names,
        tuple((place, name.removesuffix("+"), int(name.endswith("+"))) for place, name in places),
        dims.endswith("?"),
        end or ", got shape",
    )


def check_dense(name: str, tensor: Tensor, kind: str = "a tensor") -> None:
    """A tensor that is what it looks like."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be {kind}, got {type(tensor).__name__}")
    if reason := not_dense(tensor):
        raise TypeError(f"{name} must be a dense tensor, but it {reason}")


def check_float(name: str, tensor: Tensor) -> None:
    """A dense float tensor."""
    if type(tensor) not in PLAIN or tensor.layout is not torch.strided or tensor.is_nested:
        check_dense(name, tensor)
    if tensor.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name} must be {_DTYPE_NAMES}, got {tensor.dtype}; dequantise it first if it is quantised")


def are_usual(first: Tensor, *others: Tensor | None) -> bool:
    """Whether these, as far as there are any, are plain dense tensors of float dtypes on one device."""
    for tensor in (first, *others):
        if tensor is not None and not (
            type(tensor) in PLAIN
            and tensor.dtype in FLOAT_DTYPES
            and tensor.layout is torch.strided
            and not tensor.is_nested
            and tensor.device == first.device
        ):
            return False
    return True


def check_index(name: str, tensor: Tensor) -> None:
    """A dense tensor of indices."""
    check_dense(name, tensor)
    if tensor.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"{name} must be int64 or int32, got {tensor.dtype}")


def check_device(name: str, tensor: Tensor, like: Tensor | Packed, like_name: str = "weight") -> None:
    """The device of another one."""
    if tensor.device != like.device:
        raise ValueError(f"{name} must be on {like.device} like {like_name}, got {tensor.device}")


def fit(
    layouts: dict[str, Layout],
    sizes: dict[str, int],
    like: Tensor | Packed,
    like_name: str = "weight",
    kind: Callable[[str, Tensor], None] = check_float,
    /,
    **tensors: Tensor | None,
) -> None:
    """Tensors of one kind, on the device of ``like``, laid out as ``layouts`` say.

    ``sizes``: of the dimensions by name; a name that it lacks has the size that the first tensor has there, and is
    added.
    """
    for name, tensor in tensors.items():
        layout = layouts[name]
        if tensor is None and layout.is_optional:
            continue
        kind(name, tensor)
        shape, found = tensor.shape, {}
        fits = tensor.ndim >= layout.ndim if layout.is_open else tensor.ndim == layout.ndim
        for place, dim, least in layout.places if fits else ():
            if dim not in sizes:
                found[dim] = shape[place]
                fits = fits and (not least or shape[place] >= least)
            elif shape[place] != sizes[dim]:
                fits = False
        if not fits:
            raise ValueError(f"{name} must be {expected(layout, sizes)}{layout.end} {list(shape)}")
        if tensor.device != like.device:
            check_device(name, tensor, like, like_name)
        if found:
            sizes.update(found)


def expected(layout: Layout, sizes: dict[str, int]) -> str:
    """The layout with the sizes that are known: ``[out, r] = [5, 3]``, ``[*, in] with in = 6``."""
    dims = [dim for _, dim, _ in layout.places]
    known = [dim for dim in dims if dim in sizes]
    if len(known) == len(dims) and not layout.is_open:
        return f"{layout.written} = {[sizes[dim] for dim in dims]}"
    named = " and ".join([f"{dim} = {sizes[dim]}" for dim in known])
    return f"{layout.written} with {named}" if known else layout.written
