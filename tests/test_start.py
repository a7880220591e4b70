"""At its start (lora_B = 0, m = n) an adapted layer is its base layer, bit for bit, in single and double precision.

Held on the CPU in eager. Sizes and layouts are those for which the libraries of products take different paths, and
sum in different orders.
"""

import copy

import pytest
import torch
from torch import nn

from dorac import apply_dora, functional, reference
from dorac.nn import DoraConv1d, DoraConv2d, DoraConv3d, DoraEmbedding, DoraExperts, DoraLinear
from dorac.testing import CONVOLUTIONS, linear_inputs

WIDE = pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
LAYOUTS = ("rows", "one row", "batch", "vector", "transposed rows", "transposed batch", "sliced", "no rows")


def activations(layout: str, tokens: int, features: int, dtype: torch.dtype) -> torch.Tensor:
    def draw(*shape):
        return torch.randn(shape, dtype=dtype)

    return {
        "rows": lambda: draw(tokens, features),
        "one row": lambda: draw(1, features),
        "batch": lambda: draw(2, 3, tokens, features),
        "vector": lambda: draw(features),
        "transposed rows": lambda: draw(features, tokens).t(),
        "transposed batch": lambda: draw(2, features, tokens).transpose(1, 2),
        "sliced": lambda: draw(tokens, 2, 2 * features)[:, 1:, ::2],
        "no rows": lambda: draw(0, features),
    }[layout]()


def assert_same_bits(layer: nn.Module, base: nn.Module, *args: torch.Tensor) -> None:
    """With and without gradients, in training and evaluation. The base's weights are frozen, as the layer's are:
    torch takes another product of a strided batch by a weight that requires a gradient."""
    expected = base.requires_grad_(False)(*args)
    with torch.no_grad():
        assert torch.equal(layer(*args), expected)
    trained = [a.detach().requires_grad_() if a.is_floating_point() else a for a in args]
    for training in (True, False):
        y = layer.train(training)(*trained)
        assert y.requires_grad
        assert torch.equal(y, expected)
    floats = [a for a in args if a.is_floating_point()]
    if floats and floats[0].is_contiguous():  # torch's product of a strided batch is another one here
        tangents = [torch.ones_like(a) for a in floats]
        primal, _ = torch.func.jvp(lambda *f: layer(*f, *args[len(f) :]), tuple(floats), tuple(tangents))
        assert torch.equal(primal, expected)


@WIDE
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bias", [True, False])
def test_linear(dtype, layout, bias):
    for in_features, out_features in ((3, 5), (64, 65), (127, 256), (300, 40), (1024, 513)):
        base = nn.Linear(in_features, out_features, bias, dtype=dtype)
        layer = DoraLinear(copy.deepcopy(base), r=2)
        for tokens in (2, 33, 130):
            assert_same_bits(layer, base, activations(layout, tokens, in_features, dtype))


@WIDE
@pytest.mark.parametrize("adapter_dtype", [torch.bfloat16, torch.float64])
def test_linear_with_factors_of_another_dtype(dtype, adapter_dtype):
    base = nn.Linear(300, 65, dtype=dtype)
    assert_same_bits(DoraLinear(copy.deepcopy(base), adapter_dtype=adapter_dtype), base, torch.randn(33, 300).to(dtype))


@WIDE
@pytest.mark.parametrize("layout", ["rows", "one row", "batch"])
def test_gpt2_conv1d(dtype, layout):
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    for in_features, out_features in ((64, 65), (300, 41)):
        base = conv1d(out_features, in_features).to(dtype)
        nn.init.normal_(base.bias)
        layer = DoraLinear(copy.deepcopy(base))
        for tokens in (2, 130):
            assert_same_bits(layer, base, activations(layout, tokens, in_features, dtype))


@WIDE
@pytest.mark.parametrize("case", CONVOLUTIONS)
@pytest.mark.parametrize("channels_last", [False, True])
def test_convolutions(dtype, case, channels_last):
    convolution = CONVOLUTIONS[case]
    cls = (DoraConv1d, DoraConv2d, DoraConv3d)[convolution.dimensions - 1]
    for bias in (True, False):
        options = {"bias": bias, "dtype": dtype, **convolution.geometry}
        base = cls.STOCK(convolution.x[1], convolution.out, convolution.kernel, **options)
        x = torch.randn(convolution.x, dtype=dtype)
        if channels_last:
            x = x.movedim(1, -1).contiguous().movedim(-1, 1)
        layer = cls(copy.deepcopy(base), convolution.rank, grouped_lora_A=convolution.grouped_lora_A)
        assert_same_bits(layer, base, x)
        assert_same_bits(layer, base, x[0])


@WIDE
def test_wide_convolutions(dtype):
    """Enough channels for another algorithm, and one sample."""
    for kernel in (1, 3):
        base = nn.Conv2d(64, 96, kernel, padding="same", dtype=dtype)
        assert_same_bits(DoraConv2d(copy.deepcopy(base)), base, torch.randn(1, 64, 14, 14, dtype=dtype))


@WIDE
@pytest.mark.parametrize("sparse", [False, True])
def test_embedding(dtype, sparse):
    base = nn.Embedding(40, 24, padding_idx=3, sparse=sparse, dtype=dtype)
    assert_same_bits(DoraEmbedding(copy.deepcopy(base)), base, torch.randint(40, (3, 7)))


@WIDE
def test_dropout_changes_nothing(dtype):
    linear, conv = nn.Linear(65, 33, dtype=dtype), nn.Conv1d(6, 8, 3, padding=1, dtype=dtype)
    assert_same_bits(DoraLinear(copy.deepcopy(linear), lora_dropout=0.5), linear, torch.randn(7, 65, dtype=dtype))
    assert_same_bits(DoraConv1d(copy.deepcopy(conv), lora_dropout=0.5), conv, torch.randn(2, 6, 9, dtype=dtype))


@WIDE
def test_rows_without_an_adapter_in_a_mixed_batch(dtype):
    """And those of adapters at their start."""
    base = nn.Linear(300, 65, dtype=dtype)
    lora_A, lora_B = torch.randn(2, 4, 300, dtype=dtype), torch.zeros(2, 65, 4, dtype=dtype)
    magnitude = functional.mixed_norm(base.weight, lora_A, lora_B, 0.7)
    for shape in ((5, 300), (5, 7, 300)):
        x = torch.randn(shape, dtype=dtype)
        index = torch.tensor([-1, 0, 1, -1, 0])
        tensors = (x, base.weight, lora_A, lora_B, magnitude, base.bias)
        assert torch.equal(functional.dora_linear_mixed(*tensors, adapter_index=index, scaling=0.7), base(x))


EXPERTS = {"num_local_experts": 4, "num_experts": 4, "moe_intermediate_size": 72}
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 72,
    "intermediate_size_mlp": 72,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 3,
    "vocab_size": 32,
    "pad_token_id": 0,
}


@WIDE
@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe", "GptOss", "Llama4Text"])
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_experts(dtype, family, implementation):
    """``eager`` adds the experts of a token up in another order, which for two makes no difference."""
    if implementation == "grouped_mm" and (dtype is torch.float64 or family == "Llama4Text"):
        pytest.skip("transformers has no such product")
    transformers = pytest.importorskip("transformers")
    options = {"interleave_moe_layer_step": 1} if family == "Llama4Text" else {}
    chosen = 2 if implementation == "eager" else 3
    config = getattr(transformers, f"{family}Config")(**SIZES, **EXPERTS, **options)
    if family != "Llama4Text":
        config._experts_implementation = implementation
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    base = next(m for n, m in model.named_modules() if n.endswith(".experts"))
    for parameter in base.parameters():
        nn.init.normal_(parameter)
    layer = DoraExperts(copy.deepcopy(base), r=2)
    for tokens in (1, 2, 33):
        if family == "Llama4Text":
            assert_same_bits(layer, base, torch.randn(4 * tokens, 64, dtype=dtype))
            continue
        x, weights = torch.randn(tokens, 64, dtype=dtype), torch.rand(tokens, chosen, dtype=dtype)
        index = torch.stack([torch.randperm(4)[:chosen] for _ in range(tokens)])
        expected = base(x, index, weights)
        assert torch.equal(layer(x, index, weights), expected)


@pytest.mark.parametrize("family", ["GPT2", "Llama", "Bert"])
@pytest.mark.parametrize("drop_in", [False, True])
def test_models(family, drop_in):
    transformers = pytest.importorskip("transformers")
    sizes = SIZES | {"n_embd": 64, "n_layer": 2, "n_head": 2, "num_hidden_layers": 2}
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(getattr(transformers, f"{family}Config")(**sizes)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    ids = torch.randint(1, 32, (2, 9))
    expected = model(ids)[0]
    targets = "all-linear" if family != "GPT2" else ["c_attn", "c_proj", "c_fc"]
    if drop_in:
        peft = pytest.importorskip("peft")
        from dorac.peft import enable

        config = peft.LoraConfig(use_dora=True, r=2, target_modules=targets, fan_in_fan_out=family == "GPT2")
        with enable():
            model = peft.get_peft_model(model, config).eval()
            assert torch.equal(model(ids)[0], expected)
        return
    assert apply_dora(model, targets, r=2, lora_alpha=4)
    assert torch.equal(model(ids)[0], expected)


@WIDE
@pytest.mark.parametrize("several", [False, True])
def test_layers_of_the_drop_in(dtype, several):
    """Also where two adapters are active, whose changes are added to what the base layer itself computed."""
    peft = pytest.importorskip("peft")
    from peft_models import KINDS, Holder

    from dorac.peft import enable

    for kind in KINDS.values():
        model = Holder(kind.layer()).to(dtype)
        x = kind.input(0, dtype)
        expected = model.requires_grad_(False)(x)
        config = peft.LoraConfig(use_dora=True, r=2, target_modules=["target"], **kind.options)
        with enable():
            model = peft.get_peft_model(model, config)
            if several:
                model.add_adapter("other", config)
                model.base_model.set_adapter(["default", "other"])
            for training in (True, False):
                assert torch.equal(model.train(training)(x), expected)


@WIDE
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), 1e30])
def test_a_bias_of_any_size(dtype, value):
    """-inf, which forbids an output, too: ``(1 - g) * b`` is no number there."""
    linear, conv = nn.Linear(65, 33, dtype=dtype), nn.Conv1d(6, 8, 3, dtype=dtype)
    for base, cls, x in ((linear, DoraLinear, torch.randn(7, 65)), (conv, DoraConv1d, torch.randn(2, 6, 9))):
        with torch.no_grad():
            base.bias[3] = value
        layer = cls(copy.deepcopy(base))
        assert_same_bits(layer, base, x.to(dtype))
        with torch.no_grad():
            layer.lora_magnitude_vector.mul_(1.5)
            y = layer(x.to(dtype))
        row = y[:, 3]
        assert (row == value).all() if abs(value) == float("inf") else ((row - value).abs() <= 1e-5 * 1e30).all()
        assert y.isfinite().sum() == y.numel() - (0 if abs(value) < float("inf") else row.numel())


@WIDE
@pytest.mark.parametrize("kind", ["linear", "conv", "mixed"])
@pytest.mark.parametrize("transform", [False, True])
def test_gradients_beside_a_large_bias(dtype, kind, transform):
    """The magnitude's gradient is that of the product without the bias: what is saved loses ``u |b|`` of it, no more.

    Of every ``dy * (inner - b) / n`` a rounding of ``inner + b`` in the product, one of ``s * lora`` added and one of
    ``- b``; plain aten, which transforms see, adds up ``dy * (inner + b)`` and takes ``b * sum(dy)`` from it.
    """
    tokens, inputs = 40, linear_inputs((40, 12, 30, 3), dtype=dtype)
    bias = inputs.bias * 1000
    tensors = [t.clone().requires_grad_() for t in (*inputs.tensors()[:5], bias)]
    options = {"scaling": 0.7}

    def run(x, weight, lora_A, lora_B, magnitude, bias):
        if kind == "conv":
            filters = (t.unsqueeze(-1) for t in (weight, lora_A, lora_B))
            return functional.dora_conv1d(x.t()[None], *filters, magnitude, bias, **options)[0].t()
        if kind == "mixed":
            index = torch.zeros(len(x), dtype=torch.int64)
            stacked = (t[None] for t in (lora_A, lora_B, magnitude))
            return functional.dora_linear_mixed(x, weight, *stacked, bias, adapter_index=index, **options)
        return functional.dora_linear(x, weight, lora_A, lora_B, magnitude, bias, **options)

    dy = torch.randn(tokens, 12, dtype=dtype)
    if transform:
        _, pull = torch.func.vjp(run, *tensors)
        grads = pull(dy)
    else:
        grads = torch.autograd.grad(run(*tensors), tensors, dy)
    exact = [t.detach().double().requires_grad_() for t in tensors]
    truth = torch.autograd.grad(reference.dora_linear(*exact, **options), exact, dy.double())
    x, weight, lora_A, lora_B, _, b = (t.detach().double() for t in tensors)
    norm = reference.row_norm(weight, lora_A, lora_B, 0.7)
    size = x.abs() @ weight.abs().T + 0.7 * x.abs() @ lora_A.abs().T @ lora_B.abs().T + b.abs()
    u = torch.finfo(dtype).eps / 2
    roundings = 4 + 30 + 3 + tokens * (transform or kind == "mixed")  # of the product, and of the sum over tokens
    bound = roundings * u * (dy.double().abs() * size).sum(0) / norm
    error = (grads[4].double() - truth[4]).abs()
    assert (error <= bound + 1e-12 * bound.max()).all()
    torch.testing.assert_close([g.double() for g in grads[:4]], list(truth[:4]), rtol=1e-4, atol=1e-4)
    # The bias's gradient is the sum of dy, whatever g is.
    assert ((grads[5].double() - dy.double().sum(0)).abs() <= tokens * u * dy.double().abs().sum(0)).all()
