"""``apply_dora`` with PEFT's ``LoraConfig``, and PEFT's default targets."""

import dataclasses
import json
import subprocess
import sys
import types
import warnings

import pytest
import torch
from test_apply import TOKENS, Model, llama
from torch import nn

import dorac
from dorac.apply import dora_layers, saved_modules

peft = pytest.importorskip("peft")


def lora_config(**options):
    return peft.LoraConfig(**{"use_dora": True, "target_modules": ["up"], **options})


def off_its_start(model):
    with torch.no_grad():
        for layer in dora_layers(model).values():
            layer.lora_B.normal_(std=0.3)
            layer.lora_magnitude_vector.mul_(0.8 + 0.4 * torch.rand_like(layer.lora_magnitude_vector))


CONFIGS = {
    "list": {"target_modules": ["up", "blocks.1.down"]},
    "regex": {"target_modules": r"blocks\.\d\.(up|down)"},
    "all-linear": {"target_modules": "all-linear"},
    "exclude": {"target_modules": ["up", "down"], "exclude_modules": ["blocks.0.down"]},
    "exclude regex": {"target_modules": ["up", "down"], "exclude_modules": r".*\.0\..*"},
    "patterns": {
        "target_modules": ["up", "down"],
        "rank_pattern": {"down": 3, r"^blocks\.0\.up": 5},
        "alpha_pattern": {r"blocks.1.*": 7},
    },
    "layers": {"target_modules": ["up", "down"], "layers_to_transform": [1], "layers_pattern": "blocks"},
    "one layer": {"target_modules": ["up", "down"], "layers_to_transform": 0, "layers_pattern": ["blocks"]},
    "rslora": {"use_rslora": True, "lora_alpha": 5},
    "dropout": {"lora_dropout": 0.25},
    "saved": {"modules_to_save": ["head"]},
    "gaussian": {"init_lora_weights": "gaussian"},
    "embedding": {"target_modules": ["embed", "up"]},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_same_adapter_as_pefts(name, tmp_path):
    """The layers, ranks, scalings and trained parameters are those that PEFT makes, and so is the saved config."""
    config = lora_config(r=4, lora_alpha=6, **CONFIGS[name]) if name != "rslora" else lora_config(**CONFIGS[name])
    model = Model().float()
    stock = peft.get_peft_model(Model().float(), config)
    names = dorac.apply_dora(model, config)
    assert names == list(dora_layers(model))
    theirs = {
        n.removeprefix("base_model.model."): m for n, m in stock.named_modules() if hasattr(m, "lora_magnitude_vector")
    }
    assert {n: (m.r["default"], m.scaling["default"]) for n, m in theirs.items()} == {
        n: (m.r, m.scaling) for n, m in dora_layers(model).items()
    }
    assert {layer.lora_dropout for layer in dora_layers(model).values()} == {config.lora_dropout}
    trained = sorted(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == sorted(p.numel() for p in stock.parameters() if p.requires_grad)

    for layer in dora_layers(model).values():
        with torch.no_grad():
            for parameter in layer.parameters(recurse=False):
                parameter.add_(0.1 * torch.randn_like(parameter))
    dorac.save_adapter(model, tmp_path)
    written = peft.LoraConfig.from_pretrained(tmp_path)
    for field in ("use_dora", "use_rslora", "lora_dropout", "bias", "modules_to_save", "peft_type"):
        assert getattr(written, field) == getattr(config, field), field
    again = Model().float()
    again.load_state_dict(plain_state(model))
    loaded = peft.PeftModel.from_pretrained(again, tmp_path)
    torch.testing.assert_close(loaded(TOKENS), model.eval()(TOKENS))


def plain_state(model):
    return {
        key.replace("base_layer.", ""): t for key, t in model.state_dict().items() if "lora_" not in key.split(".")[-1]
    }


def test_what_the_config_has_no_field_for_goes_beside_it():
    model = Model()
    config = lora_config(lora_dropout=0.5)
    dorac.apply_dora(model, config, dropout_on="low_rank", norm_grad=True, adapter_dtype=torch.float32)
    layer = model.blocks[0].up
    assert layer.dropout_on == "low_rank"
    assert layer.norm_grad
    assert layer.lora_A.dtype == torch.float32


@pytest.mark.parametrize(
    ("args", "options", "said"),
    [((8,), {}, "r"), ((4, 8), {}, "lora_alpha, r"), ((), {"r": 8}, "r"), ((), {"use_rslora": False}, "use_rslora")],
)
def test_an_argument_beside_the_config_is_refused(args, options, said):
    """Also with the value that it has by default: which of the two counts nobody could tell."""
    model = Model()
    with pytest.raises(TypeError, match=f"^apply_dora got {said} beside a LoraConfig: set that there$"):
        dorac.apply_dora(model, lora_config(), *args, **options)
    assert not dora_layers(model)


def test_by_its_own_name():
    model = Model()
    assert dorac.apply_dora(model, config=lora_config(r=3)) == ["blocks.0.up", "blocks.1.up"]
    assert model.blocks[0].up.r == 3
    with pytest.raises(TypeError, match="got target_modules beside a LoraConfig"):
        dorac.apply_dora(Model(), ["up"], config=lora_config())
    with pytest.raises(TypeError, match="config must be a LoraConfig of PEFT's, got dict"):
        dorac.apply_dora(Model(), config={"r": 3})


FOREIGN = {
    "layer_replication": [[0, 1]],
    "target_parameters": ["blocks.0.up.weight"],
    "trainable_token_indices": [1, 2],
    "ensure_weight_tying": True,
    "use_qalora": True,
    "alora_invocation_tokens": [3],
    "runtime_config": peft.LoraRuntimeConfig(ephemeral_gpu_offload=True),
    "megatron_config": {"x": 1},
    "lora_bias": True,
}


@pytest.mark.parametrize("field", FOREIGN)
def test_fields_without_counterpart_are_refused_by_name(field):
    model, config = Model(), lora_config()
    setattr(config, field, FOREIGN[field])  # some are refused beside DoRA by LoraConfig itself
    before = {key: t.clone() for key, t in model.state_dict().items()}
    with pytest.raises(ValueError, match=rf"^the LoraConfig asks for what dorac does not have: {field}="):
        dorac.apply_dora(model, config)
    assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())


def test_every_field_is_mapped_refused_or_known_to_be_neutral():
    """A field that a later PEFT adds is refused once it is set: none is ignored."""
    config = lora_config()
    known = set(dorac.lora_config._ARGUMENTS + dorac.lora_config._RECORDED + dorac.lora_config._NEUTRAL)
    for field in dataclasses.fields(config):
        if field.name in known or field.name == "inference_mode":
            continue
        changed = lora_config()
        setattr(changed, field.name, {"something": "new"})
        with pytest.raises(ValueError, match=f"does not have: {field.name}="):
            dorac.apply_dora(Model(), changed)


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_trained_biases_are_refused(bias):
    with pytest.raises(ValueError, match=f"bias must be 'none', got '{bias}'"):
        dorac.apply_dora(Model(), lora_config(bias=bias))


def test_other_configs_are_refused():
    with pytest.raises(ValueError, match="takes a LoraConfig with use_dora=True, got a LoHaConfig"):
        dorac.apply_dora(Model(), peft.LoHaConfig(target_modules=["up"]))
    with pytest.raises(ValueError, match="use_dora=False, apply_dora makes DoRA adapters: set use_dora=True"):
        dorac.apply_dora(Model(), peft.LoraConfig(target_modules=["up"]))
    with pytest.raises(ValueError, match="inference_mode=True, apply_dora makes an adapter to train"):
        dorac.apply_dora(Model(), lora_config(inference_mode=True))


def test_a_config_is_known_by_its_attributes():
    """Nothing of PEFT is imported for it."""
    config = types.SimpleNamespace(peft_type="LORA", use_dora=True, r=2, target_modules={"up"}, surprise=None)
    model = Model()
    dorac.apply_dora(model, config)
    assert model.blocks[0].up.r == 2
    config.surprise = 3
    with pytest.raises(ValueError, match="does not have: surprise=3"):
        dorac.apply_dora(Model(), config)
    code = (
        "import sys, types, torch, dorac\n"
        "config = types.SimpleNamespace(peft_type='LORA', use_dora=True, r=2, target_modules=['0'])\n"
        "dorac.apply_dora(torch.nn.Sequential(torch.nn.Linear(3, 3)), config)\n"
        "assert 'peft' not in sys.modules and 'transformers' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_what_the_saved_config_repeats(tmp_path):
    model = Model()
    config = lora_config(task_type="CAUSAL_LM", revision="abc", base_model_name_or_path="some/model")
    dorac.apply_dora(model, config)
    off_its_start(model)
    dorac.save_adapter(model, tmp_path)
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (written["task_type"], written["revision"]) == ("CAUSAL_LM", "abc")
    assert written["base_model_name_or_path"] == "some/model"
    assert dorac.load_adapter(Model(), tmp_path) == ["blocks.0.up", "blocks.1.up"]
    plain = dorac.merge(model, unload=True)
    assert "dora_config_record" not in vars(plain)


def test_heads_of_tasks_are_trained_whole(tmp_path):
    """As in PEFT, which adds them to modules_to_save."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_hidden_layers": 1}

    def make():
        torch.manual_seed(0)
        return transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=32, **sizes))

    model, config = make(), peft.LoraConfig(use_dora=True, task_type="SEQ_CLS", r=2, target_modules="all-linear")
    dorac.apply_dora(model, config)
    assert saved_modules(model) == ["classifier"]
    stock = peft.get_peft_model(make(), config)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count == sum(p.numel() for p in stock.parameters() if p.requires_grad)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    dorac.save_adapter(model, tmp_path)
    ids = torch.arange(6).reshape(2, 3)
    loaded = peft.PeftModel.from_pretrained(make(), tmp_path)
    torch.testing.assert_close(loaded(ids).logits, model.eval()(ids).logits)


def test_default_targets():
    model = llama()
    names = dorac.apply_dora(model, r=2)
    assert names == [f"model.layers.{i}.self_attn.{p}_proj" for i in range(2) for p in "qv"]
    again = llama()
    dorac.apply_dora(again, peft.LoraConfig(use_dora=True, r=2))
    assert list(dora_layers(again)) == names
    with pytest.raises(ValueError, match="no default for a Model, which has no model_type; give target_modules"):
        dorac.apply_dora(Model())
    model = llama()
    model.config.model_type = "unheard-of"
    with pytest.raises(ValueError, match="no default for models of type 'unheard-of'; give target_modules"):
        dorac.apply_dora(model)
    diffusers_like = nn.Sequential(nn.Linear(2, 2))
    diffusers_like.config = {"sample_size": 3}
    with pytest.raises(ValueError, match="no default for a Sequential"):
        dorac.apply_dora(diffusers_like)


def test_default_targets_without_peft(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="PEFT, which has defaults, is not installed; give target_modules"):
        dorac.apply_dora(llama(), r=2)


def test_warnings_point_at_the_caller():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dorac.apply_dora(Model(), lora_config(rank_pattern={"nothing": 3}))
        dorac.apply_dora(Model(), ["up"], alpha_pattern={"nothing": 3})
    assert [w.filename for w in caught] == [__file__, __file__]
