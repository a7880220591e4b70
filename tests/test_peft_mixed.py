"""``adapter_names=[...]`` under the drop-in: every row of a batch as by itself, with its adapter active."""

import copy
import warnings

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

from peft_models import KINDS, off_init, stock_model, target, twins  # noqa: E402
from test_norm_cache import computed_norms  # noqa: E402
from test_peft_quantised import SCHEMES, fake_4bit, fake_8bit  # noqa: E402
from test_peft_switch import OwnLinear  # noqa: E402

import dorac  # noqa: E402
import dorac.peft  # noqa: E402
from dorac.testing import assert_rms_beside  # noqa: E402

ROWS = ["b", "__base__", "a", "lora", "b", "c"]
LORA_OF_KIND = [
    kind if kind in ("linear", "embedding", "conv2d") else pytest.param(kind, marks=pytest.mark.full) for kind in KINDS
]


def mixed_model(kind, *, dtype=torch.float64, **options):
    """DoRA adapters a, b of two ranks and scalings, c rank-stabilised, and one of plain LoRA."""
    model = stock_model(kind, dtype=dtype, adapters=("a",), **options)
    kinds = KINDS[kind].options
    common = {"target_modules": ["target"]} | kinds
    autocast = options.get("autocast_adapter_dtype", True)
    for name, own in (
        ("b", {"r": 4, "lora_alpha": 3, "use_dora": True}),
        ("c", {"r": 1, "use_rslora": True, "use_dora": True, "lora_dropout": 0.3}),
        ("lora", {"r": 3, "lora_alpha": 5, "init_lora_weights": False}),
    ):
        model.add_adapter(name, peft.LoraConfig(**common | own), autocast_adapter_dtype=autocast)
    dorac.peft.enable(off_init(model))
    return model.eval()


def by_itself(model, x, names):
    """Each row alone with its adapter active."""
    rows = []
    for i, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                rows.append(model(x[i : i + 1]))
        else:
            model.set_adapter(name)
            rows.append(model(x[i : i + 1]))
    return torch.cat(rows)


@pytest.mark.parametrize("kind", LORA_OF_KIND)
@pytest.mark.parametrize("active", ["a", "b", "lora"])
def test_rows_are_those_by_themselves(kind, active):
    """Whichever adapter is active: it does not count."""
    model, x = mixed_model(kind), KINDS[kind].input(0, torch.float64, len(ROWS))
    expected = by_itself(model, x, ROWS)
    model.set_adapter(active)
    for names in (ROWS, tuple(ROWS)):
        torch.testing.assert_close(model(x, adapter_names=names), expected)
    with torch.inference_mode():
        torch.testing.assert_close(model(x, adapter_names=ROWS), expected)
    model.set_adapter(active)
    one = KINDS[kind].input(1, torch.float64, 3)
    for name in ("a", "lora", "__base__"):
        torch.testing.assert_close(model(one, adapter_names=[name] * 3), by_itself(model, one, [name] * 3))
    model.set_adapter(active)
    y = model(one)
    assert torch.equal(model(one[:0], adapter_names=[]), y[:0])
    assert torch.equal(model(one), y)


def test_one_call_for_linear_layers(monkeypatch):
    """The base product is computed once, and PEFT's sub-batches are not run."""
    calls = []
    mixed = dorac.functional.dora_linear_mixed
    monkeypatch.setattr(dorac.functional, "dora_linear_mixed", lambda *a, **k: calls.append(a) or mixed(*a, **k))
    for kind in ("linear", "linear_no_bias", "gpt2_conv1d"):
        model, x = mixed_model(kind), KINDS[kind].input(0, torch.float64, len(ROWS))
        calls.clear()
        model(x, adapter_names=ROWS)
        assert len(calls) == 1
        assert len(calls[0][2]) == 4
        calls.clear()
        model(x, adapter_names=["a"] * len(ROWS))  # one adapter is one functional call, too
        assert not calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adapters", ["float32", "same"])
def test_half_precision(dtype, adapters):
    """The errors are those of the rows by themselves."""
    model = mixed_model("linear", dtype=dtype, autocast_adapter_dtype=adapters == "float32")
    x = KINDS["linear"].input(0, dtype, len(ROWS))
    truth = by_itself(copy.deepcopy(model).double(), x.double(), ROWS)
    y, alone = model(x, adapter_names=ROWS), by_itself(model, x, ROWS)
    assert y.dtype == alone.dtype == dtype
    assert_rms_beside(y, alone, truth)


def test_autocast():
    model, x = mixed_model("linear", dtype=torch.float32), KINDS["linear"].input(0, torch.float32, len(ROWS))
    truth = by_itself(copy.deepcopy(model).double(), x.double(), ROWS)
    with torch.autocast("cpu", torch.bfloat16):
        y, alone = model(x, adapter_names=ROWS), by_itself(model, x, ROWS)
    assert y.dtype == alone.dtype == torch.bfloat16
    assert_rms_beside(y, alone, truth)


def test_adapters_of_two_dtypes_go_by_sub_batches():
    model, x = mixed_model("linear", dtype=torch.float32), KINDS["linear"].input(0, torch.float32, len(ROWS))
    layer = target(model)
    for factors in (layer.lora_A, layer.lora_B):
        factors["b"].to(torch.bfloat16)
    torch.testing.assert_close(model(x, adapter_names=ROWS), by_itself(model, x, ROWS))


@pytest.mark.parametrize("kind", ["linear", "embedding", "conv2d"])
def test_gradients_reach_the_adapters_of_the_rows(kind):
    model, x = mixed_model(kind), KINDS[kind].input(0, torch.float64, 4)
    names = ["b", "a", "__base__", "b"]
    for p in model.parameters():
        p.requires_grad_("lora_" in " ".join(n for n, q in model.named_parameters() if q is p))
    model(x, adapter_names=names).square().sum().backward()
    ours = {n: p.grad for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert {n.rpartition(".weight")[0].rpartition(".")[2] or n.rpartition(".")[2] for n in ours} == {"a", "b"}
    model.zero_grad()
    total = 0
    for i, name in enumerate(names):
        if name != "__base__":
            model.set_adapter(name)
            for p in model.parameters():
                p.requires_grad_(True)
            total = total + model(x[i : i + 1]).square().sum()
    total.backward()
    theirs = dict(model.named_parameters())
    for name, grad in ours.items():
        torch.testing.assert_close(grad, theirs[name].grad)


@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_strengths(kind):
    model, x = mixed_model(kind), KINDS[kind].input(0, torch.float64, len(ROWS))
    for adapter, strength in (("a", 0.3), ("b", 0), ("lora", 2)):
        target(model).set_scale(adapter, strength)
    torch.testing.assert_close(model(x, adapter_names=ROWS), by_itself(model, x, ROWS))


def test_zero_rows_of_the_weight():
    model, x = mixed_model("linear"), KINDS["linear"].input(0, torch.float64, len(ROWS))
    layer = target(model)
    with torch.no_grad():
        layer.base_layer.weight[3] = 0
        layer.lora_B["a"].weight[3] = 0
    y = model(x, adapter_names=ROWS)
    assert y.isfinite().all()
    torch.testing.assert_close(y, by_itself(model, x, ROWS))


class Two(nn.Module):
    """Two layers and a head; adapters go to one of the layers, or to both."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


def two(**options):
    configs = {
        "a": peft.LoraConfig(use_dora=True, r=2, target_modules=["first"], **options),
        "b": peft.LoraConfig(use_dora=True, r=3, target_modules=["first", "second"], **options),
        "lora": peft.LoraConfig(r=2, target_modules=["second"], init_lora_weights=False, **options),
    }
    with dorac.peft.enable():
        model = peft.get_peft_model(Two().double(), configs["a"], adapter_name="a")
        for name in ("b", "lora"):
            model.add_adapter(name, configs[name])
    dorac.peft.enable(off_init(model))
    return model.eval()


def test_layers_without_the_adapter_are_the_base():
    model, x = two(), torch.randn(5, 6, dtype=torch.float64)
    names = ["a", "b", "lora", "__base__", "a"]
    torch.testing.assert_close(model(x, adapter_names=names), by_itself(model, x, names))


def test_modules_to_save():
    model, x = two(modules_to_save=["head"]), torch.randn(4, 6, dtype=torch.float64)
    head = model.base_model.model.head
    with torch.no_grad():
        for i, name in enumerate(("a", "b", "lora")):
            head.modules_to_save[name].weight.add_(i + 1)
    names = ["b", "a", "__base__", "lora"]
    torch.testing.assert_close(model(x, adapter_names=names), by_itself(model, x, names))


def test_kept_norms_are_used():
    model, x = mixed_model("linear"), KINDS["linear"].input(0, torch.float64, len(ROWS))
    y = model(x, adapter_names=ROWS)
    assert computed_norms(lambda: model(x, adapter_names=ROWS)) == 3
    cache = dorac.cache_norms(model)
    assert computed_norms(lambda: model(x, adapter_names=ROWS)) == 0
    assert torch.equal(model(x, adapter_names=ROWS), y)
    with torch.no_grad():
        target(model).lora_B["b"].weight.mul_(2)
    torch.testing.assert_close(model(x, adapter_names=ROWS), by_itself(model, x, ROWS))
    cache.check()
    cache.remove()
    with peft.helpers.DoraCaching():
        model(x, adapter_names=ROWS)
        assert computed_norms(lambda: model(x, adapter_names=ROWS)) == 0


@pytest.fixture
def stacked(monkeypatch):
    """How many stacks of adapters were made."""
    made = []
    stack = dorac.functional.stack_adapters
    monkeypatch.setattr(
        dorac.functional, "stack_adapters", lambda adapters: made.append(len(adapters)) or stack(adapters)
    )
    return made


def kept_stacks(model):
    return [target(model).lora_magnitude_vector[name].keeper.stack for name in target(model).lora_magnitude_vector]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_stacks_are_kept(mode, stacked):
    """While nothing is written; batches that name other adapters share one."""
    model, x = mixed_model("linear"), KINDS["linear"].input(0, torch.float64, 4)
    dorac.cache_norms(model)

    def check(*names):
        with mode():
            y = model(x, adapter_names=names)
        with torch.no_grad():
            torch.testing.assert_close(y, by_itself(model, x, names))

    for names in (("a", "b", "__base__", "a"), ("b", "b", "a", "b"), ("c", "b", "b", "b"), ("a", "c", "c", "b")):
        check(*names)
    assert stacked == [2, 3]
    check("a", "lora", "c", "b")  # plain LoRA, whose writes nobody follows
    check("a", "c", "c", "b")
    assert stacked == [2, 3, 4]


WRITES = {
    "lora_A": lambda layer: layer.lora_A["b"].weight.mul_(2),
    "lora_B": lambda layer: layer.lora_B["b"].weight.neg_(),
    "magnitude": lambda layer: layer.lora_magnitude_vector["b"].weight.mul_(0.5),
    "weight": lambda layer: layer.base_layer.weight.add_(0.1),
    "replaced": lambda layer: setattr(layer.lora_B["b"], "weight", nn.Parameter(layer.lora_B["b"].weight * 3)),
    "data": lambda layer: setattr(layer.lora_A["b"].weight, "data", layer.lora_A["b"].weight * 3),
    "strength": lambda layer: layer.set_scale("b", 0.5),
    "no strength": lambda layer: layer.set_scale("b", 0),
    "dtype": lambda layer: layer.float(),
}


@pytest.mark.parametrize("what", WRITES)
def test_writes_reach_the_stack(what):
    """Also of an adapter that the next batch does not name."""
    model, x = mixed_model("linear"), KINDS["linear"].input(0, torch.float64, 4)
    layer = target(model)
    dorac.cache_norms(model)
    with torch.no_grad():
        model(x, adapter_names=["a", "b", "c", "__base__"])
        before = model(x, adapter_names=["b", "b", "a", "c"])
        WRITES[what](layer)
        x = x.to(layer.base_layer.weight.dtype)
        for names in (["a", "c", "a", "a"], ["b", "b", "a", "c"], ["b", "__base__", "b", "b"]):
            torch.testing.assert_close(model(x, adapter_names=names), by_itself(model, x, names))
        if what != "dtype":
            assert not torch.allclose(model(x, adapter_names=["b", "b", "a", "c"])[:2], before[:2])


def test_writes_without_a_trace_reach_the_stack_with_the_norms():
    model, x = mixed_model("linear"), KINDS["linear"].input(0, torch.float64, 4)
    layer, names = target(model), ["a", "b", "c", "b"]
    cache = dorac.cache_norms(model)
    with torch.no_grad():
        for announced in (lambda: model.train().eval(), cache.refresh):
            model(x, adapter_names=names)
            for tensor in (layer.lora_A["b"].weight, layer.lora_magnitude_vector["a"].weight):
                tensor.data.mul_(1.5)
            announced()
            torch.testing.assert_close(model(x, adapter_names=names), by_itself(model, x, names))


def test_adapters_come_and_go_in_a_stack(stacked):
    model, x = mixed_model("linear"), KINDS["linear"].input(0, torch.float64, 4)
    cache, names = dorac.cache_norms(model), ["a", "b", "c", "b"]
    with torch.no_grad():
        model(x, adapter_names=names)
        model.delete_adapter("b")
        kept = kept_stacks(model)[0]
        torch.testing.assert_close(model(x, adapter_names=["a", "c"] * 2), by_itself(model, x, ["a", "c"] * 2))
        assert kept_stacks(model) == [kept] * 2
        config = peft.LoraConfig(target_modules=["target"], use_dora=True, r=6, init_lora_weights=False)
        model.add_adapter("b", config)
        dorac.peft.enable(model)
        model.eval()
        cache.remove()
        dorac.cache_norms(model)
        stacked.clear()
        for _ in range(2):
            torch.testing.assert_close(model(x, adapter_names=names), by_itself(model, x, names))
    assert stacked == [3]
    assert [*kept_stacks(model)[0].stack.lora_A.shape[:2]] == [3, 6]


def test_training_keeps_no_stack(stacked):
    """Gradients are those without kept norms, and no second copy of the factors stays."""
    model, x = mixed_model("linear"), KINDS["linear"].input(0, torch.float64, 4)
    layer, names = target(model), ["a", "b", "c", "b"]
    leaves = [p.requires_grad_() for n, p in layer.named_parameters() if n.startswith("lora_") and "lora.w" not in n]
    expected = torch.autograd.grad(model(x, adapter_names=names).square().sum(), leaves)
    dorac.cache_norms(model)
    with torch.no_grad():
        model(x, adapter_names=names)
    stacked.clear()
    for _ in range(2):
        found = torch.autograd.grad(model(x, adapter_names=names).square().sum(), leaves)
        torch.testing.assert_close(found, expected)
    assert stacked == [3, 3]
    twin = copy.deepcopy(model)
    assert all(vector.keeper is None for vector in target(twin).lora_magnitude_vector.values())
    assert all(kept_stacks(model))
    model.train()
    assert kept_stacks(model) == [None] * 3


@pytest.mark.parametrize("scheme", [*SCHEMES, fake_4bit, fake_8bit])
def test_quantised(scheme):
    torch.manual_seed(0)
    base = nn.Sequential(scheme(nn.Linear(64, 32))).requires_grad_(False)
    base.is_loaded_in_4bit, base.is_loaded_in_8bit = (scheme.__name__ == f"bnb_{n}bit" for n in (4, 8))
    options = {"target_modules": ["0"]}
    with dorac.peft.enable(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(base, peft.LoraConfig(use_dora=True, r=2, **options), adapter_name="a")
        model.add_adapter("b", peft.LoraConfig(use_dora=True, r=4, **options))
        model.add_adapter("lora", peft.LoraConfig(r=4, init_lora_weights=False, **options))
    dorac.peft.enable(off_init(model))
    model.eval()
    x, names = torch.randn(5, 3, 64), ["b", "lora", "__base__", "a", "b"]
    if scheme.__name__ == "hqq_4bit":
        with pytest.raises(ValueError, match=r"^0 \(HqqLoraLinear\) takes no adapter_names with the DoRA adapter 'b'"):
            model(x, adapter_names=names)
        return
    model(x)  # bitsandbytes packs its weight anew in the first
    dorac.cache_norms(model)
    torch.testing.assert_close(model(x, adapter_names=names), by_itself(model, x, names), rtol=1e-5, atol=1e-5)


def llama(dtype=torch.float64):
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=32, pad_token_id=0
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(8) if p.ndim > 1 else None  # so that adapters change what comes next
    with dorac.peft.enable():
        names = ["embed_tokens", "q_proj", "down_proj"]
        model = peft.get_peft_model(model, peft.LoraConfig(use_dora=True, target_modules=names), adapter_name="a")
        model.add_adapter("b", peft.LoraConfig(use_dora=True, r=3, target_modules=["q_proj", "o_proj", "lm_head"]))
        model.add_adapter("lora", peft.LoraConfig(target_modules=["v_proj"], init_lora_weights=False))
    dorac.peft.enable(off_init(model, std=1.0))
    return model.eval()


@pytest.mark.parametrize("beams", [1, pytest.param(3, marks=pytest.mark.full)])
def test_generation(beams):
    model, names = llama(), ["b", "a", "__base__", "lora", "a"]
    tokens = torch.randint(1, 32, (5, 4), generator=torch.Generator().manual_seed(2))
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "num_beams": beams, "use_cache": True}
    ours = model.generate(input_ids=tokens, adapter_names=names, **options)
    rows = []
    for i, name in enumerate(names):
        if name == "__base__":
            with model.disable_adapter():
                rows.append(model.generate(input_ids=tokens[i : i + 1], **options))
        else:
            model.set_adapter(name)
            rows.append(model.generate(input_ids=tokens[i : i + 1], **options))
    rows = torch.cat(rows)
    assert torch.equal(ours, rows)
    assert len(set(map(tuple, rows[:, 4:].tolist()))) > 2


@pytest.mark.full
def test_an_encoder_and_a_decoder_with_beams():
    torch.manual_seed(0)
    config = transformers.T5Config(
        d_model=16, d_ff=24, d_kv=8, num_layers=1, num_heads=2, vocab_size=32, decoder_start_token_id=0
    )
    model = transformers.T5ForConditionalGeneration(config).double()
    with dorac.peft.enable():
        options = {"use_dora": True, "target_modules": ["q", "v"], "task_type": "SEQ_2_SEQ_LM"}
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, **options), adapter_name="a")
        model.add_adapter("b", peft.LoraConfig(r=3, **options))
    dorac.peft.enable(off_init(model, std=1.0))
    model.eval()
    tokens, names = torch.randint(1, 32, (3, 4)), ["b", "a", "a"]
    options = {"max_new_tokens": 5, "num_beams": 2, "min_new_tokens": 5}
    ours = model.generate(input_ids=tokens, adapter_names=names, **options)
    for i, name in enumerate(names):
        model.set_adapter(name)
        assert torch.equal(ours[i : i + 1], model.generate(input_ids=tokens[i : i + 1], **options))


def hooks(model):
    return [len(module._forward_pre_hooks) + len(module._forward_pre_hooks_with_kwargs) for module in model.modules()]


def test_bad_input_leaves_no_hook():
    model, x = two(), torch.randn(3, 6, dtype=torch.float64)
    y, before = model(x), hooks(model)
    for names, message in (
        (["a", "b"], "Length of `adapter_names` should be the same as the number of inputs"),
        (["a", "b", "d"], "non-existing adapter"),
    ):
        with pytest.raises(ValueError, match=message):
            model(x, adapter_names=names)
        assert hooks(model) == before
        assert torch.equal(model(x), y)
    with pytest.raises(ValueError, match="x must be"):
        model(x[:, :4], adapter_names=["a", "b", "a"])  # inside a layer
    assert hooks(model) == before
    model.train()
    with pytest.raises(ValueError, match="training mode"):
        model(x, adapter_names=["a", "b", "a"])
    model.eval().set_adapter("b")
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        model(x, adapter_names=["a", "b", "a"])
    assert hooks(model) == before


def test_a_layer_of_a_third_party_is_refused_by_name():
    config = peft.LoraConfig(use_dora=True, target_modules=["first"])
    config._register_custom_module({nn.Linear: OwnLinear})
    model = peft.get_peft_model(Two(), config, adapter_name="a").eval()
    with pytest.warns(UserWarning, match="does not cover OwnLinear"):
        dorac.peft.enable(model)
    x = torch.randn(2, 6)
    y, before = model(x), hooks(model)
    with pytest.raises(ValueError, match=r"^first \(OwnLinear\) takes no adapter_names with the DoRA adapter 'a': run"):
        model(x, adapter_names=["a", "__base__"])
    assert hooks(model) == before
    assert torch.equal(model(x), y)
    with model.disable_adapter():
        base = model(x)
    assert torch.equal(model(x, adapter_names=["__base__"] * 2), base)


def test_stock_peft_refuses_again_afterwards():
    stock, model = twins("linear", adapters=("a", "b"))
    x = KINDS["linear"].input(0, torch.float64, 2)
    stock.eval(), model.eval()
    model(x, adapter_names=["a", "b"])
    dorac.peft.disable(model)
    for m in (stock, model):
        with pytest.raises(ValueError, match="when DoRA is enabled"):
            m(x, adapter_names=["a", "b"])


def test_switched_off():
    model, x = mixed_model("linear"), KINDS["linear"].input(0, torch.float64, len(ROWS))
    base = target(model).get_base_layer()(x)
    with model.disable_adapter():
        assert torch.equal(model(x, adapter_names=ROWS), base)
    with dorac.disabled(model):
        assert torch.equal(model(x, adapter_names=ROWS), base)


def test_hooks_and_offloading():
    """What is no plain tensor goes by sub-batches."""
    accelerate = pytest.importorskip("accelerate")
    model, x = two(), torch.randn(5, 6, dtype=torch.float64)
    names = ["a", "b", "lora", "__base__", "a"]
    expected = by_itself(model, x, names)
    with dorac.peft.enable():
        offloaded = accelerate.cpu_offload(copy.deepcopy(model), "cpu")
    torch.testing.assert_close(offloaded(x, adapter_names=names), expected)
    seen = []
    model.base_model.model.first.lora_B["b"].register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(model(x, adapter_names=names), expected)
    assert seen


@pytest.mark.full
def test_compiled():
    model, x = two(), torch.randn(4, 6, dtype=torch.float64)
    names = ["a", "b", "lora", "__base__"]
    expected = by_itself(model, x, names)
    run = torch.compile(model, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(run(x, adapter_names=names), expected)
        other = ["b", "b", "a", "lora"]
        torch.testing.assert_close(run(x, adapter_names=other), by_itself(model, x, other))
