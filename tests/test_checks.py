"""The checker of named dimensions: which shapes a layout takes, and the sentences that it makes."""

import pytest
import torch

from dorac.checks.shapes import check_index, fit, layouts

SIZES = {"out": 5, "in": 6}
LAYOUTS = layouts(
    weight="out in |  for this layer, got",
    lora_A="r+ in",
    lora_B="out r",
    x="N * in",
    bias="out?",
    index="N",
)
LIKE = torch.ones(())


def refusal(kind=None, /, **tensors) -> str:
    with pytest.raises(ValueError, match="must be") as error:
        fit(LAYOUTS, dict(SIZES), LIKE, "like", *([kind] if kind else []), **tensors)
    return str(error.value)


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        ({"weight": (5, 7)}, "weight must be [out, in] = [5, 6] for this layer, got [5, 7]"),
        ({"weight": (5, 6, 1)}, "weight must be [out, in] = [5, 6] for this layer, got [5, 6, 1]"),
        ({"lora_A": (0, 6)}, "lora_A must be [r, in] with in = 6, got shape [0, 6]"),
        ({"lora_A": (3, 7)}, "lora_A must be [r, in] with in = 6, got shape [3, 7]"),
        ({"lora_A": (3, 6), "lora_B": (5, 2)}, "lora_B must be [out, r] = [5, 3], got shape [5, 2]"),
        ({"x": (6,)}, "x must be [N, *, in] with in = 6, got shape [6]"),
        ({"x": (2, 3, 7)}, "x must be [N, *, in] with in = 6, got shape [2, 3, 7]"),
        ({"bias": (4,)}, "bias must be [out] = [5], got shape [4]"),
    ],
)
def test_shapes_that_do_not_fit(tensors, sentence):
    assert refusal(**{name: torch.ones(shape) for name, shape in tensors.items()}) == sentence


def test_sizes_are_those_of_the_first_tensor_that_has_them():
    sizes = dict(SIZES)
    tensors = {"lora_A": (3, 6), "lora_B": (5, 3), "x": (4, 1, 2, 6)}
    fit(LAYOUTS, sizes, LIKE, **{name: torch.ones(shape) for name, shape in tensors.items()}, bias=None)
    assert sizes == SIZES | {"r": 3, "N": 4}
    fit(LAYOUTS, sizes, LIKE, "like", check_index, index=torch.zeros(4, dtype=torch.int32))


def test_kinds_and_devices():
    assert "index must be on cpu like like, got meta" in refusal(
        check_index, index=torch.zeros(4, dtype=torch.int64, device="meta")
    )
    with pytest.raises(TypeError, match=r"weight must be float64, .* got torch.int64; dequantise it first"):
        fit(LAYOUTS, dict(SIZES), LIKE, weight=torch.ones(5, 6).long())
    with pytest.raises(TypeError, match="lora_A must be a tensor, got NoneType"):
        fit(LAYOUTS, dict(SIZES), LIKE, lora_A=None)
