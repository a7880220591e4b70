"""PEFT's layer classes on dorac by themselves, called as PEFT calls them, beside PEFT's own."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

peft = pytest.importorskip("peft")

from peft.tuners.lora import dora as stock_dora  # noqa: E402
from peft_models import gpt2_conv1d  # noqa: E402

import dorac.peft  # noqa: E402
from dorac import reference  # noqa: E402

TIGHT = {"rtol": 1e-10, "atol": 1e-12}
RANK, SCALING = 3, 1.7
CONVS = {
    1: ("DoraConv1dLayer", nn.Conv1d, (2, 4, 9)),
    2: ("DoraConv2dLayer", nn.Conv2d, (2, 4, 7, 6)),
    3: ("DoraConv3dLayer", nn.Conv3d, (2, 4, 5, 4, 5)),
}


def trained(layer, **update):
    """The layer with a magnitude off the norm."""
    layer.update_layer(scaling=SCALING, **update)
    with torch.no_grad():
        layer.weight.mul_(0.8 + 0.4 * torch.rand_like(layer.weight))
    return layer


def linear_parts(base, dtype=torch.float64):
    in_features, out_features = base.weight.shape if hasattr(base, "nf") else base.weight.shape[::-1]
    factors = nn.Linear(in_features, RANK, bias=False), nn.Linear(RANK, out_features, bias=False)
    return (base.to(dtype), *(factor.to(dtype) for factor in factors))


@pytest.fixture(params=["linear", "no_bias", "gpt2_conv1d"])
def linear(request):
    """``(base layer, lora_A, lora_B, fan_in_fan_out)`` in float64."""
    builders = {"linear": lambda: nn.Linear(7, 5), "no_bias": lambda: nn.Linear(7, 5, bias=False)}
    base = builders.get(request.param, gpt2_conv1d)()
    return *linear_parts(base), request.param == "gpt2_conv1d"


@pytest.mark.parametrize("given", [True, False], ids=["base_result", "recomputed"])
def test_linear_delta(linear, given):
    base, lora_A, lora_B, fan_in_fan_out = linear
    x = torch.randn(4, lora_A.in_features, dtype=torch.float64)
    mine = trained(
        dorac.peft.DoraLinearLayer(fan_in_fan_out), base_layer=base, lora_A=lora_A.weight, lora_B=lora_B.weight
    )
    stock = stock_dora.DoraLinearLayer(fan_in_fan_out)
    stock.weight = mine.weight
    arguments = {"lora_A": lora_A, "lora_B": lora_B, "scaling": SCALING, "base_layer": base}
    arguments["base_result"] = base(x) if given else None
    torch.testing.assert_close(mine(x, **arguments), stock(x, **arguments), **TIGHT)

    weight = base.weight.T if fan_in_fan_out else base.weight
    norm = reference.row_norm(weight, lora_A.weight, lora_B.weight, SCALING)
    g = reference.magnitude_scale(mine.weight, norm)
    expected = reference.compose_delta(x @ weight.T, lora_B(lora_A(x)), g, SCALING)
    torch.testing.assert_close(mine(x, **arguments), expected, **TIGHT)


@pytest.mark.parametrize("given", [True, False], ids=["base_result", "none"])
def test_embedding(given):
    base = nn.Embedding(11, 6).double()
    lora_A, lora_B = torch.randn(11, RANK).double(), torch.randn(RANK, 6).double()
    x = torch.randint(0, 11, (3, 4))
    mine = trained(dorac.peft.DoraEmbeddingLayer(True), base_layer=base, lora_A=lora_A.T, lora_B=lora_B.T)
    stock = stock_dora.DoraEmbeddingLayer(True)
    stock.weight = mine.weight
    arguments = {"lora_A": lora_A, "lora_B": lora_B, "scaling": SCALING, "base_layer": base, "embed_fn": F.embedding}
    g, scaled = stock(x, **arguments)
    if given:
        scaled = (g - 1) * base(x) + scaled
        torch.testing.assert_close(mine(x, **arguments, base_result=base(x)), (g, scaled), **TIGHT)
    else:
        torch.testing.assert_close(mine(x, **arguments), (g, scaled), **TIGHT)


def conv_parts(dims, *, dtype=torch.float64, groups=1, **geometry):
    name, kind, shape = CONVS[dims]
    base = kind(shape[1], 6, 3, groups=groups, **geometry).to(dtype)
    lora_A = kind(shape[1], 2 * groups, 3, bias=False).to(dtype)  # its own geometry is not used
    lora_B = kind(2 * groups, 6, 1, groups=groups, bias=False).to(dtype)
    layer = getattr(dorac.peft, name)(fan_in_fan_out=False)
    trained(layer, base_layer=base, lora_A=lora_A.weight, lora_B=lora_B.weight)
    return layer, base, lora_A, lora_B, torch.randn(shape, dtype=dtype)


def dense_change(base, lora_A, lora_B):
    """``s * BA`` as filters over all input channels, group by group."""
    groups, rank = base.groups, lora_A.weight.shape[0] // base.groups
    rows = []
    for g in range(groups):
        b = lora_B.weight[g * 6 // groups : (g + 1) * 6 // groups].flatten(1)
        rows.append(b @ lora_A.weight[g * rank : (g + 1) * rank].flatten(1))
    return SCALING * torch.cat(rows).view(6, *lora_A.weight.shape[1:])


@pytest.mark.parametrize("given", [True, False], ids=["base_result", "recomputed"])
@pytest.mark.parametrize(
    "geometry",
    [
        {},
        {"bias": False, "padding": 1},
        {"stride": 2, "padding": 1},
        {"dilation": 2, "padding": 2},
        {"padding": 1, "padding_mode": "reflect"},
        {"padding": 1, "padding_mode": "circular", "stride": 2},
        {"groups": 2, "padding": "same"},
    ],
    ids=lambda geometry: "-".join(map(str, geometry)) or "plain",
)
@pytest.mark.parametrize("dims", CONVS)
def test_conv_delta(dims, geometry, given):
    """Against the dense, ungrouped convolution with the adapted filters, whatever lora_A's own geometry is."""
    layer, base, lora_A, lora_B, x = conv_parts(dims, **geometry)
    if min(x.shape[2:]) < 3 + (base.dilation[0] - 1) * 2 - 2 * (base.padding != 0):
        pytest.skip("the kernel does not fit")
    groups, channels = base.groups, base.in_channels // base.groups
    full = torch.zeros(6, base.in_channels, *base.kernel_size, dtype=x.dtype)
    for g in range(groups):
        rows = slice(g * 6 // groups, (g + 1) * 6 // groups)
        full[rows, g * channels : (g + 1) * channels] = base.weight[rows]
    adapted = full + dense_change(base, lora_A, lora_B)
    norm = torch.linalg.vector_norm(adapted.flatten(1), dim=1)
    g = layer.weight.flatten() / norm

    options = {k: v for k, v in geometry.items() if k not in ("groups", "bias")}
    dense = CONVS[dims][1](base.in_channels, 6, 3, bias=False, **options).double()
    with torch.no_grad():
        dense.weight.copy_(g.view(-1, *[1] * (adapted.ndim - 1)) * adapted - full)
        expected = dense(x)
    result = layer(
        x,
        lora_A=lora_A,
        lora_B=lora_B,
        scaling=SCALING,
        base_layer=base,
        base_result=base(x) if given else None,
    )
    torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dims", CONVS)
def test_conv_delta_is_pefts(dims):
    layer, base, lora_A, lora_B, x = conv_parts(dims)
    stock = getattr(stock_dora, type(layer).__name__)(fan_in_fan_out=False)
    stock.weight = layer.weight
    arguments = {"lora_A": lora_A, "lora_B": lora_B, "scaling": SCALING, "base_layer": base}
    torch.testing.assert_close(layer(x, **arguments), stock(x, **arguments), **TIGHT)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_magnitude_starts_at_the_norm_in_full_precision(dtype):
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    base, lora_A, lora_B = linear_parts(nn.Linear(33, 9), dtype)
    layer = dorac.peft.DoraLinearLayer(False)
    layer.update_layer(base_layer=base, lora_A=lora_A.weight, lora_B=lora_B.weight, scaling=SCALING)
    assert layer.weight.dtype is wide
    assert layer.weight.requires_grad
    exact = reference.row_norm(*(p.weight.double() for p in (base, lora_A, lora_B)), SCALING)
    torch.testing.assert_close(layer.weight.double(), exact, rtol=1e-12 if dtype is torch.float64 else 1e-6, atol=0)
    norm = layer.get_weight_norm(base.weight, lora_B.weight.to(wide) @ lora_A.weight.to(wide), SCALING)
    assert norm.dtype is wide
    torch.testing.assert_close(norm, layer.weight.detach(), rtol=1e-6, atol=0)

    for dims in CONVS:
        conv, conv_base, lora_A, lora_B, _ = conv_parts(dims, dtype=dtype)
        conv.update_layer(base_layer=conv_base, lora_A=lora_A.weight, lora_B=lora_B.weight, scaling=SCALING)
        change = (lora_B.weight.to(wide).flatten(1) @ lora_A.weight.to(wide).flatten(1)).view(conv_base.weight.shape)
        norm = conv.get_weight_norm(conv_base.weight, change, SCALING)
        assert norm.shape == conv.weight.shape == (1, 6, *[1] * dims)
        assert norm.dtype is conv.weight.dtype is wide
        torch.testing.assert_close(norm, conv.weight.detach(), rtol=1e-6, atol=0)
        # PEFT asks whichever layer it has: a convolution is known by its weight
        layer.update_layer(base_layer=conv_base, lora_A=lora_A.weight, lora_B=lora_B.weight, scaling=SCALING)
        assert layer.weight.shape == conv.weight.shape


def test_a_half_magnitude_that_is_not_trained_is_used_as_it_is():
    base, lora_A, lora_B = linear_parts(nn.Linear(7, 5), torch.bfloat16)
    layer = trained(dorac.peft.DoraLinearLayer(False), base_layer=base, lora_A=lora_A.weight, lora_B=lora_B.weight)
    layer.eval().weight.data = layer.weight.data.bfloat16()
    x = torch.randn(4, 7, dtype=torch.bfloat16)
    arguments = {"lora_A": lora_A, "lora_B": lora_B, "scaling": SCALING, "base_layer": base}
    result = layer(x, **arguments)
    assert layer.weight.dtype is torch.bfloat16
    wide = copy.deepcopy(layer).float()
    torch.testing.assert_close(result, wide(x, **arguments), rtol=0, atol=0)
    result.sum().backward()
    assert layer.weight.grad.dtype is torch.bfloat16


def test_the_base_output_is_computed_in_the_dtype_of_x():
    """float32 adapters over a half base get the base's output in float32, without a bias."""
    base, lora_A, lora_B = linear_parts(nn.Linear(64, 48), torch.bfloat16)
    lora_A, lora_B = lora_A.float(), lora_B.float()
    layer = trained(dorac.peft.DoraLinearLayer(False), base_layer=base, lora_A=lora_A.weight, lora_B=lora_B.weight)
    with torch.no_grad():
        layer.weight.mul_(3)  # the base's share of the delta is large
    x = torch.randn(4, 64)
    arguments = {"lora_A": lora_A, "lora_B": lora_B, "scaling": SCALING, "base_layer": base}
    weight = base.weight.double()
    norm = reference.row_norm(weight, lora_A.weight.double(), lora_B.weight.double(), SCALING)
    lora = x.double() @ lora_A.weight.double().T @ lora_B.weight.double().T
    expected = reference.compose_delta(x.double() @ weight.T, lora, layer.weight.double() / norm, SCALING)
    torch.testing.assert_close(layer(x, **arguments).double(), expected, rtol=1e-5, atol=1e-5)


def test_chunks_of_the_recomputed_base():
    """However few rows are converted at a time, it is one product."""
    from dorac.peft.weights import linear_from_copy

    x, weight = torch.randn(4, 16, requires_grad=True), torch.randn(13, 16).bfloat16()
    expected = F.linear(x, weight.float())
    for budget in (1, 16 * 4 * 5, 2**20):
        torch.testing.assert_close(linear_from_copy(x, weight, budget), expected)


def test_bias_of_another_dtype_is_moved():
    base, lora_A, lora_B = linear_parts(nn.Linear(7, 5))
    layer = trained(dorac.peft.DoraLinearLayer(False), base_layer=base, lora_A=lora_A.weight, lora_B=lora_B.weight)
    x = torch.randn(4, 7, dtype=torch.float64)
    arguments = {"lora_A": lora_A, "lora_B": lora_B, "scaling": SCALING, "base_layer": base}
    base.bias.data = base.bias.data.bfloat16().double()
    expected = layer(x, **arguments, base_result=base(x))
    result = base(x)
    base.bias.data = base.bias.data.bfloat16()
    torch.testing.assert_close(layer(x, **arguments, base_result=result), expected, **TIGHT)


def test_zero_rows_pass_gradients():
    base, lora_A, lora_B = linear_parts(nn.Linear(7, 5))
    with torch.no_grad():
        base.weight[2] = 0
        lora_B.weight[2] = 0
    layer = trained(dorac.peft.DoraLinearLayer(False), base_layer=base, lora_A=lora_A.weight, lora_B=lora_B.weight)
    x = torch.randn(4, 7, dtype=torch.float64)
    delta = layer(x, lora_A=lora_A, lora_B=lora_B, scaling=SCALING, base_layer=base)
    assert (delta[:, 2] == 0).all()
    delta.sum().backward()
    assert lora_B.weight.grad[2].abs().sum() > 0
    assert all(p.grad.isfinite().all() for p in (lora_A.weight, lora_B.weight, layer.weight))


def test_representation_and_kin():
    for name in ("DoraLinearLayer", "DoraEmbeddingLayer", "_DoraConvNdLayer", *(entry[0] for entry in CONVS.values())):
        cls = getattr(dorac.peft, name)
        assert issubclass(cls, getattr(stock_dora, name))
        assert repr(cls(fan_in_fan_out=False)).startswith(f"lora.dora.{name}(")
    for dims, function in ((1, F.conv1d), (2, F.conv2d), (3, F.conv3d)):
        assert getattr(dorac.peft, CONVS[dims][0])(False).conv_fn is function
    with pytest.raises(AttributeError, match="no attribute 'DoraConv4dLayer'"):
        dorac.peft.DoraConv4dLayer  # noqa: B018
