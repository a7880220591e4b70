"""The convolutions as functions: against one dense, ungrouped convolution with the adapted filters."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from error_table import error_table, label, record  # noqa: F401
from torch import nn

from dorac import functional, reference
from dorac.testing import CONVOLUTIONS, Convolution, conv_inputs, layer_budgets, norm_budget

HALF = (torch.bfloat16, torch.float16)
DTYPES = [torch.float64, torch.float32, *HALF]
NAMES = ("x", "weight", "lora_A", "lora_B", "magnitude", "bias")
CASES = pytest.mark.parametrize("case", CONVOLUTIONS)
SCALING = 0.7


def of_rank(case: str, rank: int) -> Convolution:
    """The case at the next higher rank that its groups divide."""
    convolution = CONVOLUTIONS[case]
    return dataclasses.replace(convolution, rank=-(-rank // convolution.groups) * convolution.groups)


def layer_of(convolution: Convolution, use_compile: bool = False):
    """The function under test with the case's geometry."""
    function = getattr(functional, f"dora_conv{convolution.dimensions}d")
    if use_compile:
        function = torch.compile(function, fullgraph=True, backend="aot_eager")

    def layer(*args, **options):
        return function(*args, **{"scaling": SCALING, **convolution.geometry, **options})

    layer.is_compiled = use_compile
    return layer


def textbook_of(convolution: Convolution):
    return lambda *args, **options: reference.dora_conv(*args, scaling=SCALING, **convolution.geometry, **options)


def norm_of(inputs, convolution):
    args = (inputs.weight, inputs.lora_A, inputs.lora_B)
    return functional.norm_factored_conv(*args, SCALING, groups=convolution.groups)


def row_of(inputs, convolution, layer):
    cases = [n for n, c in CONVOLUTIONS.items() if dataclasses.replace(c, rank=convolution.rank) == convolution]
    case = cases[0] if cases else f"{convolution.dimensions}d"
    return label(case, inputs.x, convolution.rank, layer.is_compiled)


def filter_norm_of(convolution: Convolution):
    """The textbook's norm."""
    return lambda *args: reference.filter_norm(*args, convolution.groups)


def budgets_of(inputs, convolution, **options):
    return layer_budgets(
        reference.dora_conv,
        filter_norm_of(convolution),
        inputs.tensors(),
        convolution.sums(),
        scaling=SCALING,
        **convolution.geometry,
        **options,
    )


def check(inputs, convolution, layer):
    """y, and the gradient of every tensor."""
    leaves = inputs.leaves()
    y = layer(*leaves.tensors())
    dy = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(y)
    y.backward(dy)
    for name, budget in budgets_of(inputs, convolution, dy=dy).items():
        actual = y if name == "y" else getattr(leaves, name).grad
        assert actual.dtype == (inputs.x if name == "y" else getattr(inputs, name)).dtype, name
        record(row_of(inputs, convolution, layer), name, actual, budget.truth)
        budget.check(actual, name)


@CASES
@pytest.mark.parametrize("dtype", DTYPES)
def test_without_gradients(case, dtype, device):
    convolution, inputs = CONVOLUTIONS[case], conv_inputs(case, dtype=dtype, device=device)
    y = layer_of(convolution)(*inputs.tensors())
    assert y.dtype == dtype
    budgets_of(inputs, convolution)["y"].check(y)


@CASES
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_values_and_gradients(case, dtype, device):
    check(conv_inputs(case, dtype=dtype, device=device), CONVOLUTIONS[case], layer_of(CONVOLUTIONS[case]))


@pytest.mark.parametrize(
    ("case", "dtype", "channels_last"),
    [
        ("1d_dilated_same", torch.float32, False),
        ("2d_grouped_peft", torch.bfloat16, True),
        ("2d_depthwise", torch.float32, True),
        ("3d_strided", torch.bfloat16, False),
    ],
)
def test_compiled(case, dtype, channels_last, device):
    """A sample of the full matrix."""
    convolution = CONVOLUTIONS[case]
    inputs = conv_inputs(case, dtype=dtype, channels_last=channels_last, bias=not channels_last, device=device)
    layer = layer_of(convolution, use_compile=True)
    check(inputs, convolution, layer)


@pytest.mark.parametrize("case", ["1d", "2d_depthwise_peft", "2d_depthwise"])
def test_rank_384(case, device):
    convolution = of_rank(case, 384)
    inputs = conv_inputs(convolution, dtype=torch.float32, device=device)
    check(inputs, convolution, layer_of(convolution))


@pytest.mark.full
@CASES
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 8, 64, 384])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("use_compile", [False, True])
def test_full_matrix(case, dtype, rank, bias, channels_last, use_compile, device):
    convolution = of_rank(case, rank)
    inputs = conv_inputs(convolution, dtype=dtype, bias=bias, channels_last=channels_last, device=device)
    layer = layer_of(convolution, use_compile)
    check(inputs, convolution, layer)


@CASES
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels_last", [False, True])
def test_norm(case, dtype, channels_last, device):
    convolution = CONVOLUTIONS[case]
    inputs = conv_inputs(case, dtype=dtype, channels_last=channels_last, device=device)
    norm = norm_of(inputs, convolution)
    assert norm.dtype == torch.promote_types(dtype, torch.float32)
    assert not norm.requires_grad
    budget = norm_budget(filter_norm_of(convolution), inputs.tensors()[1:4], convolution.sums(), scaling=SCALING)
    budget.check(norm)
    args = (inputs.weight, inputs.lora_A, inputs.lora_B, SCALING)
    budget.check(functional.norm_factored_conv(*args, groups=convolution.groups, budget=1))


def test_norm_of_a_zero_base_in_pefts_layout(device):
    """Nothing but the factors: a lora_A whose own group is zero too leaves the second term of the norm alone."""
    convolution = CONVOLUTIONS["2d_grouped_peft"]
    inputs = conv_inputs("2d_grouped_peft", dtype=torch.float32, device=device)
    inputs.weight.zero_()
    ranks, channels = convolution.rank // 3, convolution.x[1] // 3
    for j in range(3):
        inputs.lora_A[j * ranks : (j + 1) * ranks, j * channels : (j + 1) * channels] = 0
    args = (inputs.weight, inputs.lora_A, inputs.lora_B)
    budget = norm_budget(filter_norm_of(convolution), args, convolution.sums(), scaling=SCALING)
    assert budget.truth.min() > 0.1
    budget.check(norm_of(inputs, convolution))


def test_filters_that_the_factors_cancel(device):
    """Nearly dependent rows of lora_A outside of the group, subtracted by lora_B: a Gram matrix in float32 loses it."""
    case = dataclasses.replace(CONVOLUTIONS["1d_grouped_peft"], rank=4)
    inputs = conv_inputs(case, dtype=torch.float32, device=device)
    inputs.weight.zero_()
    inputs.lora_A[1::2] = inputs.lora_A[::2] + 1e-3 * inputs.lora_A[1::2]
    inputs.lora_B[:, 1] = -inputs.lora_B[:, 0]
    args = (inputs.weight, inputs.lora_A, inputs.lora_B)
    truth = reference.filter_norm(*(t.double() for t in args), SCALING, 2)
    assert truth.max() < 2e-3
    # Each element of the product is off by a rounding of its terms, and the norm by no more than all of them.
    terms = reference.filter_norm(*(t.double().abs() for t in args), SCALING, 2)
    assert ((norm_of(inputs, case).double() - truth).abs() <= torch.finfo(torch.float32).eps * terms).all()


@pytest.mark.parametrize("case", ["2d", "2d_grouped", "2d_grouped_peft", "3d_circular", "1d"])
def test_a_channels_last_weight_is_not_copied(case):
    inputs = conv_inputs(case, channels_last=True)
    assert not inputs.weight.is_contiguous()
    weight, lora_A, lora_B = functional.conv_matrices(
        inputs.weight, inputs.lora_A, inputs.lora_B, CONVOLUTIONS[case].groups
    )
    assert weight.untyped_storage().data_ptr() == inputs.weight.untyped_storage().data_ptr()
    contiguous = [t.contiguous() for t in (inputs.weight, inputs.lora_A, inputs.lora_B)]
    expected = functional.conv_matrices(*contiguous, CONVOLUTIONS[case].groups)
    assert [t.shape for t in (weight, lora_A, lora_B)] == [t.shape for t in expected]
    # The same products of a row of either with a row of the other, in another order of the columns.
    torch.testing.assert_close(weight @ lora_A.mT, expected[0] @ expected[1].mT)


@CASES
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("use_compile", [False, pytest.param(True, marks=pytest.mark.full)])
def test_memory_format_is_the_frozen_layers(case, channels_last, use_compile):
    """Of the result and of the gradient of x, as torch's own convolution leaves them."""
    convolution = CONVOLUTIONS[case]
    inputs = conv_inputs(case, dtype=torch.float32, channels_last=channels_last)
    x = inputs.x.requires_grad_()
    conv = getattr(nn, f"Conv{convolution.dimensions}d")(
        convolution.x[1], convolution.out, convolution.kernel, **convolution.geometry
    )
    conv.weight = nn.Parameter(inputs.weight)
    plain = conv(x)
    (expected,) = torch.autograd.grad(plain.sum(), x)
    y = layer_of(convolution, use_compile)(*inputs.tensors())
    (actual,) = torch.autograd.grad(y.sum(), x)
    assert y.stride() == plain.stride()
    assert actual.stride() == expected.stride()
    if channels_last and case.startswith(("2d", "3d")) and "1x1" not in case:
        assert not y.is_contiguous()
        assert y.movedim(1, -1).is_contiguous()


@CASES
def test_a_zero_adapter_is_nn_conv(case):
    """Where lora_B is zero and g is 1, whatever nn.Conv makes of the geometry; x without a batch too."""
    convolution = CONVOLUTIONS[case]
    inputs = conv_inputs(case)
    conv = getattr(nn, f"Conv{convolution.dimensions}d")(
        convolution.x[1], convolution.out, convolution.kernel, **convolution.geometry, dtype=torch.float64
    )
    conv.load_state_dict({"weight": inputs.weight, "bias": inputs.bias})
    magnitude = functional.norm_factored_conv(
        inputs.weight, inputs.lora_A, torch.zeros_like(inputs.lora_B), SCALING, groups=convolution.groups
    )
    args = (inputs.weight, inputs.lora_A, torch.zeros_like(inputs.lora_B), magnitude, inputs.bias)
    layer = layer_of(convolution)
    torch.testing.assert_close(layer(inputs.x, *args), conv(inputs.x))
    torch.testing.assert_close(layer(inputs.x[0], *args), conv(inputs.x)[0])
    assert layer(inputs.x[:0], *args).shape == (0, *conv(inputs.x).shape[1:])


@pytest.mark.parametrize("channels_last", [False, True])
def test_inputs_unchanged(channels_last):
    inputs = conv_inputs("2d_circular", channels_last=channels_last)
    before = [t.clone() for t in inputs.tensors()]
    layer_of(CONVOLUTIONS["2d_circular"])(*inputs.tensors(), dropout_p=0.5)
    assert all(torch.equal(a, b) for a, b in zip(before, inputs.tensors(), strict=True))


def test_strided_tensors():
    """Neither contiguous nor channels-last."""
    inputs = conv_inputs("2d")
    strided = inputs.map(lambda t: torch.stack([t, t], -1)[..., 0])
    assert not any(t.is_contiguous() for t in strided.tensors())
    layer = layer_of(CONVOLUTIONS["2d"])
    torch.testing.assert_close(layer(*strided.tensors()), layer(*inputs.tensors()))


def test_given_norm_replaces_the_computed_one():
    case = "2d_grouped_peft"
    inputs, layer = conv_inputs(case, bias=False), layer_of(CONVOLUTIONS[case])
    norm = norm_of(inputs, CONVOLUTIONS[case])
    assert torch.equal(layer(*inputs.tensors(), weight_norm=norm), layer(*inputs.tensors()))
    halved = layer(*inputs.tensors(), weight_norm=2 * norm)
    torch.testing.assert_close(2 * halved, layer(*inputs.tensors()))


# Small enough for finite differences in every input.
TINY = {
    "1d": Convolution((2, 2, 4), 3, (2,), 2, geometry={"stride": 2, "padding": 1}),
    "2d_grouped": Convolution((1, 2, 3, 3), 2, (2, 2), 2, geometry={"groups": 2, "padding": "same"}),
    "2d_grouped_peft": Convolution((1, 2, 3, 3), 2, (2, 1), 2, False, {"groups": 2, "dilation": 2}),
    "2d_reflect": Convolution((1, 2, 3, 2), 2, (2, 2), 1, geometry={"padding": 1, "padding_mode": "reflect"}),
    "3d": Convolution((1, 1, 2, 3, 2), 2, (2, 2, 1), 2, geometry={"padding_mode": "circular", "padding": (1, 0, 0)}),
}


@pytest.mark.parametrize("case", TINY)
@pytest.mark.parametrize("how", ["norm_grad", "given", "given with its gradient"])
def test_gradcheck(case, how):
    leaves, geometry = conv_inputs(TINY[case]).leaves(), TINY[case].geometry
    function = layer_of(TINY[case])
    constant = norm_of(leaves, TINY[case])

    def layer(*args):
        *tensors, scaling = args
        if how == "norm_grad":
            return function(*tensors, scaling=scaling, norm_grad=True)
        norm = constant
        if how != "given":
            groups = geometry.get("groups", 1)
            norm = functional.norm_factored_conv(*tensors[1:4], scaling, groups=groups, norm_grad=True)
        return function(*tensors, scaling=scaling, weight_norm=norm)

    args = (*leaves.tensors(), torch.tensor(SCALING, dtype=torch.float64, requires_grad=True))
    fast = {"fast_mode": how == "given with its gradient"}
    assert torch.autograd.gradcheck(layer, args, check_forward_ad=True, check_batched_grad=True, **fast)
    assert torch.autograd.gradgradcheck(layer, args, check_fwd_over_rev=True, check_batched_grad=True, **fast)


@pytest.mark.parametrize("trained", [(), ("x",), ("lora_A",), ("lora_B", "magnitude"), ("weight", "bias"), NAMES])
@pytest.mark.parametrize("use_compile", [False, True])
def test_which_gradients_exist(trained, use_compile):
    inputs = conv_inputs("2d_grouped_peft", dtype=torch.float32)
    for name in trained:
        getattr(inputs, name).requires_grad_()
    y = layer_of(CONVOLUTIONS["2d_grouped_peft"], use_compile)(*inputs.tensors())
    assert y.requires_grad == bool(trained)
    if trained:
        y.square().sum().backward()
    assert {name for name in NAMES if getattr(inputs, name).grad is not None} == set(trained)
    assert all(getattr(inputs, name).grad.count_nonzero() for name in trained)


@pytest.mark.parametrize("channels_last", [False, True])
def test_saves_one_activation_of_the_outputs(channels_last):
    """inner, in the activation's dtype; neither base nor lora."""
    case = Convolution((4, 8, 6, 6), 32, (3, 3), 2, geometry={"padding": 1})
    inputs = conv_inputs(case, dtype=torch.bfloat16, channels_last=channels_last)
    for name in ("lora_A", "lora_B", "magnitude"):
        getattr(inputs, name).requires_grad_()
    saved = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(t.data_ptr(), t), lambda t: t):
        layer_of(case)(*inputs.tensors())
    assert [t.dtype for t in saved.values() if t.numel() == 4 * 32 * 36] == [torch.bfloat16]


@pytest.mark.parametrize("case", ["1d", "2d_grouped_peft", "2d_reflect"])
def test_dropout_leaves_the_frozen_layer_alone(case):
    convolution, inputs = CONVOLUTIONS[case], conv_inputs(case)
    x, weight, lora_A, lora_B, magnitude, bias = inputs.tensors()
    torch.manual_seed(3)
    y = layer_of(convolution)(*inputs.tensors(), dropout_p=0.4)
    torch.manual_seed(3)
    dropped = F.dropout(x, 0.4)
    assert 0 < (dropped == 0).double().mean() < 1
    textbook = textbook_of(convolution)
    ones, zeros = torch.ones_like(magnitude), torch.zeros_like(lora_B)

    def base(x, bias=None):
        return textbook(x, weight, lora_A, zeros, ones, bias, weight_norm=ones)

    adapted = textbook(dropped, weight, lora_A, lora_B, magnitude)
    torch.testing.assert_close(y, base(x, bias) + adapted - base(dropped))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("use_compile", [False, True])
def test_autocast(dtype, use_compile, device):
    """Convolutions run in the autocast dtype, norm and g do not."""
    case = "2d_grouped_peft"
    inputs, convolution = conv_inputs(case, dtype=torch.float32, device=device), CONVOLUTIONS[case]
    layer = layer_of(convolution, use_compile)
    with torch.autocast(device, dtype=dtype):
        y = layer(*inputs.tensors())
        eager = layer_of(convolution)(*inputs.tensors())
        norm = norm_of(inputs, convolution)
    assert y.dtype == dtype
    assert torch.equal(y, eager)
    assert torch.equal(norm, norm_of(inputs, convolution))
    budgets_of(inputs, convolution, dtype=dtype, casts=3)["y"].check(y)


@pytest.mark.parametrize("factor_dtype", DTYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixed_dtypes(dtype, factor_dtype, device):
    """PEFT's default among them: float32 factors beside a bfloat16 base."""
    convolution = CONVOLUTIONS["2d_grouped_peft"]
    inputs = conv_inputs("2d_grouped_peft", dtype=dtype, factor_dtype=factor_dtype, device=device)
    leaves = inputs.leaves()
    y = layer_of(convolution)(*leaves.tensors())
    assert y.dtype == dtype
    y.sum().backward()
    for name, budget in budgets_of(inputs, convolution, dy=torch.ones_like(y)).items():
        actual = y if name == "y" else getattr(leaves, name).grad
        assert name == "y" or actual.dtype == getattr(inputs, name).dtype
        budget.check(actual, name)


def test_zero_filters_train(device):
    inputs = conv_inputs("2d_depthwise_peft", dtype=torch.float32, device=device)
    for tensor in (inputs.weight, inputs.lora_B, inputs.magnitude):
        tensor[3] = 0
    leaves = inputs.leaves()
    y = layer_of(CONVOLUTIONS["2d_depthwise_peft"])(*leaves.tensors())
    assert torch.equal(y[:, 3], inputs.bias[3].expand_as(y[:, 3]))
    y.square().sum().backward()
    assert all(t.grad.isfinite().all() for t in leaves.tensors())
    assert leaves.lora_B.grad[3].count_nonzero()


def test_grouped_matrices_merge():
    """merge_weight on the matrices gives the weight of the grouped layer."""
    convolution, inputs = CONVOLUTIONS["2d_grouped"], conv_inputs("2d_grouped", channels_last=True)
    matrices = functional.conv_matrices(inputs.weight, inputs.lora_A, inputs.lora_B, 3)
    merged, _ = functional.merge_weight(*matrices, inputs.magnitude.view(3, -1), scaling=SCALING)
    weight = merged.view(inputs.weight.movedim(1, -1).shape).movedim(-1, 1)
    y = F.conv2d(inputs.x, weight, inputs.bias, groups=3)
    torch.testing.assert_close(y, layer_of(convolution)(*inputs.tensors()))


@pytest.mark.parametrize("case", ["1d_strided", "2d_grouped", "2d_grouped_peft", "3d"])
def test_every_size_symbolic(case):
    """And every number of the geometry: the function is reached through a variable, groups are an argument."""
    convolution, tensors = CONVOLUTIONS[case], conv_inputs(case).tensors()
    function = getattr(functional, f"dora_conv{convolution.dimensions}d")
    geometry = {name: value for name, value in convolution.geometry.items() if name != "groups"}

    def layer(groups, *tensors):
        return function(*tensors, scaling=SCALING, groups=groups, **geometry)

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(compiled(convolution.groups, *tensors), layer(convolution.groups, *tensors))
