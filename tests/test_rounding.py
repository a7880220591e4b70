"""The law of error itself: it lets any order of right arithmetic pass, and nothing else."""

import pytest
import torch
import torch.nn.functional as F

from dorac import reference
from dorac.testing import (
    CONVOLUTIONS,
    Budget,
    assert_rms_beside,
    conv_inputs,
    layer_budgets,
    linear_inputs,
    norm_budget,
    rounded,
    unit_roundoff,
)

S = 0.7
U = unit_roundoff(torch.float32)


def budgets_of(inputs, **options):
    return layer_budgets(
        reference.dora_linear, reference.row_norm, inputs.tensors(), inputs.sums(), scaling=S, **options
    )


def term_by_term(left, right):
    """``left @ right`` with one rounding for each term, as kernels do it that are given few columns."""
    total = torch.zeros(left.shape[0], right.shape[1])
    for i in range(left.shape[1]):
        total = total + left[:, i : i + 1] * right[i : i + 1]
    return total


@pytest.mark.parametrize("regime", ["aligned", "odd", "wide", "tall", "rank_over_128"])
@pytest.mark.parametrize("backwards", [False, True])
def test_any_order_of_sums_passes(regime, backwards):
    """Bounds and RMS, of y and of the norm, where the machine adds up in the worst order there is."""
    inputs = linear_inputs(regime, dtype=torch.float32)
    x, weight, lora_A, lora_B, magnitude, bias = inputs.tensors()
    if backwards:
        x, weight, lora_A = (t.flip(1) for t in (x, weight, lora_A))
    v = weight + S * term_by_term(lora_B, lora_A)
    n = term_by_term(v.square(), torch.ones(v.shape[1], 1)).sqrt().flatten()
    norm_budget(reference.row_norm, inputs.tensors()[1:4], inputs.sums(), scaling=S).check(n)
    lora = term_by_term(term_by_term(x, lora_A.T), lora_B.T)
    y = magnitude / n * (term_by_term(x, weight.T) + S * lora) + bias
    budgets_of(inputs)["y"].check(y)


def test_the_size_is_the_sum_of_absolute_terms():
    """Against the formulas written out, with g of the true norm."""
    inputs = linear_inputs("odd", dtype=torch.float32)
    x, weight, lora_A, lora_B, magnitude, bias = (t.double() for t in inputs.tensors())
    dy = torch.randn(x.shape[0], weight.shape[0], dtype=torch.float64).float()
    n = reference.row_norm(weight, lora_A, lora_B, S)
    long = weight.abs() + S * lora_B.abs() @ lora_A.abs()
    ratio = long.norm(dim=1) / n
    assert ratio.min() > 1
    g, sums = magnitude.abs() / n, inputs.sums()
    inner = x.abs() @ long.T
    d_inner = dy.double().abs() * g
    sizes = {
        "y": (g * inner + bias.abs(), g * ratio * inner + bias.abs()),
        "x": (d_inner @ long, (d_inner * ratio) @ long),
        "lora_B": (S * d_inner.T @ (x.abs() @ lora_A.abs().T), S * (d_inner * ratio).T @ (x.abs() @ lora_A.abs().T)),
        "magnitude": ((dy.double().abs() * inner).sum(0) / n, (dy.double().abs() * inner).sum(0) * ratio / n),
        "bias": (dy.double().abs().sum(0),) * 2,
    }
    budgets = budgets_of(inputs, dy=dy)
    for name, (size, of_norm) in sizes.items():
        roundings = {"y": 4, "x": 4, "lora_B": 4, "magnitude": 4, "bias": 1}[name]
        expected = rounded(size, torch.float32, roundings, sums.terms(name))
        expected = expected + rounded(of_norm, torch.float32, 0, sums.norm_terms())
        torch.testing.assert_close(budgets[name].bound, expected)


@pytest.mark.parametrize("wrong", [1.01, -1.01, float("nan"), float("inf")])
def test_an_error_above_the_bound_fails(wrong):
    truth = torch.ones(3, dtype=torch.float64)
    budget = Budget(truth, torch.full_like(truth, 0.25))
    actual = truth.float()
    budget.check(actual)
    actual[1] += 0.25 * wrong
    with pytest.raises(AssertionError, match="over its bound"):
        budget.check(actual, "y")


def test_an_rms_error_above_the_dense_one_fails():
    """Also where every element is within its bound."""
    truth = torch.linspace(1, 2, 100, dtype=torch.float64)
    noise = torch.randn(100, dtype=torch.float64).sign() * U
    dense, actual = (truth + 4 * noise).float(), (truth + 40 * noise).float()
    Budget(truth, torch.ones_like(truth), dense).check(dense)
    with pytest.raises(AssertionError, match="RMS"):
        Budget(truth, torch.ones_like(truth), dense).check(actual)
    with pytest.raises(AssertionError, match="RMS"):
        assert_rms_beside(actual, dense, truth)
    assert_rms_beside((truth + 0.4 * noise).float(), truth, truth)  # one rounding, beside what has none


def test_one_element_is_not_all_of_the_mean():
    """Errors count in units of their bounds: those of a row that cancels as much as others, and small ones as large."""
    truth, bound = torch.ones(100, dtype=torch.float64), torch.full((100,), 64 * U, dtype=torch.float64)
    truth[1:50] = 1e-3
    bound[1:50] *= 1e-3
    bound[0] = 1e4 * U
    errors = torch.randn(100, dtype=torch.float64).sign() * bound / 8
    dense, unlucky, wrong = (truth + errors for _ in range(3))
    unlucky[0] += 3 * errors[0]
    wrong[1:50] += 5 * errors[1:50]
    assert (unlucky - truth).square().mean() > 9 * (dense - truth).square().mean()
    Budget(truth, bound, dense.float()).check(unlucky.float())
    assert (wrong - truth).square().mean() < 2 * (dense - truth).square().mean()
    with pytest.raises(AssertionError, match="RMS"):
        Budget(truth, bound, dense.float()).check(wrong.float())


def test_shapes_are_not_broadcast():
    with pytest.raises(AssertionError):
        Budget(torch.ones(3).double(), torch.ones(3).double()).check(torch.ones(1))


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_the_sums_of_a_convolution_are_counted(case):
    """Positions, and how often padding repeats an element, are at least what the convolution has."""
    convolution, inputs = CONVOLUTIONS[case], conv_inputs(case)
    y = reference.dora_conv(*inputs.tensors(), scaling=S, **convolution.geometry)
    sums = convolution.sums()
    assert sums.tokens >= y.numel() // convolution.out
    x = torch.ones_like(inputs.x, requires_grad=True)
    mode, padding = (convolution.geometry.get(key, value) for key, value in (("padding_mode", "zeros"), ("padding", 0)))
    if mode == "zeros":
        assert sums.copies == 0
        return
    if padding == "same":
        dilation = convolution.geometry.get("dilation", 1)
        totals = [dilation * (k - 1) for k in convolution.kernel]
        amounts = [amount for total in reversed(totals) for amount in (total // 2, total - total // 2)]
    else:
        padding = (padding,) * convolution.dimensions if isinstance(padding, int) else padding
        amounts = [amount for amount in reversed(padding) for _ in range(2)]
    F.pad(x, amounts, mode=mode).sum().backward()
    assert sums.copies >= x.grad.max() - 1 > 0
