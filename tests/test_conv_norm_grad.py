"""The gradient through the norm of convolutions, on request, in both layouts of lora_A: that of the dense norm."""

import dataclasses

import pytest
import torch
from test_norm import peak_bytes

from dorac import functional, reference
from dorac.testing import CONVOLUTIONS, Convolution, conv_inputs, norm_gradient_budgets

S = 0.7
FACTORS = ("weight", "lora_A", "lora_B")
GROUPED = ("2d_grouped", "2d_grouped_peft")


def norm_of(convolution, **options):
    return lambda *tensors: functional.norm_factored_conv(
        *tensors, S, groups=convolution.groups, norm_grad=True, **options
    )


def dense_norm_of(convolution):
    return lambda *tensors: reference.filter_norm(*tensors, S, convolution.groups)


def cotangent(n):
    return torch.randn(n.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(n)


def gradients(norm, inputs, dtype=None):
    """The norm and its gradients, or those in ``dtype``."""
    tensors = [
        getattr(inputs, n).detach().clone(memory_format=torch.preserve_format).to(dtype or getattr(inputs, n).dtype)
        for n in FACTORS
    ]
    n = norm(*(t.requires_grad_() for t in tensors))
    n.backward(cotangent(n))
    return n.detach(), [t.grad for t in tensors]


def check(convolution, inputs, norm=None, **options):
    n, actual = gradients(norm or norm_of(convolution, **options), inputs)
    plain = functional.norm_factored_conv(
        inputs.weight, inputs.lora_A, inputs.lora_B, S, groups=convolution.groups, **options
    )
    assert torch.equal(n, plain), "the gradient changes no value"

    def textbook_norm(*args):
        return reference.filter_norm(*args, convolution.groups)

    tensors = [getattr(inputs, name) for name in FACTORS]
    in_parts = not convolution.grouped_lora_A
    budgets = norm_gradient_budgets(
        textbook_norm, tensors, convolution.sums(), cotangent(n), scaling=S, in_parts=in_parts
    )
    for (name, budget), gradient in zip(budgets.items(), actual, strict=True):
        assert gradient.dtype == getattr(inputs, name).dtype, name
        budget.check(gradient, name)


@pytest.mark.parametrize("case", CONVOLUTIONS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_equals_the_dense_gradient(case, dtype, device):
    check(CONVOLUTIONS[case], conv_inputs(case, dtype=dtype, device=device))


@pytest.mark.parametrize("case", GROUPED)
@pytest.mark.parametrize("factor_dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("budget", [1, 2**28])
def test_mixed_dtypes_layouts_budgets(case, factor_dtype, channels_last, budget, device):
    options = {"dtype": torch.bfloat16, "factor_dtype": factor_dtype, "channels_last": channels_last}
    check(CONVOLUTIONS[case], conv_inputs(case, **options, device=device), budget=budget)


@pytest.mark.parametrize("rank", [6, pytest.param(384, marks=pytest.mark.full)])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.full)])
def test_compiled(rank, backend, device):
    convolution = dataclasses.replace(CONVOLUTIONS["2d_grouped_peft"], rank=rank)
    inputs = conv_inputs(convolution, dtype=torch.bfloat16, factor_dtype=torch.float32, device=device)
    run = torch.compile(norm_of(convolution), fullgraph=True, backend=backend)
    check(convolution, inputs, run)


@pytest.mark.parametrize("case", GROUPED)
def test_gradcheck_of_the_norm(case):
    convolution = Convolution((1, 4, 2, 2), 4, (2, 1), 2, case == "2d_grouped", {"groups": 2})
    inputs = conv_inputs(convolution).leaves()
    scaling = torch.tensor(S, dtype=torch.float64, requires_grad=True)

    def norm(*args):
        return functional.norm_factored_conv(*args, groups=2, norm_grad=True)

    args = (inputs.weight, inputs.lora_A, inputs.lora_B, scaling)
    assert torch.autograd.gradcheck(norm, args, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(norm, args, check_fwd_over_rev=True, check_batched_grad=True)


@pytest.mark.parametrize("case", GROUPED)
@pytest.mark.parametrize("transform", [False, True])
def test_zero_filters_are_constant(case, transform):
    convolution, inputs = CONVOLUTIONS[case], conv_inputs(case, dtype=torch.float32)
    inputs.weight[3] = inputs.lora_B[3] = 0
    tensors = tuple(t.requires_grad_() for t in (inputs.weight, inputs.lora_A, inputs.lora_B))

    def loss(*tensors, norm_grad=True):
        layer = getattr(functional, f"dora_conv{convolution.dimensions}d")
        rest = (inputs.magnitude, inputs.bias)
        return layer(inputs.x, *tensors, *rest, scaling=S, norm_grad=norm_grad, **convolution.geometry).square().sum()

    take = torch.func.grad(loss, argnums=(0, 1, 2)) if transform else lambda *t: torch.autograd.grad(loss(*t), t)
    actual = take(*tensors)
    constant = torch.autograd.grad(loss(*tensors, norm_grad=False), tensors)
    assert all(g.isfinite().all() for g in actual)
    torch.testing.assert_close(actual[2][3], constant[2][3])  # the channel trains as it does without norm_grad
    assert actual[2][3].abs().sum() > 0
    assert not torch.allclose(actual[2][4], constant[2][4])


def test_a_filter_outside_of_its_group_alone(device):
    """PEFT's layout: where W and the part of BA in the group are zero, the norm is not, and has a gradient."""
    case = "2d_grouped_peft"
    convolution, inputs = CONVOLUTIONS[case], conv_inputs(case, dtype=torch.float32, device=device)
    ranks, channels = convolution.rank // 3, convolution.x[1] // 3
    inputs.weight.zero_()
    for j in range(3):
        inputs.lora_A[j * ranks : (j + 1) * ranks, j * channels : (j + 1) * channels] = 0
    check(convolution, inputs)


def test_peak_memory_of_forward_and_backward():
    """Nothing of the weight's size where the weight is frozen, in PEFT's layout."""
    convolution = Convolution((1, 512, 3, 3), 2048, (3, 3), 16, grouped_lora_A=False, geometry={"groups": 2})
    inputs = conv_inputs(convolution, dtype=torch.bfloat16, factor_dtype=torch.float32)
    factors = inputs.lora_A.requires_grad_(), inputs.lora_B.requires_grad_()
    budget = 2 * 2**20
    norm = norm_of(convolution, budget=budget)

    def step():
        norm(inputs.weight, *factors).sum().backward()

    step()  # the leaves' .grad are there from now on
    # The budget; the factors outside of their groups in float64, their gradients in float64 and rounded, and those
    # inside in chunks and put together: eight times the float32 factors.
    peak = peak_bytes(step)
    assert budget // 2 <= peak <= budget + 8 * sum(t.nbytes for t in factors) + 2**20 < inputs.weight.nbytes
