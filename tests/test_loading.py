"""``load_state_dict`` of models with adapted layers: what is refused, is refused before anything is written."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch import nn

import dorac
from dorac.nn import DoraLinear
from dorac.undo import Undo


def adapted(r=2):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 6))
    dorac.apply_dora(model, ["2", "3"], r=r, init_lora_weights=False)
    return model


def doubled(model):
    return {key: 2 * tensor for key, tensor in model.state_dict().items()}


def bits(model):
    return {key: tensor.clone() for key, tensor in model.state_dict().items()}


def assert_same(model, before):
    for key, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[key], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("assign", [False, True])
def test_a_merged_layer_is_refused_before_others_are_overwritten(strict, assign):
    model = adapted()
    state = doubled(model)
    model[3].merge()
    before = bits(model)
    with pytest.raises(ValueError, match=r"^3 is merged; unmerge it"):
        model.load_state_dict(state, strict=strict, assign=assign)
    assert_same(model, before)
    dorac.unmerge(model)
    model.load_state_dict(state, strict=strict, assign=assign)
    assert_same(model, state)


def test_a_model_that_was_wrapped_by_hand_is_guarded_once_it_is_merged():
    model = nn.Sequential(nn.Linear(8, 8), DoraLinear(nn.Linear(8, 8), 2))
    state = doubled(model)
    dorac.merge(model)
    before = bits(model)
    with pytest.raises(ValueError, match=r"^1 is merged"):
        model.load_state_dict(state)
    assert_same(model, before)


def test_a_merged_layer_refuses_by_itself():
    layer = DoraLinear(nn.Linear(8, 8), 2, init_lora_weights=False)
    state = doubled(layer)
    layer.merge()
    before = bits(layer)
    with pytest.raises(ValueError, match=r"^DoraLinear is merged"):
        layer.load_state_dict(state)
    assert_same(layer, before)


def test_the_name_is_that_of_the_model_which_loads():
    model = nn.Sequential(adapted())
    state = doubled(model)
    model[0][3].merge()
    before = bits(model[0])
    with pytest.raises(ValueError, match=r"^0\.3 is merged"):
        model.load_state_dict(state)
    assert_same(model[0], before)  # of what is beside it in a larger model, the modules before it were loaded


@pytest.mark.parametrize("strict", [False, True])
def test_an_adapter_of_another_rank_is_refused_before_anything_is_written(strict):
    """torch alone would load all that fits, base weights included, and raise then."""
    model, state = adapted(), doubled(adapted(3))
    before = bits(model)
    with pytest.raises(RuntimeError, match=r"Sequential:\n\tsize mismatch for 2.lora_A.*\n\t.*2.lora_B.*\n.*3.lora_A"):
        model.load_state_dict(state, strict=strict)
    assert_same(model, before)


def test_another_hook_may_make_it_fit():
    model, state = adapted(), adapted(3).state_dict()

    def cut(module, state_dict, *_):
        for key in state_dict:
            if key.endswith("lora_A"):
                state_dict[key] = state_dict[key][:2]
            elif key.endswith("lora_B"):
                state_dict[key] = state_dict[key][:, :2]

    model.register_load_state_dict_pre_hook(cut)
    model.load_state_dict(state)
    assert torch.equal(model[2].lora_A, state["2.lora_A"][:2])


def test_a_layer_loads_all_of_its_own_tensors_or_none():
    """A copy that fails in the middle, in a layer whose norm is cached."""
    layer = DoraLinear(nn.Linear(8, 8), 2, init_lora_weights=False)
    model = nn.Sequential(layer)
    dorac.cache_norms(model)
    state = doubled(model)
    state["0.lora_B"] = torch.zeros(8, 2).to_sparse_csr()  # which torch cannot copy into a dense parameter
    before = bits(layer)
    with pytest.raises(RuntimeError, match=r"lora_B"):
        model.load_state_dict(state)
    names = [name for name, _ in layer.named_parameters(recurse=False)]
    assert all(torch.equal(getattr(layer, name), before[name]) for name in names)
    x = torch.randn(3, 8)
    assert torch.equal(model(x), copy.deepcopy(model)(x))  # which takes its own norm


def test_unloading_takes_the_guard_away():
    model = adapted()
    stock = vars(nn.Sequential()).keys()
    assert vars(model).keys() > stock
    dorac.merge(model, unload=True)
    assert vars(model).keys() == stock
    assert not model._load_state_dict_pre_hooks


class Interrupted(nn.Module):
    """A module whose loading is interrupted, the last in its model."""

    def _load_from_state_dict(self, *_):
        raise KeyboardInterrupt


def assert_interrupted_loading_changes_nothing(model):
    state, before = doubled(model), bits(model)
    with pytest.raises(KeyboardInterrupt):
        model.load_state_dict(state)
    assert_same(model, before)


def with_an_end():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 6), Interrupted())
    dorac.apply_dora(model, ["2"], r=2, init_lora_weights=False)
    return model


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_loads_itself_all_or_nothing(copied):
    assert_interrupted_loading_changes_nothing(copied(with_an_end()))
    original = adapted()
    before = bits(original)
    twin = copied(original)
    state = doubled(twin)
    twin.load_state_dict(state)
    assert_same(twin, state)
    assert_same(original, before)


def test_a_dropped_model_is_freed_at_once():
    model = adapted()
    alive = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert alive() is None
    finally:
        gc.enable()


def test_an_unloaded_model_loads_as_torch_does():
    model = dorac.merge(adapted(), unload=True)
    assert "load_state_dict" not in vars(model)
    model.load_state_dict(doubled(model))


def test_a_loading_of_the_model_s_own_is_left_to_it():
    model = nn.Sequential(nn.Linear(8, 8))
    model.load_state_dict = mine = lambda *args, **kwargs: "mine"
    dorac.apply_dora(model, ["0"], r=2)
    assert model.load_state_dict is mine
    dorac.merge(model, unload=True)
    assert model.load_state_dict is mine


def test_what_does_not_change_is_not_copied(monkeypatch):
    """Of a checkpoint of the whole model the frozen weights are as they were; a zero of another sign is a change."""
    model, copies = adapted(), []
    with torch.no_grad():
        model[0].bias.zero_()
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    state["3.base_layer.bias"][0] = 1
    state["0.bias"].neg_()
    monkeypatch.setattr(Undo, "keep", lambda log, *tensors: copies.extend(t for t in tensors if t is not None))
    model.load_state_dict(state)
    names = {id(p): name for name, p in model.named_parameters()}
    assert {names[id(t)] for t in copies if "lora" not in names[id(t)]} == {"0.bias", "3.base_layer.bias"}
    copies.clear()
    model.load_state_dict(doubled(model), True, True)  # assigned: nothing is written
    assert all("lora" in names[id(t)] for t in copies)


def test_a_loading_of_the_class_gets_what_it_is_given():
    class Own(nn.Sequential):
        def load_state_dict(self, state_dict, strict=True):
            return super().load_state_dict(state_dict, strict)

    model = Own(nn.Linear(8, 8))
    dorac.apply_dora(model, ["0"], r=2)
    state = doubled(model)
    model.load_state_dict(state, strict=False)
    assert_same(model, state)


def test_a_value_of_another_layout_is_torch_s_to_refuse():
    model = adapted()
    before, state = bits(model), doubled(model)
    state["0.weight"] = state["0.weight"].to_sparse()
    with pytest.raises(RuntimeError, match=r"Error\(s\) in loading state_dict"):
        model.load_state_dict(state)
    assert_same(model, before)
