"""Every mix of dtypes, in eager and compiled, under autocast and not, for every layer of :data:`functionals.LAYERS`."""

import functools

import pytest
import torch
from functionals import LAYERS, SCALING, budgets, cast, leaves_of, run_backward

from dorac import functional, reference
from dorac.testing import unit_roundoff

HALF = (torch.bfloat16, torch.float16)
F64, F32, BF16, F16 = torch.float64, torch.float32, *HALF
# Of activations, weight and bias; of the factors; of the magnitude.
MIXES = {
    "float64": (F64, F64, F64),
    "float32": (F32, F32, F32),
    "bfloat16": (BF16, BF16, F32),
    "float16": (F16, F16, F32),
    "bfloat16, PEFT's default": (BF16, F32, F32),
    "float16, PEFT's default": (F16, F32, F32),
    "bfloat16 whole": (BF16, BF16, BF16),
    "bfloat16, float16 factors": (BF16, F16, F32),
    "float16, bfloat16 factors": (F16, BF16, F16),
    "float32, bfloat16 factors": (F32, BF16, F32),
    "bfloat16, float64 factors": (BF16, F64, F64),
    "float64, float32 factors": (F64, F32, F32),
}
# Compiled in CI: these mixes of the linear layer, the last of them of the other layers.
SAMPLE = ("float32", "bfloat16", "bfloat16, PEFT's default")
full = pytest.mark.full


def compiled(function, backend):
    return torch.compile(function, fullgraph=True, backend=backend) if backend else function


def check(row, tensors, result, **options):
    """y and gradients against float64 of the same bits."""
    y, gradients = result
    dy = torch.randn(y.shape, dtype=F64, generator=torch.Generator().manual_seed(1)).to(y)
    results = {"y": y} | dict(zip(row.names, gradients, strict=True))
    for name, budget in budgets(row, tensors, dy=dy, **options).items():
        assert name == "y" or results[name].dtype == tensors[row.names.index(name)].dtype, name
        budget.check(results[name], name)


def cases():
    for layer in LAYERS:
        for mix in MIXES:
            for backend in (None, "aot_eager", "inductor"):
                for norm_grad in (False, True):
                    sample = mix in (SAMPLE if layer == "dora_linear" else SAMPLE[-1:]) and not norm_grad
                    ci = backend is None or (backend == "aot_eager" and sample)
                    label = f"{layer}-{mix}-{backend or 'eager'}" + ("-norm_grad" if norm_grad else "")
                    yield pytest.param(layer, mix, backend, norm_grad, id=label, marks=[] if ci else [full])


@pytest.mark.parametrize(("layer", "mix", "backend", "norm_grad"), list(cases()))
def test_values_and_gradients(layer, mix, backend, norm_grad):
    row, dtypes = LAYERS[layer], MIXES[mix]
    tensors = cast(row.arguments(), *dtypes)
    run = compiled(functools.partial(row.function, norm_grad=norm_grad), backend)
    result = run_backward(run, tensors)
    assert result[0].dtype == dtypes[0]
    check(row, tensors, result, norm_grad=norm_grad)


def autocast_cases():
    for layer in LAYERS:
        for autocast in HALF:
            for mix in ("float32", "bfloat16", "bfloat16, PEFT's default", "float16, PEFT's default"):
                for norm_grad in (False, True):
                    ci = not norm_grad and (layer == "dora_linear" or (mix, autocast) == ("float32", BF16))
                    yield pytest.param(layer, autocast, mix, norm_grad, marks=[] if ci else [full])


@pytest.mark.parametrize(("layer", "autocast", "mix", "norm_grad"), list(autocast_cases()))
def test_autocast_in_eager_and_compiled(layer, autocast, mix, norm_grad):
    """One result, and one gradient, wherever the products run in the autocast dtype; the backward pass runs outside."""
    row, dtypes = LAYERS[layer], MIXES[mix]
    tensors = cast(row.arguments(), *dtypes)
    narrow = max((autocast, *dtypes), key=unit_roundoff)

    def function(*args):
        with torch.autocast("cpu", dtype=autocast):
            return row.function(*args, norm_grad=norm_grad)

    eager = run_backward(function, tensors)
    y, gradients = run_backward(compiled(function, "aot_eager"), tensors)
    check(row, tensors, eager, norm_grad=norm_grad, dtype=narrow, casts=3)
    check(row, tensors, (y, gradients), norm_grad=norm_grad, dtype=narrow, casts=3)
    assert torch.equal(y, eager[0]), "the same kernels run"
    for one, other in zip(gradients, eager[1], strict=True):  # the same products, summed in one order
        assert one is other is None or torch.equal(one, other)


@pytest.mark.full
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("autocast", HALF)
def test_autocast_under_inductor(layer, autocast):
    row = LAYERS[layer]
    tensors = cast(row.arguments(), F32)

    def function(*args):
        with torch.autocast("cpu", dtype=autocast):
            return row.function(*args)

    result = run_backward(compiled(function, "inductor"), tensors)
    check(row, tensors, result, dtype=autocast, casts=3)


@pytest.mark.parametrize(
    ("layer", "backend"),
    [
        pytest.param(layer, backend, marks=full if backend and layer != "dora_linear" else [])
        for layer in LAYERS
        for backend in (None, "aot_eager")
    ],
)
def test_autocast_leaves_float64_alone(layer, backend):
    row = LAYERS[layer]
    run = compiled(row.function, backend)
    expected, gradients = run_backward(row.function, row.arguments())
    with torch.autocast("cpu", dtype=BF16):
        y, inside = run_backward(run, row.arguments())
    torch.testing.assert_close(
        [y, *(g for g in inside if g is not None)], [expected, *(g for g in gradients if g is not None)]
    )


@pytest.mark.parametrize("layer", [name for name in LAYERS if "embedding" not in name])
@pytest.mark.parametrize("float64", ["x", "weight"])
def test_autocast_beside_float64_is_refused(layer, float64):
    x, weight, *others = cast(LAYERS[layer].arguments(), F32)
    x, weight = (t.double() if name == float64 else t for name, t in (("x", x), ("weight", weight)))
    with (
        torch.autocast("cpu", dtype=BF16),
        pytest.raises(TypeError, match=r"x must have the dtype of weight, .*: autocast leaves float64 as it is"),
    ):
        LAYERS[layer].function(x, weight, *others)


def exact_layer(dtype, factor_dtype):
    """One token whose inner is a small integer, exact in any dtype, a bias that undoes it, and g within 0.2 % of 1.

    ``y = g * inner + b = (g - 1) * inner`` is then known to the relative precision of y's dtype, unless g is rounded
    first: in bfloat16 every such g would become 1.
    """
    generator = torch.Generator().manual_seed(2)

    def integers(*shape):
        return torch.randint(-1, 2, shape, generator=generator).double()

    signs = lambda *shape: 2.0 * torch.randint(0, 2, shape, generator=generator).double() - 1  # noqa: E731
    x, weight, lora_A, lora_B = signs(1, 15), signs(64, 15), integers(4, 15), 4 * integers(64, 4)
    norm = reference.row_norm(weight, lora_A, lora_B, 0.5)
    magnitude = (norm * (1 + 0.002 * torch.randn(64, dtype=F64, generator=generator))).float()
    inner = (x @ (weight + 0.5 * lora_B @ lora_A).T)[0]
    assert (inner.abs() >= 1).all(), "an odd sum and an even one"
    assert inner.abs().max() < 256
    g = magnitude.double() / norm
    assert (g.to(dtype) - 1).abs().lt((g - 1).abs() / 2).double().mean() > 0.1, "rounding g would show"
    tensors = cast((x, weight, lora_A, lora_B, magnitude, -inner), dtype, factor_dtype)
    return tensors, g, inner


def assert_g_was_exact(y, g, inner):
    """y is off by its own rounding and by a few float32 roundings of g, g * inner and the sum."""
    truth = (g - 1) * inner
    bound = torch.finfo(y.dtype).eps / 2 * truth.abs() + 6 * torch.finfo(F32).eps * inner.abs()
    assert ((y.double() - truth).abs() <= bound).all()


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("factor_dtype", [None, F32])
@pytest.mark.parametrize("how", ["eager", "training", "compiled", "vmap", "autocast", "norm_grad"])
def test_g_is_not_rounded_to_half(dtype, factor_dtype, how):
    tensors, g, inner = exact_layer(dtype, factor_dtype)
    run = functools.partial(functional.dora_linear, scaling=0.5)
    if how == "vmap":
        y = torch.vmap(run, (None, None, 0, 0, 0, None))(*tensors[:2], *(t[None] for t in tensors[2:5]), tensors[5])[0]
    elif how == "autocast":
        wide = cast(tensors, F32)
        with torch.autocast("cpu", dtype=dtype):
            y = run(*wide)
    elif how in ("training", "norm_grad"):
        y = run(*leaves_of(tensors), norm_grad=how == "norm_grad")
    else:
        y = compiled(run, "aot_eager" if how == "compiled" else None)(*tensors)
    assert y.dtype == dtype
    assert_g_was_exact(y[0], g, inner)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_compose_does_not_round_g(dtype, delta, requires_grad):
    (_, _, _, _, magnitude, bias), g, inner = exact_layer(dtype, None)
    base = inner[None].to(dtype).requires_grad_(requires_grad)
    scale = functional.magnitude_scale(magnitude, magnitude / g.float())
    scale = scale.detach().requires_grad_(requires_grad)
    y = functional.compose(base, torch.zeros_like(base), scale, SCALING, bias=None if delta else bias, delta=delta)
    assert_g_was_exact(y[0], scale.double(), inner)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("use_compile", [False, True])
def test_backward_does_not_round_g(dtype, use_compile):
    """The gradient of float32 factors is known to float32: each row of lora_B's is proportional to that row's g."""
    tensors, g, _ = exact_layer(dtype, F32)
    run = compiled(functools.partial(functional.dora_linear, scaling=0.5), "aot_eager" if use_compile else None)
    _, gradients = run_backward(run, tensors, torch.ones(1, 64))
    h = tensors[0].double() @ tensors[2].double().T
    truth = 0.5 * g[:, None] * h
    assert h.abs().max() >= 1
    assert ((gradients[3].double() - truth).abs() <= 6 * torch.finfo(F32).eps * truth.abs()).all()
