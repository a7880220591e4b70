"""What cannot work is refused by name before any work: in eager, compiled, and in one sentence under fullgraph."""

import dataclasses

import pytest
import torch

from dorac import functional
from dorac.testing import LinearInputs, linear_inputs


def good() -> LinearInputs:
    return linear_inputs((4, 5, 6, 3), dtype=torch.float32)


def changed(**tensors) -> LinearInputs:
    return dataclasses.replace(good(), **tensors)


CASES = {
    "x_features": (
        changed(x=torch.ones(4, 7)),
        {},
        ValueError,
        r"x must be \[\*, in\] with in = 6, got shape \[4, 7\]",
    ),
    "x_0d": (changed(x=torch.ones(())), {}, ValueError, r"x must be \[\*, in\] with in = 6, got shape \[\]"),
    "x_dtype": (changed(x=torch.ones(4, 6).double()), {}, TypeError, "x must have the dtype of weight, torch.float32"),
    "x_integer": (changed(x=torch.ones(4, 6).long()), {}, TypeError, "x must be float64, .* got torch.int64"),
    "weight_1d": (
        changed(weight=torch.ones(6)),
        {},
        ValueError,
        r"weight must have 2 dimensions, or 3 .*got shape \[6\]",
    ),
    "weight_int8": (
        changed(weight=torch.ones(5, 6).char()),
        {},
        TypeError,
        "weight must be .*got torch.int8; dequantise",
    ),
    "weight_complex": (
        changed(weight=torch.ones(5, 6).cfloat()),
        {},
        TypeError,
        "weight must be .*got torch.complex64",
    ),
    "weight_fp8": (
        changed(weight=torch.ones(5, 6).to(torch.float8_e4m3fn)),
        {},
        TypeError,
        "weight must be float64, float32, bfloat16 or float16, got torch.float8_e4m3fn",
    ),
    "A_features": (
        changed(lora_A=torch.ones(3, 5)),
        {},
        ValueError,
        r"lora_A must be \[r, in\] = \[3, 6\] .*got \[3, 5\]",
    ),
    "A_rank_0": (changed(lora_A=torch.ones(0, 6)), {}, ValueError, r"lora_A must have a rank of at least 1"),
    "B_rank": (
        changed(lora_B=torch.ones(5, 2)),
        {},
        ValueError,
        r"lora_B must be \[out, r\] = \[5, 3\] .*got \[5, 2\]",
    ),
    "B_rows": (
        changed(lora_B=torch.ones(4, 3)),
        {},
        ValueError,
        r"lora_B must be \[out, r\] = \[5, 3\] .*got \[4, 3\]",
    ),
    "B_dtype": (changed(lora_B=torch.ones(5, 3).half()), {}, TypeError, "lora_A and lora_B must share a dtype"),
    "B_device": (
        changed(lora_B=torch.ones(5, 3, device="meta")),
        {},
        ValueError,
        "lora_B must be on cpu like weight, got meta",
    ),
    "magnitude_length": (
        changed(magnitude=torch.ones(6)),
        {},
        ValueError,
        r"magnitude must be \[out\] = \[5\], got shape \[6\]",
    ),
    "magnitude_column": (changed(magnitude=torch.ones(5, 1)), {}, ValueError, r"magnitude must be \[out\] = \[5\]"),
    "magnitude_integer": (changed(magnitude=torch.ones(5).int()), {}, TypeError, "magnitude must be float64"),
    "magnitude_device": (changed(magnitude=torch.ones(5, device="meta")), {}, ValueError, "magnitude must be on cpu"),
    "bias_length": (changed(bias=torch.ones(4)), {}, ValueError, r"bias must be \[out\] = \[5\], got shape \[4\]"),
    "norm_length": (good(), {"weight_norm": torch.ones(4)}, ValueError, r"weight_norm must be \[out\] = \[5\]"),
    "scaling_nan": (good(), {"scaling": float("nan")}, ValueError, "scaling must be finite in float32, got nan"),
    "scaling_beyond_float32": (
        good(),
        {"scaling": 3.5e38},
        ValueError,
        "scaling must be finite in float32, got 3.5e",
    ),
    "scaling_inf": (good(), {"scaling": float("inf")}, ValueError, "scaling must be finite in float32, got inf"),
    "scaling_string": (good(), {"scaling": "2"}, TypeError, "scaling must be a number or a 0-d float tensor, got str"),
    "scaling_vector": (good(), {"scaling": torch.ones(2)}, TypeError, "scaling must be a number or a 0-d float tensor"),
    "dropout_one": (good(), {"dropout_p": 1.0}, ValueError, r"dropout_p must be in \[0, 1\), got 1.0"),
    "dropout_on": (
        good(),
        {"dropout_on": "base"},
        ValueError,
        "dropout_on must be 'adapter' or 'low_rank', got 'base'",
    ),
    "dropout_on_bool": (
        good(),
        {"dropout_on": True, "dropout_p": 0.5},
        ValueError,
        "dropout_on must be 'adapter' or 'low_rank', got True",
    ),
    "budget_zero": (good(), {"budget": 0}, ValueError, "budget must be at least one byte, got 0"),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("compiled", [False, True])
def test_dora_linear(case, compiled):
    inputs, options, error, message = CASES[case]
    function = torch.compile(functional.dora_linear, backend="eager") if compiled else functional.dora_linear
    with pytest.raises(error, match=message):
        function(*inputs.tensors(), **{"scaling": 0.7} | options)


@pytest.mark.parametrize("case", CASES)
def test_fullgraph_keeps_the_sentence(case):
    inputs, options, _, message = CASES[case]
    function = torch.compile(functional.dora_linear, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.TorchDynamoException, match=message):
        function(*inputs.tensors(), **{"scaling": 0.7} | options)


def test_the_budget_is_checked_beside_a_given_norm():
    """Which uses none."""
    inputs = linear_inputs("odd", dtype=torch.float32)
    norm = functional.norm_factored(inputs.weight, inputs.lora_A, inputs.lora_B, 0.7)
    with pytest.raises(ValueError, match="budget must be at least one byte, got -1"):
        functional.dora_linear(*inputs.tensors(), scaling=0.7, weight_norm=norm, budget=-1)


def test_not_a_tensor():
    args = list(good().tensors())
    args[1] = [[1.0]]
    with pytest.raises(TypeError, match="weight must be a tensor, got list"):
        functional.dora_linear(*args, scaling=0.7)


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (lambda i: functional.norm_factored(i.weight, i.lora_A, i.lora_B[:4], 1.0), ValueError, "lora_B must be"),
        (lambda i: functional.norm_factored(i.weight, i.lora_A, i.lora_B, None), TypeError, "scaling must be a number"),
        (
            lambda i: functional.norm_factored(i.weight, i.lora_A, i.lora_B, 1.0, weight_sq=torch.ones(3)),
            ValueError,
            r"weight_sq must be \[out\] = \[5\]",
        ),
        (
            lambda i: functional.norm_factored(i.weight, i.lora_A, i.lora_B, 1.0, budget=1.5),
            TypeError,
            "budget must be a number of bytes, got float",
        ),
        (lambda i: functional.init_magnitude(i.weight.long(), i.lora_A, i.lora_B, 1.0), TypeError, "weight must be"),
        (
            lambda i: functional.merge_weight(i.weight, i.lora_A, i.lora_B, i.magnitude[:2], scaling=1.0),
            ValueError,
            "magnitude must be",
        ),
        (
            lambda i: functional.unmerge_weight(
                i.weight, i.lora_A, i.lora_B, i.magnitude, scaling=1.0, weight_norm=torch.ones(2)
            ),
            ValueError,
            "weight_norm must be",
        ),
        (lambda i: functional.magnitude_scale(i.magnitude, torch.ones(3)), ValueError, "magnitude must be"),
        (
            lambda i: functional.compose(i.bias, i.bias[:3], i.bias, 1.0),
            ValueError,
            r"base and lora must share a shape \[\*, out\], got \[5\] and \[3\]",
        ),
        (
            lambda i: functional.compose(i.bias, i.bias, i.bias[:2], 1.0),
            ValueError,
            r"mag_scale must be \[out\] = \[5\]",
        ),
        (lambda i: functional.compose(i.bias, i.bias, i.bias, 1.0, bias=i.x), ValueError, "bias must be"),
        (
            lambda i: functional.compose(i.bias, i.bias, i.bias, 1.0, bias=i.bias, delta=True),
            ValueError,
            "bias must be None in the delta form",
        ),
        (lambda i: functional.compose(i.bias.long(), i.bias, i.bias, 1.0), TypeError, "base must be"),
    ],
)
def test_other_functions(function, error, message):
    with pytest.raises(error, match=message):
        function(good())
