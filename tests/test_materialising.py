"""Wrapping, loading and materialising in any order: at its start an adapter changes nothing, and nothing is garbage."""

import copy
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from test_experts_module import arguments, stock
from torch import nn
from torch.nn.utils import skip_init

import dorac
from dorac.apply import dora_layers
from dorac.nn import DoraEmbedding, DoraLinear

TOKENS = torch.arange(12).reshape(2, 6) % 7


class Net(nn.Module):
    """A layer of each kind."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 6)
        self.linear = nn.Linear(6, 8)
        self.conv = nn.Conv1d(8, 4, 3, padding=1)
        self.tail = nn.Linear(4, 3)

    def forward(self, tokens):
        return self.tail(self.conv(self.linear(self.embed(tokens)).mT).mT)


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = stock("mixtral")

    def forward(self, _):
        return self.experts(*arguments("mixtral"))


KINDS = {"layers": (Net, ["embed", "linear", "conv"]), "experts": (Experts, ["experts"])}


@pytest.fixture(params=KINDS)
def kind(request):
    """How to build a model, what to adapt, and its trained weights with what they give."""
    build, names = KINDS[request.param]
    if build is Experts:
        pytest.importorskip("transformers")
    return build, names, build().state_dict()


def base_only(model, state):
    """The plain model's state dict with the keys of the wrapped model."""
    keys = {key.replace("base_layer.", ""): key for key in model.state_dict()}
    return {keys[key]: tensor for key, tensor in state.items()}


def expected(build, state):
    model = build()
    model.load_state_dict(state)
    return output(model)


def output(model):
    with torch.no_grad():
        return model(TOKENS)


def assert_starts(model, build, state):
    """g = 1: the output is the plain model's, and the factors have been drawn, one of them zero."""
    actual, wanted = output(model), expected(build, state)
    torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-6)
    for layer in dora_layers(model).values():
        assert layer.waiting is None
        factors = [p for name, p in layer.named_parameters(recurse=False) if not name.endswith("magnitude_vector")]
        assert sorted({bool(p.count_nonzero()) for p in factors}) == [False, True]
        assert all(p.isfinite().all() for p in factors)


def load(model, state, **how):
    return model.load_state_dict(base_only(model, state), strict=False, **how)


def wrap_then_load(build, names, state):
    model = build()
    dorac.apply_dora(model, names, r=2)
    load(model, state)
    return model


def wrap_then_load_twice(build, names, state):
    model = wrap_then_load(build, names, {key: 2 * tensor for key, tensor in state.items()})
    load(model, state)
    return model


def wrap_then_assign(build, names, state):
    model = build()
    dorac.apply_dora(model, names, r=2)
    load(model, copy.deepcopy(state), assign=True)
    return model


def load_then_wrap(build, names, state):
    model = build()
    model.load_state_dict(state)
    dorac.apply_dora(model, names, r=2)
    return model


def wrapped_on_meta(build, names):
    with torch.device("meta"):
        model = build()
    dorac.apply_dora(model, names, r=2)
    return model


def meta_then_assign(build, names, state):
    model = wrapped_on_meta(build, names)
    load(model, copy.deepcopy(state), assign=True)
    return model


def meta_empty_then_load(build, names, state):
    model = wrapped_on_meta(build, names).to_empty(device="cpu")
    load(model, state)
    return model


def meta_empty_then_copy(build, names, state):
    """Past every hook: the first forward finds the adapter without values."""
    model = wrapped_on_meta(build, names).to_empty(device="cpu")
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for key, tensor in base_only(model, state).items():
        tensors[key].data.copy_(tensor)
    return model


def meta_then_set(build, names, state):
    """As accelerate's set_module_tensor_to_device: parameters are exchanged one by one, on the base layers alone."""
    model = wrapped_on_meta(build, names)
    for key, tensor in base_only(model, state).items():
        module, _, name = key.rpartition(".")
        model.get_submodule(module)._parameters[name] = nn.Parameter(tensor.clone(), requires_grad=False)
    return model


def meta_then_set_then_move(build, names, state):
    return meta_then_set(build, names, state).to("cpu", torch.float32).train()


def meta_then_set_then_reset(build, names, state):
    model = meta_then_set(build, names, state)
    for layer in dora_layers(model).values():
        layer.reset_parameters()
        assert layer.waiting is None
    return model


def meta_then_reset_from_above(build, names, state):
    """FSDP's way: reset_parameters of every module, of a wrapper before its base layer."""
    model = wrapped_on_meta(build, names).to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    load(model, state)
    return model


def copies_on_meta(build, names, state):
    model = copy.deepcopy(wrapped_on_meta(build, names))
    load(model, copy.deepcopy(state), assign=True)
    return model


ORDERS = [
    load_then_wrap,
    wrap_then_load,
    wrap_then_load_twice,
    wrap_then_assign,
    meta_then_assign,
    meta_empty_then_load,
    meta_empty_then_copy,
    meta_then_set,
    meta_then_set_then_move,
    meta_then_set_then_reset,
    meta_then_reset_from_above,
    copies_on_meta,
]


@pytest.mark.parametrize("order", ORDERS)
def test_at_its_start_an_adapter_changes_nothing(kind, order):
    build, names, state = kind
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = order(build, names, state)
        model(TOKENS)
    assert_starts(model, build, state)


def test_the_reset_base_of_a_wrapper_that_was_reset_before_it():
    """Nothing is loaded at all: the base layer's own start is what the adapter starts from."""
    model = wrapped_on_meta(Net, ["linear"]).to_empty(device="cpu")
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    before = model.linear.lora_A.clone()
    model(TOKENS)
    assert torch.equal(model.linear.lora_A, before)
    x = torch.randn(3, 6)
    torch.testing.assert_close(model.linear(x), model.linear.base_layer(x))


def test_skip_init():
    """Its weights are whatever the memory held, NaN too, when the layer is wrapped."""
    layer = skip_init(nn.Linear, 6, 8)
    with torch.no_grad():
        layer.weight.fill_(torch.nan)
    model = nn.Sequential(layer)
    dorac.apply_dora(model, ["0"], r=2)
    weight, bias = torch.randn(8, 6), torch.randn(8)
    model.load_state_dict({"0.base_layer.weight": weight, "0.base_layer.bias": bias}, strict=False)
    x = torch.randn(3, 6)
    torch.testing.assert_close(model(x), nn.functional.linear(x, weight, bias))


def moved(model):
    """Away from its start, every tensor of the adapters."""
    with torch.no_grad():
        for layer in dora_layers(model).values():
            for name, p in layer.named_parameters(recurse=False):
                p.mul_(0.8 + 0.4 * torch.rand_like(p)) if "magnitude" in name else p.normal_(std=0.3)
    return model


def adapter_of(model):
    names = {f"{name}.{key}" for name, m in dora_layers(model).items() for key, _ in m.named_parameters(recurse=False)}
    return {key: tensor for key, tensor in model.state_dict().items() if key in names}


# How a model comes to hold base weights and an adapter that is in a directory: all in one order or another.


def file_last(build, names, state, directory):
    model = wrap_then_load(build, names, state)
    dorac.load_adapter(model, directory)
    return model


def file_first(build, names, state, directory):
    model = build()
    dorac.load_adapter(model, directory)
    load(model, state)
    return model


def wrap_file_base(build, names, state, directory):
    model = build()
    dorac.apply_dora(model, names, r=2)
    dorac.load_adapter(model, directory)
    load(model, state)
    return model


def on_meta_file_first(build, names, state, directory):
    with torch.device("meta"):
        model = build()
    dorac.load_adapter(model, directory)
    load(model, copy.deepcopy(state), assign=True)
    return model


def on_meta_wrap_file(build, names, state, directory):
    model = wrapped_on_meta(build, names)
    dorac.load_adapter(model, directory)
    load(model, copy.deepcopy(state), assign=True)
    return model


def on_meta_file_then_empty(build, names, state, directory):
    """to_empty keeps what the file gave, and makes room for the rest."""
    model = wrapped_on_meta(build, names)
    dorac.load_adapter(model, directory)
    model.to_empty(device="cpu")
    load(model, state)
    return model


def on_meta_empty_file(build, names, state, directory):
    model = wrapped_on_meta(build, names).to_empty(device="cpu")
    dorac.load_adapter(model, directory)
    load(model, state)
    return model


def on_meta_base_then_file(build, names, state, directory):
    model = meta_then_assign(build, names, state)
    dorac.load_adapter(model, directory)
    return model


FILE_ORDERS = [
    file_last,
    file_first,
    wrap_file_base,
    on_meta_file_first,
    on_meta_wrap_file,
    on_meta_file_then_empty,
    on_meta_empty_file,
    on_meta_base_then_file,
]


@pytest.mark.parametrize("order", FILE_ORDERS)
def test_an_adapter_from_a_file_is_itself_in_any_order(kind, order, tmp_path):
    build, names, state = kind
    trained = moved(load_then_wrap(build, names, state))
    dorac.save_adapter(trained, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = order(build, names, state, tmp_path)
    adapter = adapter_of(model)
    assert all(torch.equal(tensor, adapter[key]) for key, tensor in adapter_of(trained).items())
    assert torch.equal(output(model), output(trained))
    assert {name for name, p in model.named_parameters() if p.requires_grad} == adapter.keys()


def test_ties_of_parameters_on_meta_are_kept(tmp_path):
    def build():
        model = Net()
        model.tail = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
        model.tail[1].weight = model.tail[0].weight
        return model

    trained = build()
    dorac.apply_dora(trained, ["linear"], r=2, modules_to_save=["tail"])
    dorac.save_adapter(trained, tmp_path)
    with torch.device("meta"):
        model = build()
    dorac.load_adapter(model, tmp_path)
    assert model.tail[0].weight is model.tail[1].weight
    assert torch.equal(model.tail[0].weight, trained.tail[0].weight)
    assert model.embed.weight.is_meta


def test_a_dtype_of_the_file_that_the_parameters_on_meta_do_not_have(tmp_path):
    trained = moved(load_then_wrap(Net, ["linear"], Net().state_dict()))
    dorac.save_adapter(trained, tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    save_file({key: tensor.double() for key, tensor in load_file(path).items()}, path)
    model = wrapped_on_meta(Net, ["linear"])
    dorac.load_adapter(model, tmp_path)
    assert model.linear.lora_A.dtype == torch.float32
    assert torch.equal(model.linear.lora_A, trained.linear.lora_A)


def test_a_trained_magnitude_over_another_weight_is_named(kind):
    build, names, state = kind
    model = moved(load_then_wrap(build, names, state))
    before = adapter_of(copy.deepcopy(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(model, state)  # the weight that it has
    with pytest.warns(UserWarning, match="another base weight was loaded without a magnitude") as caught:
        load(model, {key: 2 * tensor for key, tensor in state.items()})
    assert {str(warning.message).partition(":")[0] for warning in caught} == set(names)
    assert all(torch.equal(tensor, before[key]) for key, tensor in adapter_of(model).items())


def test_loaded_adapters_are_not_drawn_anew():
    trained = moved(load_then_wrap(Net, ["linear", "embed"], Net().state_dict()))
    model = wrapped_on_meta(Net, ["linear", "embed"]).to_empty(device="cpu")
    state = trained.state_dict()
    model.load_state_dict({key: t for key, t in state.items() if "lora" in key}, strict=False)
    model.load_state_dict({key: t for key, t in state.items() if "lora" not in key}, strict=False)
    assert torch.equal(output(model), output(trained))


def test_factors_without_a_magnitude_keep_their_values():
    """The state dict of a LoRA adapter: the magnitude is the norm of what they make of the weight."""
    trained = moved(load_then_wrap(Net, ["linear"], Net().state_dict()))
    state = {key: t for key, t in trained.state_dict().items() if "magnitude" not in key}
    model = wrapped_on_meta(Net, ["linear"])
    model.load_state_dict(state, strict=False, assign=True)
    layer = model.linear
    assert torch.equal(layer.lora_A, trained.linear.lora_A)
    direction = layer.base_layer.weight + layer.scaling * layer.lora_B @ layer.lora_A
    torch.testing.assert_close(layer.lora_magnitude_vector, direction.norm(dim=1))


def test_what_has_no_values_is_nan_and_is_not_saved(tmp_path):
    model = wrapped_on_meta(Net, ["linear", "embed"])
    with pytest.raises(ValueError, match=r"^embed\.lora_embedding_A is on meta and has no values"):
        dorac.save_adapter(model, tmp_path)
    model.to_empty(device="cpu")
    assert all(p.isnan().all() for p in model.linear.parameters(recurse=False))
    with pytest.raises(ValueError, match=r"^embed\.lora_embedding_A is not finite: the adapter is not saved"):
        dorac.save_adapter(model, tmp_path)
    with pytest.raises(ValueError, match="the adapter is not finite, merging would destroy the weight"):
        dorac.merge(model)
    assert not list(tmp_path.iterdir())


def test_an_adapter_that_waits_compiles_once_it_has_values():
    model = wrapped_on_meta(Net, ["linear", "embed", "conv"])
    state = Net().state_dict()
    load(model, copy.deepcopy(state), assign=True)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(TOKENS), expected(Net, state))
    waiting = meta_then_set(Net, ["linear"], state)
    with pytest.raises(Exception, match=r"no values yet: call train\(\) or eval\(\) first"):
        torch.compile(waiting, fullgraph=True, backend="eager")(TOKENS)
    torch.testing.assert_close(torch.compile(waiting.eval(), fullgraph=True, backend="eager")(TOKENS), output(waiting))


def test_a_forward_on_meta_goes_on_waiting():
    model = wrapped_on_meta(Net, ["linear", "embed"])
    assert model(TOKENS.to("meta")).shape == (2, 6, 3)
    assert all(layer.waiting is not None for layer in dora_layers(model).values())


def test_from_pretrained_into_a_class_that_wraps(tmp_path):
    """transformers makes the model on meta, and leaves what the checkpoint lacks in whatever the memory holds."""
    transformers = pytest.importorskip("transformers")

    class Wrapped(transformers.LlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            dorac.apply_dora(self, ["q_proj", "embed_tokens"], r=2)

    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    saved = Wrapped(transformers.LlamaConfig(tie_word_embeddings=False, **sizes, **heads)).eval()
    base = {key: tensor for key, tensor in saved.state_dict().items() if "lora" not in key}
    Wrapped.save_pretrained(saved, tmp_path / "base", state_dict=base)  # the class's own, which writes the whole model
    model = Wrapped.from_pretrained(tmp_path / "base")
    tokens = torch.arange(5)[None]
    assert [type(layer) for layer in dora_layers(model).values()] == [DoraEmbedding, DoraLinear]
    torch.testing.assert_close(model(tokens).logits, saved(tokens).logits)
    Wrapped.save_pretrained(moved(saved), tmp_path / "all")
    torch.testing.assert_close(Wrapped.from_pretrained(tmp_path / "all")(tokens).logits, saved(tokens).logits)
    dorac.save_adapter(saved, tmp_path / "adapter")  # over values that were drawn
    dorac.load_adapter(model, tmp_path / "adapter")
    torch.testing.assert_close(model(tokens).logits, saved(tokens).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_base_weights_loaded_after_a_cast(kind, dtype):
    """A cast rounds the weight that the magnitude was taken of; nobody has trained it for that."""
    build, names, state = kind
    model = build()
    dorac.apply_dora(model, names, r=2)
    model.to(dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load(model, state)
    for layer in dora_layers(model).values():
        norm = layer._norm()
        magnitudes = torch.cat([m.flatten() for m in layer._magnitudes()])
        assert torch.equal(magnitudes.sort().values, norm.flatten().to(magnitudes.dtype).sort().values)


@pytest.mark.parametrize("how", ["plain", "vmap", "compiled"])
def test_a_skeleton_on_meta_runs_with_the_tensors_it_is_given(how):
    """torch's recipe for ensembles; the layer itself goes on waiting."""
    with torch.device("meta"):
        skeleton = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    dorac.apply_dora(skeleton, ["0", "1"], r=2)
    models = [nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)) for _ in range(2)]
    for model in models:
        dorac.apply_dora(model, ["0", "1"], r=2, init_lora_weights=False)
    x = torch.randn(3, 6)
    stacked, _ = torch.func.stack_module_state(models)

    def run(parameters):
        return torch.func.functional_call(skeleton, parameters, (x,))

    expected = torch.stack([model(x) for model in models])
    if how == "vmap":
        actual = torch.vmap(run)(stacked)
    else:
        one = torch.compile(run, fullgraph=True, backend="aot_eager") if how == "compiled" else run
        actual = torch.stack([one({name: t[i] for name, t in stacked.items()}) for i in range(2)])
    torch.testing.assert_close(actual, expected)
    assert all(layer.waiting is not None for layer in dora_layers(skeleton).values())


def test_a_cast_of_a_waiting_layer_keeps_the_magnitude_wide(kind):
    build, names, _ = kind
    model, plain = wrapped_on_meta(build, names), build()
    for name, layer in dora_layers(model).items():
        layer.base_layer.load_state_dict(plain.get_submodule(name).state_dict(), assign=True)
        layer.to(torch.bfloat16)
        assert all(m.dtype.itemsize >= 4 for m in layer._magnitudes())


def test_a_refused_load_leaves_a_waiting_layer_waiting():
    model = wrapped_on_meta(Net, ["linear"]).to_empty(device="cpu")
    model.register_load_state_dict_pre_hook(lambda *_: None)  # then torch finds what does not fit by itself
    whole = Net()
    dorac.apply_dora(whole, ["linear"], r=2)
    state = whole.state_dict()
    wrong = state | {"linear.lora_A": torch.randn(9, 6)}
    with pytest.raises(RuntimeError, match=r"size mismatch for linear\.lora_A"):
        model.load_state_dict(wrong)
    assert model.linear.waiting is not None
    base = {key: tensor for key, tensor in state.items() if "lora" not in key}
    model.load_state_dict(base, strict=False)  # the adapter starts from them
    torch.testing.assert_close(model(TOKENS), whole(TOKENS))


def test_values_given_in_inference_mode_can_be_trained(kind):
    build, names, state = kind
    model = wrapped_on_meta(build, names)
    with torch.inference_mode():
        load(model, {key: tensor.clone() for key, tensor in state.items()}, assign=True)
        model.eval()
    assert not any(p.is_inference() for m in dora_layers(model).values() for p in m.parameters(recurse=False))


@pytest.mark.parametrize("call", [dorac.merge, lambda model: model.linear.merge(), dorac.cache_norms])
def test_waiting_layers_have_values_for_what_needs_them(call):
    model, plain = wrapped_on_meta(Net, ["linear"]), Net()
    model.linear.base_layer.load_state_dict(plain.linear.state_dict(), assign=True)
    call(model)
    assert model.linear.waiting is None
    torch.testing.assert_close(model.linear(torch.ones(6)), plain.linear(torch.ones(6)))


def test_from_pretrained_initialises_a_head_that_is_in_no_checkpoint(tmp_path):
    """transformers initialises the base layer, and leaves the adapter in whatever the memory held."""
    transformers = pytest.importorskip("transformers")

    class Wrapped(transformers.LlamaForSequenceClassification):
        def __init__(self, config):
            super().__init__(config)
            dorac.apply_dora(self, ["q_proj", "score"], r=2)

    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    saved = Wrapped(transformers.LlamaConfig(vocab_size=11, num_labels=3, pad_token_id=0, **sizes))
    state = {key: t for key, t in saved.state_dict().items() if not key.startswith("score")}
    Wrapped.save_pretrained(saved, tmp_path, state_dict=state)
    model = Wrapped.from_pretrained(tmp_path).eval()
    assert model(TOKENS).logits.isfinite().all()
    assert torch.equal(model.score.lora_magnitude_vector, model.score.base_layer.weight.norm(dim=1))
    assert model.score.lora_A.any()
    assert not model.score.lora_B.any()
    assert torch.equal(model.model.layers[0].self_attn.q_proj.lora_A, saved.model.layers[0].self_attn.q_proj.lora_A)
