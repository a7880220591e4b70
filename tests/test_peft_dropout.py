"""``enable(dropout_on="low_rank")``: the drop-in's dropout on the low-rank branch alone."""

import copy

import pytest
import torch
import torch.nn.functional as F

peft = pytest.importorskip("peft")

from peft_models import KINDS, stock_model, target  # noqa: E402

import dorac.peft  # noqa: E402

P = 0.4
LAYERS = [kind for kind in KINDS if "embedding" not in kind]
TIGHT = {"rtol": 1e-6, "atol": 1e-6}


@pytest.fixture(autouse=True)
def _stock_afterwards():
    yield
    dorac.peft.disable()


def run(model, x):
    torch.manual_seed(3)
    return model(x)


def expected(model, x):
    """``y(x') + g * (base(x) - base(x'))`` of the layer y without dropout."""
    torch.manual_seed(3)
    dropped = x * (F.dropout(torch.ones_like(x), P) > 0) / (1 - P)
    layer, plain = target(model), copy.deepcopy(model).eval()
    base, magnitude = layer.base_layer, layer.lora_magnitude_vector["default"]
    weight, factors = base.weight, (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    g = magnitude.mag_scale(magnitude.factored_norm(weight, *factors, layer.scaling["default"]))
    return plain(dropped) + g * (base(x) - base(dropped))


@pytest.mark.parametrize("how", ["whole", "hooked", "two adapters"])
@pytest.mark.parametrize("kind", LAYERS)
def test_the_low_rank_branch_alone(kind, how):
    """In one call, and on PEFT's own way, which a layer takes with hooks on its base layer or several adapters."""
    model = stock_model(kind, lora_dropout=P)
    dorac.peft.enable(model, dropout_on="low_rank")
    x = KINDS[kind].input(3, torch.float64)
    torch.testing.assert_close(run(model, x), expected(model, x), **TIGHT)
    if how == "hooked":
        target(model).base_layer.register_forward_hook(lambda module, args, y: None)
        torch.testing.assert_close(run(model, x), expected(model, x), **TIGHT)
    if how == "two adapters":
        alone = run(model, x)
        config = peft.LoraConfig(target_modules=["target"], r=2, use_dora=True, lora_dropout=P, **KINDS[kind].options)
        model.add_adapter("other", config)  # its change is zero, whatever it drops: both products are equal
        assert target(model).lora_variant["other"].dropout_on == "low_rank"
        model.base_model.set_adapter(["default", "other"])
        torch.testing.assert_close(run(model, x), alone, **TIGHT)
    assert not torch.equal(run(model, x), run(copy.deepcopy(model).eval(), x))


def meanings(model):
    return {variant.dropout_on for variant in target(model).lora_variant.values()}


def test_a_call_says_it_for_a_model_and_for_what_is_added(tmp_path):
    model = stock_model("linear", lora_dropout=P)
    dorac.peft.enable(model)
    x = KINDS["linear"].input(3, torch.float64)
    pefts = run(model, x)
    with dorac.peft.enable(model, dropout_on="low_rank"):
        assert meanings(model) == meanings(copy.deepcopy(model)) == {"low_rank"}
        assert not torch.equal(run(model, x), pefts)
        model.save_pretrained(tmp_path)
        assert "dropout_on" not in (tmp_path / "adapter_config.json").read_text()
    assert meanings(model) == {"adapter"}
    assert torch.equal(run(model, x), pefts)
    with dorac.peft.enable(model, dropout_on="low_rank"):
        dorac.peft.disable(model)
        dorac.peft.enable(model)
        model.add_adapter("other", peft.LoraConfig(target_modules=["target"], use_dora=True, lora_dropout=P))
        assert meanings(model) == {"adapter"}


def test_what_peft_builds():
    with dorac.peft.enable(dropout_on="low_rank"):
        model = stock_model("linear", lora_dropout=P)
        assert meanings(model) == {"low_rank"}
        with dorac.peft.enable():
            assert meanings(stock_model("linear")) == {"adapter"}
        assert meanings(stock_model("linear")) == meanings(model) == {"low_rank"}
    assert not hasattr(target(model).lora_variant["default"], "dropout_on")  # PEFT's own again
    with dorac.peft.enable():
        assert meanings(stock_model("linear")) == {"adapter"}


@pytest.mark.parametrize("bad", ["base", None, True])
def test_bad_input(bad):
    model = stock_model("linear")
    before = [type(m) for m in model.modules()]
    for args in ((), (model,)):
        with pytest.raises(ValueError, match=f"dropout_on must be 'adapter' or 'low_rank', got {bad!r}"):
            dorac.peft.enable(*args, dropout_on=bad)
    assert [type(m) for m in model.modules()] == before
