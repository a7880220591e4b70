"""Experts, grouped rows and mixed adapters against one dense layer per row.

``pytest tests/test_row_layers.py -s`` prints the largest errors (``-m 'full or not full'`` those of the whole matrix).
"""

import pytest
import torch
from error_table import error_table, label, record  # noqa: F401
from row_layers import LAYERS, OFFSETS, SCALING, budgets

from dorac import functional, reference
from dorac.testing import expert_inputs, linear_inputs

HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float64, torch.float32, *HALF)
NAMES = ("x", "weight", "lora_A", "lora_B", "magnitude", "bias")
RANKS = (1, 8, 64, 384)
names = pytest.mark.parametrize("name", LAYERS)


def run(function, tensors, dy=None):
    """The result and, where a cotangent is given, the gradients of all tensors that there are."""
    y = function(*tensors, scaling=SCALING)
    if dy is None:
        return y, {}
    present = {n: t for n, t in zip(NAMES, tensors, strict=True) if t is not None}
    return y, dict(zip(present, torch.autograd.grad(y, list(present.values()), dy.to(y)), strict=True))


def ones_like_result(layer, inputs):
    return torch.ones_like(layer.textbook(*inputs.double().tensors()))


def check(name, inputs, use_compile=False):
    layer = LAYERS[name]
    function = torch.compile(layer.function, fullgraph=True, backend="aot_eager") if use_compile else layer.function
    dy = torch.randn_like(ones_like_result(layer, inputs)).to(inputs.x)
    y, grads = run(function, inputs.leaves().tensors(), dy)
    for argument, budget in budgets(layer, inputs.tensors(), dy=dy).items():
        actual = y if argument == "y" else grads[argument]
        assert actual.dtype == (inputs.x if argument == "y" else getattr(inputs, argument)).dtype
        record(label(name, y, inputs.lora_A.shape[-2], use_compile), argument, actual, budget.truth)
        budget.check(actual, argument)


@names
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_dense_truth(name, dtype, bias, device):
    check(name, LAYERS[name].inputs(17, 24, 8, dtype=dtype, bias=bias, transposed=bias, device=device))


@names
@pytest.mark.parametrize("rank", RANKS)
def test_dense_truth_compiled(name, rank, device):
    dtype = {1: torch.float64, 8: torch.bfloat16, 64: torch.float32, 384: torch.float16}[rank]
    check(name, LAYERS[name].inputs(17, 24, rank, dtype=dtype, device=device), use_compile=True)


@pytest.mark.full
@names
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rank", RANKS)
@pytest.mark.parametrize("sizes", [(17, 24), (64, 32)])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("use_compile", [False, True])
def test_full_matrix(name, dtype, bias, rank, sizes, transposed, use_compile, device):
    inputs = LAYERS[name].inputs(*sizes, rank, dtype=dtype, bias=bias, transposed=transposed, device=device)
    check(name, inputs, use_compile)


@names
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 384])
def test_one_feature(name, dtype, rank, device):
    """One input and one output."""
    check(name, LAYERS[name].inputs(1, 1, rank, dtype=dtype, device=device))


@names
def test_wider_factors(name, device):
    """float32 factors and magnitude over a bfloat16 layer, PEFT's default: their gradients are float32's."""
    layer = LAYERS[name]
    inputs = layer.inputs(17, 24, 8, dtype=torch.bfloat16, factor_dtype=torch.float32, device=device)
    dy = ones_like_result(layer, inputs)
    y, grads = run(layer.function, inputs.leaves().tensors(), dy)
    assert y.dtype == torch.bfloat16
    # The cotangent is exact in bfloat16, and nothing on the way to them is rounded to it.
    bounds = budgets(layer, inputs.tensors(), dy=dy, dtype=torch.float32)
    for argument in ("lora_A", "lora_B"):
        assert grads[argument].dtype == torch.float32
        bounds[argument].check(grads[argument], argument)


@names
@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("use_compile", [False, True])
def test_autocast(name, dtype, use_compile, device):
    layer = LAYERS[name]
    inputs = layer.inputs(17, 24, 8, dtype=torch.float32, device=device)
    function = torch.compile(layer.function, fullgraph=True, backend="aot_eager") if use_compile else layer.function
    with torch.autocast(device, dtype=dtype):
        y = function(*inputs.tensors(), scaling=SCALING)
        eager = layer.function(*inputs.tensors(), scaling=SCALING)
    assert y.dtype == dtype
    assert torch.equal(y, eager)
    budgets(layer, inputs.tensors(), dtype=dtype, casts=3)["y"].check(y)


@names
def test_given_norm_replaces_the_computed_one(name):
    layer, inputs = LAYERS[name], LAYERS[name].inputs(5, 6, 3)
    norm = layer.norm(*inputs.tensors()[1:4], SCALING)
    expected = layer.function(*inputs.tensors(), scaling=SCALING)
    assert torch.equal(layer.function(*inputs.tensors(), scaling=SCALING, weight_norm=norm), expected)
    doubled = layer.function(*inputs.tensors(), scaling=SCALING, weight_norm=2 * norm)
    torch.testing.assert_close(doubled, layer.textbook(*inputs.tensors(), weight_norm=2 * norm))


@names
def test_zero_rows_have_g_one_and_train(name):
    layer = LAYERS[name]
    inputs = layer.inputs(5, 6, 3, dtype=torch.float32)
    inputs.weight[..., 3, :] = 0
    inputs.lora_B[..., 3, :] = 0
    y, grads = run(layer.function, inputs.leaves().tensors(), ones_like_result(layer, inputs))
    bias = inputs.bias if inputs.bias.ndim == 1 else None
    assert y.isfinite().all()
    assert all(grad.isfinite().all() for grad in grads.values())
    assert grads["lora_B"][..., 3, :].abs().sum() > 0
    if bias is not None:
        assert (y[..., 3] == bias[3]).all()


@names
def test_no_rows(name):
    layer = LAYERS[name]
    x, *rest = layer.inputs(5, 6, 3, dtype=torch.float32).leaves().tensors()
    if name == "experts":
        y = layer.function(x[:, :0], *rest, scaling=SCALING)
    elif name == "grouped":
        y = functional.dora_linear_grouped(x[:0], *rest, offsets=0 * OFFSETS, scaling=SCALING)
    else:
        y = functional.dora_linear_mixed(x[:0], *rest, adapter_index=torch.zeros(0).long(), scaling=SCALING)
    assert y.shape[-1] == 5
    assert y.numel() == 0
    y.sum().backward()
    assert all((t.grad == 0).all() for t in rest)


@pytest.mark.parametrize("name", ["experts", "mixed"])
@pytest.mark.parametrize("leading", [(), (2,), (2, 3)])
def test_leading_shapes(name, leading):
    layer = LAYERS[name]
    inputs = layer.inputs(5, 6, 3)
    x = torch.randn(inputs.x.shape[0], *leading, 6, dtype=torch.float64)
    y = layer.function(x, *inputs.tensors()[1:], scaling=SCALING)
    assert y.shape == (*x.shape[:-1], 5)
    flat = layer.textbook(x.reshape(x.shape[0], -1, 6), *inputs.tensors()[1:])
    torch.testing.assert_close(y.reshape(flat.shape), flat)


@pytest.mark.parametrize("name", ["experts", "grouped"])
def test_dropout_leaves_the_frozen_layer_alone(name):
    layer = LAYERS[name]
    inputs = layer.inputs(5, 6, 3)
    x, weight, lora_A, lora_B, magnitude, bias = inputs.tensors()
    torch.manual_seed(3)
    y = layer.function(*inputs.tensors(), scaling=SCALING, dropout_p=0.4)
    torch.manual_seed(3)
    dropped = torch.nn.functional.dropout(x, 0.4)
    assert 0 < (dropped == 0).double().mean() < 1
    x, weight, lora_A, lora_B, magnitude, bias, _ = layer.gather(*inputs.tensors(), None)
    dropped, *_ = layer.gather(dropped, *inputs.tensors()[1:], None)
    g = reference.magnitude_scale(magnitude, reference.row_norm(weight, lora_A, lora_B, SCALING)).unsqueeze(1)
    change = reference.compose_delta(dropped @ weight.mT, dropped @ lora_A.mT @ lora_B.mT, g, SCALING)
    torch.testing.assert_close(y.view_as(change), x @ weight.mT + bias.unsqueeze(1) + change)


@names
@pytest.mark.parametrize("norm_grad", [False, True])
def test_gradcheck(name, norm_grad):
    """With the norm given and with its gradient."""
    layer = LAYERS[name]
    leaves = layer.inputs(2, 3, 1).leaves()
    norm = layer.norm(*leaves.tensors()[1:4], SCALING)
    options = {"norm_grad": True} if norm_grad else {"weight_norm": norm}

    def function(*tensors):
        return layer.function(*tensors, scaling=SCALING, **options)

    assert torch.autograd.gradcheck(function, leaves.tensors(), check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, leaves.tensors(), check_fwd_over_rev=True)


@names
def test_second_derivatives_with_frozen_subsets(name):
    """create_graph through every subset of what is trained, against the textbook."""
    layer = LAYERS[name]
    inputs = layer.inputs(5, 6, 3)
    for trained in ((2, 3, 4), (0, 2), (3,), (1, 4), (0, 1, 2, 3, 4, 5)):
        results = []
        for function in (layer.function, layer.textbook):
            tensors = [t.clone().requires_grad_(i in trained) for i, t in enumerate(inputs.tensors())]
            chosen = [tensors[i] for i in trained]
            first = torch.autograd.grad(function(*tensors, scaling=SCALING).sin().sum(), chosen, create_graph=True)
            penalty = sum(grad.square().sum() for grad in first)
            results.append(torch.autograd.grad(penalty, chosen))
        torch.testing.assert_close(*results)


@pytest.mark.parametrize("name", ["experts", "grouped"])
@pytest.mark.parametrize("transposed", [False, True])
def test_nothing_of_the_weights_size_is_allocated(name, transposed):
    """Forward and backward; the norm's buffers stay in their budget."""
    experts, out_features, in_features = 16, 128, 128
    inputs = expert_inputs(experts, (4, out_features, in_features, 4), dtype=torch.float32, transposed=transposed)
    tensors = [t.requires_grad_(i in (0, 2, 3, 4)) for i, t in enumerate(inputs.tensors())]
    options = {"scaling": SCALING, "budget": 2**17}
    if name == "grouped":
        tensors[0] = tensors[0].flatten(0, 1)
        options["offsets"] = torch.arange(4, 4 * experts + 1, 4)
        function = functional.dora_linear_grouped
    else:
        function = functional.dora_linear
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function(*tensors, **options).sin().sum().backward()
    allocations = [event.cpu_memory_usage for event in profile.events()]
    assert max(allocations) > 0
    assert max(allocations) < inputs.weight.nbytes / 4


@names
def test_export_is_plain_aten(name):
    """An exported layer holds no op of dorac's."""
    layer = LAYERS[name]
    inputs = layer.inputs(5, 6, 3, dtype=torch.float32)

    class Layer(torch.nn.Module):
        def forward(self, *tensors):
            return layer.function(*tensors, scaling=SCALING)

    program = torch.export.export(Layer(), inputs.tensors()).run_decompositions()
    assert "dorac" not in str(program.graph)
    torch.testing.assert_close(program.module()(*inputs.tensors()), layer.function(*inputs.tensors(), scaling=SCALING))


@names
def test_no_recompile_over_rows_and_scaling(name):
    layer = LAYERS[name]
    inputs = layer.inputs(5, 6, 3, dtype=torch.float32)
    tensors = inputs.leaves().tensors()
    function = layer.functional
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")

    def step(rows, scaling):
        generator = torch.Generator().manual_seed(rows)
        options = {"scaling": scaling}
        x = torch.randn(3, rows, 6) if name == "experts" else torch.randn(rows, 6)
        if name == "grouped":
            options["offsets"] = torch.randint(rows + 1, (4,), generator=generator).sort()[0].int()
            options["offsets"][-1] = rows
        if name == "mixed":
            options["adapter_index"] = torch.randint(-1, 3, (rows,), generator=generator)
        y = compiled(x.requires_grad_(), *tensors[1:], **options)
        y.sum().backward()
        torch.testing.assert_close(y, function(x, *tensors[1:], **options))

    for rows, scaling in ((6, 0.5), (9, 0.5), (9, 2.0)):
        step(rows, scaling)
    with torch.compiler.set_stance("fail_on_recompile"):
        for rows, scaling in ((17, 0.25), (8, -1.0), (40, 3.0)):
            step(rows, scaling)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_bias_is_added_after_g_under_autocast(dtype, device):
    """In half precision it would be rounded with the product, and again with y: by a large g, or to infinity."""
    inputs = linear_inputs("odd", dtype=torch.float32, device=device)
    x, weight, lora_A, lora_B, magnitude, _ = inputs.tensors()
    magnitude, bias = (
        8 * magnitude,
        torch.full((len(magnitude),), 4096.0, device=device) + torch.arange(len(magnitude), device=device),
    )
    index = torch.zeros(len(x), dtype=torch.int64, device=device)
    with torch.autocast(device, dtype=dtype):
        stacked = (t.unsqueeze(0) for t in (lora_A, lora_B, magnitude))
        mixed = functional.dora_linear_mixed(x.unsqueeze(1), weight, *stacked, bias, adapter_index=index, scaling=0.7)
        one = functional.dora_linear(x, weight, lora_A, lora_B, magnitude, bias, scaling=0.7)
    assert mixed.dtype is dtype
    step = torch.finfo(dtype).eps * one.abs().max()
    assert (mixed.squeeze(1).float() - one.float()).abs().max() <= step
