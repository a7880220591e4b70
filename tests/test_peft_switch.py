"""``enable()`` and ``disable()``: what they reach, what they leave, what they refuse."""

import copy
import gc
import importlib
import importlib.metadata
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")

from pages import recipe  # noqa: E402
from peft.tuners import lora  # noqa: E402
from peft.utils import hotswap  # noqa: E402
from peft_models import KINDS, Holder, stock_model, target, twins  # noqa: E402
from transformers import PreTrainedConfig, PreTrainedModel  # noqa: E402

import dorac.peft  # noqa: E402

if peft.import_utils.is_transformers_ge_v5:  # enable() imports it, which changes nothing of PEFT's
    importlib.import_module("peft.utils.transformers_weight_conversion")


@pytest.fixture(autouse=True)
def _stock_before_and_afterwards():
    dorac.peft.disable()  # models that tests of other files have left alive are on dorac until they are collected
    yield
    dorac.peft.disable()


def package_state():
    """Everything in PEFT's LoRA package that could be replaced: module attributes and the attributes of classes."""
    modules = [m for name, m in sys.modules.items() if name == "peft" or name.startswith("peft.")]
    state = {}
    for module in modules:
        for name, value in vars(module).items():
            state[module.__name__, name] = id(value)
            if isinstance(value, type) and value.__module__.startswith("peft."):
                state |= {(value.__module__, value.__qualname__, key): id(v) for key, v in vars(value).items()}
    return state


def on_dorac(model) -> bool:
    """Whether all of the model's DoRA runs on dorac; a mixture is an error."""
    kinds = {type(v).__module__ for m in model.modules() for v in getattr(m, "lora_variant", {}).values()}
    for module in model.modules():
        if isinstance(module, lora.LoraLayer) and module.lora_variant:
            kinds |= {type(module).__module__, *(type(m).__module__ for m in module.lora_magnitude_vector.values())}
    ours = {name.startswith("dorac.peft.") for name in kinds}
    assert len(ours) == 1, kinds
    return ours.pop()


@pytest.mark.parametrize("kind", KINDS)
def test_what_peft_builds(kind):
    before = package_state()
    with dorac.peft.enable():
        model = stock_model(kind)
        assert on_dorac(model)
        assert package_state() != before
    assert package_state() == before
    assert not on_dorac(model)
    assert not on_dorac(stock_model(kind))


def test_twice_is_once():
    before = package_state()
    dorac.peft.enable()
    enabled = package_state()
    dorac.peft.enable()
    assert package_state() == enabled
    with dorac.peft.enable():
        pass
    assert package_state() == enabled  # the inner block changed nothing, so it undoes nothing
    dorac.peft.disable()
    dorac.peft.disable()
    assert package_state() == before

    model = stock_model("linear")
    for _ in range(2):
        dorac.peft.enable(model)
        assert on_dorac(model)
    with dorac.peft.enable(model):
        pass
    assert on_dorac(model)
    for _ in range(2):
        dorac.peft.disable(model)
        assert not on_dorac(model)


def test_one_model_and_what_is_added_to_it():
    before = package_state()
    other = stock_model("linear")
    model = Holder(nn.Linear(10, 12))
    model.second = nn.Embedding(5, 4)
    config = {"use_dora": True, "r": 2}
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["target"], **config))
    with dorac.peft.enable(model):
        model.add_adapter("more", peft.LoraConfig(target_modules=["target", "second"], **config))
        assert on_dorac(model)
        assert set(target(model).lora_magnitude_vector) == {"default", "more"}
        assert not on_dorac(other)
        assert not on_dorac(stock_model("linear"))
        # The functions that swap adapters take any model, and hand those that are not on dorac to PEFT's.
        swaps = {
            (hotswap.__name__, "hotswap_adapter_from_state_dict"),
            (hotswap.__name__, "_convert_scalings_to_tensor"),
        }
        assert {key for key, value in package_state().items() if before[key] != value} == swaps
    assert package_state() == before
    assert not on_dorac(model)
    model.add_adapter("last", peft.LoraConfig(target_modules=["target"], **config))
    assert not on_dorac(model)


def test_leaving_a_block_undoes_that_block_alone():
    one, part, later = stock_model("linear"), stock_model("linear"), stock_model("linear")
    config = peft.LoraConfig(use_dora=True, r=2, target_modules=["target"])
    dorac.peft.enable(one)
    with dorac.peft.enable():
        built = stock_model("linear")
        one.add_adapter("more", config)
        part.add_adapter("more", config)  # PEFT built on one of its layers
        dorac.peft.enable(later)
        assert all(map(on_dorac, (one, part, built, later)))
    assert on_dorac(one)
    assert on_dorac(later)
    assert not on_dorac(built)
    assert not on_dorac(part)
    x = KINDS["linear"].input(3, torch.float64)
    one.set_adapter("more")
    assert one(x).isfinite().all()

    two = nn.ModuleDict({"a": stock_model("linear"), "b": stock_model("linear")})
    dorac.peft.enable(two["a"])
    with dorac.peft.enable(two):
        assert on_dorac(two)
    assert on_dorac(two["a"])
    assert not on_dorac(two["b"])
    dorac.peft.disable()
    assert not on_dorac(two)


def test_disable_everywhere_reaches_every_model():
    one = stock_model("linear")
    dorac.peft.enable(one)
    dorac.peft.enable()
    two = stock_model("conv2d")
    holder = Holder(nn.Linear(10, 12))
    peft.inject_adapter_in_model(peft.LoraConfig(use_dora=True, target_modules=["target"]), holder)
    models = (one, two, holder)
    assert all(map(on_dorac, models))
    dorac.peft.disable()
    assert not any(map(on_dorac, models))
    assert type(one.base_model) is lora.LoraModel


def test_switching_keeps_parameters_and_modules():
    model = stock_model("linear")
    before = {name: id(module) for name, module in model.named_modules()}
    parameters = {name: id(p) for name, p in model.named_parameters()}
    representation = repr(model)
    x = KINDS["linear"].input(3, torch.float64)
    expected = model(x)
    dorac.peft.enable(model)
    assert {name: id(module) for name, module in model.named_modules()} == before
    assert {name: id(p) for name, p in model.named_parameters()} == parameters
    assert repr(model) == representation
    torch.testing.assert_close(model(x), expected)
    dorac.peft.disable(model)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=0)


def test_plain_lora_is_left_alone():
    model = peft.get_peft_model(Holder(nn.Linear(10, 12)), peft.LoraConfig(target_modules=["target"]))
    dorac.peft.enable(model)
    assert type(target(model)) is lora.Linear
    with dorac.peft.enable():
        model = peft.get_peft_model(Holder(nn.Linear(10, 12)), peft.LoraConfig(target_modules=["target"]))
        assert type(target(model)) is lora.Linear
        model.add_adapter("dora", peft.LoraConfig(target_modules=["target"], use_dora=True))
        assert on_dorac(model)
        model.delete_adapter("dora")
    assert type(target(model)) is lora.Linear


def test_copies_and_pickles(tmp_path):
    _, ours = twins("linear")
    x = KINDS["linear"].input(3, torch.float64)
    torch.save(ours, tmp_path / "model.pt")
    for again in (copy.deepcopy(ours), torch.load(tmp_path / "model.pt", weights_only=False)):
        assert on_dorac(again)
        torch.testing.assert_close(again(x), ours(x), rtol=0, atol=0)
        dorac.peft.disable(again)
        assert not on_dorac(again)
    assert on_dorac(ours)


def test_models_are_not_kept_alive():
    from dorac.peft.state import state

    with dorac.peft.enable():
        model = stock_model("linear")
    dorac.peft.enable(model)
    count = len(state.roots)
    del model
    gc.collect()
    assert len(state.roots) < count


class OwnVariant(lora.variants.DoraLinearVariant):
    """DoRA as a third party has it."""


class OwnLinear(lora.Linear):
    """A third party's LoRA layer."""

    @property
    def lora_variants(self):
        return {(): None, ("use_dora",): OwnVariant}


def own_config():
    config = peft.LoraConfig(use_dora=True, target_modules=["0", "1"])
    config._register_custom_module({nn.Linear: OwnLinear})
    return config


def test_what_is_not_covered_is_named_once():
    model = peft.get_peft_model(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), own_config())
    with pytest.warns(
        UserWarning, match=r"does not cover OwnLinear, .*: base_model.model.0, base_model.model.1"
    ) as caught:
        dorac.peft.enable(model)
    assert len(caught) == 1
    assert type(model.base_model.model[0]) is OwnLinear
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dorac.peft.enable(model)
        dorac.peft.enable()
        peft.get_peft_model(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), own_config())
    dorac.peft.disable()
    dorac.peft.enable()
    with pytest.warns(UserWarning, match="does not cover OwnLinear, .*: 0"):
        peft.get_peft_model(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), own_config())


def test_unsupported_versions(monkeypatch):
    before = package_state()
    model = stock_model("linear")
    found = importlib.metadata.version

    def version(name):
        if name == "peft" and installed is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed if name == "peft" else found(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    for installed in ("0.20.3", "0.22.0", "1.21.0", "0.3.0"):
        for call in (dorac.peft.enable, lambda: dorac.peft.enable(model), dorac.peft.disable):
            with pytest.raises(ImportError, match=rf"supports PEFT >=0\.21,<0\.22, installed is {installed}"):
                call()
    installed = None
    with pytest.raises(ImportError, match=r'needs PEFT >=0\.21,<0\.22, .* pip install "peft>=0\.21,<0\.22"'):
        dorac.peft.enable()
    installed = "0.21.0"
    with dorac.peft.enable():
        pass
    assert package_state() == before
    assert not on_dorac(model)


def test_where_peft_is_missing():
    code = (
        "import sys, importlib.metadata\n"
        "class Missing(importlib.metadata.DistributionFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] == 'peft':\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "    def find_distributions(self, context):\n"
        "        return []\n"
        "sys.meta_path.insert(0, Missing())\n"
        "found = importlib.metadata.Distribution.from_name\n"
        "def from_name(name):\n"
        "    if name == 'peft':\n"
        "        raise importlib.metadata.PackageNotFoundError(name)\n"
        "    return found(name)\n"
        "importlib.metadata.Distribution.from_name = from_name\n"
        "import dorac.peft\n"
        "for call in (dorac.peft.enable, dorac.peft.disable, lambda: dorac.peft.DoraLinearLayer):\n"
        "    try:\n"
        "        call()\n"
        "    except ImportError as error:\n"
        "        assert 'needs PEFT >=0.21,<0.22, which is not installed' in str(error), error\n"
        "    else:\n"
        "        raise AssertionError(call)\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_import_alone_does_not_import_peft():
    code = "import sys, dorac.peft; assert not {'peft', 'transformers'} & set(sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("call", [dorac.peft.enable, dorac.peft.disable])
def test_not_a_peft_model(call):
    before = package_state()
    with pytest.raises(TypeError, match="model must be a module, got str"):
        call("model")
    with pytest.raises(ValueError, match="model must hold LoRA layers of PEFT's, Linear has none"):
        call(nn.Linear(2, 2))
    assert package_state() == before


@pytest.mark.parametrize("kind", KINDS)
def test_dtype_of_new_magnitudes(kind):
    """With PEFT's default of float32 adapters g starts as 1, whatever the model's dtype; half ones stay half."""
    for autocast_adapter_dtype in (True, False):
        with dorac.peft.enable():
            torch.manual_seed(0)
            model = Holder(KINDS[kind].layer()).bfloat16()
            config = peft.LoraConfig(use_dora=True, target_modules=["target"], **KINDS[kind].options)
            model = peft.get_peft_model(model, config, autocast_adapter_dtype=autocast_adapter_dtype)
        dorac.peft.enable(model)  # adapters that are added later
        model.add_adapter("other", config, autocast_adapter_dtype=autocast_adapter_dtype)
        layer = target(model)
        for adapter in ("default", "other"):
            magnitude = layer.lora_magnitude_vector[adapter]
            factors = dorac.peft.variants.factors(layer, adapter)
            norm = magnitude.factored_norm(layer.base_layer.weight, *factors, layer.scaling[adapter])
            dtype = torch.float32 if autocast_adapter_dtype else torch.bfloat16
            assert {p.dtype for p in (magnitude.weight, *factors)} == {dtype}
            assert torch.equal(magnitude.weight, norm.to(dtype))
            assert model(KINDS[kind].input(3, torch.bfloat16)).dtype is torch.bfloat16


def test_the_readmes_lines():
    names = {"peft": peft, "torch": torch, "model": PreTrainedConfigured()}
    exec(recipe("PEFT"), names)
    x = torch.randn(2, 4)
    assert on_dorac(names["model"]._orig_mod)
    with torch.compiler.set_stance("force_eager"):
        assert names["model"](x).shape == (2, 4)


class PreTrainedConfigured(PreTrainedModel):
    """ "all-linear" is for models of transformers."""

    def __init__(self) -> None:
        super().__init__(PreTrainedConfig())
        self.inner = nn.Linear(4, 4)
        self.last = nn.Linear(4, 4)

    def forward(self, x):
        return self.last(self.inner(x).relu())


def test_shown():
    """What is so now, whoever has made it so."""
    stock = stock_model("linear")
    everywhere = dorac.peft.enable()
    model = dorac.peft.enable(stock)
    assert repr(everywhere) == "Enabled(what PEFT builds: on dorac)"
    assert repr(model) == f"Enabled({type(stock).__name__}: 1 DoRA layers on dorac)"
    with model:
        pass
    dorac.peft.disable()
    assert repr(everywhere) == "Enabled(what PEFT builds: stock)"
    assert repr(model) == f"Enabled({type(stock).__name__}: 0 DoRA layers on dorac)"
