"""The drop-in beside stock PEFT, layer kind by layer kind: outputs, gradients, several adapters, dropout, dtypes."""

import copy

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")

from peft_models import KINDS, gradients, off_init, stock_model, target, twins  # noqa: E402

import dorac.peft  # noqa: E402
from dorac import functional  # noqa: E402
from dorac.testing import assert_rms_beside  # noqa: E402

TIGHT = {"rtol": 1e-10, "atol": 1e-12}  # in float64 the two differ by the order of sums alone
FUNCTIONS = ("dora_linear", "dora_embedding", "dora_conv1d", "dora_conv2d", "dora_conv3d")


def run(model, x, *, seed=7):
    """One forward and backward pass: the output and every gradient."""
    model.zero_grad()
    x = x.clone().requires_grad_() if x.is_floating_point() else x
    torch.manual_seed(seed)
    y = model(x)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    grads = {name: grad.clone() for name, grad in gradients(model).items()}
    return y.detach(), grads | ({} if not x.is_floating_point() else {"x": x.grad})


def assert_same(ours, stock, x, **tolerance):
    (y, grads), (expected_y, expected_grads) = run(ours, x), run(stock, x)
    torch.testing.assert_close(y, expected_y, **(tolerance or TIGHT))
    assert grads.keys() == expected_grads.keys()
    torch.testing.assert_close(grads, expected_grads, **(tolerance or TIGHT))


@pytest.fixture
def calls(monkeypatch):
    """The names of the functions that compute a whole layer, as they are called."""
    names = []

    def counted(name, function):
        return lambda *args, **kwargs: names.append(name) or function(*args, **kwargs)

    for name in FUNCTIONS:
        monkeypatch.setattr(functional, name, counted(name, getattr(functional, name)))
    return names


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.4}, {"use_rslora": True}], ids=["plain", "dropout", "rs"])
@pytest.mark.parametrize("kind", KINDS)
def test_output_and_gradients(kind, options, training, calls):
    """In one functional call, with equal seeds the same numbers as stock PEFT's base and delta."""
    stock, ours = twins(kind, **options)
    for model in (stock, ours):
        model.train(training)
    assert_same(ours, stock, KINDS[kind].input(3, torch.float64))
    assert len(calls) == 1


@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.4}], ids=["plain", "dropout"])
@pytest.mark.parametrize("kind", KINDS)
def test_hooks_of_the_base_layer_run(kind, options, calls):
    """A base layer with hooks is called as stock PEFT calls it, and the adapter's change is added."""
    stock, ours = twins(kind, **options)
    seen = []
    for model in (stock, ours):
        target(model).base_layer.register_forward_hook(lambda module, args, y: seen.append(1) or y * 1.5)
    assert_same(ours, stock, KINDS[kind].input(3, torch.float64))
    assert len(seen) == 2
    assert not calls


@pytest.mark.parametrize("where", ["dropout", "every module"])
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_other_hooks_run(kind, where, calls):
    stock, ours = twins(kind, lora_dropout=0.4)
    if where == "dropout":
        for model in (stock, ours):
            target(model).lora_dropout["default"].register_forward_hook(lambda module, args, y: y * 1.5)
        assert_same(ours, stock, KINDS[kind].input(3, torch.float64))
    else:
        bases = [target(model).base_layer for model in (stock, ours)]
        hook = nn.modules.module.register_module_forward_hook(
            lambda module, args, y: y * 1.5 if module in bases else None
        )
        try:
            assert_same(ours, stock, KINDS[kind].input(3, torch.float64))
        finally:
            hook.remove()
    assert not calls


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", KINDS)
def test_two_active_adapters_compose_in_sequence(kind, training):
    options = {"lora_dropout": 0.3} if training else {}
    stock, ours = twins(kind, adapters=("one", "two"), **options)
    for model in (stock, ours):
        model.base_model.set_adapter(["one", "two"])
        model.train(training)
    assert_same(ours, stock, KINDS[kind].input(3, torch.float64))


def test_the_sequence_of_two():
    """``g2 * (g1 * (W + D1) + D2)``, g2 from the norm of ``W + D2``."""
    _, ours = twins("linear_no_bias", adapters=("one", "two"))
    ours.base_model.set_adapter(["one", "two"])
    layer = target(ours)
    weight = layer.base_layer.weight
    expected = weight
    for name in ("one", "two"):
        change = layer.scaling[name] * layer.lora_B[name].weight @ layer.lora_A[name].weight
        g = layer.lora_magnitude_vector[name].weight / torch.linalg.vector_norm(weight + change, dim=1)
        expected = g[:, None] * (expected + change)
    x = KINDS["linear_no_bias"].input(3, torch.float64)
    torch.testing.assert_close(ours(x), x @ expected.T, **TIGHT)


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_are_switched_added_and_deleted(kind):
    stock, ours = twins(kind, adapters=("one", "two"))
    x = KINDS[kind].input(3, torch.float64)
    for name in ("two", "one"):
        for model in (stock, ours):
            model.set_adapter(name)
        assert_same(ours, stock, x)
    with stock.disable_adapter(), ours.disable_adapter():
        torch.testing.assert_close(ours(x), stock(x), rtol=0, atol=0)
    for model in (stock, ours):
        config = peft.LoraConfig(r=3, use_dora=True, target_modules=["target"], **KINDS[kind].options)
        model.add_adapter("three", config)
        off_init(model, seed=5)
        model.delete_adapter("one")
        model.set_adapter("three")
    assert isinstance(target(ours).lora_magnitude_vector["three"], dorac.peft.DoraLinearLayer)
    assert_same(ours, stock, x)


def test_dora_beside_plain_lora():
    """A plain LoRA adapter on the same layer, active before or after DoRA's."""
    stock = stock_model("linear", adapters=("dora",))
    plain = peft.LoraConfig(r=3, target_modules=["target"], init_lora_weights=False)
    stock.add_adapter("plain", plain)
    ours = copy.deepcopy(stock)
    dorac.peft.enable(ours)
    x = KINDS["linear"].input(3, torch.float64)
    for active in (["plain"], ["dora", "plain"], ["plain", "dora"]):
        for model in (stock, ours):
            model.base_model.set_adapter(active)
        assert_same(ours, stock, x)


def test_modules_to_save():
    stock, ours = twins("linear", modules_to_save=["head"])
    assert_same(ours, stock, KINDS["linear"].input(3, torch.float64))
    for model in (stock, ours):
        x = torch.ones(2, 3, dtype=torch.float64)
        model.base_model.model.head(x).sum().backward()
    torch.testing.assert_close(gradients(ours), gradients(stock), **TIGHT)


@pytest.mark.parametrize("hooked", [False, True], ids=["one_call", "base_and_delta"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "embedding_padded"])
def test_the_norm_is_detached(kind, hooked):
    """The factors' gradients are those with the norm held constant, not those through it."""
    _, ours = twins(kind)
    layer = target(ours)
    if hooked:
        layer.base_layer.register_forward_hook(lambda module, args, y: y)
    x = KINDS[kind].input(3, torch.float64)
    base = layer.base_layer
    magnitude = layer.lora_magnitude_vector["default"].weight

    def output(norm_is_constant):
        stacked = "embedding" in kind
        if stacked:
            lora_A, lora_B = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
        else:
            lora_A, lora_B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        change = layer.scaling["default"] * (lora_B.flatten(1) @ lora_A.flatten(1))  # [out, in]
        change = change.T if stacked or kind == "gpt2_conv1d" else change.view(base.weight.shape)
        over = 0 if stacked or kind == "gpt2_conv1d" else tuple(range(1, base.weight.ndim))
        norm = torch.linalg.vector_norm(base.weight + change, dim=over, keepdim=True)
        norm = norm.detach() if norm_is_constant else norm
        adapted = magnitude.view(norm.shape) / norm * (base.weight + change)
        return torch.func.functional_call(base, {"weight": adapted}, (x,)), (lora_A, lora_B, magnitude)

    constant, parameters = output(True)
    probe = torch.linspace(-1, 1, constant.numel(), dtype=constant.dtype).view_as(constant)
    expected = torch.autograd.grad((constant * probe).sum(), parameters)
    through = torch.autograd.grad((output(False)[0] * probe).sum(), parameters[:2])
    actual = torch.autograd.grad((ours(x) * probe).sum(), parameters)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-11)
    assert not torch.allclose(actual[1], through[1], rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("hooked", [False, True], ids=["one_call", "base_and_delta"])
@pytest.mark.parametrize("autocast_adapter_dtype", [True, False], ids=["fp32_adapter", "half_adapter"])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_error_beside_peft(kind, autocast_adapter_dtype, hooked, dtype):
    """RMS error against float64 on the same bits: not above stock PEFT's, on average over draws.

    Where PEFT keeps its adapters in float32 (the default) both do the same arithmetic with one order of it different,
    which flips single roundings: there the bound has 1 % of slack for these small layers.
    """
    ours_square = stock_square = 0.0
    for seed in range(4):
        stock, ours = twins(kind, dtype=dtype, autocast_adapter_dtype=autocast_adapter_dtype, seed=seed)
        if hooked:
            for model in (stock, ours):
                target(model).base_layer.register_forward_hook(lambda module, args, y: y)
        exact = copy.deepcopy(stock).double()
        x = KINDS[kind].input(seed, dtype, samples=32)
        with torch.no_grad():
            truth = exact(x if KINDS[kind].is_index else x.double())
            ours_y, stock_y = ours(x), stock(x)
        assert ours_y.dtype == stock_y.dtype == dtype
        ours_square += (ours_y.double() - truth).square().mean().item()
        stock_square += (stock_y.double() - truth).square().mean().item()
    assert ours_square <= stock_square * (1.02 if autocast_adapter_dtype else 1)


@pytest.mark.parametrize("kind", KINDS)
def test_autocast(kind):
    stock, ours = twins(kind, dtype=torch.float32)
    x = KINDS[kind].input(3, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = ours(x), stock(x)
    assert y.dtype == expected.dtype
    truth = copy.deepcopy(stock).double()(x if KINDS[kind].is_index else x.double())
    assert_rms_beside(y, expected, truth, factor=1.25)


@pytest.mark.parametrize("kind", KINDS)
def test_dora_caching(kind):
    """PEFT's own switch keeps the norm, and nothing else, in eval mode."""
    from peft.helpers import DoraCaching

    _, ours = twins(kind)
    layer = target(ours)
    cache = layer.lora_magnitude_vector["default"]._dora_cache
    x = KINDS[kind].input(3, torch.float64)
    ours.eval()
    expected = ours(x)
    assert not cache
    with DoraCaching():
        torch.testing.assert_close(ours(x), expected, rtol=0, atol=0)
        ((key, (_, norm)),) = cache.items()
        assert key == "weight-norm-default"
        assert norm.shape == layer.lora_magnitude_vector["default"].weight.shape
        norm *= 2  # it is what the next forward reads
        assert not torch.allclose(ours(x), expected)
        ours.train()
        assert not cache
        ours(x)
        assert not cache
        ours.eval()
        ours(x)
        assert cache
    ours(x)
    assert not cache
    with DoraCaching():
        ours(x)
    dorac.peft.disable(ours)
    assert not cache


def test_ephemeral_offload_places_the_magnitude():
    """On the CPU, where PEFT says so; used from there by a layer that is elsewhere."""
    layer = dorac.peft.DoraLinearLayer(fan_in_fan_out=False)
    base = nn.Linear(4, 3)
    layer.update_layer(
        base_layer=base, lora_A=torch.randn(2, 4), lora_B=torch.zeros(3, 2), scaling=1.0, place_on_cpu=True
    )
    assert layer.weight.device.type == "cpu"
    torch.testing.assert_close(layer.weight.detach(), base.weight.norm(dim=1))


@pytest.mark.gpu
def test_magnitude_on_another_device():
    stock, ours = twins("linear", dtype=torch.float32)
    for hooked in (False, True):
        model = copy.deepcopy(ours).cuda()
        expected = copy.deepcopy(stock).cuda()
        magnitude = target(model).lora_magnitude_vector["default"]
        magnitude.weight = nn.Parameter(magnitude.weight.data.cpu())
        if hooked:
            target(model).base_layer.register_forward_hook(lambda module, args, y: y)
        x = KINDS["linear"].input(3, torch.float32).cuda()
        torch.testing.assert_close(model(x), expected(x))
        model(x).sum().backward()
        assert magnitude.weight.grad.device.type == "cpu"
