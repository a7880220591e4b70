"""``apply_dora``, ``merge`` and ``unmerge`` on whole models."""

import copy
import sys
import warnings

import pytest
import torch
from torch import nn

import dorac
from dorac import reference
from dorac.apply import dora_layers, saved_modules
from dorac.nn import DoraLinear

ADAPTER = ("lora_A", "lora_B", "lora_magnitude_vector")


class Block(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width, bias=False)

    def forward(self, x):
        return x + self.down(self.up(x).tanh())


class Model(nn.Module):
    """In float64, so that torch's own tolerance holds wherever two ways to the same output are compared."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.tail = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8))
        self.head = nn.Linear(8, 11, bias=False)
        self.double()

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.tail(x))


NAMES = ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"]
TOKENS = torch.arange(6).reshape(2, 3)


def llama(**config):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        **{"tie_word_embeddings": False, **config},
    )
    return transformers.LlamaForCausalLM(config)


def gpt2():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def train_a_bit(model):
    """Moves every adapter away from its initial state: no factor zero, every magnitude up to 20 % off the norm."""
    with torch.no_grad():
        for layer in dora_layers(model).values():
            lora_A, lora_B = layer._factors()
            (lora_A if isinstance(layer, dorac.nn.DoraEmbedding) else lora_B).normal_(std=0.3)
            layer.lora_magnitude_vector.mul_(0.8 + 0.4 * torch.rand_like(layer.lora_magnitude_vector))
    return model


def adapted(model=None, names=("up", "down"), **options):
    model = model or Model()
    dorac.apply_dora(model, list(names), **{"r": 3, "lora_alpha": 5, **options})
    return train_a_bit(model)


def snapshot(model):
    """Everything a refused call might have changed: objects, flags and bits."""
    modules = [(name, id(m), type(m), m.training, sorted(vars(m))) for name, m in model.named_modules()]
    parameters = [(name, id(p), p.requires_grad, p.dtype) for name, p in model.named_parameters(remove_duplicate=False)]
    return modules, parameters, {key: t.clone() for key, t in model.state_dict().items()}


def assert_unchanged(model, before):
    modules, parameters, state = snapshot(model)
    assert (modules, parameters) == before[:2]
    assert state.keys() == before[2].keys()
    assert all(torch.equal(t, before[2][key]) for key, t in state.items())


def trained(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def adapter_names(names):
    return {f"{name}.{part}" for name in names for part in ADAPTER}


# --- apply -----------------------------------------------------------------------------------------------------------


def test_wraps_the_named_layers_and_freezes_the_rest():
    model = Model()
    plain = copy.deepcopy(model)
    assert dorac.apply_dora(model, ["up", "down"], r=3) == NAMES
    assert list(dora_layers(model)) == NAMES
    assert trained(model) == adapter_names(NAMES)
    for name in NAMES:
        layer = model.get_submodule(name)
        assert torch.equal(layer.base_layer.weight, plain.get_submodule(name).weight)
        assert layer.r == 3
    torch.testing.assert_close(model(TOKENS), plain(TOKENS))


def test_the_options_reach_the_layers():
    model = Model()
    dorac.apply_dora(
        model,
        ["up", "tail.1"],
        r=4,
        lora_alpha=6,
        lora_dropout=0.25,
        use_rslora=True,
        init_lora_weights=False,
        adapter_dtype=torch.bfloat16,
        rank_pattern={"blocks.1.up": 2},
        alpha_pattern={"^tail.1": 3},
    )
    layers = dora_layers(model)
    assert {name: (layer.r, layer.lora_alpha) for name, layer in layers.items()} == {
        "blocks.0.up": (4, 6),
        "blocks.1.up": (2, 6),
        "tail.1": (4, 3),
    }
    for layer in layers.values():
        assert layer.scaling == layer.lora_alpha / layer.r**0.5
        assert layer.lora_dropout == 0.25
        assert layer.lora_A.dtype == torch.bfloat16
        assert layer.lora_B.count_nonzero()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtype_device_and_mode_follow_the_base_layer(dtype):
    model = Model().to(dtype).eval()
    model.blocks[1].to("meta").train()
    dorac.apply_dora(model, ["up", "head"])
    for name, layer in dora_layers(model).items():
        expected = torch.promote_types(dtype, torch.float32)
        assert {getattr(layer, part).dtype for part in ADAPTER} == {expected}
        assert {p.device.type for p in layer.parameters()} == {"meta" if name == "blocks.1.up" else "cpu"}
        assert layer.training == (name == "blocks.1.up")


def test_an_adapter_made_in_inference_mode_can_be_trained():
    model, x = Model(), torch.arange(6)[None]
    with torch.inference_mode():
        adapted(model)
    model(x).sum().backward()
    parameters = [p for layer in dora_layers(model).values() for p in layer.parameters(recurse=False)]
    assert not any(p.is_inference() or p.grad is None for p in parameters)


def test_training_changes_the_adapter_and_nothing_else():
    model = adapted(modules_to_save=["head"], lora_dropout=0.1)
    before = snapshot(model)[2]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(20):
        loss = nn.functional.cross_entropy(model(TOKENS).flatten(0, 1), TOKENS.flatten())
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
    changed = {key for key, t in model.state_dict().items() if not torch.equal(t, before[key])}
    assert changed == adapter_names(NAMES) | {"head.weight"}


def test_a_shared_module_gets_one_wrapper():
    model = Model()
    model.blocks[1].up = model.blocks[0].up  # one module in two places
    model.again = model.blocks[0]  # one place under two names
    assert dorac.apply_dora(model, ["up"]) == ["blocks.0.up", "blocks.1.up"]
    assert isinstance(model.blocks[0].up, DoraLinear)
    assert model.blocks[1].up is model.blocks[0].up is model.again.up
    assert trained(model) == adapter_names(["blocks.0.up"])
    train_a_bit(model)
    before = model(TOKENS)
    dorac.merge(model)  # both places are the adapter's own: nothing is tied
    assert model.blocks[1].up.merged
    torch.testing.assert_close(model(TOKENS), before)
    weight = model.blocks[0].up.base_layer.weight
    dorac.merge(model, unload=True)
    assert not dora_layers(model)
    assert model.blocks[1].up is model.blocks[0].up is model.again.up
    assert model.blocks[0].up.weight is weight
    torch.testing.assert_close(model(TOKENS), before)


def test_a_place_that_is_not_named_is_said():
    """Its forward may call the module there, and the adapter would never run."""
    model = Model()
    model.blocks[0].steps = nn.Sequential(model.blocks[0].up, nn.Tanh(), model.blocks[0].down)
    with pytest.warns(RuntimeWarning, match=r"run without the adapter.* blocks\.0\.up \(also blocks\.0\.steps\.0\)$"):
        names = dorac.apply_dora(model, ["up"])
    assert names == ["blocks.0.up", "blocks.1.up"]
    assert type(model.blocks[0].steps[0]) is nn.Linear
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dorac.apply_dora(model, ["down", "steps.2"])
    assert isinstance(model.blocks[0].steps[2], DoraLinear)


def test_a_second_apply_keeps_the_first_adapter():
    model = adapted(names=["up"], modules_to_save=["head"])
    first = {name: p.clone() for name, p in model.named_parameters()}
    assert dorac.apply_dora(model, ["down", "tail.1"], r=2) == ["blocks.0.down", "blocks.1.down", "tail.1"]
    wrapped = ["blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down", "tail.1"]
    assert trained(model) == adapter_names(wrapped) | {"head.weight"}
    assert all(torch.equal(p, first[name]) for name, p in model.named_parameters() if name in first)
    assert saved_modules(model) == ["head"]


def test_a_second_apply_leaves_a_frozen_adapter_frozen():
    model = adapted(names=["up"])
    model.blocks[0].up.lora_A.requires_grad_(False)
    dorac.apply_dora(model, ["down"])
    assert trained(model) == adapter_names(NAMES) - {"blocks.0.up.lora_A"}


def test_modules_to_save():
    model = Model()
    model.head.weight.requires_grad_(False)
    dorac.apply_dora(model, ["up", "head"], modules_to_save=["head", "tail"])
    saved = {"head.weight", "tail.0.weight", "tail.0.bias", "tail.1.weight", "tail.1.bias"}
    assert trained(model) == adapter_names(["blocks.0.up", "blocks.1.up"]) | saved
    assert saved_modules(model) == ["head", "tail"]
    with pytest.raises(ValueError, match="matched no module"):  # what is trained whole is never adapted
        dorac.apply_dora(model, ["tail.1"])


def test_modules_to_save_of_a_wrapped_part():
    """A part may be wrapped by itself; the whole model still knows what is trained."""
    model = Model()
    dorac.apply_dora(model.blocks, ["0.up"], modules_to_save=["1"])
    assert saved_modules(model) == ["blocks.1"]
    dorac.apply_dora(model, ["head"])
    assert saved_modules(model) == ["blocks.1"]
    assert {"blocks.1.up.weight", "head.lora_A", "blocks.0.up.lora_A"} <= trained(model)
    assert dorac.merge(model, unload=True) is model
    assert saved_modules(model) == []


def test_saved_modules_may_hold_integers():
    model = Model()
    model.head.table = nn.Parameter(torch.zeros(3, dtype=torch.int8), requires_grad=False)
    dorac.apply_dora(model, ["up"], modules_to_save=["head"])
    assert "head.weight" in trained(model)


def test_a_model_in_ddp(tmp_path):
    """Adapted before, it is merged and saved as the model inside; afterwards its new parameters would drift."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = Model()
        dorac.apply_dora(model, ["up", "down"])
        train_a_bit(model)
        ddp = nn.parallel.DistributedDataParallel(model)
        dorac.save_adapter(ddp, tmp_path)
        assert dorac.load_adapter(ddp, tmp_path) == NAMES
        assert dorac.merge(ddp) is None
        assert all(layer.merged for layer in dora_layers(model).values())
        plain = nn.parallel.DistributedDataParallel(Model())
        for adapt in (
            lambda: dorac.apply_dora(plain, ["up"]),
            lambda: dorac.load_adapter(torch.compile(plain), tmp_path),
        ):
            with pytest.raises(ValueError, match="DistributedDataParallel, which would not synchronise"):
                adapt()
        assert not dora_layers(plain)
    finally:
        torch.distributed.destroy_process_group()


def test_a_compiled_model():
    model = Model()
    compiled = torch.compile(model)
    assert dorac.apply_dora(compiled, ["up", "down"], modules_to_save=["head"]) == NAMES
    assert list(dora_layers(model)) == NAMES
    assert saved_modules(model) == ["head"]
    train_a_bit(model)
    before = model(TOKENS)
    assert dorac.merge(compiled) is None
    assert all(layer.merged for layer in dora_layers(model).values())
    assert dorac.unmerge(compiled) is None
    assert not any(layer.merged for layer in dora_layers(model).values())
    assert dorac.merge(compiled, unload=True) is compiled
    assert not dora_layers(model)
    torch.testing.assert_close(model(TOKENS), before)


def tie(model):
    model.head.weight = model.embed.weight
    return model


REFUSED = {
    "no match": (Model, {"target_modules": ["q_proj"]}, ValueError, "matched no module"),
    "an unadaptable module": (
        Model,
        {"target_modules": ["up", "tail.0"]},
        ValueError,
        "tail.0: LayerNorm is not supported",
    ),
    "bias": (Model, {"bias": "all"}, ValueError, "bias must be 'none', got 'all'"),
    "rank": (Model, {"r": 0}, ValueError, "r must be at least 1, got 0"),
    "the last rank": (Model, {"rank_pattern": {"1.down": -1}}, ValueError, "r must be at least 1, got -1"),
    "alpha": (Model, {"alpha_pattern": {"1.up": "8"}}, TypeError, "lora_alpha must be a number, got '8'"),
    "dropout": (Model, {"lora_dropout": 1.0}, ValueError, "lora_dropout must be in"),
    "dropout_on": (Model, {"dropout_on": "x"}, ValueError, "dropout_on must be 'adapter' or 'low_rank', got 'x'"),
    "init": (Model, {"init_lora_weights": "xavier"}, ValueError, "init_lora_weights must be"),
    "dtype": (Model, {"adapter_dtype": torch.int8}, TypeError, "adapter_dtype must be"),
    "saved nothing": (Model, {"modules_to_save": ["score"]}, ValueError, "modules_to_save: 'score' matches no module"),
    "saved tied": (
        lambda: tie(Model()),
        {"modules_to_save": ["head"]},
        ValueError,
        "modules_to_save: head shares its weight with embed.weight; untie them",
    ),
    "saved adapted": (
        lambda: adapted(names=["0.up"]),
        {"target_modules": ["1.down"], "modules_to_save": ["blocks.0"]},
        ValueError,
        "blocks.0 cannot be trained whole, blocks.0.up is adapted already",
    ),
    "saved part of an adapter": (
        lambda: adapted(names=["0.up"]),
        {"target_modules": ["1.down"], "modules_to_save": ["up.base_layer"]},
        ValueError,
        "blocks.0.up.base_layer cannot be trained whole, blocks.0.up is adapted already",
    ),
    "adapted": (lambda: adapted(names=["0.up"]), {}, ValueError, "blocks.0.up: is adapted already"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refusal_leaves_the_model_as_it_was(case):
    build, arguments, error, message = REFUSED[case]
    model = build()
    model.blocks[1].down.weight.requires_grad_(False)
    model.blocks[1].eval()
    before = snapshot(model)
    with pytest.raises(error, match=message):
        dorac.apply_dora(model, **{"target_modules": ["up", "down"], **arguments})
    assert_unchanged(model, before)


# --- merge -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "names"),
    [
        (Model, ["up", "down", "tail.1", "head", "embed"]),
        (llama, ["q_proj", "down_proj", "lm_head"]),
        (llama, ["embed_tokens", "o_proj"]),
        (gpt2, ["c_attn", "c_proj"]),
    ],
)
def test_merging_keeps_the_logits(build, names):
    def logits(model):
        y = model(TOKENS)
        return y if isinstance(y, torch.Tensor) else y.logits

    model = build().double().eval()
    plain = logits(model)
    adapted(model, names, rank_pattern={names[0]: 2}, use_rslora=True)
    before = logits(model)
    assert (before - plain).abs().max() > 1e-3
    assert dorac.merge(model) is None
    assert all(layer.merged for layer in dora_layers(model).values())
    torch.testing.assert_close(logits(model), before)
    merged = snapshot(model)
    assert dorac.merge(model) is None
    assert_unchanged(model, merged)
    assert dorac.unmerge(model) is None
    torch.testing.assert_close(logits(model), before)
    assert dorac.merge(model, unload=True) is model
    torch.testing.assert_close(logits(model), before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("build", [Model, gpt2])
def test_unmerging_restores_the_weights(build, dtype):
    """To ``2 eps * max(|V|, |W|)``, elementwise."""
    model = adapted(build().to(dtype), ["up", "down", "c_attn", "c_fc"])
    layers = dora_layers(model)
    before = {name: layer.base_layer.weight.detach().clone() for name, layer in layers.items()}
    dorac.merge(model)
    dorac.unmerge(model)
    for name, layer in layers.items():
        assert not layer.merged
        weight = before[name].double()
        oriented = weight.T if layer.fan_in_fan_out else weight
        factors = (layer.lora_A.detach().double(), layer.lora_B.detach().double())
        direction = reference.adapted_weight(oriented, *factors, layer.scaling)
        bound = 2 * torch.finfo(dtype).eps * torch.maximum(direction.abs(), oriented.abs())
        actual = layer.base_layer.weight.detach()
        assert actual.dtype == dtype
        error = (actual.double() - weight).abs()
        assert ((error.T if layer.fan_in_fan_out else error) <= bound).all()


def test_merge_finishes_what_is_half_merged():
    model = adapted()
    before = model(TOKENS)
    model.blocks[0].up.merge()
    dorac.merge(model)
    torch.testing.assert_close(model(TOKENS), before)
    model.blocks[1].down.unmerge()
    dorac.unmerge(model)
    assert not any(layer.merged for layer in dora_layers(model).values())
    torch.testing.assert_close(model(TOKENS), before)


def shared_base():
    """Two adapters over one linear layer: wrapped one place at a time."""
    model = Model()
    model.blocks[1].up = model.blocks[0].up
    adapted(model, ["blocks.0.up"])
    return adapted(model, ["blocks.1.up"])


def sliced_weight():
    """One storage, two parameters."""
    model = adapted(names=["0.up"])
    model.alias = nn.Parameter(model.blocks[0].up.base_layer.weight.detach()[:4], requires_grad=False)
    return model


TIED = {
    "a parameter": (
        lambda: adapted(tie(Model()), ["up", "head"]),
        r"head\.base_layer\.weight is tied to embed\.weight",
    ),
    "an embedding": (
        lambda: adapted(tie(Model()), ["up", "embed"]),
        r"embed\.base_layer\.weight is tied to head\.weight",
    ),
    "tied afterwards": (
        lambda: tie_afterwards(adapted(names=["up", "head"])),
        r"head\.base_layer\.weight is tied to embed\.weight",
    ),
    "a Llama's head": (
        lambda: adapted(llama(tie_word_embeddings=True), ["q_proj", "lm_head"]),
        r"lm_head\.base_layer\.weight is tied to model\.embed_tokens\.weight",
    ),
    "two adapters": (shared_base, r"blocks\.0\.up\.base_layer\.weight is tied to blocks\.1\.up\.base_layer\.weight"),
    "a storage": (sliced_weight, r"blocks\.0\.up\.base_layer\.weight is tied to alias"),
}


def tie_afterwards(model):
    model.head.base_layer.weight = model.embed.weight
    return model


@pytest.mark.parametrize("unload", [False, True])
@pytest.mark.parametrize("case", TIED)
def test_tied_weights_are_not_merged(case, unload):
    build, message = TIED[case]
    model = build()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        dorac.merge(model, unload=unload)
    assert_unchanged(model, before)


def test_the_advice_for_tied_weights_works():
    model = adapted(tie(Model()), ["head"])
    before = model(TOKENS)
    layer = model.head
    layer.base_layer.weight = nn.Parameter(layer.base_layer.weight.clone())
    embedding = model.embed.weight.detach().clone()
    dorac.merge(model)
    torch.testing.assert_close(model(TOKENS), before)
    assert torch.equal(model.embed.weight, embedding)


@pytest.mark.parametrize("part", ADAPTER)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_adapters_that_are_not_finite_are_not_merged(part, value):
    model = adapted()
    getattr(model.blocks[1].up, part).data.view(-1)[2] = value
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"blocks\.1\.up: the adapter is not finite"):
        dorac.merge(model)
    modules, parameters, state = snapshot(model)
    assert (modules, parameters) == before[:2]
    assert all(torch.equal(t.nan_to_num(7), before[2][key].nan_to_num(7)) for key, t in state.items())
    with pytest.raises(ValueError, match="the merged weight is not finite"):
        model.blocks[1].up.merge()
    assert not model.blocks[1].up.merged


def test_rows_of_zero_g_cannot_be_unmerged():
    model = adapted()
    model.blocks[1].up.lora_magnitude_vector.data[3] = 0
    dorac.merge(model)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"blocks\.1\.up: cannot unmerge rows 3: "):
        dorac.unmerge(model)
    assert all(layer.merged for layer in dora_layers(model).values())
    assert_unchanged(model, before)


def test_unload_gives_the_plain_model_back():
    model = Model()
    plain_classes = {name: type(m) for name, m in model.named_modules()}
    plain_keys = list(model.state_dict())
    adapted(model, ["up", "down", "tail.1"], modules_to_save=["head"])
    model.blocks[1].eval()
    before = model(TOKENS)
    weight = model.blocks[0].up.base_layer.weight
    dorac.merge(model, unload=True)
    assert {name: type(m) for name, m in model.named_modules()} == plain_classes
    assert list(model.state_dict()) == plain_keys
    assert not any(isinstance(m, DoraLinear) for m in model.modules())
    assert model.blocks[0].up.weight is weight
    assert trained(model) == {"head.weight"}
    assert [block.up.training for block in model.blocks] == [True, False]
    torch.testing.assert_close(model(TOKENS), before)
    assert vars(model).keys() == vars(Model()).keys()
    assert dorac.apply_dora(model, ["up"]) == ["blocks.0.up", "blocks.1.up"]  # and on from there


def test_a_model_that_is_itself_an_adapter():
    base_layer = nn.Linear(6, 4, dtype=torch.float64)
    layer = DoraLinear(base_layer, 2)
    train_a_bit(layer)
    x = torch.randn(3, 6, dtype=torch.float64)
    before = layer(x)
    assert dorac.merge(layer) is None
    torch.testing.assert_close(base_layer(x), before)
    assert dorac.unmerge(layer) is None
    torch.testing.assert_close(layer(x), before)
    layer.lora_magnitude_vector.data[1] = 0
    layer.merge()
    with pytest.raises(ValueError, match="DoraLinear: cannot unmerge rows 1"):
        dorac.unmerge(layer)
    assert dorac.merge(layer, unload=True) is base_layer
    assert dorac.merge(torch.compile(DoraLinear(base_layer, 2)), unload=True) is base_layer


@pytest.mark.parametrize("function", [dorac.merge, dorac.unmerge])
def test_a_model_without_adapters_is_refused(function):
    with pytest.raises(ValueError, match=r"Model holds no DoRA layer; wrap it with dorac.apply_dora first"):
        function(Model())


@pytest.mark.parametrize(
    "call",
    [
        lambda model: dorac.apply_dora(model, ["up"]),
        dorac.merge,
        dorac.cache_norms,
        dorac.adapters,
        lambda model: dorac.save_adapter(model, "nowhere"),
        lambda model: dorac.load_adapter(model, "nowhere"),
    ],
)
def test_what_is_no_module_is_refused(call):
    with pytest.raises(TypeError, match=r"^model must be a module, got OrderedDict$"):
        call(Model().state_dict())


def test_merging_on_meta():
    model = adapted(Model().to("meta"))
    dorac.merge(model)
    assert model(TOKENS.to("meta")).shape == (2, 3, 11)
    dorac.merge(model, unload=True)
    assert not dora_layers(model)


def test_merge_refuses_a_weight_that_overflows():
    model = nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4)).half()
    dorac.apply_dora(model, ["0", "1"], r=2, init_lora_weights=False)
    with torch.no_grad():
        model[1].lora_magnitude_vector.mul_(1e6)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"^1: the merged weight is not finite in torch.float16"):
        dorac.merge(model)
    assert not model[0].merged
    assert not model[1].merged
    assert torch.equal(model[1].base_layer.weight, before["1.base_layer.weight"])
    weight, layer = before["0.base_layer.weight"].double(), model[0]
    adapted_weight = reference.adapted_weight(weight, layer.lora_A.double(), layer.lora_B.double(), layer.scaling)
    bound = 2 * torch.finfo(torch.float16).eps * torch.maximum(weight.abs(), adapted_weight.abs())
    assert ((layer.base_layer.weight.double() - weight).abs() <= bound).all()


# --- work ------------------------------------------------------------------------------------------------------------


def calls_of(function):
    """How many calls of Python and of C functions a call makes."""
    count = 0

    def profile(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


def many_blocks(blocks):
    model = nn.Module()
    model.blocks = nn.ModuleList(
        nn.ModuleDict({"up": nn.Linear(2, 2), "norm": nn.LayerNorm(2), "other": nn.ModuleDict({"up": nn.Linear(2, 2)})})
        for _ in range(blocks)
    )
    return model


def work(blocks, directory):
    """The calls in each of the functions that go over a whole model, of which half of the "up" is adapted."""
    names = [f"blocks.{i}.up" for i in range(blocks)]
    options = {
        "rank_pattern": {rf"^blocks\.{i}\.up": 1 + i % 2 for i in range(blocks)},
        "alpha_pattern": {f"blocks.{i}.up": float(i + 1) for i in range(blocks)},
        "modules_to_save": [f"blocks.{i}.norm" for i in range(blocks)],
    }
    model, other = many_blocks(blocks), many_blocks(blocks)
    return {
        "apply": calls_of(lambda: dorac.apply_dora(model, names, **options)),
        "save": calls_of(lambda: dorac.save_adapter(model, directory)),
        "load": calls_of(lambda: dorac.load_adapter(other, directory)),
        "load again": calls_of(lambda: dorac.load_adapter(model, directory)),
        "cache": calls_of(lambda: dorac.cache_norms(model).remove()),
        "merge": calls_of(lambda: dorac.merge(model)),
        "unmerge": calls_of(lambda: dorac.unmerge(model)),
        "unload": calls_of(lambda: dorac.merge(model, unload=True)),
    }


def test_work_grows_with_the_model_and_not_with_its_square(tmp_path):
    """Twice the blocks, twice the calls; pairs of layers and parameters, names or keys would make four times them."""
    work(2, tmp_path)  # whatever happens once
    small, middle, large = (work(blocks, tmp_path) for blocks in (40, 80, 160))
    growth = {name: (large[name] - middle[name]) / (middle[name] - small[name]) for name in large}
    assert max(growth.values()) < 2.1, growth
    assert min(growth.values()) > 1.8, growth


# --- notebooks -------------------------------------------------------------------------------------------------------


def test_what_a_notebook_shows_fits_a_page(tmp_path):
    """Nothing that a call returns, and no layer's repr, grows with the model."""
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(500)))
    names = dorac.apply_dora(model, "all-linear", r=2)
    assert names == [str(i) for i in range(500)]
    assert isinstance(names, list)
    assert repr(names) == "['0', '1', ..., '499'] (500 modules)"
    assert repr(dorac.apply_dora(Model(), ["up"])) == "['blocks.0.up', 'blocks.1.up']"
    shown = [
        dorac.save_adapter(model, tmp_path),
        dorac.load_adapter(model, tmp_path),
        dorac.cache_norms(model),
        dorac.save_outputs(model),
        dorac.parameter_groups(model, 1e-3),
        dorac.print_trainable_parameters(model),
        model.load_state_dict(model.state_dict()),
        dorac.merge(model),
        dorac.unmerge(model),
        model[0].merge(),
        model[0].unmerge(),
        model[0].reset_parameters(),
    ]
    assert all(len(repr(value)) < 300 for value in shown)
    assert len(repr(model[0]).splitlines()) == 4


def test_a_scaling_of_zero_is_said():
    """PEFT is silent; a file that it wrote so is loaded."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    with pytest.warns(RuntimeWarning, match="^lora_alpha is 0 for 1: .* the magnitude alone is trained$"):
        dorac.apply_dora(model, ["0", "1"], r=2, alpha_pattern={"1": 0}, init_lora_weights=False)
    model(torch.randn(3, 4)).square().sum().backward()
    layer = model[1]
    assert [bool(p.grad.any()) for p in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector)] == [
        False,
        False,
        True,
    ]
    with pytest.warns(RuntimeWarning, match="^lora_alpha is 0 for 0, 1: "):
        dorac.add_adapter(model, "b", lora_alpha=0)


def test_a_scaling_of_zero_in_a_file(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(use_dora=True, r=2, lora_alpha=0, target_modules=["0"])
    stock = peft.get_peft_model(nn.Sequential(nn.Linear(4, 4)), config)
    layer = stock.base_model.model[0]
    nn.init.normal_(layer.lora_B["default"].weight)
    layer.lora_magnitude_vector["default"].weight.data.mul_(1.5)
    stock.save_pretrained(tmp_path)
    model = nn.Sequential(nn.Linear(4, 4))
    model.load_state_dict({f"0.{key}": t for key, t in layer.base_layer.state_dict().items()})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dorac.load_adapter(model, tmp_path)
    x = torch.randn(3, 4)
    torch.testing.assert_close(model(x), stock(x))
