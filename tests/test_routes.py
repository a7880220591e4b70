"""Every form of the layer that a GPU takes, on the CPU too: the leaves' aten bodies stand in for the kernels there."""

import pytest
import torch
from torch._dynamo.testing import AotEagerAndRecordGraphs
from torch.library import opcheck

from dorac import functional, reference
from dorac.ops import eager, front, linear, linear_function
from dorac.testing import Budget, layer_budgets, linear_inputs, rounded

ROUTES = ("separate", "accumulate", "fused")
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
S = 0.7


@pytest.fixture(params=ROUTES)
def route(request, monkeypatch) -> str:
    """The layer takes one form, whatever the table says."""
    monkeypatch.setattr(linear, "route", lambda *args, **kwargs: request.param)
    monkeypatch.setattr(eager, "dora_linear", lambda *args: None)  # which has one form of its own
    return request.param


def on_gpu(monkeypatch):
    monkeypatch.setattr(front, "has_kernels", lambda *tensors: True)


def layer(inputs, scaling=S, **options):
    norm = functional.norm_factored(inputs.weight, inputs.lora_A, inputs.lora_B, scaling)
    return functional.dora_linear(*inputs.tensors(), scaling=scaling, weight_norm=norm, **options)


def check(inputs, y, dy):
    """y and, for a given dy, the gradients that it left."""
    tensors = inputs.tensors()
    budgets = layer_budgets(reference.dora_linear, reference.row_norm, tensors, inputs.sums(), scaling=S, dy=dy)
    for name, budget in budgets.items():
        actual = y if name == "y" else getattr(inputs, name).grad
        assert actual.dtype is (inputs.x if name == "y" else getattr(inputs, name)).dtype
        budget.check(actual, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("regime", ["odd", "one_token", "no_tokens", "rank_over_128", "wide"])
@pytest.mark.parametrize("use_compile", [False, True])
def test_values_and_gradients(route, dtype, regime, use_compile, device):
    inputs = linear_inputs(regime, dtype=dtype, device=device).leaves()
    run = torch.compile(layer, fullgraph=True, backend="aot_eager") if use_compile else layer
    y = run(inputs)
    dy = torch.randn(y.shape, dtype=torch.float64).to(dtype).to(device)
    y.backward(dy)
    check(inputs, y, dy)


@pytest.mark.parametrize("leaf", ["scale_backward", "lora_b_backward"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_magnitudes_gradient_is_float32s(leaf, dtype, device):
    """Half-precision products are summed as they are, in float32."""
    inputs = linear_inputs("odd", dtype=dtype, device=device)
    inner, h = inputs.x @ inputs.weight.T, inputs.x @ inputs.lora_A.T
    norm = functional.norm_factored(inputs.weight, inputs.lora_A, inputs.lora_B, S)
    dy, scaling = torch.randn_like(inner), torch.tensor(S, device=device)
    further = {"scale_backward": (), "lora_b_backward": (h, scaling, False, False)}
    d_m = getattr(torch.ops.dorac, leaf)(dy, inner, inputs.magnitude, norm, *further[leaf])[1]
    terms = dy.double() * inner.double() / norm.double()
    bound = rounded(terms.abs().sum(0), torch.float32, 2, len(dy))
    Budget(terms.sum(0), bound).check(d_m, leaf)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gradient_of_a_wider_bias_is_float32s(dtype, device):
    """Under autocast y is in half precision, and a float32 bias gets the float32 sum over the tokens."""
    inputs = linear_inputs("aligned", dtype=torch.float32, device=device).leaves()
    with torch.autocast(device, dtype=dtype):
        y = layer(inputs)
    dy = torch.randn_like(y)
    y.backward(dy)
    Budget(dy.double().sum(0), rounded(dy.double().abs().sum(0), torch.float32, 1, len(dy))).check(inputs.bias.grad)


def test_routes_agree(monkeypatch, device):
    """In float64 the forms differ by the order of their sums alone."""
    results = []
    for name in ROUTES:
        monkeypatch.setattr(linear, "route", lambda *args, _name=name, **kwargs: _name)
        inputs = linear_inputs("odd", device=device).leaves()
        y = layer(inputs)
        y.square().sum().backward()
        results.append([y.detach(), *(t.grad for t in inputs.tensors())])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("subset", [(0,), (1,), (2,), (3,), (4,), (5,), (2, 3), (2, 3, 4), (0, 4), (1, 5)])
def test_which_gradients_exist(route, subset, device):
    inputs = linear_inputs("odd", device=device)
    leaves = [t.detach().clone().requires_grad_(i in subset) for i, t in enumerate(inputs.tensors())]
    norm = functional.norm_factored(*leaves[1:4], S)
    functional.dora_linear(*leaves, scaling=S, weight_norm=norm).square().sum().backward()
    everything = linear_inputs("odd", device=device).leaves()
    layer(everything).square().sum().backward()
    for i, (leaf, full) in enumerate(zip(leaves, everything.tensors(), strict=True)):
        assert (leaf.grad is not None) == (i in subset), i
        if i in subset:
            torch.testing.assert_close(leaf.grad, full.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("bias", [True, False])
def test_gradcheck(route, bias):
    inputs = linear_inputs((3, 4, 5, 2), bias=bias).leaves()
    norm = functional.norm_factored(inputs.weight, inputs.lora_A, inputs.lora_B, S)
    args = [t for t in inputs.tensors() if t is not None]

    def function(*tensors):
        return functional.dora_linear(*tensors, scaling=S, weight_norm=norm)

    options = {"check_batched_grad": True, "fast_mode": True}
    assert torch.autograd.gradcheck(function, args, check_forward_ad=True, **options)
    assert torch.autograd.gradgradcheck(function, args, check_rev_over_rev=True, **options)


@pytest.mark.parametrize("how", ["eager", "differentiable", "transform", "compiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [4, 24])  # with both products along in backward, and with one
def test_the_magnitude_of_a_zero_row_gets_no_gradient(route, how, dtype, rank, device):
    """Its g is the constant 1, whatever dy is; the gradients of the other rows are not touched."""
    inputs = linear_inputs((9, 30, 20, rank), dtype=dtype, device=device)
    norm = functional.norm_factored(inputs.weight, inputs.lora_A, inputs.lora_B, S)
    norm[[3, 7]] = torch.tensor([0.0, 1e-13], device=device)
    leaves = inputs.leaves()
    y_weights = torch.linspace(1, 2, 30, device=device)

    def loss(*tensors):
        return (functional.dora_linear(*tensors, scaling=S, weight_norm=norm).float() * y_weights).sum()

    if how == "transform":
        grads = torch.func.grad(loss, argnums=(3, 4))(*inputs.tensors())
    else:
        run = torch.compile(loss, fullgraph=True, backend="aot_eager") if how == "compiled" else loss
        twice = how == "differentiable"
        grads = torch.autograd.grad(run(*leaves.tensors()), (leaves.lora_B, leaves.magnitude), create_graph=twice)
    assert (grads[1] == 0).nonzero().flatten().tolist() == [3, 7]
    assert (grads[0] != 0).all()  # the row itself learns


def test_second_derivative_of_the_magnitude_alone(route):
    """With only m and x trained, the second derivative goes through the saved inner."""
    inputs = linear_inputs((3, 4, 5, 2))
    x, m = inputs.x.requires_grad_(), inputs.magnitude.requires_grad_()
    norm = functional.norm_factored(inputs.weight, inputs.lora_A, inputs.lora_B, S)

    def function(x, m):
        args = (x, inputs.weight, inputs.lora_A, inputs.lora_B, m, inputs.bias)
        return functional.dora_linear(*args, scaling=S, weight_norm=norm)

    assert torch.autograd.gradgradcheck(function, (x, m))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factor_dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("magnitude_dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
def test_every_mix_of_dtypes_has_a_route(dtype, factor_dtype, magnitude_dtype, training, monkeypatch, device):
    if device == "cpu":  # as on a GPU, whose kernels leave float64 alone
        monkeypatch.setattr(front, "has_kernels", lambda *tensors: all(t.dtype.itemsize < 8 for t in tensors))
    inputs = linear_inputs(
        "odd", dtype=dtype, factor_dtype=factor_dtype, magnitude_dtype=magnitude_dtype, device=device
    ).leaves()
    with torch.set_grad_enabled(training):
        y = layer(inputs)
    assert y.dtype is dtype
    dy = torch.ones_like(y)
    if training:
        y.backward(dy)
    check(inputs, y, dy if training else None)


def test_gradient_penalty_in_half_precision(route, device):
    """The second derivative reaches lora_A, lora_B and x through inner, also where the products ran along."""
    inputs = linear_inputs((8, 24, 16, 4), dtype=torch.bfloat16, device=device).leaves()
    truth = inputs.double()

    def penalised(i):
        norm = functional.norm_factored(i.weight, i.lora_A, i.lora_B, S).detach()
        loss = functional.dora_linear(*i.tensors(), scaling=S, weight_norm=norm).double().square().mean()
        (g,) = torch.autograd.grad(loss, [i.magnitude], create_graph=True)
        (loss + 50 * g.double().square().sum()).backward()

    penalised(inputs)
    penalised(truth)
    bound = 4 * torch.finfo(torch.bfloat16).eps  # inner, g, its square's derivative and the result are rounded
    for name in ("x", "lora_A", "lora_B", "magnitude"):
        actual, best = getattr(inputs, name).grad.double(), getattr(truth, name).grad
        assert (actual - best).norm() <= bound * best.norm(), name


def test_backward_under_autocast_alone(route, device):
    """A layer that ran outside autocast, its backward inside."""
    inputs = linear_inputs("odd", dtype=torch.float32, device=device).leaves()
    twin = inputs.leaves()
    layer(twin).sum().backward()
    y = layer(inputs).sum()
    with torch.autocast(device, dtype=torch.bfloat16):
        y.backward()
    for left, right in zip(inputs.tensors(), twin.tensors(), strict=True):
        assert torch.equal(left.grad, right.grad)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("rank", [16, 40])
def test_the_kernels_survive_compilation(training, rank, monkeypatch):
    """The leaves are nodes of the forward and backward graphs; g's product is aten, which Inductor fuses."""
    on_gpu(monkeypatch)
    inputs = linear_inputs((96 if training else 64, 128, 64, rank), dtype=torch.bfloat16).leaves()
    backend = AotEagerAndRecordGraphs()
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    with torch.set_grad_enabled(training):
        y = compiled(inputs)
        if training:
            y.sum().backward()

    def leaves(graph):
        targets = (str(node.target) for node in graph.graph.nodes)
        return [t.removesuffix(".default") for t in targets if t.startswith("dorac.")]

    forward = leaves(backend.fw_graphs[0])
    if training:
        nodes = [*backend.fw_graphs[0].graph.nodes, *backend.bw_graphs[0].graph.nodes]
        products = [n.meta["val"].shape for n in nodes if n.target is torch.ops.aten.mul.Tensor]
        assert (96, rank) not in products  # s is the alpha of a GEMM
        assert forward == ["dorac.row_norm", "dorac.low_rank_linear", "dorac.mag_scale"]
        along = "dorac.lora_b_backward"
        assert leaves(backend.bw_graphs[0]) == [along, "dorac.low_rank_linear"]
    else:
        assert forward == ["dorac.row_norm", "dorac.up_compose"]


@pytest.mark.parametrize(("rows", "dynamic"), [(5, False), (5, True), (0, False)])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_scaled_product_reads_nothing_but_its_factors(rows, dynamic, transposed):
    """What the GEMM is given to add, and must not: part of the right factor, or zeros where none is known to be."""
    left, right = torch.randn(3, rows), torch.randn(4, rows).T if transposed else torch.randn(rows, 4)
    compiled = torch.compile(linear_function.scaled_product, fullgraph=True, dynamic=dynamic)
    y = compiled(left, right, torch.tensor(1.5), 1.5, False)
    torch.testing.assert_close(y, 1.5 * (left @ right))


def test_the_table(monkeypatch):
    half, wide = torch.empty(4096, 8, dtype=torch.bfloat16), torch.empty(4096, 8)
    small, large = torch.empty(16, 8, dtype=torch.bfloat16), torch.empty(384, 8, dtype=torch.bfloat16)
    assert linear.route(half, small, training=True, traced=True) == "separate"
    on_gpu(monkeypatch)
    assert linear.route(half, small, training=True, traced=True) == "accumulate"
    assert linear.route(half[:65], small, training=True, traced=True) == "accumulate"
    assert linear.route(half[:64], small, training=True, traced=True) == "fused"
    assert linear.route(half[:1], small, training=True, traced=True) == "fused"
    assert linear.route(half, small, training=True, traced=False) == "fused"
    assert linear.route(half, large, training=True, traced=False) == "fused"
    assert linear.route(half[:1], large, training=False, traced=True) == "separate"
    assert linear.route(half[:1], large, training=False, traced=False) == "fused"
    assert linear.route(half[:17], large, training=False, traced=True) == "fused"
    assert linear.route(half, small, training=False, traced=True) == "accumulate"
    assert linear.route(half, large, training=False, traced=True) == "accumulate"
    assert linear.route(half, large, training=False, traced=False) == "fused"
    assert linear.route(half, wide[:16], training=True, traced=True) == "fused"
    assert linear.route(wide, wide[:16], training=False, traced=False) == "accumulate"


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_an_older_gpu_computes_the_same_in_aten(dtype, monkeypatch):
    inputs = linear_inputs("odd", dtype=dtype, device="cuda").leaves()
    layer(inputs).sum().backward()
    monkeypatch.setattr(front, "_has_kernels", lambda device: False)
    older = linear_inputs("odd", dtype=dtype, device="cuda").leaves()
    layer(older).sum().backward()
    assert linear.route(older.x, older.lora_A, training=True, traced=False) == "separate"
    tolerance = {"rtol": 3e-2, "atol": 3e-2} if dtype.itemsize == 2 else {"rtol": 1e-5, "atol": 1e-5}
    for left, right in zip(inputs.tensors(), older.tensors(), strict=True):
        torch.testing.assert_close(left.grad, right.grad, **tolerance)


def test_no_recompile_over_lengths_and_scalings(monkeypatch):
    on_gpu(monkeypatch)
    run = torch.compile(layer, fullgraph=True, backend="aot_eager")
    shapes = [(64, 32, 24, 4), (96, 32, 24, 4)]
    for shape, scaling in zip(shapes, (0.5, 2.0), strict=True):
        run(linear_inputs(shape, dtype=torch.bfloat16).leaves(), scaling).sum().backward()
    with torch.compiler.set_stance("fail_on_recompile"):
        for tokens, scaling in ((128, 1.3), (33, -1.0), (65, 0.25), (7, 4.0)):
            run(linear_inputs((tokens, 32, 24, 4), dtype=torch.bfloat16).leaves(), scaling).sum().backward()


def test_transforms_take_the_formula(monkeypatch):
    """Under torch.func no leaf may run: none has a batching rule or a derivative."""
    on_gpu(monkeypatch)
    inputs = linear_inputs((3, 4, 5, 2))
    others = inputs.tensors()[1:]
    norm = functional.norm_factored(inputs.weight, inputs.lora_A, inputs.lora_B, S)

    def loss(x):
        return functional.dora_linear(x, *others, scaling=S, weight_norm=norm).square().sum()

    per_sample = torch.vmap(torch.func.grad(loss))(inputs.x)
    one_by_one = torch.stack([torch.func.grad(loss)(row) for row in inputs.x])
    torch.testing.assert_close(per_sample, one_by_one)
    _, tangent = torch.func.jvp(loss, (inputs.x,), (torch.ones_like(inputs.x),))
    torch.testing.assert_close(tangent, per_sample.sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast(route, dtype, device):
    """Float32 tensors are cast as autocast casts them, in forward and backward."""
    inputs = linear_inputs("odd", dtype=torch.float32, device=device)
    norm = functional.norm_factored(inputs.weight, inputs.lora_A, inputs.lora_B, S)
    cast = inputs.map(lambda t: t.to(torch.bfloat16))
    leaves = inputs.leaves()
    x = leaves.x.detach().to(dtype).requires_grad_()
    with torch.autocast(device, dtype=torch.bfloat16):
        y = functional.dora_linear(x, *leaves.tensors()[1:], scaling=S, weight_norm=norm)
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert x.grad.dtype == dtype
    assert leaves.lora_A.grad.dtype == torch.float32
    plain = functional.dora_linear(
        cast.x, cast.weight, cast.lora_A, cast.lora_B, inputs.magnitude, inputs.bias, scaling=S, weight_norm=norm
    )
    assert torch.equal(y, plain)


def leaf_args(name, dtype, transposed, device):
    inputs = linear_inputs("odd", dtype=dtype, device=device)
    wide = torch.promote_types(dtype, torch.float32)
    norm = functional.norm_factored(inputs.weight, inputs.lora_A, inputs.lora_B, S)
    h, base = inputs.x @ inputs.lora_A.T, inputs.x @ inputs.weight.T
    if transposed:
        h, base = h.T.contiguous().T, base.T.contiguous().T
        assert not base.is_contiguous()
    if name == "low_rank_linear":
        return inputs.x, inputs.weight, h, inputs.lora_B
    if name == "scale":
        return base, inputs.magnitude, norm, inputs.bias
    if name == "mag_scale":
        return inputs.magnitude, norm
    if name == "cast":
        return h, torch.bfloat16 if dtype is torch.float32 else torch.float32
    if name == "scale_backward":
        return base, base, inputs.magnitude, norm
    scaling = torch.tensor(S, dtype=wide, device=device)
    if name == "lora_b_backward":
        return base, base, inputs.magnitude, norm, h, scaling, True, False
    if name == "delta_linear":
        x = inputs.x
        return x, 2 * x, inputs.weight, h, inputs.lora_B, inputs.magnitude, norm, scaling, inputs.bias
    return base, h, inputs.lora_B, inputs.magnitude, norm, scaling, inputs.bias, False


LAYER_LEAVES = [
    *("low_rank_linear", "scale", "up_compose", "up_compose_forward", "delta_linear"),
    *("scale_backward", "lora_b_backward", "mag_scale", "cast"),
]


@pytest.mark.parametrize("name", LAYER_LEAVES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_opcheck_of_the_leaves(name, dtype, transposed, device):
    if name == "lora_b_backward" and dtype.itemsize > 2 and device == "cuda":
        pytest.skip("the layer takes this op for half precision alone, which its tiles are sized for")
    opcheck(getattr(torch.ops.dorac, name).default, leaf_args(name, dtype, transposed, device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grads", ["none", "all", "frozen_magnitude", "norm"])
@pytest.mark.parametrize("transposed", [False, pytest.param(True, marks=pytest.mark.full)])
def test_opcheck_of_the_layer(dtype, grads, transposed, device):
    inputs = linear_inputs("odd", dtype=dtype, transposed=transposed, bias=not transposed, device=device)
    assert inputs.weight.is_contiguous() != transposed
    norm = functional.norm_factored(inputs.weight, inputs.lora_A, inputs.lora_B, S)
    if grads != "none":
        inputs = inputs.leaves()
        inputs.magnitude.requires_grad_(grads == "all")
        norm.requires_grad_(grads == "norm")
    scaling = torch.tensor(S, dtype=norm.dtype, device=device)
    tensors = (*inputs.tensors()[:5], norm, scaling, inputs.bias)
    # Eager and graph take one form on the CPU; those that a GPU takes round differently.
    tolerance = {"rtol": 4e-2, "atol": 4e-2} if dtype.itemsize == 2 and device == "cuda" else {}
    if tolerance and grads in (
        "all",
        "norm",
    ):  # these gradients are sums of as many rounded numbers as there are tokens
        y = torch.ops.dorac.dora_linear.default(*tensors[:7]).detach().float()
        terms = y.abs().sum(0) / norm.detach().float()
        tolerance["atol"] = terms.max().item() * torch.finfo(dtype).eps  # half of it in either form
    for number in (None, S):
        opcheck(torch.ops.dorac.dora_linear.default, (*tensors, number), **tolerance)
    for low_rank in (True, False):
        x_adapter = (2 * inputs.x).detach().requires_grad_(grads != "none")
        opcheck(torch.ops.dorac.dora_linear.default, (*tensors, S, x_adapter, low_rank), **tolerance)
