"""The checker of named dimensions: which shapes a layout takes, and the sentences that it makes."""

import itertools

import pytest
import torch

from dorac.checks import linear
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


def of_layer() -> dict[str, torch.Tensor]:
    shapes = {"x": (3, 6), "weight": (5, 6), "lora_A": (2, 6), "lora_B": (5, 2)}
    return {name: torch.ones(shape) for name, shape in shapes.items()} | {
        name: torch.ones(5) for name in ("magnitude", "bias", "weight_norm")
    }


def over_a_product() -> dict[str, torch.Tensor]:
    tensors = of_layer()
    tensors["base"] = torch.ones(3, tensors.pop("weight").shape[0])
    return tensors


CHANGES = (
    *(lambda t: None, lambda t: 3, lambda t: [1.0], lambda t: t.double(), lambda t: t.half(), lambda t: t.long()),
    *(lambda t: t.to(torch.float8_e4m3fn), lambda t: t.to_sparse(), lambda t: t.to("meta")),
    *(lambda t: t[..., :-1], lambda t: t[:-1], lambda t: t[:0], lambda t: t[..., :0], lambda t: t.sum()),
    *(lambda t: t.unsqueeze(0), lambda t: t.flatten(), torch.nn.Parameter, lambda t: torch.nested.nested_tensor([t])),
)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("together", [1, pytest.param(2, marks=pytest.mark.full)])
@pytest.mark.parametrize(("check", "tensors"), [("check_linear", of_layer), ("check_over", over_a_product)])
def test_the_usual_case_is_known_without_the_sentences(check, tensors, together, monkeypatch):
    """Tensors that one or two changes make strange: what the short way takes, the long one takes."""
    check, refused, taken = getattr(linear, check), 0, 0

    def sentence(**tensors) -> str | None:
        try:
            check(**tensors)
        except (TypeError, ValueError) as error:
            return f"{type(error).__name__}: {error}"

    for names in itertools.combinations(tensors(), together):
        for changes in itertools.product(CHANGES, repeat=together):
            changed = tensors()
            changed |= {name: change(changed[name]) for name, change in zip(names, changes, strict=True)}
            found = sentence(**changed)
            with monkeypatch.context() as patch:
                patch.setattr(linear, "are_usual", lambda *tensors: False)
                assert sentence(**changed) == found, names
            refused, taken = refused + (found is not None), taken + (found is None)
    assert refused > 2 * taken > 0
    monkeypatch.setattr(linear, "fit", None)
    check(**tensors())
