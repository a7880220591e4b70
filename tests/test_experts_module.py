"""``dorac.nn.DoraExperts`` on transformers' experts of four families, against the stock module with dense weights."""

import copy
import functools
import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad_and_value, stack_module_state, vmap

import dorac
from dorac import reference
from dorac.nn import DoraExperts
from dorac.testing import assert_rms_beside

transformers = pytest.importorskip("transformers")

E, K, HIDDEN, INNER, R = 4, 2, 16, 24, 3
SIZES = {
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 32,
    "num_experts_per_tok": K,
    "pad_token_id": 0,
}
CONFIGS = {
    "mixtral": lambda: transformers.MixtralConfig(**SIZES, num_local_experts=E),
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(**SIZES, num_experts=E, moe_intermediate_size=INNER),
    "gpt_oss": lambda: transformers.GptOssConfig(
        **SIZES, num_local_experts=E, layer_types=["full_attention", "full_attention"]
    ),
    "llama4": lambda: transformers.Llama4TextConfig(
        **SIZES, num_local_experts=E, intermediate_size_mlp=INNER, interleave_moe_layer_step=1
    ),
}
FAMILIES = pytest.mark.parametrize("family", CONFIGS)
PROJECTIONS = ("gate_up_proj", "down_proj")


def language_model(family, dtype=torch.float32):
    torch.manual_seed(0)
    config = CONFIGS[family]()
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    for name, parameter in model.named_parameters():
        if "experts" in name or "router" in name or "gate.weight" in name:
            nn.init.normal_(parameter, std=0.3)
    return model


def stock(family, dtype=torch.float64):
    """A block's experts with random weights and biases, which run as their own forward says."""
    model = language_model(family, dtype)
    experts = next(m for n, m in model.named_modules() if n.endswith(".experts"))
    if hasattr(experts, "config"):
        experts.config._experts_implementation = "eager"
    return experts


def off_init(layer):
    """Magnitudes up to 20 % off the norm; the factors are not zero already."""
    with torch.no_grad():
        for magnitude in layer._magnitudes():
            magnitude.mul_(0.8 + 0.4 * torch.rand_like(magnitude))
    return layer


def adapted(family, dtype=torch.float64, **options):
    return off_init(DoraExperts(stock(family, dtype), R, 5, init_lora_weights=False, **options))


def arguments(family, tokens=6, dtype=torch.float64):
    """Hidden states and a routing that leaves the last expert out; all tokens for every expert in Llama 4."""
    generator = torch.Generator().manual_seed(tokens)
    if family == "llama4":
        return (torch.randn(E * tokens, HIDDEN, generator=generator, dtype=torch.float64).to(dtype),)
    hidden = torch.randn(tokens, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    index = torch.stack([torch.randperm(E - 1, generator=generator)[:K] for _ in range(tokens)])
    weights = torch.rand(tokens, K, generator=generator, dtype=torch.float64).to(dtype)
    return hidden, index, weights


def dense_forward(layer, args, dtype=None):
    """The stock module with the dense adapted weights; differentiable, through the norms if the layer is."""
    weights = {}
    for projection in PROJECTIONS:
        tensors = (layer._matrices(projection), *layer._adapter(projection))
        weight, lora_A, lora_B, magnitude = (t if dtype is None else t.to(dtype) for t in tensors)
        norm = reference.row_norm(weight, lora_A, lora_B, layer.scaling)
        norm = norm if layer.norm_grad else norm.detach()
        merged = reference.merge_weight(weight, lora_A, lora_B, magnitude, scaling=layer.scaling, weight_norm=norm)
        weights[projection] = merged.mT if layer.transposed else merged
    others = {k: v for k, v in layer.base_layer.named_parameters() if k not in weights}
    if dtype is not None:
        args = [a.to(dtype) if a.is_floating_point() else a for a in args]
        others = {k: v.to(dtype) for k, v in others.items()}
    return functional_call(layer.base_layer, weights | others, tuple(args))


@FAMILIES
def test_equals_the_dense_reference_with_all_gradients(family):
    """Gradients reach every factor of every expert that got tokens, the input and the routing weights."""
    layer = adapted(family)
    args = [a.requires_grad_(a.is_floating_point()) for a in arguments(family)]
    leaves = [*(a for a in args if a.is_floating_point()), *layer.parameters(recurse=False)]
    y, expected = layer(*args), dense_forward(layer, args)
    torch.testing.assert_close(y, expected)
    grads, exact = (torch.autograd.grad(out.sin().sum(), leaves) for out in (y, expected))
    torch.testing.assert_close(grads, exact)
    names = [None] * (len(leaves) - 6) + [n for n, _ in layer.named_parameters(recurse=False)]
    for name, grad in zip(names, grads, strict=True):
        if name is not None:
            reached = grad.flatten(1).abs().amax(1) > 0
            assert reached[: E - 1].all(), name
            assert reached[E - 1] == (family == "llama4"), name
    assert all(p.grad is None and not p.requires_grad for p in layer.base_layer.parameters())


@FAMILIES
@pytest.mark.parametrize(
    ("dtype", "adapter_dtype"),
    [(torch.float32, None), (torch.bfloat16, None), (torch.float16, None), (torch.bfloat16, torch.bfloat16)],
)
def test_any_dtype(family, dtype, adapter_dtype):
    layer = adapted(family, dtype, adapter_dtype=adapter_dtype)
    args = arguments(family, dtype=dtype)
    y = layer(*args)
    assert y.dtype == dtype
    assert layer.gate_up_proj_lora_magnitude_vector.dtype == torch.float32
    truth = dense_forward(layer, args, torch.float64)
    dense = dense_forward(layer, args, dtype)
    # Two layers with a gate in between are no sum of products: the RMS alone. Of each, see test_row_layers.py.
    assert_rms_beside(y, dense, truth)


@FAMILIES
def test_starts_as_the_base(family):
    base = stock(family)
    args = arguments(family)
    expected = base(*args)
    torch.testing.assert_close(DoraExperts(base, R)(*args), expected)


@FAMILIES
def test_merge_and_unmerge(family):
    layer, args = adapted(family), arguments(family)
    before = {k: v.clone() for k, v in layer.base_layer.state_dict().items()}
    y = layer(*args)
    layer.merge()
    layer.merge()
    assert layer.merged
    torch.testing.assert_close(layer(*args), y)
    torch.testing.assert_close(layer.base_layer(*args), y)
    with pytest.raises(ValueError, match="is merged; unmerge it before loading"):
        layer.load_state_dict(layer.state_dict())
    with pytest.raises(ValueError, match="unmerge it before resetting"):
        layer.reset_parameters()
    layer.unmerge()
    assert not layer.merged
    for key, tensor in layer.base_layer.state_dict().items():
        torch.testing.assert_close(tensor, before[key], rtol=0, atol=1e-14)
    torch.testing.assert_close(layer(*args), y)


def test_unmerge_refuses_lost_rows_by_expert():
    layer = adapted("gpt_oss")
    with torch.no_grad():
        layer.down_proj_lora_magnitude_vector[2, 5] = 0
    layer.merge()
    merged = layer.base_layer.gate_up_proj.clone()
    with pytest.raises(ValueError, match=r"down_proj: cannot unmerge rows 2\.5: their g is 0"):
        layer.unmerge()
    assert layer.merged
    assert torch.equal(layer.base_layer.gate_up_proj, merged)


def test_merge_refuses_what_is_not_finite():
    layer = adapted("mixtral")
    with torch.no_grad():
        layer.down_proj_lora_B[1, 2] = float("inf")
    before = copy.deepcopy(layer.base_layer.state_dict())
    with pytest.raises(ValueError, match=r"the merged down_proj is not finite in torch\.float64"):
        layer.merge()
    assert not layer.merged
    assert all(torch.equal(v, before[k]) for k, v in layer.base_layer.state_dict().items())


@pytest.mark.parametrize(
    "family",  # Qwen3-MoE's experts are Mixtral's
    ["mixtral", "gpt_oss", "llama4", pytest.param("qwen3_moe", marks=pytest.mark.full)],
)
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.full)])
def test_compiles_to_one_graph_for_any_number_of_tokens(family, backend):
    layer = adapted(family, torch.float32)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)

    def step(tokens):
        args = arguments(family, tokens, torch.float32)
        layer.zero_grad()
        compiled(*args).sin().sum().backward()
        grads = [p.grad.clone() for p in layer.parameters(recurse=False)]
        layer.zero_grad()
        y = layer(*args)
        y.sin().sum().backward()
        torch.testing.assert_close(compiled(*args), y)
        # In eager the products accumulate onto each other, which the compiler's are summed after.
        torch.testing.assert_close(grads, [p.grad for p in layer.parameters(recurse=False)], rtol=1e-5, atol=1e-5)

    step(6)
    step(9)
    with torch.compiler.set_stance("fail_on_recompile"):
        for tokens in (14, 7, 30):
            step(tokens)


@FAMILIES
def test_dropout(family):
    layer, args = adapted(family, lora_dropout=0.5), arguments(family)
    assert torch.equal(layer.eval()(*args), layer(*args))
    layer.train()
    torch.manual_seed(0)
    assert not torch.equal(layer(*args), layer(*args))
    with torch.no_grad():  # a change of zero: g = 1 and no delta
        for projection in PROJECTIONS:
            lora_A, lora_B, magnitude = layer._adapter(projection)
            lora_B.zero_()
            magnitude.copy_(dorac.functional.init_magnitude(layer._matrices(projection), lora_A, lora_B, 1.0))
    torch.testing.assert_close(layer(*args), layer.base_layer(*args))


def test_state_dict_and_copies():
    layer, args = adapted("gpt_oss"), arguments("gpt_oss")
    keys = {f"{p}_{n}" for p in PROJECTIONS for n in ("lora_A", "lora_B", "lora_magnitude_vector")}
    base = {f"base_layer.{p}{suffix}" for p in PROJECTIONS for suffix in ("", "_bias")}
    assert set(layer.state_dict()) == keys | base
    other = DoraExperts(stock("gpt_oss"), R, 5)
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(*args), layer(*args))
    assert torch.equal(copy.deepcopy(layer)(*args), layer(*args))
    assert torch.equal(pickle.loads(pickle.dumps(layer))(*args), layer(*args))


def test_magnitudes_stay_float32():
    layer = adapted("mixtral", torch.float32).to(torch.bfloat16)
    assert layer.base_layer.down_proj.dtype == layer.down_proj_lora_A.dtype == torch.bfloat16
    assert all(m.dtype == torch.float32 for m in layer._magnitudes())
    layer.merge()
    assert layer.to(torch.float16).merged_norm.dtype == torch.float32


def test_init_is_per_expert():
    """Kaiming-uniform in 1/sqrt(in) whatever the number of experts; lora_B zero; each expert's own numbers."""
    layer = DoraExperts(stock("llama4"), 40)
    for projection, in_features in (("gate_up_proj", HIDDEN), ("down_proj", INNER)):
        lora_A, lora_B, magnitude = layer._adapter(projection)
        bound = in_features**-0.5
        assert (lora_A.abs().amax((1, 2)) <= bound).all()
        assert (lora_A.abs().amax((1, 2)) > 0.97 * bound).all()
        assert not torch.equal(lora_A[0], lora_A[1])
        assert lora_B.count_nonzero() == 0
        torch.testing.assert_close(magnitude, torch.linalg.vector_norm(layer._matrices(projection), dim=-1))


@pytest.mark.parametrize("number", [E, -1, 7])
def test_an_expert_out_of_range_raises_as_torch_does(number):
    layer, (hidden, index, weights) = adapted("mixtral"), arguments("mixtral")
    index[2, 1] = number
    with pytest.raises(IndexError, match="index out of range"):
        layer(hidden, index, weights)


@FAMILIES
def test_without_tokens(family):
    layer, args = adapted(family), [a[:0] for a in arguments(family)]
    y = layer(*args)
    assert y.shape == args[0].shape
    grads = torch.autograd.grad(y.sum(), [*layer.parameters(recurse=False)])
    assert not any(grad.any() for grad in grads)


def test_refused():
    with pytest.raises(TypeError, match="Linear is not supported, only transformers' experts"):
        DoraExperts(nn.Linear(3, 3))
    experts = stock("mixtral")
    experts._is_expert_parallel = True
    with pytest.raises(TypeError, match="is spread over processes"):
        DoraExperts(experts)
    experts = stock("mixtral")
    experts.forward = lambda *args: None
    with pytest.raises(TypeError, match="has a forward of its own"):
        DoraExperts(experts)
    experts = stock("gpt_oss")
    experts.down_proj = nn.Parameter(experts.down_proj.data.char(), requires_grad=False)
    with pytest.raises(TypeError, match=r"has a down_proj of torch\.int8, dequantise it first"):
        DoraExperts(experts)
    experts = stock("llama4")
    experts.register_forward_hook(lambda *args: None)
    with pytest.raises(TypeError, match="has hooks"):
        DoraExperts(experts)
    experts = stock("qwen3_moe")
    experts.down_proj = nn.Parameter(experts.down_proj[0])
    with pytest.raises(TypeError, match="does not hold gate_up_proj or up_proj, and down_proj, as 3-D parameters"):
        DoraExperts(experts)
    with pytest.raises(ValueError, match="r must be at least 1"):
        DoraExperts(stock("mixtral"), 0)


def nemotron_experts():
    """Experts without a gate: one activation between two projections."""
    nemotron = pytest.importorskip("transformers.models.nemotron_h.modeling_nemotron_h")  # newer than the others
    config = transformers.NemotronHConfig(
        hidden_size=HIDDEN, moe_intermediate_size=INNER, n_routed_experts=E, moe_latent_size=None
    )
    config._experts_implementation = "eager"
    experts = nemotron.NemotronHExperts(config).double()
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.3)
    return experts


def test_experts_without_a_gate():
    layer = off_init(DoraExperts(nemotron_experts(), R, init_lora_weights=False))
    assert layer.projections == ["up_proj", "down_proj"]
    args = arguments("nemotron")
    y = layer(*args)
    layer.merge()
    torch.testing.assert_close(layer(*args), y)


def stacked_cells():
    for family in CONFIGS:
        for norm_grad in (False, True):
            for backend in (None, "aot_eager", "inductor"):
                ci = backend is None or (backend == "aot_eager" and family == "gpt_oss" and norm_grad)
                yield pytest.param(family, norm_grad, backend, marks=[] if ci else [pytest.mark.full])


@pytest.mark.parametrize(("family", "norm_grad", "backend"), list(stacked_cells()))
def test_functional_call_over_stacked_modules(family, norm_grad, backend):
    """Three adapters, each over its own copy of the experts, by vmap over one skeleton: values and every gradient."""
    layers = [adapted(family, norm_grad=norm_grad).requires_grad_() for _ in range(3)]
    for scale, layer in enumerate(layers, 1):
        with torch.no_grad():
            layer.down_proj_lora_B.mul_(scale)
    params, buffers = stack_module_state(layers)
    args, skeleton = arguments(family), copy.deepcopy(layers[0]).to("meta")

    def loss(p, b):
        return functional_call(skeleton, (p, b), args).sin().sum()

    run = vmap(grad_and_value(loss))
    run = torch.compile(run, fullgraph=True, backend=backend) if backend else run
    gradients, values = run({k: v.detach() for k, v in params.items()}, buffers)
    for i, layer in enumerate(layers):
        expected = dense_forward(layer, args).sin().sum()
        torch.testing.assert_close(values[i], expected.detach())
        exact = torch.autograd.grad(expected, list(layer.parameters()))
        torch.testing.assert_close([gradients[name][i] for name, _ in layer.named_parameters()], list(exact))


# --- models ----------------------------------------------------------------------------------------------------------


def logits(model):
    return model(input_ids=torch.arange(1, 9).view(2, 4), use_cache=False).logits


def adapt_model(family, **options):
    model = language_model(family)
    names = dorac.apply_dora(model, ["experts", "q_proj"], r=R, init_lora_weights=False, **options)
    assert sum(name.endswith("experts") for name in names) == 2
    for layer in dorac.apply.dora_layers(model).values():
        off_init(layer)
    return model


@FAMILIES
def test_model_merges_saves_and_loads(family, tmp_path):
    model = adapt_model(family)
    plain = logits(language_model(family))
    y = logits(model)
    assert (y - plain).abs().max() > 1e-3
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert all("lora" in n for n in trained)
    y.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)

    dorac.save_adapter(model, tmp_path)
    again = language_model(family)
    names = dorac.load_adapter(again, tmp_path)
    assert any(name.endswith(".experts") for name in names)
    torch.testing.assert_close(logits(again), y)

    dorac.merge(model)
    torch.testing.assert_close(logits(model), y, rtol=1e-4, atol=1e-5)
    dorac.unmerge(model)
    torch.testing.assert_close(logits(model), y, rtol=1e-4, atol=1e-5)
    dorac.merge(model, unload=True)
    assert not any(isinstance(m, dorac.nn.DoraLayer) for m in model.modules())
    torch.testing.assert_close(logits(model), y, rtol=1e-4, atol=1e-5)


@pytest.mark.full
@FAMILIES
def test_model_compiles_to_one_graph(family):
    model = adapt_model(family)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(logits(compiled), logits(model), rtol=1e-4, atol=1e-5)


def test_adapter_keys_are_named_by_projection(tmp_path):
    from safetensors.torch import load_file

    model = adapt_model("gpt_oss")
    dorac.save_adapter(model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    prefix = "base_model.model.model.layers.0.mlp.experts."
    shapes = {k.removeprefix(prefix): list(t.shape) for k, t in tensors.items() if k.startswith(prefix)}
    assert shapes == {
        "gate_up_proj.lora_A": [E, R, HIDDEN],
        "gate_up_proj.lora_B": [E, 2 * INNER, R],
        "gate_up_proj.lora_magnitude_vector": [E, 2 * INNER],
        "down_proj.lora_A": [E, R, INNER],
        "down_proj.lora_B": [E, HIDDEN, R],
        "down_proj.lora_magnitude_vector": [E, HIDDEN],
    }
    config = transformers.MixtralConfig(**SIZES, num_local_experts=2)
    fewer = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=r"does not fit the model:\n.*experts"):
        dorac.load_adapter(fewer, tmp_path)
    assert not any(isinstance(m, dorac.nn.DoraLayer) for m in fewer.modules())


def test_experts_that_share_a_parameter_are_not_merged():
    model = adapt_model("mixtral")
    first, second = (layer.mlp.experts for layer in model.model.layers)
    second.base_layer.down_proj = first.base_layer.down_proj
    with pytest.raises(ValueError, match=r"base_layer\.down_proj is tied to .*down_proj: merging would change both"):
        dorac.merge(model)
    assert not first.merged


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_thirty_steps_are_those_of_the_textbook(family):
    """The losses of a model whose experts run, in the place of ours, stock with their dense adapted weights."""
    model = adapt_model(family)
    for layer in dorac.apply.dora_layers(model).values():
        layer.train()
    twin = copy.deepcopy(model)
    for layer in dorac.apply.dora_layers(twin).values():
        if isinstance(layer, DoraExperts):
            layer.forward = functools.partial(lambda layer, *args: dense_forward(layer, args), layer)
    ids = torch.randint(1, 32, (4, 12), generator=torch.Generator().manual_seed(1))

    def losses(model):
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=0.05, momentum=0.9)
        for _ in range(30):
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            yield loss.item()

    expected = [*losses(twin)]
    with dorac.cache_norms(model):
        found = [*losses(model)]
    assert expected[-1] < 0.98 * expected[0], expected
    assert max(abs(a - b) / b for a, b in zip(found, expected, strict=True)) <= 1e-6
