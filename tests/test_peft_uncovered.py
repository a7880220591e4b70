"""What PEFT takes without a word and is not what was meant: the drop-in names it, once, and nothing else."""

import re
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

peft = pytest.importorskip("peft")

import transformers  # noqa: E402
from peft_models import KINDS, Holder, off_init  # noqa: E402

import dorac.peft  # noqa: E402


@pytest.fixture(autouse=True)
def _stock_afterwards():
    yield
    dorac.peft.disable()


def mamba():
    config = transformers.MambaConfig(
        vocab_size=32, hidden_size=8, state_size=4, num_hidden_layers=2, time_step_rank=4, intermediate_size=16
    )
    return transformers.MambaForCausalLM(config)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2)

    def forward(self, x):
        return self.attention(x, x, x)[0]


PAST = {
    "fast_path": (
        lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        ["linear1"],
        "TransformerEncoderLayer",
    ),
    "attention": (Attention, ["out_proj"], "MultiheadAttention"),
    "mamba": (mamba, ["dt_proj"], "MambaMixer"),
}
COMPUTED = {
    "weight_norm": (lambda: parametrizations.weight_norm(nn.Linear(4, 3)), "_WeightNorm"),
    "spectral_norm": (lambda: parametrizations.spectral_norm(nn.Linear(4, 3)), "_SpectralNorm"),
    "old_weight_norm": (lambda: old(nn.utils.weight_norm), "WeightNorm"),
    "old_spectral_norm": (lambda: nn.utils.spectral_norm(nn.Linear(4, 3)), "SpectralNorm"),
}


def old(normalise):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return normalise(nn.Linear(4, 3))


def check_named_once(build, targets, match):
    """At building and at ``enable(model)``; a second model of the kind is not named again."""
    config = peft.LoraConfig(use_dora=True, r=2, target_modules=targets)
    stock = peft.get_peft_model(build(), config)
    for call in (
        lambda: dorac.peft.enable(stock),
        lambda: (dorac.peft.enable(), peft.get_peft_model(build(), config)),
    ):
        with pytest.warns(UserWarning, match=match) as caught:
            call()
        assert [w.filename for w in caught if re.search(match, str(w.message))] == [__file__]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.simplefilter("ignore", FutureWarning)  # transformers'
            dorac.peft.enable(peft.get_peft_model(build(), config))
        dorac.peft.disable()


@pytest.mark.parametrize("kind", PAST)
def test_a_weight_that_is_read_past_its_forward(kind):
    build, targets, where = PAST[kind]
    check_named_once(build, targets, rf"where {where}.* reads the weight .*no adapter runs: .*{targets[0]}")


@pytest.mark.parametrize("kind", COMPUTED)
def test_a_weight_that_is_computed(kind):
    build, how = COMPUTED[kind]
    check_named_once(lambda: Holder(build()), ["target"], f"that {how} computes does not keep .*: .*target")


@pytest.mark.parametrize("kind", COMPUTED)
def test_a_computed_weight_is_adapted(kind):
    """Only merging is lost: the forward is the adapted layer's."""
    torch.manual_seed(0)
    model = peft.get_peft_model(
        Holder(COMPUTED[kind][0]()), peft.LoraConfig(use_dora=True, r=2, target_modules=["target"])
    )
    off_init(model).eval()
    with pytest.warns(UserWarning, match="does not keep"):
        dorac.peft.enable(model)
    x = torch.randn(5, 4)
    layer = model.base_model.model.target
    y = model(x)
    direction = (
        layer.base_layer.weight
        + layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    )
    weight = layer.lora_magnitude_vector["default"].weight[:, None] * direction / direction.norm(dim=1, keepdim=True)
    torch.testing.assert_close(y, nn.functional.linear(x, weight, layer.base_layer.bias))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(self.embedding(x))


def test_shared_weights_are_named_when_they_are_merged():
    for merge in ("merge_adapter", "merge_and_unload"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model = peft.get_peft_model(Tied(), peft.LoraConfig(use_dora=True, r=2, target_modules=["embedding"]))
            dorac.peft.enable(model)
            model(torch.arange(3))
        with pytest.warns(UserWarning, match="share the weights of these layers.*: embedding") as caught:
            getattr(model, merge)()
        assert [w.filename for w in caught if "share" in str(w.message)] == [__file__]
        dorac.peft.disable()
    untied = peft.get_peft_model(
        Holder(nn.Linear(3, 3)), peft.LoraConfig(use_dora=True, r=2, target_modules=["target"])
    )
    dorac.peft.enable(untied)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        untied.merge_adapter()
        untied.unmerge_adapter()
        untied.merge_and_unload()


def small(config, **options):
    sizes = {
        "vocab_size": 32,
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    return config(**sizes | options)


ORDINARY = {
    "llama": lambda: transformers.LlamaForCausalLM(small(transformers.LlamaConfig, num_key_value_heads=2)),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(small(transformers.Qwen2Config, num_key_value_heads=2)),
    "bert": lambda: transformers.BertForSequenceClassification(small(transformers.BertConfig)),
    "t5": lambda: transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=32, d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2)
    ),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=32, n_positions=16, n_embd=8, n_layer=2, n_head=2)
    ),
    "vit": lambda: transformers.ViTForImageClassification(small(transformers.ViTConfig, image_size=8, patch_size=4)),
}


@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_models_are_not_named(name):
    fan_in_fan_out = name == "gpt2"
    config = peft.LoraConfig(use_dora=True, r=2, target_modules="all-linear", fan_in_fan_out=fan_in_fan_out)
    dorac.peft.enable()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", module=r"dorac.*")
        warnings.filterwarnings("error", message=r".*(no adapter runs|does not keep|share the weights|does not cover)")
        model = peft.get_peft_model(ORDINARY[name](), config)
        dorac.peft.enable(model)
        model.merge_adapter()
        model.unmerge_adapter()


@pytest.mark.parametrize("kind", KINDS)
def test_the_kinds_that_are_covered_are_not_named(kind):
    dorac.peft.enable()
    config = peft.LoraConfig(use_dora=True, r=2, target_modules=["target"], **KINDS[kind].options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = peft.get_peft_model(Holder(KINDS[kind].layer()), config)
        model.merge_and_unload()
