"""``dorac::grouped_compose``: ``y = g_e * (base + s_e h B_e^T) + b_e`` for rows sorted by expert e, ``g = m / n``.

:mod:`dorac.ops.compose` with the up-projection inside and a layer per expert. Rows past the last offset belong to no
expert: they give zeros, whatever base holds there, and have no gradient.

Registration. As ``dorac::compose``: a CompositeImplicitAutograd op whose body applies an ``autograd.Function`` over
leaf ops, in eager and under the compiler, and the plain formula with an expert's tensors gathered for every row under
``torch.func``, forward-mode AD, export, for tensor subclasses and for a scaling that requires a gradient. The Function
saves ``inner = base + s_e h B_e^T`` and nothing else of that size.

The leaves are Triton kernels that find the experts' rows on the device (``kernels/segments.py``); on the CPU they go
expert by expert over slices, and gather nothing.

Legend: S rows, E experts, O out_features, R rank.
"""

import torch
from torch import Tensor

from dorac.numerics import ZERO_ROW_NORM, accumulate_dtype
from dorac.ops import front
from dorac.ops.compose import (
    compose_aten,
    compose_backward,
    compose_forward,
    compose_parts,
    compose_value,
    magnitude_scale,
)
from dorac.ops.grouped import GroupedLinear, GroupedOuter, grouped_linear_aten, grouped_product, groups, rows_by_expert
from dorac.ops.grouped import grouped_outer as outer
from dorac.ops.library import lib, register_composite, register_leaf
from dorac.ops.linear_function import added
from dorac.ops.take import SumByIndex, take, take_aten

_TENSORS = "Tensor lora_B, Tensor magnitude, Tensor weight_norm, Tensor scaling"
lib.define(
    f"grouped_compose_value(Tensor base, Tensor h, {_TENSORS}, Tensor? bias, Tensor offsets, bool delta) -> Tensor"
)
lib.define(
    f"grouped_compose_forward(Tensor base, Tensor h, {_TENSORS}, Tensor? bias, Tensor offsets, bool delta) "
    "-> (Tensor, Tensor)"
)
lib.define(
    f"grouped_compose_backward(Tensor dy, Tensor inner, Tensor h, {_TENSORS}, Tensor offsets, bool delta) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)


@torch.library.register_fake("dorac::grouped_compose_value", lib=lib)
def _value_fake(base, h, lora_B, magnitude, weight_norm, scaling, bias, offsets, delta):
    return base.new_empty(base.shape)


@torch.library.register_fake("dorac::grouped_compose_forward", lib=lib)
def _forward_fake(base, h, lora_B, magnitude, weight_norm, scaling, bias, offsets, delta):
    return base.new_empty(base.shape), base.new_empty(base.shape)


@torch.library.register_fake("dorac::grouped_compose_backward", lib=lib)
def _backward_fake(dy, inner, h, lora_B, magnitude, weight_norm, scaling, offsets, delta):
    return (
        inner.new_empty(inner.shape),
        h.new_empty(h.shape),
        lora_B.new_empty(lora_B.shape),
        magnitude.new_empty(magnitude.shape),
    )


def grouped_compose_aten(base, h, lora_B, magnitude, weight_norm, scaling, bias, offsets, delta):
    """The formula in plain differentiable aten, with an expert's tensors for every row."""
    index, taken = rows_by_expert(offsets, base.shape[0])
    g = take_aten(magnitude_scale(magnitude, weight_norm), index)
    bias = None if bias is None else take_aten(bias, index)
    scaling = take_aten(scaling, index).unsqueeze(-1) if scaling.ndim else scaling
    y = compose_aten(base, grouped_linear_aten(h, lora_B, offsets), g, scaling, bias, delta)
    return torch.where(taken.unsqueeze(-1), y, 0)


def _of_rows(magnitude, weight_norm, scaling, bias, offsets, rows):
    """g, s and b of every row, and which rows an expert takes: without reading the offsets."""
    index, taken = rows_by_expert(offsets, rows)
    g, bias = magnitude_scale(magnitude, weight_norm)[index], None if bias is None else bias[index]
    return g, scaling[index].unsqueeze(-1) if scaling.ndim else scaling, bias, index, taken.unsqueeze(-1)


def _forward_on_device(base, h, lora_B, magnitude, weight_norm, scaling, bias, offsets, delta, needs_inner):
    """On CUDA without kernels."""
    g, s, bias, _, taken = _of_rows(magnitude, weight_norm, scaling, bias, offsets, base.shape[0])
    base = torch.where(taken, base, 0)
    lora = grouped_product(h, lora_B, offsets)
    y, inner = compose_parts(base, lora, g, s, bias, delta, eager=False, needs_inner=needs_inner)
    return torch.where(taken, y, 0), inner


def _forward_by_expert(base, h, lora_B, magnitude, weight_norm, scaling, bias, offsets, delta, needs_inner):
    y = base.new_zeros(base.shape)
    inner = torch.zeros_like(y) if needs_inner else None
    g = magnitude_scale(magnitude, weight_norm)
    for e, rows in groups(offsets, base.shape[0]):
        s, b = scaling[e] if scaling.ndim else scaling, None if bias is None else bias[e]
        tensors = base[rows], h[rows] @ lora_B[e].t(), g[e], s, b, delta, False
        if needs_inner:
            y[rows], inner[rows] = compose_forward(*tensors)
        else:
            y[rows] = compose_value(*tensors)
    return y, inner


def _value(base, *tensors):
    return (_forward_on_device if base.is_cuda else _forward_by_expert)(base, *tensors, False)[0]


def _forward(base, *tensors):
    return (_forward_on_device if base.is_cuda else _forward_by_expert)(base, *tensors, True)


def _backward_on_device(dy, inner, h, lora_B, magnitude, weight_norm, scaling, offsets, delta):
    """On CUDA without kernels."""
    acc = accumulate_dtype(dy, inner, magnitude, weight_norm)
    g, s, _, index, taken = _of_rows(magnitude, weight_norm, scaling, None, offsets, dy.shape[0])
    wide = torch.where(taken, dy, 0).to(acc)
    d_lora = (g * s * wide).to(h.dtype)
    d_g = torch.zeros(magnitude.shape, dtype=acc, device=dy.device)
    d_g.index_put_((index,), wide * inner.to(acc), accumulate=True)  # sorts: one order
    return (
        ((g - 1 if delta else g) * wide).to(inner.dtype),
        grouped_product(d_lora, lora_B.mT, offsets),
        outer(d_lora, h, offsets),
        _of_magnitude(d_g, weight_norm).to(magnitude.dtype),
    )


def _of_magnitude(d_g, weight_norm):
    """None reaches it on zero rows, whose g is the constant 1."""
    return torch.where(weight_norm <= ZERO_ROW_NORM, 0.0, magnitude_scale(d_g, weight_norm))


def _backward(dy, inner, h, lora_B, magnitude, weight_norm, scaling, offsets, delta):
    if dy.is_cuda:
        return _backward_on_device(dy, inner, h, lora_B, magnitude, weight_norm, scaling, offsets, delta)
    d_base, d_h, d_b = inner.new_zeros(inner.shape), h.new_zeros(h.shape), lora_B.new_zeros(lora_B.shape)
    g = magnitude_scale(magnitude, weight_norm)
    d_g = torch.zeros_like(g)
    for e, rows in groups(offsets, dy.shape[0]):
        s = scaling[e] if scaling.ndim else scaling
        d_base[rows], d_lora, d_g[e] = compose_backward(dy[rows], inner[rows], g[e], s, h.dtype, delta)
        torch.mm(d_lora, lora_B[e], out=d_h[rows])
        torch.mm(d_lora.t(), h[rows], out=d_b[e])
    return d_base, d_h, d_b, _of_magnitude(d_g, weight_norm).to(magnitude.dtype)


def takes_kernels(base: Tensor, lora_B: Tensor, rank: int) -> bool:
    """Whether the kernels take these dtypes: factors of the base's, or float32."""
    return lora_B.dtype in (base.dtype, torch.float32) and rank > 0 and len(lora_B) > 0


def _value_cuda(base, h, lora_B, *tensors):
    if not takes_kernels(base, lora_B, h.shape[1]):
        return _forward_on_device(base, h, lora_B, *tensors, False)[0]
    from dorac.kernels.segments import segment_compose

    *tensors, delta = tensors
    return segment_compose(base, h, lora_B, *tensors, delta=delta)[0]


def _forward_cuda(base, h, lora_B, *tensors):
    if not takes_kernels(base, lora_B, h.shape[1]):
        return _forward_on_device(base, h, lora_B, *tensors, True)
    from dorac.kernels.segments import segment_compose

    *tensors, delta = tensors
    return segment_compose(base, h, lora_B, *tensors, delta=delta, want_inner=True)


def _backward_cuda(dy, inner, h, lora_B, magnitude, weight_norm, scaling, offsets, delta):
    if not takes_kernels(dy, lora_B, h.shape[1]):
        return _backward_on_device(dy, inner, h, lora_B, magnitude, weight_norm, scaling, offsets, delta)
    from dorac.kernels.segments import segment_backward, segment_product

    d_base, d_m, d_b, _ = segment_backward(
        dy, inner, magnitude, weight_norm, h, scaling, offsets, delta=delta, d_lora_B=lora_B.new_empty(lora_B.shape)
    )
    if delta or lora_B.dtype is not dy.dtype:  # g * dy is nowhere, or was rounded
        d_h = segment_product(dy, lora_B.mT, offsets, magnitude=magnitude, weight_norm=weight_norm, scaling=scaling)
    else:
        d_h = segment_product(d_base, lora_B.mT, offsets, scaling=scaling)
    return d_base, d_h, d_b, d_m


grouped_compose_value, grouped_compose_forward, grouped_compose_backward = (
    register_leaf(f"grouped_compose_{name}", in_aten, cuda, inline=True)
    for name, in_aten, cuda in (
        ("value", _value, _value_cuda),
        ("forward", _forward, _forward_cuda),
        ("backward", _backward, _backward_cuda),
    )
)


class _GroupedCompose(torch.autograd.Function):
    """Returns (y, inner): with inner an output, a second derivative stays connected through what backward saved."""

    @staticmethod
    def forward(ctx, base, h, lora_B, magnitude, weight_norm, scaling, bias, offsets, delta):
        needs_m = ctx.needs_input_grad[3]
        arguments = base, h, lora_B, magnitude, weight_norm, scaling, bias, offsets, delta
        y, inner = grouped_compose_forward(*arguments) if needs_m else (grouped_compose_value(*arguments), None)
        ctx.save_for_backward(inner, h, lora_B, magnitude, weight_norm, scaling, offsets)
        ctx.set_materialize_grads(False)
        ctx.base_dtype, ctx.bias = base.dtype, None if bias is None else (bias.shape, bias.dtype)
        ctx.delta = delta
        return y, inner

    @staticmethod
    def backward(ctx, dy, d_inner):
        if dy is None and d_inner is None:
            return (None,) * 9
        inner, h, lora_B, magnitude, weight_norm, scaling, offsets = ctx.saved_tensors
        _, _, needs_b, needs_m, _, _, needs_bias, *_ = ctx.needs_input_grad
        with front.autocast_off(weight_norm):
            if dy is None or not needs_m or torch.is_grad_enabled() or front.under_transform():
                d_base, d_h, d_b, d_m = _differentiable(ctx, dy, d_inner, needs_b, needs_m)
            else:
                tensors = inner, h, lora_B, magnitude, weight_norm, scaling, offsets
                d_base, d_h, d_b, d_m = grouped_compose_backward(dy, *tensors, ctx.delta)
                if d_inner is not None:  # of another first derivative that used it
                    again = _differentiable(ctx, None, d_inner, needs_b, False)
                    d_base, d_h, d_b, _ = (added(a, b) for a, b in zip((d_base, d_h, d_b, None), again, strict=True))
            d_bias = None
            if needs_bias and dy is not None:
                shape, dtype = ctx.bias
                index, taken = rows_by_expert(offsets, dy.shape[0])
                rows = torch.where(taken.unsqueeze(-1), dy, 0).to(accumulate_dtype(dy))
                d_bias = SumByIndex.apply(rows, index, shape[0]).to(dtype)
        return d_base, d_h, d_b, d_m, None, None, d_bias, None, None


def _differentiable(ctx, dy, d_inner, needs_b, needs_m):
    """The gradients of base, h, lora_B and magnitude, of ops that can be differentiated again."""
    inner, h, lora_B, magnitude, weight_norm, scaling, offsets = ctx.saved_tensors
    rows = (d_inner if dy is None else dy).shape[0]
    acc = accumulate_dtype(h, lora_B, magnitude, weight_norm, d_inner if dy is None else dy)
    index, taken = rows_by_expert(offsets, rows)
    taken = taken.unsqueeze(-1)
    s = (take_aten(scaling, index).unsqueeze(-1) if scaling.ndim else scaling).to(acc)
    d_base = d_lora = d_m = None
    if dy is not None:
        wide = torch.where(taken, dy, 0).to(acc)
        g = take(magnitude_scale(magnitude, weight_norm).to(acc), index)
        d_base, d_lora = (g - 1 if ctx.delta else g) * wide, g * s * wide
        if needs_m:
            d_g = SumByIndex.apply(wide * inner.to(acc), index, len(magnitude))
            d_m = _of_magnitude(d_g, weight_norm).to(magnitude.dtype)
    if d_inner is not None:
        wide = torch.where(taken, d_inner, 0).to(acc)
        d_base, d_lora = added(d_base, wide), added(d_lora, s * wide)
    d_lora = d_lora.to(h.dtype)
    d_h = GroupedLinear.apply(d_lora, lora_B.mT, offsets)
    d_b = GroupedOuter.apply(d_lora, h, offsets) if needs_b else None
    return d_base.to(ctx.base_dtype), d_h, d_b, d_m


def _grouped_compose(base, h, lora_B, magnitude, weight_norm, scaling, bias, offsets, delta):
    if (dtype := front.autocast_dtype(base)) is not None:
        h, lora_B = (t if t.dtype is torch.float64 else t.to(dtype) for t in (h, lora_B))
    with front.autocast_off(base):
        tensors = base, h, lora_B, magnitude, weight_norm, scaling, bias, offsets
        in_aten = front.under_transform() or front.exporting() or not front.all_plain(*tensors)
        if in_aten or scaling.requires_grad:
            return grouped_compose_aten(*tensors, delta)
        if weight_norm.requires_grad and torch.is_grad_enabled():
            # As in dora_linear: the gradient of m * n0 / n, for the constant n0 = n, reaches n too.
            constant = weight_norm.detach()
            wide = magnitude.to(accumulate_dtype(magnitude, weight_norm))
            magnitude, weight_norm = wide * magnitude_scale(constant, weight_norm), constant
            tensors = base, h, lora_B, magnitude, weight_norm, scaling, bias, offsets
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
            return _GroupedCompose.apply(*tensors, delta)[0]
        return grouped_compose_value(*tensors, delta)


grouped_compose = register_composite(
    f"grouped_compose(Tensor base, Tensor h, {_TENSORS}, Tensor? bias, Tensor offsets, bool delta) -> Tensor",
    _grouped_compose,
)
