import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dorac import functional, reference
from dorac.testing import REGIMES, linear_inputs, norm_budget

SCALINGS = (0.7, -1.3, 0.0)
HALF = (torch.bfloat16, torch.float16)


def budget_of(inputs, scaling):
    return norm_budget(reference.row_norm, inputs.tensors()[1:4], inputs.sums(), scaling=scaling)


def check_norm(inputs, scaling, **options):
    actual = functional.norm_factored(inputs.weight, inputs.lora_A, inputs.lora_B, scaling, **options)
    acc = torch.promote_types(torch.promote_types(inputs.weight.dtype, inputs.lora_A.dtype), torch.float32)
    assert actual.dtype == acc
    budget = budget_of(inputs, scaling)
    if actual.is_cuda and acc is torch.float32 and inputs.lora_A.dtype is not inputs.weight.dtype in HALF:
        # The kernel multiplies 16 bits of each float32 factor of a half-precision weight.
        assert ((actual.double() - budget.truth).abs() <= 1e-5 * budget.truth).all()
    else:
        budget.check(actual)
    return actual


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
def test_equals_the_dense_norm(regime, dtype, device):
    check_norm(linear_inputs(regime, dtype=dtype, device=device), 0.7)


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("transposed", [False, True])
def test_any_scaling_and_layout(scaling, transposed, device):
    inputs = linear_inputs("odd", dtype=torch.bfloat16, transposed=transposed, device=device)
    assert inputs.weight.is_contiguous() != transposed
    check_norm(inputs, scaling)


@pytest.mark.full
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
@pytest.mark.parametrize("factor_dtype", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("budget", [1, 4096, 2**28])
def test_full_matrix(regime, dtype, factor_dtype, scaling, transposed, budget, device):
    inputs = linear_inputs(regime, dtype=dtype, factor_dtype=factor_dtype, transposed=transposed, device=device)
    check_norm(inputs, scaling, budget=budget)


@pytest.mark.parametrize("factor_dtype", [torch.float32, torch.float64])
def test_mixed_dtypes(factor_dtype, device):
    check_norm(linear_inputs("odd", dtype=torch.bfloat16, factor_dtype=factor_dtype, device=device), 0.7)


@pytest.mark.parametrize("budget", [1, 1000, 30_000])
@pytest.mark.parametrize("cached", [False, True])
def test_any_budget(budget, cached, device):
    """One byte means one column at a time; the number of chunks changes nothing but the order of the sum."""
    inputs = linear_inputs("odd", dtype=torch.float32, device=device)
    weight_sq = inputs.weight.square().sum(1) if cached else None
    actual = functional.norm_factored(
        inputs.weight, inputs.lora_A, inputs.lora_B, 0.7, budget=budget, weight_sq=weight_sq
    )
    error = budget_of(inputs, 0.7)
    if cached:
        # Every one of the `in` partial sums is rounded once, and the three terms of the expansion once more each.
        bound = (inputs.weight.shape[1] + 3) * torch.finfo(torch.float32).eps
        assert ((actual.double() - error.truth).abs() <= bound * error.truth).all()
    else:
        error.check(actual)


def test_cached_square_is_used():
    inputs = linear_inputs("odd")
    square = inputs.weight.square().sum(1)
    args = (inputs.weight, inputs.lora_A, inputs.lora_B, 0.7)
    torch.testing.assert_close(functional.norm_factored(*args, weight_sq=square), functional.norm_factored(*args))
    shifted = functional.norm_factored(*args, weight_sq=square + 1)
    torch.testing.assert_close(shifted.square(), functional.norm_factored(*args).square() + 1)


def test_short_rows_do_not_cancel(device):
    """Where BA nearly undoes W the expanded square would lose every digit; the chunked norm keeps them."""
    inputs = linear_inputs((1, 16, 16, 16), dtype=torch.float32, device=device)
    lora_B = torch.linalg.solve(inputs.lora_A.double().T, -inputs.weight.double().T).T.float()
    inputs = dataclasses.replace(inputs, lora_B=lora_B)
    assert budget_of(inputs, 1.0).truth.max() < 1e-4
    check_norm(inputs, 1.0)


def test_zero_rows_and_no_inputs(device):
    inputs = linear_inputs("odd", dtype=torch.float32, device=device)
    inputs.weight[3] = 0
    inputs.lora_B[3] = 0
    norm = check_norm(inputs, 0.7)
    assert norm[3] == 0
    empty = torch.empty(5, 0, device=device), torch.empty(2, 0, device=device), torch.ones(5, 2, device=device)
    assert torch.equal(functional.norm_factored(*empty, 0.7), torch.zeros(5, device=device))


def test_scaling_tensor_equals_number(device):
    inputs = linear_inputs("odd", dtype=torch.bfloat16, device=device)
    args = (inputs.weight, inputs.lora_A, inputs.lora_B)
    assert torch.equal(
        functional.norm_factored(*args, torch.tensor(0.7, device=device)), functional.norm_factored(*args, 0.7)
    )


def test_repeats_bitwise(device):
    inputs = linear_inputs("rank_over_128", dtype=torch.bfloat16, device=device)
    runs = [functional.norm_factored(inputs.weight, inputs.lora_A, inputs.lora_B, 0.7) for _ in range(5)]
    assert all(torch.equal(run, runs[0]) for run in runs)


def test_no_gradient_and_inputs_unchanged(device):
    inputs = linear_inputs("odd", device=device).leaves()
    before = [t.detach().clone() for t in inputs.tensors()]
    assert not functional.norm_factored(inputs.weight, inputs.lora_A, inputs.lora_B, 0.7).requires_grad
    assert all(torch.equal(a, b) for a, b in zip(before, inputs.tensors(), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_not_reach_the_norm(dtype, device):
    inputs = linear_inputs("aligned", dtype=torch.float32, device=device)
    args = (inputs.weight, inputs.lora_A, inputs.lora_B, 0.7)
    plain = functional.norm_factored(*args)
    with torch.autocast(device, dtype=dtype):
        assert torch.equal(functional.norm_factored(*args), plain)
        assert torch.equal(torch.ops.dorac.norm_factored(*args[:3], torch.tensor(0.7, device=device)), plain)
        batched = torch.func.vmap(lambda lora_B: functional.norm_factored(*args[:2], lora_B, 0.7))(args[2][None])[0]
        compiled = torch.compile(functional.norm_factored, fullgraph=True, backend="aot_eager")(*args)
    torch.testing.assert_close(batched, plain)
    assert torch.equal(compiled, plain)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(st.just(1), st.integers(1, 40), st.integers(1, 40), st.integers(1, 20)),
    scaling=st.floats(-4, 4),
    budget=st.integers(1, 20_000),
    dtype=st.sampled_from([torch.float64, torch.float32, *HALF]),
    seed=st.integers(0, 2**16),
)
def test_random_shapes(shape, scaling, budget, dtype, seed):
    inputs = linear_inputs(shape, dtype=dtype, seed=seed)
    check_norm(inputs, scaling, budget=budget)


def peak_bytes(function) -> int:
    """The most bytes allocated at once during ``function``, beyond those alive before, from CPU memory events."""
    with torch.profiler.profile(profile_memory=True) as profile:
        function()
    events = sorted(
        (e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()
    )
    live = peak = 0
    for event in events:
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize("budget_mib", [16, 256])
def test_peak_memory(budget_mib):
    out_features, in_features, rank = 4096, 4096, 16
    inputs = linear_inputs((1, out_features, in_features, rank), dtype=torch.bfloat16)
    budget = budget_mib * 2**20
    args = (inputs.weight, inputs.lora_A, inputs.lora_B, 0.7)
    peak = peak_bytes(lambda: functional.norm_factored(*args, budget=budget))
    # A full chunk is at least half of the small budget, so the profiler did see the buffers.
    assert (
        min(budget, 8 * out_features * in_features) // 2 <= peak <= budget + 4 * out_features * (rank + 4) + 4 * 2**20
    )
