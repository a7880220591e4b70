"""``save_pretrained`` of wrapped models, adapters by a hub id, and what the libraries make of dorac's files."""

import copy
import pickle

import hub_model
import pytest
import tiny_trainers as tiny
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import dorac

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
huggingface_hub = pytest.importorskip("huggingface_hub")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.save_base(tmp_path_factory.mktemp("base"))


def check_adapter(directory, model, base):
    tiny.adapter_files(directory)
    dorac.load_adapter(loaded := tiny.load(base), directory)
    tiny.assert_equal(tiny.trained(loaded), tiny.trained(model))


def test_adapter_files_and_no_weights(base, tmp_path):
    model = tiny.wrapped(base)
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]
    check_adapter(tmp_path, model, base)


@pytest.mark.parametrize("made", ["deepcopy", "pickle", "compile"])
def test_of_a_copy_the_copy(base, made, tmp_path):
    model = tiny.wrapped(base)
    other = {
        "deepcopy": copy.deepcopy,
        "pickle": lambda m: pickle.loads(pickle.dumps(m)),
        "compile": lambda m: torch.compile(m, backend="eager"),
    }[made](model)
    with torch.no_grad():
        other.get_parameter(next(iter(tiny.trained(other)))).add_(1)
    other.save_pretrained(tmp_path)
    check_adapter(tmp_path, getattr(other, "_orig_mod", other), base)


def test_a_part_with_its_modules_to_save(base, tmp_path):
    """The inner model of a causal language model, and one that a container holds."""
    model = tiny.wrapped(base, modules_to_save=["embed_tokens", "norm"])
    container = nn.Sequential(tiny.load(base).model)
    dorac.apply_dora(container, "all-linear", r=2, modules_to_save=["norm"], init_lora_weights=False)
    for number, inner in enumerate((model.model, container[0])):
        inner.save_pretrained(tmp_path / str(number))
        dorac.load_adapter(loaded := tiny.load(base).model, tmp_path / str(number))
        tiny.assert_equal(tiny.trained(loaded), tiny.trained(inner))
    assert {"norm.weight", "embed_tokens.weight"} <= tiny.trained(model.model).keys()


def test_unloaded_models_save_their_weights(base, tmp_path):
    model = dorac.merge(tiny.wrapped(base), unload=True)
    model.save_pretrained(tmp_path)
    assert torch.equal(tiny.logits(tiny.load(tmp_path)), tiny.logits(model))


def test_hub_mixin(tmp_path):
    model = hub_model.adapted()
    model.save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    dorac.load_adapter(again := hub_model.HubModel(), tmp_path)
    tiny.assert_equal(tiny.trained(again), tiny.trained(model))


def test_checkpoints_hold_what_can_have_changed(tmp_path):
    """Adapters, frozen ones too, a bias that is trained, and statistics; a state dict of them lacks nothing."""

    def make():
        model = hub_model.adapted()
        model.up.lora_A.requires_grad_(False)
        model.down.bias.requires_grad_(True)
        return model

    model = make()
    with torch.no_grad():
        model.norm.running_mean += 1
    model.save_pretrained(tmp_path / "checkpoint-12", is_main_process=True)
    state = load_file(tmp_path / "checkpoint-12" / "model.safetensors")
    adapter = {"up.lora_A", "up.lora_B", "up.lora_magnitude_vector"}
    statistics = {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    assert state.keys() == adapter | statistics | {"down.bias"}
    tiny.assert_equal(state, {key: tensor for key, tensor in model.state_dict().items() if key in state})
    other = make()
    found = other.load_state_dict(state, strict=False)
    assert (found.missing_keys, found.unexpected_keys) == ([], [])
    assert all(torch.equal(other.state_dict()[key], tensor) for key, tensor in state.items())
    del state["down.bias"]
    assert "down.bias" in other.load_state_dict(state, strict=False).missing_keys
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict(state)


def test_refused(base, tmp_path):
    model = tiny.wrapped(base)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for options in ({"push_to_hub": True}, {"variant": "fp16"}, {"safe_serialization": False}):
        with pytest.raises(ValueError, match=f"takes no {next(iter(options))}="):
            model.save_pretrained(tmp_path / "out", **options)
    name = "model.layers.0.mlp.up_proj.lora_A"
    with pytest.raises(ValueError, match=r"holds no .*up_proj\.lora_A \(1 of 42 tensors"):
        model.save_pretrained(tmp_path / "out", state_dict={k: v for k, v in state.items() if k != name})
    with pytest.raises(ValueError, match="lora_A is not finite"):
        model.save_pretrained(tmp_path / "out", state_dict=state | {name: state[name] / 0})
    with pytest.warns(RuntimeWarning, match="state dict is empty") as caught:
        model.save_pretrained(tmp_path / "out", state_dict={})
    assert [warning.filename for warning in caught] == [__file__]
    tiny.load(base).save_pretrained(tmp_path / "checkpoint-5")
    before = (tmp_path / "checkpoint-5" / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="holds a whole model"):
        model.save_pretrained(tmp_path / "checkpoint-5")
    assert (tmp_path / "checkpoint-5" / "model.safetensors").read_bytes() == before
    dorac.merge(model)
    with pytest.raises(ValueError, match=r"is merged .*unload=True.*save_adapter"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_process_that_does_not_write(base, tmp_path):
    model = tiny.wrapped(base)
    model.save_pretrained(tmp_path / "out", is_main_process=False)
    with pytest.raises(ReferenceError, match="keep it in a variable"):
        tiny.wrapped(base).save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_refused_wrapping_leaves_save_pretrained(base):
    model = tiny.load(base)
    before = dict(vars(model))
    with pytest.raises(ValueError, match="lora_dropout"):
        dorac.apply_dora(model, "all-linear", lora_dropout=2.0)
    assert vars(model).keys() == before.keys()


def test_names_inside_activation_checkpointing(base, tmp_path):
    """As accelerate's FSDP plugin wraps blocks."""
    model = tiny.wrapped(base)
    model.model.layers[1] = checkpoint_wrapper(model.model.layers[1])
    dorac.save_adapter(model, tmp_path / "own")
    dorac.save_adapter(model, tmp_path / "given", state_dict=model.state_dict())
    for directory in (tmp_path / "own", tmp_path / "given"):
        dorac.load_adapter(loaded := tiny.load(base), directory)
        assert torch.equal(tiny.logits(loaded), tiny.logits(model))
    dorac.load_adapter(model, tmp_path / "own")


# What PEFT's and transformers' classes make of the files.


def test_auto_peft_model_for_causal_lm(base, tmp_path):
    model = tiny.wrapped(base)
    dorac.save_adapter(model, tmp_path)
    again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(tiny.logits(again), tiny.logits(model))


def test_auto_peft_model_by_class(tmp_path):
    """A class without a task of PEFT's is named itself, under FSDP's and other wrappers' classes, too."""
    config = transformers.LlamaConfig(vocab_size=len(tiny.WORDS), num_labels=3, pad_token_id=1, **tiny.SIZES)
    transformers.LlamaForSequenceClassification(config).save_pretrained(tmp_path / "base")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    dorac.apply_dora(model, ["q_proj"], r=2, modules_to_save=["score"], init_lora_weights=False)
    model.__class__ = type("FSDPLlama", (type(model),), {})
    model.save_pretrained(tmp_path / "adapter")
    found = tiny.adapter_files(tmp_path / "adapter")
    assert found["task_type"] is None
    assert found["auto_mapping"] == {
        "base_model_class": "LlamaForSequenceClassification",
        "parent_library": "transformers.models.llama.modeling_llama",
    }
    for auto in (peft.AutoPeftModel, peft.AutoPeftModelForSequenceClassification):
        again = auto.from_pretrained(tmp_path / "adapter")
        torch.testing.assert_close(tiny.logits(again), tiny.logits(model))


def test_auto_peft_model_for_seq2seq(tmp_path):
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    config = transformers.T5Config(vocab_size=len(tiny.WORDS), decoder_start_token_id=0, **sizes)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path / "base")
    model = transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "base")
    dorac.apply_dora(model, ["q", "v"], r=2, init_lora_weights=False)
    model.save_pretrained(tmp_path / "adapter")
    again = peft.AutoPeftModelForSeq2SeqLM.from_pretrained(tmp_path / "adapter").eval()
    inputs = {"input_ids": tiny.ids(), "labels": tiny.ids()}
    torch.testing.assert_close(again(**inputs).loss, model.eval()(**inputs).loss)


# Adapters on the Hub.


def test_a_hub_id(base, tmp_path, monkeypatch):
    model, asked = tiny.wrapped(base), []
    dorac.save_adapter(model, tmp_path / "there")

    def snapshot_download(repo_id, revision=None, allow_patterns=None):
        asked.append((repo_id, revision, allow_patterns))
        return str(tmp_path / "there")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.chdir(tmp_path)
    dorac.load_adapter(loaded := tiny.load(base), "somebody/adapter", revision="v2")
    tiny.assert_equal(tiny.trained(loaded), tiny.trained(model))
    ((repository, revision, files),) = asked
    assert (repository, revision) == ("somebody/adapter", "v2")
    assert files[:2] == ["adapter_config.json", "adapter_model.safetensors"]
    dorac.save_adapter(model, "some/where")  # a directory goes first
    dorac.load_adapter(loaded, "some/where")
    with pytest.raises(OSError, match="there is no file or directory"):
        dorac.load_adapter(loaded, tmp_path / "nowhere" / "at_all")
    assert len(asked) == 1


def test_a_hub_id_that_cannot_be_had(base, monkeypatch):
    def snapshot_download(repo_id, **_):
        raise huggingface_hub.errors.LocalEntryNotFoundError(f"no {repo_id} in the cache")

    model = tiny.load(base)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(FileNotFoundError, match="no directory some/adapter, and the Hugging Face Hub does not give it"):
        dorac.load_adapter(model, "some/adapter")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match=r"no directory some/adapter; .* install huggingface_hub"):
        dorac.load_adapter(model, "some/adapter")
    assert dorac.apply.dora_layers(model) == {}
