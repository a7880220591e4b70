"""A wrapper answers for its base layer: public values are read and set there, what computes is not."""

import copy
import pickle

import pytest
import torch
from torch import nn

import dorac
from dorac.nn import DoraConv2d, DoraEmbedding, DoraLinear


class Tagged(nn.Linear):
    """Values of a subclass: of the instance, of the class, computed, in a buffer; and what is none."""

    kind = "tagged"

    def __init__(self):
        super().__init__(4, 3)
        self.layer_index = 7
        self.tied_to = None
        self.register_buffer("steps", torch.tensor(5))
        self.helper = nn.Identity()
        self.extra = nn.Parameter(torch.ones(2))
        self._hidden = 1
        self.hook = len

    @property
    def area(self):
        return self.in_features * self.out_features

    def bypass(self, x):
        return x @ self.weight.t()


def conv(**options):
    return nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), groups=2, **options)


def conv1d():
    return pytest.importorskip("transformers.pytorch_utils").Conv1D(3, 4)


def scaled_embedding():
    gemma = pytest.importorskip("transformers.models.gemma3.modeling_gemma3")
    return gemma.Gemma3TextScaledWordEmbedding(7, 4, 1, embed_scale=2.0)


GEOMETRY = ("stride", "padding", "dilation", "groups", "padding_mode", "kernel_size", "output_padding", "transposed")
LOOKUP = ("num_embeddings", "embedding_dim", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
VALUES = {
    "linear": (lambda: nn.Linear(4, 3), ("in_features", "out_features")),
    "subclass": (Tagged, ("in_features", "out_features", "kind", "layer_index", "tied_to", "steps", "area")),
    "gpt2": (conv1d, ("nf", "nx")),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding="same", padding_mode="reflect"), GEOMETRY),
    "conv2d": (conv, (*GEOMETRY, "in_channels", "out_channels")),
    "conv3d": (lambda: nn.Conv3d(2, 2, 1, bias=False), (*GEOMETRY, "in_channels", "out_channels")),
    "embedding": (lambda: nn.Embedding(7, 4, padding_idx=-1, scale_grad_by_freq=True), LOOKUP),
    "scaled embedding": (scaled_embedding, (*LOOKUP, "scalar_embed_scale")),
}


def wrap(base):
    return dorac.nn.layer_class(base)(base, r=2, init_lora_weights=False)


@pytest.mark.parametrize("kind", VALUES)
def test_values_are_those_of_the_base_layer(kind):
    make, names = VALUES[kind]
    base = make()
    layer = wrap(base)
    for name in names:
        assert getattr(layer, name) is getattr(base, name) or getattr(layer, name) == getattr(base, name), name
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), copy.copy(layer)):
        for name in names:
            assert getattr(twin, name) == getattr(base, name), name


def test_experts():
    transformers = pytest.importorskip("transformers")
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    config = transformers.MixtralConfig(hidden_size=8, intermediate_size=6, num_local_experts=3)
    base = mixtral.MixtralExperts(config)
    layer = wrap(base)
    assert (layer.num_experts, layer.hidden_dim, layer.intermediate_dim) == (3, 8, 6)
    assert layer.is_transposed is base.is_transposed
    assert not hasattr(layer, "act_fn")


@pytest.mark.parametrize(
    "name", ["missing", "bypass", "helper", "extra", "_hidden", "hook", "_conv_forward", "qweight", "lora_C", "SCB"]
)
def test_what_computes_or_is_private_is_not_answered(name):
    """And the error is nn.Module's, about the wrapper."""
    layer = wrap(Tagged())
    with pytest.raises(AttributeError, match=f"^'DoraLinear' object has no attribute '{name}'$"):
        getattr(layer, name)
    assert not hasattr(layer, name)


def test_the_wrappers_own_come_first():
    base = Tagged()
    base.r, base.scaling, base.lora_A, base.merged = 99, 99, 99, 99
    layer = wrap(base)
    assert (layer.r, layer.merged, type(layer.lora_A)) == (2, False, nn.Parameter)
    layer.norm_grad = True
    assert (layer.norm_grad, hasattr(base, "norm_grad")) == (True, False)


@pytest.mark.parametrize(
    ("name", "instead"),
    [("r", "another rank with dorac.add_adapter"), ("lora_alpha", "set layer.scaling"), ("use_rslora", "set layer.sc")],
)
def test_what_an_adapter_was_made_with_cannot_be_set(name, instead):
    """It would change nothing that runs, and an r what is saved."""
    layer = wrap(Tagged())
    before, value = dict(vars(layer)), getattr(layer, name)
    with pytest.raises(AttributeError, match=f"^{name} of a DoraLinear cannot be set, .*: .*{instead}"):
        setattr(layer, name, 3)
    assert dict(vars(layer)) == before
    assert getattr(copy.deepcopy(layer), name) == getattr(layer, name) == value


def test_each_adapter_has_its_own_rank():
    model = nn.Sequential(nn.Linear(4, 3))
    dorac.apply_dora(model, ["0"], r=2)
    dorac.add_adapter(model, "b", r=3, lora_alpha=6, use_rslora=True)
    for name, made_with in (("b", (3, 6, True)), ("default", (2, 8, False))):
        dorac.set_adapter(model, name)
        assert (model[0].r, model[0].lora_alpha, model[0].use_rslora) == made_with


def test_the_rank_is_read_in_one_graph():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = DoraLinear(nn.Linear(4, 3), r=2, init_lora_weights=False)

        def forward(self, x):
            return self.layer(x) * self.layer.r + self.layer.lora_alpha

    model, x = Model(), torch.randn(5, 4)
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), model(x))


def test_setting_a_value_changes_what_runs():
    layer = DoraConv2d(conv(), r=2, init_lora_weights=False)
    x = torch.randn(2, 4, 9, 9)
    assert layer(x).shape[2] == 5
    layer.stride = (1, 1)
    assert layer.base_layer.stride == (1, 1)
    assert layer(x).shape[2] == 9
    layer.note = "own"
    assert layer.note == "own"
    assert not hasattr(layer.base_layer, "note")


@pytest.mark.parametrize("kind", ["linear", "gpt2", "conv2d", "embedding"])
def test_setting_weight_and_bias_sets_the_base_layers(kind):
    layer = wrap(VALUES[kind][0]())
    before, keys = [*layer.parameters(recurse=False)], [*layer.state_dict()]
    weight = nn.Parameter(torch.randn_like(layer.weight), requires_grad=False)
    layer.weight = weight
    assert layer.weight is layer.base_layer.weight is weight
    if kind != "embedding":
        layer.bias = bias = nn.Parameter(torch.randn_like(layer.bias), requires_grad=False)
        assert layer.bias is layer.base_layer.bias is bias
        layer.bias = None
        assert layer.base_layer.bias is None
        keys.remove("base_layer.bias")
    assert [*layer.state_dict()] == keys
    assert all(a is b for a, b in zip(before, layer.parameters(recurse=False), strict=True))
    with pytest.raises(TypeError, match=r"cannot assign 'torch\.FloatTensor' as parameter 'weight'"):
        layer.weight = torch.randn_like(weight)


def test_a_merged_layer_takes_no_other_weight():
    layer = wrap(nn.Linear(4, 3))
    layer.merge()
    weight = layer.weight
    with pytest.raises(ValueError, match="the adapter is merged; unmerge it before setting another weight"):
        layer.weight = nn.Parameter(torch.randn(3, 4))
    layer.weight = weight
    assert layer.base_layer.weight is weight


def test_transformers_ties_an_adapted_head():
    """As after ``load_state_dict(assign=True)`` of a model that was made on meta."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 32, "n_embd": 8, "n_layer": 1, "n_head": 2, "n_positions": 8}
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    loaded = transformers.GPT2LMHeadModel(config).state_dict()
    with torch.device("meta"):
        model = transformers.GPT2LMHeadModel(config)
    dorac.apply_dora(model, ["lm_head"], r=2)
    del loaded["lm_head.weight"]
    model.load_state_dict(loaded, strict=False, assign=True)
    model.tie_weights()
    assert model.lm_head.base_layer.weight is model.transformer.wte.weight
    tokens = torch.arange(4)[None]
    plain = transformers.GPT2LMHeadModel(config)
    plain.load_state_dict(loaded, strict=False)
    plain.tie_weights()
    torch.testing.assert_close(model.eval()(tokens).logits, plain.eval()(tokens).logits)


def test_an_unfinished_layer_has_nothing():
    layer = DoraLinear.__new__(DoraLinear)
    with pytest.raises(AttributeError, match="in_channels"):
        _ = layer.in_channels
    nn.Module.__init__(layer)
    with pytest.raises(AttributeError, match="base_layer"):
        _ = layer.base_layer


class Reader(nn.Module):
    """Reads values in its forward, as Whisper's encoder does."""

    def __init__(self):
        super().__init__()
        self.conv = DoraConv2d(conv(), r=2, init_lora_weights=False)
        self.embed = DoraEmbedding(nn.Embedding(7, 4, padding_idx=2), r=2, init_lora_weights=False)

    def forward(self, x, tokens):
        y = self.conv(x)[:, :, :: self.conv.stride[0]] * self.conv.kernel_size[1]
        if self.conv.padding_mode == "zeros" and not hasattr(self.conv, "missing"):
            y = y + getattr(self.conv, "missing", 1)
        return y.sum() + self.embed(tokens.masked_fill(tokens == 6, self.embed.padding_idx)).sum()


@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_values_are_read_in_one_graph(backend):
    model = Reader().double()
    inputs = torch.randn(2, 4, 9, 9).double(), torch.arange(7)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), model(*inputs))
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled(*inputs)
    exported = torch.export.export(model, inputs)
    torch.testing.assert_close(exported.module()(*inputs), model(*inputs))


def test_whisper_runs_with_adapted_convolutions():
    """Its encoder reads the strides of its convolutions."""
    transformers = pytest.importorskip("transformers")
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "vocab_size": 32, "num_mel_bins": 8}
    sizes |= {f"{part}_{size}": n for part in ("encoder", "decoder") for size, n in (("attention_heads", 2),)}
    sizes |= {"encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "max_source_positions": 8, "max_target_positions": 8}
    tokens = {f"{name}_token_id": i for i, name in enumerate(["pad", "bos", "eos", "decoder_start"])}
    config = transformers.WhisperConfig(**sizes, **tokens, use_cache=False)  # 5.0 makes a cache of a deep copy
    model = transformers.WhisperModel(config).eval()
    dorac.apply_dora(model, ["conv1", "conv2", "q_proj"], r=2, init_lora_weights=False)
    inputs = {"input_features": torch.randn(2, 8, 16), "decoder_input_ids": torch.arange(6).view(2, 3)}
    y = model(**inputs).last_hidden_state
    assert dorac.find_idle(model, **inputs) == {}
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(**inputs).last_hidden_state, y)
