"""``dorac.nn.DoraConv1d``, ``2d``, ``3d``: against the dense textbook, and against stock PEFT where the two agree."""

import copy
import dataclasses
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dorac import functional, reference
from dorac.nn import DoraConv1d, DoraConv2d, DoraConv3d
from dorac.testing import CONVOLUTIONS, assert_rms_beside, layer_budgets, merge_budget

HALF = (torch.bfloat16, torch.float16)
DTYPES = [torch.float64, torch.float32, *HALF]
ADAPTER = ("lora_A", "lora_B", "lora_magnitude_vector")
CLASSES = {1: DoraConv1d, 2: DoraConv2d, 3: DoraConv3d}
ALL = pytest.mark.parametrize("case", CONVOLUTIONS)
SOME = pytest.mark.parametrize("case", ["1d_strided", "2d_grouped", "2d_grouped_peft", "3d_depthwise"])
MERGEABLE = pytest.mark.parametrize("case", ["1d", "2d", "2d_grouped", "2d_depthwise", "3d_strided"])


def base_layer(case, dtype=torch.float32, bias=True):
    convolution = CONVOLUTIONS[case]
    stock = getattr(nn, f"Conv{convolution.dimensions}d")
    options = {"bias": bias, "dtype": dtype, **convolution.geometry}
    return stock(convolution.x[1], convolution.out, convolution.kernel, **options)


def adapted(case, dtype=torch.float32, bias=True, **options):
    """A layer away from its initial state: lora_B is not zero and the magnitude up to 20 % off the norm."""
    convolution = CONVOLUTIONS[case]
    options = {"grouped_lora_A": convolution.grouped_lora_A, "lora_alpha": 5, **options}
    layer = CLASSES[convolution.dimensions](base_layer(case, dtype, bias), convolution.rank, **options)
    with torch.no_grad():
        layer.lora_B.normal_(std=0.4)
        layer.lora_magnitude_vector.mul_(0.8 + 0.4 * torch.rand_like(layer.lora_magnitude_vector))
    return layer


def draw_x(case, dtype=torch.float32):
    return torch.randn(CONVOLUTIONS[case].x, dtype=torch.float64).to(dtype)


def dense_arguments(layer, dtype=torch.float64):
    """What ``reference.dora_conv`` takes after x, in ``dtype``, or each in its own for None."""
    base = layer.base_layer
    tensors = (base.weight, layer.lora_A, layer.lora_B, layer.lora_magnitude_vector.flatten(), base.bias)
    return tuple(t if t is None else t.detach().to(dtype or t.dtype) for t in tensors)


def check_against_dense(case, layer, x, actual):
    convolution, tensors = CONVOLUTIONS[case], (x, *dense_arguments(layer, None))
    options = {"scaling": layer.scaling, **convolution.geometry}
    budgets = layer_budgets(reference.dora_conv, norm_of_filters(case), tensors, convolution.sums(), **options)
    assert actual.dtype == x.dtype
    budgets["y"].check(actual)


def norm_of_filters(case):
    return lambda *args: reference.filter_norm(*args, CONVOLUTIONS[case].groups)


def adapted_weights(layer, dtype=torch.float64):
    """V and ``g * V`` in the weight's own, grouped shape: the diagonal blocks of the dense filters."""
    weight, lora_A, lora_B, magnitude, _ = dense_arguments(layer, dtype)
    groups = layer.base_layer.groups
    filters = reference.adapted_filters(weight, lora_A, lora_B, layer.scaling, groups)
    g = reference.magnitude_scale(magnitude, torch.linalg.vector_norm(filters.flatten(1), dim=1))
    blocks = filters.unflatten(1, (groups, -1)).unflatten(0, (groups, -1))
    v = torch.cat([blocks[j, :, j] for j in range(groups)])
    return v, g.view(-1, *[1] * (v.ndim - 1)) * v


def norm_of(layer):
    args = (layer.base_layer.weight, layer.lora_A, layer.lora_B)
    return functional.norm_factored_conv(*args, layer.scaling, groups=layer.base_layer.groups)


# --- forward ---------------------------------------------------------------------------------------------------------


@ALL
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_is_the_dense_formula(case, dtype):
    layer, x = adapted(case, dtype), draw_x(case, dtype)
    check_against_dense(case, layer, x, layer(x))


@SOME
@pytest.mark.parametrize("dtype", DTYPES)
def test_without_bias_and_without_batch(case, dtype):
    layer, x = adapted(case, dtype, bias=False), draw_x(case, dtype)
    check_against_dense(case, layer, x[:1], layer(x[0])[None])


@SOME
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("init", [True, "gaussian", False])
def test_g_is_exactly_one_at_init(case, dtype, init):
    convolution = CONVOLUTIONS[case]
    cls = CLASSES[convolution.dimensions]
    base = base_layer(case, dtype)
    layer = cls(base, convolution.rank, init_lora_weights=init, grouped_lora_A=convolution.grouped_lora_A)
    g = functional.magnitude_scale(layer.lora_magnitude_vector.flatten(), norm_of(layer))
    assert torch.equal(g, torch.ones_like(g))
    assert layer.lora_A.count_nonzero()
    assert bool(layer.lora_B.count_nonzero()) == (init is False)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last, torch.channels_last_3d])
def test_memory_formats(memory_format):
    """``module.to(memory_format=)`` reaches weight and factors; the result has the format of the base layer's."""
    case = "3d_strided" if memory_format is torch.channels_last_3d else "2d_strided"
    layer = adapted(case).to(memory_format=memory_format)
    x = draw_x(case).contiguous(memory_format=memory_format)
    assert layer.base_layer.weight.is_contiguous(memory_format=memory_format)
    assert layer.lora_A.is_contiguous(memory_format=memory_format)
    y = layer(x)
    assert y.is_contiguous(memory_format=memory_format)
    assert y.stride() == layer.base_layer(x).stride()
    check_against_dense(case, layer, x, y)
    y.sum().backward()
    assert layer.lora_A.grad.is_contiguous(memory_format=memory_format)


def test_gradients_are_the_dense_ones():
    """Also for a base layer whose weight and bias are trained; the matrix of them all is in test_dora_conv."""
    case = "2d_grouped_peft"
    layer, x = adapted(case, torch.float64), draw_x(case, torch.float64).requires_grad_()
    layer.base_layer.requires_grad_(True)
    y = layer(x)
    dy = torch.randn_like(y)
    names = ("base_layer.weight", *ADAPTER, "base_layer.bias")
    actual = torch.autograd.grad(y, [x, *(layer.get_parameter(name) for name in names)], dy)
    leaves = [x, *(t.clone().requires_grad_() for t in dense_arguments(layer))]
    options = {"scaling": layer.scaling, **CONVOLUTIONS[case].geometry}
    expected = torch.autograd.grad(reference.dora_conv(*leaves, **options), leaves, dy)
    for mine, exact in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, exact.view_as(mine))


def test_which_parameters_are_trained():
    layer = adapted("2d")
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == set(ADAPTER)
    layer(draw_x("2d")).sum().backward()
    assert {name for name, p in layer.named_parameters() if p.grad is not None} == set(ADAPTER)


# --- against stock PEFT ----------------------------------------------------------------------------------------------


def stock_peft_layer(layer, case, **config):
    """A PEFT DoRA layer over the same base layer with the same factors and magnitude."""
    peft = pytest.importorskip("peft")
    model = nn.Sequential(copy.deepcopy(layer.base_layer).requires_grad_(True))
    config = peft.LoraConfig(r=layer.r, lora_alpha=layer.lora_alpha, target_modules=["0"], use_dora=True, **config)
    stock = peft.get_peft_model(model, config).base_model.model[0]
    with torch.no_grad():
        stock.lora_A.default.weight.copy_(layer.lora_A)
        stock.lora_B.default.weight.copy_(layer.lora_B)
        stock.lora_magnitude_vector.default.weight.copy_(layer.lora_magnitude_vector)
    return stock


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
@ALL
def test_shapes_and_dtypes_are_pefts(case):
    layer = adapted(case, torch.bfloat16, grouped_lora_A=False)
    stock = stock_peft_layer(layer, case)
    pairs = (
        (layer.lora_A, stock.lora_A.default.weight),
        (layer.lora_B, stock.lora_B.default.weight),
        (layer.lora_magnitude_vector, stock.lora_magnitude_vector.default.weight),
    )
    for mine, theirs in pairs:
        assert mine.shape == theirs.shape
        assert mine.dtype == theirs.dtype == torch.float32


def test_init_is_pefts():
    """lora_A uniform in 1/sqrt(in * k), as nn.Conv; "gaussian" has deviation 1/r."""
    base = nn.Conv2d(100, 50, 3)
    bound = 900**-0.5
    lora_A = DoraConv2d(base, 40).lora_A
    assert bound * 0.99 < lora_A.abs().max() <= bound
    # 36000 draws: the deviation is known to 1/sqrt(2 * 36000) = 0.4 %.
    assert abs(DoraConv2d(base, 40, init_lora_weights="gaussian").lora_A.std().item() * 40 - 1) < 0.02


@pytest.mark.parametrize("case", ["1d_strided", "2d_strided", "3d_strided"])
def test_dropout_is_pefts(case):
    layer = adapted(case, lora_dropout=0.4).train()
    stock = stock_peft_layer(layer, case, lora_dropout=0.4).train()
    x = draw_x(case)

    def run(forward, x):
        torch.manual_seed(7)
        return forward(x)

    def truth(x):
        dropped = (x * (F.dropout(torch.ones(x.shape), 0.4) > 0)) / 0.6
        options = {"scaling": layer.scaling, **CONVOLUTIONS[case].geometry}
        weight, lora_A, lora_B, magnitude, bias = dense_arguments(layer)
        off, ones = torch.zeros_like(lora_B), torch.ones_like(magnitude)
        plain = [reference.dora_conv(i, weight, lora_A, off, ones, weight_norm=ones, **options) for i in (x, dropped)]
        change = reference.dora_conv(dropped, weight, lora_A, lora_B, magnitude, **options) - plain[1]
        return plain[0] + bias.view(-1, *[1] * (x.ndim - 2)) + change

    exact = run(truth, x.double())
    eval_y = copy.deepcopy(layer).eval()(x)
    assert (exact - eval_y.double()).abs().max() > 0.1  # the mask matters
    check_against_dense(case, layer, x, eval_y)
    assert_rms_beside(run(layer, x), run(stock, x), exact)


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups")
def test_pefts_grouped_layer_differs_by_its_norm_alone():
    """Its filters are ours; its norm is that of a reshaped product, which no output channel has."""
    case = "2d_grouped_peft"
    layer, x = adapted(case, torch.float64), draw_x(case, torch.float64)
    stock, base = stock_peft_layer(layer, case), layer.base_layer
    product = torch.mm(layer.lora_B.view(-1, layer.r), layer.lora_A.view(layer.r, -1)).view_as(base.weight)
    theirs = torch.linalg.vector_norm((base.weight + layer.scaling * product).flatten(1), dim=1).detach()
    assert ((theirs / norm_of(layer) - 1).abs() > 0.05).any()
    options = {"scaling": layer.scaling, "weight_norm": theirs, **CONVOLUTIONS[case].geometry}
    args = (base.weight, layer.lora_A, layer.lora_B, layer.lora_magnitude_vector.flatten(), base.bias)
    torch.testing.assert_close(functional.dora_conv2d(x, *args, **options), stock(x))


# --- casts, copies, state dicts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("whole_model", [False, True])
def test_a_cast_keeps_the_magnitude(whole_model):
    layer = adapted("2d_grouped_peft")
    layer(draw_x("2d_grouped_peft")).sum().backward()
    magnitude = layer.lora_magnitude_vector
    before, grad = magnitude.detach().clone(), magnitude.grad.clone()
    (nn.Sequential(layer) if whole_model else layer).to(torch.bfloat16)
    assert layer.lora_magnitude_vector is magnitude
    assert magnitude.dtype == magnitude.grad.dtype == torch.float32
    assert torch.equal(magnitude, before)
    assert torch.equal(magnitude.grad, grad)
    assert layer.lora_A.dtype == layer.base_layer.weight.dtype == torch.bfloat16
    x = draw_x("2d_grouped_peft", torch.bfloat16)
    check_against_dense("2d_grouped_peft", layer, x, layer(x))


@pytest.mark.parametrize("adapter_dtype", DTYPES)
def test_adapter_dtype(adapter_dtype):
    layer = adapted("1d", adapter_dtype=adapter_dtype)
    assert layer.lora_A.dtype == layer.lora_B.dtype == adapter_dtype
    assert layer.lora_magnitude_vector.dtype == torch.promote_types(adapter_dtype, torch.float32)
    assert layer(draw_x("1d")).dtype == torch.float32


def test_built_on_meta_then_materialised():
    layer = DoraConv2d(nn.Conv2d(4, 6, 3, groups=2, device="meta"), 2, init_lora_weights=False)
    assert layer(torch.empty(2, 4, 8, 8, device="meta")).shape == (2, 6, 6, 6)
    layer.to_empty(device="cpu")
    layer.base_layer.reset_parameters()
    layer.reset_parameters()
    torch.testing.assert_close(layer.lora_magnitude_vector.detach().flatten(), norm_of(layer))


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("merged", [False, True])
def test_copies(clone, merged):
    layer, x = adapted("2d_grouped"), draw_x("2d_grouped")
    if merged:
        layer.merge()
    twin = clone(layer)
    assert twin.merged == merged
    assert torch.equal(twin(x), layer(x))
    twin.unmerge()
    check_against_dense("2d_grouped", twin, x, twin(x))


@SOME
def test_state_dict_round_trip(case):
    layer, other, x = adapted(case), adapted(case), draw_x(case)
    assert set(layer.state_dict()) == {"base_layer.weight", "base_layer.bias", *ADAPTER}
    assert not torch.allclose(layer(x), other(x))
    other.load_state_dict(layer.state_dict())
    assert torch.equal(layer(x), other(x))


# --- merging ---------------------------------------------------------------------------------------------------------


@MERGEABLE
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
def test_merge_and_unmerge(case, dtype, layout):
    layer, x = adapted(case, dtype), draw_x(case, dtype)
    base = layer.base_layer
    if layout == "channels_last":
        base.weight.data = base.weight.data.movedim(1, -1).contiguous().movedim(-1, 1)
    elif layout == "strided":
        base.weight.data = torch.stack([base.weight.data] * 2, -1)[..., 0]
    strides, weight = base.weight.stride(), base.weight.detach().clone()
    (v, exact), before = adapted_weights(layer), layer(x)
    matrices = functional.conv_matrices(weight.contiguous(), layer.lora_A, layer.lora_B, base.groups)
    magnitude = layer.lora_magnitude_vector.detach().view(matrices[0].shape[:-1])
    budget = merge_budget((*matrices, magnitude), CONVOLUTIONS[case].sums(), scaling=layer.scaling)

    layer.merge()
    assert layer.merged
    assert base.weight.stride() == strides
    stored = base.weight.detach().clone()
    dataclasses.replace(budget, truth=exact, bound=budget.bound.view(exact.shape)).check(stored)
    assert torch.equal(layer(x), base(x))
    check_against_merged(case, layer, x, before, exact)

    layer.merge()
    assert torch.equal(base.weight, stored)  # a second merge does nothing
    layer.unmerge()
    assert not layer.merged
    bound = 2 * torch.finfo(dtype).eps * torch.maximum(v.abs(), weight.double().abs())
    assert ((base.weight.double() - weight.double()).abs() <= bound).all()


def check_against_merged(case, layer, x, before, merged_weight):
    """The merged weight, base, lora and either result are rounded; float32 and float64 also round each term."""
    terms = 0 if x.dtype in HALF else CONVOLUTIONS[case].sums().terms("y")
    size = copy.deepcopy(layer.base_layer).double()
    size.weight.data, size.bias = merged_weight.abs(), None
    scale = size(x.double().abs()).max() + before.double().abs().max()
    assert ((layer(x).double() - before.double()).abs() <= (4 + terms) * torch.finfo(x.dtype).eps * scale).all()


@pytest.mark.parametrize("case", ["1d_grouped_peft", "2d_depthwise_peft", "3d_grouped_peft"])
def test_pefts_grouped_layout_is_not_merged(case):
    layer = adapted(case)
    before = layer.base_layer.weight.detach().clone()
    groups = CONVOLUTIONS[case].groups
    with pytest.raises(ValueError, match=rf"cannot merge into Conv\dd with groups={groups}: its lora_A sees all input"):
        layer.merge()
    assert not layer.merged
    assert torch.equal(layer.base_layer.weight, before)
    layer.unmerge()  # nothing to do


@pytest.mark.parametrize("case", ["2d", "2d_grouped"])
def test_unmerge_refuses_lost_filters(case):
    layer = adapted(case)
    layer.lora_magnitude_vector.data[0, [5, 8]] = 0
    layer.merge()
    before = layer.base_layer.weight.detach().clone()
    with pytest.raises(ValueError, match=r"cannot unmerge rows 5, 8: their g is 0"):
        layer.unmerge()
    assert layer.merged
    assert torch.equal(layer.base_layer.weight, before)


def test_a_cast_while_merged_keeps_the_norm():
    layer = adapted("2d_grouped")
    layer.merge()
    norm = layer.merged_norm.clone()
    layer.to(torch.bfloat16)
    assert torch.equal(layer.merged_norm, norm)
    layer.unmerge()
    assert layer.base_layer.weight.dtype == torch.bfloat16


# --- what is refused -------------------------------------------------------------------------------------------------


class CastingConv(nn.Conv1d):
    """As in Whisper."""

    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight.to(x.dtype), bias)


class StandardisedConv(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight - self.weight.mean(), self.bias)


def hooked():
    layer = nn.Conv2d(4, 6, 3)
    layer.register_forward_hook(lambda *_: None)
    return layer


REFUSED_LAYERS = {
    "another dimension": (DoraConv2d, lambda: nn.Conv1d(4, 6, 3), "Conv1d is not supported, only nn.Conv2d is"),
    "transposed": (DoraConv2d, lambda: nn.ConvTranspose2d(4, 6, 3), "ConvTranspose2d is not supported"),
    "linear": (DoraConv1d, lambda: nn.Linear(4, 6), "Linear is not supported, only nn.Conv1d is"),
    "own _conv_forward": (DoraConv1d, lambda: CastingConv(4, 6, 3), "CastingConv has a _conv_forward of its own"),
    "own forward": (DoraConv2d, lambda: StandardisedConv(4, 6, 3), "StandardisedConv has a forward of its own"),
    "lazy": (DoraConv3d, lambda: nn.LazyConv3d(6, 3), "LazyConv3d is lazy"),
    "parametrised": (DoraConv1d, lambda: nn.utils.parametrizations.weight_norm(nn.Conv1d(4, 6, 3)), "parametrised"),
    "hook": (DoraConv2d, hooked, "Conv2d has hooks"),
}


@pytest.mark.parametrize("case", REFUSED_LAYERS)
def test_layers_that_cannot_be_wrapped(case):
    cls, build, message = REFUSED_LAYERS[case]
    base = build()
    with pytest.raises(TypeError, match=f"base_layer cannot be wrapped: .*{message}"):
        cls(base, 2)
    assert all(p.requires_grad for p in base.parameters())


@pytest.mark.parametrize("grouped_lora_A", [False, True])
def test_a_rank_that_groups_do_not_divide(grouped_lora_A):
    base = nn.Conv2d(4, 6, 3, groups=2)
    with pytest.raises(ValueError, match="r must be divisible by the groups of Conv2d, 2, got 3"):
        DoraConv2d(base, 3, grouped_lora_A=grouped_lora_A)
    assert base.weight.requires_grad


def test_what_a_layer_shows():
    layer = adapted("2d_grouped_peft", lora_dropout=0.25)
    expected = "in_channels=6, out_channels=9, grouped_lora_A=False, r=6, scaling=0.833333, lora_dropout=0.25"
    assert expected in repr(layer)
    assert layer.weight is layer.base_layer.weight
    assert layer.bias is layer.base_layer.bias
    assert adapted("2d_grouped").grouped_lora_A
    assert adapted("2d", grouped_lora_A=False).grouped_lora_A  # one group
