"""What a convolution refuses by name before any work: in eager, compiled, and in one sentence under fullgraph."""

import dataclasses

import pytest
import torch

from dorac import functional
from dorac.testing import Convolution, LinearInputs, conv_inputs

CONVOLUTION = Convolution((2, 4, 6, 5), 6, (3, 2), 4)


def good() -> LinearInputs:
    return conv_inputs(CONVOLUTION, dtype=torch.float32)


def changed(**tensors) -> LinearInputs:
    return dataclasses.replace(good(), **tensors)


def ones(*shape, **options):
    return torch.ones(*shape, **options)


CASES = {
    "x_channels": (changed(x=ones(2, 3, 6, 5)), {}, ValueError, r"x must be \[N, in, H, W\] or .* with in = 4, got"),
    "x_2d": (changed(x=ones(6, 5)), {}, ValueError, r"x must be \[N, in, H, W\] or \[in, H, W\] .* shape \[6, 5\]"),
    "x_dtype": (changed(x=ones(2, 4, 6, 5).half()), {}, TypeError, "x must have the dtype of weight, torch.float32"),
    "x_integer": (changed(x=ones(2, 4, 6, 5).long()), {}, TypeError, "x must be float64, .* got torch.int64"),
    "x_device": (changed(x=ones(2, 4, 6, 5, device="meta")), {}, ValueError, "x must be on cpu like weight, got meta"),
    "x_small": (changed(x=ones(2, 4, 2, 5)), {}, ValueError, "x must be at least as large as the kernel, .* over 3"),
    "x_small_dilated": (
        good(),
        {"dilation": (1, 5)},
        ValueError,
        "x must be at least as large as the kernel, .* over 6",
    ),
    "weight_3d": (changed(weight=ones(6, 4, 3)), {}, ValueError, r"weight must have 4 dimensions, got .*\[6, 4, 3\]"),
    "weight_int8": (changed(weight=ones(6, 4, 3, 2).char()), {}, TypeError, "weight must be .*torch.int8; dequantise"),
    "groups_out": (
        good(),
        {"groups": 4},
        ValueError,
        "groups must be at least 1 and divide the 6 output channels, got 4",
    ),
    "groups_zero": (good(), {"groups": 0}, ValueError, "groups must be at least 1 .* got 0"),
    "groups_float": (good(), {"groups": 2.0}, TypeError, "groups must be an integer, got float"),
    "groups_bool": (good(), {"groups": True}, TypeError, "groups must be an integer, got bool"),
    "groups_rank": (
        good(),
        {"groups": 3},
        ValueError,
        "lora_A must have a rank that groups=3 divides, got a rank of 4",
    ),
    "groups_channels": (good(), {"groups": 2}, ValueError, r"lora_B must be \[out, r/groups, 1...\] = \[6, 2, 1, 1\]"),
    "A_kernel": (
        changed(lora_A=ones(4, 4, 2, 3)),
        {},
        ValueError,
        r"lora_A must be \[r, in, k...\] = \[4, 4, 3, 2\] for weight \[6, 4, 3, 2\], got \[4, 4, 2, 3\]",
    ),
    "A_channels": (
        changed(weight=ones(6, 2, 3, 2), lora_A=ones(4, 3, 3, 2), lora_B=ones(6, 2, 1, 1)),
        {"groups": 2},
        ValueError,
        r"lora_A must be \[r, in, k...\] = \[4, 4, 3, 2\] or \[r, in/groups, k...\] = \[4, 2, 3, 2\]",
    ),
    "A_matrix": (changed(lora_A=ones(4, 24)), {}, ValueError, r"lora_A must have 4 dimensions like weight, got"),
    "A_rank_0": (changed(lora_A=ones(0, 4, 3, 2)), {}, ValueError, "lora_A must have a rank of at least 1"),
    "B_rank": (
        changed(lora_B=ones(6, 3, 1, 1)),
        {},
        ValueError,
        r"lora_B must be .* \[6, 4, 1, 1\] .*got \[6, 3, 1, 1\]",
    ),
    "B_kernel": (changed(lora_B=ones(6, 4, 3, 2)), {}, ValueError, r"lora_B must be .* \[6, 4, 1, 1\]"),
    "B_dtype": (changed(lora_B=ones(6, 4, 1, 1).half()), {}, TypeError, "lora_A and lora_B must share a dtype"),
    "B_device": (changed(lora_B=ones(6, 4, 1, 1, device="meta")), {}, ValueError, "lora_B must be on cpu like weight"),
    "magnitude_shape": (changed(magnitude=ones(1, 6, 1, 1)), {}, ValueError, r"magnitude must be \[out\] = \[6\], got"),
    "bias_length": (changed(bias=ones(4)), {}, ValueError, r"bias must be \[out\] = \[6\], got shape \[4\]"),
    "norm_length": (good(), {"weight_norm": ones(4)}, ValueError, r"weight_norm must be \[out\] = \[6\]"),
    "stride_zero": (good(), {"stride": 0}, ValueError, "stride must be one integer or 2 of them, at least 1, got 0"),
    "stride_three": (good(), {"stride": (1, 1, 1)}, ValueError, r"stride must be one integer or 2 .* got \(1, 1, 1\)"),
    "stride_float": (good(), {"stride": 1.5}, TypeError, "stride must be an integer or 2 of them, got 1.5"),
    "dilation_zero": (good(), {"dilation": (0, 1)}, ValueError, r"dilation must be .* at least 1, got \(0, 1\)"),
    "padding_negative": (good(), {"padding": -1}, ValueError, "padding must be .* at least 0, got -1"),
    "padding_word": (good(), {"padding": "full"}, ValueError, "padding must be numbers, 'same' or 'valid', got 'full'"),
    "padding_none": (good(), {"padding": None}, TypeError, "padding must be an integer or 2 of them, got None"),
    "same_strided": (
        good(),
        {"padding": "same", "stride": (1, 2)},
        ValueError,
        r"padding must not be 'same' with a stride other than 1, got stride \(1, 2\)",
    ),
    "mode": (good(), {"padding_mode": "mirror"}, ValueError, "padding_mode must be one of 'zeros', .* got 'mirror'"),
    "reflect_wide": (
        good(),
        {"padding": (0, 5), "padding_mode": "reflect"},
        ValueError,
        r"padding must be at most 4 with padding_mode 'reflect' for x \[2, 4, 6, 5\], got 5",
    ),
    "circular_wide": (
        good(),
        {"padding": 6, "padding_mode": "circular"},
        ValueError,
        "padding must be at most 5 with padding_mode 'circular'",
    ),
    "scaling_nan": (good(), {"scaling": float("nan")}, ValueError, "scaling must be finite in float32, got nan"),
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
def test_dora_conv(case, compiled):
    inputs, options, error, message = CASES[case]
    function = torch.compile(functional.dora_conv2d, backend="eager") if compiled else functional.dora_conv2d
    with pytest.raises(error, match=message):
        function(*inputs.tensors(), **{"scaling": 0.7} | options)


@pytest.mark.parametrize("case", CASES)
def test_fullgraph_keeps_the_sentence(case):
    inputs, options, _, message = CASES[case]
    function = torch.compile(functional.dora_conv2d, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.TorchDynamoException, match=message):
        function(*inputs.tensors(), **{"scaling": 0.7} | options)


@pytest.mark.parametrize(
    ("function", "error", "message"),
    [
        (lambda i: functional.dora_conv1d(*i.tensors(), scaling=1.0), ValueError, "weight must have 3 dimensions, got"),
        (lambda i: functional.dora_conv3d(*i.tensors(), scaling=1.0), ValueError, "weight must have 5 dimensions, got"),
        (
            lambda i: functional.norm_factored_conv(i.weight[0, 0], i.lora_A, i.lora_B, 1.0),
            ValueError,
            r"weight must be \[out, in/groups, k...\] with 1 to 3 k, got shape \[3, 2\]",
        ),
        (
            lambda i: functional.norm_factored_conv(i.weight, i.lora_A, i.lora_B, 1.0, groups=5),
            ValueError,
            "groups must be",
        ),
        (
            lambda i: functional.norm_factored_conv(i.weight, i.lora_A, i.lora_B, None),
            TypeError,
            "scaling must be a number",
        ),
        (
            lambda i: functional.norm_factored_conv(i.weight, i.lora_A, i.lora_B, 1.0, budget=0),
            ValueError,
            "budget must be at least one byte",
        ),
        (lambda i: functional.conv_matrices(i.weight, i.lora_A[:3], i.lora_B), ValueError, "lora_B must be"),
        (lambda i: functional.conv_matrices([1.0], i.lora_A, i.lora_B), TypeError, "weight must be a tensor, got list"),
        (lambda i: functional.compose(i.x, i.x, i.bias[:4], 1.0, dim=4), ValueError, "dim must be a dimension of base"),
        (
            lambda i: functional.compose(i.x, i.x, i.bias[:4], 1.0, dim="1"),
            TypeError,
            "dim must be an integer, got str",
        ),
        (
            lambda i: functional.compose(i.x, i.x, i.bias[:5], 1.0, dim=1),
            ValueError,
            r"mag_scale must be \[out\] = \[4\]",
        ),
    ],
)
def test_other_functions(function, error, message):
    with pytest.raises(error, match=message):
        function(good())
