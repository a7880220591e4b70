"""Strength through the drop-in: every scale of PEFT's means ``W + a (W' - W)``, merged, cached and compiled too."""

import copy

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")

from peft.helpers import DoraCaching, rescale_adapter_scale  # noqa: E402
from peft_models import KINDS, off_init, stock_model, target, twins  # noqa: E402

import dorac  # noqa: E402
import dorac.peft  # noqa: E402
from dorac import functional  # noqa: E402
from dorac.testing import releases  # noqa: E402

FULL = pytest.mark.full
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)
STRENGTHS = (0.0, 0.3, 1.7, -0.8)


@pytest.fixture(autouse=True)
def _stock_afterwards():
    yield
    dorac.peft.disable()


def low_and_high(model, x):
    """The outputs without the adapters and with them."""
    with torch.no_grad(), dorac.disabled(model):
        low = model(x)
    return low, model(x).detach()


@EVERY_KIND
@pytest.mark.parametrize("strength", STRENGTHS)
def test_every_way_to_scale(kind, strength):
    _, model = twins(kind)
    x, layer = KINDS[kind].input(0, torch.float64), target(model)
    low, high = low_and_high(model, x)
    own, y = layer.scaling["default"], low + strength * (high - low)
    layer.set_scale("default", strength)
    torch.testing.assert_close(model(x), y)
    if strength == 0:
        assert torch.equal(model(x), low)
    layer.set_scale("default", 1)
    assert torch.equal(model(x), high)
    with rescale_adapter_scale(model, strength):
        torch.testing.assert_close(model(x), y)
    assert torch.equal(model(x), high)
    layer.scale_layer(strength)  # PEFT's passes embeddings by
    torch.testing.assert_close(model(x), y)
    if strength:
        layer.unscale_layer(strength)
        assert torch.equal(model(x), high)
        layer.scale_layer(strength)
    layer.unscale_layer()
    assert torch.equal(model(x), high)
    dorac.set_strength(model, strength)
    torch.testing.assert_close(model(x), y)
    dorac.set_strength(model, 1)
    assert layer.scaling["default"] == own
    assert model.peft_config["default"].lora_alpha == 3


def test_scaled_and_taken_back_is_the_adapter_bit_for_bit():
    """A division does not always take a multiplication back; the strength 1 - 1e-16 is meant to be 1."""
    _, model = twins("linear", dtype=torch.float32)
    x, layer = KINDS["linear"].input(0, torch.float32), target(model)
    y = model(x)
    odd = [a / 1000 for a in range(1, 1000) if 1.5 * (a / 1000) / (a / 1000) != 1.5]
    assert odd
    for a in odd[:5]:
        layer.scale_layer(a)
        layer.unscale_layer(a)
        assert layer.scaling["default"] != 1.5
        assert torch.equal(model(x), y)
        layer.unscale_layer()


@pytest.mark.parametrize("kind", ["linear", "embedding", "conv2d"])
def test_training(kind):
    _, model = twins(kind)
    x = KINDS[kind].input(0, torch.float64)
    parameters = [p for p in model.parameters() if p.requires_grad]
    low, _ = low_and_high(model, x)
    truth = torch.autograd.grad((0.4 * model(x) + 0.6 * low).square().sum(), parameters)
    target(model).set_scale("default", 0.4)
    handle = target(model).get_base_layer().register_forward_hook(lambda *_: None)  # PEFT's sequence runs
    hooked = torch.autograd.grad(model(x).square().sum(), parameters)
    handle.remove()
    for grads in (hooked, torch.autograd.grad(model(x).square().sum(), parameters)):
        for mine, other in zip(grads, truth, strict=True):
            torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("dropout_on", ["adapter", "low_rank"])
@pytest.mark.parametrize("kind", ["linear", "conv2d"])
def test_dropout_and_several_adapters(kind, dropout_on):
    stock = stock_model(kind, adapters=("default", "other"), lora_dropout=0.5)
    dorac.peft.enable(stock, dropout_on=dropout_on)
    model, x, layer = stock, KINDS[kind].input(0, torch.float64), target(stock)

    def run(names, **scales):
        model.base_model.set_adapter(names)
        for name in ("default", "other"):
            layer.set_scale(name, scales.get(name, 1))
        torch.manual_seed(3)
        return model(x)

    low, _ = low_and_high(model, x)
    high = run(["other"])
    torch.testing.assert_close(run(["other"], other=0.3), low + 0.3 * (high - low))
    model.eval()
    for first, second in (("default", "other"), ("other", "default")):
        torch.testing.assert_close(run([first, second], **{first: 0}), run([second]))
        torch.testing.assert_close(run([first, second], **{second: 0}), run([first]))
        before, after = run([first]), run([first, second])
        torch.testing.assert_close(run([first, second], **{second: 0.3}), before + 0.3 * (after - before))


@pytest.mark.parametrize("kind", ["linear", "gpt2_conv1d", "embedding", "conv2d"])
@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("safe", [False, True])
def test_merged_at_a_strength(kind, strength, safe):
    _, model = twins(kind, dtype=torch.float32)
    x, layer = KINDS[kind].input(0, torch.float32), target(model)
    weight = layer.get_base_layer().weight.clone()
    layer.set_scale("default", strength)
    y = model(x)
    model.merge_adapter(safe_merge=safe)
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-5)
    if strength == 0:
        assert torch.equal(layer.get_base_layer().weight, weight)
    layer.set_scale("default", 1)  # merged is merged
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(layer.get_base_layer().weight, weight, rtol=1e-4, atol=1e-5)
    layer.set_scale("default", strength)
    torch.testing.assert_close(model(x), y)
    merged = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(merged(x), y, rtol=1e-4, atol=1e-5)


def test_rows_whose_base_is_gone_are_not_unmerged():
    _, model = twins("linear")
    layer = target(model)
    magnitude = layer.lora_magnitude_vector["default"]
    with torch.no_grad():
        norm = magnitude.factored_norm(
            layer.weight, layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]
        )
        magnitude.weight[4] = norm[4] / 2
    layer.set_scale("default", 2)
    model.merge_adapter()
    with pytest.raises(ValueError, match="cannot unmerge rows 4"):
        model.unmerge_adapter()
    assert layer.merged_adapters == ["default"]


@pytest.mark.parametrize("kind", ["linear", "embedding", "conv2d"])
@pytest.mark.parametrize("weights", [(0.5, 0.25), (1.0, 1.0), (2.0, -0.5)])
def test_weights_agree_everywhere(kind, weights):
    """``add_weighted_adapter`` ("cat"), strengths of both adapters, and ``combine_adapters`` of the functions."""
    _, model = twins(kind, adapters=("one", "two"))
    x, layer = KINDS[kind].input(0, torch.float64), target(model)
    low, changes = None, []
    for name in ("one", "two"):
        model.set_adapter(name)
        low, high = low_and_high(model, x)
        changes.append(high - low)
    y = low + weights[0] * changes[0] + weights[1] * changes[1]
    model.add_weighted_adapter(["one", "two"], list(weights), "both", combination_type="cat")
    model.set_adapter("both")
    torch.testing.assert_close(model(x), y)
    layer.set_scale("one", 0.5)  # an adapter at a strength counts for so much less
    model.add_weighted_adapter(["one", "two"], [2 * weights[0], weights[1]], "again", combination_type="cat")
    model.set_adapter("again")
    torch.testing.assert_close(model(x), y)
    layer.set_scale("one", 1)
    if kind == "linear":
        adapters = [
            functional.Adapter(
                layer.lora_A[n].weight,
                layer.lora_B[n].weight,
                layer.lora_magnitude_vector[n].weight,
                layer.scaling[n],
            )
            for n in ("one", "two")
        ]
        combined = functional.combine_adapters(layer.weight, adapters, weights)
        ours = functional.dora_linear(x, layer.weight, *combined[:3], layer.bias, scaling=combined.scaling)
        torch.testing.assert_close(ours, y)


@pytest.mark.parametrize("cached", [False, True])
def test_over_a_hooked_layer_and_cached_norms(cached):
    """PEFT's sequence, with ``dora_over``; a strength takes no norm anew."""
    _, model = twins("linear", dtype=torch.float32)
    x, layer = KINDS["linear"].input(0, torch.float32), target(model)
    layer.get_base_layer().register_forward_hook(lambda *_: None)
    low, high = low_and_high(model, x)
    if cached:
        dorac.cache_norms(model)
        keeper = layer.lora_magnitude_vector["default"].keeper
        model(x)
        version = keeper.kept.norm._version
    for strength in STRENGTHS:
        layer.set_scale("default", strength)
        torch.testing.assert_close(model(x), low + strength * (high - low), rtol=1e-4, atol=1e-5)
        if strength == 0:
            assert torch.equal(model(x), low)
    if cached:
        assert keeper.kept.norm._version == version


def test_norms_of_dora_caching_stay():
    _, model = twins("linear", dtype=torch.float32)
    x, layer = KINDS["linear"].input(0, torch.float32), target(model.eval())
    low, high = low_and_high(model, x)
    magnitude = layer.lora_magnitude_vector["default"]
    with DoraCaching():
        model(x)
        (kept,) = magnitude._dora_cache.values()
        layer.set_scale("default", 0.3)
        torch.testing.assert_close(model(x), low + 0.3 * (high - low))
        (again,) = magnitude._dora_cache.values()
        assert again[1] is kept[1]


@pytest.mark.parametrize(
    "kind", ["linear", *(pytest.param(k, marks=pytest.mark.full) for k in ("embedding", "conv2d"))]
)
@pytest.mark.parametrize("cached", [False, True])
def test_compiled(kind, cached):
    """One graph for the adapter, two for other strengths (in the second they are symbolic); then none."""
    _, model = twins(kind, dtype=torch.float32)
    x, layer = KINDS[kind].input(0, torch.float32), target(model)
    low, high = low_and_high(model, x)
    if cached:
        dorac.cache_norms(model)
    run = torch.compile(model, fullgraph=True, backend="aot_eager")
    for strength in (1, 0, 0.5):
        layer.set_scale("default", strength)
        run(x)
    with torch.compiler.set_stance("fail_on_recompile" if releases.COMPARES_SYMBOLIC_FLOATS else "default"):
        for strength in (1, 0.3, 0, 1.7, 1, 0.5):
            layer.set_scale("default", strength)
            torch.testing.assert_close(run(x), low + strength * (high - low), rtol=1e-4, atol=1e-5)


def test_own_scaling_from_start_to_end():
    """Built stock and scaled before it is enabled, disabled, copied, added to, rank-stabilised."""
    stock = stock_model("linear", use_rslora=True)
    x = KINDS["linear"].input(0, torch.float64)
    own = target(stock).scaling["default"]
    target(stock).set_scale("default", 0.5)
    before = stock(x)
    model = copy.deepcopy(stock)
    dorac.peft.enable(model)
    half = model(x)
    target(model).set_scale("default", 1)
    low, high = low_and_high(model, x)
    assert target(model).scaling["default"] == own
    torch.testing.assert_close(half, low + 0.5 * (high - low))
    assert not torch.allclose(half, before)
    copied = copy.deepcopy(model)
    target(copied).set_scale("default", 0.5)
    torch.testing.assert_close(copied(x), half)
    model.add_adapter("new", peft.LoraConfig(r=3, lora_alpha=7, target_modules=["target"], use_dora=True))
    off_init(model)
    model.set_adapter("new")
    low, high = low_and_high(model, x)
    target(model).set_scale("new", 0.5)
    torch.testing.assert_close(model(x), low + 0.5 * (high - low))
    dorac.peft.disable(model)
    assert not any("own_scaling" in vars(m) for m in model.modules())
    target(copied).set_scale("default", 0.5)
    dorac.peft.disable(copied)
    torch.testing.assert_close(copied(x), before)


def test_built_while_enabled():
    with dorac.peft.enable():
        model = stock_model("linear", lora_alpha=5)
        x = KINDS["linear"].input(0, torch.float64)
        low, high = low_and_high(model, x)
        target(model).set_scale("default", 0.5)
        torch.testing.assert_close(model(x), low + 0.5 * (high - low))


def test_a_scaling_of_zero_is_no_strength():
    _, model = twins("linear", lora_alpha=0)
    x = KINDS["linear"].input(0, torch.float64)
    y = model(x)
    assert not torch.allclose(y, target(model).get_base_layer()(x))  # the magnitude is off its norm
    target(model).set_scale("default", 0.5)
    assert torch.equal(model(x), y)


def test_strength_of_a_model_with_both_ways():
    _, model = twins("linear", dtype=torch.float32)
    other = nn.Sequential(nn.Linear(12, 4))
    dorac.apply_dora(other, ["0"], r=2, init_lora_weights=False)
    both = nn.Sequential(model, *other)
    dorac.set_strength(both, 0.5)
    assert both[1].strength == 0.5
    assert target(model).scaling["default"] == 0.75
    with pytest.raises(TypeError, match="strength must be a number"):
        dorac.set_strength(both, torch.tensor(0.5))
    assert both[1].strength == 0.5


@pytest.mark.parametrize("active", [["plain"], ["default", "plain"], ["plain", "default"]], ids=" ".join)
@pytest.mark.parametrize("kind", ["linear", "embedding", "conv2d"])
def test_strength_of_plain_lora_beside_dora(kind, active):
    _, model = twins(kind)
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["target"], init_lora_weights=False)
    model.add_adapter("plain", config)
    model.double().base_model.set_adapter(active)
    x = KINDS[kind].input(0, torch.float64)
    low, high = low_and_high(model, x)
    assert not torch.allclose(low, high)
    dorac.set_strength(model, 0)
    assert torch.equal(model(x), low)
    if active == ["plain"]:
        dorac.set_strength(model, 0.3)
        torch.testing.assert_close(model(x), low + 0.3 * (high - low))
    dorac.set_strength(model, 1)
    assert torch.equal(model(x), high)


def test_the_strength_of_merged_adapters_is_refused():
    """Setting it would change nothing: merged is merged."""
    _, model = twins("linear")
    other = nn.Sequential(nn.Linear(12, 4))
    dorac.apply_dora(other, ["0"], r=2, init_lora_weights=False)
    both = nn.Sequential(model, *other)
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"^PEFT's adapters are merged: call unmerge_adapter\(\) before"):
        dorac.set_strength(both, 0.5)
    assert target(model).scaling["default"] == 1.5
    assert both[1].strength == 1
    model.unmerge_adapter()
    dorac.set_strength(both, 0.5)
    assert target(model).scaling["default"] == 0.75


def test_weights_of_diffusers(tmp_path):
    """``set_adapters(..., weights)``, ``fuse_lora`` at a scale, and ``hotswap`` of a UNet's adapter."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=2,
        norm_num_groups=4,
    ).eval()
    name = "mid_block.resnets.0.conv1"  # the block is linear in what the first of its convolutions makes
    config = {"r": 2, "lora_alpha": 3, "use_dora": True, "target_modules": [name, "to_q"]}
    with dorac.peft.enable():
        for adapter in ("one", "two"):
            unet.add_adapter(peft.LoraConfig(**config), adapter_name=adapter)
    dorac.peft.enable(unet)
    off_init(unet)
    layer, x = unet.get_submodule(name), torch.randn(2, 16, 4, 4)
    with torch.no_grad():
        unet.set_adapters("one")
        low, high = layer.base_layer(x), layer(x)
        assert not torch.allclose(low, high, atol=1e-3)
        unet.set_adapters("one", 0.3)
        torch.testing.assert_close(layer(x), low + 0.3 * (high - low))
        unet.set_adapters(["one", "two"], [0.3, 0.0])
        torch.testing.assert_close(layer(x), low + 0.3 * (high - low))
        unet.set_adapters("one", 1.0)
        unet.fuse_lora(lora_scale=0.3)
        torch.testing.assert_close(layer(x), low + 0.3 * (high - low), rtol=1e-4, atol=1e-5)
        unet.unfuse_lora()
        torch.testing.assert_close(layer.base_layer(x), low, rtol=1e-4, atol=1e-5)
