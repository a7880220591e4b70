"""``save_outputs``: which layers it reaches, and what they save then."""

import copy

import pytest
import torch
from torch import nn

import dorac
from dorac.ops import front, packed_product
from dorac.testing import quantised_layers


def adapted(bias=False):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 16), nn.Linear(16, 24, bias=bias), nn.SiLU(), nn.Linear(24, 16, bias=bias))
    dorac.apply_dora(model.bfloat16(), ["0", "1", "3"], r=2, init_lora_weights=False, adapter_dtype=torch.bfloat16)
    return model


def saved(model, tokens) -> list[int]:
    """Where the saved tensors of a forward lie."""
    places = []

    def pack(tensor):
        places.append(tensor.untyped_storage().data_ptr())
        return tensor

    outputs = []
    handles = [m.register_forward_hook(lambda m, a, y: outputs.append(y)) for m in (model[1], model[3])]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(tokens).sum().backward()
    for handle in handles:
        handle.remove()
    return [y.untyped_storage().data_ptr() in places for y in outputs]


@pytest.fixture
def kernels(device, monkeypatch):
    if device == "cpu":  # in the interpreter
        monkeypatch.setattr(front, "has_kernels", lambda *tensors: True)
    return device


def test_what_is_saved(kernels):
    tokens = torch.arange(9, device=kernels)
    model = adapted().to(kernels)
    assert saved(model, tokens) == [True, False]  # SiLU saves what it is of
    dorac.save_outputs(model)
    assert saved(model, tokens) == [True, True]
    assert saved(copy.deepcopy(model), tokens) == [True, True]
    dorac.save_outputs(model, False)
    assert saved(model, tokens) == [True, False]
    with_bias = adapted(bias=True).to(kernels)
    dorac.save_outputs(with_bias)
    assert saved(with_bias, tokens) == [True, False]


def test_the_gradients_stay(kernels):
    tokens = torch.arange(9, device=kernels)
    gradients = []
    for mode in (False, True):
        model = adapted().to(kernels)
        dorac.save_outputs(model, mode)
        model(tokens).square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, grad in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], grad, rtol=2e-2, atol=2e-2 * grad.abs().max().item(), msg=name)


def test_a_packed_weight_is_looked_at_once(kernels):
    """Where the norm is kept: until the weight is another one, whatever was learned of it before."""
    torch.manual_seed(0)
    base = quantised_layers.Linear4bit(64, 48, bias=False, compute_dtype=torch.bfloat16, dtype=torch.bfloat16)
    base.weight.to("cpu")  # where it is quantised
    base.quant_state.to(kernels)
    model = nn.Sequential(base).to(kernels)
    dorac.apply_dora(model, ["0"], r=4, init_lora_weights=False, adapter_dtype=torch.bfloat16)
    x = torch.randn(5, 64, dtype=torch.bfloat16, device=kernels)

    def gradient():
        model[0].zero_grad()
        model(x).square().sum().backward()
        return model[0].lora_magnitude_vector.grad.clone()

    def step():
        torch.optim.SGD(model.parameters(), 0.01).step()

    with torch.no_grad():
        model[0].lora_magnitude_vector[3] = 0  # whose gradient is read from the packed weight
    dorac.cache_norms(model)
    dorac.save_outputs(model)
    seen = []
    for change in (lambda: None, lambda: None, step, lambda: base.quant_state.absmax.mul_(2)):
        change()
        actual = gradient()
        seen.append(model[0].kept.at.pieces.held)
    assert seen[0] is seen[1] is seen[2]
    assert type(seen[3]) is packed_product.Held
    assert seen[3] is not seen[2]
    dorac.save_outputs(model, False)
    expected = gradient()
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2 * expected.abs().max().item())
    base.quant_state.absmax = base.quant_state.absmax / 2
    dorac.save_outputs(model)
    gradient()
    assert model[0].kept.at.pieces.held.reading().pieces[2] is base.quant_state.absmax


def test_a_part_of_a_model_and_a_layer():
    model = adapted()
    dorac.save_outputs(model[3])
    assert (model[1].save_output, model[3].save_output) == (False, True)
    assert not hasattr(model[0], "save_output")


def test_layers_of_peft():
    peft = pytest.importorskip("peft")
    import dorac.peft

    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(8, 8)), peft.LoraConfig(r=2, target_modules=["0"], use_dora=True)
    )
    with pytest.raises(ValueError, match="holds no linear DoRA layer of dorac's"):
        dorac.save_outputs(model)
    dorac.peft.enable(model)
    dorac.save_outputs(model)
    assert model.base_model.model[0].save_output is True
    dorac.peft.disable(model)
    assert model(torch.randn(2, 8)).isfinite().all()


def test_bad_input():
    with pytest.raises(TypeError, match="mode must be a bool, got int"):
        dorac.save_outputs(adapted(), 1)
    with pytest.raises(ValueError, match="Sequential holds no linear DoRA layer of dorac's"):
        dorac.save_outputs(nn.Sequential(nn.Linear(4, 4)))
