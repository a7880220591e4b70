"""Dropout in both meanings: values and gradients for a mask that is known, on every way that the layer can take."""

import pytest
import torch
import torch.nn.functional as F

from dorac import functional, reference
from dorac.ops import front, linear
from dorac.testing import layer_budgets, linear_inputs

MEANINGS = ("adapter", "low_rank")
S, P = 0.7, 0.4


@pytest.fixture(params=MEANINGS)
def meaning(request) -> str:
    return request.param


@pytest.fixture
def on_gpu(monkeypatch):
    """The ways that a GPU takes; without one, the kernels are interpreted."""
    monkeypatch.setattr(front, "has_kernels", lambda *tensors: True)


def mask_of(x):
    """What dropout multiplies x with in :func:`layer`."""
    torch.manual_seed(3)
    return (F.dropout(torch.ones_like(x), P) > 0).double() / (1 - P)


def layer(inputs, meaning, run=functional.dora_linear, **options):
    torch.manual_seed(3)
    options = {"scaling": S, "dropout_p": P, "dropout_on": meaning} | options
    return run(*inputs.tensors(), **options)


def check(inputs, y, meaning, mask, **options):
    """y and the gradients that a dy drawn here leaves."""
    dy = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(y)
    y.backward(dy)
    budgets = layer_budgets(
        reference.dora_linear,
        reference.row_norm,
        inputs.tensors(),
        inputs.sums(),
        scaling=S,
        dy=dy,
        casts=3,  # x', the change and with it the second product
        dropped=mask,
        dropout_on=meaning,
        **options,
    )
    for name, budget in budgets.items():
        actual = y if name == "y" else getattr(inputs, name).grad
        if actual is not None:
            assert actual.dtype is (inputs.x if name == "y" else getattr(inputs, name)).dtype
            budget.check(actual, name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("regime", ["odd", "one_token", "no_tokens", "rank_over_128", "wide"])
def test_values_and_gradients(meaning, dtype, regime, device):
    inputs = linear_inputs(regime, dtype=dtype, device=device).leaves()
    check(inputs, layer(inputs, meaning), meaning, mask_of(inputs.x.detach()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("regime", ["odd", "one_token", "rank_over_128"])
@pytest.mark.parametrize("use_compile", [False, True])
def test_on_a_gpu_with_a_weight_that_is_trained(meaning, dtype, regime, use_compile, on_gpu, device):
    """That is left to the op and its leaves; on the CPU these run in aten."""
    run = functional.dora_linear
    run = torch.compile(run, fullgraph=True, backend="aot_eager") if use_compile else run
    inputs = linear_inputs(regime, dtype=dtype, device=device).leaves()
    norm = functional.norm_factored(inputs.weight, inputs.lora_A, inputs.lora_B, S).detach()
    y = layer(inputs, meaning, run, weight_norm=norm)
    check(inputs, y, meaning, mask_of(inputs.x.detach()))


def frozen_weight(inputs):
    inputs.weight.requires_grad_(False)
    return inputs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", [(33, 96, 40, 8), (33, 40, 96, 8), (1, 48, 32, 20)], ids=str)
def test_the_eager_function(meaning, dtype, bias, sizes, on_gpu, device, monkeypatch):
    """Wider and narrower than x, which decides on what the low-rank meaning keeps."""
    monkeypatch.setattr(linear, "dora_linear", None)  # not to be called
    inputs = frozen_weight(linear_inputs(sizes, dtype=dtype, bias=bias, device=device).leaves())
    y = layer(inputs, meaning)
    assert type(y.grad_fn).__name__ == "_LinearBackward"
    check(inputs, y, meaning, mask_of(inputs.x.detach()))
    with torch.no_grad():
        torch.testing.assert_close(layer(inputs, meaning), y, rtol=0, atol=0)
