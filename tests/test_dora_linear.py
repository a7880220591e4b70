import pytest
import torch
import torch.nn.functional as F
from error_table import error_table, label, record  # noqa: F401

from dorac import functional, reference
from dorac.testing import REGIMES, layer_budgets, linear_inputs, max_error, merge_budget

HALF = (torch.bfloat16, torch.float16)


def row_of(inputs, function):
    """A transposed weight is what GPT-2's Conv1D has."""
    kind = "linear" if inputs.weight.is_contiguous() else "Conv1D"
    return label(kind, inputs.x, inputs.lora_A.shape[0], function is not functional.dora_linear)


def budgets_of(inputs, scaling, **options):
    return layer_budgets(
        reference.dora_linear, reference.row_norm, inputs.tensors(), inputs.sums(), scaling=scaling, **options
    )


def check(inputs, scaling, function=functional.dora_linear):
    """y, and the gradient of every tensor."""
    leaves = inputs.leaves()
    y = function(*leaves.tensors(), scaling=scaling)
    assert y.dtype == inputs.x.dtype
    assert y.shape == (*inputs.x.shape[:-1], inputs.weight.shape[0])
    dy = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(y)
    y.backward(dy)
    for name, budget in budgets_of(inputs, scaling, dy=dy).items():
        actual = y if name == "y" else getattr(leaves, name).grad
        assert actual.dtype == (y if name == "y" else getattr(leaves, name)).dtype, name
        record(row_of(inputs, function), name, actual, budget.truth)
        budget.check(actual, name)


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
def test_values_and_gradients(regime, dtype, device):
    check(linear_inputs(regime, dtype=dtype, device=device), 0.7)


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
def test_without_gradients(regime, dtype, device):
    """Inference takes a way of its own."""
    inputs = linear_inputs(regime, dtype=dtype, device=device)
    budgets_of(inputs, 0.7)["y"].check(functional.dora_linear(*inputs.tensors(), scaling=0.7))


@pytest.mark.parametrize("dtype", HALF)
def test_wider_factors(dtype, device):
    """float32 factors over a half-precision layer, PEFT's default: nothing on the way to their gradients is rounded."""
    inputs = linear_inputs("odd", dtype=dtype, factor_dtype=torch.float32, device=device).leaves()
    y = functional.dora_linear(*inputs.tensors(), scaling=0.7)
    dy = torch.randn_like(y)
    y.backward(dy)
    budgets = budgets_of(inputs, 0.7, dy=dy, dtype=torch.float32)
    for name in ("lora_A", "lora_B"):
        budgets[name].check(getattr(inputs, name).grad, name)


RANKS = [(9, 40, 24, rank) for rank in (1, 8, 64, 384)]


@pytest.mark.full
@pytest.mark.parametrize("regime", [*REGIMES, *RANKS], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
@pytest.mark.parametrize("scaling", [0.7, -1.3, 0.0])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("use_compile", [False, True])
def test_full_matrix(regime, dtype, scaling, bias, transposed, use_compile, device):
    inputs = linear_inputs(regime, dtype=dtype, bias=bias, transposed=transposed, device=device)
    function = functional.dora_linear
    if use_compile:
        function = torch.compile(function, fullgraph=True, backend="aot_eager")
    check(inputs, scaling, function)


@pytest.mark.parametrize("scaling", [0.0, -1.3])
@pytest.mark.parametrize("transposed", [False, True])
def test_scaling_and_layout(scaling, transposed, device):
    inputs = linear_inputs("odd", dtype=torch.float32, transposed=transposed, bias=False, device=device)
    check(inputs, scaling)


@pytest.mark.parametrize("leading", [(), (2,), (2, 3), (2, 3, 4)])
def test_leading_shapes(leading):
    inputs = linear_inputs("aligned", dtype=torch.float64)
    x = inputs.x[0] if leading == () else inputs.x[: torch.Size(leading).numel()].reshape(*leading, -1)
    y = functional.dora_linear(x, *inputs.tensors()[1:], scaling=0.7)
    expected = reference.dora_linear(x, *inputs.tensors()[1:], scaling=0.7)
    torch.testing.assert_close(y, expected)


def test_non_contiguous_input_and_no_mutation():
    inputs = linear_inputs("aligned", dtype=torch.float32)
    x = inputs.x.T.contiguous().T
    assert not x.is_contiguous()
    before = [t.clone() for t in inputs.tensors()]
    y = functional.dora_linear(x, *inputs.tensors()[1:], scaling=0.7)
    torch.testing.assert_close(y, functional.dora_linear(*inputs.tensors(), scaling=0.7))
    assert all(torch.equal(a, b) for a, b in zip(before, inputs.tensors(), strict=True))


def test_given_norm_replaces_the_computed_one():
    inputs = linear_inputs("odd")
    norm = functional.norm_factored(inputs.weight, inputs.lora_A, inputs.lora_B, 0.7)
    args = inputs.tensors()
    assert torch.equal(
        functional.dora_linear(*args, scaling=0.7, weight_norm=norm), functional.dora_linear(*args, scaling=0.7)
    )
    halved = functional.dora_linear(*args[:5], scaling=0.7, weight_norm=2 * norm)
    torch.testing.assert_close(2 * halved, functional.dora_linear(*args[:5], scaling=0.7))


def test_gradcheck_with_given_norm():
    leaves = linear_inputs((3, 5, 4, 2)).leaves()
    norm = functional.norm_factored(leaves.weight, leaves.lora_A, leaves.lora_B, 0.7)

    def function(*args):
        return functional.dora_linear(*args, scaling=0.7, weight_norm=norm)

    args = leaves.tensors()
    assert torch.autograd.gradcheck(function, args, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, args, check_fwd_over_rev=True, check_batched_grad=True)


def test_detached_norm_in_every_derivative():
    """Reverse, forward and second derivatives equal those of the textbook with its norm detached."""
    inputs = linear_inputs((3, 5, 4, 2))
    tangents = tuple(torch.randn_like(t) for t in inputs.tensors())

    def ours(*args):
        return functional.dora_linear(*args, scaling=0.7).square().sum()

    def textbook(*args):
        return reference.dora_linear(*args, scaling=0.7).square().sum()

    for transform in (
        lambda f: torch.func.grad(f, argnums=tuple(range(6)))(*inputs.tensors()),
        lambda f: torch.func.jvp(f, inputs.tensors(), tangents),
        lambda f: torch.func.hessian(f, argnums=(2, 3))(*inputs.tensors()),
    ):
        torch.testing.assert_close(transform(ours), transform(textbook))


@pytest.mark.parametrize("magnitude", [0.0, 1.0])
def test_zero_row_trains(magnitude, device):
    inputs = linear_inputs("odd", dtype=torch.float32, device=device)
    inputs.weight[3] = 0
    inputs.lora_B[3] = 0
    inputs.magnitude[3] = magnitude
    adapter = [t.clone().requires_grad_() for t in (inputs.lora_A, inputs.lora_B, inputs.magnitude)]
    optimizer = torch.optim.SGD(adapter, lr=0.1)
    target = torch.ones(inputs.x.shape[0], inputs.weight.shape[0], device=device)
    outputs = []
    for _ in range(3):
        y = functional.dora_linear(inputs.x, inputs.weight, *adapter, inputs.bias, scaling=0.7)
        outputs.append(y[:, 3].detach())
        optimizer.zero_grad()
        F.mse_loss(y, target).backward()
        assert all(t.grad.isfinite().all() for t in adapter)
        optimizer.step()
    assert torch.equal(outputs[0], inputs.bias[3].expand_as(outputs[0]))
    assert not torch.equal(adapter[1][3], inputs.lora_B[3])
    last = functional.dora_linear(inputs.x, inputs.weight, *adapter, inputs.bias, scaling=0.7)
    assert last.isfinite().all()
    assert not torch.equal(last[:, 3], outputs[0])


def test_init_magnitude_makes_g_exactly_one(device):
    for dtype in (torch.float32, *HALF):
        inputs = linear_inputs("odd", dtype=dtype, device=device)
        args = (inputs.weight, inputs.lora_A, inputs.lora_B)
        magnitude = functional.init_magnitude(*args, 0.7)
        assert magnitude.dtype == torch.float32
        norm = functional.norm_factored(*args, 0.7)
        assert torch.equal(functional.magnitude_scale(magnitude, norm), torch.ones_like(norm))


def test_dropout_leaves_the_frozen_layer_alone():
    inputs = linear_inputs("aligned")
    x, weight, lora_A, lora_B, magnitude, bias = inputs.tensors()
    torch.manual_seed(3)
    y = functional.dora_linear(*inputs.tensors(), scaling=0.7, dropout_p=0.4)
    torch.manual_seed(3)
    dropped = F.dropout(x, 0.4)
    assert 0 < (dropped == 0).float().mean() < 1
    g = reference.magnitude_scale(magnitude, reference.row_norm(weight, lora_A, lora_B, 0.7))
    lora = dropped @ lora_A.T @ lora_B.T
    expected = x @ weight.T + bias + reference.compose_delta(dropped @ weight.T, lora, g, 0.7)
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("use_compile", [False, True])
def test_autocast(dtype, use_compile, device):
    """Products run in the autocast dtype, norm and g do not."""
    inputs = linear_inputs("aligned", dtype=torch.float32, device=device)
    function = functional.dora_linear
    if use_compile:
        function = torch.compile(function, fullgraph=True, backend="aot_eager")
    with torch.autocast(device, dtype=dtype):
        y = function(*inputs.tensors(), scaling=0.7)
        eager = functional.dora_linear(*inputs.tensors(), scaling=0.7)
    assert y.dtype == dtype
    assert torch.equal(y, eager)
    budgets_of(inputs, 0.7, dtype=dtype, casts=3)["y"].check(y)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
@pytest.mark.parametrize("transposed", [False, True])
def test_merge_and_unmerge(dtype, transposed, device):
    inputs = linear_inputs("odd", dtype=dtype, transposed=transposed, device=device)
    args = (inputs.lora_A, inputs.lora_B, inputs.magnitude)
    merged, norm = functional.merge_weight(inputs.weight, *args, scaling=0.7)
    assert merged.dtype == dtype
    assert torch.equal(norm, functional.norm_factored(inputs.weight, *args[:2], 0.7))

    merge_budget(inputs.tensors()[1:5], inputs.sums(), scaling=0.7).check(merged)
    back = functional.unmerge_weight(merged, *args, scaling=0.7, weight_norm=norm)
    adapted = reference.adapted_weight(inputs.weight.double(), *(t.double() for t in args[:2]), 0.7)
    bound = 2 * torch.finfo(dtype).eps * torch.maximum(adapted.abs(), inputs.weight.double().abs())
    assert ((back.double() - inputs.weight.double()).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 64, 256, 512), (1, 192, 160, 136), (1, 300, 20, 3)])
def test_unmerge_bound_at_any_rank(dtype, shape):
    """The product's own error is many eps at high rank; taken alike both ways, it cancels."""
    inputs = linear_inputs(shape, dtype=dtype)
    args = (4 * inputs.lora_A, inputs.lora_B, inputs.magnitude)
    merged, norm = functional.merge_weight(inputs.weight, *args, scaling=2.0)
    back = functional.unmerge_weight(merged, *args, scaling=2.0, weight_norm=norm)
    adapted = reference.adapted_weight(inputs.weight.double(), *(t.double() for t in args[:2]), 2.0)
    bound = 2 * torch.finfo(dtype).eps * torch.maximum(adapted.abs(), inputs.weight.double().abs())
    # V itself is known to the product's rounding only, which matters where W and BA nearly cancel.
    slack = torch.finfo(torch.float32).eps * shape[3] * 2.0 * args[1].double().abs() @ args[0].double().abs()
    assert ((back.double() - inputs.weight.double()).abs() <= bound + 4 * torch.finfo(dtype).eps * slack).all()


def test_unmerge_where_g_times_the_product_overflows():
    """The bound asks no more than that ``g * V`` is a normal number; the product is taken off after the division."""
    generator = torch.Generator().manual_seed(0)
    lora_A, lora_B = torch.rand(2, 16, generator=generator) + 1, torch.rand(8, 2, generator=generator) * 1e30
    product = lora_B @ lora_A
    weight = -product * (1 - 1e-6 * torch.rand(8, 16, generator=generator))
    magnitude = 1e10 * functional.norm_factored(weight, lora_A, lora_B, 1.0)
    assert (magnitude.max() * product.max() / 1e25).isinf()
    args = (lora_A, lora_B, magnitude)
    merged, norm = functional.merge_weight(weight, *args, scaling=1.0)
    assert merged.isfinite().all()
    back = functional.unmerge_weight(merged, *args, scaling=1.0, weight_norm=norm)
    adapted = reference.adapted_weight(weight.double(), lora_A.double(), lora_B.double(), 1.0)
    bound = 2 * torch.finfo(torch.float32).eps * torch.maximum(adapted.abs(), weight.double().abs())
    assert ((back.double() - weight.double()).abs() <= bound).all()


def test_merge_under_autocast():
    inputs = linear_inputs("aligned", dtype=torch.float32)
    args = (inputs.lora_A, inputs.lora_B, inputs.magnitude)
    merged, norm = functional.merge_weight(inputs.weight, *args, scaling=0.7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again, norm_again = functional.merge_weight(inputs.weight, *args, scaling=0.7)
        back = functional.unmerge_weight(merged, *args, scaling=0.7, weight_norm=norm)
    assert torch.equal(merged, again)
    assert torch.equal(norm, norm_again)
    assert torch.equal(back, functional.unmerge_weight(merged, *args, scaling=0.7, weight_norm=norm))


def test_merge_in_chunks_equals_one_chunk():
    inputs = linear_inputs("odd", dtype=torch.float64)
    args = (inputs.weight, inputs.lora_A, inputs.lora_B, inputs.magnitude)
    merged, norm = functional.merge_weight(*args, scaling=0.7)
    torch.testing.assert_close(functional.merge_weight(*args, scaling=0.7, budget=1), (merged, norm))
    back = functional.unmerge_weight(merged, *args[1:], scaling=0.7, weight_norm=norm, budget=1)
    torch.testing.assert_close(back, inputs.weight)


def test_unmerge_refuses_lost_rows():
    inputs = linear_inputs("odd", dtype=torch.float32)
    inputs.magnitude[5] = 0
    args = (inputs.lora_A, inputs.lora_B, inputs.magnitude)
    merged, norm = functional.merge_weight(inputs.weight, *args, scaling=0.7)
    with pytest.raises(ValueError, match=r"cannot unmerge rows 5: their g is 0"):
        functional.unmerge_weight(merged, *args, scaling=0.7, weight_norm=norm)


def test_half_precision_keeps_the_spread_of_g():
    """g within 0.2 % of 1, as trained adapters have it: rounding g to bfloat16 would lose most of it."""
    inputs = linear_inputs("aligned", dtype=torch.bfloat16)
    args = (inputs.weight, inputs.lora_A, inputs.lora_B)
    norm = functional.norm_factored(*args, 0.7)
    g = 1 + 0.002 * torch.randn(norm.shape)
    recovered = functional.magnitude_scale(g * norm, norm)
    assert max_error(recovered, g) <= 2 * torch.finfo(torch.float32).eps
    assert (recovered.bfloat16() == 1).float().mean() > 0.5
