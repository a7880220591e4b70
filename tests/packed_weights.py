"""Packed weights of every format, made from random numbers, and what they stand for by the format's definition.

The second is written element by element in NumPy, apart from ``dorac/packed``; ``test_packed_libraries.py`` holds both
to the libraries themselves.
"""

import functools

import numpy as np
import torch

from dorac import packed
from dorac.testing.quantised_layers import NF4

FP4 = [s * v / 12 for s in (1, -1) for v in (0, 0.0625, 8, 12, 4, 6, 2, 3)]


def _generator(seed):
    return np.random.default_rng(seed)


def _rounded(values, dtype):
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).to(dtype)


def _tensors(*arrays):
    return [None if a is None else torch.from_numpy(np.ascontiguousarray(a)) for a in arrays]


def bnb_4bit(shape, dtype=torch.bfloat16, *, table=NF4, nested=False, blocksize=64, seed=0):
    """The value, and the dense weight in ``dtype``."""
    rng, numel = _generator(seed), shape[0] * shape[1]
    table = np.asarray(table, dtype=np.float32)
    numbers = rng.integers(0, 16, numel, dtype=np.uint8)
    blocks = -(-numel // blocksize)
    if nested:
        code = np.sort(rng.uniform(-1, 1, 256)).astype(np.float32)
        absmax, group = rng.integers(0, 256, blocks, dtype=np.uint8), 4
        of_groups = rng.uniform(0.5, 1.5, -(-blocks // group)).astype(np.float32)
        offset = np.float32(2.5)
        scales = code[absmax] * of_groups[np.arange(blocks) // group] + offset
    else:
        code = of_groups = offset = None
        group, absmax = 0, rng.uniform(0.5, 3, blocks).astype(np.float32)
        scales = absmax
    values = table[numbers] * scales[np.arange(numel) // blocksize]
    even = np.append(numbers, np.zeros(numel % 2, dtype=np.uint8))
    codes, absmax, table, code, of_groups = _tensors(
        (even[::2] * 16 + even[1::2])[:, None], absmax, table, code, of_groups
    )
    offset = None if offset is None else torch.tensor(offset)
    value = packed.Bnb4bit(codes, absmax, table, code, of_groups, offset, shape, dtype, blocksize, group)
    return value, _rounded(values.reshape(shape), dtype)


def bnb_4bit_cpu(shape, dtype=torch.float32, *, seed=0):
    shape, blocksize = (-(-shape[0] // 32) * 32, -(-shape[1] // 64) * 64), 64
    rng = _generator(seed)
    numbers = rng.integers(0, 16, shape, dtype=np.uint8)
    codes = np.zeros(shape[0] * shape[1] // 2, dtype=np.uint8)
    for row in range(shape[0]):
        for column in range(shape[1]):  # 64 numbers: of 32 rows, two columns; the last 32 of them in the high halves
            place = ((row // 32) * (shape[1] // 2) + column // 2) * 64 + (row % 32) * 2 + column % 2
            byte, high = place // 64 * 32 + place % 32, place % 64 // 32
            codes[byte] |= numbers[row, column] << (4 * high)
    absmax = torch.from_numpy(rng.uniform(0.5, 3, (shape[1] // blocksize, shape[0]))).to(torch.bfloat16)
    table = torch.tensor(NF4)
    value = packed.Bnb4bitCpu(
        torch.from_numpy(codes.reshape(shape[0], -1)), absmax, table, shape, torch.float32, blocksize
    )
    rounded = table.to(torch.bfloat16).float().numpy()
    scales = absmax.float().numpy().T[:, np.arange(shape[1]) // blocksize]
    return value, _rounded(rounded[numbers] * scales, torch.float32)


def bnb_int8(shape, dtype=torch.float32, *, seed=0):
    rng = _generator(seed)
    codes = rng.integers(-127, 128, shape, dtype=np.int8)
    scale = rng.uniform(0.5, 3, shape[0]).astype(np.float32)
    value = packed.BnbInt8(*_tensors(codes, scale), shape, torch.float32)
    return value, _rounded(codes * scale[:, None].astype(np.float64) / 127, torch.float32)


def scaled_8bit(shape, dtype=torch.float32, *, numbers=torch.int8, block=None, zero=False, seed=0):
    """``block``: of a scale, rows and columns; None: one row."""
    rng = _generator(seed)
    block_rows, block_columns = block or (1, shape[1])
    grid = -(-shape[0] // block_rows), -(-shape[1] // block_columns)
    scale = rng.uniform(0.5, 3, grid).astype(np.float32)
    zeros = rng.integers(-9, 9, grid, dtype=np.int8) if zero else None
    if numbers is torch.int8:
        codes = torch.from_numpy(rng.integers(-128, 128, shape, dtype=np.int8))
    else:
        codes = torch.from_numpy(rng.standard_normal(shape)).to(numbers)
    value = packed.Scaled8bit(codes, *_tensors(scale, zeros), shape, dtype, block_rows, block_columns)
    place = np.arange(shape[0])[:, None] // block_rows, np.arange(shape[1])[None] // block_columns
    exact = codes.float().numpy() - (zeros.astype(np.float32)[place] if zero else 0)
    return value, _rounded(exact * scale[place], dtype)


def torchao_int4(shape, dtype=torch.bfloat16, *, block=32, seed=0):
    rng = _generator(seed)
    shape = shape[0], -(-shape[1] // block) * block
    numbers = rng.integers(-8, 8, shape)
    codes = ((numbers[:, ::2] & 15) | ((numbers[:, 1::2] & 15) << 4)).astype(np.uint8).view(np.int8)
    grid = shape[1] // block, shape[0]
    scale = torch.from_numpy(rng.uniform(0.01, 0.3, grid)).to(dtype)
    zero = torch.from_numpy(rng.uniform(-0.1, 0.1, grid)).to(dtype)
    value = packed.TorchaoInt4(*_tensors(codes), scale, zero, shape, dtype, block)
    place = np.arange(shape[1])[None] // block, np.arange(shape[0])[:, None]
    dense = numbers.astype(np.float32) * scale.float().numpy()[place]
    return value, _rounded(dense + zero.float().numpy()[place], dtype)


E2M1 = np.asarray([s * v for s in (1, -1) for v in (0, 0.5, 1, 1.5, 2, 3, 4, 6)], dtype=np.float32)


def _two_in_a_byte(numbers):
    return torch.from_numpy(np.ascontiguousarray(numbers[..., ::2] | (numbers[..., 1::2] << 4)))


def mxfp4(shape, dtype=torch.bfloat16, *, experts=2, seed=0):
    rng = _generator(seed)
    shape = experts, shape[0], -(-shape[1] // 32) * 32
    numbers = rng.integers(0, 16, shape, dtype=np.uint8)
    scale = rng.integers(115, 135, (*shape[:-1], shape[-1] // 32), dtype=np.uint8)
    value = packed.Mxfp4(_two_in_a_byte(numbers), *_tensors(scale), shape, dtype)
    exponents = np.repeat(scale.astype(int) - 127, 32, axis=-1)
    return value, _rounded(np.ldexp(E2M1[numbers], exponents), dtype)


def nvfp4(shape, dtype=torch.bfloat16, *, experts=None, tensor_scale=True, swizzled=False, seed=0):
    rng = _generator(seed)
    shape = shape[0], -(-shape[1] // 16) * 16
    shape = shape if experts is None else (experts, *shape)
    numbers = rng.integers(0, 16, shape, dtype=np.uint8)
    scale = torch.from_numpy(rng.uniform(0.1, 400, (*shape[:-1], shape[-1] // 16))).to(torch.float8_e4m3fn)
    scales = scale.float().numpy()
    per_tensor = torch.tensor(0.37) if tensor_scale else None
    if tensor_scale and experts is not None:
        per_tensor = torch.linspace(0.3, 0.4, experts)[:, None, None]
    if tensor_scale:
        scales = per_tensor.numpy() * scales
    if swizzled:
        rows, columns = np.prod(shape[:-1]), shape[-1] // 16
        blocks_across = -(-columns // 4)
        places = torch.zeros(-(-rows // 128) * blocks_across * 512, dtype=torch.uint8)
        for row in range(rows):
            for column in range(columns):  # cuBLAS's layout of block scaling factors
                block = row // 128 * blocks_across + column // 4
                inside = row % 32 * 16 + row % 128 // 32 * 4 + column % 4
                places[block * 512 + inside] = scale.view(torch.uint8).reshape(rows, columns)[row, column]
        scale = places.view(torch.float8_e4m3fn)
    value = packed.Nvfp4(_two_in_a_byte(numbers), scale, per_tensor, shape, dtype, int(swizzled))
    return value, _rounded(E2M1[numbers] * np.repeat(scales, 16, axis=-1), dtype)


FORMATS = {
    "bnb_nf4": bnb_4bit,
    "bnb_fp4": functools.partial(bnb_4bit, table=FP4),
    "bnb_nf4_nested": functools.partial(bnb_4bit, nested=True),
    "bnb_fp4_nested": functools.partial(bnb_4bit, table=FP4, nested=True),
    "bnb_4bit_cpu": bnb_4bit_cpu,
    "bnb_int8": bnb_int8,
    "int8_row": scaled_8bit,
    "int8_group": functools.partial(scaled_8bit, block=(1, 32), zero=True),
    "float8_row": functools.partial(scaled_8bit, numbers=torch.float8_e4m3fn),
    "float8_block": functools.partial(scaled_8bit, numbers=torch.float8_e4m3fn, block=(128, 128)),
    "float8_tensor": functools.partial(scaled_8bit, numbers=torch.float8_e5m2, block=(1 << 20, 1 << 20)),
    "torchao_int4": torchao_int4,
    "mxfp4": mxfp4,
    "nvfp4": nvfp4,
    "nvfp4_experts": functools.partial(nvfp4, experts=2),
    "nvfp4_swizzled": functools.partial(nvfp4, experts=2, tensor_scale=False, swizzled=True),
}
# Those of which the rows are rounded are tried in every dtype.
ROUNDED = ("bnb_nf4", "bnb_fp4", "bnb_nf4_nested", "bnb_fp4_nested", "int8_group", "torchao_int4", "mxfp4", "nvfp4")
UNROUNDED = [name for name in FORMATS if name not in ROUNDED and not name.startswith("nvfp4")]
CASES = [(name, torch.float32 if name in UNROUNDED else torch.bfloat16) for name in FORMATS] + [
    (name, dtype) for name in ROUNDED for dtype in (torch.float16, torch.float32)
]


def on(value, device):
    return type(value)(*(t.to(device) if isinstance(t, torch.Tensor) else t for t in value))


def factors(shape, rank, dtype, device="cpu", seed=1):
    """lora_A ``[(E,) r, in]`` and lora_B ``[(E,) out, r]``."""
    generator = torch.Generator().manual_seed(seed)
    lora_A = torch.randn(*shape[:-2], rank, shape[-1], generator=generator) / rank**0.5
    lora_B = torch.randn(*shape[:-1], rank, generator=generator)
    return lora_A.to(device, dtype), lora_B.to(device, dtype)


def truth(dense, lora_A, lora_B, scaling):
    return torch.linalg.vector_norm(dense.double() + scaling * (lora_B.double() @ lora_A.double()), dim=-1)


def worst(norm, exact) -> float:
    """The largest relative error."""
    return ((norm.double() - exact).abs() / exact.clamp_min(1e-300)).max().item() if exact.numel() else 0.0
