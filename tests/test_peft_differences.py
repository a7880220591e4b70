"""Where stock PEFT is wrong and the drop-in is not: one test for each row of the table in dorac/docs/peft.md."""

import copy

import peft_models
import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")

from peft_models import Holder, off_init, target, twins  # noqa: E402

import dorac.peft  # noqa: E402
from dorac import reference  # noqa: E402


def conv_twins(layer, x, **options):
    """Stock and drop-in over one convolution in float64, and the dense weight ``g * (W + s BA)``, without groups."""
    config = peft.LoraConfig(r=4, lora_alpha=6, use_dora=True, target_modules=["target"], **options)
    stock = off_init(peft.get_peft_model(Holder(layer).double(), config))
    ours = copy.deepcopy(stock)
    dorac.peft.enable(ours)
    return stock, ours


def dense_conv(model, x):
    """The base layer without groups, its filters replaced by ``g * (W + s BA)``: what DoRA means."""
    layer = target(model)
    base = layer.base_layer
    groups = base.groups
    out, channels, *kernel = base.weight.shape
    adapted = torch.zeros(out, channels * groups, *kernel, dtype=x.dtype)
    rows, ranks = out // groups, layer.r["default"] // groups
    for g in range(groups):
        here = slice(g * rows, (g + 1) * rows)
        adapted[here, g * channels : (g + 1) * channels] = base.weight[here]
        lora_A = layer.lora_A["default"].weight[g * ranks : (g + 1) * ranks]
        change = layer.lora_B["default"].weight[here].flatten(1) @ lora_A.flatten(1)
        adapted[here] += layer.scaling["default"] * change.view(rows, *lora_A.shape[1:])
    norm = torch.linalg.vector_norm(adapted.flatten(1), dim=1)
    g = layer.lora_magnitude_vector["default"].weight.flatten() / norm
    dense = type(base)(
        channels * groups,
        out,
        kernel,
        stride=base.stride,
        padding=base.padding,
        dilation=base.dilation,
        padding_mode=base.padding_mode,
    ).double()
    return torch.func.functional_call(
        dense, {"weight": g.view(-1, *[1] * (len(kernel) + 1)) * adapted, "bias": base.bias}, (x,)
    )


def test_zero_rows():
    """PEFT issue 2049: NaN in the output, the gradients and the merged weight; here g = 1."""
    stock, ours = twins("linear")
    for model in (stock, ours):
        layer = target(model)
        with torch.no_grad():
            layer.base_layer.weight[4] = 0
            layer.lora_B["default"].weight[4] = 0
            layer.lora_magnitude_vector["default"].weight[4] = 0
    x = peft_models.KINDS["linear"].input(3, torch.float64)
    assert stock(x)[..., 4].isnan().all()
    y = ours(x)
    torch.testing.assert_close(y[..., 4], target(ours).base_layer.bias[4].expand(y.shape[:-1]))
    keep = [i for i in range(12) if i != 4]
    torch.testing.assert_close(y[..., keep], stock(x)[..., keep])
    y.sum().backward()
    layer = target(ours)
    assert layer.lora_B["default"].weight.grad[4].abs().sum() > 0
    assert all(p.grad.isfinite().all() for p in ours.parameters() if p.grad is not None)
    for model in (stock, ours):
        model.merge_adapter()
    assert target(stock).base_layer.weight[4].isnan().all()
    assert target(ours).base_layer.weight.isfinite().all()
    ours.unmerge_adapter()
    assert (target(ours).base_layer.weight[4] == 0).all()


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd")
@pytest.mark.parametrize("groups", [2, 4])
def test_grouped_convolutions(groups):
    """The norm is that of another tensor in stock PEFT; and of the right one here."""
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    stock, ours = conv_twins(nn.Conv2d(8, 8, 3, groups=groups), x)
    truth = dense_conv(ours, x)
    torch.testing.assert_close(ours(x), truth, rtol=1e-9, atol=1e-11)
    assert (stock(x) - truth).norm() > 1e-3 * truth.norm()


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_dilation(dims):
    """Stock PEFT's lora_A is not dilated: shapes that do not add up."""
    x = torch.randn(2, 3, *[7] * dims, dtype=torch.float64)
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    stock, ours = conv_twins(kind(3, 8, 3, dilation=2), x)
    with pytest.raises(RuntimeError, match="must match the size"):
        stock(x)
    torch.testing.assert_close(ours(x), dense_conv(ours, x), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("padding_mode", ["reflect", "replicate", "circular"])
def test_padding_mode(padding_mode):
    """Stock PEFT pads lora_A with zeros, and recomputes the base with zeros under dropout."""
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    stock, ours = conv_twins(nn.Conv2d(3, 8, 3, padding=1, padding_mode=padding_mode), x)
    truth = dense_conv(ours, x)
    torch.testing.assert_close(ours(x), truth, rtol=1e-9, atol=1e-11)
    assert (stock(x) - truth).norm() > 1e-3 * truth.norm()


def test_half_precision_norms():
    """In bf16 stock PEFT rounds the norm and g: 0.2 % wrong at init, where g is 1, and deaf to small changes of m."""
    torch.manual_seed(0)
    base = nn.Linear(256, 512, bias=False).bfloat16()
    config = peft.LoraConfig(r=8, use_dora=True, target_modules=["target"], init_lora_weights=False)

    def scales(model):
        layer = target(model)
        lora_A, lora_B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        exact = reference.row_norm(base.weight.double(), lora_A.double(), lora_B.double(), layer.scaling["default"])
        return layer.lora_magnitude_vector["default"].weight.double() / exact

    stock = peft.get_peft_model(Holder(copy.deepcopy(base)), config)
    with dorac.peft.enable():
        ours = peft.get_peft_model(Holder(copy.deepcopy(base)), config)
    assert (scales(stock) - 1).abs().max() > 1e-3
    assert (scales(ours) - 1).abs().max() < 1e-6

    # m 0.15 % off the norm: half a unit of bf16, which stock PEFT's quotient rounds away in most rows
    dorac.peft.enable(ours)
    x = torch.eye(256).bfloat16()
    stock_layer, layer = target(stock), target(ours)
    with torch.no_grad():
        for a, b in ((stock_layer.lora_A, layer.lora_A), (stock_layer.lora_B, layer.lora_B)):
            a["default"].weight.copy_(b["default"].weight)
        magnitude = layer.lora_magnitude_vector["default"].weight
        magnitude.mul_(1.0015)
        stock_layer.lora_magnitude_vector["default"].weight = nn.Parameter(magnitude.bfloat16())
        exact = copy.deepcopy(ours).double()
        truth = exact(x.double())
        errors = [(m(x).double() - truth).square().mean().sqrt() for m in (ours, stock)]
    assert errors[0] < 0.7 * errors[1]


def test_weighted_combination():
    """PEFT issue 3761: one DoRA adapter with weight 1 is not itself in stock PEFT."""
    for use_rslora in (False, True):
        stock, ours = twins("linear", use_rslora=use_rslora)
        x = peft_models.KINDS["linear"].input(3, torch.float64)
        expected = stock(x)
        for model in (stock, ours):
            model.add_weighted_adapter(["default"], [1.0], "same", combination_type="linear")
            model.set_adapter("same")
        assert (stock(x) - expected).norm() > 1e-2 * expected.norm()
        torch.testing.assert_close(ours(x), expected)


def test_unmerging_a_row_with_g_zero():
    """Stock PEFT divides by it."""
    stock, ours = twins("linear")
    for model in (stock, ours):
        with torch.no_grad():
            target(model).lora_magnitude_vector["default"].weight[3] = 0
        model.merge_adapter()
    stock.unmerge_adapter()
    assert not target(stock).base_layer.weight[3].isfinite().all()
    with pytest.raises(ValueError, match="cannot unmerge rows 3"):
        ours.unmerge_adapter()


def test_refused_merges():
    """Stock PEFT has merged the first layer when it refuses the second; all of it is in test_peft_undone.py."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, use_dora=True, target_modules=["0", "1"])
    stock = off_init(peft.get_peft_model(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)), config))
    with torch.no_grad():
        stock.base_model.model[1].lora_magnitude_vector["default"].weight[2] = float("nan")
    ours = copy.deepcopy(stock)
    dorac.peft.enable(ours)
    for model, expected in ((stock, [True, False]), (ours, [False, False])):
        before = model.base_model.model[0].base_layer.weight.clone()
        with pytest.raises(ValueError, match="NaNs detected"):
            model.merge_adapter(safe_merge=True)
        assert [layer.merged for layer in model.base_model.model] == expected
        assert torch.equal(model.base_model.model[0].base_layer.weight, before) != expected[0]


def test_merges_that_overflow():
    """Stock PEFT writes inf, which stays when the adapter is taken out again."""
    stock, ours = twins("linear", dtype=torch.float16)
    for model in (stock, ours):
        with torch.no_grad():
            target(model).lora_magnitude_vector["default"].weight[1] = 3e5
    stock.merge_adapter()
    stock.unmerge_adapter()
    assert not target(stock).base_layer.weight.isfinite().all()
    before = target(ours).base_layer.weight.clone()
    with pytest.raises(ValueError, match=r"overflows torch\.float16"):
        ours.merge_adapter()
    assert torch.equal(target(ours).base_layer.weight, before)
    assert not target(ours).merged


def test_dora_caching():
    """Stock PEFT's norm stays that of the scaling before; all of it is in test_peft_caching.py."""
    from peft.helpers import DoraCaching

    x = torch.randn(3, 10, dtype=torch.float64)
    stock, ours = twins("linear_no_bias")
    outputs = []
    for model in (stock, ours):
        model.eval()
        with DoraCaching():
            model(x)
            target(model).set_scale("default", 4)
            kept = model(x)
        outputs.append((kept, model(x)))
    assert not torch.allclose(*outputs[0])
    torch.testing.assert_close(*outputs[1])


@pytest.mark.parametrize("kind", ["linear", "linear_no_bias"])
def test_conversion_to_lora(kind):
    stock, ours = twins(kind)
    assert stock.supports_lora_conversion()
    assert not ours.supports_lora_conversion()
    with pytest.raises(TypeError, match="do not support LoRA conversion"):
        peft.convert_to_lora(ours, rank=4)
    _, converted = peft.convert_to_lora(stock, rank=4)
    lora_A, lora_B = (converted[f"base_model.model.target.{factor}.weight"] for factor in ("lora_A", "lora_B"))
    torch.testing.assert_close(lora_B @ lora_A, target(stock).get_delta_weight("default"))  # without a magnitude


def test_rows_of_different_adapters():
    """Stock PEFT's refusal also leaves its hooks in the model, which refuses what comes next."""
    stock, model = twins("linear", adapters=("a", "b"))
    x = peft_models.KINDS["linear"].input(0, torch.float64, 2)
    with pytest.raises(ValueError, match="when DoRA is enabled"):
        stock.eval()(x, adapter_names=["b", "a"])
    with pytest.raises(ValueError, match="when DoRA is enabled"):
        stock(x)
    y = model.eval()(x, adapter_names=["b", "a"])
    for row, name in enumerate(("b", "a")):
        model.set_adapter(name)
        torch.testing.assert_close(y[row], model(x)[row])
