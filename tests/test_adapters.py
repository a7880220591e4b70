"""Strength, weighted sums and stacks of adapters, against the dense formulas."""

import pytest
import torch
from torch import nn

from dorac import functional, reference
from dorac.functional import Adapter
from dorac.nn import DoraLinear
from dorac.testing import Sums, expert_inputs, layer_budgets, linear_inputs, max_error, norm_budget

SCALINGS = (0.7, -1.3, 2.0)
STRENGTHS = (0.0, 0.5, 1.0, -1.0, 2.0)


def weight_and_adapters(ranks=(3, 5, 1), dtype=torch.float64, factor_dtype=None):
    """One weight and adapters of several ranks, each far from its base and from the others."""
    weight = linear_inputs((1, 17, 24, 1), dtype=dtype).weight
    adapters = []
    for seed, (rank, scaling) in enumerate(zip(ranks, SCALINGS, strict=False)):
        layer = linear_inputs((1, 17, 24, rank), dtype=dtype, factor_dtype=factor_dtype, seed=seed)
        adapters.append(Adapter(layer.lora_A, layer.lora_B, layer.magnitude, scaling))
    return weight, adapters


def dense(weight, adapter):
    """The adapted weight in float64."""
    weight, *tensors = (t.double() for t in (weight, *adapter[:3]))
    norm = reference.row_norm(weight, *tensors[:2], adapter.scaling)
    return reference.merge_weight(weight, *tensors, scaling=adapter.scaling, weight_norm=norm)


def dense_combination(weight, adapters, weights):
    """``(||W|| + sum w_i (m_i - ||W||)) * V / ||V||`` with ``V = W + sum w_i s_i B_i A_i``, in float64."""
    weight = weight.double()
    norm = torch.linalg.vector_norm(weight, dim=-1)
    direction, magnitude = weight.clone(), norm.clone()
    for adapter, share in zip(adapters, weights, strict=True):
        lora_A, lora_B, m = (t.double() for t in adapter[:3])
        direction += share * adapter.scaling * (lora_B @ lora_A)
        magnitude += share * (m - norm)
    g = reference.magnitude_scale(magnitude, torch.linalg.vector_norm(direction, dim=-1))
    return g.unsqueeze(-1) * direction


@pytest.mark.parametrize("strength", STRENGTHS)
def test_strength_is_linear_in_delta_and_magnitude(strength):
    weight, (adapter, *_) = weight_and_adapters()
    moved = functional.scale_in_norm(weight, *adapter[:3], strength, scaling=adapter.scaling)
    torch.testing.assert_close(dense(weight, moved), dense_combination(weight, [adapter], [strength]))
    merged, _ = functional.merge_weight(weight, *moved[:3], scaling=moved.scaling)
    torch.testing.assert_close(merged, dense(weight, moved))
    x = torch.randn(3, 24, dtype=torch.float64)
    torch.testing.assert_close(functional.dora_linear(x, weight, *moved[:3], scaling=moved.scaling), x @ merged.T)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("experts", [False, True])
def test_strength_0_is_the_base_and_1_the_adapter(dtype, experts):
    """Bit for bit, with a row of zeros in the weight."""
    layer = expert_inputs(3, dtype=dtype) if experts else linear_inputs("odd", dtype=dtype)
    layer.weight[..., 3, :] = 0
    args = (layer.weight, layer.lora_A, layer.lora_B, layer.magnitude)
    off = functional.scale_in_norm(*args, 0.0, scaling=0.7)
    norm = functional.norm_factored(layer.weight, *off[:2], off.scaling)
    assert torch.equal(functional.magnitude_scale(off.magnitude, norm), torch.ones_like(norm))
    merged, _ = functional.merge_weight(layer.weight, *off[:3], scaling=off.scaling)
    assert torch.equal(merged, layer.weight)

    on = functional.scale_in_norm(*args, 1.0, scaling=0.7)
    assert on.scaling == 0.7
    assert all(torch.equal(a, b) for a, b in zip(on[:3], args[1:], strict=True))
    assert on.lora_A is layer.lora_A


@pytest.mark.parametrize("weights", [(0.5, 0.3, 0.2), (1.0, 1.0, 1.0), (2.0, -1.0, 0.0), (0.0, 0.0, 0.0)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_combination_is_the_dense_formula(weights, dtype):
    weight, adapters = weight_and_adapters(dtype=dtype)
    combined = functional.combine_in_norm(weight, adapters, weights)
    wide = torch.promote_types(dtype, torch.float32)
    assert combined.lora_A.shape == (9, 24)
    assert all(t.dtype == wide for t in combined[:3])
    truth = dense_combination(weight, adapters, weights)
    # Half-precision factors are not rounded again: what is left is float32's error, in sums of at most ten terms.
    assert max_error(dense(weight, combined), truth) <= 10 * torch.finfo(wide).eps * truth.abs().max()
    x = torch.randn(3, 24, dtype=torch.float64).to(dtype)
    y = functional.dora_linear(x, weight, *combined[:3], scaling=combined.scaling)
    tensors = (x, weight, *combined[:3])
    sums = Sums.of_linear(*tensors[:3])
    layer_budgets(reference.dora_linear, reference.row_norm, tensors, sums, scaling=combined.scaling)["y"].check(y)


@pytest.mark.parametrize("chosen", [0, 1, 2])
def test_one_weight_of_one_gives_that_adapter(chosen):
    weight, adapters = weight_and_adapters()
    combined = functional.combine_in_norm(weight, adapters, [float(i == chosen) for i in range(3)])
    assert torch.equal(combined.magnitude, adapters[chosen].magnitude)
    torch.testing.assert_close(dense(weight, combined), dense(weight, adapters[chosen]))


def test_combination_of_one_is_strength():
    weight, (adapter, *_) = weight_and_adapters()
    moved = functional.scale_in_norm(weight, *adapter[:3], 0.4, scaling=adapter.scaling)
    combined = functional.combine_in_norm(weight, [adapter], [0.4])
    torch.testing.assert_close(dense(weight, combined), dense(weight, moved))


def test_combination_of_experts():
    layers = [expert_inputs(3, (1, 17, 24, rank)) for rank in (2, 4)]
    adapters = [Adapter(x.lora_A, x.lora_B, x.magnitude, 0.7) for x in layers]
    combined = functional.combine_in_norm(layers[0].weight, adapters, [0.6, -0.2])
    assert combined.lora_B.shape == (3, 17, 6)
    truth = dense_combination(layers[0].weight, adapters, [0.6, -0.2])
    torch.testing.assert_close(dense(layers[0].weight, combined), truth)


def test_in_a_module():
    """Setting a layer's scaling and magnitude gives it the strength; the factors stay."""
    torch.manual_seed(0)
    layer = DoraLinear(nn.Linear(24, 17, dtype=torch.float64), r=3, init_lora_weights=False)
    with torch.no_grad():
        layer.lora_magnitude_vector.mul_(1.3)
    weight = layer.base_layer.weight.detach()
    adapter = Adapter(
        layer.lora_A.detach(), layer.lora_B.detach(), layer.lora_magnitude_vector.detach().clone(), layer.scaling
    )
    moved = functional.scale_in_norm(weight, *adapter[:3], 0.5, scaling=layer.scaling)
    with torch.no_grad():
        layer.lora_magnitude_vector.copy_(moved.magnitude)
    layer.scaling = moved.scaling
    x = torch.randn(2, 24, dtype=torch.float64)
    expected = x @ dense_combination(weight, [adapter], [0.5]).T + layer.base_layer.bias
    torch.testing.assert_close(layer(x), expected)


def test_strength_and_weights_as_tensors_compile_and_differentiate():
    weight, adapters = weight_and_adapters()
    x = torch.randn(3, 24, dtype=torch.float64)

    def strength(a):
        moved = functional.scale_in_norm(weight, *adapters[0][:3], a, scaling=0.7)
        return functional.dora_linear(x, weight, *moved[:3], scaling=moved.scaling).sum()

    def combined(a):
        result = functional.combine_in_norm(weight, adapters, [a, 0.2, 1 - a])
        return functional.dora_linear(x, weight, *result[:3], scaling=result.scaling).sum()

    for function in (strength, combined):
        a = torch.tensor(0.3, dtype=torch.float64)
        derivative = torch.func.grad(function)(a)
        assert derivative.abs() > 1e-3
        torch.testing.assert_close(torch.func.jvp(function, (a,), (torch.ones_like(a),))[1], derivative)
        compiled = torch.compile(torch.func.grad(function), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(a), derivative)


def test_a_stack_of_different_ranks_runs_in_one_batch():
    weight, adapters = weight_and_adapters()
    stack = functional.stack_adapters(adapters)
    assert stack.lora_A.shape == (3, 5, 24)
    assert stack.scaling.tolist() == list(SCALINGS)
    x, index = torch.randn(5, 2, 24, dtype=torch.float64), torch.tensor([1, 0, 2, -1, 0])
    for norm in (None, functional.mixed_norm(weight, *stack[:2], stack.scaling)):
        y = functional.dora_linear_mixed(
            x, weight, *stack[:3], adapter_index=index, scaling=stack.scaling, weight_norm=norm
        )
        for row, k in enumerate(index.tolist()):
            adapted = weight if k < 0 else dense(weight, adapters[k])
            torch.testing.assert_close(y[row], x[row] @ adapted.T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_of_a_stack_do_not_round_scaled_factors(dtype):
    weight, adapters = weight_and_adapters(dtype=dtype)
    stack = functional.stack_adapters(adapters)
    assert stack.lora_B.dtype == dtype
    norm = functional.mixed_norm(weight, *stack[:2], stack.scaling)
    for k, adapter in enumerate(adapters):
        tensors = (weight, *adapter[:2])
        sums = Sums.of_linear(weight, *tensors[:2])
        norm_budget(reference.row_norm, tensors, sums, scaling=adapter.scaling).check(norm[k])


WEIGHT, ADAPTERS = weight_and_adapters()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: functional.scale_in_norm(WEIGHT, *ADAPTERS[0][:3], float("inf"), scaling=1.0),
            ValueError,
            "strength must be finite in float32",
        ),
        (
            lambda: functional.scale_in_norm(WEIGHT, *ADAPTERS[0][:3], "1", scaling=1.0),
            TypeError,
            "strength must be a number",
        ),
        (
            lambda: functional.scale_in_norm(WEIGHT, *ADAPTERS[0][:3], 1.0, scaling=float("nan")),
            ValueError,
            "scaling must be finite",
        ),
        (
            lambda: functional.scale_in_norm(WEIGHT[:3], *ADAPTERS[0][:3], 1.0, scaling=1.0),
            ValueError,
            "lora_B must be",
        ),
        (
            lambda: functional.combine_in_norm(WEIGHT, ADAPTERS, [1.0]),
            ValueError,
            "weights must be one number for each .*got 1 for 3",
        ),
        (lambda: functional.combine_in_norm(WEIGHT, [], []), ValueError, "weights must be one number for each"),
        (
            lambda: functional.combine_in_norm(WEIGHT, ADAPTERS, [1.0, float("nan"), 0.0]),
            ValueError,
            "weights must be finite",
        ),
        (lambda: functional.combine_in_norm(WEIGHT[:, :5], ADAPTERS, [1.0] * 3), ValueError, "lora_A must be"),
        (lambda: functional.stack_adapters([]), ValueError, "adapters must hold at least one"),
        (
            lambda: functional.stack_adapters([ADAPTERS[0], Adapter(*(t[:3] for t in ADAPTERS[0][:3]), 1.0)]),
            ValueError,
            "adapters must share in, out, dtypes and device and may differ in rank",
        ),
        (
            lambda: functional.stack_adapters([ADAPTERS[0], Adapter(*(t.float() for t in ADAPTERS[0][:3]), 1.0)]),
            ValueError,
            "adapters must share in, out, dtypes",
        ),
    ],
)
def test_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_peft_combines_silently_wrong():
    """What dorac says of stock PEFT 0.21: its sum of two DoRA adapters is not their sum. Fails once PEFT is right."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=4, target_modules=["0"], use_dora=True, init_lora_weights=False)
    model = peft.get_peft_model(nn.Sequential(nn.Linear(24, 17)), config, adapter_name="a")
    model.add_adapter("b", config)
    layer = model.base_model.model[0]
    with torch.no_grad():
        layer.lora_magnitude_vector["a"].weight.mul_(1.5)
        layer.lora_magnitude_vector["b"].weight.mul_(0.7)
    model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "mean", combination_type="cat")
    model.set_adapter("mean")
    adapters = [
        Adapter(layer.lora_A[n].weight, layer.lora_B[n].weight, layer.lora_magnitude_vector[n].weight, 1.0)
        for n in "ab"
    ]
    weight = layer.base_layer.weight
    combined = functional.combine_in_norm(weight, adapters, [0.5, 0.5])
    x = torch.randn(8, 24)
    ours = functional.dora_linear(x, weight, *combined[:3], layer.base_layer.bias, scaling=combined.scaling)
    truth = x.double() @ dense_combination(weight.detach(), adapters, [0.5, 0.5]).T + layer.base_layer.bias
    size = truth.abs().max()
    assert max_error(ours, truth) < 1e-5 * size
    assert max_error(model(x), truth) > 0.05 * size
