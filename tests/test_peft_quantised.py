"""DoRA on quantised base layers through the drop-in, held to the same model with the dequantised weights in float32.

Most tests need packages that dorac does not: bitsandbytes, torchao, hqq; each skips without its own. Stand-ins for
bitsandbytes' layers run everywhere.
"""

import copy
import importlib.util
import warnings

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")

from peft.tuners.lora import LoraLayer  # noqa: E402
from peft_models import off_init  # noqa: E402
from test_quantised_linear import fp8_linear, products, torchao_float8, torchao_nvfp4  # noqa: E402, F401

import dorac.peft  # noqa: E402
from dorac import packed  # noqa: E402
from dorac.peft import dora, over  # noqa: E402
from dorac.peft.weights import dense_weight  # noqa: E402
from dorac.testing import quantised_layers as fake  # noqa: E402


def bnb_4bit(linear):
    from bitsandbytes.nn import Linear4bit

    quantised = Linear4bit(*linear.weight.shape[::-1], compute_dtype=torch.float32, quant_type="nf4")
    quantised.load_state_dict(linear.state_dict())
    return quantised.to("cpu")


def bnb_8bit(linear):
    from bitsandbytes.nn import Linear8bitLt

    quantised = Linear8bitLt(*linear.weight.shape[::-1], has_fp16_weights=False)
    quantised.load_state_dict(linear.state_dict())
    return quantised.to("cpu")


def torchao_int8(linear):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(linear, Int8WeightOnlyConfig())
    return linear


def hqq_4bit(linear):
    from hqq.core.quantize import BaseQuantizeConfig, HQQLinear

    config = BaseQuantizeConfig(nbits=4, group_size=64)
    return HQQLinear(linear, config, compute_dtype=torch.float32, device="cpu", initialize=True)


def stand_in(kind, linear):
    quantised = kind(*linear.weight.shape[::-1])
    quantised.load_state_dict(linear.state_dict())
    return quantised.to("cpu")


def fake_4bit(linear):
    return stand_in(fake.Linear4bit, linear)


def fake_8bit(linear):
    return stand_in(fake.Linear8bitLt, linear)


PACKAGES = {bnb_4bit: "bitsandbytes", bnb_8bit: "bitsandbytes", torchao_int8: "torchao", hqq_4bit: "hqq"}
SCHEMES = [
    pytest.param(
        scheme,
        id=scheme.__name__,
        marks=pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"needs {package}"),
    )
    for scheme, package in PACKAGES.items()
]
# Whose norms other files do not keep.
MORE = [
    pytest.param(
        scheme,
        id=scheme.__name__,
        marks=pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"needs {package}"),
    )
    for scheme, package in ((torchao_float8, "torchao"), (torchao_nvfp4, "torchao"), (fp8_linear, "transformers"))
]


def quantised_model(scheme, **options):
    """An MLP of quantised layers under the drop-in; the adapter off its init."""
    torch.manual_seed(0)
    model = nn.Sequential(scheme(nn.Linear(64, 128)), nn.Tanh(), scheme(nn.Linear(128, 64))).requires_grad_(False)
    model.is_loaded_in_4bit = scheme is bnb_4bit  # transformers sets these, PEFT chooses its layers by them
    model.is_loaded_in_8bit = scheme is bnb_8bit
    config = peft.LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=["0", "2"], **options)
    with dorac.peft.enable(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's on layers that it could not merge
        model = off_init(peft.get_peft_model(model, config))
    return enabled(model)


def enabled(model):
    dorac.peft.enable(model)  # leaving enable() gave it back
    return model


def dequantised(model):
    """The same adapter over ``nn.Linear`` with the dequantised weights."""
    config = copy.deepcopy(model.peft_config["default"])
    layers = [m for m in model.modules() if isinstance(m, LoraLayer)]
    assert not any(
        type(layer.get_base_layer()) is nn.Linear and type(layer.get_base_layer().weight) is nn.Parameter
        for layer in layers
    )
    dense = []
    for layer in layers:
        base = layer.get_base_layer()
        weight = dense_weight(base).float()
        linear = nn.Linear(*weight.shape[::-1])
        linear.load_state_dict({"weight": weight, "bias": base.bias})
        dense.append(linear)
    twin = peft.get_peft_model(nn.Sequential(dense[0], nn.Tanh(), dense[1]), config)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert twin.load_state_dict(trained, strict=False).unexpected_keys == []
    return enabled(twin)


def train(model, steps=3):
    """The losses, and the parameters after the last step."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    model.train()
    losses = []
    for step in range(steps):
        torch.manual_seed(step)
        x, target = torch.randn(2, 8, 5, 64)
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses), {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("lora_dropout", [0.0, 0.1])
@pytest.mark.parametrize("scheme", SCHEMES + MORE)
def test_training_follows_the_dequantised_model(scheme, lora_dropout):
    model = quantised_model(scheme, lora_dropout=lora_dropout)
    twin = dequantised(model)
    losses, parameters = train(model)
    expected, expected_parameters = train(twin)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(parameters, expected_parameters, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scheme", SCHEMES + MORE)
def test_new_magnitude_is_the_norm_of_the_dequantised_weight(scheme):
    model = quantised_model(scheme)
    with dorac.peft.enable(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_adapter("new", model.peft_config["default"])
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            norm = dense_weight(layer.get_base_layer()).float().norm(dim=1)  # lora_B is zero
            torch.testing.assert_close(layer.lora_magnitude_vector["new"].weight.detach(), norm)


@pytest.mark.parametrize("scheme", SCHEMES + MORE)
def test_the_base_layer_is_left_alone(scheme):
    """The weight is the same object before and after, and the base layer gives what it gave."""
    model = quantised_model(scheme).train()
    base = next(m for m in model.modules() if isinstance(m, LoraLayer)).get_base_layer()
    x = torch.randn(3, 64)
    weight, expected = getattr(base, "weight", None), base(x)
    for _ in range(2):
        model(x).sum().backward()
    assert getattr(base, "weight", None) is weight
    torch.testing.assert_close(base(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if "bnb" in s.id])
def test_inference_after_training(scheme):
    """bitsandbytes takes half-precision kernels in eval mode: near the dequantised model by their rounding.

    On a CPU with bf16 instructions a 4-bit layer also repacks its weight then.
    """
    model = quantised_model(scheme)
    twin = dequantised(model).eval()
    x = torch.randn(16, 64)
    model.train()(x)
    model.eval()
    with torch.no_grad():
        for _ in range(2):
            error = (model(x) - twin(x)).norm() / twin(x).norm()
            assert error < 1e-2  # 9e-2 with norms of the repacked bytes


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if "bnb" in s.id])
def test_merge(scheme):
    """The merged weight is the dequantised DoRA weight, quantised again."""
    model = quantised_model(scheme)
    twin = dequantised(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on rounding
        model.merge_adapter()
    twin.merge_adapter()
    layers, expected = ([m for m in net.modules() if isinstance(m, LoraLayer)] for net in (model, twin))
    for layer, other in zip(layers, expected, strict=True):
        requantised = scheme(other.get_base_layer())
        torch.testing.assert_close(dense_weight(layer.get_base_layer()), dense_weight(requantised))


@pytest.mark.parametrize("scheme", [s for s in SCHEMES + MORE if "torchao" in s.id])
def test_merge_into_torchao(scheme):
    """Stock PEFT leaves the magnitude out."""
    model = quantised_model(scheme).eval()
    with dorac.peft.enable(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.add_adapter("other", model.peft_config["default"])
    model.base_model.set_adapter(["default", "other"])
    off_init(enabled(model), seed=5)
    model.set_adapter("default")
    x = torch.randn(16, 64)
    layers = [m for m in model.modules() if isinstance(m, LoraLayer)]
    weights, alone, state = [layer.base_layer.weight for layer in layers], model(x), set(model.state_dict())
    for adapters in (["default"], ["default", "other"]):
        model.merge_adapter(adapters)
        for layer, weight in zip(layers, weights, strict=True):
            of_base = now = weight.dequantize()
            for adapter in adapters:  # in turn, each quantised
                A, B = (getattr(layer, f"lora_{which}")[adapter].weight.double() for which in "AB")
                change = layer.scaling[adapter] * (B @ A)
                g = layer.lora_magnitude_vector[adapter].weight.double() / (of_base.double() + change).norm(dim=1)
                merged = (g[:, None] * (now.double() + change)).float()
                now = packed.holder(layer.base_layer).requantised(layer.base_layer, merged)["weight"].dequantize()
            quantised = layer.base_layer.weight
            assert type(quantised.data) is type(weight.data)
            # Numbers halfway between two of the format go either way; without magnitudes it is 0.1.
            assert (quantised.dequantize() - now).norm() <= 0.01 * now.norm()
        assert set(model.state_dict()) == state
        merged = model(x)
        model.unmerge_adapter()
        assert [layer.base_layer.weight is weight for layer, weight in zip(layers, weights, strict=True)] == [True] * 2
        assert torch.equal(model(x), alone)
        if adapters == ["default"]:
            assert 1e-4 < (merged - alone).norm() / alone.norm() < 0.2
    model.merge_adapter(["default"])
    unloaded = model.merge_and_unload()
    assert type(unloaded[0]) is nn.Linear


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if "hqq" in s.id])
def test_hqq_with_the_empty_weight_of_transformers_4(scheme, monkeypatch):
    """A property that its quantiser gives the class, for code that asks for a dtype or device."""
    model = quantised_model(scheme).eval()
    x = torch.randn(3, 64)
    expected = model(x)
    kind = type(model.base_model.model[0].base_layer)
    monkeypatch.setattr(kind, "weight", property(lambda self: torch.empty(0)), raising=False)
    assert torch.equal(model(x), expected)
    dorac.save_outputs(model)
    model.train()(x).sum().backward()
    assert torch.equal(model.eval()(x), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on rounding
        model.merge_adapter()
    assert (model(x) - expected).norm() < 0.2 * expected.norm()


@pytest.mark.parametrize("scheme", MORE[-1:])
def test_what_cannot_be_quantised_again_is_not_merged(scheme):
    model = quantised_model(scheme).eval()
    x, names = torch.randn(3, 64), [name for name, _ in model.named_modules()]
    expected = model(x)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match=r"^a float8 weight of transformers .FP8Linear. cannot be quantised again"):
            merge()
        assert torch.equal(model(x), expected)
    assert [name for name, _ in model.named_modules()] == names


@pytest.mark.parametrize("scheme", SCHEMES + MORE)
def test_save_and_load(scheme, tmp_path):
    model = quantised_model(scheme)
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    other = nn.Sequential(scheme(nn.Linear(64, 128)), nn.Tanh(), scheme(nn.Linear(128, 64))).requires_grad_(False)
    other.is_loaded_in_4bit, other.is_loaded_in_8bit = scheme is bnb_4bit, scheme is bnb_8bit
    with dorac.peft.enable(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's on layers that it could not merge
        other = enabled(peft.PeftModel.from_pretrained(other, tmp_path))
    x = torch.randn(5, 64)
    # In training: else bitsandbytes computes in bfloat16 on some CPUs.
    torch.testing.assert_close(other.train()(x), model.train()(x), rtol=0, atol=0)


def with_two_adapters(model, **options):
    """Both active, in a model of one layer; the adapters off their init."""
    config = peft.LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=["0"], **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's on layers that it could not merge
        model = peft.get_peft_model(model, config)
        model.add_adapter("other", config)
        model.base_model.set_adapter(["default", "other"])
    return off_init(model)


def outputs(model, x):
    """y, and every gradient, with the dropout of one seed."""
    torch.manual_seed(3)
    y = model(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(4)))
    return {"y": y.detach(), "x": x.grad} | {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("lora_dropout", [0.0, 0.3])
@pytest.mark.parametrize("scheme", [pytest.param(s, id=s.__name__) for s in (fake_4bit, fake_8bit)] + SCHEMES + MORE)
def test_several_adapters_and_dropout_read_the_packed_weight(scheme, lora_dropout, monkeypatch):
    """As stock PEFT over the dequantised weight. No dense copy is made, of the rows only chunks, as the budget has it.

    HQQ's weight has no packed value here and is dequantised.
    """
    torch.manual_seed(0)
    base = scheme(nn.Linear(64, 128)).requires_grad_(False)
    dense = packed.weight_of(base)
    dense = dense if isinstance(dense, torch.Tensor) else dense.rows(0, 128)
    plain = nn.Linear(64, 128)
    plain.load_state_dict({"weight": dense, "bias": base.bias})
    stock = with_two_adapters(nn.Sequential(plain), lora_dropout=lora_dropout)
    container = nn.Sequential(base)
    container.is_loaded_in_4bit, container.is_loaded_in_8bit = scheme is bnb_4bit, scheme is bnb_8bit
    with dorac.peft.enable():
        model = enabled(with_two_adapters(container, lora_dropout=lora_dropout))
    trained = {name: p for name, p in stock.named_parameters() if "lora_" in name}
    assert model.load_state_dict(trained, strict=False).unexpected_keys == []
    taken = []
    if scheme is not hqq_4bit:
        for module in (dora, over):
            monkeypatch.setattr(module, "dense_weight", lambda base: pytest.fail("a dense copy of the weight"))
        kind = type(packed.of(base))
        rows = kind.rows
        monkeypatch.setattr(base, "forward", lambda x: nn.functional.linear(x, dense, base.bias))
        monkeypatch.setattr(kind, "rows", lambda self, *which: taken.append(which) or rows(self, *which))
    for magnitude in model.base_model.model[0].lora_magnitude_vector.values():
        magnitude.norm_budget = 2**14
    xs = [torch.randn(5, 64, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in range(2)]
    ours, expected = (outputs(net.train(), x) for net, x in zip((model, stock), xs, strict=True))
    for name, value in expected.items():
        torch.testing.assert_close(
            ours[name], value, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert all(stop - start < 64 for start, stop in taken)
    assert len(taken) > 4 or scheme is hqq_4bit


@pytest.mark.parametrize("scheme", [s for s in SCHEMES + MORE if "torchao" in s.id])
def test_dropout_over_a_bfloat16_torchao_weight(scheme):
    """PEFT converts x to the adapter's float32 first, of which torchao's product would make an error."""
    torch.manual_seed(0)
    base = scheme(nn.Linear(64, 128).bfloat16()).requires_grad_(False)
    plain = nn.Linear(64, 128)
    plain.load_state_dict({"weight": base.weight.dequantize().float(), "bias": base.bias.float()})
    with dorac.peft.enable():
        model = enabled(with_two_adapters(nn.Sequential(base), lora_dropout=0.3))
    stock = with_two_adapters(nn.Sequential(plain), lora_dropout=0.3)
    stock.load_state_dict({name: p for name, p in model.named_parameters() if "lora_" in name}, strict=False)
    x = torch.randn(5, 64).bfloat16()
    ours = outputs(model.train(), x.clone().requires_grad_())
    expected = outputs(stock.train(), x.float().requires_grad_())
    assert ours["y"].dtype is torch.bfloat16
    for name, value in expected.items():
        assert (ours[name] - value).norm() < 2**-6 * value.norm(), name
