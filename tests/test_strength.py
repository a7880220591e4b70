"""Strength: ``W + a (W' - W)`` in the functions, in layers, in whole models, merged and differentiated."""

import copy
import pickle

import pytest
import torch
from test_adapters import dense, weight_and_adapters
from test_switching import KINDS, sample, wrapped
from torch import nn

import dorac
from dorac import functional
from dorac.testing import expert_inputs, linear_inputs, max_error

STRENGTHS = (0.0, 0.3, 1.0, 1.7, -0.8)


def dense_strength(weight, adapters, strengths):
    """``W + sum a_i (W'_i - W)`` in float64."""
    weight = weight.double()
    return weight + sum(a * (dense(weight, adapter) - weight) for a, adapter in zip(strengths, adapters, strict=True))


# Functions


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_an_adapter_at_a_strength(strength, dtype):
    weight, (adapter, *_) = weight_and_adapters(dtype=dtype)
    truth = dense_strength(weight, [adapter], [strength])
    size = truth.abs().max() + weight.double().abs().max()
    wide = torch.promote_types(dtype, torch.float32)
    # As a value, in float32: factors and magnitude are rounded a dozen times at most.
    moved = functional.scale_adapter(weight, *adapter[:3], strength, scaling=adapter.scaling)
    assert max_error(dense(weight, moved), truth) <= 12 * torch.finfo(wide).eps * size
    # In place of the tensors, where lora_B is rounded to its dtype once.
    norm = functional.norm_factored(weight, *adapter[:2], adapter.scaling)
    lora_B, magnitude, ones = functional.at_strength(adapter.lora_B, adapter.magnitude, norm, strength)
    assert lora_B.dtype == dtype
    merged = magnitude.double()[:, None] * (
        weight.double() + adapter.scaling * lora_B.double() @ adapter.lora_A.double()
    )
    terms = magnitude.double().abs()[:, None] * (
        abs(adapter.scaling) * lora_B.double().abs() @ adapter.lora_A.double().abs()
    )
    bound = torch.finfo(dtype).eps * terms + 12 * torch.finfo(wide).eps * size
    assert ((merged - truth).abs() <= bound).all()
    x = torch.randn(3, 24, dtype=torch.float64)
    y = functional.dora_linear(
        x,
        weight.double(),
        adapter.lora_A.double(),
        lora_B.double(),
        magnitude.double(),
        scaling=adapter.scaling,
        weight_norm=ones.double(),
    )
    torch.testing.assert_close(y, x @ merged.T)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("experts", [False, True])
def test_0_is_the_base_and_1_the_adapter(dtype, experts):
    """Bit for bit, with a row of zeros in the weight."""
    layer = expert_inputs(3, dtype=dtype) if experts else linear_inputs("odd", dtype=dtype)
    layer.weight[..., 3, :] = 0
    args = (layer.weight, layer.lora_A, layer.lora_B, layer.magnitude)
    off = functional.scale_adapter(*args, 0.0, scaling=0.7)
    merged, _ = functional.merge_weight(layer.weight, *off[:3], scaling=off.scaling)
    assert torch.equal(merged, layer.weight)
    on = functional.scale_adapter(*args, 1.0, scaling=0.7)
    assert all(torch.equal(a, b) for a, b in zip(on[:3], args[1:], strict=True))
    norm = functional.norm_factored(*args[:3], 0.7)
    for one in (1.0, torch.tensor(1.0)):
        lora_B, g, ones = functional.at_strength(layer.lora_B, layer.magnitude, norm, one)
        assert torch.equal(lora_B, layer.lora_B)
        assert torch.equal(functional.magnitude_scale(g, ones), functional.magnitude_scale(layer.magnitude, norm))


def test_zero_rows_learn():
    weight, (adapter, *_) = weight_and_adapters()
    weight[3], adapter.lora_B[3] = 0, 0
    norm = functional.norm_factored(weight, *adapter[:2], adapter.scaling)
    lora_B = adapter.lora_B.clone().requires_grad_()
    moved = functional.at_strength(lora_B, adapter.magnitude, norm, 0.5)
    x = torch.randn(2, 24, dtype=torch.float64)
    y = functional.dora_linear(x, weight, adapter.lora_A, *moved[:2], scaling=2.0, weight_norm=moved[2])
    assert (y[:, 3] == 0).all()
    (d_B,) = torch.autograd.grad(y.sum(), lora_B)
    torch.testing.assert_close(d_B[3], 0.5 * 2.0 * (x @ adapter.lora_A.T).sum(0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rows_that_lose_their_base(dtype):
    """1 + a (g - 1) = 0: g = 1/2 at strength 2, and g = 0 (a zero magnitude) at strength 1."""
    weight, (adapter, *_) = weight_and_adapters(dtype=dtype)
    norm = functional.norm_factored(weight, *adapter[:2], adapter.scaling)
    magnitude = adapter.magnitude.to(norm.dtype).clone()
    magnitude[4], magnitude[5] = norm[4] / 2, 0
    for strength in (2.0, torch.tensor(1.0)):
        lora_B, h, _ = functional.at_strength(adapter.lora_B, magnitude, norm, strength)
        assert lora_B.isfinite().all()
        merged = h.double()[:, None] * (weight.double() + adapter.scaling * lora_B.double() @ adapter.lora_A.double())
        truth = dense_strength(weight, [adapter._replace(magnitude=magnitude)], [float(strength)])
        change = (adapter.scaling * adapter.lora_B.double() @ adapter.lora_A.double()).abs()
        roundings = 4 * torch.finfo(dtype).eps * (weight.double().abs() + change + truth.abs()) * 3
        assert ((merged - truth).abs() <= roundings)[4:6].all()


@pytest.mark.parametrize("weights", [(0.5, 0.3, 0.2), (1.0, 1.0, 1.0), (2.0, -1.0, 0.0), (0.0, 0.0, 0.0)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_combination_is_the_sum_of_the_changes(weights, dtype):
    weight, adapters = weight_and_adapters(dtype=dtype)
    combined = functional.combine_adapters(weight, adapters, weights)
    wide = torch.promote_types(dtype, torch.float32)
    assert combined.lora_A.shape == (9, 24)
    assert all(t.dtype == wide for t in combined[:3])
    truth = dense_strength(weight, adapters, weights)
    size = weight.double().abs().max() + sum(
        abs(w) * dense(weight, a).abs().max() for w, a in zip(weights, adapters, strict=True)
    )
    assert max_error(dense(weight, combined), truth) <= 20 * torch.finfo(wide).eps * size


def test_combination_of_one_is_strength():
    weight, (adapter, *_) = weight_and_adapters()
    moved = functional.scale_adapter(weight, *adapter[:3], 0.4, scaling=adapter.scaling)
    combined = functional.combine_adapters(weight, [adapter], [0.4])
    torch.testing.assert_close(dense(weight, combined), dense(weight, moved))


def test_gradients_are_those_of_the_formula():
    weight, (adapter, *_) = weight_and_adapters()
    x = torch.randn(3, 24, dtype=torch.float64)
    norm = functional.norm_factored(weight, *adapter[:2], adapter.scaling)
    strength = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)
    leaves = [t.clone().requires_grad_() for t in adapter[:3]]

    def ours(lora_A, lora_B, magnitude, a):
        lora_B, m, n = functional.at_strength(lora_B, magnitude, norm, a)
        return functional.dora_linear(x, weight, lora_A, lora_B, m, scaling=adapter.scaling, weight_norm=n)

    def formula(lora_A, lora_B, magnitude, a):
        adapted = (magnitude / norm)[:, None] * (weight + adapter.scaling * lora_B @ lora_A)
        return x @ (weight + a * (adapted - weight)).T

    for a in (strength, torch.tensor(1.8, dtype=torch.float64, requires_grad=True)):
        grads = [torch.autograd.grad(f(*leaves, a).square().sum(), [*leaves, a]) for f in (ours, formula)]
        for mine, truth in zip(*grads, strict=True):
            torch.testing.assert_close(mine, truth)
        assert torch.autograd.gradcheck(ours, (*leaves, a))
        assert torch.autograd.gradgradcheck(ours, (*leaves, a))


WEIGHT, ADAPTERS = weight_and_adapters()
NORM = functional.norm_factored(WEIGHT, *ADAPTERS[0][:2], 1.0)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: functional.at_strength(*ADAPTERS[0][1:3], NORM, float("nan")),
            ValueError,
            "strength must be finite in float32",
        ),
        (lambda: functional.at_strength(*ADAPTERS[0][1:3], NORM, "1"), TypeError, "strength must be a number"),
        (lambda: functional.at_strength(*ADAPTERS[0][1:3], NORM[:3], 1.0), ValueError, "magnitude must be"),
        (
            lambda: functional.at_strength(ADAPTERS[0].lora_B[:5], ADAPTERS[0].magnitude, NORM, 1.0),
            ValueError,
            "weight_norm must be",
        ),
        (
            lambda: functional.scale_adapter(WEIGHT, *ADAPTERS[0][:3], float("inf"), scaling=1.0),
            ValueError,
            "strength must be finite in float32",
        ),
        (lambda: functional.combine_adapters(WEIGHT, ADAPTERS, [1.0]), ValueError, "weights must be one number"),
        (lambda: functional.combine_adapters(WEIGHT[:, :5], ADAPTERS, [1.0] * 3), ValueError, "lora_A must be"),
    ],
)
def test_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


# Layers


def between(base, model, x, strength):
    """What the formula gives of outputs: ``base + a (adapted - base)``."""
    low, high = base(x).double(), model(x).double()
    return low + strength * (high - low)


@KINDS
@pytest.mark.parametrize("strength", STRENGTHS)
def test_layers(kind, strength):
    base, model, x = wrapped(kind)
    x = x.double() if x.is_floating_point() and kind != "nf4" else x
    if kind != "nf4":
        base, model = base.double(), model.double()
    y, scaling = between(base, model, x, strength), model[0].scaling
    dorac.set_strength(model, strength)
    assert model[0].strength == strength
    assert model[0].scaling == scaling
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if kind == "nf4" else {}
    torch.testing.assert_close(model(x).double(), y, **tolerance)
    if strength == 0:
        assert torch.equal(model(x), base(x))
    dorac.set_strength(model, torch.tensor(strength))
    torch.testing.assert_close(model(x).double(), y, **tolerance)
    dorac.set_strength(model, 1)
    torch.testing.assert_close(model(x).double(), between(base, model, x, 1))


@KINDS
def test_training(kind):
    """Gradients are those of ``base + a (adapted - base)``, with the norm's, with cached norms and without."""
    base, model, x = wrapped(kind)
    if kind != "nf4":
        base, model, x = base.double(), model.double(), x.double() if x.is_floating_point() else x
    parameters = [p for p in model.parameters() if p.requires_grad]
    tolerance = {"atol": 1e-4, "rtol": 1e-4} if kind == "nf4" else {}
    for norm_grad in (False,) if kind == "nf4" else (False, True):
        model[0].norm_grad = norm_grad
        truth = torch.autograd.grad((0.4 * model(x) + 0.6 * base(x)).square().sum(), parameters)
        dorac.set_strength(model, 0.4)
        for cached in (False, True)[: 1 if norm_grad else 2]:
            with dorac.cache_norms(model) if cached else torch.enable_grad():
                grads = torch.autograd.grad(model(x).square().sum(), parameters)
            for mine, other in zip(grads, truth, strict=True):
                torch.testing.assert_close(mine, other, **tolerance)
        dorac.set_strength(model, 1)


@pytest.mark.parametrize("dropout_on", ["adapter", "low_rank"])
@pytest.mark.parametrize("kind", ["linear", "conv2d", "nf4"])
def test_dropout(kind, dropout_on):
    base, model, x = wrapped(kind, lora_dropout=0.5, dropout_on=dropout_on)
    torch.manual_seed(3)
    adapted = model(x)
    low = base(x)
    dorac.set_strength(model, 0.3)
    torch.manual_seed(3)
    torch.testing.assert_close(model(x), low + 0.3 * (adapted - low), atol=1e-5, rtol=1e-4)


@KINDS
@pytest.mark.parametrize("strength", [0.0, 0.3, 1.7])
def test_merged_at_a_strength(kind, strength):
    base, model, x = wrapped(kind, **({"grouped_lora_A": True} if kind == "conv2d" else {}))
    dorac.set_strength(model, strength)
    y, weight = model(x), model[0].weight.clone()
    dorac.merge(model)
    if kind == "nf4":  # quantised anew: each element is off by up to 0.152 of the largest of its block, here a row
        largest = (model[0].base_layer(torch.eye(64)) - model[0].bias).abs().amax(0)
        bound = 0.152 * largest * x.abs().sum(-1, keepdim=True)
        assert ((model(x) - y).abs() <= bound).all()
        assert (model(x) - y).abs().mean() < 0.1 * bound.mean()
    else:
        torch.testing.assert_close(model(x), y)
    if strength == 0 and kind != "nf4":
        assert torch.equal(model[0].weight, weight)
    with pytest.raises(ValueError, match="0: the adapter is merged; unmerge it before setting its strength"):
        dorac.set_strength(model, 0.5)
    with dorac.disabled(model):
        torch.testing.assert_close(model(x), base(x))
    dorac.unmerge(model)
    torch.testing.assert_close(model[0].weight, weight)
    torch.testing.assert_close(model(x), y)


def test_rows_whose_base_is_gone_are_not_unmerged():
    _, model, _ = wrapped("linear")
    layer = model[0]
    with torch.no_grad():
        layer.lora_magnitude_vector[4] = layer._norm()[4] / 2
    layer.strength = 2.0
    dorac.merge(model)
    weight = layer.weight.clone()
    with pytest.raises(ValueError, match="cannot unmerge rows 4"):
        dorac.unmerge(model)
    assert torch.equal(layer.weight, weight)


def test_experts():
    transformers = pytest.importorskip("transformers")
    from test_experts_module import CONFIGS

    for family in ("mixtral", "llama4"):
        torch.manual_seed(0)
        config = CONFIGS[family]()
        base = transformers.AutoModelForCausalLM.from_config(config).eval()
        model = copy.deepcopy(base)
        name = next(n for n, m in model.named_modules() if n.endswith(".experts"))
        dorac.apply_dora(model, [name], r=2, init_lora_weights=False)
        experts, plain = model.get_submodule(name), base.get_submodule(name)
        calls = []
        plain.register_forward_pre_hook(lambda _, args, calls=calls: calls.append(args))
        ids = torch.arange(10).view(2, 5)
        base(ids)
        with torch.no_grad():
            low, high = plain(*calls[0]), experts(*calls[0])
            other = copy.deepcopy(experts)
            other.merge()
            target = copy.deepcopy(plain)  # each projection's weight, not the output, is between the two
            for goal, adapted in zip(target.parameters(), other.base_layer.parameters(), strict=True):
                goal += 0.3 * (adapted - goal)
            y = target(*calls[0])
            assert min((y - low).abs().max(), (y - high).abs().max()) > 1e-4
            dorac.set_strength(model, 0.3)
            torch.testing.assert_close(experts(*calls[0]), y)
            with dorac.disabled(model):
                assert torch.equal(experts(*calls[0]), low)
            dorac.merge(model)
            torch.testing.assert_close(experts(*calls[0]), y)


def test_a_learned_strength():
    _, model, x = wrapped("linear")
    a = torch.tensor(0.5, requires_grad=True)
    dorac.set_strength(model, a)
    model(x).square().sum().backward()
    step = 1e-2
    losses = []
    for value in (0.5 + step, 0.5 - step):
        dorac.set_strength(model, value)
        losses.append(model.double()(x.double()).square().sum())
    torch.testing.assert_close(a.grad.double(), (losses[0] - losses[1]) / (2 * step), rtol=1e-3, atol=1e-3)
    with pytest.raises(TypeError, match=r"strength must be a number or a 0-d float tensor, got an nn.Parameter"):
        model[0].strength = nn.Parameter(torch.tensor(0.5))


def test_copies_keep_it_and_state_dicts_do_not():
    _, model, x = wrapped("linear")
    keys = set(model.state_dict())
    dorac.set_strength(model, 0.3)
    y = model(x)
    assert "strength=0.3" in repr(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), y)
    dorac.set_strength(model, 0)
    assert set(model.state_dict()) == keys
    assert torch.equal(copy.deepcopy(model)(x), model[0].base_layer(x))
    with dorac.disabled(model):
        model[0].strength = 0.3
    assert torch.equal(model(x), y)


def test_all_or_nothing():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    dorac.apply_dora(model, ["0", "1"], r=2, init_lora_weights=False)
    model[1].merge()
    with pytest.raises(ValueError, match="1: the adapter is merged"):
        dorac.set_strength(model, 0.0)
    assert model[0].strength == 1
    assert not model[0].runs_base
    with pytest.raises(TypeError, match="strength must be a number"):
        dorac.set_strength(model, None)
    with pytest.raises(ValueError, match="holds no DoRA layer"):
        dorac.set_strength(nn.Linear(2, 2), 1.0)


@sample("linear")
def test_compiled(kind):
    """A graph for strength 1, one for 0 and two for others (the second has it symbolic); then none."""
    base, model, x = wrapped(kind)
    run = torch.compile(model, fullgraph=True, backend="aot_eager")
    low, high = base(x), model(x)
    for strength in (1.0, 0.0, 0.5, 0.7):
        dorac.set_strength(model, strength)
        run(x).sum()
    with torch.compiler.set_stance("fail_on_recompile"):
        for strength in (1.0, 0.3, 0.0, 1.7, 1.0, 0.5):
            dorac.set_strength(model, strength)
            torch.testing.assert_close(run(x), low + strength * (high - low))


def test_strength_keeps_the_cached_norm():
    _, model, x = wrapped("linear")
    y = between(model[0].base_layer, model, x, 0.3)
    dorac.cache_norms(model)
    norm, version = model[0].kept.norm, model[0].kept.norm._version
    dorac.set_strength(model, 0.3)
    torch.testing.assert_close(model(x).double(), y, rtol=1e-4, atol=1e-5)
    assert model[0].kept.norm is norm
    assert norm._version == version
