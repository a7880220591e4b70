"""``dorac.nn.DoraLinear``: against dense float64 math, and against a stock PEFT layer where the two must agree."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

import dorac
from dorac import functional, reference
from dorac.nn import DoraLinear
from dorac.testing import Sums, assert_rms_beside, layer_budgets, merge_budget

IN, OUT, R = 24, 17, 3
HALF = (torch.bfloat16, torch.float16)
ADAPTER = ("lora_A", "lora_B", "lora_magnitude_vector")


def conv1d(bias=True, dtype=torch.float32):
    layer = pytest.importorskip("transformers.pytorch_utils").Conv1D(OUT, IN).to(dtype)
    nn.init.normal_(layer.weight, std=IN**-0.5)
    nn.init.normal_(layer.bias)
    if not bias:
        layer.bias.data.zero_()
    return layer


def linear(bias=True, dtype=torch.float32):
    return nn.Linear(IN, OUT, bias=bias, dtype=dtype)


BASES = pytest.mark.parametrize("base", [linear, conv1d])


def adapted(base_layer, r=R, lora_alpha=5, **options):
    """A layer away from its initial state: lora_B is not zero and the magnitude up to 20 % off the norm."""
    layer = DoraLinear(base_layer, r, lora_alpha, **options)
    with torch.no_grad():
        layer.lora_B.normal_(std=0.4)
        layer.lora_magnitude_vector.mul_(0.8 + 0.4 * torch.rand_like(layer.lora_magnitude_vector))
    return layer


def dense_arguments(layer, dtype=torch.float64):
    """What ``reference.dora_linear`` takes after x, in ``dtype``, or each in its own for None."""
    weight = layer.base_layer.weight.T if layer.fan_in_fan_out else layer.base_layer.weight
    bias = layer.base_layer.bias
    tensors = (weight, layer.lora_A, layer.lora_B, layer.lora_magnitude_vector, bias)
    return tuple(t if t is None else t.detach().to(dtype or t.dtype) for t in tensors)


def check_against_dense(layer, x, actual):
    tensors = (x, *dense_arguments(layer, None))
    sums = Sums.of_linear(*tensors[:3])
    budgets = layer_budgets(reference.dora_linear, reference.row_norm, tensors, sums, scaling=layer.scaling)
    assert actual.dtype == x.dtype
    budgets["y"].check(actual)


def weights_close(actual, expected, bound):
    """|actual - expected| <= bound, elementwise."""
    assert actual.shape == expected.shape
    assert ((actual.double() - expected.double()).abs() <= bound).all()


def unmerge_bound(layer):
    """``2 eps * max(|V|, |W|)``: what merging and unmerging may lose of each element of the weight of ``layer``."""
    weight, lora_A, lora_B, *_ = dense_arguments(layer)
    adapted_weight = reference.adapted_weight(weight, lora_A, lora_B, layer.scaling)
    bound = 2 * torch.finfo(layer.base_layer.weight.dtype).eps * torch.maximum(adapted_weight.abs(), weight.abs())
    return bound.T if layer.fan_in_fan_out else bound


# --- forward ---------------------------------------------------------------------------------------------------------


@BASES
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
def test_forward_is_the_dense_formula(base, bias, dtype):
    layer = adapted(base(bias, dtype))
    x = torch.randn(7, IN).to(dtype)
    check_against_dense(layer, x, layer(x))


@pytest.mark.parametrize("shape", [(IN,), (0, IN), (2, 3, 5, IN)])
def test_any_leading_shape(shape):
    layer, x = adapted(linear()), torch.randn(shape)
    assert layer(x).shape == (*shape[:-1], OUT)
    check_against_dense(layer, x.reshape(-1, IN), layer(x).reshape(-1, OUT))


@BASES
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
@pytest.mark.parametrize("init", [True, "gaussian", False])
def test_g_is_exactly_one_at_init(base, dtype, init):
    layer = DoraLinear(base(dtype=dtype), R, 5, init_lora_weights=init)
    norm = functional.norm_factored(layer._matrix(), layer.lora_A, layer.lora_B, layer.scaling)
    assert torch.equal(functional.magnitude_scale(layer.lora_magnitude_vector, norm), torch.ones_like(norm))
    assert layer.lora_A.count_nonzero()
    assert bool(layer.lora_B.count_nonzero()) == (init is False)


@BASES
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
def test_output_at_init_is_the_base_layers(base, dtype):
    layer, x = DoraLinear(base(dtype=dtype), R), torch.randn(7, IN).to(dtype)
    expected, bias = layer.base_layer(x), layer.base_layer.bias.abs().double()
    # x W^T and the sum with the bias are each rounded once here; the base layer may fuse the two, and where its product
    # starts from the bias it adds up IN + 1 terms in another order.
    bound = 2 * torch.finfo(dtype).eps * (expected.abs().double() + bias)
    accumulated = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    weight = layer.base_layer.weight.abs().double()
    size = x.abs().double() @ (weight if layer.fan_in_fan_out else weight.T) + bias
    weights_close(layer(x), expected, bound + (IN + 1) * accumulated * size)


@pytest.mark.parametrize(("r", "lora_alpha"), [(1, 1), (4, 16), (7, 2.5), (3, 0), (3, -2)])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_scaling(r, lora_alpha, use_rslora):
    layer = adapted(linear(dtype=torch.float64), r, lora_alpha, use_rslora=use_rslora)
    assert layer.scaling == lora_alpha / (r**0.5 if use_rslora else r)
    x = torch.randn(5, IN, dtype=torch.float64)
    check_against_dense(layer, x, layer(x))


def test_init_follows_peft():
    """Kaiming-uniform with a = sqrt(5) is uniform in 1/sqrt(in); "gaussian" has deviation 1/r."""
    base = nn.Linear(1000, 50)
    bound = 1000**-0.5
    lora_A = DoraLinear(base, 40).lora_A
    assert bound * 0.99 < lora_A.abs().max() <= bound
    lora_A = DoraLinear(base, 40, init_lora_weights="gaussian").lora_A
    # 40000 draws: the deviation is known to 1/sqrt(2 * 40000) = 0.35 %.
    assert abs(lora_A.std().item() * 40 - 1) < 0.02
    lora_B = DoraLinear(base, 40, init_lora_weights=False).lora_B
    assert 40**-0.5 * 0.99 < lora_B.abs().max() <= 40**-0.5


# --- dropout ---------------------------------------------------------------------------------------------------------


def stock_peft_layer(base_layer, layer, **config):
    """A PEFT DoRA layer over the same base layer with the same factors and magnitude."""
    peft = pytest.importorskip("peft")
    model = nn.Sequential(copy.deepcopy(base_layer).requires_grad_(True))
    config = peft.LoraConfig(r=layer.r, lora_alpha=layer.lora_alpha, target_modules=["0"], use_dora=True, **config)
    stock = peft.get_peft_model(model, config).base_model.model[0]
    with torch.no_grad():
        stock.lora_A.default.weight.copy_(layer.lora_A)
        stock.lora_B.default.weight.copy_(layer.lora_B)
        stock.lora_magnitude_vector.default.weight.copy_(layer.lora_magnitude_vector)
    return stock


@BASES
def test_dropout_is_pefts(base):
    base_layer = base()
    layer = adapted(base_layer, lora_dropout=0.4).train()
    stock = stock_peft_layer(base_layer, layer, lora_dropout=0.4, fan_in_fan_out=layer.fan_in_fan_out).train()
    x, dy = torch.randn(9, IN), torch.randn(9, OUT)

    def run(forward, x):
        torch.manual_seed(7)
        y = forward(x)
        y.backward(dy.to(y.dtype))
        return y

    def truth(x):
        weight, lora_A, lora_B, magnitude, bias = leaves
        dropped = (x * (F.dropout(torch.ones(9, IN), 0.4) > 0)) / 0.6
        norm = reference.row_norm(weight, lora_A, lora_B, layer.scaling).detach()
        g = reference.magnitude_scale(magnitude, norm)
        change = reference.compose_delta(dropped @ weight.T, dropped @ lora_A.T @ lora_B.T, g, layer.scaling)
        return x @ weight.T + bias + change

    leaves = [t.requires_grad_() for t in dense_arguments(layer)]
    exact = run(truth, x.double())
    without = reference.dora_linear(x.double(), *dense_arguments(layer), scaling=layer.scaling)
    assert (exact - without).abs().max() > 0.1  # the mask matters
    mine, theirs = run(layer, x), run(stock, x)
    assert_rms_beside(mine, theirs, exact)
    _, lora_A, lora_B, magnitude, _ = leaves
    pairs = (
        (layer.lora_A, stock.lora_A.default.weight, lora_A),
        (layer.lora_B, stock.lora_B.default.weight, lora_B),
        (layer.lora_magnitude_vector, stock.lora_magnitude_vector.default.weight, magnitude),
    )
    for mine, theirs, exact in pairs:
        assert_rms_beside(mine.grad, theirs.grad, exact.grad)


def test_dropout_only_while_training():
    layer, x = adapted(linear(), lora_dropout=0.5), torch.randn(4, IN)
    check_against_dense(layer, x, layer.eval()(x))
    assert not torch.equal(layer.train()(x), layer(x))
    layer.merge()
    assert torch.equal(layer(x), layer.base_layer(x))


# --- dtypes and casts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
def test_adapter_dtype(dtype):
    layer = adapted(linear(dtype=dtype))
    expected = torch.promote_types(dtype, torch.float32)
    assert {getattr(layer, name).dtype for name in ADAPTER} == {expected}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
def test_adapter_dtype_is_pefts(dtype):
    layer = adapted(linear(dtype=dtype))
    expected = torch.promote_types(dtype, torch.float32)
    stock = stock_peft_layer(linear(dtype=dtype), layer)
    assert stock.lora_A.default.weight.dtype == expected
    assert stock.lora_magnitude_vector.default.weight.dtype == expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
@pytest.mark.parametrize("adapter_dtype", [torch.float64, torch.float32, *HALF])
def test_explicit_adapter_dtype(dtype, adapter_dtype):
    layer = adapted(linear(dtype=dtype), adapter_dtype=adapter_dtype)
    assert layer.lora_A.dtype == layer.lora_B.dtype == adapter_dtype
    double = torch.float64 in (dtype, adapter_dtype)
    assert layer.lora_magnitude_vector.dtype == (torch.float64 if double else torch.float32)
    x = torch.randn(5, IN).to(dtype)
    check_against_dense(layer, x, layer(x))


CASTS = {
    "to": lambda module: module.to(torch.bfloat16),
    "half": lambda module: module.half(),
    "bfloat16": lambda module: module.bfloat16(),
    "to_device_and_dtype": lambda module: module.to("cpu", torch.float16),
    "to_like": lambda module: module.to(torch.empty(0, dtype=torch.bfloat16)),
}


@pytest.mark.parametrize("cast", CASTS)
@pytest.mark.parametrize("whole_model", [False, True])
def test_a_cast_keeps_the_magnitude(cast, whole_model):
    layer = adapted(linear())
    layer(torch.randn(4, IN)).sum().backward()
    magnitude = layer.lora_magnitude_vector
    before, grad = magnitude.detach().clone(), magnitude.grad.clone()
    CASTS[cast](nn.Sequential(layer) if whole_model else layer)
    assert layer.lora_magnitude_vector is magnitude  # an optimizer still holds it
    assert magnitude.dtype == magnitude.grad.dtype == torch.float32
    assert torch.equal(magnitude, before)
    assert torch.equal(magnitude.grad, grad)
    assert layer.lora_A.dtype == layer.lora_A.grad.dtype == layer.base_layer.weight.dtype
    assert layer.lora_A.dtype in HALF
    x = torch.randn(4, IN).to(layer.lora_A.dtype)
    check_against_dense(layer, x, layer(x))


def test_double_and_back():
    layer = adapted(linear())
    before = layer.lora_magnitude_vector.detach().clone()
    layer.double()
    assert {p.dtype for p in layer.parameters()} == {torch.float64}
    assert torch.equal(layer.lora_magnitude_vector, before.double())
    x = torch.randn(5, IN, dtype=torch.float64)
    check_against_dense(layer, x, layer(x))
    assert torch.equal(layer.float().lora_magnitude_vector, before)


def test_a_cast_while_merged_keeps_the_norm():
    layer = adapted(linear())
    layer.merge()
    norm = layer.merged_norm.clone()
    layer.to(torch.bfloat16)
    assert layer.merged_norm.dtype == torch.float32
    assert torch.equal(layer.merged_norm, norm)
    assert layer.merged
    layer.unmerge()
    assert layer.base_layer.weight.dtype == torch.bfloat16


def test_training_goes_on_after_a_cast():
    layer = adapted(linear())
    optimizer = torch.optim.SGD([layer.lora_magnitude_vector], lr=0.1)
    layer.to(torch.bfloat16)
    before = layer.lora_magnitude_vector.detach().clone()
    layer(torch.randn(4, IN, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    torch.testing.assert_close(layer.lora_magnitude_vector.detach(), before - 0.1 * layer.lora_magnitude_vector.grad)


def test_meta():
    layer = adapted(linear(dtype=torch.bfloat16)).to("meta")
    assert {t.device.type for t in layer.state_dict().values()} == {"meta"}
    assert layer.lora_magnitude_vector.dtype == torch.float32
    y = layer(torch.empty(5, IN, dtype=torch.bfloat16, device="meta"))
    assert (y.shape, y.dtype) == ((5, OUT), torch.bfloat16)


@BASES
def test_built_on_meta_then_materialised(base):
    """The order in which a sharded model is built: meta, ``to_empty``, then every ``reset_parameters``."""
    layer = DoraLinear(base().to("meta"), R, init_lora_weights=False)
    layer.to_empty(device="cpu")
    parameters = dict(layer.named_parameters())
    nn.init.normal_(layer.base_layer.weight)
    layer.reset_parameters()
    norm = reference.row_norm(*dense_arguments(layer)[:3], layer.scaling)
    rounding = IN * torch.finfo(torch.float32).eps  # at most one per term of the sum
    torch.testing.assert_close(layer.lora_magnitude_vector.double(), norm, rtol=rounding, atol=0)
    assert all(p is parameters[name] for name, p in layer.named_parameters())
    assert layer.lora_magnitude_vector.requires_grad


# --- copies and state dicts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("merged", [False, True])
def test_copies(clone, merged):
    layer, x = adapted(linear(), lora_dropout=0.3).eval(), torch.randn(4, IN)
    weight, bound = layer.base_layer.weight.detach().clone(), unmerge_bound(layer)
    if merged:
        layer.merge()
    twin = clone(layer)
    assert twin.merged == merged
    assert torch.equal(twin(x), layer(x))
    with torch.no_grad():
        for p in layer.parameters():
            p.zero_()
    twin.unmerge()
    weights_close(twin.base_layer.weight, weight, bound)
    check_against_dense(twin, x, twin(x))
    assert [name for name, p in twin.named_parameters() if p.requires_grad] == list(ADAPTER)


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("bias", [True, False])
def test_state_dict_keys(merged, bias):
    layer = adapted(linear(bias))
    if merged:
        layer.merge()
    base = {"base_layer.weight", "base_layer.bias"} if bias else {"base_layer.weight"}
    assert set(layer.state_dict()) == {*base, *ADAPTER}


@BASES
def test_state_dict_round_trip(base):
    layer, other, x = adapted(base()), adapted(base()), torch.randn(4, IN)
    assert not torch.allclose(layer(x), other(x))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), other(x))


def test_a_merged_layer_refuses_a_state_dict():
    """The state says nothing about merging: loaded here, the adapter would be ignored from then on."""
    model = nn.Sequential(adapted(linear()))
    state = copy.deepcopy(model.state_dict())
    model[0].merge()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="0 is merged; unmerge it before loading"):
        model.load_state_dict(state)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


# --- gradients -------------------------------------------------------------------------------------------------------


def grads(layer, x, dy):
    layer.zero_grad()
    x = x.detach().requires_grad_()
    layer(x).backward(dy)
    return x.grad, {name: p.grad for name, p in layer.named_parameters()}


@BASES
@pytest.mark.parametrize("bias", [True, False])
def test_gradients_are_the_dense_ones(base, bias):
    """With the norm constant, also for a base layer whose weight and bias are trained."""
    layer = adapted(base(bias, torch.float64))
    layer.base_layer.requires_grad_(True)
    x, dy = torch.randn(6, IN, dtype=torch.float64), torch.randn(6, OUT, dtype=torch.float64)
    d_x, actual = grads(layer, x, dy)
    names = ("base_layer.weight", *ADAPTER, "base_layer.bias")
    leaves = [t if t is None else t.clone().requires_grad_() for t in dense_arguments(layer)]
    x.requires_grad_()
    reference.dora_linear(x, *leaves, scaling=layer.scaling).backward(dy)
    torch.testing.assert_close(d_x, x.grad)
    for name, leaf in zip(names, leaves, strict=True):
        if leaf is not None:
            transposed = layer.fan_in_fan_out and name == "base_layer.weight"
            torch.testing.assert_close(actual[name], leaf.grad.T if transposed else leaf.grad)


@pytest.mark.parametrize("trained", [(), *((name,) for name in ADAPTER), ("lora_A", "lora_magnitude_vector"), ADAPTER])
def test_which_gradients_exist(trained):
    layer = adapted(linear())
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == set(ADAPTER)
    for name in ADAPTER:
        getattr(layer, name).requires_grad_(name in trained)
    d_x, actual = grads(layer, torch.randn(3, IN), torch.randn(3, OUT))
    assert d_x.count_nonzero()
    assert {name for name, grad in actual.items() if grad is not None} == set(trained)
    assert all(actual[name].count_nonzero() for name in trained)


def test_train_and_eval_reach_the_base_layer():
    layer = adapted(linear(), lora_dropout=0.1)
    assert layer.train().base_layer.training
    assert not layer.eval().base_layer.training


def test_zero_rows():
    """g is 1 where the norm is 0: the output is the bias, gradients are finite, and the row can learn."""
    base = linear(dtype=torch.float64)
    base.weight.data[2] = 0
    layer = adapted(base)
    layer.lora_B.data[2] = 0
    layer.lora_magnitude_vector.data[2] = 0  # as at init
    x = torch.randn(6, IN, dtype=torch.float64)
    y = layer(x)
    check_against_dense(layer, x, y)
    assert torch.equal(y[:, 2], base.bias[2].expand(6))
    y.sum().backward()
    assert all(getattr(layer, name).grad.isfinite().all() for name in ADAPTER)
    torch.testing.assert_close(layer.lora_B.grad[2], layer.scaling * (x @ layer.lora_A.T).sum(0))
    layer.merge()
    assert not base.weight[2].count_nonzero()
    layer.unmerge()
    assert not base.weight[2].count_nonzero()


# --- merging ---------------------------------------------------------------------------------------------------------


@BASES
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
def test_merge_and_unmerge(base, dtype):
    layer, x = adapted(base(dtype=dtype)), torch.randn(5, IN).to(dtype)
    weight, bound = layer.base_layer.weight.detach().clone(), unmerge_bound(layer)
    tensors = dense_arguments(layer, None)[:4]
    budget = merge_budget(tensors, Sums.of_linear(x, *tensors[:2]), scaling=layer.scaling)
    before = layer(x)

    layer.merge()
    assert layer.merged
    stored = layer.base_layer.weight.detach().clone()
    assert torch.equal(layer(x), layer.base_layer(x))
    budget.check(stored.T if layer.fan_in_fan_out else stored)
    # The merged weight, base, lora and either result are rounded; float32 and float64 also round each of IN terms.
    scale = (x.double().abs() @ budget.truth.abs().T).max() + before.double().abs().max()
    weights_close(layer(x), before, (4 + (0 if dtype in HALF else IN)) * torch.finfo(dtype).eps * scale)

    layer.merge()
    assert torch.equal(layer.base_layer.weight, stored)  # a second merge does nothing
    layer.unmerge()
    assert not layer.merged
    weights_close(layer.base_layer.weight, weight, bound)
    unmerged = layer.base_layer.weight.detach().clone()
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, unmerged)
    assert not layer.base_layer.weight.requires_grad


def test_unmerge_refuses_lost_rows():
    layer = adapted(linear())
    layer.lora_magnitude_vector.data[4] = 0
    layer.merge()
    before = layer.base_layer.weight.detach().clone()
    with pytest.raises(ValueError, match="rows 4"):
        layer.unmerge()
    assert layer.merged
    assert torch.equal(layer.base_layer.weight, before)


def test_reset_parameters_is_refused_while_merged():
    layer = adapted(linear())
    layer.merge()
    with pytest.raises(ValueError, match="merged"):
        layer.reset_parameters()


def test_the_scaling_cannot_be_set_while_merged():
    layer = adapted(linear())
    before = layer.base_layer.weight.clone()
    layer.merge()
    with pytest.raises(ValueError, match="merged; unmerge it before setting its scaling"):
        layer.scaling = 9.0
    layer.unmerge()
    torch.testing.assert_close(layer.base_layer.weight, before)
    layer.scaling = 9.0
    assert layer.scaling == 9.0


@pytest.mark.parametrize("compute", ["parametrised", "pruned"])
def test_a_weight_that_became_computed_is_not_merged(compute):
    """It would be computed again, without the adapter."""
    layer = adapted(linear())
    if compute == "pruned":
        prune.l1_unstructured(layer.base_layer, "weight", amount=0.5)
    else:
        nn.utils.parametrize.register_parametrization(layer.base_layer, "weight", nn.Tanh())
    x = torch.randn(3, IN)
    before = layer(x)
    for merge in (layer.merge, lambda: dorac.merge(layer)):
        with pytest.raises(ValueError, match=r"weight is computed since it was wrapped \(parametrised or pruned\)"):
            merge()
    assert not layer.merged
    assert torch.equal(layer(x), before)


# --- what is refused -------------------------------------------------------------------------------------------------


class CalledLinear(nn.Linear):
    def __call__(self, x):
        return 2 * super().__call__(x)


class ScaledLinear(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def with_instance_forward():
    layer = linear()
    layer.forward = lambda x: F.linear(x, layer.weight)  # how accelerate hooks a layer
    return layer


def with_hook(register, hook=lambda *_: None):
    layer = linear()
    getattr(layer, register)(hook)
    return layer


def integer_linear():
    layer = linear()
    layer.weight = nn.Parameter(torch.zeros(OUT, IN, dtype=torch.int8), requires_grad=False)
    return layer


def pruned():
    return prune.l1_unstructured(linear(), "weight", amount=0.5)


def parametrised():
    return nn.utils.parametrizations.weight_norm(linear())


REFUSED_LAYERS = {
    "embedding": (lambda: nn.Embedding(4, 4), "Embedding is not supported"),
    "convolution": (lambda: nn.Conv2d(3, 4, 1), "Conv2d is not supported"),
    "bilinear": (lambda: nn.Bilinear(3, 4, 5), "Bilinear is not supported"),
    "adapted": (lambda: DoraLinear(linear()), "DoraLinear is not supported"),
    "own forward": (lambda: ScaledLinear(IN, OUT), "ScaledLinear has a forward of its own"),
    "instance forward": (with_instance_forward, "Linear has a forward of its own"),
    "own call": (lambda: CalledLinear(IN, OUT), "CalledLinear has a __call__ of its own"),
    "lazy": (lambda: nn.LazyLinear(OUT), "LazyLinear is lazy"),
    "integer": (integer_linear, "Linear has a weight of torch.int8, dequantise it"),
    "parametrised": (parametrised, "parametrised .*remove_parametrizations"),
    "pruned": (pruned, "is computed by a hook .*prune.remove"),
    "weight norm": (lambda: nn.utils.weight_norm(linear()), "is computed by a hook .*remove_weight_norm"),
    "forward hook": (lambda: with_hook("register_forward_hook"), "hooks"),
    "forward pre-hook": (lambda: with_hook("register_forward_pre_hook"), "hooks"),
    "backward hook": (lambda: with_hook("register_full_backward_hook"), "hooks"),
    "backward pre-hook": (lambda: with_hook("register_full_backward_pre_hook"), "hooks"),
}


@pytest.mark.parametrize("case", REFUSED_LAYERS)
def test_layers_that_cannot_be_wrapped(case):
    build, message = REFUSED_LAYERS[case]
    base_layer = build()
    flags = [p.requires_grad for p in base_layer.parameters()]
    with pytest.raises(TypeError, match=f"base_layer cannot be wrapped: .*{message}"):
        DoraLinear(base_layer, R)
    assert [p.requires_grad for p in base_layer.parameters()] == flags


def test_a_subclass_that_computes_the_same_is_wrapped():
    class Named(nn.Linear):
        pass

    layer, x = adapted(Named(IN, OUT)), torch.randn(3, IN)
    check_against_dense(layer, x, layer(x))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"r": 0}, ValueError, "r must be at least 1, got 0"),
        ({"r": -1}, ValueError, "r must be at least 1, got -1"),
        ({"r": 2.5}, TypeError, "r must be an integer, got 2.5"),
        ({"r": "8"}, TypeError, "r must be an integer, got '8'"),
        ({"use_rslora": "no"}, TypeError, "use_rslora must be a bool, got 'no'"),
        ({"r": True}, TypeError, "r must be an integer, got True"),
        ({"lora_alpha": float("nan")}, ValueError, "lora_alpha must be finite in float32, got nan"),
        ({"lora_alpha": float("inf")}, ValueError, "lora_alpha must be finite in float32, got inf"),
        ({"lora_alpha": "16"}, TypeError, "lora_alpha must be a number, got '16'"),
        ({"lora_dropout": 1.0}, ValueError, r"lora_dropout must be in \[0, 1\), got 1.0"),
        ({"lora_dropout": -0.1}, ValueError, r"lora_dropout must be in \[0, 1\), got -0.1"),
        ({"lora_dropout": float("nan")}, ValueError, r"lora_dropout must be in \[0, 1\), got nan"),
        ({"lora_dropout": None}, TypeError, "lora_dropout must be a number, got None"),
        ({"init_lora_weights": "pissa"}, ValueError, "init_lora_weights must be .* got 'pissa'"),
        ({"adapter_dtype": torch.int8}, TypeError, "adapter_dtype must be .* got torch.int8"),
        ({"adapter_dtype": "float32"}, TypeError, "adapter_dtype must be .* got 'float32'"),
        ({"adapter_dtype": torch.float8_e4m3fn}, TypeError, "adapter_dtype must be .* got torch.float8_e4m3fn"),
        ({"alpha": 16}, TypeError, r"DoraLinear\(\) got an unexpected keyword argument 'alpha'"),
        ({"fan_in_fan_out": True}, ValueError, r"fan_in_fan_out=True contradicts Linear, .* \[out, in\]"),
    ],
)
def test_arguments_out_of_range(options, error, message):
    base_layer = linear()
    with pytest.raises(error, match=message):
        DoraLinear(base_layer, **options)
    assert base_layer.weight.requires_grad


def test_fan_in_fan_out_is_read_off_the_layer():
    assert DoraLinear(conv1d(), R).fan_in_fan_out
    assert DoraLinear(conv1d(), R, fan_in_fan_out=True).fan_in_fan_out
    assert not DoraLinear(linear(), R, fan_in_fan_out=False).fan_in_fan_out
    with pytest.raises(ValueError, match=r"fan_in_fan_out=False contradicts Conv1D, .* \[in, out\]"):
        DoraLinear(conv1d(), R, fan_in_fan_out=False)


def test_what_a_layer_shows():
    layer = adapted(conv1d(), lora_dropout=0.25)
    expected = f"in_features={IN}, out_features={OUT}, r=3, scaling=1.66667, lora_dropout=0.25, merged=False"
    assert expected in repr(layer)
    assert layer.weight is layer.base_layer.weight
    assert layer.bias is layer.base_layer.bias
