"""The layer's eager path (``ops/eager.py``): its results, what it keeps, when it steps aside.

On the CPU the kernels run in Triton's interpreter.
"""

import pytest
import torch

from dorac import functional, reference
from dorac.ops import eager, front
from dorac.testing import layer_budgets, linear_inputs

S = 0.7
HALF = [torch.bfloat16, torch.float16]


@pytest.fixture
def path(device, monkeypatch) -> list[str]:
    """Has tensors on the CPU take the path, too; what took it since, "training" or "inference"."""
    if device == "cpu":
        monkeypatch.setattr(
            front, "has_kernels", lambda *tensors: all(t is None or t.dtype.itemsize < 8 for t in tensors)
        )
    taken = []
    without_autocast = eager._without_autocast

    def spy(*arguments):
        taken.append("training" if len(arguments) == 10 else "inference")
        return without_autocast(*arguments)

    monkeypatch.setattr(eager, "_without_autocast", spy)
    return taken


def frozen(inputs):
    """The base layer's weight and bias frozen, as an adapted layer has them."""
    leaves = inputs.leaves()
    leaves.weight.requires_grad_(False)
    return leaves


def check(tensors, y, dy, *, sums, norm=None, **options):
    budgets = layer_budgets(
        reference.dora_linear, reference.row_norm, tensors, sums, scaling=S, dy=dy, weight_norm=norm, **options
    )
    names = ("x", "weight", "lora_A", "lora_B", "magnitude", "bias")
    for name, budget in budgets.items():
        tensor = dict(zip(names, tensors, strict=True)).get(name)
        actual = y if name == "y" else tensor.grad
        if name == "y" or tensor.requires_grad:
            budget.check(actual, name)
            assert name == "y" or actual.dtype is tensor.dtype
        else:
            assert tensor.grad is None


REGIMES = [
    "aligned",
    "odd",
    "rank_1",
    "rank_over_128",
    "rank_over_both",
    "one_token",
    "one_feature",
    "wide",
    (6, 48, 32, 384),
    (40, 128, 64, 72),
]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("regime", REGIMES, ids=str)
@pytest.mark.parametrize("bias", ["trained", "frozen", None])
@pytest.mark.parametrize("given", [True, False])
def test_values_and_gradients(dtype, regime, bias, given, path, device):
    inputs = frozen(linear_inputs(regime, dtype=dtype, bias=bias is not None, device=device))
    if bias == "frozen":
        inputs.bias.requires_grad_(False)
    norm = functional.norm_factored(inputs.weight, inputs.lora_A.detach(), inputs.lora_B.detach(), S) if given else None
    y = functional.dora_linear(*inputs.tensors(), scaling=S, weight_norm=norm)
    dy = torch.randn_like(y)
    y.backward(dy)
    assert path == ["training"]
    check(inputs.tensors(), y, dy, sums=inputs.sums(), norm=norm)
