"""Dropout in both meanings: values and gradients for a mask that is known, on every way that the layer can take."""

import gc

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import dorac
from dorac import functional, reference
from dorac.ops import eager, front, linear
from dorac.testing import layer_budgets, linear_inputs

MEANINGS = ("adapter", "low_rank")
S, P = 0.7, 0.4


@pytest.fixture(params=MEANINGS)
def meaning(request) -> str:
    return request.param


@pytest.fixture
def on_gpu(monkeypatch):
    """The ways that a GPU takes; without one, the kernels are interpreted."""
    monkeypatch.setattr(front, "has_kernels", lambda *tensors: True)


def mask_of(x):
    """What dropout multiplies x with in :func:`layer`."""
    torch.manual_seed(3)
    return (F.dropout(torch.ones_like(x), P) > 0).double() / (1 - P)


def layer(inputs, meaning, run=functional.dora_linear, **options):
    torch.manual_seed(3)
    options = {"scaling": S, "dropout_p": P, "dropout_on": meaning} | options
    return run(*inputs.tensors(), **options)


def check(inputs, y, meaning, mask, **options):
    """y and the gradients that a dy drawn here leaves."""
    dy = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(y)
    y.backward(dy)
    budgets = layer_budgets(
        reference.dora_linear,
        reference.row_norm,
        inputs.tensors(),
        inputs.sums(),
        scaling=S,
        dy=dy,
        casts=6,  # x', the change and with it the second product; under autocast x and the factors
        dropped=mask,
        dropout_on=meaning,
        **options,
    )
    for name, budget in budgets.items():
        actual = y if name == "y" else getattr(inputs, name).grad
        if actual is not None:
            assert actual.dtype is (inputs.x if name == "y" else getattr(inputs, name)).dtype
            budget.check(actual, name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("regime", ["odd", "one_token", "no_tokens", "rank_over_128", "wide"])
def test_values_and_gradients(meaning, dtype, regime, device):
    inputs = linear_inputs(regime, dtype=dtype, device=device).leaves()
    check(inputs, layer(inputs, meaning), meaning, mask_of(inputs.x.detach()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("regime", ["odd", "one_token", "rank_over_128"])
@pytest.mark.parametrize("use_compile", [False, True])
def test_on_a_gpu_with_a_weight_that_is_trained(meaning, dtype, regime, use_compile, on_gpu, device):
    """That is left to the op and its leaves; on the CPU these run in aten."""
    run = functional.dora_linear
    run = torch.compile(run, fullgraph=True, backend="aot_eager") if use_compile else run
    inputs = linear_inputs(regime, dtype=dtype, device=device).leaves()
    norm = functional.norm_factored(inputs.weight, inputs.lora_A, inputs.lora_B, S).detach()
    y = layer(inputs, meaning, run, weight_norm=norm)
    check(inputs, y, meaning, mask_of(inputs.x.detach()))


def frozen_weight(inputs):
    inputs.weight.requires_grad_(False)
    return inputs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", [(33, 96, 40, 8), (33, 40, 96, 8), (1, 48, 32, 20)], ids=str)
def test_the_eager_function(meaning, dtype, bias, sizes, on_gpu, device, monkeypatch):
    """Wider and narrower than x, which decides on what the low-rank meaning keeps."""
    monkeypatch.setattr(linear, "dora_linear", None)  # not to be called
    inputs = frozen_weight(linear_inputs(sizes, dtype=dtype, bias=bias, device=device).leaves())
    y = layer(inputs, meaning)
    assert type(y.grad_fn).__name__ == "_LinearBackward"
    check(inputs, y, meaning, mask_of(inputs.x.detach()))
    with torch.no_grad():
        torch.testing.assert_close(layer(inputs, meaning), y, rtol=0, atol=0)


@pytest.mark.parametrize("factors", [torch.float32, torch.bfloat16])
def test_autocast(meaning, factors, on_gpu, device):
    """x is dropped before it is cast, as in PEFT."""
    inputs = linear_inputs("odd", dtype=torch.bfloat16, factor_dtype=factors, device=device).leaves()
    inputs.weight.requires_grad_(False)
    wide = inputs.x.detach().float().requires_grad_()
    with torch.autocast(device, torch.bfloat16):
        y = layer(inputs, meaning)
        torch.manual_seed(3)
        from_wide = functional.dora_linear(wide, *inputs.tensors()[1:], scaling=S, dropout_p=P, dropout_on=meaning)
    assert from_wide.grad_fn.name() == y.grad_fn.name() == "_LinearBackward"
    assert torch.autograd.grad(from_wide.sum(), wide)[0].dtype is torch.float32
    check(inputs, y, meaning, mask_of(inputs.x.detach()), dtype=torch.bfloat16)


@pytest.mark.parametrize("sizes", [(33, 96, 40, 8), (33, 40, 96, 8)], ids=str)
def test_y_may_be_written_to(meaning, sizes, on_gpu, device):
    """By a consumer that works in place."""
    grads = []
    for in_place in (False, True):
        inputs = frozen_weight(linear_inputs(sizes, dtype=torch.bfloat16, bias=False, device=device).leaves())
        F.relu(layer(inputs, meaning), inplace=in_place).sum().backward()
        grads.append([t.grad for t in inputs.tensors() if t is not None and t.requires_grad])
    torch.testing.assert_close(grads[1], grads[0], rtol=2e-2, atol=2e-2)
    torch.testing.assert_close(grads[1][0], grads[0][0], rtol=0, atol=0)


def second_order(inputs, run):
    """The gradients of a function of gradients."""
    leaves = [t for t in inputs.tensors() if t is not None and t.requires_grad]
    grads = torch.autograd.grad(run(inputs).square().sum(), leaves, create_graph=True)
    return torch.autograd.grad(sum(g.float().square().sum() for g in grads), leaves)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", [(9, 48, 32, 8), (9, 32, 48, 8)], ids=str)
def test_a_second_derivative_of_the_eager_function(meaning, bias, sizes, on_gpu, device):
    inputs = frozen_weight(linear_inputs(sizes, dtype=torch.bfloat16, bias=bias, device=device).leaves())
    mask = mask_of(inputs.x.detach())

    def textbook(inputs):
        return reference.dora_linear(*inputs.tensors(), scaling=S, dropped=mask, dropout_on=meaning)

    exact = frozen_weight(inputs.map(lambda t: t.detach().double().requires_grad_()))
    actual = second_order(inputs, lambda i: layer(i, meaning))
    for grad, truth in zip(actual, second_order(exact, textbook), strict=True):
        error = (grad.double() - truth).square().mean().sqrt() / truth.square().mean().sqrt()
        assert error < 2e-2


@pytest.mark.parametrize("kernels", [False, True])
def test_gradcheck(meaning, kernels, monkeypatch):
    """In float64, of every order; with kernels over the leaves that a GPU takes."""
    if kernels:
        path = "fused" if meaning == "adapter" else "accumulate"
        monkeypatch.setattr(linear, "route", lambda *args, **kwargs: path)
    inputs = linear_inputs((3, 4, 5, 2)).leaves()
    norm = functional.norm_factored(*inputs.tensors()[1:4], S)

    def run(*tensors):
        torch.manual_seed(3)
        return functional.dora_linear(*tensors, scaling=S, weight_norm=norm.detach(), dropout_p=P, dropout_on=meaning)

    assert gradcheck(run, inputs.tensors(), check_forward_ad=True)
    assert gradgradcheck(run, inputs.tensors(), check_fwd_over_rev=True)


@pytest.mark.parametrize("route", ["separate", "fused"])
@pytest.mark.parametrize("subset", [(0,), (1,), (2,), (3,), (4,), (5,), (2, 3, 4), (0, 4), (1, 5)])
def test_which_gradients_exist(meaning, route, subset, monkeypatch):
    monkeypatch.setattr(linear, "route", lambda *args, **kwargs: route)
    everything = linear_inputs("odd").leaves()
    layer(everything, meaning).square().sum().backward()
    inputs = linear_inputs("odd").leaves()
    for i, tensor in enumerate(inputs.tensors()):
        tensor.requires_grad_(i in subset)
    layer(inputs, meaning).square().sum().backward()
    for i, (leaf, full) in enumerate(zip(inputs.tensors(), everything.tensors(), strict=True)):
        assert (leaf.grad is not None) == (i in subset), i
        if i in subset:
            torch.testing.assert_close(leaf.grad, full.grad, rtol=1e-10, atol=1e-10)


def test_transforms(meaning):
    """vmap draws a mask for each sample, or one for all; the derivatives are the formula's."""
    inputs = linear_inputs((4, 6, 5, 2))
    xs = torch.stack([inputs.x] * 3)

    def run(x):
        options = {"scaling": S, "dropout_p": P, "dropout_on": meaning}
        return functional.dora_linear(x, *inputs.tensors()[1:], **options)

    one, several = (torch.vmap(run, randomness=r)(xs) for r in ("same", "different"))
    assert torch.equal(one[0], one[1])
    assert not torch.equal(several[0], several[1])
    mask = mask_of(inputs.x)

    def textbook(x):
        return reference.dora_linear(x, *inputs.tensors()[1:], scaling=S, dropped=mask, dropout_on=meaning)

    torch.manual_seed(3)
    y, tangent = torch.func.jvp(run, (inputs.x,), (inputs.x.cos(),))
    torch.testing.assert_close((y, tangent), torch.func.jvp(textbook, (inputs.x,), (inputs.x.cos(),)))
    torch.manual_seed(3)
    grad = torch.func.grad(lambda x: run(x).sin().sum())(inputs.x)
    torch.testing.assert_close(grad, torch.func.grad(lambda x: textbook(x).sin().sum())(inputs.x))


def test_what_is_kept_for_backward(meaning, on_gpu, device):
    """LoRA keeps x' and not x; beside that a layer keeps one tensor of its output's size, or if asked to y."""
    for sizes, bias in (((64, 96, 40, 8), True), ((64, 40, 96, 8), False), ((64, 96, 40, 8), False)):
        inputs = frozen_weight(linear_inputs(sizes, dtype=torch.bfloat16, bias=bias, device=device).leaves())
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t) or t, lambda t: t):
            y = layer(inputs, meaning, save_output=True)
        _, out_features, in_features, _ = sizes
        of_y = meaning == "low_rank" and not bias and out_features > in_features
        wide = [t for t in kept if t.dtype is y.dtype and t.shape == y.shape]
        assert [t.data_ptr() == y.data_ptr() for t in wide] == [of_y]
        assert any(t.data_ptr() == inputs.x.data_ptr() for t in kept) == of_y


@pytest.mark.parametrize("save_output", [True, False])
def test_what_is_kept_goes_with_the_graph(meaning, save_output, on_gpu, device, monkeypatch):
    """Without waiting for the collector of cycles: inner may be an output of the layer's own node."""
    pytest.importorskip("triton")
    from dorac.kernels.launch import Launch

    monkeypatch.setattr(Launch, "_compile", lambda *args: None)  # what interprets kernels keeps tensors
    for sizes in ((16, 48, 32, 8), (16, 32, 48, 8)):
        inputs = frozen_weight(linear_inputs(sizes, dtype=torch.bfloat16, bias=False, device=device).leaves())
        gc.disable()
        try:
            y = layer(inputs, meaning, save_output=save_output)
            saved = [t for t in y.grad_fn.saved_tensors if t is not None and t.shape == y.shape]
            assert len(saved) == 1
            kept = [StorageWeakRef(t.untyped_storage()) for t in (y, *saved)]
            del y, saved
            assert all(ref.expired() for ref in kept)
        finally:
            gc.enable()


def test_hooks_may_change_the_strides_of_lora_B(meaning, on_gpu, device):
    """As those that move what is saved to the host do."""
    grads = []
    for unpack in (lambda t: t, lambda t: t.t().contiguous().t() if t.shape == (48, 8) else t):
        inputs = frozen_weight(linear_inputs((16, 48, 32, 8), dtype=torch.bfloat16, device=device).leaves())
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
            views = inputs.map(lambda t: t.view_as(t))  # no leaves: all of them are saved
            y = layer(views, meaning)
        y.sin().sum().backward()
        grads.append([t.grad for t in inputs.tensors() if t.requires_grad])
    torch.testing.assert_close(grads[1], grads[0])


def test_the_frozen_layer_at_the_start():
    """PEFT's meaning drops the change alone, which is zero there: the bits of the frozen layer."""
    inputs = linear_inputs("odd", dtype=torch.float32)
    x, weight, lora_A, lora_B, _, bias = inputs.tensors()
    lora_B = torch.zeros_like(lora_B)
    magnitude = functional.init_magnitude(weight, lora_A, lora_B, S)
    y = functional.dora_linear(x, weight, lora_A, lora_B, magnitude, bias, scaling=S, dropout_p=P)
    assert torch.equal(y, F.linear(x, weight, bias))


def test_plans_know_the_meaning(on_gpu, device):
    inputs = linear_inputs((32, 48, 32, 8), dtype=torch.bfloat16, device=device)
    with torch.no_grad():
        results = [layer(inputs, m, dropout_p=p) for m, p in (("adapter", P), ("low_rank", P), ("adapter", 0.0))]
        again = [layer(inputs, m, dropout_p=p) for m, p in (("adapter", P), ("low_rank", P), ("low_rank", 0.0))]
    assert len(eager._plans) == 3
    for result, same in zip(results, again, strict=True):
        assert torch.equal(result, same)
    assert not any(torch.equal(a, b) for a, b in zip(results, results[1:] + results[:1], strict=True))


# --- other layers ----------------------------------------------------------------------------------------------------


def test_convolution():
    convolution = dorac.nn.DoraConv2d(
        nn.Conv2d(4, 6, 3, padding=1), 2, lora_dropout=P, dropout_on="low_rank", init_lora_weights=False
    ).double()
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    with torch.no_grad():
        convolution.lora_magnitude_vector.mul_(1.2)
        torch.manual_seed(3)
        y = convolution.train()(x)
        g, base, dropped = 1.2, convolution.base_layer, x * mask_of(x)
        plain = [F.conv2d(i, base.weight, padding=1) for i in (x, dropped)]
        torch.testing.assert_close(y, convolution.eval()(dropped) + g * (plain[0] - plain[1]), rtol=1e-6, atol=1e-6)


def test_experts_and_sorted_rows(meaning):
    generator = torch.Generator().manual_seed(1)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    x, weight, lora_A, lora_B, bias = draw(3, 4, 6), draw(3, 5, 6), draw(3, 2, 6), draw(3, 5, 2), draw(3, 5)
    tensors = weight, lora_A, lora_B, 1.2 * reference.row_norm(weight, lora_A, lora_B, S), bias
    options = {"scaling": S, "dropout_p": P, "dropout_on": meaning}
    truth = reference.dora_linear(x, *tensors, scaling=S, dropped=mask_of(x), dropout_on=meaning)
    torch.manual_seed(3)
    torch.testing.assert_close(functional.dora_linear(x, *tensors, **options), truth)
    torch.manual_seed(3)
    rows = functional.dora_linear_grouped(x.flatten(0, 1), *tensors, offsets=torch.tensor([4, 8, 12]), **options)
    torch.testing.assert_close(rows, truth.flatten(0, 1))


def test_modules(meaning):
    model = nn.Sequential(nn.Linear(6, 5))
    dorac.apply_dora(model, ["0"], 2, lora_dropout=P, dropout_on=meaning, init_lora_weights=False)
    adapted, x = model[0].double(), torch.randn(4, 6, dtype=torch.float64)
    assert ("dropout_on=low_rank" in repr(adapted)) == (meaning == "low_rank")
    tensors = adapted.weight, adapted.lora_A, adapted.lora_B, adapted.lora_magnitude_vector, adapted.bias
    with torch.no_grad():
        adapted.lora_magnitude_vector.mul_(1.3)
        torch.manual_seed(3)
        y = model(x)
    options = {"scaling": adapted.scaling, "dropped": mask_of(x), "dropout_on": meaning}
    torch.testing.assert_close(y, reference.dora_linear(x, *tensors, **options))


# --- who looks on ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
def test_a_checkpoint_draws_the_same_mask(meaning, bias, on_gpu, device):
    grads = []
    for checkpointed in (False, True):
        inputs = frozen_weight(linear_inputs((16, 96, 32, 8), dtype=torch.bfloat16, bias=bias, device=device).leaves())

        def run(x, inputs=inputs):
            options = {"scaling": S, "dropout_p": P, "dropout_on": meaning}
            return functional.dora_linear(x, *inputs.tensors()[1:], **options)

        torch.manual_seed(3)
        y = checkpoint(run, inputs.x, use_reentrant=False) if checkpointed else run(inputs.x)
        torch.manual_seed(9)
        y.sin().sum().backward()
        grads.append([t.grad for t in inputs.tensors() if t is not None and t.requires_grad])
    torch.testing.assert_close(grads[1], grads[0], rtol=0, atol=0)


def test_flops_are_counted(meaning, on_gpu, device):
    """PEFT's meaning has a second product with W in each direction."""
    tokens, out_features, in_features, rank = sizes = 16, 48, 32, 8
    inputs = frozen_weight(linear_inputs(sizes, dtype=torch.bfloat16, device=device).leaves())
    norm = functional.norm_factored(*inputs.tensors()[1:4], S).detach()
    with FlopCounterMode(display=False) as forward:
        y = layer(inputs, meaning, weight_norm=norm)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    base, low_rank = 2 * tokens * in_features * out_features, 2 * tokens * rank * (in_features + out_features)
    products = 2 if meaning == "adapter" else 1
    assert forward.get_total_flops() == products * base + low_rank
    assert backward.get_total_flops() == products * base + 2 * low_rank
