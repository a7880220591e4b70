"""Where a model holds what it holds: names against torch's own, shared modules, and one piece of memory."""

import torch
from torch import nn

from dorac import offload, places
from dorac.nn import DoraLinear


def shared_model() -> nn.Sequential:
    """``0`` and ``2`` are one block, whose layer is also ``1.inner``; the weight of ``3`` is that of ``0.0``."""
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    between = nn.Module()
    between.inner, between.nothing = block[0], None
    head = nn.Linear(4, 4, bias=False)
    head.weight = block[0].weight
    return nn.Sequential(block, between, block, head)


def test_names_are_those_of_a_state_dict():
    model = shared_model()
    index = places.Index(model)
    assert list(index.modules) == list(model.modules())
    assert [names[0] for names in index.modules.values()] == [name for name, _ in model.named_modules()]
    expected = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        expected.setdefault(parameter, []).append(name)
    assert {p: index.names(p) for p in model.parameters()} == expected
    assert index.names(model[3].weight) == ["0.0.weight", "1.inner.weight", "2.0.weight", "3.weight"]
    assert index.names(nn.Parameter(model[3].weight.detach())) == []
    assert sorted(name for names in expected.values() for name in names) == sorted(model.state_dict())


def test_a_place_has_one_name():
    model = shared_model()
    named = list(places.named_places(model))
    assert [name for name, _ in named] == ["", "0", "0.0", "0.1", "1", "1.inner", "2", "3"]
    assert all(model.get_submodule(name) is module for name, module in named)
    parents = {(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name, _ in named[1:]}
    assert len(parents) == len(named) - 1


def test_dora_layers():
    model = shared_model()
    layer = DoraLinear(model[0][0], r=2, init_lora_weights=False)
    model[0][0] = model[1].inner = layer
    assert places.dora_layers(model) == {"0.0": layer, "1.inner": layer}
    assert places.dora_layers(layer) == {"": layer}
    assert layer.named_base_weights() == {"weight": layer.base_layer.weight}
    nn.utils.parametrizations.weight_norm(layer.base_layer)
    assert layer.named_base_weights() == {}


def test_one_piece_of_memory():
    """Views that begin where the whole does, and no others; what has no memory is only itself."""
    model = shared_model()
    whole = model[0][0].weight
    model[3].weight = nn.Parameter(whole.detach()[:2])
    model[0][1].weight = nn.Parameter(whole.detach()[1])
    model.append(nn.Linear(4, 4, bias=False, device="meta"))
    model.append(nn.Linear(4, 4, bias=False, device="meta"))
    index = places.Index(model)
    both = ["0.0.weight", "1.inner.weight", "2.0.weight", "3.weight"]
    assert index.names_in_memory(whole) == index.names_in_memory(model[3].weight) == both
    assert index.names_in_memory(model[0][1].weight) == ["0.1.weight", "2.1.weight"]
    assert index.names_in_memory(model[4].weight) == ["4.weight"]


def test_one_walk(monkeypatch):
    """However many parameters are asked for, a module is looked at once."""
    seen = []
    originals = offload.originals
    monkeypatch.setattr(offload, "originals", lambda module: (seen.append(module), originals(module))[1])
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(50)))
    index = places.Index(model)
    assert [index.names_in_memory(p) for p in model.parameters()] == [[name] for name, _ in model.named_parameters()]
    assert seen == list(model.modules())
