"""The layer's largest error against a truth of more than 64 bits, beside that of stock PEFT's layer on the same inputs.

``pytest tests/test_accuracy.py -s`` prints the table.
"""

import numpy as np
import pytest
import torch

import dorac
from dorac.testing import LinearInputs, linear_inputs

peft = pytest.importorskip("peft")

SHAPES = [  # tokens, out, in, rank
    (64, 128, 128, 16),
    (33, 65, 127, 7),
    (16, 40, 24, 1),
    (16, 192, 160, 136),
    (8, 12, 10, 17),
    (1, 64, 48, 4),
    (8, 16, 700, 8),
    (8, 700, 16, 8),
    (48, 256, 256, 64),
    (32, 384, 96, 32),
]
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
SCALING = 2.0


def truth(inputs: LinearInputs) -> np.ndarray:
    """The textbook formula in 80-bit floats."""
    x, weight, lora_A, lora_B, magnitude, bias = (t.double().numpy().astype(np.longdouble) for t in inputs.tensors())
    adapted = weight + SCALING * (lora_B @ lora_A)
    g = magnitude / np.sqrt((adapted**2).sum(1))
    return x @ (g[:, None] * adapted).T + bias


def base_layer(inputs: LinearInputs) -> torch.nn.Linear:
    linear = torch.nn.Linear(inputs.weight.shape[1], inputs.weight.shape[0], dtype=inputs.weight.dtype)
    linear.load_state_dict({"weight": inputs.weight, "bias": inputs.bias})
    return linear


def stock_peft(inputs: LinearInputs) -> torch.Tensor:
    rank = inputs.lora_A.shape[0]
    config = peft.LoraConfig(r=rank, lora_alpha=SCALING * rank, target_modules=["0"], use_dora=True)
    model = peft.get_peft_model(torch.nn.Sequential(base_layer(inputs)), config, autocast_adapter_dtype=False)
    layer = model.base_model.model[0]
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(inputs.lora_A)
        layer.lora_B["default"].weight.copy_(inputs.lora_B)
        layer.lora_magnitude_vector["default"].weight.copy_(inputs.magnitude)
        return layer(inputs.x)


def ours(inputs: LinearInputs) -> torch.Tensor:
    rank = inputs.lora_A.shape[0]
    layer = dorac.nn.DoraLinear(
        base_layer(inputs), r=rank, lora_alpha=SCALING * rank, adapter_dtype=inputs.lora_A.dtype
    )
    with torch.no_grad():
        layer.lora_A.copy_(inputs.lora_A)
        layer.lora_B.copy_(inputs.lora_B)
        layer.lora_magnitude_vector.copy_(inputs.magnitude)
        return layer(inputs.x)


def error(y: torch.Tensor, exact: np.ndarray) -> float:
    return float(np.abs(y.double().numpy().astype(np.longdouble) - exact).max())


def limit(dtype: torch.dtype, theirs: float, exact: np.ndarray) -> float:
    """Half precision must not be worse than PEFT; wider types may be off by its error again and one rounding."""
    if dtype in (torch.bfloat16, torch.float16):
        return theirs
    return 2 * theirs + 0.5 * torch.finfo(dtype).eps * float(np.abs(exact).max())


@pytest.mark.parametrize("dtype", DTYPES)
def test_error_beside_peft(dtype):
    print(f"\n{str(dtype).removeprefix('torch.')}: largest error against the truth")
    print(f"{'tokens x out x in, r':>24} {'dorac':>10} {'PEFT':>10} {'ratio':>6}")
    worse = []
    for shape in SHAPES:
        inputs = linear_inputs(shape, dtype=dtype, magnitude_dtype=dtype)
        exact = truth(inputs)
        mine, theirs = error(ours(inputs), exact), error(stock_peft(inputs), exact)
        tokens, out, in_, rank = shape
        print(f"{f'{tokens} x {out} x {in_}, {rank}':>24} {mine:10.2e} {theirs:10.2e} {mine / theirs:6.2f}")
        if mine > limit(dtype, theirs, exact):
            worse.append(shape)
    assert not worse


@pytest.mark.full
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mean_error_over_seeds(dtype, shape):
    """The largest of a handful of outputs is a lottery in one draw; its mean over twenty draws is not."""
    mine, theirs, limits = [], [], []
    for seed in range(20):
        inputs = linear_inputs(shape, dtype=dtype, magnitude_dtype=dtype, seed=seed)
        exact = truth(inputs)
        mine.append(error(ours(inputs), exact))
        theirs.append(error(stock_peft(inputs), exact))
        limits.append(limit(dtype, theirs[-1], exact))
    lost = sum(m > bound for m, bound in zip(mine, limits, strict=True))
    print(f"\n{dtype} {shape}: mean ratio {np.mean(mine) / np.mean(theirs):.2f}, over the limit in {lost} of 20 draws")
    assert np.mean(mine) <= np.mean(limits)
