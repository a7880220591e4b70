"""Rows by expert in eager: one ``autograd.Function``, on a GPU with kernels one that launches, as in ``ops/eager.py``.

``functional.dora_linear_grouped`` asks here first. Where tensors are plain, the layer bfloat16 and dense with sizes
that torch's grouped GEMM takes, the factors of that dtype or float32, the norm given, nothing dropped, adapters trained
whole or not at all and nothing observes, the layer is computed here; anything else is left to the ops, whose formulas
these are (``ops/grouped_compose.py``). The host reads no offsets, and there is no copy of any tensor for a row.

- ``x W^T`` turns into ``inner`` where it lies, which is kept for backward; without a gradient into y.
- The gradient of x is the grouped product of ``g * dy``, onto which the small product ``d_h A`` is accumulated where it
  lies.
- Plans are kept as there: they settle what metadata settle, and hold no tensors.
- A projection that is gate and up in one has their joining, ``ops/gate.py``, in the same kernels: y is not written,
  kept nor read again, nor is its gradient.
- On the CPU, in single and double precision, it is ``ops/by_expert.py``.

Where a mode over ops is active in training, the same Function goes through the ops, and saves the same tensors.

Legend: S rows, E experts, I in_features, O out_features, F = O / 2 features behind a gate, R rank.
"""

import dataclasses
import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dorac import checks
from dorac.numerics import accumulate_dtype
from dorac.ops import by_expert, eager, front
from dorac.ops.compose import magnitude_scale
from dorac.ops.eager_grouped_plan import Plan, Slices, make_plan
from dorac.ops.gate import Gate
from dorac.ops.grouped import grouped_linear, grouped_outer, grouped_product, rows_by_expert
from dorac.ops.grouped_compose import grouped_compose, grouped_compose_backward, grouped_compose_forward
from dorac.ops.take import sum_by_index


def dora_linear_grouped(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    bias: Tensor | None,
    weight_norm: Tensor,
    offsets: Tensor,
    scaling: float | Tensor,
    gate: Gate | None = None,
) -> Tensor | None:
    """The layer, or None if it is not to be computed here; errors are ``check_grouped``'s.

    ``scaling``: a finite number, or a tensor, checked if it is 0-d. ``gate``: of the layer's output.
    """
    in_ops = not front.unobserved()
    if in_ops and not front.seen_by_modes_alone():
        return None
    of_scaling = None
    try:
        if isinstance(scaling, Tensor):
            if scaling.requires_grad or scaling.device != x.device or (scaling.is_cuda and scaling.dtype.itemsize > 4):
                return None
            of_scaling = type(scaling), scaling.shape, scaling.dtype, scaling.stride()
        training = torch.is_grad_enabled() and (
            lora_B.requires_grad
            or magnitude.requires_grad
            or lora_A.requires_grad
            or x.requires_grad
            or weight.requires_grad
            or (bias is not None and bias.requires_grad)
            or weight_norm.requires_grad
        )
        of_offsets = type(offsets), offsets.shape, offsets.dtype, offsets.device, offsets.stride()
        of_layer = eager.metadata(x, weight, lora_A, lora_B, magnitude, bias, weight_norm)
        key = "grouped", gate, training, of_scaling, of_offsets, x.stride(), *of_layer
        plan = eager.plans.get(key, False)
        bits = x.data_ptr() | weight.data_ptr() | lora_A.data_ptr() | lora_B.data_ptr() | magnitude.data_ptr()
        bits |= weight_norm.data_ptr() | offsets.data_ptr() | (0 if bias is None else bias.data_ptr())
    except (AttributeError, RuntimeError, TypeError):  # no tensor, or one of no strides, symbolic sizes or no memory
        return None
    if plan is False:
        checks.check_grouped(x, weight, lora_A, lora_B, magnitude, bias, weight_norm, offsets)
        if of_scaling is not None and scaling.ndim:
            checks.check_scalings(scaling, lora_A.shape[0], lora_A, "E")
        tensors = x, weight, lora_A, lora_B, magnitude, bias, weight_norm, offsets
        with torch._C._DisableTorchDispatch():  # a mode would see it in the first call alone
            plan = eager.keep_plan(key, make_plan(*tensors, scaling, training, gate))
    if plan is None or (in_ops and not training):
        return None
    if bits & 15:
        if type(plan) is Plan:
            return None
        plan = Slices()
    tensors = x, weight, lora_A, lora_B, magnitude, bias, weight_norm, offsets
    if not training:
        y = _forward_of(plan)(*tensors, scaling, False)[0]
    else:
        trained = magnitude.requires_grad and lora_A.requires_grad and lora_B.requires_grad
        if not trained or weight.requires_grad or weight_norm.requires_grad:
            return None
        y = _apply(*tensors, scaling, dataclasses.replace(plan, in_ops=True) if in_ops else plan)
    return y if gate is None or plan.gate is not None else gate(y)


def _product(launches, x, factor, magnitude, norm, scaling, offsets, rank) -> Tensor:
    """:func:`dorac.kernels.segments.segment_product`."""
    splits, launch, add = launches
    y = to = factor.new_empty(x.shape[0], rank)
    if splits > 1:
        to = factor.new_empty(splits * x.shape[0], rank, dtype=torch.float32)
    launch(x, factor, magnitude, norm, scaling, offsets, None, to)
    if add is not None:
        add(to, None, y)
    return y


def _ends(offsets: Tensor) -> Tensor:
    """The offsets as torch's grouped GEMM takes them."""
    return offsets if offsets.dtype is torch.int32 else offsets.to(torch.int32)


def _forward(plan, x, weight, lora_A, lora_B, magnitude, bias, norm, offsets, scaling, training):
    """``(y, h, inner)``; inner in training alone. With a gate, what is behind it in the place of y."""
    h = _product(plan.down, x, lora_A, None, None, None, offsets, lora_A.shape[1])
    base = F.grouped_mm(x, weight.mT, offs=_ends(offsets))
    tensors = h, base, lora_B, magnitude, norm, scaling, bias, offsets
    if plan.gate is None:
        y, inner = (torch.empty_like(base), base) if training else (base, None)
        plan.compose(*tensors, None, y, inner)
    else:
        y, inner = base.new_empty(len(base), base.shape[1] // 2), base if training else None
        plan.compose(*tensors, inner, y)
    return y, h, inner


def _forward_of(plan: Plan | Slices) -> Callable:
    if type(plan) is Slices:
        return functools.partial(by_expert.forward, by_torch=plan.even)
    return functools.partial(_forward, plan)


def _in_ops(x, weight, lora_A, lora_B, magnitude, bias, norm, offsets, scaling, gate):
    """The same of the ops."""
    h = grouped_product(x.to(lora_A.dtype), lora_A, offsets)
    base = grouped_product(x, weight, offsets)
    y, inner = grouped_compose_forward(base, h, lora_B, magnitude, norm, _tensor(scaling, x), bias, offsets, False)
    if gate is not None:
        y = gate(_scaled(inner, magnitude, norm, bias, offsets)).to(inner.dtype)
    return y, h, inner


def _scaled(inner, magnitude, norm, bias, offsets):
    """y as the kernels have it in front of a gate: of the rounded inner, without another rounding."""
    index, taken = rows_by_expert(offsets, len(inner))
    y = magnitude_scale(magnitude, norm)[index] * inner.to(accumulate_dtype(inner))
    return torch.where(taken.unsqueeze(-1), y if bias is None else y + bias[index], 0)


def _before_gate(gate, dz, inner, magnitude, norm, bias, offsets):
    """The gradient of y, of that of what is behind the gate."""
    y = _scaled(inner, magnitude, norm, bias, offsets).requires_grad_()
    with torch.enable_grad():
        z = gate(y)
    return torch.autograd.grad(z, y, dz.to(z.dtype))[0].to(inner.dtype)


def _tensor(scaling: float | Tensor, like: Tensor) -> Tensor:
    if isinstance(scaling, Tensor):
        return scaling
    return torch.full((), scaling, dtype=accumulate_dtype(like), device=like.device)


class Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, lora_A, lora_B, magnitude, bias, norm, offsets, scaling, plan):
        tensors = x, weight, lora_A, lora_B, magnitude, bias, norm, offsets, scaling
        y, h, inner = _in_ops(*tensors, plan.gate) if plan.in_ops else _forward_of(plan)(*tensors, True)
        of_scaling = scaling if isinstance(scaling, Tensor) else None
        ctx.save_for_backward(x, weight, lora_A, lora_B, magnitude, bias, norm, offsets, h, inner, of_scaling)
        ctx.set_materialize_grads(False)
        ctx.scaling, ctx.plan = None if of_scaling is not None else scaling, plan
        return y

    @staticmethod
    def backward(ctx, dy):
        if dy is None:
            return (None,) * 10
        if torch.is_grad_enabled():
            return _differentiable_gradients(ctx, dy)
        if front.autocast_dtype(dy) is not None:  # backward called inside autocast
            with front.autocast_off(dy):
                return Grouped.backward(ctx, dy)
        x, weight, lora_A, lora_B, magnitude, bias, norm, offsets, h, inner, scaling = ctx.saved_tensors
        plan, scaling = ctx.plan, ctx.scaling if scaling is None else scaling
        needs_x, needs_bias = ctx.needs_input_grad[0], ctx.needs_input_grad[5]
        if type(dy) is not Tensor or not front.unobserved():
            if plan.gate is not None:
                dy = _before_gate(plan.gate, dy, inner, magnitude, norm, bias, offsets)
            tensors = dy, x, weight, lora_A, lora_B, magnitude, norm, offsets, h, inner, _tensor(scaling, x)
            dx, d_a, d_b, d_m, d_bias = _gradients_in_ops(*tensors, bias if needs_bias else None, needs_x)
            return dx, None, d_a, d_b, d_m, d_bias, None, None, None, None
        if type(plan) is Slices:
            tensors = dy, x, weight, lora_A, lora_B, magnitude, norm, offsets, h, inner, scaling
            flags = {"by_torch": plan.even, "needs_x": needs_x, "needs_bias": needs_bias}
            dx, d_a, d_b, d_m, d_bias = by_expert.backward(*tensors, **flags)
            return dx, None, d_a, d_b, d_m, d_bias, None, None, None, None
        if dy.data_ptr() % 16 or dy.dtype is not inner.dtype:
            dy = dy.to(inner.dtype, memory_format=torch.contiguous_format, copy=True)
        rank = lora_A.shape[1]
        strips, launch, add = plan.backward(dy.stride(), needs_bias)
        d_base, d_m, d_b = torch.empty_like(inner), torch.empty_like(magnitude), torch.empty_like(lora_B)
        d_bias = torch.empty_like(bias) if needs_bias else None
        parts_m = norm.new_empty(strips, magnitude.shape[1], dtype=torch.float32)
        parts_b = norm.new_empty(strips, *lora_B.shape[1:], dtype=torch.float32)
        parts_bias = torch.empty_like(parts_m) if needs_bias else None
        to = d_base, d_m, d_b, d_bias, parts_m, parts_b, parts_bias
        if plan.gate is None:
            launch(dy, dy, inner, magnitude, norm, h, scaling, offsets, None, *to)
        else:
            launch(dy, inner, magnitude, norm, bias, h, scaling, offsets, *to)
        add(parts_b, parts_m, parts_bias, offsets, d_m, d_b, d_bias)
        if plan.wide and plan.gate is None:  # of g * dy as it was before it was rounded
            d_h = _product(plan.of_h(dy.stride()), dy, lora_B, magnitude, norm, scaling, offsets, rank)
        else:
            d_h = _product(plan.of_h(d_base.stride()), d_base, lora_B, None, None, scaling, offsets, rank)
        strips, launch, add = plan.of_a
        d_a = torch.empty_like(lora_A)
        parts_a = norm.new_empty(strips, x.shape[1], rank, dtype=torch.float32)
        launch(x, x, None, None, None, d_h, 1.0, offsets, None, None, None, d_a, None, None, parts_a, None)
        add(parts_a, None, None, offsets, None, d_a, None)
        dx = None
        if needs_x:
            dx = F.grouped_mm(d_base, weight, offs=_ends(offsets))
            plan.of_x(d_h, dx, lora_A, None, None, 1.0, None, offsets, None, dx, None)
        return dx, None, d_a, d_b, d_m, d_bias, None, None, None, None


# ``Grouped.apply`` without its questions for transforms, of which there are none, nor tensors that outlived theirs.
_apply = super(torch.autograd.Function, Grouped).apply


def _gradients_in_ops(dy, x, weight, lora_A, lora_B, magnitude, norm, offsets, h, inner, scaling, bias, needs_x):
    """The gradients of x, lora_A, lora_B, magnitude and of a bias, where a mode or a subclass of tensors looks on."""
    d_base, d_h, d_b, d_m = grouped_compose_backward(dy, inner, h, lora_B, magnitude, norm, scaling, offsets, False)
    d_a = grouped_outer(d_h, x.to(d_h.dtype), offsets)
    dx = d_bias = None
    if needs_x:
        dx = grouped_product(d_base, weight.mT, offsets) + grouped_product(d_h, lora_A.mT, offsets).to(x.dtype)
    if bias is not None:
        index, taken = rows_by_expert(offsets, len(dy))
        rows = torch.where(taken.unsqueeze(-1), dy, 0).to(accumulate_dtype(dy))
        d_bias = sum_by_index(rows, index, len(bias)).to(bias.dtype)
    return dx, d_a, d_b, d_m, d_bias


def _differentiable_gradients(ctx, dy):
    """The gradients where they are differentiated again: those of the layer, computed again."""
    x, weight, lora_A, lora_B, magnitude, bias, norm, offsets, _, _, scaling = ctx.saved_tensors
    scaling = _tensor(ctx.scaling, x) if scaling is None else scaling
    with front.autocast_off(x):
        h = grouped_linear(x.to(lora_A.dtype), lora_A, offsets)
        base = grouped_linear(x, weight, offsets)
        y = grouped_compose(base, h, lora_B, magnitude, norm, scaling, bias, offsets, False)
        y = y if ctx.plan.gate is None else ctx.plan.gate(y)
        tensors = x, weight, lora_A, lora_B, magnitude, bias
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[:6]) if needed]
        grads = torch.autograd.grad(y, [tensors[i] for i in wanted], dy, create_graph=True)
    found = dict(zip(wanted, grads, strict=True))
    return *(found.get(i) for i in range(6)), None, None, None, None
