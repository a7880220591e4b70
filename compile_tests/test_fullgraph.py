"""Every module compiles to one graph, from the first call in a fresh process, and computes what eager does."""

import copy
import subprocess
import sys

import pytest
import torch

import dorac


def build(kind: str) -> tuple[torch.nn.Module, int]:
    options = {"r": 4, "init_lora_weights": False}
    if kind == "conv1d":
        utils = pytest.importorskip("transformers.pytorch_utils")
        layer = dorac.nn.DoraLinear(utils.Conv1D(32, 24), **options)
    elif kind == "bfloat16":
        layer = dorac.nn.DoraLinear(torch.nn.Linear(24, 32, dtype=torch.bfloat16), **options)
    elif kind == "trainable_base":
        layer = dorac.nn.DoraLinear(torch.nn.Linear(24, 32), **options)
        layer.base_layer.requires_grad_(True)
    else:
        layer = dorac.nn.DoraLinear(torch.nn.Linear(24, 32, bias=kind != "no_bias"), **options)
    with torch.no_grad():
        layer.lora_magnitude_vector *= 1 + 0.1 * torch.rand(32)
    if kind == "merged":
        layer.merge()
    return layer


@pytest.mark.parametrize("kind", ["linear", "no_bias", "conv1d", "bfloat16", "trainable_base", "merged"])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.full)])
def test_equals_eager(kind, backend, device):
    layer = build(kind).to(device)
    twin = copy.deepcopy(layer)
    x = torch.randn(2, 5, 24, dtype=layer.weight.dtype, device=device, requires_grad=True)
    twin_x = x.detach().clone().requires_grad_()
    y, twin_y = torch.compile(layer, fullgraph=True, backend=backend)(x), twin(twin_x)
    # Float32 results differ by the order of sums; bfloat16 ones by a rounding of inner or of a gradient.
    tolerance = {"rtol": 1.6e-2, "atol": 1e-2} if kind == "bfloat16" else {}
    torch.testing.assert_close(y, twin_y, **tolerance)
    y.square().sum().backward()
    twin_y.square().sum().backward()
    torch.testing.assert_close(x.grad, twin_x.grad, **tolerance)
    for (name, p), q in zip(layer.named_parameters(), twin.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, msg=name, **tolerance)


def test_dropout_draws_the_same_mask():
    base = torch.nn.Linear(24, 32)
    layer = dorac.nn.DoraLinear(base, r=4, lora_dropout=0.4, init_lora_weights=False)
    x = torch.randn(8, 24)
    torch.manual_seed(1)
    eager = layer(x)
    torch.manual_seed(1)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(compiled, eager)
    layer.eval()
    assert not torch.equal(layer(x), eager)


def test_modes_flip_without_a_break():
    """train and eval, grad and no_grad, merged and not: a graph each, all right."""
    layer = build("linear")
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 24)
    expected = layer(x)
    torch.testing.assert_close(compiled(x), expected)
    layer.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), expected)
    with torch.inference_mode():
        torch.testing.assert_close(compiled(x), expected)
    layer.merge()
    torch.testing.assert_close(compiled(x), expected)
    layer.unmerge()
    torch.testing.assert_close(compiled(x), expected)


def test_compiled_training_step_learns():
    layer = build("linear")
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=1e-2)
    x, target = torch.randn(16, 24), torch.randn(16, 32)
    losses = []
    for _ in range(20):
        loss = torch.nn.functional.mse_loss(compiled(x), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_cold_start_in_a_fresh_process():
    """The first dorac call of a process may be the compiled one."""
    code = (
        "import torch, dorac\n"
        "layer = dorac.nn.DoraLinear(torch.nn.Linear(6, 5), r=2, init_lora_weights=False)\n"
        "y = torch.compile(layer, fullgraph=True, backend='aot_eager')(torch.randn(3, 6))\n"
        "y.sum().backward()\n"
        "assert layer.lora_magnitude_vector.grad is not None\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
