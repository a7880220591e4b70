"""``dorac.fuse`` over 4-bit layers: bitsandbytes' own where it is installed, stand-ins for them everywhere."""

import copy
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch import nn

import dorac
from dorac import packed
from dorac.nn import linear4bit, norm_cache
from dorac.testing import quantised_layers as fake
from dorac.testing.rounding import assert_rms_beside

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from peft_models import off_init  # noqa: E402
from test_fuse import GatedMLP, Joined  # noqa: E402
from test_fuse_models import assert_same, calls, tokens  # noqa: E402, F401

import dorac.peft  # noqa: E402

HIDDEN, INNER = 64, 128


def linear_4bit(linear, library, dtype, **options):
    """In the layer's dtype, which is the one that it computes in."""
    cls, options = fake.Linear4bit, {"compute_dtype": dtype} | options
    if library == "bitsandbytes":
        cls = pytest.importorskip("bitsandbytes").nn.Linear4bit
    else:
        options |= {"dtype": dtype}  # its parameter is not cast
    quantised = cls(*linear.weight.shape[::-1], bias=linear.bias is not None, **options).to(dtype)
    quantised.load_state_dict(linear.state_dict())
    return quantised.requires_grad_(False).to("cpu")


def quantise(model, library, dtype=torch.float32, besides=(), **options):
    for name, module in [*model.named_modules()]:
        if isinstance(module, nn.Linear) and not name.endswith(("lm_head", *besides)):
            model.set_submodule(name, linear_4bit(module, library, dtype, **options))
    return model


def adapt(model, way, r=4, targets="all-linear", **options):
    if way == "nn":
        dorac.apply_dora(model, targets, r, 8, init_lora_weights=False, **options)
        with torch.no_grad():
            for layer in model.modules():
                if isinstance(layer, dorac.nn.DoraLinear):
                    layer.lora_magnitude_vector.mul_(1 + 0.1 * torch.randn_like(layer.lora_magnitude_vector))
        return model
    # PEFT chooses its layers by what transformers sets.
    model.is_loaded_in_4bit = any(type(module).__name__ == "Linear4bit" for module in model.modules())
    model = peft.get_peft_model(model, peft.LoraConfig(r=r, lora_alpha=8, target_modules=targets, use_dora=True))
    dorac.peft.enable(model)
    return off_init(model)


def dense_llama(dtype, **options):
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
        **options,
    )
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).to(dtype).requires_grad_(False)


def llama(library, way, dtype=torch.float32):
    """In training mode: on a CPU, bitsandbytes packs weights anew in eval mode."""
    model = dense_llama(dtype)
    options = {"quant_type": "nf4"} if library == "bitsandbytes" else {}  # else fp4
    return adapt(quantise(model, library, dtype, **options), way).train()


def results(model, autocast=None):
    """The logits and all gradients, by name; of the first x, too."""
    x = model.get_input_embeddings()(tokens()).detach().requires_grad_()
    model.zero_grad()
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        output = model(inputs_embeds=x, labels=tokens())
    output.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return gradients | {"logits": output.logits.detach(), "x": x.grad}


# The drop-in's class for these layers is made of PEFT's, which needs the library.
@pytest.mark.parametrize(("library", "way"), [("fake", "nn"), ("bitsandbytes", "nn"), ("bitsandbytes", "peft")])
def test_a_model(calls, library, way):  # noqa: F811
    model = llama(library, way)
    expected, keys = results(model), list(model.state_dict())
    assert len(dorac.fuse(model).fused) == 4
    assert not calls
    assert_same(results(model), expected)
    assert calls == {0: 2, 3: 2}
    assert list(model.state_dict()) == keys
    assert_same(results(copy.deepcopy(model)), expected)
    dorac.cache_norms(model)
    results(model)
    calls.clear()
    with mock.patch.object(norm_cache, "packed", SimpleNamespace(stored=packed.stored)):  # without of(): it is kept
        assert_same(results(model), expected)
    assert calls == {0: 2, 3: 2}
    with torch.no_grad():  # what is written to the adapters is seen, and to the pieces of a weight
        for p in model.parameters():
            if p.requires_grad:
                p.mul_(1.1)
        for layer in model.modules():
            if type(layer).__name__ == "Linear4bit" and linear4bit.is_stock(layer):
                layer.weight.quant_state.absmax.copy_(layer.weight.quant_state.absmax.flip(0))
    actual = results(model)
    dorac.unfuse(model)
    calls.clear()
    assert_same(actual, results(model))
    assert not calls


@pytest.mark.parametrize("library", ["fake", "bitsandbytes"])
def test_layers_of_other_kinds_among_them(calls, library):  # noqa: F811
    """A plain 4-bit layer and a dense adapted one beside adapted 4-bit ones; biases; a strength; several ranks."""
    torch.manual_seed(0)
    model = quantise(nn.Sequential(Wide()), library, besides=("up_proj",))
    adapt(model, "nn", targets=["gate_proj", "up_proj"], rank_pattern={"up_proj": 3})
    dorac.set_strength(model[0].gate_proj, 0.5)
    x = torch.randn(5, HIDDEN, requires_grad=True)
    trained = [x, *(p for p in model.parameters() if p.requires_grad)]

    def both():
        y = model(x)
        return dict(enumerate([y.detach(), *torch.autograd.grad(y.square().sum(), trained)])) | {"logits": y.detach()}

    expected = both()
    assert not dorac.fuse(model).left
    assert_same(both(), expected)
    assert calls == {0: 1}
    model[0].up_proj.switch(disabled=True)
    model(x)
    assert calls == {0: 1}


class Wide(GatedMLP):
    def __init__(self):
        nn.Module.__init__(self)
        self.gate_proj, self.up_proj = nn.Linear(HIDDEN, INNER), nn.Linear(HIDDEN, INNER, bias=False)
        self.down_proj, self.act_fn = nn.Linear(INNER, HIDDEN), nn.SiLU()


def block(library="fake", dtype=torch.bfloat16, cls=Wide, **options):
    torch.manual_seed(0)
    return adapt(quantise(nn.Sequential(cls()).to(dtype), library, dtype, **options), "nn")


def hooked(model):
    model[0].up_proj.base_layer.register_forward_hook(lambda module, args, y: 2 * y)


def merged(model):
    dorac.merge(model)


def half_bias(model):
    base = model[0].gate_proj.base_layer
    base.bias = nn.Parameter(base.bias.half(), requires_grad=False)


def other_compute_dtype(model):
    model[0].down_proj.base_layer.compute_dtype = torch.float32


def first_call(model):
    model[0].down_proj.base_layer.compute_type_is_set = False


def packs_anew(model):
    """As the library does on CPUs with bf16 instructions in eval mode."""
    model.eval()
    model[0].gate_proj.base_layer.support_avx512bf16_for_cpu = True


def of_other_dtype(model):
    for name in ("gate_proj", "up_proj", "down_proj"):
        getattr(model[0], name).base_layer.weight.quant_state.dtype = torch.float16


@pytest.mark.parametrize(
    "change", [hooked, merged, half_bias, other_compute_dtype, first_call, packs_anew, of_other_dtype]
)
def test_layers_that_do_more_than_multiply_are_called(calls, change):  # noqa: F811
    model, x = block(), torch.randn(5, HIDDEN, dtype=torch.bfloat16)
    assert not dorac.fuse(model).left
    model(x)
    assert calls == {0: 1}
    calls.clear()
    change(model)
    y = model(x)
    assert not calls
    dorac.unfuse(model)
    assert torch.equal(y, model(x))


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_of_x(calls, dtype, autocast):  # noqa: F811
    """Fused where x, the layer and autocast agree, and float32 where the others do; the dtype of y is the layers'."""
    model = block()
    x = torch.randn(5, HIDDEN, dtype=dtype, requires_grad=True)
    fuses = dtype is torch.bfloat16 and autocast is None
    fuses |= dtype in (torch.bfloat16, torch.float32) and autocast is torch.bfloat16
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        expected = model(x)
        assert not dorac.fuse(model).left
        y = model(x)
    assert bool(calls) == fuses
    (grad,), (other,) = (torch.autograd.grad(t.float().square().sum(), x) for t in (y, expected))
    for actual, want in ((y, expected), (grad, other)):
        assert actual.dtype == want.dtype
        assert (actual - want).abs().max() <= 2**-5 * want.abs().max()


@pytest.mark.parametrize("dense", [("up_proj",), ("down_proj",), ("gate_proj", "up_proj")], ids=str)
def test_dtypes_of_float32_among_dense_layers(calls, dense):  # noqa: F811
    """Those return autocast's dtype, the library's x's: whichever down is, y has the dtype as without."""
    torch.manual_seed(0)
    model = quantise(nn.Sequential(Wide()).bfloat16(), "fake", torch.bfloat16, besides=dense)
    adapt(model, "nn", targets=["gate_proj", "up_proj", "down_proj"])
    x = torch.randn(5, HIDDEN)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(x)
        assert not dorac.fuse(model).left
        y = model(x)
    assert calls == {0: 1}
    assert y.dtype == expected.dtype
    assert (y - expected).abs().max() <= 2**-6 * expected.abs().max()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("way", ["nn", "peft"])
def test_a_model_prepared_for_kbit_training(calls, way, checkpointing):  # noqa: F811
    """Float32 hidden states under autocast, with real layers: no further from float64 than the layers one by one."""
    pytest.importorskip("bitsandbytes")
    model, exact = (dense_llama(torch.bfloat16, attention_bias=True) for _ in range(2))
    quantise(model, "bitsandbytes", torch.bfloat16, quant_type="nf4")
    for name, layer in model.named_modules():
        if type(layer).__name__ == "Linear4bit":
            exact.get_submodule(name).weight.data.copy_(packed.of(layer).rows(0, layer.out_features))
    model.is_loaded_in_4bit = True
    options = {"use_gradient_checkpointing": checkpointing, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    model = adapt(peft.prepare_model_for_kbit_training(model, **options), way).train()
    trained = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    exact = adapt(exact, way).train().double()
    assert not exact.load_state_dict(trained, strict=False).unexpected_keys
    truth = results(exact)
    results(model, torch.bfloat16)  # in the first call the library casts what prepare_... has made of biases
    unfused = results(model, torch.bfloat16)
    assert len(dorac.fuse(model).fused) == 4
    dorac.cache_norms(model)
    calls.clear()
    fused = results(model, torch.bfloat16)
    assert calls == {0: 2 + 2 * checkpointing, 3: 2 + 2 * checkpointing}
    assert fused.keys() == unfused.keys() == truth.keys()
    for name, other in unfused.items():
        assert fused[name].dtype is other.dtype
        assert_rms_beside(fused[name], other, truth[name], label=name)
    calls.clear()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        actual = model(input_ids=tokens()).logits
        assert calls == {0: 2, 3: 2}
        dorac.unfuse(model)
        expected = model(input_ids=tokens()).logits
    assert actual.dtype is expected.dtype
    assert_rms_beside(actual, expected, truth["logits"])


def test_what_is_left_with_the_reason():
    model = block(cls=WideJoined)
    assert dorac.fuse(model).left == {"0": "both is quantised, and gate and up are parts of it"}
    model = nn.Sequential(Wide())
    int8 = fake.Linear8bitLt(HIDDEN, INNER)
    model[0].up_proj = int8.to("cpu")
    adapt(model, "nn")
    reason = "up_proj is a DoraQuantLinear over Linear8bitLt, which computes its product itself"
    assert dorac.fuse(model).left == {"0": reason}

    class Linear4bit(fake.Linear4bit):
        """A class of somebody else, of the same name."""

        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.Sequential(Wide())
    model[0].up_proj = Linear4bit(HIDDEN, INNER).to("cpu")
    reason = "up_proj is a DoraQuantLinear over Linear4bit, which computes its product itself"
    assert dorac.fuse(adapt(model, "nn")).left == {"0": reason}


class WideJoined(Joined):
    def __init__(self):
        nn.Module.__init__(self)
        self.both, self.down, self.act = nn.Linear(HIDDEN, 2 * INNER), nn.Linear(INNER, HIDDEN), nn.ReLU()


def test_few_rows_on_a_gpu_are_the_librarys():
    layer = block()[0].gate_proj.base_layer
    x = mock.Mock(spec=torch.Tensor, dtype=torch.bfloat16, requires_grad=False, shape=(1, HIDDEN))
    x.device.type = "cuda"
    with (
        mock.patch.object(linear4bit.front, "autocast_dtype", return_value=None),
    ):
        for rows, taken in ((1, False), (linear4bit.FEW_ROWS, False), (linear4bit.FEW_ROWS + 1, True)):
            x.numel.return_value = rows * HIDDEN
            assert linear4bit.takes(layer, x)
            with torch.no_grad():
                assert linear4bit.takes(layer, x) == taken


@pytest.mark.parametrize("shape", [(HIDDEN,), (1, HIDDEN), (0, HIDDEN), (2, 3, HIDDEN)])
def test_shapes_and_no_grad(calls, shape):  # noqa: F811
    model, x = block(dtype=torch.float32), torch.randn(shape)
    expected = model(x)
    assert not dorac.fuse(model).left
    with torch.no_grad():
        actual = model(x)
    assert calls == {0: 1}
    assert_same({"logits": actual}, {"logits": expected}) if x.numel() else None
    assert actual.shape == expected.shape


@pytest.mark.parametrize("dropout_on", ["adapter", "low_rank"])
def test_dropout_is_that_of_the_dense_block(calls, dropout_on):  # noqa: F811
    model = quantise(nn.Sequential(Wide()), "fake")
    dense = nn.Sequential(Wide())
    for name in ("gate_proj", "up_proj", "down_proj"):
        layer, base = getattr(dense[0], name), getattr(model[0], name)
        layer.weight.data.copy_(packed.of(base).rows(0, base.out_features))
        layer.bias = base.bias
    for one in (model, dense):
        torch.manual_seed(1)
        adapt(one, "nn", lora_dropout=0.5, dropout_on=dropout_on)
        dorac.fuse(one)
        for layer in one.modules():
            if isinstance(layer, dorac.nn.DoraLinear):
                with torch.no_grad():
                    layer.lora_magnitude_vector.copy_(torch.linspace(1, 2, layer.out_features))
    x, ys = torch.randn(5, HIDDEN), []
    for one in (model, dense):
        torch.manual_seed(2)
        ys.append({"logits": one(x)})
    assert calls == {0: 2}
    assert_same(*ys)
    assert (ys[0]["logits"] - model.eval()(x)).abs().max() > 0.01


def test_checkpointing_and_compiled_code(calls):  # noqa: F811
    model = llama("fake", "nn")
    expected = results(model)
    dorac.fuse(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_same(results(model), expected)
    assert calls == {0: 4, 3: 4}  # again in backward
    calls.clear()
    one = block(dtype=torch.float32)
    x = torch.randn(5, HIDDEN)
    without = one(x)
    dorac.fuse(one)
    assert_same({"logits": torch.compile(one, backend="eager")(x)}, {"logits": without})
    assert not calls


def test_adapters_of_peft(calls):  # noqa: F811
    pytest.importorskip("bitsandbytes")
    model = llama("bitsandbytes", "peft")
    with dorac.peft.enable():
        more = peft.LoraConfig(r=2, lora_alpha=4, lora_dropout=0.5, target_modules="all-linear", use_dora=True)
        model.add_adapter("other", more)
    dorac.peft.enable(off_init(model))
    dorac.fuse(model)
    for names, together in (("other", True), (["default", "other"], False), ("default", True)):
        model.base_model.set_adapter(names)
        calls.clear()
        with torch.random.fork_rng():
            results(model)
        assert calls == ({0: 2, 3: 2} if together else {})
    for layer in model.modules():
        if isinstance(layer, peft.tuners.lora.LoraLayer):
            layer.set_scale("default", 0.5)
    calls.clear()
    fused = results(model)
    assert calls == {0: 2, 3: 2}
    dorac.unfuse(model)
    assert_same(results(model), fused)
    dorac.fuse(model)
    calls.clear()
    with model.disable_adapter():
        off = model(input_ids=tokens()).logits
    assert not calls
    dorac.unfuse(model)
    with model.disable_adapter():
        assert torch.equal(model(input_ids=tokens()).logits, off)
    dorac.fuse(model)
    dorac.peft.disable(model)  # stock PEFT's layers
    results(model)
    assert not calls


@pytest.mark.parametrize("way", ["nn", "peft"])
def test_inference_and_merging(way):
    """In eval mode on some CPUs the library packs its weights anew: fused or not, the answers are the layers'."""
    pytest.importorskip("bitsandbytes")
    plain, fused = (llama("bitsandbytes", way).eval() for _ in range(2))
    dorac.fuse(fused)
    dorac.cache_norms(fused)
    how = {"max_new_tokens": 4, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with torch.no_grad():
        expected, actual = (one.generate(input_ids=tokens(), **how) for one in (plain, fused))
        for a, e in zip(actual.logits, expected.logits, strict=True):
            assert_same({"logits": a}, {"logits": e})
        for one in (plain, fused):
            dorac.merge(one) if way == "nn" else one.merge_adapter()
        expected, actual = (one(input_ids=tokens()).logits for one in (plain, fused))
        assert torch.equal(actual, expected)
        for one in (plain, fused):
            dorac.unmerge(one) if way == "nn" else one.unmerge_adapter()
        expected, actual = (one(input_ids=tokens()).logits for one in (plain, fused))
        assert_same({"logits": actual}, {"logits": expected})
