"""The gradient through the norm, on request: that of the dense norm, without a transient of the weight's size."""

import pytest
import torch
from test_norm import peak_bytes
from torch._dynamo.testing import AotEagerAndRecordGraphs

import dorac
from dorac import functional, reference
from dorac.testing import REGIMES, layer_budgets, linear_inputs, norm_gradient_budgets

HALF = (torch.bfloat16, torch.float16)
S = 0.7


def norm(weight, lora_A, lora_B, scaling=S, **options):
    return functional.norm_factored(weight, lora_A, lora_B, scaling, norm_grad=True, **options)


def layer(*args, **options):
    return functional.dora_linear(*args, **{"scaling": S, "norm_grad": True} | options)


def textbook(*args):
    return reference.dora_linear(*args, scaling=S, norm_grad=True)


def experts(*tensors):
    """Two different experts of each tensor."""
    return [torch.stack([t, 1.5 * t - 0.1]).detach().requires_grad_() for t in tensors]


def check_norm_gradients(inputs, run=norm, **options):
    """Value and gradients of the norm beside those of the dense one."""
    tensors = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in inputs.tensors()[1:4]]
    n = run(*tensors, **options)
    plain = functional.norm_factored(*inputs.tensors()[1:4], S, **options)
    assert torch.equal(n, plain), "the gradient changes no value"
    d_n = torch.randn(n.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(n)
    n.backward(d_n)
    budgets = norm_gradient_budgets(reference.row_norm, tensors, inputs.sums(), d_n, scaling=S)
    for (name, budget), tensor in zip(budgets.items(), tensors, strict=True):
        assert tensor.grad.dtype == tensor.dtype
        budget.check(tensor.grad, name)


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
def test_equals_the_dense_gradient(regime, dtype, device):
    check_norm_gradients(linear_inputs(regime, dtype=dtype, device=device))


@pytest.mark.parametrize("factor_dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("budget", [1, 2**28])
def test_mixed_dtypes_layouts_budgets(factor_dtype, transposed, budget, device):
    inputs = linear_inputs("odd", dtype=torch.bfloat16, factor_dtype=factor_dtype, transposed=transposed, device=device)
    check_norm_gradients(inputs, budget=budget)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.full)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled(backend, dtype, device):
    inputs = linear_inputs("odd", dtype=dtype, factor_dtype=torch.float32, device=device)
    check_norm_gradients(inputs, torch.compile(norm, fullgraph=True, backend=backend))


def test_experts():
    i = linear_inputs((3, 5, 4, 2)).leaves()
    tensors = experts(i.weight, i.lora_A, i.lora_B)
    n = norm(*tensors)
    for e in range(2):
        one = [t[e] for t in tensors]
        expected = torch.autograd.grad(reference.row_norm(*one, S).square().sum(), one)
        actual = torch.autograd.grad(n[e].square().sum(), tensors, retain_graph=True)
        torch.testing.assert_close([t[e] for t in actual], list(expected))


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("options", [{}, {"budget": 1}, {"cached": True}], ids=["one_chunk", "columns", "cached"])
def test_gradcheck_of_the_norm(batched, options):
    i = linear_inputs((3, 5, 4, 2)).leaves()
    tensors = (i.weight, i.lora_A, i.lora_B)
    scaling = torch.tensor(S, dtype=torch.float64, requires_grad=True)
    if batched:
        tensors = experts(*tensors)

    def function(weight, lora_A, lora_B, scaling):
        square = {"weight_sq": weight.square().sum(-1)} if options.get("cached") else options
        return norm(weight, lora_A, lora_B, scaling, **square)

    args = (*tensors, scaling)
    assert torch.autograd.gradcheck(function, args, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(function, args, check_fwd_over_rev=True, check_batched_grad=True)


@pytest.mark.parametrize("how", ["computed", "given", "dropout"])
def test_gradcheck_of_the_layer(how):
    """Also where the norm is computed outside and handed in, and on dropout's path (with nothing dropped)."""
    args = linear_inputs((3, 5, 4, 2)).leaves().tensors()
    scaling = torch.tensor(S, dtype=torch.float64, requires_grad=True)

    def function(*args):
        *tensors, scaling = args
        if how == "given":
            options = {"norm_grad": False, "weight_norm": norm(*tensors[1:4], scaling)}
        else:
            options = {"dropout_p": 1e-30} if how == "dropout" else {}
        return layer(*tensors, scaling=scaling, **options)

    for arguments in ((*args, scaling), (*args, S)):  # a scaling without gradient takes the fused form
        fast = {"fast_mode": how != "computed"}
        assert torch.autograd.gradcheck(function, arguments, check_forward_ad=True, check_batched_grad=True, **fast)
        assert torch.autograd.gradgradcheck(function, arguments, check_fwd_over_rev=True, **fast)


@pytest.mark.parametrize("regime", ["odd", "rank_1", "one_token", "no_tokens"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("use_compile", [False, True])
def test_layer_equals_the_dense_layer(regime, dtype, use_compile, device):
    inputs = linear_inputs(regime, dtype=dtype, device=device).leaves()
    run = torch.compile(layer, fullgraph=True, backend="aot_eager") if use_compile else layer
    y = run(*inputs.tensors())
    assert torch.equal(y, run(*inputs.tensors(), norm_grad=False)), "the gradient changes no value"
    dy = torch.randn(y.shape, dtype=torch.float64).to(y)
    y.backward(dy)
    tensors = inputs.tensors()
    budgets = layer_budgets(
        reference.dora_linear, reference.row_norm, tensors, inputs.sums(), scaling=S, dy=dy, norm_grad=True
    )
    for name, budget in budgets.items():
        budget.check(y if name == "y" else getattr(inputs, name).grad, name)


def test_the_default_is_another_gradient():
    """What norm_grad adds is not small: the default's gradient of lora_B is off by more than a tenth."""
    inputs = linear_inputs("odd").leaves()
    gradients = [
        torch.autograd.grad(layer(*inputs.tensors(), norm_grad=flag).square().sum(), inputs.lora_B)[0]
        for flag in (False, True)
    ]
    assert (gradients[0] - gradients[1]).norm() > 0.1 * gradients[1].norm()


@pytest.mark.parametrize("subset", [(), (0,), (1,), (2,), (0, 2), (3,)])
def test_which_gradients_exist(subset):
    i = linear_inputs("odd")
    tensors = [*(t.clone() for t in (i.weight, i.lora_A, i.lora_B)), torch.tensor(S, dtype=torch.float64)]
    for index in subset:
        tensors[index].requires_grad_()
    n = norm(*tensors)
    assert n.requires_grad == bool(subset)
    if subset:
        n.sum().backward()
    for index, tensor in enumerate(tensors):
        assert (tensor.grad is not None) == (index in subset)
    with torch.no_grad():
        assert not norm(*tensors).requires_grad


@pytest.mark.parametrize("transform", [False, True])
def test_zero_rows_are_constant(transform):
    i = linear_inputs("odd", dtype=torch.float32)
    i.weight[3] = i.lora_B[3] = 0
    tensors = [t.requires_grad_() for t in (i.weight, i.lora_A, i.lora_B)]
    function = lambda *t: layer(i.x, *t, i.magnitude, i.bias).square().sum()  # noqa: E731
    if transform:
        gradients = torch.func.grad(function, argnums=(0, 1, 2))(*tensors)
    else:
        gradients = torch.autograd.grad(function(*tensors), tensors)
    constant = torch.autograd.grad(layer(i.x, *tensors, i.magnitude, i.bias, norm_grad=False).square().sum(), tensors)
    assert all(g.isfinite().all() for g in gradients)
    torch.testing.assert_close(gradients[2][3], constant[2][3])  # the row trains as it does without norm_grad
    assert gradients[2][3].abs().sum() > 0
    assert not torch.allclose(gradients[2][4], constant[2][4])


@pytest.mark.parametrize("transform", [False, True])
def test_no_gradient_of_the_norm_of_a_row_that_is_nearly_zero(transform):
    """Below 1e-12 it is a zero row, though V points somewhere."""
    i = linear_inputs("odd")
    i.weight[3] *= 1e-14
    i.lora_B[3] = 0
    tensors = i.weight, i.lora_A, i.lora_B
    assert 0 < norm(*tensors)[3] <= 1e-12
    function = lambda *t: norm(*t)[3]  # noqa: E731
    if transform:
        gradients = torch.func.grad(function, argnums=(0, 1, 2))(*tensors)
    else:
        gradients = torch.autograd.grad(function(*(t.requires_grad_() for t in tensors)), tensors)
    assert all((g == 0).all() for g in gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_does_not_reach_the_gradient(dtype, device):
    inputs = linear_inputs("odd", dtype=torch.float32, device=device)
    args = inputs.weight.to(dtype), inputs.lora_A.requires_grad_(), inputs.lora_B.requires_grad_()
    expected = torch.autograd.grad(norm(*args).sum(), args[1:])
    outside = norm(*args).sum()
    compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
    with torch.autocast(device, dtype=torch.bfloat16):
        inside = norm(*args)
        runs = [torch.autograd.grad(loss, args[1:]) for loss in (inside.sum(), outside, compiled(*args).sum())]

    def loss(*factors):
        with torch.autocast(device, dtype=torch.bfloat16):
            return norm(args[0], *factors).sum()

    transformed = torch.func.grad(loss, argnums=(0, 1))(*args[1:])
    assert inside.dtype == torch.float32
    for run in runs:
        assert all(map(torch.equal, run, expected))
    torch.testing.assert_close(transformed, expected)


@pytest.mark.parametrize("budget_mib", [4, 16])
def test_peak_memory_of_forward_and_backward(budget_mib):
    """Nothing of the weight's size with a frozen half-precision weight under float32 factors, as PEFT has them."""
    out_features, in_features, rank = 2048, 4096, 16
    inputs = linear_inputs((1, out_features, in_features, rank), dtype=torch.bfloat16, factor_dtype=torch.float32)
    factors = inputs.lora_A.requires_grad_(), inputs.lora_B.requires_grad_()
    budget = budget_mib * 2**20

    def step():
        norm(inputs.weight, *factors, budget=budget).sum().backward()

    step()  # the leaves' .grad are there from now on
    peak = peak_bytes(step)
    gradients = 2 * 4 * rank * (out_features + in_features)  # of this step, in chunks and put together
    # Half a chunk is more than the rest, so the profiler did see the buffers.
    assert budget // 2 <= peak <= budget + gradients + 2**20
    if budget_mib == 4:
        assert peak < out_features * in_features * 2, "less than the weight itself"


def test_no_activation_more_is_kept():
    """The layer keeps for backward what it keeps without norm_grad, and vectors and factors."""

    def kept(**options):
        inputs, sizes = linear_inputs("aligned", dtype=torch.float32).leaves(), {}
        inputs.weight.requires_grad_(False)

        def pack(t):
            sizes[t.data_ptr()] = t.numel()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            y = layer(*inputs.tensors(), **options)
        return sum(sizes.values()), y

    (more, y), (less, _) = kept(), kept(norm_grad=False)
    assert more - less <= 8 * y.shape[-1]


def test_graph_holds_the_leaf_ops():
    inputs = linear_inputs("aligned", dtype=torch.float32).leaves()
    inputs.weight.requires_grad_(False)
    backend = AotEagerAndRecordGraphs()
    torch.compile(layer, fullgraph=True, backend=backend)(*inputs.tensors()).sum().backward()

    def leaves(graph):
        return [str(n.target) for n in graph.graph.nodes if str(n.target).startswith("dorac.")]

    assert leaves(backend.fw_graphs[0]) == ["dorac.row_norm.default"]
    assert leaves(backend.bw_graphs[0]) == ["dorac.row_norm_backward.default"]


def test_no_recompile_over_lengths_and_scalings():
    run = torch.compile(layer, fullgraph=True, backend="aot_eager")

    def step(tokens, scaling):
        inputs = linear_inputs((tokens, 32, 24, 4), dtype=torch.float32).leaves()
        twin = inputs.leaves()
        run(*inputs.tensors(), scaling=scaling).square().sum().backward()
        layer(*twin.tensors(), scaling=scaling).square().sum().backward()
        torch.testing.assert_close([t.grad for t in inputs.tensors()], [t.grad for t in twin.tensors()])

    for tokens, scaling in ((64, 0.5), (96, 2.0)):
        step(tokens, scaling)
    with torch.compiler.set_stance("fail_on_recompile"):
        for tokens, scaling in ((128, 1.3), (33, -1.0), (7, 4.0)):
            step(tokens, scaling)


def test_export_holds_aten_alone_and_its_gradient():
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.tensors = torch.nn.ParameterList(linear_inputs("odd").tensors()[1:])

        def forward(self, x):
            return layer(x, *self.tensors)

    module, x = Layer(), linear_inputs("odd").x
    program = torch.export.export(module, (x,)).run_decompositions()
    assert not [n for n in program.graph.nodes if "dorac" in str(n.target)]
    exported = program.module()
    torch.testing.assert_close(exported(x), textbook(x, *module.tensors))
    exported(x).square().sum().backward()
    expected = torch.autograd.grad(textbook(x, *module.tensors).square().sum(), list(module.parameters()))
    torch.testing.assert_close(tuple(p.grad for p in exported.parameters()), expected)


def test_repeats_bitwise(device):
    inputs = linear_inputs("rank_over_128", dtype=torch.bfloat16, device=device).leaves()
    tensors = (inputs.weight, inputs.lora_A, inputs.lora_B)
    runs = [torch.autograd.grad(norm(*tensors).sum(), tensors) for _ in range(3)]
    assert all(all(map(torch.equal, run, runs[0])) for run in runs)


def test_bad_input():
    i = linear_inputs("odd")
    n = functional.norm_factored(i.weight, i.lora_A, i.lora_B, S)
    with pytest.raises(ValueError, match="norm_grad must be False where weight_norm is given"):
        layer(*i.tensors(), weight_norm=n)
    with pytest.raises(TypeError, match="norm_grad must be a bool, got int"):
        layer(*i.tensors(), norm_grad=1)
    with pytest.raises(TypeError, match="norm_grad must be a bool, got str"):
        functional.norm_factored(i.weight, i.lora_A, i.lora_B, S, norm_grad="yes")
    with pytest.raises(TypeError, match="norm_grad must be a bool, got NoneType"):
        dorac.nn.DoraLinear(torch.nn.Linear(4, 4), norm_grad=None)


@pytest.mark.parametrize("use_compile", [False, True])
def test_modules_pass_it_on(use_compile):
    model = torch.nn.Sequential(torch.nn.Linear(6, 5, dtype=torch.float64))
    dorac.apply_dora(model, ["0"], r=2, init_lora_weights=False, norm_grad=True)
    adapted = model[0]
    x = torch.randn(3, 6, dtype=torch.float64)
    run = torch.compile(model, fullgraph=True, backend="aot_eager") if use_compile else model
    run(x).square().sum().backward()
    parameters = [adapted.lora_A, adapted.lora_B, adapted.lora_magnitude_vector]
    y = reference.dora_linear(x, adapted.weight, *parameters, adapted.bias, scaling=adapted.scaling, norm_grad=True)
    torch.testing.assert_close(tuple(p.grad for p in parameters), torch.autograd.grad(y.square().sum(), parameters))
