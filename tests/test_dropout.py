"""Dropout in both meanings: values and gradients for a mask that is known, on every way that the layer can take."""

import gc
from dataclasses import replace

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
            assert actual.dtype is (inputs.weight if name == "y" else getattr(inputs, name)).dtype
            budget.check(actual, name)


def kept_by(run):
    """The tensors that ``run`` keeps for backward."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        run()
    return kept


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
    assert type(y.grad_fn).__name__ == "LinearBackward"
    check(inputs, y, meaning, mask_of(inputs.x.detach()))
    with torch.no_grad():
        torch.testing.assert_close(layer(inputs, meaning), y, rtol=0, atol=0)


@pytest.mark.parametrize("factors", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("x", [torch.float32, torch.bfloat16])
def test_autocast(meaning, factors, x, on_gpu, device):
    """x is dropped before it is cast, as in PEFT; kept is what it is cast to."""
    inputs = linear_inputs("odd", dtype=torch.bfloat16, factor_dtype=factors, device=device)
    inputs = frozen_weight(replace(inputs, x=inputs.x.to(x)).leaves())
    y = None

    def run():
        nonlocal y
        with torch.autocast(device, torch.bfloat16):
            y = layer(inputs, meaning)

    kept = kept_by(run)
    assert y.grad_fn.name() == "LinearBackward"
    assert [t.dtype for t in kept if t.shape == inputs.x.shape] == [torch.bfloat16]
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


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", [(33, 96, 41, 8), (33, 40, 96, 8)], ids=str)
def test_what_is_kept_for_backward(meaning, bias, sizes, on_gpu, device):
    """x itself, the mask's bits, and one tensor of the output's size, or if asked to y; no x' and no wider mask."""
    tokens, _, in_features, _ = sizes
    inputs = frozen_weight(linear_inputs(sizes, dtype=torch.bfloat16, bias=bias, device=device).leaves())
    y = None

    def run():
        nonlocal y
        y = layer(inputs, meaning, save_output=True)

    kept = kept_by(run)
    wide = [t for t in kept if t.dtype is y.dtype and t.shape == y.shape]
    assert [t.data_ptr() == y.data_ptr() for t in wide] == [meaning == "low_rank" and not bias]
    assert [t.data_ptr() == inputs.x.data_ptr() for t in kept if t.shape == inputs.x.shape] == [True]
    size = -(-tokens * in_features // 8)
    assert [t.shape for t in kept if not t.dtype.is_floating_point] == [(size,)]
    assert all(t.untyped_storage().nbytes() == t.numel() * t.itemsize for t in kept)


def test_layers_of_one_x_keep_it_once(meaning, on_gpu, device):
    """Beside it the second keeps what is its own: inner, h, the norm and the bits of its mask."""
    tokens, out_features, in_features, rank = sizes = 64, 96, 256, 8
    first, second = (
        frozen_weight(linear_inputs(sizes, dtype=torch.bfloat16, device=device, seed=seed).leaves()) for seed in (0, 1)
    )
    second = replace(second, x=first.x)
    held = {t.untyped_storage().data_ptr() for i in (first, second) for t in i.tensors()}
    for several in ((first,), (first, second)):
        kept = kept_by(lambda several=several: [layer(inputs, meaning) for inputs in several])
        own = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
        of_each = 2 * tokens * (out_features + rank) + 4 * out_features + tokens * in_features // 8
        assert sum(size for place, size in own.items() if place not in held) == of_each * len(several)


@pytest.mark.parametrize("wide", [False, True])
def test_torch_draws_the_mask(meaning, wide, on_gpu, device):
    """As F.dropout does, and with as many random numbers."""
    inputs = linear_inputs("odd", dtype=torch.bfloat16, device=device)
    inputs = replace(inputs, x=inputs.x.float()) if wide else inputs
    for training in (True, False):
        inputs = frozen_weight(inputs.leaves())
        with torch.set_grad_enabled(training), torch.autocast(device, torch.bfloat16, enabled=wide):
            layer(inputs, meaning)
        after = torch.rand(3, device=device)
        torch.manual_seed(3)
        F.dropout(inputs.x.detach(), P)
        assert torch.equal(torch.rand(3, device=device), after)


EDITS = {
    "one dimension": lambda x: x[0],
    "three dimensions": lambda x: x.view(3, 11, -1),
    "four dimensions": lambda x: x.view(3, 11, 1, -1),
    "transposed": lambda x: x.view(3, 11, -1).transpose(0, 1),
    "columns": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "expanded": lambda x: x[:1].expand(x.shape),
    "misaligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("trained", [True, False])
def test_layouts_of_x(meaning, edit, bias, trained, on_gpu, device):
    """With y kept where it may be; also where x has no gradient."""
    inputs = linear_inputs("odd", dtype=torch.float16, bias=bias, device=device)
    x = EDITS[edit](inputs.x)
    inputs = replace(frozen_weight(inputs.leaves()), x=x.detach().requires_grad_(trained))
    y = layer(inputs, meaning, save_output=True)
    assert type(y.grad_fn).__name__ == "LinearBackward"
    check(inputs, y, meaning, mask_of(x))
    assert (inputs.x.grad is not None) == trained


def test_x_written_to_before_backward(meaning, on_gpu, device):
    inputs = frozen_weight(linear_inputs("odd", dtype=torch.bfloat16, device=device).leaves())
    inputs = replace(inputs, x=inputs.x.clone())
    y = layer(inputs, meaning)
    inputs.x.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_gradients_that_are_seen_are_those_that_are_not(meaning, on_gpu, device):
    """A mode over backward alone, and torch.autograd's own vmap: the same mask, of its bits in aten."""
    inputs = frozen_weight(linear_inputs("odd", dtype=torch.float16, device=device).leaves())
    leaves = [t for t in inputs.tensors() if t.requires_grad]
    y = layer(inputs, meaning)
    dy = torch.randn_like(y)
    plain = torch.autograd.grad(y, leaves, dy, retain_graph=True)
    with FlopCounterMode(display=False) as mode:
        seen = torch.autograd.grad(y, leaves, dy, retain_graph=True)
    assert mode.get_total_flops()
    batched = torch.autograd.grad(y, leaves, torch.stack([dy, 2 * dy]), is_grads_batched=True)
    for grad, other, both in zip(plain, seen, batched, strict=True):
        bound = 4 * torch.finfo(torch.float16).eps * grad.float().norm()
        assert (other.float() - grad.float()).norm() <= bound
        assert (both.float() - torch.stack([grad, 2 * grad]).float()).norm() <= 3 * bound


@pytest.mark.parametrize("save_output", [True, False])
def test_what_is_kept_goes_with_the_graph(meaning, save_output, on_gpu, device, monkeypatch):
    """Without waiting for the collector of cycles."""
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


def test_hooks_may_change_the_strides_of_x_and_lora_B(meaning, on_gpu, device):
    """As those that move what is saved to the host do."""
    grads = []
    changed = (48, 8), (16, 32)
    for unpack in (lambda t: t, lambda t: t.t().contiguous().t() if t.shape in changed else t):
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
    assert len(eager.plans) == 3
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
    for reentrant in (None, False, True):
        inputs = frozen_weight(linear_inputs((16, 96, 32, 8), dtype=torch.bfloat16, bias=bias, device=device).leaves())

        def run(x, inputs=inputs):
            options = {"scaling": S, "dropout_p": P, "dropout_on": meaning}
            return functional.dora_linear(x, *inputs.tensors()[1:], **options)

        torch.manual_seed(3)
        y = run(inputs.x) if reentrant is None else checkpoint(run, inputs.x, use_reentrant=reentrant)
        torch.manual_seed(9)
        y.sin().sum().backward()
        grads.append([t.grad for t in inputs.tensors() if t is not None and t.requires_grad])
    for again in grads[1:]:
        torch.testing.assert_close(again, grads[0], rtol=0, atol=0)


@pytest.mark.gpu
def test_cuda_graphs(meaning):
    """A replay draws what eager draws of the same seed."""
    inputs = frozen_weight(linear_inputs("odd", dtype=torch.bfloat16, device="cuda").leaves())
    leaves = [t for t in inputs.tensors() if t.requires_grad]

    def step():
        options = {"scaling": S, "dropout_p": P, "dropout_on": meaning}
        y = functional.dora_linear(*inputs.tensors(), **options)
        return y.detach(), *torch.autograd.grad(y, leaves, torch.ones_like(y))

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = step()
    for seed in (3, 4):
        torch.manual_seed(seed)
        expected = step()
        torch.manual_seed(seed)
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(left, right) for left, right in zip(actual, expected, strict=True))


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


@pytest.mark.parametrize("shape", [(5, 12), (2, 3, 12)], ids=str)
def test_a_float32_layer_with_a_bias_under_autocast(meaning, shape):
    """Where the delta is zero it is the frozen layer's product, whose bias autocast casts."""
    base = torch.nn.Linear(12, 7)
    layer = dorac.nn.DoraLinear(base, r=3, lora_dropout=0.5, dropout_on=meaning)
    x = torch.randn(shape, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = layer(x), base(x)
    y.square().sum().backward()
    assert y.dtype is torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=2**-6, atol=2**-6)
    assert layer.lora_magnitude_vector.grad.isfinite().all()
