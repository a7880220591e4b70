"""Fused blocks on a device with kernels: one ``autograd.Function`` each, no further from float64 than the layers."""

import copy
from unittest import mock

import pytest
import test_fuse
import torch
from blocks import first_in_ci

import dorac
from dorac import packed
from dorac.ops import eager_linears, eager_mlp, front
from dorac.testing import quantised_layers as fake
from dorac.testing.rounding import assert_rms_beside


@pytest.fixture
def kernels(device, monkeypatch):
    if device == "cpu":  # in the interpreter
        monkeypatch.setattr(front, "has_kernels", lambda *tensors: True)
    return device


def results(model, x):
    """The output and all gradients; but for the truth under autocast, as PEFT's defaults have it."""
    leaf = x.clone().requires_grad_()
    with torch.autocast(x.device.type, torch.bfloat16, enabled=x.dtype is not torch.float64):
        y = model(leaf)
    trained = [p for p in model.parameters() if p.requires_grad]
    return [y, *torch.autograd.grad(y.double().square().sum(), [leaf, *trained])]


@pytest.mark.parametrize("how", ["plain", "cached", "at a strength"])
@pytest.mark.parametrize(
    "kind",
    [test_fuse.Attention, test_fuse.GatedMLP, test_fuse.JoinedGateLast],
    ids=["attention", "mlp", "joined"],
)
def test_a_block(kernels, monkeypatch, kind, how):
    for name, size in (("HIDDEN", 64), ("INNER", 96)):
        monkeypatch.setattr(test_fuse, name, size)
    block = torch.nn.Sequential(kind())
    dorac.apply_dora(block.to(kernels, torch.bfloat16), "all-linear", 8, 16, init_lora_weights=False)
    test_fuse.off_init(block)
    if how == "at a strength":
        dorac.set_strength(block, 0.5)
    x = torch.randn(16, 64, dtype=torch.bfloat16, device=kernels)
    truth, unfused = results(copy.deepcopy(block).double(), x.double()), results(block, x)
    if how == "cached":
        dorac.cache_norms(block)
    assert not dorac.fuse(block).left
    with (
        mock.patch.object(eager_linears, "_apply", wraps=eager_linears._apply) as linears,
        mock.patch.object(eager_mlp, "_apply", wraps=eager_mlp._apply) as mlp,
    ):
        fused = results(block, x)
    assert (linears.call_count, mlp.call_count) == ((1, 0) if kind is test_fuse.Attention else (0, 1))
    for i, (actual, other, exact) in enumerate(zip(fused, unfused, truth, strict=True)):
        assert_rms_beside(actual, other, exact, label=str(i))


@pytest.mark.parametrize("how", ["plain", "cached", "saved outputs"])
@pytest.mark.parametrize("hidden", first_in_ci(torch.float32, torch.bfloat16))
@pytest.mark.parametrize("kind", [test_fuse.Attention, test_fuse.GatedMLP], ids=["attention", "mlp"])
def test_a_block_of_4_bit_layers(kernels, monkeypatch, kind, how, hidden):
    """Weights are made dense for each product: what is near float64 is near that of the dense weights."""
    for name, size in (("HIDDEN", 64), ("INNER", 96)):
        monkeypatch.setattr(test_fuse, name, size)
    block = torch.nn.Sequential(kind()).to(torch.bfloat16)
    exact = copy.deepcopy(block)
    for name, layer in [*block.named_modules()]:
        if isinstance(layer, torch.nn.Linear):
            size = layer.in_features, layer.out_features
            quantised = fake.Linear4bit(*size, layer.bias is not None, torch.bfloat16, torch.bfloat16)
            quantised.load_state_dict(layer.state_dict())
            block.set_submodule(name, quantised.to("cpu").to(kernels))
            dense = packed.of(block.get_submodule(name)).rows(0, layer.out_features)
            exact.get_submodule(name).weight.data.copy_(dense)
    for one in (block, exact):
        dorac.apply_dora(one.to(kernels), "all-linear", 8, 16, init_lora_weights=False)
    test_fuse.off_init(block)
    trained = {name: p for name, p in block.named_parameters() if p.requires_grad}
    exact.load_state_dict({name: p.detach() for name, p in trained.items()}, strict=False)
    x = torch.randn(16, 64, dtype=torch.bfloat16, device=kernels).to(hidden)
    truth, unfused = results(exact.double(), x.double()), results(block, x)
    if how == "cached":
        dorac.cache_norms(block)
    elif how == "saved outputs":
        dorac.save_outputs(block)
    assert not dorac.fuse(block).left
    with (
        mock.patch.object(eager_linears, "_apply", wraps=eager_linears._apply) as linears,
        mock.patch.object(eager_mlp, "_apply", wraps=eager_mlp._apply) as mlp,
    ):
        fused = results(block, x)
    assert (linears.call_count, mlp.call_count) == ((1, 0) if kind is test_fuse.Attention else (0, 1))
    if kind is test_fuse.Attention:
        plan = linears.call_args.args[5]
        assert any(layer.keeps_y for layer in plan.layers) == (how == "saved outputs")
    for i, (actual, other, want) in enumerate(zip(fused, unfused, truth, strict=True)):
        assert actual.dtype is other.dtype
        assert_rms_beside(actual, other, want, label=str(i))
