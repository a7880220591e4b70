"""Launching a Triton kernel at a few microseconds of Python."""

import operator
from typing import ClassVar, NoReturn

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from triton import knobs
from triton.tools.tensor_descriptor import TensorDescriptor

Argument = Tensor | TensorDescriptor | float | None
ASSERTS = {"debug": True, "sanitize_overflow": False}  # Triton's options


class LaunchError(RuntimeError):
    """A kernel that the card does not take: too little shared memory or registers, an illegal size."""


class Launch:
    """How a kernel is launched on tensors of certain shapes and strides: all of its arguments but these tensors.

    ``kernel[grid](...)`` binds, specialises and looks up its arguments anew each time, which takes the CPU several
    times as long as the launch. Here integers and constants, which are the same in every call of a layer, are settled
    once: the caller keeps the launch. What is left to look at is the rest of what Triton specialises on: the
    device, a tensor's dtype and 16-byte alignment, a descriptor's dtype and block.

    Args:
        grid: three sizes.
        integers: the kernel's arguments after the tensors, sizes and strides.
        warps: of a program.
        asserts: the kernel's assertions hold on the device, too.
        constants: the kernel's constants, in the order of its signature.
    """

    __slots__ = ("asserts", "compiled", "constants", "grid", "integers", "kernel", "settled", "specialised", "warps")

    # What kernels were compiled to, for launches of other sizes: of an integer Triton specialises on no more than its
    # being 1, a multiple of 16 or wider than 32 bits.
    known: ClassVar[dict[tuple, "triton.compiler.CompiledKernel"]] = {}

    def __init__(
        self,
        kernel: triton.JITFunction,
        grid: tuple[int, int, int],
        integers: tuple[int, ...],
        warps: int,
        *,
        asserts: bool = False,
        **constants: object,
    ) -> None:
        assert [*constants] == kernel.arg_names[len(kernel.arg_names) - len(constants) :], "constants out of order"
        self.kernel, self.grid, self.integers, self.warps, self.constants = kernel, grid, integers, warps, constants
        self.asserts = asserts
        self.settled = *integers, *constants.values()
        of_integers = ((i == 1, i % 16 == 0, -(2**31) <= i < 2**31) for i in integers)
        self.specialised = kernel, warps, *constants.values(), *of_integers
        self.compiled: dict[tuple, triton.compiler.CompiledKernel] = {}

    def __call__(self, first: Tensor | TensorDescriptor, *others: Argument) -> "triton.compiler.CompiledKernel | None":
        """Launches on the device of the first, which has to be a matrix; a number is an argument by value.

        Returns what was launched. The interpreter compiles nothing; nor does this while the compiler traces the launch.
        """
        if traced(first):
            wrapped = torch.library.wrap_triton(self.kernel)
            wrapped[self.grid](first, *others, *self.integers, **self.constants, num_warps=self.warps)
            return None
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
        key = tuple(kinds)
        compiled = self.compiled.get(key)
        if compiled is None and (compiled := self.known.get((self.specialised, key))) is not None:
            self.compiled[key] = compiled
        try:
            if compiled is None or _hooked():
                compiled = self._compile(first, *others)
                if compiled is not None:  # None is what the interpreter returns
                    self.compiled[key] = self.known[self.specialised, key] = compiled
            else:
                self._run(compiled, device.index, arguments)
        except Exception as error:
            self.refuse(error, (first, *others))
        return compiled

    def _compile(self, *arguments: Argument) -> "triton.compiler.CompiledKernel | None":
        """Launches as Triton does."""
        options = {"num_warps": self.warps, **(ASSERTS if self.asserts and not knobs.runtime.interpret else {})}
        return self.kernel[self.grid](*arguments, *self.integers, **self.constants, **options)

    def _run(self, compiled: "triton.compiler.CompiledKernel", device: int, arguments: list) -> None:
        """Launches what was compiled; pointers are given as integers, which the launcher does not inspect."""
        stream = torch._C._cuda_getCurrentRawStream(device)
        compiled.run(
            *self.grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments, *self.settled
        )

    def refuse(self, error: Exception, arguments: tuple[Argument, ...]) -> NoReturn:
        """Raises the error with the kernel, its tensors and the device."""
        tensors = [a.base if isinstance(a, TensorDescriptor) else a for a in arguments]
        shapes = [f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}" for t in tensors if isinstance(t, Tensor)]
        device = tensors[0].device
        card = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
        raise LaunchError(
            f"the kernel {self.kernel.__name__} cannot be launched on {card} over {', '.join(shapes)} with the grid "
            f"{self.grid}, {self.warps} warps and {self.constants}: {type(error).__name__}: {error}"
        ) from error


class Bound:
    """A launch for tensors whose dtypes, device and alignment to 16 bytes are always those of its first call.

    Then only the addresses of the tensors are read.
    """

    __slots__ = ("_after", "_before", "_between", "_device", "_run", "launch")

    def __init__(self, launch: Launch) -> None:
        self.launch = launch
        self._run = None

    def __call__(self, first: Tensor, *others: Tensor | float | None) -> None:
        if self._run is None or self._device != torch._C._cuda_getDevice() or _hooked():
            self._bind(first, *others)
            return
        pointers = [a.data_ptr() if type(a) in _TENSORS else a for a in others]
        stream = torch._C._cuda_getCurrentRawStream(self._device)
        try:
            self._run(*self._before, stream, *self._between, first.data_ptr(), *pointers, *self._after)
        except Exception as error:
            self.launch.refuse(error, (first, *others))

    def _bind(self, *arguments: Tensor | float | None) -> None:
        compiled = self.launch(*arguments)
        if compiled is not None:
            self._device = arguments[0].device.index
            self._before = self.launch.grid
            self._between = compiled.function, compiled.packed_metadata, None, None, None
            self._after = self.launch.settled
            self._run = compiled.run


_TENSORS = (Tensor, torch.nn.Parameter)


def traced(tensor: Tensor | TensorDescriptor) -> bool:
    """Whether the compiler traces the launch (``ops/inductor.py``) and makes it itself."""
    return isinstance(tensor, FakeTensor)


def _hooked() -> bool:
    """Whether a tool (a profiler of Triton's) is told of every launch, with its arguments as they are."""
    runtime = knobs.runtime
    return bool(_calls(runtime.launch_enter_hook) or _calls(runtime.launch_exit_hook))


_calls = operator.attrgetter("calls")


def cdiv(numerator: int, denominator: int) -> int:
    """The quotient rounded up; ``triton.cdiv`` serves kernels too, for which it takes two microseconds."""
    return -(-numerator // denominator)


def contiguous(*vectors: Tensor | None) -> list[Tensor | None]:
    """Copies of strided vectors, which the kernels index without strides; what is contiguous already stays itself."""
    return [None if vector is None else vector.contiguous() for vector in vectors]
