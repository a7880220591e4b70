"""Adapters of the drop-in written into the weights and taken out, in files, and combined."""

import copy
import json

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft")

from peft_models import KINDS, Holder, off_init, stock_model, target, twins  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

import dorac.peft  # noqa: E402

TIGHT = {"rtol": 1e-10, "atol": 1e-12}


@pytest.mark.parametrize("safe_merge", [False, True], ids=["unsafe", "safe"])
@pytest.mark.parametrize("kind", KINDS)
def test_merge_and_unmerge(kind, safe_merge):
    """Two adapters in sequence: the merged output is the unmerged one, stock PEFT's weights, and back."""
    stock, ours = twins(kind, adapters=("one", "two"))
    original = target(ours).base_layer.weight.detach().clone()
    x = KINDS[kind].input(3, torch.float64)
    for model in (stock, ours):
        model.base_model.set_adapter(["one", "two"])
    expected = ours(x)
    for model in (stock, ours):
        model.merge_adapter(safe_merge=safe_merge)
    torch.testing.assert_close(target(ours).base_layer.weight, target(stock).base_layer.weight, **TIGHT)
    assert target(ours).base_layer.weight.stride() == original.stride()
    torch.testing.assert_close(ours(x), expected, **TIGHT)
    ours.unmerge_adapter()
    torch.testing.assert_close(target(ours).base_layer.weight.detach(), original, **TIGHT)
    torch.testing.assert_close(ours(x), expected, **TIGHT)


@pytest.mark.parametrize("kind", KINDS)
def test_merge_and_unload(kind):
    _, ours = twins(kind)
    x = KINDS[kind].input(3, torch.float64)
    expected = ours(x)
    plain = ours.merge_and_unload()
    assert type(plain.target) is type(KINDS[kind].layer())
    torch.testing.assert_close(plain(x), expected, **TIGHT)


@pytest.mark.parametrize("kind", ["conv2d", "conv3d"])
def test_channels_last_weights_stay_so(kind):
    layout = torch.channels_last if kind == "conv2d" else torch.channels_last_3d
    _, ours = twins(kind)
    layer = target(ours)
    layer.base_layer.weight.data = layer.base_layer.weight.data.to(memory_format=layout)
    original = layer.base_layer.weight.detach().clone()
    x = KINDS[kind].input(3, torch.float64)
    expected = ours(x)
    ours.merge_adapter()
    assert layer.base_layer.weight.is_contiguous(memory_format=layout)
    torch.testing.assert_close(ours(x), expected, **TIGHT)
    ours.unmerge_adapter()
    torch.testing.assert_close(layer.base_layer.weight.detach(), original, **TIGHT)


@pytest.mark.parametrize("kind", ["linear", "gpt2_conv1d", "embedding", "conv2d"])
def test_merged_under_one_unmerged_under_the_other(kind):
    """The drop-in can be switched while an adapter is merged."""
    for first_on_dorac in (True, False):
        _, model = twins(kind)
        original = target(model).base_layer.weight.detach().clone()
        (dorac.peft.enable if first_on_dorac else dorac.peft.disable)(model)
        model.merge_adapter()
        (dorac.peft.disable if first_on_dorac else dorac.peft.enable)(model)
        model.unmerge_adapter()
        torch.testing.assert_close(target(model).base_layer.weight.detach(), original, **TIGHT)


def test_a_row_with_g_zero_cannot_be_unmerged():
    """It is refused by its number and the layer stays merged, where stock PEFT fills the row with NaN."""
    _, ours = twins("linear")
    layer = target(ours)
    with torch.no_grad():
        layer.lora_magnitude_vector["default"].weight[3] = 0
    ours.merge_adapter()
    x = KINDS["linear"].input(3, torch.float64)
    expected = ours(x)
    for _ in range(2):
        with pytest.raises(ValueError, match="cannot unmerge rows 3"):
            ours.unmerge_adapter()
        assert layer.merged_adapters == ["default"]
        torch.testing.assert_close(ours(x), expected, rtol=0, atol=0)
    with torch.no_grad():
        layer.lora_magnitude_vector["default"].weight[3] = 1


@pytest.mark.parametrize("kind", ["linear", "embedding", "conv2d"])
def test_nothing_is_loaded_in_the_place_of_a_merged_adapter(kind, tmp_path):
    """Unmerging takes out what the adapter holds then: of stock PEFT the base weight would be another one, unseen."""
    stock_model(kind, seed=5).save_pretrained(tmp_path)
    _, model = twins(kind)
    base = target(model).get_base_layer().weight
    weight = base.detach().clone()
    model.merge_adapter()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"target: the adapter 'default' is merged: call unmerge_adapter\(\) before"):
        model.load_adapter(tmp_path, "default")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    model.load_adapter(tmp_path, "beside")
    model.load_state_dict(model.state_dict())  # that of the merged model, which has the merged weight
    model.unmerge_adapter()
    torch.testing.assert_close(base, weight)
    model.load_adapter(tmp_path, "default")


def test_half_weights_are_rounded_once():
    """The merged weight beside float64: no further off than stock PEFT's."""
    for dtype in (torch.bfloat16, torch.float16):
        stock, ours = twins("linear", dtype=dtype, autocast_adapter_dtype=False)
        exact = copy.deepcopy(stock).double()
        for model in (stock, ours, exact):
            model.merge_adapter()
        truth = target(exact).base_layer.weight
        errors = [(target(m).base_layer.weight.double() - truth).square().mean() for m in (ours, stock)]
        assert errors[0] < errors[1]


# Files


@pytest.mark.parametrize("autocast_adapter_dtype", [True, False], ids=["fp32_adapter", "half_adapter"])
@pytest.mark.parametrize("kind", ["linear", "gpt2_conv1d", "embedding", "conv1d", "conv2d", "conv3d"])
def test_checkpoints_in_both_directions(kind, autocast_adapter_dtype, tmp_path):
    """Keys, shapes, dtypes and config are stock PEFT's, and either side reads what the other wrote."""
    stock, ours = twins(kind, dtype=torch.bfloat16, use_rslora=True, autocast_adapter_dtype=autocast_adapter_dtype)
    x = KINDS[kind].input(3, torch.bfloat16)
    for name, model in (("stock", stock), ("ours", ours)):
        model.save_pretrained(tmp_path / name)
    written, expected = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("ours", "stock"))
    assert {k: (v.shape, v.dtype) for k, v in written.items()} == {k: (v.shape, v.dtype) for k, v in expected.items()}
    configs = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("ours", "stock")]
    assert configs[0] == configs[1]

    def base():
        torch.manual_seed(1)
        return Holder(KINDS[kind].layer()).to(torch.bfloat16)

    options = {"autocast_adapter_dtype": autocast_adapter_dtype}
    from_ours = peft.PeftModel.from_pretrained(base(), tmp_path / "ours", **options)
    torch.testing.assert_close(from_ours(x), stock(x), rtol=0, atol=0)
    for low_cpu_mem_usage in (False, True):
        options["low_cpu_mem_usage"] = low_cpu_mem_usage
        expected = peft.PeftModel.from_pretrained(base(), tmp_path / "stock", **options)
        with dorac.peft.enable():
            loaded = peft.PeftModel.from_pretrained(base(), tmp_path / "stock", **options)
            assert isinstance(target(loaded).lora_magnitude_vector["default"], dorac.peft.DoraLinearLayer)
            for (name, value), (_, other) in zip(loaded.named_parameters(), expected.named_parameters(), strict=True):
                if low_cpu_mem_usage and "magnitude" in name:  # ours is not rounded
                    value = value.to(torch.bfloat16).to(other.dtype)
                torch.testing.assert_close(value, other, rtol=0, atol=0, check_dtype="magnitude" not in name)
            if (
                not low_cpu_mem_usage
            ):  # which rounds float32 adapters to the base weight's dtype, but for our magnitudes
                torch.testing.assert_close(loaded(x), ours(x), rtol=0, atol=0)


def test_built_on_dorac_saved_as_pefts(tmp_path):
    """With PEFT's default of float32 adapters a model that was built on dorac has stock PEFT's dtypes in its file."""
    with dorac.peft.enable():
        ours = stock_model("linear", dtype=torch.bfloat16)
    ours.save_pretrained(tmp_path)
    assert {v.dtype for v in load_file(tmp_path / "adapter_model.safetensors").values()} == {torch.float32}


# Weighted combinations


def change(model, adapter):
    """``g * (W + D) - W`` of one adapter, as its merged base weight says it."""
    model = copy.deepcopy(model)
    before = target(model).base_layer.weight.detach().clone()
    model.set_adapter(adapter)
    model.merge_adapter()
    return target(model).base_layer.weight.detach() - before


def combined(kind, *args, ranks=(2, 2), **options):
    _, ours = twins(kind, adapters=("one",), r=ranks[0])
    config = peft.LoraConfig(
        r=ranks[1], lora_alpha=5, use_dora=True, target_modules=["target"], **KINDS[kind].options | options
    )
    ours.add_adapter("two", config)
    return off_init(ours)


@pytest.mark.parametrize("use_rslora", [False, True], ids=["plain", "rs"])
@pytest.mark.parametrize("combination", ["linear", "cat", "svd"])
@pytest.mark.parametrize("kind", KINDS)
def test_one_adapter_with_weight_one_is_itself(kind, combination, use_rslora):
    _, ours = twins(kind, use_rslora=use_rslora)
    ours.add_weighted_adapter(["default"], [1.0], "same", combination_type=combination)
    torch.testing.assert_close(change(ours, "same"), change(ours, "default"), **TIGHT)


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1.5, -0.4)], ids=["mean", "difference"])
@pytest.mark.parametrize("combination", ["cat", "svd"])
@pytest.mark.parametrize("kind", KINDS)
def test_weighted_changes(kind, combination, weights):
    """ "cat", and "svd" with rank enough, change the weight by the weighted sum of what the adapters change."""
    ours = combined(kind, ranks=(2, 3))
    rank = {"svd_rank": 5} if combination == "svd" else {}
    x = KINDS[kind].input(3, torch.float64)
    before = ours(x)
    ours.add_weighted_adapter(["one", "two"], list(weights), "both", combination_type=combination, **rank)
    expected = weights[0] * change(ours, "one") + weights[1] * change(ours, "two")
    torch.testing.assert_close(change(ours, "both"), expected, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(ours(x), before, rtol=0, atol=0)  # the active adapter is still the first
    assert not any(p.requires_grad for n, p in ours.named_parameters() if "both" in n)


def test_svd_keeps_the_largest_singular_values():
    """At a lower rank, D is the best approximation of the exact D, and c is exact."""
    ours = combined("linear", ranks=(3, 4))
    for name, kind, options in (("exact", "cat", {}), ("low", "svd", {"svd_rank": 2})):
        ours.add_weighted_adapter(["one", "two"], [0.6, 0.8], name, combination_type=kind, **options)
    layer = target(ours)

    def parts(name):
        low_rank = layer.lora_B[name].weight @ layer.lora_A[name].weight * layer.scaling[name]
        norm = torch.linalg.vector_norm(layer.base_layer.weight + low_rank, dim=1)
        return low_rank, layer.lora_magnitude_vector[name].weight / norm

    (exact, scale), (low, low_scale) = parts("exact"), parts("low")
    u, s, vh = torch.linalg.svd(exact)
    torch.testing.assert_close(low, u[:, :2] * s[:2] @ vh[:2], rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(low_scale, scale, **TIGHT)


def test_linear_adds_factors():
    """``A = sum sqrt(w s) A_i``, ``B = sum sqrt(w s) g_i / c B_i``, signs on A."""
    ours = combined("linear")
    layer = target(ours)
    scales = []
    for name in ("one", "two"):
        low_rank = layer.lora_B[name].weight @ layer.lora_A[name].weight * layer.scaling[name]
        norm = torch.linalg.vector_norm(layer.base_layer.weight + low_rank, dim=1)
        scales.append(layer.lora_magnitude_vector[name].weight / norm)
    weights = (0.9, -0.2)
    c = 1 + sum(w * (g - 1) for w, g in zip(weights, scales, strict=True))
    roots = [abs(w * layer.scaling[n]) ** 0.5 for w, n in zip(weights, ("one", "two"), strict=True)]
    lora_A = roots[0] * layer.lora_A["one"].weight - roots[1] * layer.lora_A["two"].weight
    lora_B = sum(
        q * (g / c)[:, None] * layer.lora_B[n].weight for q, g, n in zip(roots, scales, ("one", "two"), strict=True)
    )
    ours.add_weighted_adapter(["one", "two"], list(weights), "both", combination_type="linear")
    torch.testing.assert_close(layer.lora_A["both"].weight, lora_A, **TIGHT)
    torch.testing.assert_close(layer.lora_B["both"].weight, lora_B, **TIGHT)
    norm = torch.linalg.vector_norm(layer.base_layer.weight + lora_B @ lora_A, dim=1)
    torch.testing.assert_close(layer.lora_magnitude_vector["both"].weight, c * norm, **TIGHT)


def test_a_layer_that_one_adapter_leaves_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4)).double()
    config = {"r": 2, "use_dora": True}
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"], **config), adapter_name="one")
    model.add_adapter("two", peft.LoraConfig(target_modules=["0", "1"], **config))
    off_init(model)
    dorac.peft.enable(model)
    model.add_weighted_adapter(["one", "two"], [0.5, 0.25], "both", combination_type="cat")

    def merged(name):
        merged = copy.deepcopy(model)
        merged.set_adapter(name)
        merged = merged.merge_and_unload()
        return torch.cat([layer.weight.detach().flatten() for layer in merged])

    with model.disable_adapter():
        base = torch.cat([m.base_layer.weight.detach().flatten() for m in model.base_model.model])
    expected = base + 0.5 * (merged("one") - base) + 0.25 * (merged("two") - base)
    torch.testing.assert_close(merged("both"), expected, rtol=1e-8, atol=1e-10)


def test_grouped_convolutions_combine():
    torch.manual_seed(0)
    model = Holder(nn.Conv2d(4, 6, 3, groups=2)).double()
    config = {"use_dora": True, "target_modules": ["target"]}
    with pytest.warns(UserWarning, match="groups > 1"):
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, **config), adapter_name="one")
    model.add_adapter("two", peft.LoraConfig(r=4, **config))
    off_init(model)
    dorac.peft.enable(model)
    x = torch.randn(2, 4, 6, 6, dtype=torch.float64)
    outputs = {}
    for kind, options in (("cat", {}), ("svd", {"svd_rank": 6})):
        model.add_weighted_adapter(["one", "two"], [0.5, 0.25], kind, combination_type=kind, **options)
    for name in ("one", "two", "cat", "svd"):
        model.set_adapter(name)
        outputs[name] = model(x)
    with model.disable_adapter():
        base = model(x)
    expected = base + 0.5 * (outputs["one"] - base) + 0.25 * (outputs["two"] - base)
    torch.testing.assert_close(outputs["cat"], expected, rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(outputs["svd"], expected, rtol=1e-8, atol=1e-10)
    with pytest.raises(ValueError, match="divisible by the groups of target, 2, got 3"):
        model.add_weighted_adapter(["one", "two"], [0.5, 0.25], "odd", combination_type="svd", svd_rank=3)


REFUSED = {
    "ties": ({"combination_type": "ties", "density": 0.5}, "one of linear, cat, svd for DoRA adapters, got 'ties'"),
    "dare": ({"combination_type": "dare_linear_svd", "density": 0.5}, "got 'dare_linear_svd'"),
    "prune": ({"combination_type": "magnitude_prune", "density": 0.5}, "got 'magnitude_prune'"),
    "weights": ({"weights": [1.0]}, "weights must be one for each of the 2 adapters, got 1"),
    "mixed": ({"adapters": ["one", "plain"]}, "adapters must all be DoRA's to be combined, and plain are not"),
    "unknown": ({"adapters": ["one", "none"]}, "Adapter none does not exist"),
    "no base": ({"weights": [-1.0, 0.0]}, "leaves row 2 of target without its base weight"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_combinations_change_nothing(case):
    arguments, message = REFUSED[case]
    ours = combined("linear")
    ours.add_adapter("plain", peft.LoraConfig(r=2, target_modules=["target"]))
    if case == "no base":  # g = 2 in one row, so that c = 1 - (2 - 1) = 0
        layer = target(ours)
        with torch.no_grad():
            layer.lora_B["one"].weight[2] = 0
            layer.base_layer.weight[2] = torch.eye(10, dtype=torch.float64)[0]
            layer.lora_magnitude_vector["one"].weight[2] = 2
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    arguments = {"adapters": ["one", "two"], "weights": [0.5, 0.5], "combination_type": "cat"} | arguments
    with pytest.raises(ValueError, match=message):
        ours.add_weighted_adapter(adapter_name="new", **arguments)
    assert set(ours.peft_config) == {"one", "two", "plain"}
    assert before.keys() == ours.state_dict().keys()
    torch.testing.assert_close(dict(ours.state_dict()), before, rtol=0, atol=0)


def test_plain_lora_combines_as_ever():
    stock, ours = twins("linear")
    for model in (stock, ours):
        for name, seed in (("one", 1), ("two", 2)):
            torch.manual_seed(seed)
            model.add_adapter(name, peft.LoraConfig(r=2, target_modules=["target"], init_lora_weights=False))
        model.add_weighted_adapter(["one", "two"], [0.5, 0.5], "both", combination_type="ties", density=0.5)
    torch.testing.assert_close(dict(ours.state_dict()), dict(stock.state_dict()), rtol=0, atol=0)
