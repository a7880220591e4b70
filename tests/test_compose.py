import pytest
import torch

from dorac import functional, reference
from dorac.testing import Budget, rounded

HALF = (torch.bfloat16, torch.float16)
SHAPES = {
    "2d": (33, 65),
    "1d": (65,),
    "4d": (2, 3, 5, 7),
    "one_token": (1, 64),
    "no_tokens": (0, 8),
    "no_outputs": (4, 0),
}


def inputs(shape, dtype, lora_dtype=None, device="cpu", bias=True):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    base, lora, offset, shift = draw(*shape), draw(*shape), draw(shape[-1]), draw(shape[-1])
    g = 1 + 0.002 * offset  # the spread of a trained adapter: half precision would round most of it away
    wide = torch.promote_types(dtype, torch.float32)
    tensors = base.to(dtype), lora.to(lora_dtype or dtype), g.to(wide), shift.to(dtype) if bias else None
    return [None if t is None else t.to(device) for t in tensors]


# In float32 (float64): s, its products, the sum, the products with g, the order that PEFT adds up in, the bias.
ARITHMETIC = 8


def references(tensors, scaling, delta, dtype):
    base, lora, g, bias = (None if t is None else t.detach().to(dtype) for t in tensors)
    return reference.compose_delta(base, lora, g, scaling) if delta else reference.compose(base, lora, g, scaling, bias)


def budget_of(tensors, scaling, delta):
    """Computed in float32, rounded once."""
    dtype = tensors[0].dtype
    truth = references(tensors, scaling, delta, torch.float64)
    base, lora, g, bias = (None if t is None else t.detach().double() for t in tensors)
    size = ((g - 1 if delta else g) * base).abs() + (g * scaling * lora).abs() + (0 if bias is None else bias.abs())
    wide = torch.promote_types(dtype, torch.float32)
    inner = rounded(size, wide, 0, ARITHMETIC)
    dense = references(tensors, scaling, delta, wide).to(dtype)
    return Budget(truth, inner + rounded(truth.abs() + inner, dtype, 1, 0), dense)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("use_compile", [False, pytest.param(True, marks=pytest.mark.full)])
def test_equals_the_formula(shape, dtype, delta, use_compile, device):
    tensors = inputs(shape, dtype, device=device, bias=not delta)
    compose = torch.compile(functional.compose, fullgraph=True) if use_compile else functional.compose
    for scaling in (0.7, -2.0, 0.0):
        actual = compose(*tensors[:3], scaling, bias=tensors[3], delta=delta)
        assert actual.dtype == dtype
        budget_of(tensors, scaling, delta).check(actual)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("lora_dtype", [torch.float32, torch.bfloat16])
def test_mixed_dtypes(requires_grad, lora_dtype, device):
    """PEFT's default: float32 factors beside a bfloat16 base. Gradients come in the dtype of what they belong to."""
    base, lora, g, bias = inputs((33, 65), torch.bfloat16, lora_dtype, device)
    tensors = [t.requires_grad_(requires_grad) for t in (base, lora, g, bias)]
    y = functional.compose(*tensors[:3], 0.7, bias=tensors[3])
    budget_of(tensors, 0.7, False).check(y)
    if requires_grad:
        y.float().square().sum().backward()
        assert [t.grad.dtype for t in tensors] == [t.dtype for t in tensors]


@pytest.mark.parametrize("requires_grad", [False, True])
def test_mixed_dtypes_at_any_g(requires_grad, device):
    """One rounding to bfloat16 of each output, and float32's few of its two parts, also where g is far from 1."""
    base, lora, _, _ = inputs((64, 8), torch.bfloat16, torch.float32, device)
    g = torch.tensor([0, 1e-6, 0.3, 0.5, 1, 2, 40, -1], device=device)
    y = functional.compose(base.requires_grad_(requires_grad), lora, g, 0.7).detach().double()
    parts = g.double() * base.detach().double(), g.double() * 0.7 * lora.double()
    exact, size = sum(parts), sum(part.abs() for part in parts)
    bound = torch.finfo(torch.bfloat16).eps / 2 * exact.abs() + 8 * torch.finfo(torch.float32).eps * size
    assert ((y - exact).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("use_compile", [False, True])
def test_gradients(dtype, delta, use_compile, device):
    base, lora, g, bias = inputs((33, 65), dtype, device=device, bias=not delta)
    # A bias so large that the gradient of g would show it if inner were taken back from y.
    bias = None if delta else 64 * bias
    tensors = [None if t is None else t.requires_grad_() for t in (base, lora, g, bias)]
    dy = torch.randn(33, 65, dtype=torch.float64).to(dtype).to(device)
    compose = functional.compose
    if use_compile:
        compose = torch.compile(compose, fullgraph=True, backend="aot_eager")
    compose(*tensors[:3], 0.7, bias=tensors[3], delta=delta).backward(dy)

    base, lora, g = (t.detach().double() for t in tensors[:3])
    dy = dy.double()
    of_base = g - 1 if delta else g
    budgets = [  # the gradient, the sum of its absolute terms, how many terms
        (of_base * dy, (of_base * dy).abs(), 0),
        (0.7 * g * dy, (0.7 * g * dy).abs(), 0),
        ((dy * (base + 0.7 * lora)).sum(0), (dy.abs() * (base.abs() + 0.7 * lora.abs())).sum(0), len(dy)),
        (dy.sum(0), dy.abs().sum(0), len(dy)),
    ]
    # d_g sums products with inner, which is saved in the activation's dtype; the other results are rounded to it.
    for name, tensor, (truth, size, terms) in zip(("base", "lora", "g", "bias"), tensors, budgets, strict=True):
        if tensor is not None:
            assert tensor.grad.dtype == tensor.dtype
            Budget(truth, rounded(size, dtype, 1, terms + ARITHMETIC)).check(tensor.grad, name)


# Memory formats of channels: the strides that torch gives them, whose view as rows is free, and some other order.
LAYOUTS = {
    "channels": lambda t: t,
    "channels_last": lambda t: t.movedim(1, -1).contiguous().movedim(-1, 1),
    "other": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 65, 7), (2, 33, 5, 4), (1, 6, 1, 1), (2, 1, 3, 2), (0, 4, 3), (2, 0, 3)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALF])
@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("use_compile", [False, pytest.param(True, marks=pytest.mark.full)])
def test_channels(layout, shape, dtype, delta, use_compile, device):
    """Outputs along dimension 1: the values and gradients of the outputs moved last, in the format of base."""
    rows = (shape[0], *shape[2:], shape[1])
    base, lora, g, bias = inputs(rows, dtype, device=device, bias=not delta)
    base, lora = (LAYOUTS[layout](t.movedim(-1, 1).contiguous()) for t in (base, lora))
    tensors = [t if t is None else t.detach().requires_grad_() for t in (base, lora, g, bias)]
    twins = [t if t is None else t.detach().clone().requires_grad_() for t in (base, lora, g, bias)]
    compose = torch.compile(functional.compose, fullgraph=True) if use_compile else functional.compose
    y = compose(*tensors[:3], 0.7, bias=tensors[3], delta=delta, dim=1)
    moved = functional.compose(
        *(t.movedim(1, -1) for t in twins[:2]), twins[2], 0.7, bias=twins[3], delta=delta
    ).movedim(-1, 1)
    assert y.dtype == dtype
    eps = torch.finfo(dtype).eps
    # Up to four roundings on either side, each of at most half an eps of the terms; a fused multiply-add has fewer.
    g_O, bias_O = (torch.zeros(()) if v is None else v.double().view(-1, *[1] * (base.ndim - 2)) for v in (g, bias))
    of_base = (g_O - 1 if delta else g_O) * base
    terms = of_base.abs() + (g_O * 0.7 * lora).abs() + bias_O.to(device).abs()
    assert ((y - moved).abs() <= 4 * eps * terms).all()
    if layout != "other" and y.numel():
        counts = [size > 1 or not use_compile for size in shape]  # Inductor strides a dimension of one as it likes
        assert [s for s, c in zip(y.stride(), counts, strict=True) if c] == [
            s for s, c in zip(base.stride(), counts, strict=True) if c
        ]
    dy = torch.randn_like(moved)
    y.backward(dy)
    moved.backward(dy)
    inner = base.double() + 0.7 * lora.double()
    # Eager code sums a rounded inner for g, what Inductor recomputes in one kernel is not rounded.
    rounded = 0.5 * eps * (dy.double() * inner).abs().movedim(1, 0).flatten(1).sum(1) if use_compile else 0.0
    for name, tensor, twin in zip(("base", "lora", "g", "bias"), tensors, twins, strict=True):
        if tensor is not None:
            # g and bias are sums over at most 40 positions, in another order.
            eps = max(torch.finfo(tensor.dtype).eps, torch.finfo(torch.float32).eps if dtype in HALF else 0)
            limit = 40 * eps * (1 + twin.grad.abs()) + (rounded if name == "g" else 0.0)
            assert ((tensor.grad.double() - twin.grad.double()).abs() <= limit).all(), name


@pytest.mark.parametrize("dim", [0, 1, 2, -1, -2, -4])
@pytest.mark.parametrize("use_compile", [False, True])
def test_any_dimension(dim, use_compile):
    generator = torch.Generator().manual_seed(0)
    base, lora = (torch.randn(3, 4, 5, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    out = base.shape[dim]
    g, bias = (torch.rand(out, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(2))
    compose = functional.compose
    if use_compile:
        compose = torch.compile(compose, fullgraph=True, backend="aot_eager")
    y = compose(base, lora, g, 0.7, bias=bias, dim=dim)
    expected = reference.compose(base.movedim(dim, -1), lora.movedim(dim, -1), g, 0.7, bias).movedim(-1, dim)
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(
        torch.autograd.grad(y.square().sum(), (g, bias)), torch.autograd.grad(expected.square().sum(), (g, bias))
    )


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("dim", [-1, 1])
def test_gradcheck(delta, dim):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)  # noqa: E731
    shape = (3, 2, 5) if dim == -1 else (3, 5, 2)
    args = (draw(*shape), draw(*shape), draw(5), *([] if delta else [draw(5)]))

    def function(base, lora, g, bias=None):
        return functional.compose(base, lora, g, 0.7, bias=bias, delta=delta, dim=dim)

    options = {"check_batched_grad": True, "fast_mode": False}
    assert torch.autograd.gradcheck(function, args, check_forward_ad=True, check_batched_forward_grad=True, **options)
    assert torch.autograd.gradgradcheck(function, args, check_fwd_over_rev=True, check_rev_over_rev=True, **options)


@pytest.mark.parametrize("subset", [(0,), (1,), (2,), (3,), (1, 2), (0, 1), (0, 1, 2, 3)])
@pytest.mark.parametrize("use_compile", [False, True])
def test_which_gradients_exist(subset, use_compile):
    tensors = inputs((6, 9), torch.float32)
    for i in subset:
        tensors[i].requires_grad_()
    compose = functional.compose
    if use_compile:
        compose = torch.compile(compose, fullgraph=True, backend="aot_eager")
    compose(*tensors[:3], 0.7, bias=tensors[3]).square().sum().backward()
    assert [i for i, t in enumerate(tensors) if t.grad is not None] == list(subset)


def saved_activations(function, size):
    """The dtypes of the tensors of ``size`` elements that autograd keeps for backward."""
    saved = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.setdefault(t.data_ptr(), t), lambda t: t):
        function()
    return [t.dtype for t in saved.values() if t.numel() == size]


def test_saves_one_activation_in_its_own_dtype():
    base, lora, g, bias = inputs((32, 64), torch.bfloat16)
    tensors = [t.requires_grad_() for t in (base, lora, g)]
    assert saved_activations(lambda: functional.compose(*tensors, 0.7, bias=bias), 32 * 64) == [torch.bfloat16]
    g.requires_grad_(False)
    assert saved_activations(lambda: functional.compose(*tensors, 0.7, bias=bias), 32 * 64) == []


def test_non_contiguous(device):
    base, lora, g, bias = inputs((33, 64), torch.float32, device=device)
    expected = functional.compose(base, lora, g, 0.7, bias=bias)
    strided = base.T.contiguous().T, torch.stack([lora, lora], -1)[..., 0], torch.stack([g, g], -1)[:, 0]
    assert not any(t.is_contiguous() for t in strided)
    args = [t.clone(memory_format=torch.preserve_format).requires_grad_() for t in strided]
    actual = functional.compose(*args, 0.7, bias=bias)
    # With gradients it is another kernel, whose compiler may round a product and its sum in one step or in two.
    eps = 0 if device == "cpu" else 3 * torch.finfo(torch.float32).eps  # of two and of four roundings
    assert ((actual - expected).abs() <= eps * (g.abs() * (base.abs() + 0.7 * lora.abs()) + bias.abs())).all()
    actual.sum().backward()  # an expanded gradient
    torch.testing.assert_close(args[0].grad, g.expand(33, 64))


def test_scaling_tensor_gets_its_gradient():
    tensors = inputs((6, 9), torch.float64)
    scaling = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    functional.compose(*tensors[:3], scaling, bias=tensors[3]).sum().backward()
    torch.testing.assert_close(scaling.grad, (tensors[2] * tensors[1]).sum())


def test_delta_is_stable_near_one():
    """Subtracting the base afterwards would cost more than twice this error in bfloat16."""
    base, lora, g, _ = inputs((64, 64), torch.bfloat16)
    lora = 0.001 * lora
    truth = references((base, lora, g, None), 1.0, True, torch.float64)
    error = (functional.compose(base, lora, g, 1.0, delta=True).double() - truth).abs().max()
    naive = ((functional.compose(base, lora, g, 1.0) - base).double() - truth).abs().max()
    assert error <= 0.5 * torch.finfo(torch.bfloat16).eps * truth.abs().max()
    assert 2 * error < naive


def test_where_a_zero_row_ends():
    """At 1e-12 itself, in float64, which can tell."""
    norm = torch.tensor([0.0, 1e-12, 1.0000001e-12], dtype=torch.float64)
    g = functional.magnitude_scale(torch.full((3,), 2e-12, dtype=torch.float64), norm)
    assert g[:2].tolist() == [1, 1]
    assert abs(g[2].item() - 2) < 1e-6
