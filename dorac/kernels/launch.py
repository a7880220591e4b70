"""Launching a Triton kernel at a few microseconds of Python."""

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
        key = (device.index, warps, *constants.values(), *map(_specialisation, arguments))
        compiled = self.compiled.get(key)
        if compiled is None:
            assert [*constants] == self.kernel.arg_names[len(arguments) :], "constants out of order"
            compiled = self.kernel[grid](*arguments, **constants, num_warps=warps)
            if compiled is not None:  # None is what the interpreter returns
                self.compiled[key] = compiled
        else:
            compiled[grid](*arguments, *constants.values())


def _specialisation(argument: Argument) -> object:
    if isinstance(argument, int):
        return argument == 1, argument % 16 == 0, -(2**31) <= argument < 2**31
    if isinstance(argument, TensorDescriptor):
        return argument.base.dtype, *argument.block_shape
    return None if argument is None else (argument.dtype, argument.data_ptr() % 16 == 0)


def contiguous(*vectors: Tensor | None) -> list[Tensor | None]:
    """Copies of strided vectors, which the kernels index without strides; what is contiguous already stays itself."""
    return [None if vector is None else vector.contiguous() for vector in vectors]
