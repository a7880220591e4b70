"""``functional.dora_over`` in eager on a GPU with kernels, as ``ops/eager.py`` computes the whole layer.

The product is an argument, and so is its gradient. It stays as it is: inner has memory of its own. Taken are bases of
the dtype that the low-rank branch runs in; anything else is left to ``ops/over.py``, which has the formula.

Legend: T tokens, I in_features, O out_features, R rank.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dorac import checks
from dorac.ops import eager, front, linear, over


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """How layers of certain metadata are computed."""

    dtype: torch.dtype  # of the products
    casts_factors: bool
    holds_bias: bool
    compose: Callable  # of base, h, lora_B, magnitude, norm, scaling, bias, y and inner, which it writes
    backward: Callable[[tuple], tuple]  # of dy's strides: strips, launches
    in_ops: bool = False  # which modes see


def dora_over(
    base: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    bias: Tensor | None,
    weight_norm: Tensor,
    scaling: float,
    holds_bias: bool,
) -> Tensor | None:
    """The layer for a finite ``scaling``, or None if it is not to be computed here; errors are ``check_over``'s."""
    in_ops = not front.unobserved()
    if in_ops and not front.seen_by_modes_alone():
        return None
    try:
        training = torch.is_grad_enabled() and (
            lora_B.requires_grad
            or magnitude.requires_grad
            or lora_A.requires_grad
            or x.requires_grad
            or base.requires_grad
            or (bias is not None and bias.requires_grad)
            or weight_norm.requires_grad
        )
        key = "over", training, holds_bias, *eager.metadata(x, base, lora_A, lora_B, magnitude, bias, weight_norm)
        plan = eager.plans.get(key, False)
        bits = base.data_ptr() | lora_A.data_ptr() | lora_B.data_ptr() | magnitude.data_ptr() | weight_norm.data_ptr()
        if bias is not None:
            bits |= bias.data_ptr()
        x.data_ptr()
    except (AttributeError, RuntimeError, TypeError):  # no tensor, or one of no strides, symbolic sizes or no memory
        return None
    if plan is False:
        checks.check_over(base, x, lora_A, lora_B, magnitude, bias, weight_norm, holds_bias)
        if len(eager.plans) >= eager.PLANS:
            eager.plans.clear()
        with torch._C._DisableTorchDispatch():  # a mode would see it in the first call alone
            plan = eager.plans[key] = make_plan(
                base, x, lora_A, lora_B, magnitude, bias, weight_norm, training, bias is not None and holds_bias
            )
    if plan is None or (in_ops and not training):
        return None
    if bits & 15:  # plans are for tensors aligned to 16 bytes
        return None
    if training:
        usual = magnitude.requires_grad and lora_A.requires_grad and lora_B.requires_grad
        if not usual or weight_norm.requires_grad or (bias is not None and bias.requires_grad):
            return None
    if x.dtype is not plan.dtype:
        x = x.to(plan.dtype)
    if not training:
        return _forward(plan, base, x, lora_A, lora_B, magnitude, bias, weight_norm, scaling, False)[0]
    if in_ops:
        plan = dataclasses.replace(plan, in_ops=True)
    return _apply(base, x, lora_A, lora_B, magnitude, bias, weight_norm, scaling, plan)[0]


def make_plan(base, x, lora_A, lora_B, magnitude, bias, weight_norm, training: bool, holds_bias: bool) -> Plan | None:
    """The plan for tensors that passed the checks; None if they are not computed here."""
    given = [t for t in (x, base, lora_A, lora_B, magnitude, bias, weight_norm) if t is not None]
    if not x.numel() or not base.numel() or not front.all_eager(*given) or not front.has_kernels(*given):
        return None
    autocast = front.autocast_dtype(x)
    dtype = autocast or lora_A.dtype
    if dtype.itemsize != 2 or base.dtype is not dtype or lora_A.shape[0] > linear.LORA_B_RANK:
        return None
    if not all(t.is_contiguous() for t in (base, magnitude, bias, weight_norm) if t is not None):
        return None

    from dorac.kernels import backward, configs
    from dorac.kernels.compose import compose_launch, composer

    rank, out_features, tokens = lora_A.shape[0], base.shape[-1], math.prod(base.shape[:-1])
    activation, h, b = (out_features, 1), (rank, 1), torch.empty_like(lora_B, dtype=dtype).stride()
    config = configs.tile_config(tokens, out_features, rank, dtype, dtype)
    flags = {"has_norm": True, "has_bias": bias is not None, "holds_bias": holds_bias, "delta": False, "split": False}
    flags |= {"want_inner": training}
    launch = functools.partial(compose_launch, tokens, out_features, (activation, h, b), rank, config, **flags)

    @functools.lru_cache(maxsize=16)
    def backward_launches(strides: tuple[int, int]) -> tuple:
        config = configs.lora_b_config(tokens, out_features, rank)
        tensors = strides, activation, h
        strips, *launches = backward.lora_b_backward_launches(tokens, out_features, rank, tensors, config, scale_b=True)
        return strips, *map(eager.bound, launches)

    return Plan(
        dtype=dtype,
        casts_factors=lora_A.dtype is not dtype,
        holds_bias=holds_bias,
        compose=composer(config, launch) if config.descriptors else eager.bound(launch(descriptors=False)),
        backward=backward_launches,
    )


def _forward(plan, base, x, lora_A, lora_B, magnitude, bias, norm, scaling, training):
    """``(y, inner, lora_A and lora_B for the products, h)``; inner in training alone.

    Autocast, where it is on, makes the same casts.
    """
    if plan.casts_factors:
        lora_A, lora_B = lora_A.to(plan.dtype), lora_B.to(plan.dtype)
    h, y = F.linear(x, lora_A), torch.empty_like(base)
    inner = torch.empty_like(base) if training else None
    plan.compose(base, h, lora_B, magnitude, norm, scaling, bias, y, inner)
    return y, inner, lora_A, lora_B, h


def _forward_in_ops(plan, base, x, lora_A, lora_B, magnitude, bias, norm, scaling, training):
    with front.autocast_off(x):
        s = torch.full((), scaling, dtype=torch.float32, device=x.device)
        lora_A, lora_B = lora_A.to(plan.dtype), lora_B.to(plan.dtype)
        rows = (t.reshape(-1, t.shape[-1]) for t in (base, x))
        tensors = *rows, lora_A, lora_B, magnitude, norm, s, bias
        rows = over.forward(*tensors, plan.holds_bias, "fused", True, training)
    # Nobody has these, so that y is no view, which autograd would not let a consumer write to.
    y, inner, h = (torch.ops.aten._unsafe_view(t, (*base.shape[:-1], t.shape[1])) for t in rows)
    return y, inner, lora_A, lora_B, h


class _Over(torch.autograd.Function):
    """Returns (y, inner): with inner an output, a second derivative stays connected through what backward saved."""

    @staticmethod
    def forward(ctx, base, x, lora_A, lora_B, magnitude, bias, weight_norm, scaling, plan):
        forward = _forward_in_ops if plan.in_ops else _forward
        y, inner, a, b, h = forward(plan, base, x, lora_A, lora_B, magnitude, bias, weight_norm, scaling, True)
        if not plan.casts_factors:
            a = b = None
        trained = lora_A, lora_B, magnitude
        ctx.trained = None
        if lora_A.is_leaf and lora_B.is_leaf and magnitude.is_leaf:  # the graph holds them at any rate
            ctx.trained, ctx.versions = trained, [t._version for t in trained]
            trained = ()
        ctx.save_for_backward(x, a, b, weight_norm, h, inner, *trained)
        ctx.set_materialize_grads(False)
        ctx.scaling, ctx.plan, ctx.shapes = scaling, plan, (base.shape, x.shape)
        return y, inner

    @staticmethod
    def backward(ctx, dy, d_inner):
        if dy is None and d_inner is None:
            return (None,) * 9
        if d_inner is not None or torch.is_grad_enabled() or type(dy) is not Tensor or not front.unobserved():
            return _seen_gradients(ctx, dy, d_inner)
        if front.autocast_dtype(dy) is not None:  # backward called inside autocast: products stay in the layer's dtype
            with front.autocast_off(dy):
                return _Over.backward(ctx, dy, None)
        x, a, b, norm, h, inner, *trained = ctx.saved_tensors
        lora_A, lora_B, magnitude = trained or eager.unchanged(ctx)
        plan, scaling = ctx.plan, ctx.scaling
        needs_base, needs_x, *_ = ctx.needs_input_grad
        if a is None:
            a, b = lora_A, lora_B
        if dy.dim() != 2:
            dy, h, x = (t.reshape(-1, t.shape[-1]) for t in (dy, h, x))
        if dy.data_ptr() % 16:
            dy = dy.clone(memory_format=torch.contiguous_format)
        launches, others = plan.backward(dy.stride()), (None, None, None)
        d_base, d_m, d_b = eager.scaled_gradients(launches, dy, inner, magnitude, norm, h, scaling, others, lora_B)
        d_h = torch.addmm(eager.scalar(d_base.dtype, d_base.device), d_base, b, beta=0, alpha=scaling)
        d_a = eager.wide_mm(d_h.t(), x, lora_A.dtype)
        base_shape, x_shape = ctx.shapes
        dx = torch.mm(d_h, a).view(x_shape) if needs_x else None
        return d_base.view(base_shape) if needs_base else None, dx, d_a, d_b, d_m, None, None, None, None


_apply = super(torch.autograd.Function, _Over).apply  # see ops/eager.py


def _seen_gradients(ctx, dy, d_inner):
    """The gradients where they are differentiated again, or a mode looks on."""
    given = d_inner if dy is None else dy
    if front.autocast_dtype(given) is not None:
        with front.autocast_off(given):
            return _seen_gradients(ctx, dy, d_inner)
    x, _, _, norm, h, inner, *trained = ctx.saved_tensors
    lora_A, lora_B, magnitude = trained or eager.unchanged(ctx)
    dtype, base_shape, x_shape = ctx.plan.dtype, *ctx.shapes
    x, h, inner, dy, d_inner = (None if t is None else t.reshape(-1, t.shape[-1]) for t in (x, h, inner, dy, d_inner))
    a, b = lora_A.to(dtype), lora_B.to(dtype)
    if torch.is_grad_enabled():
        h = x @ a.t()
    needs_base, needs_x, *_ = ctx.needs_input_grad
    scaling = torch.full((), ctx.scaling, dtype=torch.float32, device=x.device)
    dx, _, d_a, d_b, d_m, _, _, d_base = linear.gradients(
        (x, None, a, b, magnitude, norm, scaling, h, inner, None),
        (needs_x, False, True, True, True, False, False),
        (dtype, dtype, None),
        (dy, d_inner, None),
        number=ctx.scaling,
        path="fused",
        eager=True,
        over=needs_base,
    )
    dx = None if dx is None else dx.view(x_shape)
    d_base = d_base.view(base_shape) if needs_base else None
    return d_base, dx, d_a.to(lora_A.dtype), d_b.to(lora_B.dtype), d_m, None, None, None, None
