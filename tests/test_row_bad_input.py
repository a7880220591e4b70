"""What experts, grouped rows and mixed adapters refuse, by name and before any work."""

import pytest
import torch
from row_layers import ADAPTER_OF_ROW, LAYERS, OFFSETS, SCALING

POSITIONS = {"x": 0, "weight": 1, "lora_A": 2, "lora_B": 3, "magnitude": 4, "bias": 5}
CASES = {
    "experts": {
        "x_experts": (
            {"x": torch.ones(4, 2, 6)},
            ValueError,
            r"x must be \[E, \*, in\] with E = 3 and in = 6, got shape",
        ),
        "x_1d": ({"x": torch.ones(6)}, ValueError, r"x must be \[E, \*, in\] with E = 3 .* \[6\]"),
        "A_experts": (
            {"lora_A": torch.ones(2, 3, 6)},
            ValueError,
            r"lora_A must be \[E, r, in\] = \[3, 3, 6\] .*got \[2, 3, 6\]",
        ),
        "B_experts": (
            {"lora_B": torch.ones(4, 5, 3)},
            ValueError,
            r"lora_B must be \[E, out, r\] = \[3, 5, 3\] .*got \[4, 5, 3\]",
        ),
        "A_2d": ({"lora_A": torch.ones(3, 6)}, ValueError, "lora_A must have 3 dimensions like weight"),
        "A_features": ({"lora_A": torch.ones(3, 3, 7)}, ValueError, r"lora_A must be \[E, r, in\] = \[3, 3, 6\]"),
        "magnitude": ({"magnitude": torch.ones(5)}, ValueError, r"magnitude must be \[E, out\] = \[3, 5\]"),
        "bias": ({"bias": torch.ones(2, 5)}, ValueError, r"bias must be \[E, out\] = \[3, 5\], got shape \[2, 5\]"),
        "weight_norm": ({"weight_norm": torch.ones(5)}, ValueError, r"weight_norm must be \[E, out\] = \[3, 5\]"),
        "weight_4d": (
            {"weight": torch.ones(1, 3, 5, 6)},
            ValueError,
            "weight must have 2 dimensions, or 3 with experts",
        ),
        "dtype": ({"x": torch.ones(3, 2, 6).double()}, TypeError, "x must have the dtype of weight"),
    },
    "grouped": {
        "x_3d": ({"x": torch.ones(4, 2, 6)}, ValueError, r"x must be \[S, in\] with in = 6"),
        "weight_2d": (
            {"weight": torch.ones(5, 6), "lora_A": torch.ones(3, 6), "lora_B": torch.ones(5, 3)}
            | {"magnitude": torch.ones(5)},
            ValueError,
            r"weight must be \[E, out, in\]",
        ),
        "offsets_length": ({"offsets": OFFSETS[:3]}, ValueError, r"offsets must be \[E\] = \[4\], got shape \[3\]"),
        "offsets_float": ({"offsets": OFFSETS.float()}, TypeError, "offsets must be int64 or int32, got torch.float32"),
        "offsets_list": ({"offsets": [1, 2, 3, 6]}, TypeError, "offsets must be a tensor, got list"),
        "offsets_device": ({"offsets": OFFSETS.to("meta")}, ValueError, "offsets must be on cpu like weight, got meta"),
        "bias": ({"bias": torch.ones(5)}, ValueError, r"bias must be \[E, out\] = \[4, 5\]"),
        "dropout": ({"dropout_p": 1.0}, ValueError, r"dropout_p must be in \[0, 1\)"),
        "dropout_on": ({"dropout_on": None}, ValueError, "dropout_on must be 'adapter' or 'low_rank', got None"),
    },
    "mixed": {
        "A_list": ({"lora_A": [torch.ones(3, 6)] * 3}, TypeError, "lora_A must be one stack .* padded with zeros"),
        "B_list": (
            {"lora_B": (torch.ones(5, 3), torch.ones(5, 2))},
            TypeError,
            "lora_B must be one stack .*got a tuple",
        ),
        "A_2d": ({"lora_A": torch.ones(3, 6)}, ValueError, r"lora_A must be \[K, r, in\] with at least one adapter"),
        "B_2d": ({"lora_B": torch.ones(5, 3)}, ValueError, r"lora_B must be \[K, out, r\] with at least one adapter"),
        "no_adapters": ({"lora_A": torch.ones(0, 3, 6)}, ValueError, "lora_A must be .* at least one adapter"),
        "ranks": (
            {"lora_B": torch.ones(3, 5, 4)},
            ValueError,
            r"lora_B must be \[K, out, r\] = \[3, 5, 3\] .*got \[3, 5, 4\]",
        ),
        "counts": ({"lora_B": torch.ones(2, 5, 3)}, ValueError, r"lora_B must be \[K, out, r\] = \[3, 5, 3\]"),
        "magnitude": ({"magnitude": torch.ones(2, 5)}, ValueError, r"magnitude must be \[K, out\] = \[3, 5\]"),
        "weight_3d": ({"weight": torch.ones(3, 5, 6)}, ValueError, r"weight must be \[out, in\]"),
        "index_length": ({"adapter_index": ADAPTER_OF_ROW[:2]}, ValueError, r"adapter_index must be \[N\] = \[5\]"),
        "index_float": ({"adapter_index": ADAPTER_OF_ROW.float()}, TypeError, "adapter_index must be int64 or int32"),
        "index_bool": ({"adapter_index": ADAPTER_OF_ROW > 0}, TypeError, "adapter_index must be int64 or int32"),
        "x_1d": ({"x": torch.ones(6)}, ValueError, r"x must be \[N, \*, in\] with in = 6"),
        "scalings": ({"scaling": torch.ones(2)}, ValueError, r"scaling must be a number, 0-d or \[K\] = \[3\]"),
        "scalings_int": ({"scaling": torch.ones(3).int()}, TypeError, "scaling must be float64"),
        "scaling_nan": ({"scaling": float("nan")}, ValueError, "scaling must be finite in float32, got nan"),
        "bias": ({"bias": torch.ones(3, 5)}, ValueError, r"bias must be \[out\] = \[5\]"),
        "norm": ({"weight_norm": torch.ones(5)}, ValueError, r"weight_norm must be \[K, out\] = .*got shape \[5\]"),
    },
}


def call(name, changes, function):
    tensors = list(LAYERS[name].inputs(5, 6, 3, dtype=torch.float32).tensors())
    options = {"scaling": SCALING} | LAYERS[name].of_rows
    for argument, value in changes.items():
        if argument in POSITIONS:
            tensors[POSITIONS[argument]] = value
        else:
            options[argument] = value
    return function(*tensors, **options)


@pytest.mark.parametrize(("name", "case"), [(name, case) for name, cases in CASES.items() for case in cases])
def test_refused(name, case):
    changes, error, message = CASES[name][case]
    function = LAYERS[name].functional
    assert call(name, {}, function).isfinite().all()
    with pytest.raises(error, match=message):
        call(name, changes, function)
    with pytest.raises(error, match=message):
        call(name, changes, torch.compile(function, backend="eager"))
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.TorchDynamoException, match=message):
        call(name, changes, torch.compile(function, backend="eager", fullgraph=True))
