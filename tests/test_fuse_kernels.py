"""Fused blocks on a device with kernels: one ``autograd.Function`` each, no further from float64 than the layers."""

import copy
import functools
from unittest import mock

import pytest
import test_fuse
import torch
from blocks import first_in_ci
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import dorac
from dorac import packed
from dorac.nn import linear4bit
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
    assert (linears.call_count, mlp.call_count) == ((2, 0) if kind is test_fuse.Attention else (0, 1))
    if kind is test_fuse.Attention:  # q, k and v, and the layer after them by itself
        plan = linears.call_args_list[0].args[5]
        assert any(layer.keeps_y for layer in plan.layers) == (how == "saved outputs")
    for i, (actual, other, want) in enumerate(zip(fused, unfused, truth, strict=True)):
        assert actual.dtype is other.dtype
        assert_rms_beside(actual, other, want, label=str(i))


def a_4_bit_layer(device, way, **options):
    """With bias, adapted, and the same over the dense weight."""
    torch.manual_seed(0)
    dense = torch.nn.Sequential(torch.nn.Linear(64, 96)).to(torch.bfloat16)
    model = copy.deepcopy(dense)
    if way == "nn":
        model[0] = fake.Linear4bit(64, 96, True, torch.bfloat16, torch.bfloat16)
    else:
        library = pytest.importorskip("bitsandbytes").nn
        model[0] = library.Linear4bit(64, 96, compute_dtype=torch.bfloat16, quant_type="nf4").bfloat16()
    model[0].load_state_dict(dense[0].state_dict())
    model.requires_grad_(False).to("cpu").to(device)
    dense.to(device)[0].weight.data.copy_(packed.of(model[0]).rows(0, 96))
    if way == "nn":
        for one in (model, dense):
            dorac.apply_dora(one, ["0"], 4, 8, init_lora_weights=False, **options)
            test_fuse.off_init(one)
        return model, dense
    peft, dropin = pytest.importorskip("peft"), pytest.importorskip("dorac.peft")
    from peft_models import off_init

    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["0"], use_dora=True, **options)
    both = []
    for one in (model, dense):
        one.is_loaded_in_4bit = one is model
        adapted = peft.get_peft_model(one, config)
        dropin.enable(adapted)
        both.append(off_init(adapted).train())
    return both


@pytest.mark.parametrize("hidden", first_in_ci(torch.float32, torch.bfloat16))
@pytest.mark.parametrize("how", ["plain", "cached", "saved outputs", "dropout"])
@pytest.mark.parametrize("way", ["nn", "peft"])
def test_a_4_bit_layer_by_itself(kernels, way, how, hidden):
    """One Function of ours, no call of the library's layer, and no further from float64."""
    model, dense = a_4_bit_layer(kernels, way, lora_dropout=0.3 if how == "dropout" else 0.0)
    if how == "saved outputs":
        dorac.save_outputs(model)
    if how == "cached":
        dorac.cache_norms(model)
    x = torch.randn(40, 64, device=kernels).to(hidden)

    def seeded(one, x):
        torch.manual_seed(0)
        return results(one, x)

    with mock.patch.object(linear4bit, "alone", return_value=None):
        expected = seeded(model, x)
    with (
        mock.patch.object(linear4bit, "alone", wraps=linear4bit.alone) as alone,
        mock.patch.object(eager_linears, "_apply", wraps=eager_linears._apply) as ours,
    ):
        actual = seeded(model, x)
    assert (alone.call_count, ours.call_count) == (1, 1)
    if how == "dropout":  # in float64 the mask would be another
        for one, other in zip(actual, expected, strict=True):
            assert one.dtype is other.dtype
            assert (one - other).abs().max() <= 2**-5 * other.abs().max()
        return
    truth = seeded(dense.double(), x.double())
    for i, (one, other, exact) in enumerate(zip(actual, expected, truth, strict=True)):
        assert one.dtype is other.dtype
        assert_rms_beside(one, other, exact, label=str(i))


def test_a_4_bit_layer_that_does_more_is_called(kernels):
    """A hook on the library's layer, a merged one, and few rows without gradients."""
    model, _ = a_4_bit_layer(kernels, "nn")
    x, base = torch.randn(40, 64, dtype=torch.bfloat16, device=kernels), model[0].base_layer
    with (
        torch.autocast(kernels, torch.bfloat16),
        mock.patch.object(eager_linears, "_apply", wraps=eager_linears._apply) as ours,
    ):
        y = model(x)
        assert ours.call_count == 1
        hook = base.register_forward_hook(lambda module, args, y: 2 * y)
        assert (model(x) - y).abs().max() > 0.1
        hook.remove()
        with torch.no_grad(), mock.patch.object(linear4bit, "FEW_ROWS", 40):
            with mock.patch.object(linear4bit.functional, "dora_over", wraps=linear4bit.functional.dora_over) as over:
                torch.testing.assert_close(model(x), y, rtol=2**-6, atol=2**-6)
            assert over.called == (kernels == "cuda")  # elsewhere the library has nothing faster for few rows
        dorac.merge(model)
        model(x)
        assert ours.call_count == 1


@pytest.mark.parametrize("selective", [False, True])
def test_a_4_bit_layer_under_a_checkpoint(kernels, selective):
    """The recomputation saves what forward saved, with a mode over the one or the other."""
    model, _ = a_4_bit_layer(kernels, "nn")
    x = torch.randn(40, 64, dtype=torch.bfloat16, device=kernels)
    trained = [p for p in model.parameters() if p.requires_grad]

    def gradients(checkpointed):
        leaf = x.clone().requires_grad_()
        options = {}
        if selective:
            policy = lambda context, op, *args, **_: CheckpointPolicy.PREFER_RECOMPUTE  # noqa: E731
            options["context_fn"] = functools.partial(create_selective_checkpoint_contexts, policy)
        with torch.autocast(kernels, torch.bfloat16):
            y = checkpoint(model, leaf, use_reentrant=False, **options) if checkpointed else model(leaf)
        return torch.autograd.grad(y.float().square().sum(), [leaf, *trained])

    for one, other in zip(gradients(True), gradients(False), strict=True):
        assert (one - other).abs().max() <= 2**-6 * other.abs().max()
