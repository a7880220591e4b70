"""Launching a Triton kernel at a few microseconds of Python."""

import functools

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

Argument = Tensor | TensorDescriptor | int | None


class Launcher:
    """Calls a Triton kernel, and remembers what it was compiled to.

    ``kernel[grid](...)`` binds, specialises and looks up its arguments anew each time, which takes the CPU several
    times as long as the launch. Here the key is what Triton specialises on and no more: the device, every constant, a
    tensor's dtype and 16-byte alignment, an integer's being 1, a multiple of 16 or wider than 32 bits, a descriptor's
    dtype and block.
    """

    def __init__(self, kernel: triton.JITFunction) -> None:
        self.kernel = kernel
        self.compiled: dict[tuple, object] = {}

    def __call__(self, grid: tuple[int, int, int], *arguments: Argument, warps: int, **constants) -> None:
        """``arguments`` and ``constants`` in the order of the kernel's signature, the first of them a matrix."""
        first = arguments[0]
        device = (first.base if isinstance(first, TensorDescriptor) else first).device
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):  # a kernel runs on the current device, whatever its pointers say
                return self(grid, *arguments, warps=warps, **constants)
        kinds, integers = [], []
        for argument in arguments:
            if argument is None:
                kinds.append(None)
            elif isinstance(argument, int):
                integers.append(argument)
            elif isinstance(argument, TensorDescriptor):
                kinds += argument.base.dtype, *argument.block_shape
            else:
                kinds += argument.dtype, argument.data_ptr() % 16 == 0
        key = (device.index, warps, *constants.values(), *kinds, _integer_kinds(tuple(integers)))
        compiled = self.compiled.get(key)
        if compiled is None:
            assert [*constants] == self.kernel.arg_names[len(arguments) :], "constants out of order"
            compiled = self.kernel[grid](*arguments, **constants, num_warps=warps)
            if compiled is not None:  # None is what the interpreter returns
                self.compiled[key] = compiled
        else:
            compiled[grid](*arguments, *constants.values())


@functools.lru_cache(maxsize=4096)
def _integer_kinds(integers: tuple[int, ...]) -> tuple[tuple[bool, bool, bool], ...]:
    """What Triton specialises on of sizes and strides, which are the same in every call of a layer."""
    return tuple((i == 1, i % 16 == 0, -(2**31) <= i < 2**31) for i in integers)


def cdiv(numerator: int, denominator: int) -> int:
    """The quotient rounded up; ``triton.cdiv`` serves kernels too, for which it takes two microseconds."""
    return -(-numerator // denominator)


def contiguous(*vectors: Tensor | None) -> list[Tensor | None]:
    """Copies of strided vectors, which the kernels index without strides; what is contiguous already stays itself."""
    return [None if vector is None else vector.contiguous() for vector in vectors]
