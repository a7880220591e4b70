"""DeepSpeed ZeRO-3 under the drop-in, emulated: parameters hold nothing except while they are gathered."""

import copy
import sys
import types

import peft_models
import pytest
import torch
from peft_models import gradients, target
from torch import Tensor, nn

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from peft.tuners.lora import LoraLayer  # noqa: E402

import dorac.peft  # noqa: E402

KINDS = ["linear", "gpt2_conv1d", "embedding", "conv1d", "conv2d", "conv3d"]


class GatheredParameters:
    """``deepspeed.zero.GatheredParameters`` for one process; those in ``missing`` come back a row short."""

    missing: tuple[Tensor, ...] = ()

    def __init__(self, params, modifier_rank=None, fwd_module=None) -> None:
        self.params = [p for p in params if p.numel() == 0]
        assert modifier_rank is None or not self.params  # else what rank 0 has is sent around after every forward

    def __enter__(self) -> None:
        for p in self.params:
            p.data = p.whole[:-1] if any(p is m for m in self.missing) else p.whole

    def __exit__(self, *exception) -> None:
        for p in self.params:
            p.data = torch.empty(0, dtype=p.whole.dtype)


@pytest.fixture
def deepspeed(monkeypatch):
    module = types.ModuleType("deepspeed")
    module.zero = types.SimpleNamespace(GatheredParameters=GatheredParameters)
    monkeypatch.setitem(sys.modules, "deepspeed", module)
    monkeypatch.setattr(transformers.integrations, "is_deepspeed_zero3_enabled", lambda: True)
    monkeypatch.setattr(GatheredParameters, "missing", ())


def partition(model: nn.Module) -> nn.Module:
    """Every parameter parted. As DeepSpeed's do, modules gather their own for their forward and their backward."""
    for number, p in enumerate(model.parameters()):
        p.ds_id, p.ds_shape, p.whole = number, p.shape, p.data
        p.data = torch.empty(0, dtype=p.dtype)
    for module in model.modules():
        if list(module.parameters(recurse=False)) and not isinstance(module, nn.ParameterDict):
            gathering = []

            def gather(module, *_, gathering=gathering):
                gathering.append(GatheredParameters(list(module.parameters(recurse=False))))
                gathering[-1].__enter__()

            def release(*_, gathering=gathering):
                gathering.pop().__exit__()

            module.register_forward_pre_hook(gather)
            module.register_forward_hook(release)
            if not isinstance(module, dorac.peft.DoraLinearLayer):  # which is called with keywords and returns a tuple
                module.register_full_backward_pre_hook(gather)
        if isinstance(module, LoraLayer):  # DeepSpeed notes that its forward uses the parameters of the dictionaries
            others = [*module.lora_embedding_A.values(), *module.lora_embedding_B.values()]
            magnitudes = [m.weight for m in module.lora_magnitude_vector.values()]
            module.register_full_backward_pre_hook(
                lambda *_, others=others + magnitudes: GatheredParameters(others).__enter__()
            )
    return model


@pytest.mark.parametrize("lora_dropout", [0.0, 0.5])
@pytest.mark.parametrize("kind", KINDS)
def test_as_with_whole_parameters(kind, lora_dropout, deepspeed):
    """Output, gradients, and nothing gathered left behind."""
    _, whole = peft_models.twins(kind, lora_dropout=lora_dropout)
    parted = partition(copy.deepcopy(whole))
    x = peft_models.KINDS[kind].input(3, torch.float64)
    outputs = []
    for model in (parted, whole):
        torch.manual_seed(0)
        outputs.append(model(x))
    assert all(p.numel() == 0 for p in parted.parameters())
    torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)
    for y in outputs:
        y.square().sum().backward()
    actual, expected = gradients(parted), gradients(whole)
    assert len(actual) == 3
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_new_magnitude(kind, deepspeed):
    _, model = peft_models.twins(kind)
    layer = target(model)
    magnitude = layer.lora_magnitude_vector["default"]
    lora_A, lora_B = dorac.peft.variants.factors(layer, "default")
    options = {"base_layer": layer.base_layer, "lora_A": lora_A, "lora_B": lora_B, "scaling": 1.5}
    magnitude.update_layer(**options)
    expected = magnitude.weight.detach().clone()
    partition(layer)
    magnitude.update_layer(**options)
    torch.testing.assert_close(magnitude.weight.detach(), expected, rtol=0, atol=0)


@pytest.mark.parametrize("which", ["base_layer", "factor"])
@pytest.mark.parametrize("kind", KINDS)
def test_partial_gather(kind, which, deepspeed, monkeypatch):
    _, model = peft_models.twins(kind)
    partition(model)
    layer = target(model)
    parameter = layer.base_layer.weight if which == "base_layer" else dorac.peft.variants.factors(layer, "default")[0]
    monkeypatch.setattr(GatheredParameters, "missing", (parameter,))
    x = peft_models.KINDS[kind].input(3, torch.float64)
    layer.base_layer.forward = lambda x: torch.zeros(1)  # the layer's own gathering is not what is tested
    with pytest.raises(RuntimeError, match="DeepSpeed did not gather a parameter of shape"):
        model(x)
