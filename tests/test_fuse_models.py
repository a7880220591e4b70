"""``dorac.fuse`` in the families of transformers, for ``dorac.nn`` and the drop-in: only what is called changes."""

import copy

import pytest
import torch

import dorac
from dorac import functional

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from peft_models import off_init  # noqa: E402

import dorac.peft  # noqa: E402

VOCABULARY, TOKENS = 64, 7
_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"), 0),
}
_GROUPED = _SIZES | {"num_key_value_heads": 2}
_HEADS = _GROUPED | {"head_dim": 8}
_T5 = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
_T5 |= {"dropout_rate": 0.0, "decoder_start_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
_MOE = {"moe_intermediate_size": 16, "shared_expert_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}

# By family: the class of its config, its options, and how many MLPs and attentions of each size are fused.
FAMILIES = {
    "llama": ("LlamaConfig", _GROUPED, {0: 2, 3: 2}),
    "mistral": ("MistralConfig", _GROUPED, {0: 2, 3: 2}),
    "qwen2": ("Qwen2Config", _GROUPED, {0: 2, 3: 2}),
    "qwen3": ("Qwen3Config", _HEADS, {0: 2, 3: 2}),
    "gemma2": ("Gemma2Config", _HEADS, {0: 2, 3: 2}),
    "gemma3": ("Gemma3TextConfig", _HEADS, {0: 2, 3: 2}),
    "phi": ("PhiConfig", _SIZES, {0: 2, 3: 2}),
    "phi3": ("Phi3Config", _GROUPED, {0: 2}),
    "gpt_neox": ("GPTNeoXConfig", _SIZES, {0: 2}),
    "gpt2": (
        "GPT2Config",
        {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
        | {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0},
        {0: 2},
    ),
    "t5": ("T5Config", _T5, {0: 4, 2: 2, 3: 4}),
    "t5_gated": ("T5Config", _T5 | {"feed_forward_proj": "gated-gelu"}, {0: 4, 2: 2, 3: 4}),
    "qwen2_moe": ("Qwen2MoeConfig", _GROUPED | _MOE, {0: 2, 3: 2}),
}
SAMPLE = {("llama", "nn"), ("t5_gated", "nn"), ("gpt2", "peft")}
CASES = [
    pytest.param(family, way, marks=() if (family, way) in SAMPLE else pytest.mark.full)
    for family in FAMILIES
    for way in ("nn", "peft")
]


def build(family, way, dtype=torch.float32):
    """The adapted model in eval mode, off its start."""
    config, options, _ = FAMILIES[family]
    auto = transformers.AutoModelForSeq2SeqLM if family.startswith("t5") else transformers.AutoModelForCausalLM
    torch.manual_seed(0)
    # Grouped products of experts know no float64.
    more = {"experts_implementation": "eager"} if family == "qwen2_moe" else {}
    model = auto.from_config(getattr(transformers, config)(**options), **more).to(dtype).eval()
    if way == "nn":
        dorac.apply_dora(model, "all-linear", 4, 8, init_lora_weights=False)
        with torch.no_grad():
            for layer in model.modules():
                if isinstance(layer, dorac.nn.DoraLinear):
                    layer.lora_magnitude_vector.mul_(1 + 0.1 * torch.randn_like(layer.lora_magnitude_vector))
        return model
    lora = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", use_dora=True)
    with dorac.peft.enable():
        model = peft.get_peft_model(model, lora)
    dorac.peft.enable(model)
    return off_init(model.to(dtype)).eval()


def tokens():
    return torch.randint(1, VOCABULARY, (2, TOKENS), generator=torch.Generator().manual_seed(1))


def results(model):
    """The logits and all gradients, by name."""
    model.zero_grad()
    output = model(input_ids=tokens(), labels=tokens())
    output.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return gradients | {"logits": output.logits.detach()}


def assert_same(actual, expected):
    """To roundings: some hundred lie between two results, each of half a unit of a tensor of their size or less."""
    assert actual.keys() == expected.keys()
    for name, want in expected.items():
        bound = (
            2**10 * torch.finfo(want.dtype).eps * max(want.abs().max().item(), expected["logits"].abs().max().item())
        )
        assert (actual[name] - want).abs().max() <= bound, name


@pytest.fixture
def calls(monkeypatch):
    """How often blocks of each size were computed: 0 for an MLP, else the number of projections."""
    noted = {}

    def note(function, size):
        def noting(x, *args, **kwargs):
            noted[size(*args)] = noted.get(size(*args), 0) + 1
            return function(x, *args, **kwargs)

        return noting

    monkeypatch.setattr(functional, "dora_linears", note(functional.dora_linears, lambda projections: len(projections)))
    monkeypatch.setattr(functional, "dora_mlp", note(functional.dora_mlp, lambda *projections: 0))
    return noted


@pytest.mark.parametrize(("family", "way"), CASES)
def test_a_family(calls, family, way):
    for dtype in (torch.float64, torch.float32):
        model = build(family, way, dtype)
        expected, keys = results(model), list(model.state_dict())
        report = dorac.fuse(model)
        assert not calls
        assert_same(results(model), expected)
        assert calls == FAMILIES[family][2]
        assert list(model.state_dict()) == keys
        calls.clear()
    assert len(report.fused) == sum(FAMILIES[family][2].values())
    assert len(repr(report).splitlines()) <= 5
    assert_same(results(copy.deepcopy(model)), expected)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    assert_same(results(model.train()), expected)
    dorac.unfuse(model.eval())
    calls.clear()
    assert_same(results(model), expected)
    assert not calls


@pytest.mark.parametrize(("family", "way"), CASES)
def test_files_merging_switching_and_generation(calls, family, way, tmp_path):
    model, fused = build(family, way), build(family, way)
    dorac.fuse(fused)
    dorac.cache_norms(fused)
    prompt = {"input_ids": tokens()[:, :3], "attention_mask": torch.ones(2, 3, dtype=torch.long)}
    how = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    expected, actual = (one.generate(**prompt, **how) for one in (model, fused))
    assert torch.equal(actual.sequences, expected.sequences)
    for a, e in zip(actual.logits, expected.logits, strict=True):
        assert_same({"logits": a}, {"logits": e})
    assert bool(calls) == bool(FAMILIES[family][2])
    calls.clear()

    def logits(one):
        with torch.no_grad():
            return {"logits": one(input_ids=tokens(), labels=tokens()).logits}

    off = "disabled" if way == "nn" else "disable_adapter"
    with dorac.disabled(fused) if way == "nn" else fused.disable_adapter(), torch.no_grad():
        without = logits(fused)
    with dorac.disabled(model) if way == "nn" else model.disable_adapter():
        assert torch.equal(logits(model)["logits"], without["logits"]), off
    assert not calls
    files = []
    for name, one in (("plain", model), ("fused", fused)):
        save = dorac.save_adapter if way == "nn" else (lambda one, path: one.save_pretrained(path))
        save(one, tmp_path / name)
        files.append((tmp_path / name / "adapter_model.safetensors").read_bytes())
    assert files[0] == files[1]
    if way == "nn":
        with torch.no_grad():
            for p in fused.parameters():
                if p.requires_grad:
                    p.mul_(1.5)
        dorac.load_adapter(fused, tmp_path / "plain")
    assert_same(logits(fused), logits(model))
    merged = dorac.merge(fused, unload=True) if way == "nn" else fused.merge_and_unload()
    assert not any(hasattr(type(module), "stock") for module in merged.modules())
    expected = dorac.merge(model, unload=True) if way == "nn" else model.merge_and_unload()
    assert torch.equal(logits(merged)["logits"], logits(expected)["logits"])


@pytest.mark.full
@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "qwen2_moe"])
def test_a_family_compiled(calls, family):
    """fullgraph where the model without is."""
    model = build(family, "nn")
    ids = {"input_ids": tokens(), "use_cache": False}
    if family.startswith("t5"):
        ids["decoder_input_ids"] = tokens()
    expected = torch.compile(model, backend="aot_eager", fullgraph=True)(**ids).logits
    torch._dynamo.reset()
    dorac.fuse(model)
    assert torch.equal(torch.compile(model, backend="aot_eager", fullgraph=True)(**ids).logits, expected)
    assert not calls


def test_several_adapters_of_peft(calls):
    model = build("llama", "peft")
    with dorac.peft.enable():
        model.add_adapter("other", peft.LoraConfig(r=2, lora_alpha=4, target_modules="all-linear", use_dora=True))
    dorac.peft.enable(off_init(model))
    plain = copy.deepcopy(model)
    dorac.fuse(model)
    for names, together in (("other", True), (["default", "other"], False), ("default", True)):
        for one in (plain, model):
            one.base_model.set_adapter(names)
        calls.clear()
        assert_same(results(model), results(plain))
        assert calls == ({0: 2, 3: 2} if together else {})
    dorac.peft.disable(model)  # stock PEFT's layers
    calls.clear()
    results(model)
    assert not calls
    with pytest.raises(ValueError, match=r"dorac\.peft\.enable"):
        dorac.fuse(model)
    dorac.unfuse(model)
    assert not any(hasattr(type(module), "stock") for module in model.modules())
