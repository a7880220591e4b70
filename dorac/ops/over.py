"""``dorac::dora_over``: the layer over a product that another layer computed, ``base = x W^T``.

``y = g * (base + s (x lora_A^T) lora_B^T) + b``, ``g = m / n``, n given: what a quantised, offloaded or hooked layer is
adapted by, whose weight is not there as a tensor. It is ``dorac::dora_linear`` without that product, registered in the
same way, with the same leaf ops and the same numbers. The gradient of base is that layer's to take on, to x too.

Where base has the bias in it (``holds_bias``), as the frozen layer adds it, ``y = g * (base + s ...) + (1 - g) * b``
in the accumulate dtype before the one rounding: in half precision the bias would not come off again. What is infinite
of it stays with base. What is saved is inner without the bias.

Legend: T tokens, I in_features, O out_features, R rank. The op takes [*, I] and [*, O].
"""

import torch
import torch.nn.functional as F

from dorac.numerics import accumulate_dtype
from dorac.ops import front
from dorac.ops.compose import compose_aten, compose_parts, magnitude_scale, reshaped
from dorac.ops.library import register_composite
from dorac.ops.linear import route
from dorac.ops.linear_function import gradients, rows_of
from dorac.ops.linear_leaves import up_compose, up_compose_forward


def over_aten(base, x, lora_A, lora_B, magnitude, weight_norm, scaling, bias, holds_bias):
    """The formula in plain differentiable aten."""
    lora = F.linear(F.linear(x.to(lora_A.dtype), lora_A), lora_B)
    g = magnitude_scale(magnitude, weight_norm)
    if bias is None or not holds_bias:
        return compose_aten(base, lora, g, scaling, bias, False)
    acc = accumulate_dtype(base, lora, g)
    y = compose_aten(base.to(acc), lora, g, scaling, None, False)
    return (y + (1 - g.to(acc)) * torch.where(bias.isfinite(), bias, 0.0).to(acc)).to(base.dtype)


def forward(base, x, lora_A, lora_B, magnitude, weight_norm, scaling, bias, holds_bias, path, eager, needs_inner):
    """``(y, inner, h)`` of rows; inner None where it is not needed."""
    h = x.to(lora_A.dtype) @ lora_A.t()
    if path == "fused":
        tensors = (base, h, lora_B, magnitude, weight_norm, scaling, bias, False, holds_bias)
        return (*up_compose_forward(*tensors), h) if needs_inner else (up_compose(*tensors), None, h)
    g = magnitude_scale(magnitude, weight_norm)
    tensors = (base, h @ lora_B.t(), g, scaling, bias, False, holds_bias)
    return *compose_parts(*tensors, eager=eager, needs_inner=needs_inner), h


class _DoraOver(torch.autograd.Function):
    """Returns (y, inner, h): as outputs, what backward saved keeps a second derivative connected."""

    @staticmethod
    def forward(ctx, base, x, lora_A, lora_B, magnitude, weight_norm, scaling, bias, number, holds_bias, path, eager):
        _, needs_x, needs_a, needs_b, needs_m = ctx.needs_input_grad[:5]
        tensors = (base, x, lora_A, lora_B, magnitude, weight_norm, scaling, bias)
        y, inner, h = forward(*tensors, holds_bias, path, eager, needs_m)
        ctx.save_for_backward(
            x if needs_a else None,
            None,
            lora_A if needs_x else None,
            lora_B if needs_a or needs_x else None,
            magnitude,
            weight_norm,
            scaling,
            h if needs_b else None,
            inner if needs_m else None,
            None,
        )
        ctx.set_materialize_grads(False)
        ctx.dtypes = base.dtype, lora_A.dtype, None if bias is None else bias.dtype
        ctx.x_dtype, ctx.number, ctx.holds_bias, ctx.path, ctx.eager = x.dtype, number, holds_bias, path, eager
        return y, inner if needs_m else None, h if needs_b else None

    @staticmethod
    def backward(ctx, dy, d_inner_again, d_h_again):
        needs_base, needs_x, needs_a, needs_b, needs_m, _, _, needs_bias = ctx.needs_input_grad[:8]
        saved = ctx.saved_tensors  # once: a checkpoint does not give them twice
        dx, _, d_a, d_b, d_m, d_bias, _, d_base = gradients(
            saved,
            (needs_x, False, needs_a, needs_b, needs_m, needs_bias, False),
            ctx.dtypes,
            (dy, d_inner_again, d_h_again),
            number=ctx.number,
            path=ctx.path,
            eager=ctx.eager,
            over=needs_base,
        )
        if needs_bias and ctx.holds_bias:  # the rest of it is base's
            d_bias = None if d_bias is None else (1 - magnitude_scale(*saved[4:6])) * d_bias
            if d_inner_again is not None:
                of_inner = d_inner_again.sum(0, dtype=accumulate_dtype(d_inner_again))
                d_bias = -of_inner if d_bias is None else d_bias - of_inner
            d_bias = None if d_bias is None else d_bias.to(ctx.dtypes[2])
        dx = dx if dx is None else dx.to(ctx.x_dtype)
        return d_base if needs_base else None, dx, d_a, d_b, d_m, None, None, d_bias, None, None, None, None


def _dora_over(base, x, lora_A, lora_B, magnitude, weight_norm, scaling, bias=None, number=None, holds_bias=False):
    """``number``: the scaling again where it is known as one."""
    holds_bias = holds_bias and bias is not None
    if (dtype := front.autocast_dtype(x)) is not None:  # which leaves float64 alone
        x, lora_A, lora_B = (t if t.dtype is torch.float64 else t.to(dtype) for t in (x, lora_A, lora_B))
    with front.autocast_off(x):
        tensors = (base, x, lora_A, lora_B, magnitude, weight_norm, scaling, bias)
        in_aten = front.under_transform() or front.exporting() or scaling.requires_grad
        if in_aten or weight_norm.requires_grad or not front.all_plain(*tensors):
            return over_aten(*tensors, holds_bias)
        eager = front.all_eager(*tensors)
        training = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
        path = route(base, lora_A, training=training, traced=not eager)
        if path == "accumulate":  # there is no product of ours to accumulate
            path = "fused" if base.dtype.itemsize == 2 else "separate"
        rows = (rows_of(base), rows_of(x), *tensors[2:])
        if training:
            y = _DoraOver.apply(*rows, number, holds_bias, path, eager)[0]
        else:
            y = forward(*rows, holds_bias, path, eager, False)[0]
        return reshaped(y, base.shape)


dora_over = register_composite(
    "dora_over(Tensor base, Tensor x, Tensor lora_A, Tensor lora_B, Tensor magnitude, Tensor weight_norm, "
    "Tensor scaling, Tensor? bias=None, float? number=None, bool holds_bias=False) -> Tensor",
    _dora_over,
)
