"""Launching a Triton kernel at a few microseconds of Python."""

from typing import NoReturn

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

Argument = Tensor | TensorDescriptor | float | None


class LaunchError(RuntimeError):
    """A kernel that the card does not take: too little shared memory or registers, an illegal size."""


class Launch:
    """How a kernel is launched on tensors of certain shapes and strides: all of its arguments but these tensors.

    ``kernel[grid](...)`` binds, specialises and looks up its arguments anew each time, which takes the CPU several
    times as long as the launch. Here integers and constants, which are the same in every call of a layer, are settled
    once: whoever makes a launch keeps it. What is left to look at is the rest of what Triton specialises on: the
    device, a tensor's dtype and 16-byte alignment, a descriptor's dtype and block.

    Args:
        grid: three sizes.
        integers: the kernel's arguments after the tensors, sizes and strides.
        warps: of a program.
        constants: the kernel's constants, in the order of its signature.
    """

    __slots__ = ("compiled", "constants", "grid", "integers", "kernel", "settled", "warps")

    def __init__(
        self,
        kernel: triton.JITFunction,
        grid: tuple[int, int, int],
        integers: tuple[int, ...],
        warps: int,
        **constants: object,
    ) -> None:
        assert [*constants] == kernel.arg_names[len(kernel.arg_names) - len(constants) :], "constants out of order"
        self.kernel, self.grid, self.integers, self.warps, self.constants = kernel, grid, integers, warps, constants
        self.settled = *integers, *constants.values()
        self.compiled: dict[tuple, triton.compiler.CompiledKernel] = {}

    def __call__(self, first: Tensor | TensorDescriptor, *others: Argument) -> None:
        """Launches on the device of the first, which has to be a matrix; a number is an argument by value."""
        device = (first.base if type(first) is TensorDescriptor else first).device
        if device.type == "cuda" and device.index != torch.cuda.current_device():
            with torch.cuda.device(device):  # a kernel runs on the current device, whatever its pointers say
                return self(first, *others)
        arguments, kinds, low = [], [device.index], 0
        for argument in (first, *others):
            if isinstance(argument, Tensor):
                pointer = argument.data_ptr()
                low |= pointer
                arguments.append(pointer)
                kinds.append(argument.dtype)
            else:
                arguments.append(argument)
                if isinstance(argument, TensorDescriptor):
                    kinds += argument.base.dtype, *argument.block_shape
                else:
                    kinds.append(type(argument))
        if low & 15:
            kinds += (type(argument) is int and argument % 16 == 0 for argument in arguments)
        compiled = self.compiled.get(tuple(kinds))
        try:
            if compiled is None or _hooked():
                compiled = self._compile(first, *others)
                if compiled is not None:  # None is what the interpreter returns
                    self.compiled[tuple(kinds)] = compiled
            else:
                self._run(compiled, device.index, arguments)
        except Exception as error:
            self._refuse(error, (first, *others))

    def _compile(self, *arguments: Argument) -> "triton.compiler.CompiledKernel | None":
        """Launches the ordinary way."""
        return self.kernel[self.grid](*arguments, *self.integers, **self.constants, num_warps=self.warps)

    def _run(self, compiled: "triton.compiler.CompiledKernel", device: int, arguments: list) -> None:
        """Launches what was compiled; pointers are given as integers, of which the launcher asks nothing."""
        stream = torch._C._cuda_getCurrentRawStream(device)
        compiled.run(
            *self.grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments, *self.settled
        )

    def _refuse(self, error: Exception, arguments: tuple[Argument, ...]) -> NoReturn:
        """Says which kernel it was, of what, and where."""
        tensors = [a.base if isinstance(a, TensorDescriptor) else a for a in arguments]
        shapes = [f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}" for t in tensors if isinstance(t, Tensor)]
        device = tensors[0].device
        card = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
        raise LaunchError(
            f"the kernel {self.kernel.__name__} cannot be launched on {card} over {', '.join(shapes)} with the grid "
            f"{self.grid}, {self.warps} warps and {self.constants}: {type(error).__name__}: {error}"
        ) from error


def _hooked() -> bool:
    """Whether a tool (a profiler of Triton's) is told of every launch, with its arguments as they are."""
    hooks = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return any(getattr(hook, "calls", hook) for hook in hooks)


def cdiv(numerator: int, denominator: int) -> int:
    """The quotient rounded up; ``triton.cdiv`` serves kernels too, for which it takes two microseconds."""
    return -(-numerator // denominator)


def contiguous(*vectors: Tensor | None) -> list[Tensor | None]:
    """Copies of strided vectors, which the kernels index without strides; what is contiguous already stays itself."""
    return [None if vector is None else vector.contiguous() for vector in vectors]
