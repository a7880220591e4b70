"""The layer's eager path (``ops/eager.py``): its results, what it keeps, when it steps aside.

On the CPU the kernels run in Triton's interpreter.
"""

import contextlib
import functools
import gc
import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from test_bad_input import CASES
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)
from torch.utils.flop_counter import FlopCounterMode

from dorac import functional, reference
from dorac.ops import eager, front
from dorac.testing import layer_budgets, linear_inputs

pytest.importorskip("triton")

S = 0.7
HALF = [torch.bfloat16, torch.float16]


@pytest.fixture
def path(device, monkeypatch) -> list[str]:
    """Has tensors on the CPU take the path, too; what took it since, "training" or "inference"."""
    if device == "cpu":
        if torch.cuda.is_available():
            pytest.skip("kernels are compiled where there is a GPU, and take no tensors of the CPU")
        monkeypatch.setattr(
            front, "has_kernels", lambda *tensors: all(t is None or t.dtype.itemsize < 8 for t in tensors)
        )
    taken = []
    without_autocast = eager._without_autocast

    def spy(*arguments):
        taken.append("training" if arguments[-1] else "inference")
        return without_autocast(*arguments)

    monkeypatch.setattr(eager, "_without_autocast", spy)
    # Of layers without a bias y is saved; what those with one save, inner, is what any layer saves by default.
    monkeypatch.setattr(functional, "dora_linear", functools.partial(functional.dora_linear, save_output=True))
    return taken


def frozen(inputs):
    """The base layer's weight and bias frozen, as an adapted layer has them."""
    leaves = inputs.leaves()
    leaves.weight.requires_grad_(False)
    return leaves


NAMES = ("x", "weight", "lora_A", "lora_B", "magnitude", "bias")


def named(inputs):
    return zip(NAMES, inputs.tensors(), strict=True)


def check(tensors, y, dy, *, sums, norm=None, **options):
    budgets = layer_budgets(
        reference.dora_linear, reference.row_norm, tensors, sums, scaling=S, dy=dy, weight_norm=norm, **options
    )
    for name, budget in budgets.items():
        tensor = dict(zip(NAMES, tensors, strict=True)).get(name)
        actual = y if name == "y" else tensor.grad
        if name == "y" or tensor.requires_grad:
            budget.check(actual, name)
            assert name == "y" or actual.dtype is tensor.dtype
        else:
            assert tensor.grad is None


REGIMES = [
    "aligned",
    "odd",
    "rank_1",
    "rank_over_128",
    "rank_over_both",
    "one_token",
    "one_feature",
    "wide",
    (6, 48, 32, 384),
    (40, 128, 64, 72),
]


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("regime", REGIMES, ids=str)
@pytest.mark.parametrize("bias", ["trained", "frozen", None])
@pytest.mark.parametrize("given", [True, False])
def test_values_and_gradients(dtype, regime, bias, given, path, device):
    inputs = frozen(linear_inputs(regime, dtype=dtype, bias=bias is not None, device=device))
    if bias == "frozen":
        inputs.bias.requires_grad_(False)
    norm = functional.norm_factored(inputs.weight, inputs.lora_A.detach(), inputs.lora_B.detach(), S) if given else None
    y = functional.dora_linear(*inputs.tensors(), scaling=S, weight_norm=norm)
    dy = torch.randn_like(y)
    y.backward(dy)
    assert path == ["training"]
    check(inputs.tensors(), y, dy, sums=inputs.sums(), norm=norm)


def zero_some(inputs):
    inputs.magnitude[::3] = 0
    return inputs


def rows_of_every_kind(inputs):
    """Magnitudes of zero, of little and of either sign, and a zero row."""
    inputs.magnitude[:4] = torch.tensor([0.0, 1e-4, -1e-3, -1.0])
    inputs.weight[5], inputs.lora_B[5] = 0, 0
    return inputs


def transposed_factors(inputs):
    return replace(inputs, lora_A=inputs.lora_A.t().contiguous().t(), lora_B=inputs.lora_B.t().contiguous().t())


def shifted(tensor):
    """The same numbers 2 bytes behind an aligned address."""
    memory = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device=tensor.device)
    return memory[1:].view(tensor.shape).copy_(tensor)


EDITS = {
    "one dimension": lambda i: replace(i, x=i.x[0]),
    "three dimensions": lambda i: replace(i, x=i.x.view(3, 11, -1)),
    "transposed": lambda i: replace(i, x=i.x.view(3, 11, -1).transpose(0, 1)),
    "columns": lambda i: replace(i, x=i.x.repeat_interleave(2, 1)[:, ::2]),
    "misaligned x": lambda i: replace(i, x=shifted(i.x)),
    "rows": rows_of_every_kind,
    "transposed factors": transposed_factors,
    "half magnitude": lambda i: replace(i, magnitude=i.magnitude.to(i.x.dtype)),
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
def test_layouts_and_magnitudes(edit, dtype, bias, transposed, path, device):
    inputs = EDITS[edit](linear_inputs("odd", dtype=dtype, bias=bias, transposed=transposed, device=device))
    leaves = [t if t is None else t.detach().requires_grad_(name != "weight") for name, t in named(inputs)]
    y = functional.dora_linear(*leaves, scaling=S)
    dy = torch.randn_like(y)
    y.backward(dy)
    assert path == ["training"]
    check(leaves, y, dy, sums=inputs.sums())


DY = {
    "expanded": lambda dy: dy[:1, :1].expand(dy.shape),
    "rows expanded": lambda dy: dy[:1].expand(dy.shape),
    "transposed": lambda dy: dy.t().contiguous().t(),
    "columns": lambda dy: dy.repeat_interleave(2, 1)[:, ::2],
    "misaligned": shifted,
}


@pytest.mark.parametrize("how", DY)
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_of_any_layout(how, bias, path, device):
    inputs = frozen(rows_of_every_kind(linear_inputs("odd", dtype=torch.float16, bias=bias, device=device)))
    for _ in range(2):  # the launches of the first call serve the second
        y = functional.dora_linear(*inputs.tensors(), scaling=S)
        dy = DY[how](torch.randn_like(y))
        inputs.map(lambda t: setattr(t, "grad", None))
        y.backward(dy)
        check(inputs.tensors(), y, dy, sums=inputs.sums())
    assert path == ["training"] * 2


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("wide", [("lora_A", "lora_B"), ("x",), ("x", "lora_A", "lora_B", "bias"), ("bias",)], ids=str)
@pytest.mark.parametrize("edit", [None, transposed_factors, rows_of_every_kind])
def test_autocast(dtype, wide, edit, path, device):
    """PEFT's defaults: a half-precision base layer, factors in float32."""
    inputs = linear_inputs("odd", dtype=dtype, bias="bias" in wide, device=device)
    inputs = replace(inputs, **{name: getattr(inputs, name).float() for name in wide})
    inputs = frozen(inputs if edit is None else edit(inputs))
    with torch.autocast(device, dtype=dtype):
        y = functional.dora_linear(*inputs.tensors(), scaling=S)
    assert y.dtype is dtype
    dy = torch.randn_like(y)
    y.backward(dy)
    assert path == ["training"]
    check(inputs.tensors(), y, dy, sums=inputs.sums(), casts=3)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("factors", [None, torch.float32])
@pytest.mark.parametrize("how", ["first", "second", "written"])
def test_backward_inside_autocast(dtype, factors, how, path, device):
    """The products stay in the layer's dtype, whatever autocast's is."""
    other = torch.float16 if dtype is torch.bfloat16 else torch.bfloat16
    gradients = []
    for inside in (False, True):
        inputs = frozen(linear_inputs("odd", dtype=dtype, factor_dtype=factors, bias=False, device=device))
        with torch.autocast(device, dtype=dtype, enabled=factors is not None):
            y = functional.dora_linear(*inputs.tensors(), scaling=S)
        dy = torch.linspace(-1, 1, y.numel(), device=device).view(y.shape).to(dtype)
        y = y.add_(1) if how == "written" else y
        trained = [t for t in inputs.tensors() if t is not None and t.requires_grad]
        with torch.autocast(device, dtype=other, enabled=inside):
            gradients.append(torch.autograd.grad(y, trained, dy, create_graph=how == "second"))
    for left, right in zip(*gradients, strict=True):
        assert torch.equal(left, right)


def general(monkeypatch, function):
    """What ``function`` returns where no layer takes the path."""
    with monkeypatch.context() as patch:
        patch.setattr(eager, "dora_linear", lambda *arguments: None)
        return function()


def gradients_of(inputs):
    return {name: t.grad for name, t in named(inputs) if t is not None and t.requires_grad}


def assert_near(actual, expected, dtype):
    """Two computations of the same numbers, each of a few roundings; equal where these are not finite."""
    for name, truth in expected.items():
        value, truth = actual[name].double(), truth.double()
        finite = truth.isfinite()
        assert torch.equal(finite, value.isfinite()), name
        assert torch.equal(value.isnan(), truth.isnan()), name
        error, size = (value[finite] - truth[finite]).norm(), truth[finite].norm()
        assert error <= 8 * torch.finfo(dtype).eps * size, (name, error, size)


def both(monkeypatch, path, run, dtype=torch.bfloat16, taken=None):
    """Runs both ways; the results are near each other."""
    actual = run()
    assert path if taken is None else path == taken, path
    path.clear()
    expected = general(monkeypatch, run)
    assert not path
    assert_near(actual, expected, dtype)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("name", ["weight", "lora_B", "x"])
@pytest.mark.parametrize("bias", [True, False])
def test_rows_that_are_not_finite(value, name, bias, path, monkeypatch, device):
    """In float16: the interpreter's bfloat16 loses NaNs."""

    def run():
        inputs = linear_inputs("odd", dtype=torch.float16, bias=bias, device=device)
        getattr(inputs, name)[3, 2] = value
        inputs = frozen(inputs)
        y = functional.dora_linear(*inputs.tensors(), scaling=S)
        y.backward(torch.linspace(-1, 1, y.numel(), device=device).view(y.shape).to(y.dtype))
        return gradients_of(inputs) | {"y": y.detach()}

    both(monkeypatch, path, run, torch.float16)


@pytest.mark.parametrize(
    "names", [("lora_A",), ("lora_B",), ("magnitude",), ("lora_A", "lora_B"), ("x",), ("weight",)], ids=str
)
def test_adapters_trained_in_part_are_not_taken(names, path, device):
    """Nor is a trained weight."""
    inputs = linear_inputs("odd", dtype=torch.float16, device=device)
    leaves = [t.clone().requires_grad_((n in names) != ("weight" in names)) for n, t in named(inputs)]
    if "weight" in names:
        leaves[1].requires_grad_()
    y = functional.dora_linear(*leaves, scaling=S)
    dy = torch.randn_like(y)
    y.backward(dy)
    assert not path
    check(leaves, y, dy, sums=inputs.sums())


def test_x_without_gradient(path, device):
    inputs = frozen(linear_inputs("odd", dtype=torch.float16, device=device))
    inputs.x.requires_grad_(False)
    y = functional.dora_linear(*inputs.tensors(), scaling=S)
    dy = torch.randn_like(y)
    y.backward(dy)
    assert path == ["training"]
    check(inputs.tensors(), y, dy, sums=inputs.sums())


@pytest.mark.parametrize("name", ["weight", "lora_A", "lora_B", "magnitude", "bias"])
def test_misaligned_tensors_are_not_taken(name, path, device):
    inputs = linear_inputs("odd", dtype=torch.float16, device=device)
    inputs = replace(inputs, **{name: shifted(getattr(inputs, name))})
    leaves = [t.detach().requires_grad_(n != "weight") for n, t in named(inputs)]
    y = functional.dora_linear(*leaves, scaling=S)
    dy = torch.randn_like(y)
    y.backward(dy)
    assert not path
    check(leaves, y, dy, sums=inputs.sums())


@pytest.mark.parametrize("name", NAMES)
def test_a_tensor_that_outlived_its_transform(name, path, device):
    """torch takes for it what it was made of."""
    inputs = frozen(linear_inputs("odd", dtype=torch.bfloat16, bias=True, device=device))
    tensors, kept = dict(named(inputs)), []

    def keep(tensor):
        kept.append(tensor)
        return tensor.float().sum()

    torch.func.grad(keep)(tensors[name])
    y = functional.dora_linear(*(tensors | {name: kept[0]}).values(), scaling=S)
    dy = torch.randn_like(y)
    y.backward(dy)
    check(inputs.tensors(), y, dy, sums=inputs.sums())


@pytest.mark.parametrize("bias", [True, False])
def test_backward_twice_adds_up(bias, path, device):
    inputs = frozen(linear_inputs("odd", dtype=torch.bfloat16, bias=bias, device=device))
    y = functional.dora_linear(*inputs.tensors(), scaling=S)
    dy = torch.randn_like(y)
    y.backward(dy, retain_graph=True)
    once = {name: grad.clone() for name, grad in gradients_of(inputs).items()}
    y.backward(dy)
    for name, grad in gradients_of(inputs).items():
        assert torch.equal(grad, 2 * once[name]), name
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        y.backward(dy)


def test_hooks_on_tensors(path, device):
    inputs = frozen(linear_inputs("odd", dtype=torch.bfloat16, device=device))
    seen = []
    for name, tensor in named(inputs):
        if tensor.requires_grad:
            tensor.register_hook(lambda grad, name=name: seen.append(name))
    y = functional.dora_linear(*inputs.tensors(), scaling=S)
    y.register_hook(lambda dy: 2 * dy)
    dy = torch.randn_like(y)
    y.backward(dy)
    assert sorted(seen) == sorted(gradients_of(inputs))
    check(inputs.tensors(), y, 2 * dy, sums=inputs.sums())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("factors", [None, torch.float32])
def test_second_derivatives(bias, factors, path, monkeypatch, device):
    def run():
        inputs = frozen(linear_inputs("odd", dtype=torch.bfloat16, factor_dtype=factors, bias=bias, device=device))
        with torch.autocast(device, dtype=torch.bfloat16, enabled=factors is not None):
            y = functional.dora_linear(*inputs.tensors(), scaling=S)
        trained = [t for t in inputs.tensors() if t is not None and t.requires_grad]
        first = torch.autograd.grad(y.float().square().sum(), trained, create_graph=True)
        sum(grad.float().square().sum() for grad in first).backward()
        return gradients_of(inputs)

    both(monkeypatch, path, run)


@pytest.mark.parametrize("bias", [True, False])
def test_batched_gradients(bias, path, monkeypatch, device):
    """``is_grads_batched`` is a vmap of torch.autograd's own."""

    def run():
        inputs = frozen(linear_inputs("odd", dtype=torch.bfloat16, bias=bias, device=device))
        y = functional.dora_linear(*inputs.tensors(), scaling=S)
        dy = torch.linspace(-1, 1, 2 * y.numel(), device=device).view(2, *y.shape).to(y.dtype)
        trained = {name: t for name, t in named(inputs) if t is not None and t.requires_grad}
        grads = torch.autograd.grad(y, [*trained.values()], dy, is_grads_batched=True)
        return dict(zip(trained, grads, strict=True))

    both(monkeypatch, path, run)


class Rotated(torch.autograd.Function):
    """Twice y, by a kernel that writes in place and says so."""

    @staticmethod
    def forward(ctx, y):
        y.data.mul_(2)
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx, dy):
        return 2 * dy


class GradientOverInput(torch.autograd.Function):
    """Twice y, and its gradient is written over y, as Liger's SwiGLU has it."""

    @staticmethod
    def forward(ctx, y):
        ctx.save_for_backward(y)
        return 2 * y

    @staticmethod
    def backward(ctx, dy):
        (y,) = ctx.saved_tensors
        return y.data.copy_(2 * dy)


class Unsaid(Rotated):
    """The same, and says nothing, as Liger's rotary embedding."""

    @staticmethod
    def forward(ctx, y):
        y.data.mul_(2)
        return y.view_as(y)


def first_row(y):
    y[0] = 0
    return y


def through_a_view(y):
    y.view(-1, 5, 13).mul_(2)
    return y


def of_an_alias(y):
    y.detach().mul_(2)
    return y


CONSUMERS = {
    "none": lambda y: y,
    "relu": F.relu_,
    "residual": lambda y: y.add_(1),
    "first row": first_row,
    "view": through_a_view,
    "detached": of_an_alias,
    "marked dirty": Rotated.apply,
    "gradient over y": GradientOverInput.apply,
}


def kept_contiguous():
    return torch.autograd.graph.saved_tensors_hooks(
        lambda t: t.clone(memory_format=torch.contiguous_format), lambda t: t
    )


KEEPING = {
    "plain": None,
    "reentrant": True,
    "not reentrant": False,
    "on cpu": torch.autograd.graph.save_on_cpu,
    "contiguous": kept_contiguous,
}


@pytest.mark.parametrize("consumer", CONSUMERS)
@pytest.mark.parametrize("keeping", [*KEEPING])
@pytest.mark.parametrize("bias", [True, False])
def test_consumers_in_place(consumer, keeping, bias, path, monkeypatch, device):
    how = KEEPING[keeping]

    def run():
        inputs = frozen(
            zero_some(linear_inputs("odd", dtype=torch.bfloat16, bias=bias, transposed=True, device=device))
        )

        def layer(x):
            return CONSUMERS[consumer](functional.dora_linear(x, *inputs.tensors()[1:], scaling=S))

        with how() if callable(how) else contextlib.nullcontext():
            y = checkpoint(layer, inputs.x, use_reentrant=how) if isinstance(how, bool) else layer(inputs.x)
        y.backward(torch.linspace(-1, 1, y.numel(), device=device).view(y.shape).to(y.dtype))
        return gradients_of(inputs)

    both(monkeypatch, path, run)


def test_a_consumer_that_writes_behind_autograds_back(path, monkeypatch, device):
    """A kernel that writes over y by its pointer, as Liger's rope does: no layer minds that saves inner."""

    def run():
        inputs = frozen(linear_inputs("odd", dtype=torch.bfloat16, bias=False, device=device))
        y = Unsaid.apply(functional.dora_linear(*inputs.tensors(), scaling=S, save_output=False))
        y.backward(torch.linspace(-1, 1, y.numel(), device=device).view(y.shape).to(y.dtype))
        return gradients_of(inputs)

    both(monkeypatch, path, run)


@pytest.fixture
def no_launches(device, monkeypatch):
    """Triton's interpreter makes cycles of references."""
    if device == "cpu":
        from dorac.kernels import launch

        monkeypatch.setattr(launch.Bound, "__call__", lambda *arguments: None)


@pytest.mark.usefixtures("no_launches")
@pytest.mark.parametrize("bias", [True, False])
def test_what_is_kept_goes_with_the_graph(bias, path, device):
    """Not with the loss that somebody holds, and without waiting for the collector of cycles."""
    inputs = frozen(linear_inputs("odd", dtype=torch.bfloat16, bias=bias, device=device))
    gc.disable()
    try:
        for backward in (True, False):
            y = functional.dora_linear(*inputs.tensors(), scaling=S)
            kept = [StorageWeakRef(t.untyped_storage()) for t in (y, y.grad_fn.saved_tensors[6])]
            assert kept[0].cdata != kept[1].cdata or not bias
            loss = y.float().sum()
            del y
            assert not kept[1].expired()
            if backward:
                loss.backward()
            else:
                del loss
            assert all(ref.expired() for ref in kept)
    finally:
        gc.enable()


@pytest.mark.usefixtures("no_launches")
@pytest.mark.parametrize("bias", [True, False])
def test_a_checkpoint_keeps_nothing(bias, path, device):
    inputs = frozen(linear_inputs("odd", dtype=torch.bfloat16, bias=bias, device=device))
    kept = []

    def block(x):
        y = functional.dora_linear(x, *inputs.tensors()[1:], scaling=S)
        kept.append(StorageWeakRef(y.untyped_storage()))
        return y.float().sum()

    gc.disable()
    try:
        loss = checkpoint(block, inputs.x, use_reentrant=False)
        assert kept[0].expired()
        loss.backward()
        assert path == ["training"] * 2
        assert all(ref.expired() for ref in kept)
    finally:
        gc.enable()


def halved(value):
    return value.to(torch.bfloat16) if isinstance(value, Tensor) and value.dtype is torch.float32 else value


def sentence(inputs, options):
    with pytest.raises((TypeError, ValueError)) as refusal:
        functional.dora_linear(*inputs, **{"scaling": S} | options)
    return refusal.type, str(refusal.value)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("training", [True, False])
def test_bad_input_gets_the_same_sentence(case, training, path, monkeypatch, device):
    """In the first call and in a later one, and no plan remains of it."""
    inputs, options, *_ = CASES[case]

    def place(t):  # a device that the case is about stays
        return t if t is None or t.device.type == "meta" else halved(t).to(device)

    inputs = [place(t) for t in inputs.tensors()]
    options = {name: place(value) if isinstance(value, Tensor) else value for name, value in options.items()}
    good = linear_inputs((4, 5, 6, 3), dtype=torch.bfloat16, device=device)
    good = frozen(good) if training else good
    expected = general(monkeypatch, lambda: sentence(inputs, options))
    assert sentence(inputs, options) == expected
    functional.dora_linear(*good.tensors(), scaling=S)
    plans = len(eager.plans)
    assert sentence(inputs, options) == sentence(inputs, options) == expected
    assert len(eager.plans) == plans
    assert path == ["training" if training else "inference"]


def other(inputs, **changes):
    return linear_inputs("odd", seed=1, device=inputs.x.device.type, **{"dtype": torch.float16} | changes)


def other_shape(shape):
    return lambda i: linear_inputs(shape, dtype=torch.float16, seed=1, device=i.x.device.type)


CHANGES = {
    "values": other,
    "dtype": lambda i: other(i, dtype=torch.bfloat16),
    "tokens": other_shape((1, 65, 127, 7)),
    "features": other_shape((33, 64, 128, 7)),
    "rank": other_shape((33, 65, 127, 16)),
    "weight's strides": lambda i: other(i, transposed=True),
    "factors' strides": lambda i: transposed_factors(other(i)),
    "magnitude's dtype": lambda i: other(i, magnitude_dtype=torch.float16),
    "bias": lambda i: other(i, bias=False),
    "bias's dtype": lambda i: replace(other(i), bias=other(i).bias.float()),
    "alignment": lambda i: replace(other(i), weight=shifted(i.weight)),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(
    ("training", "by_data"),
    [(True, False), (False, False), (False, True)],  # a leaf remembers the shape of its gradient
)
def test_no_plan_serves_another_combination(change, training, by_data, path, device):
    """Called as it was, then with other tensors, or with other data in the same ones, and again as it was."""
    first = linear_inputs("odd", dtype=torch.float16, device=device)
    first.weight.requires_grad_(False)
    leaves = first.leaves()
    for inputs in (first, CHANGES[change](first), first):
        if by_data:
            for tensor, new in zip(leaves.tensors(), inputs.tensors(), strict=True):
                if new is not None:
                    tensor.grad = None
                    tensor.data = new.clone() if new.data_ptr() % 16 == 0 else new
            now = leaves if inputs.bias is not None else replace(leaves, bias=None)
        else:
            now = replace(inputs.leaves(), weight=inputs.weight)
        now.weight.requires_grad_(False)
        with torch.set_grad_enabled(training):
            y = functional.dora_linear(*now.tensors(), scaling=S)
        dy = torch.randn_like(y)
        if training:
            y.backward(dy)
        check(now.tensors(), y, dy if training else None, sums=inputs.sums())
    kind = "training" if training else "inference"
    assert path == [kind] * (2 if change == "alignment" else 3)


def test_switches_between_two_calls(path, monkeypatch, device):
    """Gradients, a given norm, autocast and its dtype: each call has its own plan, and comes out as without."""
    inputs = frozen(linear_inputs("odd", dtype=torch.bfloat16, factor_dtype=torch.float32, device=device))
    norm = functional.norm_factored(inputs.weight, inputs.lora_A.detach(), inputs.lora_B.detach(), S) * 1.5
    for training, given, dtype in [
        *itertools.product((True, False), (True, False), (torch.bfloat16, torch.float16, None))
    ] * 2:

        def run(training=training, given=given, dtype=dtype):
            with torch.set_grad_enabled(training), torch.autocast(device, dtype=dtype, enabled=dtype is not None):
                y = functional.dora_linear(*inputs.tensors(), scaling=S, weight_norm=norm if given else None)
            assert y.requires_grad == training
            return {"y": y.detach()}

        kind = ["training" if training else "inference"] if dtype is torch.bfloat16 else []
        both(monkeypatch, path, run, taken=kind)


class Ops(TorchDispatchMode):
    """The ops of dorac's that went by."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "dorac":
            self.seen.add(func._schema.name.removeprefix("dorac::"))
        return func(*args, **kwargs or {})


class Functions(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.add(str(func))
        return func(*args, **kwargs or {})


FORWARD_OPS = {"row_norm", "up_compose_forward"}
BACKWARD_OPS = {"lora_b_backward", "low_rank_linear"}


def test_a_dispatch_mode_sees_the_ops(path, device):
    inputs = frozen(linear_inputs("odd", dtype=torch.bfloat16, device=device))
    with Ops() as forward:
        y = functional.dora_linear(*inputs.tensors(), scaling=S)
    with Ops() as backward:
        y.sum().backward()
    assert (forward.seen, backward.seen) == (FORWARD_OPS, BACKWARD_OPS)
    with torch.no_grad(), Ops() as inference:
        functional.dora_linear(*inputs.tensors(), scaling=S)
    assert inference.seen == {"row_norm", "up_compose"}
    assert not path


@pytest.mark.parametrize("bias", [True, False])
def test_a_dispatch_mode_over_backward_alone_sees_the_ops(bias, path, monkeypatch, device):
    def run():
        inputs = frozen(linear_inputs("odd", dtype=torch.bfloat16, bias=bias, device=device))
        y = functional.dora_linear(*inputs.tensors(), scaling=S)
        with Ops() as ops:
            y.sum().backward()
        assert ops.seen == BACKWARD_OPS
        return gradients_of(inputs)

    both(monkeypatch, path, run)


def test_a_function_mode_sees_the_op(path, device):
    inputs = frozen(linear_inputs("odd", dtype=torch.bfloat16, device=device))
    with Functions() as mode:
        functional.dora_linear(*inputs.tensors(), scaling=S)
    assert not path
    assert any("dora_linear" in name for name in mode.seen)


@pytest.mark.parametrize("bias", [True, False])
def test_flops_are_those_of_the_general_path(bias, path, monkeypatch, device):
    def flops():
        inputs = frozen(linear_inputs("odd", dtype=torch.bfloat16, bias=bias, device=device))
        with FlopCounterMode(display=False) as counter:
            functional.dora_linear(*inputs.tensors(), scaling=S).sum().backward()
        return counter.get_total_flops()

    counted = flops()
    assert not path
    assert counted == general(monkeypatch, flops) > 4 * 33 * 65 * 127


def under_fakes(inputs):
    with FakeTensorMode() as mode:
        y = functional.dora_linear(*inputs.map(mode.from_tensor).tensors(), scaling=S)
    assert type(y) is FakeTensor


def traced(inputs, **options):
    def layer(*tensors):
        return functional.dora_linear(*tensors, scaling=S)

    graph = make_fx(layer, **options)(*inputs.tensors()).graph
    assert any(str(node.target).startswith("dorac.") for node in graph.nodes)


class Layer(torch.nn.Module):
    def forward(self, *tensors):
        return functional.dora_linear(*tensors, scaling=S)


def dual(inputs):
    with forward_ad.dual_level():
        x = forward_ad.make_dual(inputs.x, torch.ones_like(inputs.x))
        y = functional.dora_linear(x, *inputs.tensors()[1:], scaling=S)
        assert forward_ad.unpack_dual(y).tangent is not None


def sum_of_y(*tensors):
    return functional.dora_linear(*tensors, scaling=S).float().sum()


def debug_mode(inputs):
    debug = pytest.importorskip("torch.utils._debug_mode")
    with debug.DebugMode() as mode:
        functional.dora_linear(*inputs.tensors(), scaling=S)
    assert "dorac" in mode.debug_string()


def comm_debug_mode(inputs):
    debug = pytest.importorskip("torch.distributed.tensor.debug")
    with debug.CommDebugMode() as mode:
        functional.dora_linear(*inputs.tensors(), scaling=S)
    assert mode.get_total_counts() == 0


STEPS_ASIDE = {
    "fake tensors": under_fakes,
    "make_fx": traced,
    "make_fx, fake": functools.partial(traced, tracing_mode="fake"),
    "make_fx, symbolic": functools.partial(traced, tracing_mode="symbolic"),
    "make_fx, pre-dispatch": functools.partial(traced, pre_dispatch=True),
    "vmap": lambda i: torch.vmap(Layer(), (0, *[None] * 5))(i.x[None].repeat(2, 1, 1), *i.tensors()[1:]),
    "grad": lambda i: torch.func.grad(sum_of_y)(*i.tensors()),
    "jvp": lambda i: torch.func.jvp(sum_of_y, i.tensors(), i.tensors()),
    "forward mode": dual,
    "compile": lambda i: torch.compile(Layer(), fullgraph=True, backend="aot_eager")(*i.tensors()),
    "export": lambda i: torch.export.export(Layer(), i.tensors()),
    "export, strict": lambda i: torch.export.export(Layer(), i.tensors(), strict=True),
    "jit.trace": lambda i: torch.jit.trace(Layer(), i.tensors(), check_trace=False),
    "debug mode": debug_mode,
    "communication": comm_debug_mode,
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("observer", STEPS_ASIDE)
def test_steps_aside(observer, path, device):
    inputs = linear_inputs("aligned", dtype=torch.bfloat16, device=device)
    functional.dora_linear(*inputs.tensors(), scaling=S)  # a plan is there
    assert path == ["inference"]
    STEPS_ASIDE[observer](inputs)
    assert path == ["inference"]
    functional.dora_linear(*inputs.tensors(), scaling=S)
    assert path == ["inference"] * 2


@contextlib.contextmanager
def default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


UNCHANGED = {
    "profiler": lambda device: torch.profiler.profile(),
    "autograd profiler": lambda device: torch.autograd.profiler.profile(),
    "anomaly": lambda device: torch.autograd.detect_anomaly(),
    "device context": lambda device: torch.device("meta"),
    "default device": lambda device: default_device("meta"),
    "autocast": lambda device: torch.autocast(device, dtype=torch.bfloat16),
    "hooks on saved tensors": lambda device: kept_contiguous(),
}


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("context", UNCHANGED)
def test_changes_no_path(context, path, device):
    inputs = frozen(linear_inputs("odd", dtype=torch.bfloat16, device=device))
    with UNCHANGED[context](device):
        y = functional.dora_linear(*inputs.tensors(), scaling=S)
        dy = torch.ones_like(y)
        y.backward(dy)
        with torch.inference_mode():
            functional.dora_linear(*inputs.tensors(), scaling=S)
    assert path == ["training", "inference"]
    check(inputs.tensors(), y, dy, sums=inputs.sums())


@pytest.mark.gpu
@pytest.mark.parametrize("bias", [True, False])
def test_cuda_graphs(bias, path):
    device = "cuda"
    inputs = frozen(linear_inputs("odd", dtype=torch.bfloat16, bias=bias, device=device))
    dy = torch.randn(33, 65, device=device, dtype=torch.bfloat16)
    trained = [t for t in inputs.tensors() if t is not None and t.requires_grad]

    def step():
        y = functional.dora_linear(*inputs.tensors(), scaling=S)
        return y.detach(), *torch.autograd.grad(y, trained, dy)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        expected = step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        actual = step()
    graph.replay()
    torch.cuda.synchronize()
    assert path == ["training"] * 2
    for left, right in zip(actual, expected, strict=True):
        assert torch.equal(left, right)


SAVED = {
    "inner": {},
    "y": {"bias": False},
    "y, written to": {"bias": False, "consumer": F.relu_},
    "norm given": {"given": True},
    "autocast": {"factors": torch.float32},
    "autocast, y": {"factors": torch.float32, "bias": False},
    "x without gradient": {"frozen_x": True},
    "no leaves": {"leaves": False},
    "dropout": {"dropout_on": "adapter"},
    "dropout, autocast": {"dropout_on": "adapter", "factors": torch.float32},
    "low-rank dropout": {"dropout_on": "low_rank"},
    "low-rank dropout, y": {"dropout_on": "low_rank", "bias": False, "sizes": (33, 96, 40, 8)},
}
MODES = {"none": contextlib.nullcontext, "ops": Ops, "flops": functools.partial(FlopCounterMode, display=False)}


def seen_in_part(
    device,
    run,
    over_forward,
    over_backward,
    sizes="odd",
    bias=True,
    factors=None,
    given=False,
    frozen_x=False,
    leaves=True,
    dropout_on=None,
    consumer=lambda y: y,
):
    """The gradients of a layer that ``run`` calls, with modes over it."""
    torch.manual_seed(3)
    inputs = frozen(linear_inputs(sizes, dtype=torch.bfloat16, factor_dtype=factors, bias=bias, device=device))
    inputs.x.requires_grad_(not frozen_x)
    tensors = inputs.tensors() if leaves else inputs.map(lambda t: t.view_as(t)).tensors()
    options = {} if dropout_on is None else {"dropout_p": 0.4, "dropout_on": dropout_on}
    if given:
        options["weight_norm"] = functional.norm_factored(*tensors[1:4], S).detach()

    def layer(*tensors):
        return consumer(functional.dora_linear(*tensors, scaling=S, **options)).float().square().sum()

    with MODES[over_forward](), torch.autocast(device, dtype=torch.bfloat16, enabled=factors is not None):
        loss = run(layer, *tensors)
    with MODES[over_backward]():
        loss.backward()
    return gradients_of(inputs)


@pytest.mark.parametrize("case", SAVED)
@pytest.mark.parametrize("over", [("ops", "none"), ("none", "ops"), ("flops", "none"), ("none", "flops")], ids=str)
@pytest.mark.parametrize("early_stop", [True, False])
def test_a_checkpoint_with_a_mode_over_one_direction(case, over, early_stop, path, monkeypatch, device):
    """The recomputation keeps what the forward kept, although a mode looks on in one of them alone."""
    run = functools.partial(checkpoint, use_reentrant=False)
    with set_checkpoint_early_stop(early_stop):
        both(monkeypatch, path, lambda: seen_in_part(device, run, *over, **SAVED[case]), taken=["training"])


@pytest.mark.parametrize("case", SAVED)
@pytest.mark.parametrize("over", [("ops", "none"), ("none", "ops"), ("ops", "ops")], ids=str)
@pytest.mark.parametrize("keeping", [contextlib.nullcontext, torch.autograd.graph.save_on_cpu, kept_contiguous])
def test_a_mode_over_a_layer_in_part(case, over, keeping, path, monkeypatch, device):
    def run(layer, *tensors):
        with keeping():
            return layer(*tensors)

    taken = ["training"] if over[0] == "none" else []
    both(monkeypatch, path, lambda: seen_in_part(device, run, *over, **SAVED[case]), taken=taken)


@pytest.mark.parametrize(
    ("case", "saved"),
    [
        *itertools.product(("inner", "y", "autocast"), ("nothing", "dorac", "everything")),
        *itertools.product(("dropout", "low-rank dropout"), ("nothing", "dorac")),  # torch's writes to what it made
    ],
)
@pytest.mark.parametrize("over", [("none", "none"), ("ops", "none"), ("none", "ops")], ids=str)
def test_selective_checkpointing_sees_the_ops(case, saved, over, path, monkeypatch, device):
    seen = []

    def policy(context, op, *args, **kwargs):
        if op.namespace == "dorac":
            seen.append(op._schema.name.removeprefix("dorac::"))
        saves = saved == "everything" or op.namespace == saved
        return CheckpointPolicy.MUST_SAVE if saves else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    run = functools.partial(checkpoint, use_reentrant=False, context_fn=contexts)
    eager.forget_plans()  # making one is not seen
    both(monkeypatch, path, lambda: seen_in_part(device, run, *over, **SAVED[case]), taken=[])
    assert set(seen) == ({"row_norm", "delta_linear"} if case == "dropout" else FORWARD_OPS)
