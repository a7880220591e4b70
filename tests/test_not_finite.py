"""Rows that are infinite, NaN or so large that their squares overflow: one answer on every route, and in no other row.

The norm of a row that is not finite is inf; g is 0 then and the row's output NaN, as in the textbook.
"""

import math

import pytest
import torch

from dorac import functional, reference
from dorac.ops import linear
from dorac.ops.norm import row_norm_aten
from dorac.testing import linear_inputs

S = 0.7
OUT, IN, RANK = 12, 70, 4
NOT_FINITE = {2: "inf", 3: "nan", 4: "-inf", 5: "inf in lora_B", 6: "nan in lora_B"}
HUGE = {7: 1e20, 8: 3e37, 9: "1e20 in lora_B"}
TINY = 10


def factors(dtype, factor_dtype, not_finite=True):
    inputs = linear_inputs((1, OUT, IN, RANK), dtype=dtype, factor_dtype=factor_dtype)
    weight, lora_A, lora_B = inputs.weight, inputs.lora_A, inputs.lora_B
    if not_finite:
        weight[2, 5], weight[3, 60], weight[4, 0] = math.inf, math.nan, -math.inf
        lora_B[5, 1], lora_B[6, 2] = math.inf, math.nan
    for row in (7, 8):
        weight[row] *= HUGE[row]
    lora_B[9] *= 1e20
    weight[TINY] *= 1e-25
    lora_B[TINY] = 0
    return weight, lora_A, lora_B


def conv(weight, lora_A, lora_B, **options):
    return functional.norm_factored_conv(weight[..., None], lora_A[..., None], lora_B[..., None], S, **options)


def conv_over_groups(weight, lora_A, lora_B):
    """As PEFT has it: lora_A sees every channel, and a part of the norm comes from its Gram matrix."""
    weight, lora_A = weight[:, : IN // 2, None], lora_A[..., None]
    return functional.norm_factored_conv(weight, lora_A, lora_B[:, : RANK // 2, None], S, groups=2)


def dense_of_the_drop_in(weight, lora_A, lora_B):
    pytest.importorskip("peft")
    from dorac.peft import DoraLinearLayer

    layer = DoraLinearLayer(fan_in_fan_out=False)
    return layer.get_weight_norm(weight, (lora_B.float() @ lora_A.float()), S)


def dense_filters_of_the_drop_in(weight, lora_A, lora_B):
    pytest.importorskip("peft")
    from dorac.peft import DoraConv2dLayer

    product = (lora_B.float() @ lora_A.float()).view(OUT, IN // 2, 2, 1)
    return DoraConv2dLayer(fan_in_fan_out=False).get_weight_norm(weight.view(product.shape), product, S).flatten()


def of_a_transform(weight, lora_A, lora_B):
    """With its derivatives, in plain aten."""
    return torch.func.vjp(lambda *t: functional.norm_factored(*t, S, norm_grad=True), weight, lora_A, lora_B)[0]


def with_its_gradient(weight, lora_A, lora_B):
    return functional.norm_factored(weight, lora_A, lora_B.requires_grad_(), S, norm_grad=True).detach()


def known_square(weight, lora_A, lora_B):
    square = weight.double().square().sum(1)
    return functional.norm_factored(weight, lora_A, lora_B, S, weight_sq=square)


def in_the_kernel(splits):
    def run(weight, lora_A, lora_B):
        pytest.importorskip("triton")
        from dorac.kernels.configs import NormConfig
        from dorac.kernels.norm import row_norm

        return row_norm(weight, lora_A, lora_B, torch.tensor(S), NormConfig(16, 16, 16, splits, 4, 2))

    return run


ROUTES = {
    "op": lambda *t: functional.norm_factored(*t, S),
    "one column at a time": lambda *t: functional.norm_factored(*t, S, budget=1),
    "plain aten": lambda *t: row_norm_aten(*t, torch.tensor(S), None, 2**28),
    "vmap": lambda *t: torch.func.vmap(lambda b: functional.norm_factored(*t[:2], b, S))(t[2][None])[0],
    "compiled": lambda *t: torch.compile(functional.norm_factored, backend="aot_eager", fullgraph=True)(*t, S),
    "experts": lambda *t: functional.norm_factored(*(torch.stack([x, x]) for x in t), S)[1],
    "known square": known_square,
    "with its gradient": with_its_gradient,
    "transform": of_a_transform,
    "convolution": conv,
    "drop-in": dense_of_the_drop_in,
    "drop-in, filters": dense_filters_of_the_drop_in,
    "kernel": in_the_kernel(1),
    "kernel, split": in_the_kernel(2),
}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("dtype", "factor_dtype"), [(torch.float32,) * 2, (torch.bfloat16,) * 2, (torch.bfloat16, torch.float32)]
)
def test_norm(route, dtype, factor_dtype):
    weight, lora_A, lora_B = factors(dtype, factor_dtype)
    truth = reference.row_norm(weight.double(), lora_A.double(), lora_B.double(), S)
    assert (truth.isfinite().logical_not().nonzero().flatten() == torch.tensor([*NOT_FINITE])).all()
    norm = ROUTES[route](weight, lora_A, lora_B)
    assert norm.shape == truth.shape
    assert torch.equal(norm.isinf().nonzero().flatten(), torch.tensor([*NOT_FINITE])), norm
    assert not norm.isnan().any()
    assert norm[TINY] <= 1e-12
    # As in tests/test_kernels.py: the kernel takes 16 bits of float32 factors of a half-precision weight.
    relative = 4e-5 if "kernel" in route and dtype is not factor_dtype else 1e-5
    right = [row for row in range(OUT) if row not in NOT_FINITE and row != TINY]
    assert ((norm[right].double() - truth[right]).abs() <= relative * truth[right]).all(), norm / truth


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_norm_over_groups(dtype):
    weight, lora_A, lora_B = factors(dtype, dtype)
    norm = conv_over_groups(weight, lora_A, lora_B)
    alone = conv_over_groups(*factors(dtype, dtype, not_finite=False))
    # lora_B's NaN is in another column than those of its half that are taken.
    not_finite = [row for row in NOT_FINITE if weight[row, : IN // 2].sum().isfinite().logical_not()] + [5]
    assert sorted(norm.isinf().nonzero().flatten().tolist()) == sorted(not_finite)
    assert not norm.isnan().any()
    finite = norm.isfinite()
    torch.testing.assert_close(norm[finite], alone[finite])


def test_float64_up_to_its_own_squares():
    weight, lora_A, lora_B = factors(torch.float64, torch.float64)
    weight[7] *= 1e100
    norm = functional.norm_factored(weight, lora_A, lora_B, S)
    assert norm[7].isfinite()
    torch.testing.assert_close(norm[7], reference.row_norm(weight, lora_A, lora_B, S)[7])


def test_a_norm_beyond_float32_is_infinite():
    weight = torch.full((2, 4), 3e38)
    weight[1] = 1.0
    norm = functional.norm_factored(weight, torch.zeros(1, 4), torch.zeros(2, 1), S)
    assert norm.tolist() == [math.inf, 2.0]


@pytest.mark.parametrize("transform", [False, True])
def test_gradient_of_the_norm_of_huge_rows(transform):
    """Finite and right in every row: squares are taken of ``V / n``. Rows that are not finite spoil no other's."""
    tensors = factors(torch.float32, torch.float32, not_finite=False)
    dy = torch.linspace(0.5, 2, OUT)

    def run(weight, lora_A, lora_B):
        return functional.norm_factored(weight, lora_A, lora_B, S, norm_grad=True)

    def gradients(tensors):
        if transform:
            return torch.func.vjp(run, *tensors)[1](dy)
        leaves = [t.clone().requires_grad_() for t in tensors]
        return torch.autograd.grad(run(*leaves), leaves, dy)

    exact = [t.double().requires_grad_() for t in tensors]
    norm = reference.row_norm(*exact, S)
    norm = torch.where(norm <= 1e-12, norm.detach(), norm)
    truth = torch.autograd.grad(norm, exact, dy.double())
    for grad, best in zip(gradients(tensors), truth, strict=True):
        assert grad.isfinite().all()
        assert ((grad.double() - best).abs() <= 1e-4 * best.abs().amax(1, keepdim=True)).all()
    spoilt = gradients(factors(torch.float32, torch.float32))
    finite = [row for row in range(OUT) if row not in NOT_FINITE]
    for grad, best in ((spoilt[0], truth[0]), (spoilt[2], truth[2])):
        assert ((grad[finite].double() - best[finite]).abs() <= 1e-4 * best[finite].abs().amax(1, keepdim=True)).all()


@pytest.mark.parametrize("path", ["separate", "accumulate", "fused"])
@pytest.mark.parametrize("not_finite", [True, False])
def test_layer(path, not_finite, monkeypatch):
    """Huge rows give what float64 gives, infinite ones NaN in their own column, and gradients stay in their rows."""
    monkeypatch.setattr(linear, "route", lambda *args, **kwargs: path)
    weight, lora_A, lora_B = factors(torch.float32, torch.float32, not_finite)
    norm = functional.norm_factored(weight, lora_A, lora_B, S)
    magnitude, bias = norm.clone().nan_to_num(1.0, posinf=1.0).mul(0.8), torch.randn(OUT)
    x, dy = torch.randn(5, IN), torch.randn(5, OUT)
    tensors = [weight, lora_A, lora_B, magnitude, bias]
    leaves = [t.clone().requires_grad_() for t in tensors]
    y = functional.dora_linear(x, *leaves, scaling=S)
    exact = [t.double().requires_grad_() for t in tensors]
    best = reference.dora_linear(x.double(), *exact, scaling=S)
    spoilt = [*NOT_FINITE] if not_finite else []
    right = [row for row in range(OUT) if row not in spoilt]
    assert y[:, spoilt].isnan().all()
    size = best[:, right].abs().amax(0)
    assert ((y[:, right].double() - best[:, right]).abs() <= 1e-5 * size).all()
    y.backward(dy)
    best.backward(dy.double())
    for leaf, truth in zip(leaves, exact, strict=True):
        if leaf.shape[0] == OUT:  # lora_A's gradient is a sum over the rows
            grad, truth = leaf.grad[right].double(), truth.grad[right]
            assert grad.isfinite().all()
            assert (
                (grad - truth).abs()
                <= 1e-4 * truth.abs().reshape(len(right), -1).amax(1).view(-1, *[1] * (truth.ndim - 1))
            ).all()


def compose_in_the_kernel(base, lora, g, scaling, bias, delta):
    pytest.importorskip("triton")
    from dorac.kernels.compose import compose

    return compose(base, lora, None, g, None, scaling, bias, delta=delta)[0]


def compose_trained(base, lora, g, scaling, bias, delta):
    return torch.ops.dorac.compose(base, lora, g.clone().requires_grad_(), scaling, bias, delta).detach()


def compose_traced(base, lora, g, scaling, bias, delta):
    run = torch.compile(torch.ops.dorac.compose, backend="aot_eager", fullgraph=True)
    return run(base, lora, g, scaling, bias, delta)


COMPOSE = {
    "op": lambda *args: torch.ops.dorac.compose(*args),
    "trained": compose_trained,
    "traced": compose_traced,
    "transform": lambda *args: torch.func.jvp(lambda b: torch.ops.dorac.compose(b, *args[1:]), args[:1], args[:1])[0],
    "kernel": compose_in_the_kernel,
}


@pytest.mark.parametrize("route", COMPOSE)
@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize(
    ("dtype", "lora_dtype"), [(torch.float32,) * 2, (torch.float16,) * 2, (torch.bfloat16, torch.float32)]
)
def test_compose(route, delta, dtype, lora_dtype):
    """An infinite base, as float16 makes them, or lora gives what IEEE arithmetic gives in the formula's own order."""
    base, lora = torch.randn(6, 5).to(dtype), torch.randn(6, 5).to(lora_dtype)
    base[0, 0] = base[0, 1] = lora[1, 2] = math.inf
    base[2], base[3, 3], lora[4, 4] = -math.inf, math.nan, math.nan
    g = torch.tensor([0.8, 1.25, 3.0, 0.01, 1.5])
    bias = None if delta else torch.randn(5).to(dtype)
    y = COMPOSE[route](base, lora, g, torch.tensor(S), bias, delta)
    wide = [base.double(), lora.double(), g.double(), S]
    best = reference.compose_delta(*wide) if delta else reference.compose(*wide, bias.double())
    assert torch.equal(y.isnan(), best.isnan())
    assert torch.equal(y.isposinf(), best.isposinf())
    assert torch.equal(y.isneginf(), best.isneginf())
    finite = best.isfinite()
    torch.testing.assert_close(y[finite].double(), best[finite], rtol=2e-2, atol=2e-2)
