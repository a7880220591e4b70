"""``dorac.nn.DoraEmbedding``: against dense float64 math, and against a stock PEFT layer where the two must agree."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, stack_module_state, vmap

import dorac
from dorac import functional, reference
from dorac.nn import DoraEmbedding
from dorac.testing import Sums, assert_rms_beside, layer_budgets, merge_budget

VOCAB, DIM, R = 29, 17, 3
HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float64, torch.float32, *HALF)
ADAPTER = ("lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
TOKENS = torch.tensor([[0, 5, 5, 28], [3, 0, 7, 1]])


def embedding(dtype=torch.float32, **options):
    return nn.Embedding(VOCAB, DIM, dtype=dtype, **options)


def gemma(dtype=torch.float32, scale=DIM**0.5):
    modeling = pytest.importorskip("transformers.models.gemma3.modeling_gemma3")
    return modeling.Gemma3TextScaledWordEmbedding(VOCAB, DIM, padding_idx=0, embed_scale=scale).to(dtype)


def bart(dtype=torch.float32):
    modeling = pytest.importorskip("transformers.models.bart.modeling_bart")
    return modeling.BartScaledWordEmbedding(VOCAB, DIM, 1, embed_scale=3.3).to(dtype)


BASES = pytest.mark.parametrize("base", [embedding, gemma, bart])


def adapted(base_layer, r=R, lora_alpha=5, **options):
    """A layer away from its initial state: no factor is zero and the magnitude up to 20 % off the norm."""
    layer = DoraEmbedding(base_layer, r, lora_alpha, **options)
    with torch.no_grad():
        layer.lora_embedding_A.normal_(std=0.4)
        layer.lora_magnitude_vector.mul_(0.8 + 0.4 * torch.rand_like(layer.lora_magnitude_vector))
    return layer


def dense_arguments(layer, dtype=torch.float64):
    """In ``dtype``, or each in its own for None."""
    tensors = (layer.base_layer.weight, *(getattr(layer, name) for name in ADAPTER))
    return tuple(t.detach().to(dtype or t.dtype) for t in tensors)


def textbook_of(layer):
    scale = 1 if layer.embed_scale is None else layer.embed_scale
    if isinstance(scale, torch.Tensor):
        scale = scale.to(layer.weight.dtype)

    def textbook(*tensors, **options):
        y = reference.dora_embedding(*tensors, **options)
        return y * (scale.to(y) if isinstance(scale, torch.Tensor) else scale)

    return textbook


def table_norm(weight, *factors):
    return reference.row_norm(weight.T, *factors)


def dense_output(layer, x):
    return textbook_of(layer)(x, *dense_arguments(layer), scaling=layer.scaling)


def check_against_dense(layer, x, actual):
    tensors = (x, *dense_arguments(layer, None))
    sums = Sums.of_embedding(*tensors[:3])
    # The result is rounded once more after embed_scale.
    budgets = layer_budgets(textbook_of(layer), table_norm, tensors, sums, scaling=layer.scaling, casts=1)
    assert actual.dtype == layer.weight.dtype
    budgets["y"].check(actual)


# --- forward ---------------------------------------------------------------------------------------------------------


@BASES
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_is_the_dense_formula(base, dtype):
    layer = adapted(base(dtype))
    check_against_dense(layer, TOKENS, layer(TOKENS))


@BASES
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("init", [True, "gaussian"])
def test_at_init_it_is_the_base_layer_bit_for_bit(base, dtype, init):
    layer = DoraEmbedding(base(dtype), R, 5, init_lora_weights=init)
    norm = functional.norm_factored(layer._matrix(), *layer._factors(), layer.scaling, budget=layer.norm_budget)
    assert torch.equal(functional.magnitude_scale(layer.lora_magnitude_vector, norm), torch.ones_like(norm))
    assert torch.equal(layer(TOKENS), layer.base_layer(TOKENS))


def test_init_follows_peft():
    """lora_embedding_A zero and lora_embedding_B standard normal; both normal without PEFT's initialisation."""
    base = nn.Embedding(500, 200)
    for init in (True, "gaussian"):
        layer = DoraEmbedding(base, 100, init_lora_weights=init)
        assert not layer.lora_embedding_A.count_nonzero()
        # 20000 draws: the deviation is known to 1/sqrt(2 * 20000) = 0.5 %.
        assert abs(layer.lora_embedding_B.std().item() - 1) < 0.02
    layer = DoraEmbedding(base, 100, init_lora_weights=False)
    assert abs(layer.lora_embedding_A.std().item() - 1) < 0.02
    assert abs(layer.lora_embedding_B.std().item() - 1) < 0.02
    norm = functional.norm_factored(layer._matrix(), *layer._factors(), layer.scaling, budget=layer.norm_budget)
    assert torch.equal(layer.lora_magnitude_vector, norm)


@pytest.mark.parametrize("vocab", [3000, 70_000])
def test_g_is_one_at_init_over_many_chunks(vocab):
    layer = DoraEmbedding(nn.Embedding(vocab, 64, dtype=torch.bfloat16), R, init_lora_weights=False)
    x = torch.arange(0, vocab, vocab // 7)
    plain = F.embedding(x, layer.weight) + layer.scaling * F.embedding(x, layer.lora_embedding_A.T) @ (
        layer.lora_embedding_B.T
    )
    assert torch.equal(layer(x), plain.to(torch.bfloat16))


# --- beside PEFT -----------------------------------------------------------------------------------------------------


def stock_peft_layer(base_layer, layer, **config):
    """A PEFT DoRA layer over a copy of the base layer with the same factors and magnitude."""
    peft = pytest.importorskip("peft")
    model = nn.Sequential(copy.deepcopy(base_layer).requires_grad_(True))
    config = peft.LoraConfig(r=layer.r, lora_alpha=layer.lora_alpha, target_modules=["0"], use_dora=True, **config)
    stock = peft.get_peft_model(model, config).base_model.model[0]
    with torch.no_grad():
        stock.lora_embedding_A.default.copy_(layer.lora_embedding_A)
        stock.lora_embedding_B.default.copy_(layer.lora_embedding_B)
        stock.lora_magnitude_vector.default.weight.copy_(layer.lora_magnitude_vector)
    return stock


@pytest.mark.parametrize("base", [embedding, gemma, bart, lambda: embedding(padding_idx=5, scale_grad_by_freq=True)])
def test_outputs_and_gradients_are_pefts(base):
    """Also in training mode with a dropout, which neither applies to an embedding."""
    base_layer = base()
    layer = adapted(base_layer, lora_dropout=0.4).train()
    stock = stock_peft_layer(base_layer, layer, lora_dropout=0.4).train()
    mine, theirs = layer(TOKENS), stock(TOKENS)
    exact = dense_output(layer, TOKENS)
    assert_rms_beside(mine, theirs, exact)
    dy = torch.randn_like(mine)
    mine.backward(dy)
    theirs.backward(dy)
    pairs = (
        (layer.lora_embedding_A, stock.lora_embedding_A.default),
        (layer.lora_embedding_B, stock.lora_embedding_B.default),
        (layer.lora_magnitude_vector, stock.lora_magnitude_vector.default.weight),
    )
    for ours, other in pairs:
        torch.testing.assert_close(ours.grad, other.grad)
    padding_idx = base_layer.padding_idx
    if padding_idx is not None:
        assert padding_idx in TOKENS
        assert not layer.lora_embedding_A.grad[:, padding_idx].count_nonzero()


@pytest.mark.parametrize("dtype", DTYPES)
def test_adapter_dtypes_and_shapes_are_pefts(dtype):
    layer = adapted(embedding(dtype))
    stock = stock_peft_layer(embedding(dtype), layer)
    for ours, other in (
        (layer.lora_embedding_A, stock.lora_embedding_A.default),
        (layer.lora_embedding_B, stock.lora_embedding_B.default),
        (layer.lora_magnitude_vector, stock.lora_magnitude_vector.default.weight),
    ):
        assert (ours.shape, ours.dtype) == (other.shape, other.dtype)


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparse", [False, True])
def test_training_changes_the_adapter_and_nothing_else(sparse):
    layer = adapted(embedding(padding_idx=0, sparse=sparse))
    before = copy.deepcopy(layer.state_dict())
    assert [name for name, p in layer.named_parameters() if p.requires_grad] == list(ADAPTER)
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(20):
        loss = layer(TOKENS).square().mean()
        optimizer.zero_grad()
        loss.backward()
        assert layer.lora_embedding_A.grad.is_sparse == sparse
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    changed = {name for name, value in layer.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == set(ADAPTER)
    assert torch.equal(layer.lora_embedding_A[:, 0], before["lora_embedding_A"][:, 0])  # padding


@pytest.mark.parametrize("dtype", HALF)
def test_a_cast_keeps_the_magnitude(dtype):
    layer = adapted(embedding())
    magnitude = layer.lora_magnitude_vector.detach().clone()
    layer.to(dtype)
    assert layer.lora_magnitude_vector.dtype == torch.float32
    assert torch.equal(layer.lora_magnitude_vector, magnitude)
    assert layer.lora_embedding_A.dtype == dtype
    check_against_dense(layer, TOKENS, layer(TOKENS))


def test_meta_then_materialised():
    layer = DoraEmbedding(embedding().to("meta"), R)
    assert layer(TOKENS.to("meta")).shape == (*TOKENS.shape, DIM)
    layer.to_empty(device="cpu")
    nn.init.normal_(layer.base_layer.weight)
    layer.reset_parameters()
    assert torch.equal(layer(TOKENS), layer.base_layer(TOKENS))


def test_state_dict_round_trip_and_copies():
    layer, other = adapted(embedding()), adapted(embedding())
    assert set(layer.state_dict()) == {"base_layer.weight", *ADAPTER}
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer(TOKENS), other(TOKENS))
    twin = copy.deepcopy(layer)
    layer.lora_magnitude_vector.data.zero_()
    assert torch.equal(twin(TOKENS), other(TOKENS))


# --- merging ---------------------------------------------------------------------------------------------------------


@BASES
@pytest.mark.parametrize("dtype", DTYPES)
def test_merge_and_unmerge(base, dtype):
    layer = adapted(base(dtype))
    weight, before = layer.base_layer.weight.detach().clone(), layer(TOKENS)
    table, *adapter = dense_arguments(layer, None)
    budget = merge_budget((table.T, *adapter), Sums.of_embedding(TOKENS, table, adapter[0]), scaling=layer.scaling)
    layer.merge()
    assert layer.base_layer.weight.is_contiguous()
    budget.check(layer.base_layer.weight.T)
    assert torch.equal(layer(TOKENS), layer.base_layer(TOKENS))
    # The merged weight, the low-rank part, the sum and the scaled result are rounded; wider types round each term too.
    roundings = 4 + (0 if dtype in HALF else VOCAB + R)
    assert (layer(TOKENS) - before).abs().max() <= roundings * torch.finfo(dtype).eps * before.abs().max()
    layer.unmerge()
    adapted_weight = reference.adapted_weight(weight.double().T, *dense_arguments(layer)[1:3], layer.scaling).T
    bound = 2 * torch.finfo(dtype).eps * torch.maximum(adapted_weight.abs(), weight.double().abs())
    assert ((layer.base_layer.weight.double() - weight.double()).abs() <= bound).all()


# --- compiled and under torch.func -----------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [embedding, gemma, lambda: embedding(padding_idx=0, sparse=True)])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.full)])
def test_compiled_equals_eager(base, backend):
    layer = adapted(base())
    twin = copy.deepcopy(layer)
    run = torch.compile(layer, fullgraph=True, backend=backend)
    dense = lambda t: t.to_dense() if t.is_sparse else t  # noqa: E731
    for length in (4, 6):
        x = torch.randint(VOCAB, (2, length))
        y, expected = run(x), twin(x)
        torch.testing.assert_close(y, expected)
        y.square().sum().backward()
        expected.square().sum().backward()
        for name in ADAPTER:
            torch.testing.assert_close(dense(getattr(layer, name).grad), dense(getattr(twin, name).grad))
    with torch.compiler.set_stance("fail_on_recompile"):
        for length in (9, 5):
            run(torch.randint(VOCAB, (2, length))).sum().backward()


def test_functional_call_over_stacked_modules():
    layers = [adapted(embedding(torch.float64)) for _ in range(3)]
    params, buffers = stack_module_state(layers)
    expected = torch.stack([layer(TOKENS) for layer in layers])
    skeleton = copy.deepcopy(layers[0]).to("meta")
    run = vmap(lambda p, b: functional_call(skeleton, (p, b), (TOKENS,)), (0, 0))
    torch.testing.assert_close(run(params, buffers), expected)
    torch.testing.assert_close(torch.compile(run, fullgraph=True, backend="aot_eager")(params, buffers), expected)


# --- what is refused -------------------------------------------------------------------------------------------------


class Positional(nn.Embedding):
    def forward(self, x):
        return super().forward(x + 2)


class OddlyScaled(nn.Embedding):
    embed_scale = 2.0

    def forward(self, x):
        return super().forward(x) * self.embed_scale + 1


class Normalised(nn.Embedding):
    """Its first row, which is padding, looks scaled."""

    embed_scale = 2.0

    def forward(self, x):
        return torch.nn.functional.normalize(super().forward(x), dim=-1) * self.embed_scale


class Called(nn.Embedding):
    def __call__(self, x):
        return 2 * super().__call__(x)


def t5gemma():
    """Scaled, but one of its rows is another parameter's."""
    modeling = pytest.importorskip("transformers.models.t5gemma2.modeling_t5gemma2")
    return modeling.T5Gemma2TextScaledWordEmbedding(VOCAB, DIM, 0, embed_scale=2.0, eoi_token_index=3)


def with_hook():
    layer = embedding()
    layer.register_forward_hook(lambda *_: None)
    return layer


REFUSED = {
    "linear": (lambda: nn.Linear(3, 4), "Linear is not supported, only nn.Embedding is"),
    "bag": (lambda: nn.EmbeddingBag(3, 4), "EmbeddingBag is not supported"),
    "max_norm": (lambda: embedding(max_norm=1.0), r"Embedding has max_norm=1.0, which rewrites rows of the weight"),
    "sparse and frequency": (lambda: embedding(sparse=True, scale_grad_by_freq=True), "sparse and scale_grad_by_freq"),
    "own forward": (lambda: Positional(VOCAB, DIM), "Positional has a forward of its own"),
    "another scale": (lambda: OddlyScaled(VOCAB, DIM), "OddlyScaled has a forward of its own"),
    "padding first": (lambda: Normalised(VOCAB, DIM, padding_idx=0), "Normalised has a forward of its own"),
    "own call": (lambda: Called(VOCAB, DIM), "Called has a __call__ of its own"),
    "a row of its own": (t5gemma, "T5Gemma2TextScaledWordEmbedding has a forward of its own"),
    "hook": (with_hook, "Embedding has hooks"),
    "integer": (lambda: embedding().to(torch.float8_e4m3fn), "Embedding has a weight of torch.float8_e4m3fn"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_layers_that_cannot_be_wrapped(case):
    build, message = REFUSED[case]
    base_layer = build()
    with pytest.raises(TypeError, match=f"base_layer cannot be wrapped: .*{message}"):
        DoraEmbedding(base_layer, R)
    assert all(p.requires_grad for p in base_layer.parameters())


def test_what_a_layer_shows():
    layer = adapted(embedding(padding_idx=4), lora_dropout=0.25)
    assert f"{VOCAB}, {DIM}, padding_idx=4, r=3, scaling=1.66667, lora_dropout=0.25, merged=False" in repr(layer)
    assert layer.weight is layer.base_layer.weight
    assert (layer.num_embeddings, layer.embedding_dim, layer.padding_idx, layer.embed_scale) == (VOCAB, DIM, 4, None)
    assert adapted(bart()).embed_scale == 3.3


# --- whole models ----------------------------------------------------------------------------------------------------


def test_a_tied_table_is_adapted_but_not_merged():
    model = nn.ModuleDict({"embed": embedding(), "head": nn.Linear(DIM, VOCAB, bias=False)})
    model["head"].weight = model["embed"].weight
    assert dorac.apply_dora(model, ["embed"], r=R) == ["embed"]
    assert model["head"].weight is model["embed"].weight
    before = model["head"].weight.detach().clone()
    with pytest.raises(ValueError, match=r"embed\.base_layer\.weight is tied to head\.weight: merging would change"):
        dorac.merge(model)
    assert torch.equal(model["head"].weight, before)


def test_unloading_gives_the_plain_embedding_back():
    model = nn.Sequential(embedding(), nn.Linear(DIM, 4))
    dorac.apply_dora(model, ["0", "1"], r=R, init_lora_weights=False)
    before = model(TOKENS)
    dorac.merge(model, unload=True)
    assert [type(module) for module in model] == [nn.Embedding, nn.Linear]
    torch.testing.assert_close(model(TOKENS), before)
