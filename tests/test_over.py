"""``dora_over``: the layer over a product that somebody else computed. With the product of a plain linear layer it is
``dora_linear``, of one rounding more.

On the CPU the kernels run in Triton's interpreter.
"""

import contextlib
import dataclasses
import functools

import packed_weights
import pytest
import torch
import torch.nn.functional as F
from functionals import over
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from dorac import functional, reference
from dorac.kernels import configs, target
from dorac.ops import eager, eager_over, front
from dorac.testing import REGIMES, layer_budgets, linear_inputs

HALF = (torch.bfloat16, torch.float16)
S = 0.7


@pytest.fixture
def with_kernels(device, monkeypatch):
    """Has tensors on the CPU take the kernels, too."""
    pytest.importorskip("triton")
    if device == "cpu":
        if torch.cuda.is_available():
            pytest.skip("kernels are compiled where there is a GPU, and take no tensors of the CPU")
        monkeypatch.setattr(
            front, "has_kernels", lambda *tensors: all(t is None or t.dtype.itemsize < 8 for t in tensors)
        )


def check(inputs, has_bias=True, scaling=S, casts=1, frozen=False, **options):
    """y, and the gradients of all tensors through base and adapter; base is rounded once more.

    ``frozen``: weight and bias are, as an adapted layer has them.
    """
    leaves = inputs.leaves()
    if frozen:
        leaves.weight.requires_grad_(False)
        leaves.bias.requires_grad_(False)
    y = over(has_bias)(*leaves.tensors(), scaling=scaling)
    assert y.dtype == inputs.x.dtype
    dy = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(y)
    y.backward(dy)
    budgets = layer_budgets(
        reference.dora_linear,
        reference.row_norm,
        inputs.tensors(),
        inputs.sums(),
        scaling=scaling,
        dy=dy,
        casts=casts + has_bias,
        **options,
    )
    for name, budget in budgets.items():
        if frozen and name in ("weight", "bias"):
            assert getattr(leaves, name).grad is None
            continue
        actual = y if name == "y" else getattr(leaves, name).grad
        assert actual.dtype == (y if name == "y" else getattr(leaves, name)).dtype, name
        budget.check(actual, name)


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
@pytest.mark.parametrize("has_bias", [True, False])
def test_values_and_gradients(regime, dtype, has_bias, device):
    check(linear_inputs(regime, dtype=dtype, device=device), has_bias)


@pytest.mark.parametrize("regime", ["aligned", "odd", "rank_1", "rank_over_128", "one_token", "one_feature", "wide"])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("factors", ["same", "float32"])
@pytest.mark.parametrize("has_bias", [True, False])
def test_kernels(regime, dtype, factors, has_bias, with_kernels, device):
    inputs = linear_inputs(regime, dtype=dtype, factor_dtype=torch.float32 if factors == "float32" else None)
    check(inputs.map(lambda t: t.to(device)), has_bias)


@pytest.mark.parametrize("scaling", [0.0, -1.3])
def test_without_bias(scaling, device):
    check(linear_inputs("odd", dtype=torch.float32, bias=False, device=device), scaling=scaling)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("has_bias", [True, False])
def test_inference(dtype, has_bias, with_kernels, device):
    inputs = linear_inputs("odd", dtype=dtype, device=device)
    y = over(has_bias)(*inputs.tensors(), scaling=S)
    budgets = layer_budgets(
        reference.dora_linear, reference.row_norm, inputs.tensors(), inputs.sums(), scaling=S, casts=2
    )
    budgets["y"].check(y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_large_bias_takes_no_digits(dtype, with_kernels, device):
    """Of y its own rounding is left, where a sum that is rounded before the bias comes off would lose g's part of it.

    ``g = 1/2``: ``y = (base + b) / 2 + b / 2`` for a base that the sum with b has rounded already.
    """
    base, bias = torch.full((3, 16), 257.0, device=device).to(dtype), torch.full((16,), 256.0, device=device).to(dtype)
    adapter = torch.zeros(4, 8), torch.zeros(16, 4), torch.full((16,), 0.5)
    lora_A, lora_B, magnitude = (t.to(device) for t in adapter)
    x, norm = torch.ones(3, 8, device=device).to(dtype), torch.ones(16, device=device)
    tensors = base, x, lora_A.to(dtype), lora_B.to(dtype), magnitude, bias
    y = functional.dora_over(*tensors, weight_norm=norm, scaling=S, base_has_bias=True)
    assert torch.equal(y, (0.5 * base.double() + 0.5 * bias.double()).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
def test_at_the_start_it_is_the_base(dtype, with_kernels, device):
    inputs = linear_inputs("odd", dtype=dtype, device=device)
    base, norm = F.linear(inputs.x, inputs.weight, inputs.bias), reference.row_norm(*inputs.tensors()[1:4], 0).float()
    tensors = base, inputs.x, inputs.lora_A, torch.zeros_like(inputs.lora_B), norm, inputs.bias
    y = functional.dora_over(*tensors, weight_norm=norm, scaling=S, base_has_bias=True)
    assert torch.equal(y, base)


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_an_infinite_bias_stays_in_its_column(value, has_bias, with_kernels, device):
    inputs = linear_inputs("odd", dtype=torch.bfloat16, device=device)
    expected = over(has_bias)(*inputs.tensors(), scaling=S)
    inputs.bias[3] = value
    y = over(has_bias)(*inputs.tensors(), scaling=S)
    assert torch.equal(y[:, 4:], expected[:, 4:])
    assert torch.equal(y[:, 3].isnan(), torch.full_like(y[:, 3], value != value, dtype=torch.bool))
    assert not y[:, 3].isfinite().any()


@pytest.mark.parametrize("factors", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_bias", [True, False])
def test_autocast(factors, has_bias, with_kernels, device):
    """PEFT's default: a half-precision base product, float32 factors and activations, which are cast."""
    inputs = linear_inputs("odd", dtype=torch.float32, factor_dtype=factors, device=device).leaves()
    half = [t.detach().bfloat16() for t in (inputs.x, inputs.weight, inputs.bias)]
    base = F.linear(half[0], half[1], half[2] if has_bias else None)
    norm = functional.norm_factored(inputs.weight, inputs.lora_A, inputs.lora_B, S)
    adapter = inputs.lora_A, inputs.lora_B, inputs.magnitude, inputs.bias
    with torch.autocast(device, torch.bfloat16):
        y = functional.dora_over(base, inputs.x, *adapter, weight_norm=norm, scaling=S, base_has_bias=has_bias)
    assert y.dtype is torch.bfloat16
    y.sum().backward()
    for tensor in (inputs.x, *adapter):
        assert tensor.grad.dtype is tensor.dtype
    cast = [t.detach().double() for t in (inputs.x.bfloat16(), inputs.lora_A.bfloat16(), inputs.lora_B.bfloat16())]
    h, g = cast[0] @ cast[1].T, inputs.magnitude.detach().double() / norm.double()
    truth = (base.double() + S * cast[0] @ cast[1].T @ cast[2].T - has_bias * inputs.bias.detach().double()) * g
    truth = truth + inputs.bias.detach().double()
    # h is rounded, and y; the rest is float32.
    bound = 2**-8 * (truth.abs() + S * g * (h.abs() @ cast[2].abs().T)) * (1 + 2**-6)
    assert ((y.double() - truth).abs() <= bound).all()


@pytest.mark.parametrize("names", [("base",), ("x",), ("lora_A",), ("lora_B", "magnitude"), ("bias",), ("magnitude",)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_some_are_frozen(names, dtype, with_kernels, device):
    inputs = linear_inputs("odd", dtype=dtype, device=device)
    norm = functional.norm_factored(*inputs.tensors()[1:4], S)
    given = {"base": F.linear(inputs.x, inputs.weight, inputs.bias), "x": inputs.x, "lora_A": inputs.lora_A}
    given |= {"lora_B": inputs.lora_B, "magnitude": inputs.magnitude, "bias": inputs.bias}

    def gradients(trained):
        tensors = {name: t.detach().clone().requires_grad_(name in trained) for name, t in given.items()}
        y = functional.dora_over(*tensors.values(), weight_norm=norm, scaling=S, base_has_bias=True)
        y.backward(torch.ones_like(y))
        return {name: tensors[name].grad for name in given}

    some, everything = gradients(names), gradients(given)
    for name in given:
        if name in names:
            torch.testing.assert_close(some[name], everything[name])
        else:
            assert some[name] is None


@pytest.mark.parametrize("has_bias", [True, False])
def test_checkpointing(has_bias, device):
    """The saved tensors are handed out once."""
    inputs = linear_inputs("odd", dtype=torch.float32, device=device)

    def gradients(run):
        leaves = inputs.leaves()
        y = run(over(has_bias), *leaves.tensors())
        y.backward(torch.ones_like(y))
        return [t.grad for t in leaves.tensors()]

    def checkpointed(layer, *tensors):
        return checkpoint(lambda *ts: layer(*ts, scaling=S), *tensors, use_reentrant=False)

    plain = gradients(lambda layer, *tensors: layer(*tensors, scaling=S))
    torch.testing.assert_close(gradients(checkpointed), plain, rtol=0, atol=0)


@pytest.mark.parametrize("leading", [(), (2,), (2, 3), (2, 3, 4)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_leading_shapes_and_strides(leading, dtype, with_kernels, device):
    inputs = linear_inputs("aligned", dtype=dtype, device=device)
    norm = functional.norm_factored(*inputs.tensors()[1:4], S)
    base = F.linear(inputs.x, inputs.weight)
    adapter = inputs.tensors()[2:]
    y = functional.dora_over(base, inputs.x, *adapter, weight_norm=norm, scaling=S)
    count = torch.Size(leading).numel()
    x, rows = inputs.x[:count].reshape(*leading, -1), base[:count].reshape(*leading, -1)
    before = rows.clone()
    actual = functional.dora_over(rows, x, *adapter, weight_norm=norm, scaling=S)
    near = {"rtol": 2**-7, "atol": 2**-7} if dtype is torch.bfloat16 else {}  # h is another product's, rounded
    torch.testing.assert_close(actual, y[:count].reshape(*leading, -1), **near)
    assert torch.equal(rows, before)
    if leading:
        strided = rows.mT.contiguous().mT if len(leading) == 1 else rows.transpose(0, 1).contiguous().transpose(0, 1)
        again = functional.dora_over(strided, x, *adapter, weight_norm=norm, scaling=S)
        torch.testing.assert_close(again, actual, **near)


@pytest.fixture
def path(with_kernels, monkeypatch):
    """What took the eager path since, "training" or "inference"."""
    taken = []
    for name in ("_forward", "_forward_in_ops"):
        forward = getattr(eager_over, name)

        def spy(*arguments, forward=forward):
            taken.append("training" if arguments[-1] else "inference")
            return forward(*arguments)

        monkeypatch.setattr(eager_over, name, spy)
    return taken


def prepared(dtype=torch.bfloat16, factors=None, device="cpu", regime="odd", bias=True):
    """``dora_over``'s tensors and norm, the adapter, x and base trained."""
    inputs = linear_inputs(regime, dtype=dtype, factor_dtype=factors, bias=bias, device=device)
    norm = functional.norm_factored(*inputs.tensors()[1:4], S)
    tensors = F.linear(inputs.x, inputs.weight, inputs.bias), inputs.x, *inputs.tensors()[2:]
    leaves = [t if t is None else t.detach().clone().requires_grad_() for t in tensors]
    if bias:
        leaves[-1].requires_grad_(False)
    return leaves, norm


def call(tensors, norm, **options):
    return functional.dora_over(*tensors, weight_norm=norm, scaling=S, **{"base_has_bias": True} | options)


def both(monkeypatch, path, run):
    """What a run gives on the path and beside it is the same, to a few roundings of the largest element."""
    results = [run()]
    assert path
    monkeypatch.setattr(eager_over, "dora_over", lambda *arguments: None)
    results.append(run())
    for actual, expected in zip(*results, strict=True):
        assert actual.dtype is expected.dtype
        unit = torch.finfo(torch.bfloat16).eps
        torch.testing.assert_close(
            actual.double(), expected.double(), rtol=4 * unit, atol=4 * unit * expected.abs().max().item()
        )


@pytest.mark.parametrize("regime", ["aligned", "odd", "rank_1", "rank_over_128", "one_token", "one_feature", "wide"])
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("has_bias", [True, False])
def test_values_and_gradients_on_the_path(regime, dtype, has_bias, path, device):
    check(linear_inputs(regime, dtype=dtype, device=device), has_bias, frozen=True)
    assert path == ["training"]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("factors", [torch.bfloat16, torch.float32])
def test_the_path_is_taken(bias, factors, path, device, monkeypatch):
    tensors, norm = prepared(factors=factors, bias=bias, device=device)

    def run():
        with torch.autocast(device, torch.bfloat16, enabled=factors is torch.float32):
            y = call(tensors, norm)
        return [
            y,
            *torch.autograd.grad(y.float().square().sum(), [t for t in tensors if t is not None and t.requires_grad]),
        ]

    both(monkeypatch, path, run)
    assert path == ["training"]
    with torch.no_grad():
        assert torch.equal(call([t if t is None else t.detach() for t in tensors], norm), call(tensors, norm))


def test_a_narrow_x_gets_its_own_dtype(path, device):
    """Under autocast x may be wider than its product."""
    tensors, norm = prepared(factors=torch.float32, device=device)
    tensors[1] = tensors[1].detach().float().requires_grad_()
    with torch.autocast(device, torch.bfloat16):
        call(tensors, norm).sum().backward()
    assert path == ["training"]
    assert tensors[1].grad.dtype is torch.float32


@pytest.mark.parametrize("case", ["factors", "frozen", "bias", "strided", "misaligned", "norm", "rank", "float32"])
def test_what_the_path_does_not_take(case, path, device):
    tensors, norm = prepared(
        factors=torch.float32 if case == "factors" else None,
        dtype=torch.float32 if case == "float32" else torch.bfloat16,
        regime=(5, 600, 600, 400) if case == "rank" else "odd",
        device=device,
    )
    if case == "frozen":
        tensors[2].requires_grad_(False)
    elif case == "bias":
        tensors[-1].requires_grad_()
    elif case == "strided":
        tensors[0] = tensors[0].detach().T.contiguous().T.requires_grad_()
    elif case == "misaligned":
        tensors[0] = torch.empty(tensors[0].numel() + 1, dtype=torch.bfloat16, device=device)[1:].view_as(tensors[0])
        tensors[0].normal_()
    elif case == "norm":
        norm = norm.clone().requires_grad_()
    y = call(tensors, norm)
    y.sum().backward()
    assert not path
    assert y.isfinite().all()


def test_second_derivatives_of_the_path(path, device, monkeypatch):
    tensors, norm = prepared(device=device)
    trained = [t for t in tensors if t.requires_grad]

    def run():
        y = call(tensors, norm).float().square().sum()
        first = torch.autograd.grad(y, trained, create_graph=True)
        return torch.autograd.grad(sum(g.float().square().sum() for g in first), trained)

    both(monkeypatch, path, run)


class Ops(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.add(str(function))
        return function(*args, **kwargs or {})


def test_modes_see_the_ops(path, device, monkeypatch):
    tensors, norm = prepared(device=device)
    trained = [t for t in tensors if t.requires_grad]
    with Ops() as forward:
        y = call(tensors, norm)
    with Ops() as backward:
        torch.autograd.grad(y.float().sum(), trained)
    assert "dorac.up_compose_forward.default" in forward.seen
    assert "dorac.lora_b_backward.default" in backward.seen
    with Ops() as inference, torch.no_grad():
        call(tensors, norm)
    assert "dorac.up_compose.default" in inference.seen


@pytest.mark.parametrize("over", ["forward", "backward", "neither"])
def test_a_checkpoint_with_a_mode_over_one_direction(over, path, device, monkeypatch):
    def run():
        tensors, norm = prepared(device=device)
        trained = [t for t in tensors if t.requires_grad]
        with Ops() if over == "forward" else contextlib.nullcontext():
            y = checkpoint(lambda *t: call(t, norm), *tensors, use_reentrant=False).float().square().sum()
        with Ops() if over == "backward" else contextlib.nullcontext():
            y.backward()
        return [t.grad for t in trained]

    both(monkeypatch, path, run)


KEPT = ("dense", "bnb_nf4", "bnb_nf4_nested", "bnb_int8", "int8_group", "torchao_int4", "nvfp4")


def kept_layer(name, device, shape=(33, 128), tokens=9, rank=5):
    """Over a weight that is known: ``dora_over``'s tensors, without a bias, the norm, and the weight."""
    value, dense = packed_weights.FORMATS["bnb_nf4" if name == "dense" else name](shape)
    dense = dense.to(device, torch.bfloat16)
    weight = dense if name == "dense" else packed_weights.on(value, device)
    generator = torch.Generator().manual_seed(2)
    lora_A, lora_B = packed_weights.factors(shape, rank, torch.bfloat16, device)
    x = torch.randn(tokens, shape[1], generator=generator).to(device, torch.bfloat16)
    norm = functional.norm_factored(weight, lora_A, lora_B, S)
    magnitude = norm * (0.8 + 0.4 * torch.rand(shape[0], generator=generator).to(device))
    tensors = F.linear(x, dense), x, lora_A, lora_B, magnitude
    return [t.detach().requires_grad_() for t in tensors], norm, weight


@pytest.mark.parametrize("consumer", ["keeps y", "writes to y", "gives y back"])
@pytest.mark.parametrize("magnitudes", ["near the norm", "zero", "tiny"])
@pytest.mark.parametrize("name", KEPT)
def test_y_kept_in_place_of_inner(name, magnitudes, consumer, path, device):
    if device == "cuda" and name == "nvfp4" and configs.why_no_packed(target.of_device(torch.device("cuda:0")), True):
        pytest.skip("no kernel reads float8 on this card")
    tensors, norm, weight = kept_layer(name, device)
    with torch.no_grad():
        if magnitudes == "zero":
            tensors[4][[0, 7, 32]] = 0
        elif magnitudes == "tiny":
            tensors[4][[0, 7, 32]] *= 1e-4

    def gradients(save_output):
        y = functional.dora_over(
            *tensors, weight_norm=norm, scaling=S, save_output=save_output, weight=weight if save_output else None
        )
        places = {t.untyped_storage().data_ptr() for t in y.grad_fn.saved_tensors if t is not None}
        assert (y.untyped_storage().data_ptr() in places) is save_output
        dy = torch.linspace(-1, 1, y.numel(), device=device).view(y.shape).to(y.dtype)
        if consumer == "writes to y":
            torch.relu_(y)
        elif consumer == "gives y back":
            return torch.autograd.grad(y, tensors, y.detach() if save_output else y.detach().clone())
        return torch.autograd.grad(y, tensors, dy)

    unit = torch.finfo(torch.bfloat16).eps
    for actual, expected in zip(gradients(True), gradients(False), strict=True):
        size = expected.double().abs().max().item()
        torch.testing.assert_close(actual.double(), expected.double(), rtol=4 * unit, atol=4 * unit * size)
    assert path == ["training"] * 2


def strips_of(rows, monkeypatch):
    """Has backward go over so many rows at once, whatever was planned before."""
    config = configs.lora_b_config(40, 35, 5, target.CARDS["sm_90"])
    monkeypatch.setattr(configs, "lora_b_config", lambda *sizes: dataclasses.replace(config, rows=rows))
    eager.forget_plans()


@pytest.mark.parametrize("name", ["bnb_nf4", pytest.param("bnb_int8", marks=pytest.mark.full)])
@pytest.mark.parametrize("strips", [1, 2])
def test_y_kept_over_packed_rows_of_all_kinds(strips, name, path, device, monkeypatch):
    """Usual and faint rows beside one another in every block, a zero row and a tiny one, whatever adds them up."""
    strips_of(64 // strips, monkeypatch)
    tensors, norm, weight = kept_layer(name, device, shape=(35, 128), tokens=40)
    with torch.no_grad():
        tensors[4][[0, 7, 31, 34]] = 0
        tensors[4][[1, 20]] *= 1e-4
        norm[[3, 7]] = 0
    dy = torch.linspace(-1, 1, 40 * 35, device=device).view(40, 35).to(torch.bfloat16)

    def gradients(**kept):
        y = functional.dora_over(*tensors, weight_norm=norm, scaling=S, **kept)
        return torch.autograd.grad(y, tensors, dy)

    kept = {"save_output": True, "weight": weight}
    found, expected = gradients(**kept), gradients()
    assert all(map(torch.equal, found, gradients(**kept)))
    unit = torch.finfo(torch.bfloat16).eps
    for actual, exact in zip(found, expected, strict=True):
        size = exact.double().abs().max().item()
        torch.testing.assert_close(actual.double(), exact.double(), rtol=4 * unit, atol=4 * unit * size)
    assert not found[4][[3, 7]].any()
    assert found[4][[0, 31, 34, 1, 20]].all()
    assert path == ["training"] * 3


def test_launches_over_a_packed_weight(path, device, monkeypatch):
    """One casts both factors; one adds up backward's strips and sees to rows of a faint g."""
    from dorac.kernels import launch

    strips_of(32, monkeypatch)
    (base, x, *factors, magnitude), norm, weight = kept_layer("bnb_nf4", device, shape=(35, 128), tokens=40)
    factors = [t.detach().float().requires_grad_() for t in factors]
    launched, call = [], launch.Launch.__call__

    def spy(self, *arguments):
        launched.append(self.kernel.__name__)
        return call(self, *arguments)

    monkeypatch.setattr(launch.Launch, "__call__", spy)
    with torch.autocast(device, dtype=torch.bfloat16):
        y = functional.dora_over(
            base, x, *factors, magnitude, weight_norm=norm, scaling=S, save_output=True, weight=weight
        )
    assert launched == ["cast_kernel", "compose_kernel"]
    y.sum().backward()
    assert launched[2:] == ["lora_b_backward_kernel", "finish_kernel"]
    assert path == ["training"]


def test_y_kept_under_a_checkpoint_and_a_mode(path, device):
    tensors, norm, weight = kept_layer("bnb_nf4", device)

    def layer(*tensors):
        return functional.dora_over(*tensors, weight_norm=norm, scaling=S, save_output=True, weight=weight)

    expected = torch.autograd.grad(layer(*tensors).float().square().sum(), tensors)
    for observed in ("forward", "backward"):
        with Ops() if observed == "forward" else contextlib.nullcontext():
            loss = checkpoint(layer, *tensors, use_reentrant=False).float().square().sum()
        with Ops() if observed == "backward" else contextlib.nullcontext():
            gradients = torch.autograd.grad(loss, tensors)
        for actual, exact in zip(gradients, expected, strict=True):
            size = exact.double().abs().max().item()
            torch.testing.assert_close(actual.double(), exact.double(), rtol=0.03, atol=0.03 * size)


@pytest.mark.parametrize("case", ["shape", "pieces"])
def test_a_weight_that_is_not_bases_is_refused(case, path, device):
    """On the path, which would read beyond it; also after a call with one that fits."""
    tensors, norm, weight = kept_layer("bnb_nf4", device)
    layer = functools.partial(functional.dora_over, *tensors, weight_norm=norm, scaling=S, save_output=True)
    layer(weight=weight)
    if case == "shape":
        other, message = packed_weights.on(packed_weights.FORMATS["bnb_nf4"]((32, 128))[0], device), "weight must be"
    else:
        other, message = weight._replace(absmax=weight.absmax[:-1]), "absmax must have the shape"
    with pytest.raises(ValueError, match=message):
        layer(weight=other)


def test_y_kept_gives_no_second_derivative(path, device):
    tensors, norm, weight = kept_layer("bnb_nf4", device)
    y = functional.dora_over(*tensors, weight_norm=norm, scaling=S, save_output=True, weight=weight)
    with pytest.raises(RuntimeError, match="saves no base, which a second derivative needs"):
        torch.autograd.grad(y.sum(), tensors, create_graph=True)


def test_a_flag_that_is_none_is_refused_after_one_that_is(path, device):
    """Although it equals that, in whatever is kept of the first call."""
    tensors, norm = prepared(device=device)
    call(tensors, norm, base_has_bias=True)
    with pytest.raises(TypeError, match="base_has_bias must be a bool, got int"):
        call(tensors, norm, base_has_bias=1)


def test_a_write_to_what_is_kept_is_an_error(path, device):
    for index in (1, 2, 4):
        tensors, norm = prepared(device=device)
        y = call(tensors, norm)
        with torch.no_grad():
            tensors[index].add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
        with torch.no_grad():
            tensors[0].add_(1)  # base is not kept


@pytest.mark.parametrize("written", ["absmax", "norm"])
def test_a_write_to_what_is_held_is_an_error(written, path, device):
    tensors, norm, weight = kept_layer("bnb_nf4", device)
    y = functional.dora_over(*tensors, weight_norm=norm, scaling=S, save_output=True, weight=weight)
    (norm if written == "norm" else weight.absmax).mul_(2)
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation: the (norm|bitsandbytes 4-bit weight)"):
        y.sum().backward()


def test_derivatives():
    inputs = linear_inputs((3, 4, 5, 2))
    norm = reference.row_norm(*inputs.tensors()[1:4], S)
    base = F.linear(inputs.x, inputs.weight, inputs.bias)
    leaves = [t.detach().clone().requires_grad_() for t in (base, inputs.x, *inputs.tensors()[2:])]
    for has_bias in (True, False):

        def layer(*tensors, has_bias=has_bias):
            return functional.dora_over(*tensors, weight_norm=norm, scaling=S, base_has_bias=has_bias)

        assert torch.autograd.gradcheck(layer, leaves, check_forward_ad=True, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(layer, leaves, check_fwd_over_rev=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["rows", "strided"])
@pytest.mark.parametrize("op", ["dora_over", "up_compose", "up_compose_forward"])
def test_opcheck(op, dtype, layout, device):
    inputs = linear_inputs("odd", dtype=dtype, device=device)
    norm = functional.norm_factored(*inputs.tensors()[1:4], S)
    base, scaling = F.linear(inputs.x, inputs.weight, inputs.bias), torch.tensor(S, device=device)
    if layout == "strided":
        base = base.T.contiguous().T
    arguments = (inputs.lora_B, inputs.magnitude, norm, scaling, inputs.bias)
    if op == "dora_over":
        leaves = [t.clone().requires_grad_() for t in (base, inputs.x, inputs.lora_A, *arguments[:2])]
        opcheck(torch.ops.dorac.dora_over.default, (*leaves, *arguments[2:], S, True))
    else:
        h = inputs.x @ inputs.lora_A.t()
        opcheck(getattr(torch.ops.dorac, op).default, (base, h, *arguments, False, True))


def test_flops(device):
    """The three small products of each direction, and none with the weight."""
    inputs = linear_inputs("odd", dtype=torch.float32, device=device).leaves()
    norm = functional.norm_factored(*inputs.tensors()[1:4], S)
    base = F.linear(inputs.x, inputs.weight).detach()
    with FlopCounterMode(display=False) as counter:
        functional.dora_over(
            base, *inputs.tensors()[:1], *inputs.tensors()[2:], weight_norm=norm, scaling=S
        ).sum().backward()
    (tokens, in_features), (out_features, rank) = inputs.x.shape, inputs.lora_B.shape
    assert counter.get_total_flops() == 2 * 3 * tokens * rank * (in_features + out_features)


CASES = {
    "base_scalar": ({"base": torch.ones(())}, ValueError, "base must have a dimension of features, got a scalar"),
    "base_integer": ({"base": torch.ones(4, 5).int()}, TypeError, "base must be float64, float32"),
    "leading": (
        {"x": torch.ones(3, 6)},
        ValueError,
        r"share all but their last dimension, got .*\[4, 5\] and \[3, 6\]",
    ),
    "in": ({"x": torch.ones(4, 7)}, ValueError, r"lora_A must be \[r, in\] with in = 7 for this x, got shape \[3, 6\]"),
    "rank_0": ({"lora_A": torch.ones(0, 6)}, ValueError, r"lora_A must be \[r, in\]"),
    "B": ({"lora_B": torch.ones(5, 2)}, ValueError, r"lora_B must be \[out, r\] = \[5, 3\] .* got shape \[5, 2\]"),
    "B_dtype": ({"lora_B": torch.ones(5, 3).half()}, TypeError, "lora_A and lora_B must share a dtype"),
    "device": ({"lora_A": torch.ones(3, 6, device="meta")}, ValueError, "lora_A must be on cpu like base, got meta"),
    "magnitude": ({"magnitude": torch.ones(4)}, ValueError, r"magnitude must be \[out\] = \[5\], got shape \[4\]"),
    "norm": ({"weight_norm": torch.ones(4)}, ValueError, r"weight_norm must be \[out\] = \[5\], got shape \[4\]"),
    "no_norm": ({"weight_norm": None}, TypeError, "weight_norm must be a tensor, got NoneType"),
    "bias": ({"bias": torch.ones(4)}, ValueError, r"bias must be \[out\] = \[5\], got shape \[4\]"),
    "scaling": ({"scaling": float("nan")}, ValueError, "scaling must be finite in float32, got nan"),
    "no_weight": ({"save_output": True}, ValueError, "save_output needs the frozen layer's weight, .* got None"),
    "weight": (
        {"save_output": True, "weight": torch.ones(5, 7)},
        ValueError,
        r"weight must be \[out, in\] = \[5, 6\] for this base and x, got shape \[5, 7\]",
    ),
    "weight_kind": (
        {"save_output": True, "weight": "nf4"},
        TypeError,
        "weight must be a tensor or a packed weight, got str",
    ),
    "flag": ({"base_has_bias": 1}, TypeError, "base_has_bias must be a bool, got int"),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("compiled", [False, True])
def test_bad_input(case, compiled):
    changes, error, message = CASES[case]
    inputs = linear_inputs((4, 5, 6, 3), dtype=torch.float32)
    arguments = {"base": torch.ones(4, 5), "x": inputs.x, "lora_A": inputs.lora_A, "lora_B": inputs.lora_B}
    arguments |= {"magnitude": inputs.magnitude, "bias": inputs.bias, "weight_norm": torch.ones(5), "scaling": S}
    function = torch.compile(functional.dora_over, backend="eager") if compiled else functional.dora_over
    with pytest.raises(error, match=message):
        function(**arguments | changes)
