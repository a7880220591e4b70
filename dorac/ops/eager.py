"""The linear layer in eager on a GPU with kernels: one ``autograd.Function`` that launches, and no op of dorac's own.

``functional.dora_linear`` asks here first. Where tensors are plain, activations and factors (under autocast what it
makes of them) half precision, and nobody looks on, the layer is computed here, in the forms and with the kernels of
``ops/linear.py``, which has the formulas; anything else is left to that.

What the tensors' metadata settle is settled once for each combination, in a :class:`Plan`: the checks, the form, the
launches. A plan holds no tensors.

Legend: T tokens, I in_features, O out_features, R rank.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from dorac import checks
from dorac.ops import front, linear

_PLANS = 4096  # kept; beyond, all are dropped
_plans: dict[tuple, "Plan | None"] = {}


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """How layers of certain metadata are computed."""

    dtype: torch.dtype  # of the products
    casts_factors: bool
    autocast: str | None  # the device type for which it is on
    y_shape: torch.Size
    accumulates: bool  # the large product onto the small one, then g; else up-projection and g in one kernel
    norm: tuple | None  # splits, launch, finish; None where it is given
    compose: object  # launch of the kernel that ends forward; None where it takes descriptors, made anew in each call
    backward: Callable[[tuple[int, int]], tuple]  # of the strides of dy: strips, launch, sums
    backward_makes_d_h: bool


def dora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    bias: Tensor | None,
    weight_norm: Tensor | None,
    scaling: float,
) -> Tensor | None:
    """The layer for a finite ``scaling``, or None if it is not to be computed here; errors are ``check_linear``'s."""
    if not front.unobserved():
        return None
    tensors = (x, weight, lora_A, lora_B, magnitude, bias, weight_norm)
    try:
        training = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
        key = training, *_metadata(*tensors)
    except (AttributeError, RuntimeError):  # no tensor, or one without strides: the checks have words for it
        return None
    plan = _plans.get(key, False)
    if plan is False:
        checks.check_linear(*tensors)
        if len(_plans) >= _PLANS:
            _plans.clear()
        plan = _plans[key] = make_plan(*tensors, training=training)
    if plan is None or _pointers(weight, lora_A, lora_B, magnitude, bias, weight_norm) % 16:
        return None
    if training:
        usual = magnitude.requires_grad and lora_B.requires_grad and not weight.requires_grad
        if not usual or (weight_norm is not None and weight_norm.requires_grad):
            return None
    if x.dtype is not plan.dtype:
        x = x.to(plan.dtype)
    if training:
        return _Linear.apply(x, *tensors[1:], scaling, plan)[0]
    return _without_autocast(plan, x, *tensors[1:], scaling)[0]


def forget_plans() -> None:
    """For whoever changes what plans are made by: :func:`dorac.ops.linear.route`, the configs of kernels."""
    _plans.clear()


def _metadata(x, weight, lora_A, lora_B, magnitude, bias, weight_norm) -> tuple:
    """All that the checks and a plan look at."""
    device = x.device
    return (
        *(type(x), x.shape, x.dtype, device),
        *(type(weight), weight.shape, weight.dtype, weight.device, weight.stride()),
        *(type(lora_A), lora_A.shape, lora_A.dtype, lora_A.device, lora_A.stride()),
        *(type(lora_B), lora_B.shape, lora_B.dtype, lora_B.device, lora_B.stride()),
        *(type(magnitude), magnitude.shape, magnitude.dtype, magnitude.device, magnitude.stride()),
        bias if bias is None else (type(bias), bias.shape, bias.dtype, bias.device, bias.stride()),
        weight_norm
        if weight_norm is None
        else (type(weight_norm), weight_norm.shape, weight_norm.dtype, weight_norm.device, weight_norm.stride()),
        torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type),
    )


def _pointers(*tensors: Tensor | None) -> int:
    """The bits that are set in any of the addresses."""
    bits = 0
    for tensor in tensors:
        if tensor is not None:
            bits |= tensor.data_ptr()
    return bits


def make_plan(x, weight, lora_A, lora_B, magnitude, bias, weight_norm, *, training: bool) -> Plan | None:
    """The plan for tensors that passed the checks; None if they are not computed here."""
    given = [t for t in (x, weight, lora_A, lora_B, magnitude, bias, weight_norm) if t is not None]
    if weight.ndim != 2 or not x.numel() or not weight.numel():
        return None
    if not front.all_eager(*given) or not front.has_kernels(*given):
        return None
    autocast = front.autocast_dtype(x)
    dtype = autocast or weight.dtype
    casts_factors = lora_A.dtype is not dtype
    if dtype.itemsize != 2 or weight.dtype is not dtype or (casts_factors and autocast is None):
        return None
    if not all(t.is_contiguous() for t in (magnitude, bias, weight_norm) if t is not None):
        return None
    if lora_A.shape[0] > linear.LORA_B_RANK:
        return None

    from dorac.kernels import backward, configs
    from dorac.kernels.compose import compose_launch
    from dorac.kernels.launch import Bound
    from dorac.kernels.norm import norm_launches

    (out_features, in_features), rank, tokens = weight.shape, lora_A.shape[0], math.prod(x.shape[:-1])
    activation, h, b = (out_features, 1), (rank, 1), (rank, 1) if casts_factors else lora_B.stride()
    form = linear.route(x.to(dtype), lora_A.to(dtype), training=training, traced=False)
    accumulates = form == "accumulate"
    if accumulates:
        config, strides = configs.pointwise_config(tokens), (activation, None, None)
    else:
        config, strides = configs.tile_config(tokens, out_features, rank, dtype, dtype), (activation, h, b)
    compose = None
    if not config.descriptors:
        flags = {"has_norm": True, "has_bias": bias is not None, "delta": False, "want_inner": training}
        flags |= {"split": False, "descriptors": False}
        compose = Bound(compose_launch(tokens, out_features, strides, None if accumulates else rank, config, **flags))
    norm = None
    if weight_norm is None:
        strides = tuple((0, *t.stride()) for t in (weight, lora_A, lora_B))
        sizes = 1, out_features, in_features, rank
        split = lora_A.dtype is torch.float32
        config = configs.norm_config(*sizes, weight.dtype, lora_A.dtype)
        splits, *launches = norm_launches(*sizes, strides, split, config)
        norm = splits, *(None if launch is None else Bound(launch) for launch in launches)
    sizes = tokens, out_features, rank

    @functools.lru_cache(maxsize=16)
    def backward_launches(strides: tuple[int, int]) -> tuple:
        if rank <= linear.LOW_RANK:
            config = configs.low_rank_config(*sizes)
            all_strides = strides, activation, h, b
            made = backward.low_rank_backward_launches(*sizes, all_strides, config, scale_b=not accumulates)
        else:
            config = configs.lora_b_config(*sizes)
            all_strides = strides, activation, h
            made = backward.lora_b_backward_launches(*sizes, all_strides, config, scale_b=not accumulates)
        strips, *launches = made
        return strips, *(None if launch is None else Bound(launch) for launch in launches)

    return Plan(
        dtype=dtype,
        casts_factors=casts_factors,
        autocast=None if autocast is None else x.device.type,
        y_shape=torch.Size((*x.shape[:-1], out_features)),
        accumulates=accumulates,
        norm=norm,
        compose=compose,
        backward=backward_launches,
        backward_makes_d_h=rank <= linear.LOW_RANK,
    )


def _without_autocast(plan, *arguments):
    """:func:`_forward`, whose norm would not be float32's under autocast, and which makes the casts itself."""
    if plan.autocast is None:
        return _forward(plan, *arguments)
    torch.set_autocast_enabled(plan.autocast, False)
    try:
        return _forward(plan, *arguments)
    finally:
        torch.set_autocast_enabled(plan.autocast, True)


def _forward(plan, x, weight, lora_A, lora_B, magnitude, bias, norm, scaling, keeps=False):
    """``(y, lora_A and lora_B for the products, norm, h, inner)``; no inner unless it is kept."""
    if norm is None:
        splits, launch, finish = plan.norm
        norm = magnitude.new_empty(weight.shape[0], dtype=torch.float32)
        parts = norm if splits == 1 else norm.new_empty(splits, weight.shape[0])
        launch(weight, lora_A, lora_B, scaling, None, parts)
        if splits > 1:
            finish(parts, norm)
    if plan.casts_factors:
        lora_A, lora_B = lora_A.to(plan.dtype), lora_B.to(plan.dtype)
    if x.dim() != 2:
        x = x.reshape(-1, x.shape[-1])
    if plan.accumulates:
        h = torch.addmm(x.new_empty(()), x, lora_A.t(), beta=0, alpha=scaling)
        base = torch.mm(h, lora_B.t()).addmm_(x, weight.t())
        low_rank = None, None
    else:
        h = torch.mm(x, lora_A.t())
        base = torch.mm(x, weight.t())
        low_rank = h, lora_B
    # In the memory of the product: y, or inner beside y.
    y = x.new_empty(plan.y_shape) if keeps else base
    inner = base if keeps else None
    if plan.compose is not None:
        plan.compose(base, *low_rank, magnitude, norm, scaling, bias, y, inner)
    else:
        from dorac.kernels.compose import compose

        y, inner = compose(base, *low_rank, magnitude, norm, scaling, bias, want_inner=keeps)
    return y if keeps else y.view(plan.y_shape), lora_A, lora_B, norm, h, inner


class _Linear(torch.autograd.Function):
    """Returns (y, inner, h), as ``ops/linear.py``'s does, whose gradients are taken where these here are not enough."""

    @staticmethod
    def forward(ctx, x, weight, lora_A, lora_B, magnitude, bias, weight_norm, scaling, plan):
        y, a, b, norm, h, inner = _without_autocast(
            plan, x, weight, lora_A, lora_B, magnitude, bias, weight_norm, scaling, True
        )
        if not plan.casts_factors:
            a = b = None
        rows = x if ctx.needs_input_grad[2] else None
        ctx.save_for_backward(rows, weight, lora_A, lora_B, a, b, magnitude, norm, h, inner)
        ctx.set_materialize_grads(False)
        ctx.scaling, ctx.plan, ctx.x_shape = scaling, plan, x.shape
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y, inner, h

    @staticmethod
    def backward(ctx, dy, d_inner_again, d_h_again):
        if dy is None or torch.is_grad_enabled() or type(dy) is not Tensor or not front.unobserved():
            return _general(ctx, dy, d_inner_again, d_h_again)
        x, weight, lora_A, lora_B, a, b, magnitude, norm, h, inner = ctx.saved_tensors
        plan, scaling = ctx.plan, ctx.scaling
        needs_x, _, needs_a, _, _, needs_bias = ctx.needs_input_grad[:6]
        dy = dy if dy.dim() == 2 else dy.reshape(inner.shape)
        if dy.data_ptr() % 16:
            dy = dy.clone(memory_format=torch.contiguous_format)
        if a is None:
            a, b = lora_A, lora_B
        dx = d_a = d_h = d_bias = None
        d_inner = torch.empty_like(inner)
        d_m, d_b = magnitude.new_empty(magnitude.shape), lora_B.new_empty(lora_B.shape)
        strips, launch, add = plan.backward(dy.stride())
        if plan.backward_makes_d_h:
            (tokens, rank), out_features = h.shape, inner.shape[1]
            d_h = torch.empty_like(h)
            parts_m = norm.new_empty(strips[0], out_features, dtype=torch.float32)
            parts_h = norm.new_empty(strips[1], tokens, rank, dtype=torch.float32)
            parts_b = norm.new_empty(strips[0], out_features, rank, dtype=torch.float32)
            launch(dy, inner, magnitude, norm, h, b, d_inner, parts_m, parts_h, parts_b)
            add(parts_m, parts_h, parts_b, norm, scaling, d_m, d_h, d_b)
        elif add is None:
            launch(dy, dy, inner, magnitude, norm, h, scaling, d_inner, d_m, d_b)
        else:
            parts_m = norm.new_empty(strips, inner.shape[1], dtype=torch.float32)
            parts_b = norm.new_empty(strips, *lora_B.shape, dtype=torch.float32)
            launch(dy, dy, inner, magnitude, norm, h, scaling, d_inner, parts_m, parts_b)
            add(parts_m, None, parts_b, norm, scaling, d_m, None, d_b)
        if d_h is None and (needs_x or needs_a):
            d_h = torch.addmm(d_inner.new_empty(()), d_inner, b, beta=0, alpha=scaling)
        if needs_a:
            d_a = _wide_mm(d_h.t(), x if x.dim() == 2 else x.reshape(-1, x.shape[-1]), lora_A.dtype)
        if needs_x:
            dx = torch.mm(d_h, a).addmm_(d_inner, weight).view(ctx.x_shape)
        if needs_bias:
            d_bias = dy.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        return dx, None, d_a, d_b, d_m, d_bias, None, None, None


def _wide_mm(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """``left @ right`` in ``dtype``, which may be float32."""
    if dtype is left.dtype or not left.is_cuda:
        return torch.mm(left, right).to(dtype)
    return torch.mm(left, right, out_dtype=dtype)


def _general(ctx, dy, d_inner_again, d_h_again):
    """The gradients where they are to be differentiated again, or seen."""
    x, weight, lora_A, lora_B, _, _, magnitude, norm, h, inner = ctx.saved_tensors
    plan = ctx.plan
    a, b = lora_A.to(plan.dtype), lora_B.to(plan.dtype)
    scaling = torch.full((), ctx.scaling, dtype=torch.float32, device=inner.device)
    needs_x, _, needs_a, _, _, needs_bias = ctx.needs_input_grad[:6]
    dx, _, d_a, d_b, d_m, d_bias = linear.gradients(
        (x, weight, a, b, magnitude, norm, scaling, h, inner),
        (needs_x, False, needs_a, True, True, needs_bias),
        (plan.dtype, plan.dtype, ctx.bias_dtype),
        (None if dy is None else dy.reshape(inner.shape), d_inner_again, d_h_again),
        number=ctx.scaling,
        path="accumulate" if plan.accumulates else "fused",
        eager=True,
    )
    dx = None if dx is None else dx.view(ctx.x_shape)
    d_a, d_b = (d if d is None else d.to(lora_A.dtype) for d in (d_a, d_b))
    return dx, None, d_a, d_b, d_m, d_bias, None, None, None
