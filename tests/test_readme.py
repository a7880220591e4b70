"""The recipes of the README run as they are written, and give what the textbook gives."""

import re
from pathlib import Path

import pytest
import torch

import dorac
from dorac import reference

README = (Path(dorac.__file__).parents[1] / "README.md").read_text()
ADAPTER = ("lora_A", "lora_B", "lora_magnitude_vector")


def recipe(heading: str) -> str:
    """The first Python block under a heading."""
    return re.search(rf"^### {re.escape(heading)}$.*?```python\n(.*?)```", README, re.DOTALL | re.MULTILINE).group(1)


def wrapped(norm_grad: bool = False) -> torch.nn.Module:
    """Two adapted layers with a nonlinearity between them, off the adapters' initial state."""
    model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4)).double()
    dorac.apply_dora(model, "all-linear", r=2, lora_alpha=3, init_lora_weights=False, norm_grad=norm_grad)
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.lora_magnitude_vector *= 0.8 + 0.4 * torch.rand_like(layer.lora_magnitude_vector)
    return model


def textbook(model, adapter, x, norm_grad=False):
    for i in (0, 2):
        base, tensors = model[i].base_layer, (adapter[f"{i}.{name}"] for name in ADAPTER)
        x = reference.dora_linear(x, base.weight, *tensors, base.bias, scaling=1.5, norm_grad=norm_grad)
        x = x.tanh() if i == 0 else x
    return x


def trained(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("norm_grad", [False, True])
def test_per_sample_gradients(norm_grad):
    model = wrapped(norm_grad)
    x, targets = torch.randn(5, 6, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    names = {"torch": torch, "dorac": dorac, "model": model, "inputs": x, "targets": targets}
    exec(recipe("Per-sample gradients"), names)
    gradients = names["gradients"]
    assert set(gradients) == {f"{i}.{name}" for i in (0, 2) for name in ADAPTER}
    for i in range(5):
        leaves = {name: t.requires_grad_() for name, t in trained(model).items()}
        loss = torch.nn.functional.mse_loss(textbook(model, leaves, x[i], norm_grad), targets[i])
        expected = dict(zip(leaves, torch.autograd.grad(loss, leaves.values()), strict=True))
        torch.testing.assert_close({name: gradients[name][i] for name in leaves}, expected)
    if norm_grad:
        return
    compiled = torch.compile(names["per_sample"], fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(names["adapter"], x, targets), gradients)


def test_ensemble_of_adapters(tmp_path):
    model, x = wrapped(), torch.randn(5, 6, dtype=torch.float64)
    expected, directories = [], [tmp_path / str(k) for k in range(3)]
    for directory in directories:
        with torch.no_grad():
            for p in trained(model):
                model.get_parameter(p).mul_(1.1).add_(0.1)
        dorac.save_adapter(model, directory)
        expected.append(textbook(model, trained(model), x))
    names = {"torch": torch, "dorac": dorac, "model": model, "inputs": x, "directories": directories}
    exec(recipe("An ensemble of adapters over one base"), names)
    assert names["adapters"]["0.lora_A"].shape == (3, 2, 6)
    torch.testing.assert_close(names["outputs"], torch.stack(expected))
    assert not torch.allclose(expected[0], expected[1])
    compiled = torch.compile(torch.vmap(names["run"], in_dims=(0, None)), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(names["adapters"], x), names["outputs"])
