"""Adapters that PEFT has saved over a part of the base weights (pissa, olora, corda), as it loads them itself."""

import contextlib
import copy
import json

import pytest
import torch
from test_apply import TOKENS, Model
from test_peft_inits import TARGETS, config_for, make, prepare, unchanged
from torch import nn

import dorac
from dorac.apply import dora_layers
from dorac.nn import residual

peft = pytest.importorskip("peft")

import dorac.peft  # noqa: E402

STARTS = ["pissa", "pissa_niter_60", "olora", "corda"]


def saved_by_peft(init, directory, dtype=torch.float32, model=None, targets=None, **options):
    """A trained adapter of stock PEFT's, and what its model computes."""
    model, config = make(dtype) if model is None else model, config_for(init, **options)
    config.target_modules = targets or config.target_modules
    prepare(model, config)
    stock = peft.get_peft_model(model, config)
    with torch.no_grad():
        for name, parameter in stock.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    stock.save_pretrained(directory)
    return stock.eval()


def seeded(*args, **options):  # else each draw gives another decomposition
    torch.manual_seed(7)
    return torch.svd_lowrank(*args, **options)


def loaded(init, directory, model=None):
    model = make() if model is None else model
    if init == "corda":
        prepare(model, config_for(init))
    dorac.load_adapter(model, directory)
    return model.eval()


@pytest.mark.parametrize("init", STARTS)
@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "rank_pattern": {"down": 3}, "alpha_pattern": {"up": 5}}])
@pytest.mark.filterwarnings("ignore:the adapter is over what init_lora_weights='pissa_niter_60' left")
def test_loaded_as_peft_does(init, options, tmp_path, monkeypatch):
    """And saved again as an adapter of the original weights, which PEFT reads."""
    monkeypatch.setattr("peft.tuners.lora.layer.svd_lowrank", seeded)
    if init == "corda" and options:
        pytest.skip("PEFT prepares every layer with one rank")
    stock = saved_by_peft(init, tmp_path / "peft", **options)
    expected = stock(TOKENS)
    model = loaded(init, tmp_path / "peft")
    torch.testing.assert_close(model(TOKENS), expected)
    for name, layer in dora_layers(model).items():
        theirs = stock.get_submodule(f"base_model.model.{name}")
        torch.testing.assert_close(layer.base_layer.weight, theirs.base_layer.weight)
        assert torch.equal(layer.lora_A, theirs.lora_A["default"].weight)
        assert torch.equal(layer.lora_magnitude_vector, theirs.lora_magnitude_vector["default"].weight)
        assert residual.has_residual(layer)
        assert not hasattr(layer.base_layer, "eigens")
    dorac.save_adapter(model, tmp_path / "converted")
    torch.testing.assert_close(loaded("", tmp_path / "converted")(TOKENS), expected)
    torch.testing.assert_close(peft.PeftModel.from_pretrained(make(), tmp_path / "converted").eval()(TOKENS), expected)
    assert (expected - make().eval()(TOKENS)).abs().max() > 0.01 * expected.abs().max()


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_under_the_drop_in(init, tmp_path):
    expected = saved_by_peft(init, tmp_path)(TOKENS)
    with dorac.peft.enable():
        again = peft.PeftModel.from_pretrained(make(), tmp_path).eval()
        torch.testing.assert_close(again(TOKENS), expected)
        plain = again.merge_and_unload()
    torch.testing.assert_close(plain(TOKENS), expected)


def test_random_decompositions_are_named(tmp_path):
    saved_by_peft("pissa_niter_4", tmp_path)
    with pytest.warns(RuntimeWarning, match="'pissa_niter_4' left of the base weights, a decomposition with") as caught:
        dorac.load_adapter(make(), tmp_path)
    assert caught[0].filename == __file__


def test_half_precision(tmp_path):
    """PEFT decomposes in float32, and rounds what is left to the weight's dtype."""
    stock = saved_by_peft("pissa", tmp_path, torch.bfloat16)
    model = loaded("pissa", tmp_path, make(torch.bfloat16))
    for name, layer in dora_layers(model).items():
        theirs = stock.get_submodule(f"base_model.model.{name}").base_layer.weight
        torch.testing.assert_close(layer.base_layer.weight, theirs, rtol=2**-7, atol=1e-6)  # one unit in the last place


def test_embeddings_know_no_such_start(tmp_path):
    stock = saved_by_peft("pissa", tmp_path, targets=["embed", "up"])
    model = loaded("pissa", tmp_path)
    assert not residual.has_residual(model.embed)
    torch.testing.assert_close(model(TOKENS), stock(TOKENS))


def test_an_adapted_model_takes_it(tmp_path):
    """One whose adapter is over its whole weights; one over a part of them does not."""
    expected = saved_by_peft("pissa", tmp_path)(TOKENS)
    model = make()
    dorac.apply_dora(model, config_for("pissa").target_modules, r=4, lora_alpha=6, init_lora_weights=False)
    dorac.cache_norms(model)
    model(TOKENS)
    dorac.load_adapter(model, tmp_path)
    torch.testing.assert_close(model(TOKENS), expected)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"a part of them is taken out already \(blocks.0.up, ...\): load it into"):
        dorac.load_adapter(model, tmp_path)
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())


@pytest.mark.parametrize("beside", ["new", "active"])
def test_other_adapters_rest_on_the_whole_weights(beside, tmp_path):
    """As one more adapter, or into the active one of several."""
    saved_by_peft("pissa", tmp_path)
    model = make()
    dorac.apply_dora(model, TARGETS, r=4, lora_alpha=8)
    if beside == "active":
        dorac.add_adapter(model, "other", r=4, lora_alpha=8)
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match="'pissa' leaves of the original base weights, which the model's other"):
        dorac.load_adapter(model, tmp_path, adapter_name="b" if beside == "new" else None)
    for (name, module), copied in zip(model.named_modules(), before.modules(), strict=True):
        assert type(module) is type(copied), name
        assert all(map(torch.equal, module.state_dict().values(), copied.state_dict().values())), name
    assert dorac.adapters(model) == dorac.adapters(before)


def test_conv1d(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": 32, "n_positions": 8}

    def gpt2():
        torch.manual_seed(0)
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()

    ids = torch.arange(6).reshape(2, 3)
    stock = saved_by_peft("pissa", tmp_path / "pissa", model=gpt2(), targets=["c_attn"], fan_in_fan_out=True)
    torch.testing.assert_close(loaded("pissa", tmp_path / "pissa", gpt2())(ids).logits, stock(ids).logits)
    saved_by_peft("pissa", tmp_path / "olora", model=gpt2(), targets=["attn.c_proj"], fan_in_fan_out=True)
    edit(tmp_path / "olora", init_lora_weights="olora")
    with pytest.raises(ValueError, match=r"c_proj: PEFT's OLoRA of a Conv1D is of the transposed weight"):
        dorac.load_adapter(gpt2(), tmp_path / "olora")


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("enabled", [True, False])
def test_pefts_own_conversion(init, enabled, tmp_path):
    """Under the drop-in it keeps the magnitudes; stock PEFT's file lacks them."""
    with dorac.peft.enable() if enabled else contextlib.nullcontext():
        model = peft.get_peft_model(make(), config_for(init))
        model.peft_config["default"].init_lora_weights = True
        model.save_pretrained(tmp_path / "begun")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        expected = model.eval()(TOKENS)
        begun = str(tmp_path / "begun")
        model.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=begun)
        if enabled:
            again = peft.PeftModel.from_pretrained(make(), tmp_path / "converted").eval()
            torch.testing.assert_close(again(TOKENS), expected)
            torch.testing.assert_close(loaded(init, tmp_path / "converted")(TOKENS), expected)
            return
    with pytest.raises(ValueError, match=r"missing: .*blocks.0.up.lora_magnitude_vector"):
        dorac.load_adapter(make(), tmp_path / "converted")


def edit(directory, **fields):
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


REFUSED = {
    "corda": ({}, "blocks.0.up: it was not prepared: call peft's preprocess_corda with the same config first"),
    "loftq": ({"loftq_config": {"loftq_bits": 4}}, "'loftq' replaced the base weights by quantised ones.*enable"),
    "lora_ga": ({"lora_ga_config": {"scale": "stable"}}, "'lora_ga' took a part out .* merge the adapter in the model"),
    "mica": ({}, "'mica' is no start that PEFT has with DoRA"),
    "pissa_niter_x": ({}, "'pissa_niter_x' is no start that PEFT has with DoRA"),
}


@pytest.mark.parametrize("init", REFUSED)
def test_refused_by_name(init, tmp_path):
    fields, message = REFUSED[init]
    saved_by_peft("pissa", tmp_path)
    edit(tmp_path, init_lora_weights=init, **fields)
    model = make()
    with pytest.raises(ValueError, match=message) as error:
        dorac.load_adapter(model, tmp_path)
    assert str(tmp_path) in str(error.value)
    unchanged(model, make())


def test_settings_of_another_start_are_foreign(tmp_path):
    saved_by_peft("pissa", tmp_path)
    edit(tmp_path, corda_config={"corda_method": "kpm"})
    with pytest.raises(ValueError, match="asks for what dorac does not have: corda_config="):
        dorac.load_adapter(make(), tmp_path)


def test_a_refused_load_changes_nothing(tmp_path, monkeypatch):
    """Tied weights, no PEFT, float64 that PEFT does not decompose, a layer in the middle that fails."""
    saved_by_peft("pissa", tmp_path)
    for build, error, message in (
        (
            tied,
            ValueError,
            "blocks.0.up.base_layer.weight is tied to blocks.1.up.base_layer.weight: init_lora_weights=",
        ),
        (lambda: make(torch.float64), TypeError, "blocks.0.up: Please initialize PiSSA under float32"),
        (broken, ValueError, "blocks.1.down: "),
    ):
        model = build()
        with pytest.raises(error, match=message):
            dorac.load_adapter(model, tmp_path)
        unchanged(model, build())

    from importlib.metadata import PackageNotFoundError

    def missing(name):
        raise PackageNotFoundError

    monkeypatch.setattr("importlib.metadata.version", missing)
    model = make()
    with pytest.raises(ImportError, match="needs PEFT"):
        dorac.load_adapter(model, tmp_path)
    unchanged(model, make())


def tied() -> Model:
    model = make()
    model.blocks[1].up.weight = model.blocks[0].up.weight
    return model


def broken() -> Model:
    model = make()
    with torch.no_grad():
        model.blocks[1].down.weight[0, 0] = torch.inf
    return model


def test_one_module_in_two_places(tmp_path):
    def shared():
        model = make()
        model.blocks[1] = model.blocks[0]
        return model

    stock = saved_by_peft("olora", tmp_path, model=shared())
    model = shared()
    dorac.load_adapter(model, tmp_path)
    torch.testing.assert_close(model.eval()(TOKENS), stock(TOKENS))
    assert isinstance(model.blocks, nn.ModuleList)
