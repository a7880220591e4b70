"""Triton's compiler, asked for a launch on a card that need not be there: see ``offline.py``."""

import dataclasses
import re
import subprocess
import tempfile
from collections.abc import Sequence

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dorac.kernels.launch import ASSERTS, Launch
from dorac.kernels.target import Target

# A tensor's dtype, a descriptor's dtype and block, a number, or None.
Argument = torch.dtype | tuple[torch.dtype, tuple[int, int]] | float | None

NAMES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.float8_e4m3fn: "fp8e4nv",
}
HALF, FULL = torch.bfloat16, torch.float32


@dataclasses.dataclass(frozen=True)
class Usage:
    """Of a program: bytes of shared memory, registers of a thread, bytes (on AMD's cards registers) that it spills."""

    shared: int
    registers: int
    spills: int


def compile_launch(launch: Launch, arguments: Sequence[Argument], target: Target) -> Usage:
    """What the program of :func:`compile_kernel` takes."""
    compiled = compile_kernel(launch, arguments, target)
    if target.backend == "hip":
        found = dict(re.findall(r"\.(vgpr_count|vgpr_spill_count):\s+(\d+)", compiled.asm["amdgcn"]))
        return Usage(compiled.metadata.shared, int(found["vgpr_count"]), int(found["vgpr_spill_count"]))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{key}:(\d+)", text)[1]) for key in ("REG", "STACK"))
    return Usage(compiled.metadata.shared, registers, stack)


def compile_kernel(launch: Launch, arguments: Sequence[Argument], target: Target) -> triton.compiler.CompiledKernel:
    """Compiles the launch for aligned tensors.

    Raises:
        RuntimeError: what Triton's compiler raises is one.
    """
    names = launch.kernel.arg_names
    signature, constants, attributes = {}, {}, {}
    for i, (name, argument) in enumerate(zip(names, (*arguments, *launch.settled), strict=True)):
        divisible = isinstance(argument, torch.dtype) or (type(argument) is int and argument % 16 == 0)
        if name in launch.constants or argument is None or (type(argument) is int and argument == 1):
            signature[name], constants[(i,)] = "constexpr", argument
            continue
        if isinstance(argument, torch.dtype):
            signature[name] = f"*{NAMES[argument]}"
        elif isinstance(argument, tuple):
            dtype, block = argument
            signature[name] = f"tensordesc<{NAMES[dtype]}{[*block]}>"
        elif isinstance(argument, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if -(2**31) <= argument < 2**31 else "i64"
        if divisible:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return triton.compile(
        ASTSource(launch.kernel, signature, constants, attributes),
        target=GPUTarget(target.backend, target.capability, target.warp_size),
        options={"num_warps": launch.warps, **(ASSERTS if launch.asserts else {})},
    )
