"""What Dynamo goes through for a layer: each function of ours that it inlines costs the user a millisecond or two."""

import collections
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.symbolic_convert import InliningInstructionTranslator

import dorac

PACKAGE = str(Path(dorac.__file__).parent)
LAYERS = 3


def inlined(model: nn.Module, monkeypatch) -> collections.Counter:
    """How often functions of dorac are inlined for each layer of the model, by name."""
    found, stock = collections.Counter(), InliningInstructionTranslator.inline_call_

    def inline(tracer):
        if tracer.f_code.co_filename.startswith(PACKAGE):
            found[tracer.f_code.co_qualname] += 1
        return stock(tracer)

    monkeypatch.setattr(InliningInstructionTranslator, "inline_call_", inline)
    torch.compile(model, backend="eager", fullgraph=True)(torch.randn(3, 8))
    assert all(count % LAYERS == 0 for count in found.values()), found
    return collections.Counter({name: count // LAYERS for name, count in found.items()})


@pytest.mark.parametrize("cached", [True, False])
def test_functions_of_a_layer(cached, monkeypatch):
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(LAYERS)))
    dorac.apply_dora(model, "all-linear", r=2, lora_alpha=4, init_lora_weights=False)
    if cached:
        dorac.cache_norms(model)
    found = inlined(model, monkeypatch)
    assert found["DoraLinear.forward"] == found["are_usual"] == 1
    assert not found["fit"] + found["check_float"], found
    assert found.total() <= 30, found


def test_functions_of_the_drop_in(monkeypatch):
    peft = pytest.importorskip("peft")
    import dorac.peft

    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(LAYERS)))
    config = peft.LoraConfig(use_dora=True, r=2, target_modules=["0", "1", "2"], init_lora_weights=False)
    with dorac.peft.enable():
        model = peft.get_peft_model(model, config)
        dorac.cache_norms(model)
        found = inlined(model.base_model.model, monkeypatch)
    assert found["are_usual"] == 1, found
    assert not found["fit"] + found["check_float"], found
    assert found.total() <= 55, found
