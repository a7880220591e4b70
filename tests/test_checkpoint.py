"""Adapters on disk: to stock PEFT and back, and every file that must be refused whole."""

import contextlib
import copy
import json
import os
import resource
import tempfile
import time
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import dorac
from dorac import checkpoint
from dorac.apply import dora_layers, saved_modules
from dorac.checkpoint.tensors import adapter_tensors
from dorac.nn import DoraLinear

# What PEFT says about an adapted language-model head.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
]

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
HALF = (torch.bfloat16, torch.float16)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(6, 9)
        self.down = nn.Linear(9, 6)

    def forward(self, x):
        return x + self.down(self.up(x).tanh())


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 5)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def llama(kind="LlamaForCausalLM", **config):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=0,
        **{"tie_word_embeddings": False, **config},
    )
    return getattr(transformers, kind)(config).eval()


def tied_llama():
    return llama(tie_word_embeddings=True)


def classifier():
    return llama("LlamaForSequenceClassification")


def gpt2():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config).eval()


def gemma():
    """Its embedding scales what it looks up."""
    transformers = pytest.importorskip("transformers")
    config = transformers.Gemma3TextConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    return transformers.Gemma3ForCausalLM(config).eval()


def output(model):
    with torch.no_grad():
        if any(isinstance(module, nn.Embedding) for module in model.modules()):
            return model(torch.arange(10).reshape(2, 5)).logits
        return model(torch.linspace(-1, 1, 24).reshape(4, 6))


def move(*tensors):
    with torch.no_grad():
        for tensor in tensors:
            tensor.add_(0.3 * torch.randn_like(tensor))


def move_magnitude(magnitude):
    with torch.no_grad():
        magnitude.mul_(0.8 + 0.4 * torch.rand_like(magnitude))


def adapted(model, target_modules, **options):
    """Wrapped and away from its initial state: no factor zero, magnitudes up to 20 % off the norm, heads trained."""
    dorac.apply_dora(model, target_modules, **{"r": 4, "lora_alpha": 6, **options})
    for layer in dora_layers(model).values():
        move(*layer._factors())
        move_magnitude(layer.lora_magnitude_vector)
    for name in saved_modules(model):
        move(*model.get_submodule(name).parameters())
    return model


def stock_adapted(model, target_modules, task_type=None, **options):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(
        target_modules=target_modules, use_dora=True, task_type=task_type, **{"r": 4, "lora_alpha": 6, **options}
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about fan_in_fan_out
        stock = peft.get_peft_model(model, config).eval()
    for name, p in stock.named_parameters():
        if p.requires_grad:
            move_magnitude(p) if "magnitude" in name else move(p)
    return stock


def stock_loaded(model, directory):
    return pytest.importorskip("peft").PeftModel.from_pretrained(model, directory).eval()


def stock_names(stock):
    layer = pytest.importorskip("peft").tuners.lora.LoraLayer
    return [name for name, module in stock.base_model.model.named_modules() if isinstance(module, layer)]


def assert_same_output(actual, expected):
    """To 1e-5 of the largest output: float32 through two ways of adding up a dozen layers."""
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


def metadata(directory):
    return {key: (t.shape, t.dtype) for key, t in load_file(directory / WEIGHTS).items()}


def snapshot(model):
    modules = [(name, id(m), type(m), m.training, sorted(vars(m))) for name, m in model.named_modules()]
    parameters = [(name, id(p), p.requires_grad, p.dtype) for name, p in model.named_parameters(remove_duplicate=False)]
    return modules, parameters, {key: t.clone() for key, t in model.state_dict().items()}


def assert_unchanged(model, before):
    modules, parameters, state = snapshot(model)
    assert (modules, parameters) == before[:2]
    assert state.keys() == before[2].keys()
    assert all(torch.equal(t, before[2][key]) for key, t in state.items())


# --- to stock PEFT and back ------------------------------------------------------------------------------------------

# name: (model, arguments of both apply_dora and LoraConfig)
INTEROP = {
    "patterns": (
        llama,
        {
            "target_modules": ["q_proj", "up_proj", "down_proj"],
            "rank_pattern": {"up_proj": 2, "^model.layers.1.self_attn.q_proj": 7},
            "alpha_pattern": {r"layers\.0\..*": 3.5},
        },
    ),
    "rsLoRA": (llama, {"target_modules": "all-linear", "use_rslora": True, "rank_pattern": {"v_proj": 3}}),
    "Conv1D": (gpt2, {"target_modules": ["c_attn", "c_fc", "c_proj"], "alpha_pattern": {"c_fc": 1}}),
    "Conv1D, one layer": (gpt2, {"target_modules": ["c_attn"], "layers_to_transform": [1], "layers_pattern": "h"}),
    "saved head": (llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "saved norms": (llama, {"target_modules": r".*\.(o|gate)_proj", "modules_to_save": ["norm", "input_layernorm"]}),
    "classifier": (classifier, {"target_modules": ["v_proj"], "modules_to_save": ["score"], "lora_dropout": 0.1}),
    "excluded": (llama, {"target_modules": "all-linear", "exclude_modules": ["0.mlp.up_proj", "k_proj"]}),
    "adapted head": (tied_llama, {"target_modules": ["lm_head", "k_proj"]}),
    "embedding": (llama, {"target_modules": ["embed_tokens", "q_proj"], "rank_pattern": {"embed_tokens": 2}}),
    "tied embedding": (tied_llama, {"target_modules": ["embed_tokens"], "use_rslora": True, "lora_dropout": 0.1}),
    "GPT-2's embeddings": (gpt2, {"target_modules": ["wte", "wpe", "c_fc"], "alpha_pattern": {"wpe": 1}}),
    "scaled embedding": (gemma, {"target_modules": ["embed_tokens", "v_proj", "lm_head"]}),
    "bfloat16": (lambda: llama().bfloat16(), {"target_modules": ["q_proj", "down_proj"]}),
    "bfloat16 embedding": (lambda: llama().bfloat16(), {"target_modules": ["embed_tokens"]}),
    "float64": (lambda: llama().double(), {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    "plain torch": (lambda: Model().eval(), {"target_modules": ["up", "1.down"], "modules_to_save": ["head", "norm"]}),
}


def in_float32(model):
    """Two half-precision computations differ by their roundings; what they compute with is compared in float32."""
    return model.float() if any(p.dtype in HALF for p in model.parameters()) else model


@pytest.mark.parametrize("case", INTEROP)
def test_peft_reads_what_dorac_wrote(case, tmp_path):
    build, arguments = INTEROP[case]
    plain = build()
    model = adapted(copy.deepcopy(plain), **arguments)
    dorac.save_adapter(model, tmp_path)
    stock = stock_loaded(copy.deepcopy(plain), tmp_path)
    assert stock_names(stock) == list(dora_layers(model))
    for name, layer in dora_layers(model).items():
        other = stock.base_model.model.get_submodule(name)
        assert (other.r["default"], other.scaling["default"]) == (layer.r, layer.scaling)
    expected = output(in_float32(model))
    assert (expected - output(in_float32(plain))).abs().max() > 1e-3 * expected.abs().max()
    assert_same_output(output(in_float32(stock)), expected)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("case", INTEROP)
def test_dorac_reads_what_peft_wrote(case, wrapped, tmp_path):
    build, arguments = INTEROP[case]
    plain = build()
    stock = stock_adapted(copy.deepcopy(plain), **arguments)
    stock.save_pretrained(tmp_path)
    model = adapted(copy.deepcopy(plain), **arguments) if wrapped else copy.deepcopy(plain)
    assert dorac.load_adapter(model, tmp_path) == stock_names(stock) == list(dora_layers(model))
    assert saved_modules(model) == saved_modules(adapted(copy.deepcopy(plain), **arguments))
    expected = output(in_float32(stock))
    assert (expected - output(in_float32(plain))).abs().max() > 1e-3 * expected.abs().max()
    assert_same_output(output(in_float32(model)), expected)


SORTED = "several keys of alpha_pattern match these modules.*: blocks.0.up, blocks.1.up$"


def test_the_order_of_a_pattern_that_peft_has_sorted_is_lost(tmp_path):
    """PEFT itself then reads another scaling than it trained with."""
    pattern = {"up": 3, ".*": 1, "1.down": 1}  # two keys of one value leave nothing open
    stock = stock_adapted(Model().eval(), ["up", "1.down"], alpha_pattern=pattern)
    stock.save_pretrained(tmp_path / "peft")
    for load in (lambda: dorac.load_adapter(Model(), tmp_path / "peft"), lambda: dorac.files.read(tmp_path / "peft")):
        with pytest.warns(RuntimeWarning, match=SORTED):
            load()
    model = adapted(Model().eval(), ["up", "1.down"], alpha_pattern=pattern)
    assert model.blocks[0].up.scaling == 3 / model.blocks[0].up.r
    dorac.save_adapter(model, tmp_path / "dorac")
    change_config(alpha_pattern=pattern)(tmp_path / "peft")  # an order that PEFT has not written is as it was meant
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name in ("dorac", "peft"):
            loaded = Model()
            dorac.load_adapter(loaded, tmp_path / name)
            assert loaded.blocks[0].up.scaling == model.blocks[0].up.scaling


@pytest.mark.parametrize("case", INTEROP)
def test_the_files_hold_the_same_keys_shapes_and_dtypes(case, tmp_path):
    build, arguments = INTEROP[case]
    dorac.save_adapter(adapted(build(), **arguments), tmp_path / "dorac")
    stock_adapted(build(), **arguments).save_pretrained(tmp_path / "peft")
    # For an adapted language-model head PEFT adds a copy of the frozen weight.
    expected = {key: value for key, value in metadata(tmp_path / "peft").items() if ".base_layer." not in key}
    assert metadata(tmp_path / "dorac") == expected


def test_a_peft_classifier(tmp_path):
    """For sequence classification PEFT adds every usual name of a head to modules_to_save, also what is not there."""
    plain = classifier()
    stock = stock_adapted(copy.deepcopy(plain), ["q_proj"], task_type="SEQ_CLS")
    stock.save_pretrained(tmp_path)
    assert set(json.loads((tmp_path / CONFIG).read_text())["modules_to_save"]) == {"classifier", "score"}
    model = copy.deepcopy(plain)
    dorac.load_adapter(model, tmp_path)
    assert saved_modules(model) == ["score"]
    assert_same_output(output(model), output(stock))


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("name", ["lm_head", "model.embed_tokens"])
def test_the_base_weight_of_a_head_or_embedding_in_the_file(name, wrapped, tmp_path):
    """Written where it is adapted, for models whose vocabulary has grown; PEFT loads it, so dorac does."""
    target = [name.rpartition(".")[2]]
    stock = stock_adapted(llama(), target)
    stock.save_pretrained(tmp_path)
    model = adapted(llama(), target) if wrapped else llama()
    base = model.get_submodule(f"{name}.base_layer" if wrapped else name)
    dorac.load_adapter(model, tmp_path)
    assert model.get_submodule(name).base_layer is base
    assert torch.equal(base.weight, stock.base_model.model.get_submodule(name).base_layer.weight)
    assert not base.weight.requires_grad
    change_tensors(lambda t: t.update({f"base_model.model.{name}.base_layer.weight": torch.ones(33, 16)}))(tmp_path)
    before = snapshot(model)
    with pytest.raises(
        ValueError, match=rf"{name}\.base_layer\.weight: the model has \[32, 16\], the file \[33, 16\]$"
    ):
        dorac.load_adapter(model, tmp_path)
    assert_unchanged(model, before)


def test_an_embedding_goes_to_peft_and_back(tmp_path):
    plain = llama()
    model = adapted(copy.deepcopy(plain), ["embed_tokens", "o_proj"])
    dorac.save_adapter(model, tmp_path / "dorac")
    stock_loaded(copy.deepcopy(plain), tmp_path / "dorac").save_pretrained(tmp_path / "peft")
    back = copy.deepcopy(plain)
    dorac.load_adapter(back, tmp_path / "peft")
    assert torch.equal(output(back), output(model))
    keys = {f"base_model.model.model.embed_tokens.{key}" for key in back.model.embed_tokens.PEFT_KEYS.values()}
    assert keys <= load_file(tmp_path / "dorac" / WEIGHTS).keys() & load_file(tmp_path / "peft" / WEIGHTS).keys()


def test_config(tmp_path):
    peft = pytest.importorskip("peft")
    model = adapted(
        gpt2(),
        ["c_attn", "c_fc"],
        rank_pattern={"1.mlp.c_fc": 2},
        alpha_pattern={"0.attn.c_attn": 3},
        lora_dropout=0.25,
        use_rslora=True,
        modules_to_save=["ln_f"],
    )
    model.config._name_or_path = "some/model"
    dorac.save_adapter(model, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text()) == {
        "peft_type": "LORA",
        "use_dora": True,
        "base_model_name_or_path": "some/model",
        "task_type": "CAUSAL_LM",
        "auto_mapping": None,
        "inference_mode": True,
        "r": 4,
        "lora_alpha": 6,
        "rank_pattern": {r"^transformer\.h\.1\.mlp\.c_fc": 2},
        "alpha_pattern": {r"^transformer\.h\.0\.attn\.c_attn": 3},
        "lora_dropout": 0.25,
        "use_rslora": True,
        "fan_in_fan_out": True,
        "target_modules": ["c_attn", "c_fc"],
        "modules_to_save": ["transformer.ln_f"],
        "bias": "none",
        "init_lora_weights": True,
    }
    config = peft.PeftConfig.from_pretrained(tmp_path)
    assert isinstance(config, peft.LoraConfig)
    assert config.use_dora


def ambiguous():
    """The ending ``fc`` has four places; ``innerxup`` is what an unescaped ``inner.up`` would match too."""
    model = nn.Module()
    model.fc = nn.Linear(6, 6)
    model.block = nn.Module()
    model.block.fc = nn.Linear(6, 6)
    model.block.inner = nn.ModuleDict({"fc": nn.Linear(6, 6), "up": nn.Linear(6, 6), "act": nn.ReLU()})
    model.inner = nn.ModuleDict({"fc": nn.Linear(6, 6), "up": nn.Linear(6, 6)})
    model.innerxup = nn.Linear(6, 6)
    return model


WRITTEN_NAMES = pytest.mark.parametrize(
    ("names", "written"),
    [
        (["block.inner.up", "inner.up"], ["up"]),
        (["block.fc"], ["block.fc"]),
        (["block.fc", "block.inner.fc"], ["block.fc", "block.inner.fc"]),
        (["fc"], "fc"),
        (["fc", "inner.up"], r"fc|inner\.up"),
        (["inner.fc"], r"inner\.fc"),
    ],
)


@WRITTEN_NAMES
def test_the_written_names_mean_the_adapted_layers_only(names, written, tmp_path):
    """Endings where they do, full names where those do, a regex where a full name is also the ending of another."""
    model = ambiguous()
    dorac.apply_dora(model, "|".join(name.replace(".", r"\.") for name in names), r=2)
    assert set(dora_layers(model)) == set(names)
    dorac.save_adapter(model, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["target_modules"] == written
    assert dorac.load_adapter(ambiguous(), tmp_path) == list(dora_layers(model))


@WRITTEN_NAMES
def test_the_written_names_mean_the_same_to_peft(names, written, tmp_path):
    model = ambiguous()
    dorac.apply_dora(model, "|".join(name.replace(".", r"\.") for name in names), r=2)
    dorac.save_adapter(model, tmp_path)
    assert set(stock_names(stock_loaded(ambiguous(), tmp_path))) == set(names)


def test_a_name_that_a_shared_plain_layer_has_elsewhere(tmp_path):
    model = ambiguous()
    model.other = nn.ModuleDict({"up": model.fc})
    dorac.apply_dora(model, ["inner.up"])
    dorac.save_adapter(model, tmp_path)
    assert json.loads((tmp_path / CONFIG).read_text())["target_modules"] == ["block.inner.up", "inner.up"]


# --- dorac to dorac --------------------------------------------------------------------------------------------------


def tiny(**options):
    return adapted(Model().eval(), ["up", "down"], **options)


def assert_same_adapter(model, other):
    """Everything that is trained, bit for bit, whatever dtype the other one holds its values in."""
    trained, other_trained = ({n: p for n, p in m.named_parameters() if p.requires_grad} for m in (model, other))
    assert trained.keys() == other_trained.keys()
    assert all(torch.equal(p.double(), other_trained[name].double()) for name, p in trained.items())


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("as_path", [str, lambda path: path])
def test_round_trip(wrapped, as_path, tmp_path):
    options = {"modules_to_save": ["norm", "head"], "rank_pattern": {"up": 2}, "lora_dropout": 0.5, "use_rslora": True}
    plain = Model().eval()
    model = adapted(copy.deepcopy(plain), ["up", "down"], **options)
    model.norm.num_batches_tracked += 3
    model.norm.running_mean += 1
    directory = tmp_path / "new" / "folder"
    dorac.save_adapter(model, as_path(directory))
    assert sorted(os.listdir(directory)) == [CONFIG, WEIGHTS]
    other = adapted(copy.deepcopy(plain), ["up", "down"], **options) if wrapped else copy.deepcopy(plain)
    assert dorac.load_adapter(other, as_path(directory)) == list(dora_layers(model))
    assert_same_adapter(model, other)
    assert saved_modules(other) == ["norm", "head"]
    assert torch.equal(output(other), output(model))
    for layer in dora_layers(other).values():
        assert (layer.lora_dropout, layer.use_rslora, layer.training) == (0.5, True, False)
        assert layer.dropout_on == "adapter"


def test_what_dropout_is_on_is_in_no_file(tmp_path):
    """A plain model takes the argument's; a wrapped one keeps its own."""
    plain = Model()
    model = adapted(copy.deepcopy(plain), ["up"], lora_dropout=0.5, dropout_on="low_rank")
    dorac.save_adapter(model, tmp_path)
    assert "dropout_on" not in (tmp_path / CONFIG).read_text()
    dorac.load_adapter(plain, tmp_path, dropout_on="low_rank")
    dorac.load_adapter(model, tmp_path)
    for layer in (*dora_layers(plain).values(), *dora_layers(model).values()):
        assert (layer.lora_dropout, layer.dropout_on) == (0.5, "low_rank")
    with pytest.raises(ValueError, match="dropout_on must be 'adapter' or 'low_rank', got 'x'"):
        dorac.load_adapter(Model(), tmp_path, dropout_on="x")


@pytest.mark.parametrize("base_dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("adapter_dtype", HALF)
def test_half_precision_factors(base_dtype, adapter_dtype, tmp_path):
    """They are written as they are; a fresh model holds the same values in float32, as with PEFT."""
    plain = Model().eval().to(base_dtype)
    model = adapted(copy.deepcopy(plain), ["up"], adapter_dtype=adapter_dtype)
    dorac.save_adapter(model, tmp_path)
    for key, t in load_file(tmp_path / WEIGHTS).items():
        assert t.dtype == (torch.float32 if key.endswith("magnitude_vector") else adapter_dtype)
    fresh = copy.deepcopy(plain)
    dorac.load_adapter(fresh, tmp_path)
    assert {getattr(fresh.blocks[0].up, name).dtype for name in ("lora_A", "lora_B")} == {torch.float32}
    assert_same_adapter(fresh, model)
    same = adapted(copy.deepcopy(plain), ["up"], adapter_dtype=adapter_dtype)
    dorac.load_adapter(same, tmp_path)
    assert same.blocks[0].up.lora_A.dtype == adapter_dtype
    assert_same_adapter(same, model)


def test_training_goes_on_from_a_loaded_adapter(tmp_path):
    dorac.save_adapter(tiny(modules_to_save=["head"]), tmp_path)
    model = Model()
    names = dorac.load_adapter(model, tmp_path)
    model(torch.randn(3, 6)).sum().backward()
    expected = {f"{name}.{part}" for name in names for part in ("lora_A", "lora_B", "lora_magnitude_vector")}
    expected |= {"head.weight", "head.bias"}
    assert {name for name, p in model.named_parameters() if p.grad is not None} == expected


def test_merging_makes_no_difference_to_the_file(tmp_path):
    model = tiny()
    dorac.save_adapter(model, tmp_path / "before")
    dorac.merge(model)
    dorac.save_adapter(model, tmp_path / "merged")
    for name in (WEIGHTS, CONFIG):
        assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "merged" / name).read_bytes()


def test_compiled_models(tmp_path):
    plain, model = Model().eval(), tiny()
    dorac.save_adapter(torch.compile(model), tmp_path)
    assert not any("_orig_mod" in key for key in load_file(tmp_path / WEIGHTS))
    assert dorac.load_adapter(torch.compile(plain), tmp_path) == list(dora_layers(model))
    assert_same_adapter(plain, model)


def test_a_scaling_that_was_set(tmp_path):
    """As the strength of an adapter is: the file's lora_alpha is that of the scaling, for PEFT too."""
    model = adapted(Model().eval(), ["up", "down"], use_rslora=True)
    model.blocks[0].up.scaling = 0.73
    model.blocks[1].down.scaling = torch.tensor(-2.0)
    dorac.save_adapter(model, tmp_path)
    other = Model().eval()
    other.load_state_dict({k.replace("base_layer.", ""): t for k, t in model.state_dict().items() if "lora" not in k})
    dorac.load_adapter(other, tmp_path)
    assert [float(layer.scaling) for layer in dora_layers(other).values()] == pytest.approx(
        [float(layer.scaling) for layer in dora_layers(model).values()], rel=1e-15
    )
    torch.testing.assert_close(output(other), output(model))
    assert dorac.load_adapter(model, tmp_path) == list(dora_layers(model))


@pytest.mark.parametrize("wrapper", ["DataParallel", "compiled blocks"])
def test_names_without_what_holds_the_model(wrapper, tmp_path):
    """The file names the modules as in the plain model, and goes into one whose blocks are compiled."""
    plain = Model().eval()
    model = adapted(copy.deepcopy(plain), ["up", "down"], modules_to_save=["head"], rank_pattern={"blocks.1.up": 2})
    if wrapper == "DataParallel":
        dorac.save_adapter(nn.DataParallel(model), tmp_path)
    else:
        held = copy.deepcopy(model)
        held.blocks[1] = torch.compile(held.blocks[1], backend="eager")
        dorac.save_adapter(held, tmp_path)
        target = copy.deepcopy(plain)
        target.blocks[1] = torch.compile(target.blocks[1], backend="eager")
        for _ in range(2):  # plain, then wrapped
            dorac.load_adapter(target, tmp_path)
            assert torch.equal(output(target), output(model))
    dorac.save_adapter(model, tmp_path / "model")
    for name in (WEIGHTS, CONFIG):
        assert (tmp_path / name).read_bytes() == (tmp_path / "model" / name).read_bytes()
    dorac.load_adapter(plain, tmp_path)
    assert_same_adapter(plain, model)


def sharing():
    """One module in two places, and one place under two names."""
    model = Model().eval()
    model.blocks[1].up = model.blocks[0].up
    model.again = model.blocks[1]
    return model


def test_shared_modules(tmp_path):
    model = adapted(sharing(), ["up", "down"])
    dorac.save_adapter(model, tmp_path)
    assert len(load_file(tmp_path / WEIGHTS)) == 4 * 3  # blocks.{0,1}.{up,down}
    for other in (sharing(), adapted(sharing(), ["up", "down"])):
        assert dorac.load_adapter(other, tmp_path) == list(dora_layers(model))
        assert other.blocks[0].up is other.blocks[1].up
        assert_same_adapter(other, model)


def test_a_module_tied_within_itself_is_saved(tmp_path):
    def build():
        model = Model().eval()
        model.head = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
        model.head[1].weight = model.head[0].weight
        return model

    model = adapted(build(), ["up"], modules_to_save=["head"])
    dorac.save_adapter(model, tmp_path)
    other = build()
    dorac.load_adapter(other, tmp_path)
    assert other.head[1].weight is other.head[0].weight
    assert_same_adapter(other, model)


def test_transposed_parameters_are_saved(tmp_path):
    model = tiny(modules_to_save=["head"])
    model.head.weight.data = model.head.weight.detach().T.contiguous().T
    assert not model.head.weight.is_contiguous()
    dorac.save_adapter(model, tmp_path)
    other = Model()
    dorac.load_adapter(other, tmp_path)
    assert torch.equal(other.head.weight, model.head.weight)


def test_a_part_that_was_wrapped_by_itself(tmp_path):
    """Its saved modules are in the file of the whole model too."""
    model = Model().eval()
    adapted(model.blocks, ["0.up"], modules_to_save=["1"])
    adapted(model, ["head"])
    dorac.save_adapter(model, tmp_path)
    other = Model().eval()
    assert dorac.load_adapter(other, tmp_path) == ["blocks.0.up", "head"]
    assert_same_adapter(other, model)
    assert saved_modules(other) == ["blocks.1"]


# --- saving that fails -----------------------------------------------------------------------------------------------


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_save_leaves_the_previous_adapter(error, tmp_path, monkeypatch):
    model = tiny()
    dorac.save_adapter(model, tmp_path)
    (tmp_path / "README.md").write_text("mine")
    before = contents(tmp_path)

    def torn(tensors, path, metadata):
        path.write_bytes(b"half a file")
        raise error

    monkeypatch.setattr(checkpoint.saving, "save_file", torn)
    with pytest.raises(error):
        dorac.save_adapter(tiny(), tmp_path)
    assert contents(tmp_path) == before
    other = Model()
    dorac.load_adapter(other, tmp_path)
    assert_same_adapter(other, model)


@contextlib.contextmanager
def files_of_at_most(size):
    """Files cannot grow beyond ``size`` bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_an_os_error(tmp_path):
    model = tiny()
    dorac.save_adapter(model, tmp_path)
    before = contents(tmp_path)
    with pytest.raises(OSError, match=r"cannot write .*adapter_model.safetensors: "), files_of_at_most(64):
        dorac.save_adapter(model, tmp_path)
    assert contents(tmp_path) == before


def test_an_unwritable_directory_is_an_os_error(tmp_path):
    (tmp_path / "file").write_text("")
    for directory in (tmp_path / "file", tmp_path / "file" / "below", "/proc/dorac"):
        with pytest.raises(OSError):  # noqa: PT011 (the system's own)
            dorac.save_adapter(tiny(), directory)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("at", [0, 1])
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, OSError])
def test_an_interruption_between_the_two_files_leaves_one_pair(error, at, after, tmp_path, monkeypatch):
    old, new = adapted(Model(), ["up", "down"]), adapted(Model(), ["up", "down"], lora_alpha=60)
    dorac.save_adapter(old, tmp_path)
    moves = []

    def replace(source, target, move=os.replace):
        moves.append(target)
        if len(moves) - 1 != at or after:
            move(source, target)
        if len(moves) - 1 == at:
            raise error("injected")

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(error):
        dorac.save_adapter(new, tmp_path)
    monkeypatch.undo()
    assert sorted(os.listdir(tmp_path)) == [CONFIG, WEIGHTS]
    loaded = Model()
    dorac.load_adapter(loaded, tmp_path)
    expected = old if (at, after) == (0, False) else new
    assert_same_adapter(loaded, expected)
    assert loaded.blocks[0].up.scaling == expected.blocks[0].up.scaling


def test_a_machine_that_stops_between_the_two_files(tmp_path, monkeypatch):
    """New weights beside the old config: their shapes fit, their scaling would not."""
    dorac.save_adapter(tiny(), tmp_path)

    def replace(source, target, move=os.replace):
        if target.name == CONFIG:
            raise OSError("gone")
        move(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="gone"):
        dorac.save_adapter(tiny(lora_alpha=60), tmp_path)
    monkeypatch.undo()
    for model in (Model(), tiny(), tiny(lora_alpha=60)):
        before = snapshot(model)
        with pytest.raises(ValueError, match="lora_alpha differ") as caught:
            dorac.load_adapter(model, tmp_path)
        assert str(tmp_path / CONFIG) in str(caught.value)
        assert str(tmp_path / WEIGHTS) in str(caught.value)
        assert_unchanged(model, before)
    dorac.save_adapter(tiny(lora_alpha=60), tmp_path)  # the remedy
    dorac.load_adapter(Model(), tmp_path)


@pytest.mark.parametrize(
    "edit",
    [
        {"base_model_name_or_path": "mine/base", "inference_mode": False, "task_type": "CAUSAL_LM", "revision": "v2"},
        {"lora_dropout": 0.3},
        {"r": 4, "lora_alpha": 6.0, "use_rslora": None, "modules_to_save": [], "exclude_modules": None},
        {"target_modules": ["down", "up", "up"], "rank_pattern": None},
        {"peft_version": "0.21.2", "runtime_config": {}, "qalora_group_size": 16, "eva_config": None},
    ],
)
def test_edits_of_a_config_that_mean_nothing_to_the_weights(edit, tmp_path):
    model = tiny()
    dorac.save_adapter(model, tmp_path)
    path = tmp_path / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | edit))
    other = Model()
    dorac.load_adapter(other, tmp_path)
    assert_same_adapter(other, model)


def test_the_remedy_for_a_config_that_was_edited_on_purpose(tmp_path):
    """The sentence holds the code."""
    dorac.save_adapter(tiny(), tmp_path)
    path = tmp_path / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | {"lora_alpha": 12}))
    with pytest.raises(ValueError, match="edited on purpose") as caught:
        dorac.load_adapter(Model(), tmp_path)
    exec("import safetensors.torch\n" + str(caught.value).partition("out of the weights: ")[2].replace("; ", "\n"))
    model = Model()
    dorac.load_adapter(model, tmp_path)
    assert model.blocks[0].up.scaling == 3


def test_both_files_and_the_directory_reach_the_disk_in_order(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(
        os, "fsync", lambda handle, real=os.fsync: (done.append(os.readlink(f"/proc/self/fd/{handle}")), real(handle))
    )
    monkeypatch.setattr(
        os, "replace", lambda a, b, real=os.replace: (done.append(f"moved {os.path.basename(b)}"), real(a, b))
    )
    dorac.save_adapter(tiny(), tmp_path)
    assert [os.path.basename(name) for name in done[:2]] == [WEIGHTS, CONFIG]
    assert done[2:] == [f"moved {WEIGHTS}", f"moved {CONFIG}", str(tmp_path)]


def test_the_same_adapter_gives_the_same_files(tmp_path):
    """safetensors writes its metadata in any order."""
    model = tiny()
    for i in range(8):
        dorac.save_adapter(model, tmp_path / str(i))
    assert len({(tmp_path / str(i) / WEIGHTS).read_bytes() for i in range(8)}) == 1


def test_a_directory_in_the_place_of_a_file(tmp_path):
    for name in (WEIGHTS, CONFIG):
        dorac.save_adapter(tiny(), tmp_path / name)
        (tmp_path / name / name).unlink()
        (tmp_path / name / name).mkdir()
        before = sorted(os.listdir(tmp_path / name))
        with pytest.raises(OSError, match=name):
            dorac.save_adapter(tiny(), tmp_path / name)
        assert sorted(os.listdir(tmp_path / name)) == before
        with pytest.raises(OSError, match=name):
            dorac.load_adapter(Model(), tmp_path / name)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_without_permission(tmp_path):
    for name in (WEIGHTS, CONFIG):
        dorac.save_adapter(tiny(), tmp_path / name)
        (tmp_path / name / name).chmod(0)
        with pytest.raises(PermissionError, match=name):
            dorac.load_adapter(Model(), tmp_path / name)


def test_links_as_in_the_cache_of_a_hub(tmp_path):
    """Read through; saving there puts files in the place of the links, and leaves what they lead to."""
    model = tiny()
    dorac.save_adapter(model, tmp_path / "blobs")
    snapshots = tmp_path / "snapshots" / "main"
    snapshots.mkdir(parents=True)
    for name in (WEIGHTS, CONFIG):
        (snapshots / name).symlink_to(os.path.join("..", "..", "blobs", name))
    other = Model()
    dorac.load_adapter(other, snapshots)
    assert_same_adapter(other, model)
    before = contents(tmp_path / "blobs")
    dorac.save_adapter(tiny(lora_alpha=60), snapshots)
    assert contents(tmp_path / "blobs") == before
    dorac.load_adapter(Model(), snapshots)


def test_an_adapter_that_is_not_finite_does_not_replace_one_that_is(tmp_path):
    model = tiny()
    dorac.save_adapter(model, tmp_path)
    before = contents(tmp_path)
    model.blocks[1].up.lora_B.data[2, 1] = float("nan")
    with pytest.raises(ValueError, match=r"^blocks\.1\.up\.lora_B is not finite: the adapter is not saved"):
        dorac.save_adapter(model, tmp_path)
    assert contents(tmp_path) == before


def test_what_cannot_be_saved(tmp_path):
    with pytest.raises(ValueError, match=r"Model holds no DoRA layer; wrap it with dorac.apply_dora first"):
        dorac.save_adapter(Model(), tmp_path)
    with pytest.raises(ValueError, match="the model is itself a DoraLinear"):
        dorac.save_adapter(DoraLinear(nn.Linear(4, 4)), tmp_path)
    for option, value in (("lora_dropout", 0.1), ("use_rslora", True)):
        model = adapted(Model(), ["up"])
        dorac.apply_dora(model, ["down"], **{option: value})
        with pytest.raises(ValueError, match=f"cannot describe layers of different {option}"):
            dorac.save_adapter(model, tmp_path)
    assert not contents(tmp_path)


# --- files that are refused ------------------------------------------------------------------------------------------

KEY = "base_model.model.blocks.0.up"


def change_tensors(change):
    def apply(directory):
        tensors = load_file(directory / WEIGHTS)
        change(tensors)
        save_file(tensors, directory / WEIGHTS)

    return apply


def change_config(**values):
    """An edit on purpose: without the record of the config in the weights."""

    def apply(directory):
        change_tensors(lambda _: None)(directory)
        config = json.loads((directory / CONFIG).read_text()) | values
        (directory / CONFIG).write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))

    return apply


def write(name, data):
    return lambda directory: (directory / name).write_bytes(data)


def truncate(name):
    return lambda directory: (directory / name).write_bytes((directory / name).read_bytes()[:-7])


def several(tensors):
    del tensors[f"{KEY}.lora_B.weight"]
    del tensors["base_model.model.head.bias"]
    tensors["base_model.model.blocks.2.up.lora_A.weight"] = torch.zeros(4, 6)
    tensors[f"{KEY}.lora_magnitude_vector"] = torch.zeros(8)


def other_rank(tensors):
    tensors[f"{KEY}.lora_A.weight"] = torch.zeros(3, 6)
    tensors[f"{KEY}.lora_B.weight"] = torch.zeros(9, 3)


DOES_NOT_FIT = r"(?s)the adapter in .* does not fit the model:.*"
REFUSED = {
    "missing key": (
        change_tensors(lambda t: t.pop(f"{KEY}.lora_A.weight")),
        DOES_NOT_FIT + rf"missing: {KEY}\.lora_A\.weight$",
    ),
    "unexpected key": (
        change_tensors(lambda t: t.update({f"{KEY}.lora_bias": torch.zeros(9)})),
        DOES_NOT_FIT + rf"unexpected: {KEY}\.lora_bias$",
    ),
    "magnitude of another length": (
        change_tensors(lambda t: t.update({f"{KEY}.lora_magnitude_vector": torch.ones(8)})),
        DOES_NOT_FIT + rf"shape of {KEY}\.lora_magnitude_vector: the model has \[9\], the file \[8\]$",
    ),
    "magnitude of another shape": (
        change_tensors(lambda t: t.update({f"{KEY}.lora_magnitude_vector": torch.ones(9, 1)})),
        DOES_NOT_FIT + r"the model has \[9\], the file \[9, 1\]$",
    ),
    "another rank": (
        change_tensors(other_rank),
        DOES_NOT_FIT
        + rf"shape of {KEY}\.lora_A\.weight: the model has \[4, 6\], the file \[3, 6\]\n"
        + rf"  shape of {KEY}\.lora_B\.weight: the model has \[9, 4\], the file \[9, 3\]$",
    ),
    "integers": (
        change_tensors(lambda t: t.update({f"{KEY}.lora_A.weight": torch.zeros(4, 6, dtype=torch.int8)})),
        DOES_NOT_FIT + rf"dtype of {KEY}\.lora_A\.weight: torch\.int8$",
    ),
    "everything at once": (
        change_tensors(several),
        DOES_NOT_FIT
        + rf"missing: {KEY}\.lora_B\.weight\n  missing: base_model\.model\.head\.bias\n"
        + r"  unexpected: base_model\.model\.blocks\.2\.up\.lora_A\.weight\n"
        + rf"  shape of {KEY}\.lora_magnitude_vector: the model has \[9\], the file \[8\]$",
    ),
    "no tensors": (change_tensors(lambda t: t.clear()), DOES_NOT_FIT + rf"missing: {KEY}\.lora_A\.weight"),
    "truncated weights": (truncate(WEIGHTS), r"adapter_model\.safetensors is not a whole safetensors file: "),
    "empty weights": (write(WEIGHTS, b""), r"is not a whole safetensors file: "),
    "a pickle": (write(WEIGHTS, b"\x80\x04" + bytes(40)), r"is not a whole safetensors file: "),
    "truncated config": (truncate(CONFIG), r"adapter_config\.json is not valid JSON: "),
    "binary config": (write(CONFIG, b"\xff\xfe"), r"adapter_config\.json is not valid JSON: "),
    "a list": (write(CONFIG, b"[]"), "does not describe a DoRA adapter"),
    "LoRA": (change_config(use_dora=False), "does not describe a DoRA adapter"),
    "another method": (change_config(peft_type="LOHA"), "does not describe a DoRA adapter"),
    "no rank": (change_config(r="absent"), "adapter_config.json lacks r$"),
    "no names": (change_config(target_modules=None, lora_alpha=None), "lacks lora_alpha, target_modules$"),
    "lora_bias": (change_config(lora_bias=True), "asks for what dorac does not have: lora_bias=True"),
    "bias": (change_config(bias="all"), "asks for what dorac does not have: bias='all'"),
    "target_parameters": (
        change_config(target_parameters=["blocks.0.up.weight"]),
        r"does not have: target_parameters=\['blocks.0.up.weight'\]",
    ),
    "layer_replication": (change_config(layer_replication=[[0, 2]]), r"layer_replication=\[\[0, 2\]\]"),
    "trainable tokens": (change_config(trainable_token_indices=[1]), r"trainable_token_indices=\[1\]"),
    "a feature of the future": (change_config(use_zora={"k": 3}), r"does not have: use_zora=\{'k': 3\}"),
    "mica": (change_config(init_lora_weights="mica"), "init_lora_weights='mica' is no start that PEFT has with DoRA"),
    "pissa_niter_": (change_config(init_lora_weights="pissa_niter_"), "'pissa_niter_' is no start that PEFT has"),
    "rank zero": (change_config(r=0), "adapter_config.json: r must be at least 1, got 0"),
    "rank in words": (change_config(r="8"), "r must be an integer, got '8'"),
    "rank zero in a pattern": (change_config(rank_pattern={"up": 0}), "r must be at least 1, got 0"),
    "alpha": (change_config(lora_alpha=float("nan")), "lora_alpha must be finite in float32, got nan"),
    "alpha beyond float32": (change_config(lora_alpha=1.4e39), "lora_alpha must be finite in float32, got 1.4e"),
    "alpha in a pattern": (change_config(alpha_pattern={"up": None}), "lora_alpha must be a number, got None"),
    "a pattern of another kind": (change_config(rank_pattern=[3]), "adapter_config.json: "),
    "dropout": (change_config(lora_dropout=1.5), r"lora_dropout must be in \[0, 1\), got 1.5"),
    "names of another kind": (change_config(target_modules=5), "target_modules must be a string or a list"),
    "a broken regex": (change_config(target_modules="(up"), r"target_modules is not a valid regex: '\(up'"),
    "a regex nested too deeply": (change_config(target_modules="(" * 5000 + "a" + ")" * 5000), "nested too deeply"),
    "a regex of too many repeats": (
        change_config(target_modules="a{9999999999}"),
        "target_modules is not a valid regex",
    ),
    "a back reference": (change_config(target_modules=r"(a|b)\1"), "dorac takes only plain regexes from a file"),
    "a broken key": (change_config(rank_pattern={"(": 3}), r"rank_pattern has a key that is not a valid regex: '\('"),
    "a look-behind in a key": (change_config(alpha_pattern={r"(?<=a)up": 3}), "dorac takes only plain regexes"),
    "a regex for layers": (
        change_config(target_modules=["up"], layers_to_transform=[0], layers_pattern="(a+)+"),
        r"layers_pattern must be names of letters, digits and dots here, got '\(a\+\)\+'",
    ),
    "words for use_dora": (change_config(use_dora="false"), "use_dora must be true or false, got 'false'"),
    "words for use_rslora": (
        change_config(use_rslora="false"),
        "use_rslora must be true or false or null, got 'false'",
    ),
    "a number for use_rslora": (change_config(use_rslora=1), "use_rslora must be true or false or null, got 1"),
    "words for inference_mode": (change_config(inference_mode="no"), "inference_mode must be true or false or null"),
    "a flag for the rank": (change_config(r=True), "r must be an integer, got True"),
    "half a rank": (change_config(r=4.0), "r must be an integer, got 4.0"),
    "an enormous rank": (change_config(r=2**40), "r must be at most 2147483647, got 1099511627776"),
    "an enormous rank in a pattern": (change_config(rank_pattern={"^a": 10**30}), "r must be at most 2147483647"),
    "a rank without room": (
        change_config(r=2**31 - 1),
        r"the model has \[2147483647, 6\], the file \[4, 6\]|the file 2\.79397e-09",
    ),
    "a negative rank": (change_config(r=-4), "r must be at least 1, got -4"),
    "an alpha beyond floats": (change_config(lora_alpha=10**400), "adapter_config.json: "),
    "a flag for alpha": (change_config(lora_alpha=True), "lora_alpha must be an? (integer or a )?number, got True"),
    "words for dropout": (change_config(lora_dropout="0.1"), "lora_dropout must be a number or null, got '0.1'"),
    "a layer in words": (change_config(layers_to_transform=["1"]), r"layers_to_transform must be .*, got \['1'\]"),
    "a flag for a layer": (change_config(layers_to_transform=[True]), r"layers_to_transform must be .*, got \[True\]"),
    "saved modules as a string": (change_config(modules_to_save="head"), "modules_to_save must be a list or null"),
    "a number among names": (
        change_config(target_modules=["up", 1]),
        "target_modules must be a string or a list of str",
    ),
    "a list for the base": (change_config(base_model_name_or_path=[]), "base_model_name_or_path must be a string or n"),
    "a config nested too deeply": (write(CONFIG, b"[" * 100_000), r"adapter_config\.json is not valid JSON"),
    "a number too long to read": (write(CONFIG, b"1" * 10_000), r"adapter_config\.json is not valid JSON"),
    "an empty config": (write(CONFIG, b""), r"adapter_config\.json is not valid JSON"),
    "metadata that are no digests": (
        lambda directory: save_file(load_file(directory / WEIGHTS), directory / WEIGHTS, {"dorac_config": "?"}),
        r"adapter_model\.safetensors: its metadata 'dorac_config' is damaged",
    ),
    "a base weight": (
        change_tensors(lambda t: t.update({f"{KEY}.base_layer.weight": torch.zeros(9, 6)})),
        DOES_NOT_FIT + rf"unexpected: {KEY}\.base_layer\.weight$",
    ),
    "NaN": (
        change_tensors(lambda t: t[f"{KEY}.lora_A.weight"][1].fill_(float("nan"))),
        DOES_NOT_FIT + rf"values of {KEY}\.lora_A\.weight: not all are finite$",
    ),
    "an infinite magnitude": (
        change_tensors(lambda t: t[f"{KEY}.lora_magnitude_vector"][3:].fill_(float("-inf"))),
        DOES_NOT_FIT + rf"values of {KEY}\.lora_magnitude_vector: not all are finite$",
    ),
    "NaN in a saved module": (
        change_tensors(lambda t: t["base_model.model.head.bias"][1:].fill_(float("nan"))),
        DOES_NOT_FIT + r"values of base_model\.model\.head\.bias: not all are finite$",
    ),
    "values beyond float32": (
        change_tensors(lambda t: t.update({f"{KEY}.lora_B.weight": torch.full((9, 4), 1e300, dtype=torch.float64)})),
        DOES_NOT_FIT + rf"values of {KEY}\.lora_B\.weight: not all are finite",
    ),
    "integers in a saved module": (
        change_tensors(lambda t: t.update({"base_model.model.head.bias": torch.zeros(5, dtype=torch.int64)})),
        DOES_NOT_FIT + r"dtype of base_model\.model\.head\.bias: torch\.int64$",
    ),
}


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_file_leaves_the_model_as_it_was(case, wrapped, tmp_path):
    damage, message = REFUSED[case]
    dorac.save_adapter(tiny(modules_to_save=["head"]), tmp_path)
    damage(tmp_path)
    model = tiny(modules_to_save=["head"]) if wrapped else Model()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        dorac.load_adapter(model, tmp_path)
    assert_unchanged(model, before)


@pytest.mark.parametrize("name", [WEIGHTS, CONFIG])
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_missing_file(name, wrapped, tmp_path):
    dorac.save_adapter(tiny(), tmp_path)
    (tmp_path / name).unlink()
    model = tiny() if wrapped else Model()
    before = snapshot(model)
    with pytest.raises(FileNotFoundError, match=name):
        dorac.load_adapter(model, tmp_path)
    assert_unchanged(model, before)
    with pytest.raises(FileNotFoundError):
        dorac.load_adapter(model, tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_alpha": 7}, r"scaling of blocks.0.up: the model has 1.5, the file 1.75\n  scaling of blocks.0.down: "),
        ({"use_rslora": True}, r"scaling of blocks.0.up: the model has 1.5, the file 3\n"),
        ({"alpha_pattern": {"^blocks.1.down": 8}}, r":\n  scaling of blocks.1.down: the model has 1.5, the file 2$"),
    ],
)
def test_a_wrapped_model_refuses_another_scaling(settings, message, tmp_path):
    """The tensors fit, the function would not: a plain model takes the file's scaling instead."""
    dorac.save_adapter(tiny(), tmp_path)
    change_config(**settings)(tmp_path)
    model = tiny()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        dorac.load_adapter(model, tmp_path)
    assert_unchanged(model, before)
    plain = Model()
    dorac.load_adapter(plain, tmp_path)
    assert plain.blocks[1].down.scaling != model.blocks[1].down.scaling


def test_another_rank_is_said_first(tmp_path):
    dorac.save_adapter(tiny(rank_pattern={"^blocks.1.down": 3}), tmp_path)
    model = tiny(r=2, lora_alpha=3)
    before = snapshot(model)
    first = r"does not fit the model:\n  wrapped with r = 2, the file has r = 4: blocks\.0\.up, .*\n"
    with pytest.raises(ValueError, match=first + r"  wrapped with r = 2, the file has r = 3: blocks\.1\.down\n  "):
        dorac.load_adapter(model, tmp_path)
    assert_unchanged(model, before)


def test_a_wrapped_model_refuses_other_layers_and_ranks(tmp_path):
    dorac.save_adapter(tiny(modules_to_save=["head"]), tmp_path)
    for other in (
        adapted(Model(), ["up"], modules_to_save=["head"]),
        adapted(Model(), ["up", "down", "head"]),
        tiny(),
        tiny(r=2, lora_alpha=3, modules_to_save=["head"]),
    ):
        before = snapshot(other)
        with pytest.raises(ValueError, match="does not fit the model"):
            dorac.load_adapter(other, tmp_path)
        assert_unchanged(other, before)


def test_a_plain_model_refuses_what_it_cannot_hold(tmp_path):
    dorac.save_adapter(tiny(modules_to_save=["head"]), tmp_path)
    tied, hooked, narrow = Model(), Model(), Model()
    tied.tail = nn.Linear(6, 5)
    tied.tail.weight = tied.head.weight
    hooked.blocks[1].down.register_forward_hook(lambda *_: None)
    narrow.blocks[0].up = nn.Linear(5, 9)
    cases = (
        (tied, "modules_to_save: head shares its weight with tail.weight"),
        (hooked, r"blocks\.1\.down: Linear has hooks"),
        (narrow, rf"shape of {KEY}\.lora_A\.weight: the model has \[4, 5\], the file \[4, 6\]"),
        (nn.Sequential(nn.Linear(4, 4)), "matched no module"),
    )
    for model, message in cases:
        before = snapshot(model)
        with pytest.raises(ValueError, match=message):
            dorac.load_adapter(model, tmp_path)
        assert_unchanged(model, before)


def test_a_merged_model_refuses_to_load(tmp_path):
    model = tiny()
    dorac.save_adapter(model, tmp_path)
    model.blocks[1].up.merge()
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"the model's adapter is merged \(blocks.1.up, ...\); unmerge it"):
        dorac.load_adapter(model, tmp_path)
    assert_unchanged(model, before)
    dorac.unmerge(model)
    dorac.load_adapter(model, tmp_path)


def test_a_model_that_is_itself_an_adapter_refuses_to_load(tmp_path):
    dorac.save_adapter(tiny(), tmp_path)
    with pytest.raises(ValueError, match="the model is itself a DoraLinear"):
        dorac.load_adapter(DoraLinear(nn.Linear(6, 9)), tmp_path)


def test_a_long_list_of_problems_is_cut(tmp_path):
    dorac.save_adapter(tiny(), tmp_path)
    change_tensors(lambda t: t.update({f"extra.{i}": torch.zeros(1) for i in range(60)}))(tmp_path)
    with pytest.raises(ValueError, match=r"unexpected: extra.*\n  \.\.\. and 10 more$"):
        dorac.load_adapter(tiny(), tmp_path)


def test_values_beyond_half_precision(tmp_path):
    """Of float32 and of float16, which bfloat16 factors hold."""
    model = tiny()
    model.blocks[1].up.lora_A.data[0, 0] = 1e6
    dorac.save_adapter(model, tmp_path)
    for dtype in HALF:
        other = tiny(adapter_dtype=dtype)
        before = snapshot(other)
        if dtype == torch.bfloat16:
            dorac.load_adapter(other, tmp_path)
        else:
            with pytest.raises(
                ValueError, match=r"blocks\.1\.up\.lora_A\.weight: not all are finite in torch\.float16$"
            ):
                dorac.load_adapter(other, tmp_path)
            assert_unchanged(other, before)


def test_a_saved_module_may_hold_infinite_buffers_and_counters(tmp_path):
    def build():
        model = Model()
        model.norm.register_buffer("mask", torch.full((3,), float("-inf")))
        return model

    model = adapted(build(), ["up"], modules_to_save=["norm"])
    model.norm.num_batches_tracked += 3
    dorac.save_adapter(model, tmp_path)
    other = build()
    other.norm.mask.zero_()
    dorac.load_adapter(other, tmp_path)
    assert torch.equal(other.norm.mask, model.norm.mask)
    assert other.norm.num_batches_tracked == 3
    key = "base_model.model.norm.num_batches_tracked"
    change_tensors(lambda t: t.update({key: torch.tensor(3.5)}))(tmp_path)
    with pytest.raises(ValueError, match=rf"dtype of {key}: torch\.float32$"):
        dorac.load_adapter(build(), tmp_path)


@pytest.mark.parametrize("name", ["lm_head", "q_proj"])
def test_base_weights_of_other_layers_than_the_embeddings_are_refused(name, tmp_path):
    model = adapted(llama(), ["lm_head", "q_proj"])
    dorac.save_adapter(model, tmp_path)
    full = next(key for key in dora_layers(model) if key.endswith(name))
    weight = model.get_submodule(full).base_layer.weight.detach()
    change_tensors(lambda t: t.update({f"base_model.model.{full}.base_layer.weight": weight + 1}))(tmp_path)
    for other in (llama(), adapted(llama(), ["lm_head", "q_proj"])):
        before = snapshot(other)
        if name == "lm_head":
            dorac.load_adapter(other, tmp_path)
            assert torch.equal(other.lm_head.base_layer.weight, weight + 1)
        else:
            with pytest.raises(ValueError, match=rf"unexpected: base_model\.model\.{full}\.base_layer\.weight$"):
                dorac.load_adapter(other, tmp_path)
            assert_unchanged(other, before)


HANGS = {
    "target_modules": {"target_modules": "(([a-z.0-9]+)+)+!"},
    "exclude_modules": {"exclude_modules": "(.*)*(.*)*(.*)*(.*)*!"},
    "rank_pattern": {"rank_pattern": {"(.*.*.*)*.*.*.*!": 3}},
    "alpha_pattern": {"alpha_pattern": {r"((\w|\.)*)*!": 3}},
}


@pytest.mark.parametrize("case", HANGS)
def test_a_regex_of_a_file_does_not_hang(case, tmp_path):
    """By re these take 2^n steps for a name of n letters."""

    def build():
        return nn.ModuleDict({"a" * 60: Model()})

    dorac.save_adapter(adapted(build(), ["up", "down"]), tmp_path)
    change_config(**HANGS[case])(tmp_path)
    model = build()
    start = time.process_time()
    with contextlib.suppress(ValueError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dorac.load_adapter(model, tmp_path)
    assert bool(dora_layers(model)) == (case != "target_modules")
    assert time.process_time() - start < 20


JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([-1, 0, 1, 4, 6, 2**31, 2**63, 10**400, "false", "all-linear", "up", ".*", "(", ["up"], [[]], {}]),
    st.floats(),
    st.text(max_size=8),
    st.lists(st.one_of(st.text(max_size=4), st.integers(), st.none()), max_size=3),
    st.dictionaries(
        st.text(max_size=6), st.one_of(st.integers(), st.floats(), st.text(max_size=3), st.none()), max_size=3
    ),
)
FIELDS = [
    "peft_type",
    "use_dora",
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "lora_dropout",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "modules_to_save",
    "bias",
    "init_lora_weights",
    "fan_in_fan_out",
    "base_model_name_or_path",
    "something_new",
]
EDITS = st.one_of(
    st.tuples(st.just("config"), st.dictionaries(st.sampled_from(FIELDS), JUNK, min_size=1, max_size=3)),
    st.tuples(
        st.sampled_from([WEIGHTS, CONFIG]), st.tuples(st.floats(0, 1), st.binary(max_size=9), st.integers(0, 40))
    ),
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved")
    dorac.save_adapter(tiny(modules_to_save=["head"]), directory)
    return contents(directory)


@settings(max_examples=100, deadline=None)
@given(edit=EDITS, tied=st.booleans(), wrapped=st.booleans())
@pytest.mark.filterwarnings("ignore:.*has keys that match no adapted module")
@pytest.mark.filterwarnings("ignore:Possible nested set:FutureWarning")
def test_a_damaged_file_is_refused_or_read_as_it_is(saved, edit, tied, wrapped):
    with tempfile.TemporaryDirectory() as directory:
        directory = Path(directory)
        for name, data in saved.items():
            (directory / name).write_bytes(data)
        if not tied:
            change_tensors(lambda _: None)(directory)
        where, what = edit
        if where == "config":
            (directory / CONFIG).write_text(json.dumps(json.loads(saved[CONFIG]) | what))
        else:
            place, data, cut = what
            old = (directory / where).read_bytes()
            at = int(place * len(old))
            (directory / where).write_bytes(old[:at] + data + old[at + cut :])
        model = tiny(modules_to_save=["head"]) if wrapped else Model()
        before = snapshot(model)
        try:
            dorac.load_adapter(model, directory)
        except (ValueError, OSError) as error:
            assert str(directory) in str(error)  # noqa: PT017
            assert_unchanged(model, before)
        else:
            tensors = load_file(directory / WEIGHTS)
            mine = adapter_tensors(model, dora_layers(model))
            assert mine.keys() == tensors.keys()
            assert all(torch.equal(mine[key], tensors[key].to(mine[key].dtype)) for key in mine)
            config = json.loads((directory / CONFIG).read_text())
            for layer in dora_layers(model).values():
                if not config.get("alpha_pattern") and not config.get("rank_pattern"):
                    assert layer.scaling == config["lora_alpha"] / (4**0.5 if config.get("use_rslora") else 4)


@pytest.mark.parametrize("init", ["eva", "orthogonal", "gaussian", False])
def test_inits_that_leave_the_base_weights_alone(init, tmp_path):
    dorac.save_adapter(tiny(), tmp_path)
    change_config(init_lora_weights=init, eva_config={"rho": 2.0} if init == "eva" else None)(tmp_path)
    dorac.load_adapter(Model(), tmp_path)
