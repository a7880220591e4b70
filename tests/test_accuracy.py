"""The layer's RMS error against a truth of more than 64 bits, beside that of stock PEFT's layer on the same inputs.

``pytest tests/test_accuracy.py -s`` prints the table.
"""

import numpy as np
import pytest
import torch

import dorac
from dorac.testing import LinearInputs, linear_inputs, unit_roundoff

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


def rms_errors(dtype: torch.dtype, shape: tuple[int, ...], draws: int) -> tuple[float, float, float]:
    """Ours, PEFT's, and one rounding of the truth, over all outputs of so many draws."""
    squares = np.zeros(3)
    for seed in range(draws):
        inputs = linear_inputs(shape, dtype=dtype, magnitude_dtype=dtype, seed=seed)
        exact = truth(inputs)
        for i, layer in enumerate((ours, stock_peft)):
            squares[i] += float(((layer(inputs).double().numpy() - exact) ** 2).mean())
        squares[2] += float(((unit_roundoff(dtype) * exact) ** 2).mean())
    return tuple(np.sqrt(squares / draws))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("draws", [4, pytest.param(20, marks=pytest.mark.full)])
def test_error_beside_peft(dtype, draws):
    """In half precision at most four fifths of PEFT's, which also rounds norm, g, s * lora and every product with them;
    wider types may be off by its error again, or by one rounding.

    The largest of a handful of outputs is a lottery, and wider types add up in the order of the machine's kernels; the
    RMS over some hundred outputs is neither.
    """
    print(f"\n{str(dtype).removeprefix('torch.')}: RMS error against the truth")
    print(f"{'tokens x out x in, r':>24} {'dorac':>10} {'PEFT':>10} {'ratio':>6}")
    half, worse = dtype in (torch.bfloat16, torch.float16), []
    for shape in SHAPES:
        mine, theirs, rounding = rms_errors(dtype, shape, draws)
        tokens, out, in_, rank = shape
        print(f"{f'{tokens} x {out} x {in_}, {rank}':>24} {mine:10.2e} {theirs:10.2e} {mine / theirs:6.2f}")
        if mine > (0.8 * theirs if half else max(2 * theirs, rounding)):
            worse.append(shape)
    assert not worse
