"""A merge or an unmerge that is refused leaves every bit, and names the layer that it is refused for."""

import copy

import pytest
import torch
from torch import nn

import dorac
from dorac.apply import dora_layers
from dorac.nn import DoraConv2d, DoraEmbedding, DoraLinear


def linears(dtype=torch.float16, count=3):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(8, 8, dtype=dtype) for _ in range(count)))
    dorac.apply_dora(model, [str(i) for i in range(count)], r=2, init_lora_weights=False)
    with torch.no_grad():
        for layer in dora_layers(model).values():
            layer.lora_magnitude_vector.mul_(0.8 + 0.4 * torch.rand(8))
    return model


def bits(model):
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def assert_same(model, before):
    for key, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[key], rtol=0, atol=0, equal_nan=True)


@torch.no_grad()
def overflow(layer):
    """A row of V is so uneven that g * V is beyond float16 although m and n are not."""
    layer.lora_magnitude_vector[0] = 1e6


@pytest.mark.parametrize("unload", [False, True])
@pytest.mark.parametrize("last", ["overflow", "nan"])
def test_a_refused_merge_of_float16_layers_changes_nothing(unload, last):
    """A row with g = 0 could not be unmerged again, and of the others half of the elements would not come back."""
    model = linears()
    with torch.no_grad():
        model[0].lora_magnitude_vector[0] = 0
        if last == "nan":
            model[2].lora_A[0, 0] = float("nan")
    if last == "overflow":
        overflow(model[2])
    before, modules = bits(model), list(model.modules())
    with pytest.raises(ValueError, match=r"^2: .*not finite"):
        dorac.merge(model, unload=unload)
    assert not any(layer.merged for layer in model)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert_same(model, before)


def test_a_magnitude_above_the_bound_is_merged_if_its_weight_is_finite():
    """|g V| <= |m| decides most layers; above it the weight itself does."""
    model = linears()
    with torch.no_grad():
        model[1].lora_magnitude_vector[3] = 60000.0  # no element of its row reaches 65504
    dorac.merge(model)
    assert all(layer.merged for layer in model)
    assert model[1].weight.isfinite().all()


def test_a_refused_merge_computes_no_weight_of_other_layers(monkeypatch):
    """Deciding costs the norms, which the merge takes at any rate: each is computed once."""
    model = linears()
    calls = []
    original = dorac.functional.merge_weight
    monkeypatch.setattr(dorac.functional, "merge_weight", lambda *a, **k: calls.append(k) or original(*a, **k))
    overflow(model[2])
    with pytest.raises(ValueError, match=r"^2: "):
        dorac.merge(model)
    assert len(calls) == 1
    calls.clear()
    dorac.merge(nn.Sequential(*model[:2]))
    assert len(calls) == 2
    assert all(call["weight_norm"] is not None for call in calls)


def test_a_refused_unmerge_changes_nothing():
    model = linears(torch.float32)
    with torch.no_grad():
        model[2].lora_magnitude_vector[5] = 0
    dorac.merge(model)
    before = bits(model)
    with pytest.raises(ValueError, match=r"^2: cannot unmerge rows 5"):
        dorac.unmerge(model)
    assert all(layer.merged for layer in model)
    assert_same(model, before)


LAYERS = {
    "linear": lambda: DoraLinear(nn.Linear(8, 6), 2, init_lora_weights=False),
    "embedding": lambda: DoraEmbedding(nn.Embedding(8, 6), 2, init_lora_weights=False),
    "conv2d": lambda: DoraConv2d(nn.Conv2d(4, 6, 3, groups=2), 2, init_lora_weights=False, grouped_lora_A=True),
}
KINDS = pytest.mark.parametrize("kind", LAYERS)


@KINDS
def test_a_second_call_changes_nothing(kind):
    layer = LAYERS[kind]()
    layer.unmerge()
    layer.merge()
    before, norm = bits(layer), layer.merged_norm
    layer.merge()
    dorac.merge(layer)
    assert_same(layer, before)
    assert layer.merged_norm is norm


@KINDS
def test_in_inference_mode_and_on(kind):
    """What is merged there can be unmerged, moved, copied and trained outside."""
    layer, twin = LAYERS[kind](), None
    weight = layer.weight.detach().clone()
    twin = copy.deepcopy(layer)
    with torch.inference_mode():
        layer.merge()
    twin.merge()
    assert not layer.merged_norm.is_inference()
    assert torch.equal(layer.weight, twin.weight)
    layer = copy.deepcopy(layer).double().float()
    with torch.inference_mode():
        dorac.unmerge(layer)
    torch.testing.assert_close(layer.weight, weight)
    layer._norm()
    assert not any(t.is_inference() for t in layer.state_dict().values())


@KINDS
def test_weights_made_in_inference_mode_are_refused_by_name(kind):
    with torch.inference_mode():
        layer = LAYERS[kind]()
    model = nn.Sequential(LAYERS["linear"](), layer)
    before = bits(model)
    with pytest.raises(ValueError, match=r"^1: .*inference_mode"):
        dorac.merge(model)
    assert not model[0].merged
    assert_same(model, before)
    with torch.inference_mode():
        dorac.merge(model)
    before = bits(model)
    with pytest.raises(ValueError, match=r"^1: .*inference_mode"):
        dorac.unmerge(model)
    assert model[0].merged
    assert_same(model, before)


@KINDS
def test_meta_layers_are_merged_without_values(kind):
    layer = LAYERS[kind]().to("meta")
    layer.merge()
    assert layer.merged
    assert layer.merged_norm.is_meta
    dorac.merge(nn.Sequential(layer))


@KINDS
def test_the_norm_of_a_merged_layer_moves_with_it(kind):
    layer = LAYERS[kind]()
    layer.merge()
    assert layer.double().merged_norm.dtype == torch.float64
    assert layer.half().merged_norm.dtype == torch.float64  # never cast below float32
    assert layer.to("meta").merged_norm.is_meta


@KINDS
def test_a_weight_that_requires_a_gradient_is_merged(kind):
    layer = LAYERS[kind]()
    layer.weight.requires_grad_(True)
    layer.merge()
    assert layer.weight.requires_grad
    assert layer.weight.is_leaf


def test_tied_weights_are_refused_before_anything_is_written():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[2].weight = model[1].weight
    dorac.apply_dora(model, ["0", "1"], r=2, init_lora_weights=False)
    before = bits(model)
    for unload in (False, True):
        with pytest.raises(ValueError, match=r"tied to 2.weight"):
            dorac.merge(model, unload=unload)
    assert not any(layer.merged for layer in dora_layers(model).values())
    assert_same(model, before)


def test_a_layer_in_two_places_is_merged_and_unmerged_once():
    layer = DoraLinear(nn.Linear(8, 8), 2, init_lora_weights=False)
    with torch.no_grad():
        layer.lora_magnitude_vector.mul_(1.5)
    alone = copy.deepcopy(layer)
    alone.merge()
    model = nn.Sequential(layer, nn.ReLU(), layer)
    dorac.merge(model)
    assert torch.equal(model[0].weight, alone.weight)
    alone.unmerge()
    dorac.unmerge(model)
    assert torch.equal(model[2].weight, alone.weight)
