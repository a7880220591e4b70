"""Forward and backward of the linear layer in each of its forms, and the ``autograd.Function`` of the two.

``ops/linear.py`` has the formulas, and chooses the form.

Legend: T tokens, I in_features, O out_features, R rank.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dorac.numerics import accumulate_dtype
from dorac.ops import front
from dorac.ops.compose import compose_parts, finite_part, magnitude_scale, takes_bias
from dorac.ops.linear_leaves import (
    LORA_B_RANK,
    delta_linear,
    lora_b_backward,
    low_rank_linear,
    scale,
    scale_aten,
    scale_backward,
    scale_backward_aten,
    scale_delta,
    scaled,
    up_compose,
    up_compose_forward,
)


def rows_of(x):
    """``[*, I] -> [T, I]``."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def rows_of_each(x):
    """``[N, *, I] -> [N, T, I]``."""
    return x.reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1])


def scaled_product(left, right, scaling, number, eager):
    """``s * (left @ right)``; where s is known as a number, it is the GEMM's alpha."""
    if number is None:
        return scaled(scaling, left @ right)
    # With beta = 0 torch reads nothing of what is added, but the compiler's own product multiplies it by zero. What is
    # there of the right factor costs no launch if it has no strides, and it is finite where the product is: of lora_A^T
    # an element, without which no output is finite.
    rows = right.shape[0]
    if eager:
        unread = left.new_empty(())
    elif isinstance(rows, int) and rows:
        unread = right[0] if right.stride(1) == 1 else right[:1, 0]
    else:
        unread = left.new_zeros(right.shape[1])
    return torch.addmm(unread, left, right, beta=0, alpha=number)


def forward(
    x,
    weight,
    lora_A,
    lora_B,
    magnitude,
    weight_norm,
    scaling,
    bias,
    x_adapter,
    number,
    path,
    eager,
    delta,
    needs_inner,
    group=None,
):
    """``(y, inner, h)`` in the form ``path``: no inner where it is not needed and costs, ``s * h`` if accumulated.

    ``group``: name of the ranks of whose summands inner is the sum, where it is accumulated.
    """
    seen = x if x_adapter is None else x_adapter  # by the low-rank branch
    if path == "separate":
        # With the bias, and of x in its own shape and strides: the bits of the frozen layer.
        holds_bias = not delta and takes_bias(x, bias)
        if delta and bias is not None:
            base = F.linear(x, weight, bias.to(x.dtype))  # as autocast casts the frozen layer's
        else:
            base = F.linear(x, weight, finite_part(bias) if holds_bias else None)
        g, rows = magnitude_scale(magnitude, weight_norm), rows_of(seen)
        h = rows.to(lora_A.dtype) @ lora_A.t()
        if delta:
            tensors = (rows_of(F.linear(seen, weight)), h @ lora_B.t(), g, scaling, None, True)
            change, inner = compose_parts(*tensors, eager=eager, needs_inner=needs_inner)
            return rows_of(base) + change, inner, h
        tensors = (rows_of(base), h @ lora_B.t(), g, scaling, bias, False, holds_bias)
        return *compose_parts(*tensors, eager=eager, needs_inner=needs_inner), h
    x, seen = rows_of(x), rows_of(seen)
    if path == "accumulate":
        h = scaled_product(seen, lora_A.t(), scaling, number, eager)
        inner = low_rank_linear(x, weight, h, lora_B)
        if group is not None:
            inner = torch.ops._c10d_functional.wait_tensor(torch.ops._c10d_functional.all_reduce(inner, "sum", group))
        times_g = scale if eager else functools.partial(scale_aten, as_buffer=True)
        return times_g(inner, magnitude, weight_norm, bias), inner, h
    h = seen.to(lora_A.dtype) @ lora_A.t()
    if delta:
        return *delta_linear(x, seen, weight, h, lora_B, magnitude, weight_norm, scaling, bias), h
    base = x @ weight.t()
    tensors = (base, h, lora_B, magnitude, weight_norm, scaling, bias, False)
    if needs_inner:
        return *up_compose_forward(*tensors), h
    return up_compose(*tensors), None, h


class DoraLinear(torch.autograd.Function):
    """Returns (y, inner, h): as outputs, what backward saved keeps a second derivative connected.

    On the path "accumulate" h stands for ``s * h`` (``h_is_scaled``); d_h is always the gradient of the unscaled h.
    """

    @staticmethod
    def forward(
        ctx,
        x,
        weight,
        lora_A,
        lora_B,
        magnitude,
        weight_norm,
        scaling,
        bias,
        x_adapter,
        number,
        path,
        eager,
        delta,
        group,
    ):
        needs_x, needs_weight, needs_a, needs_b, needs_m, *_, needs_x_adapter = ctx.needs_input_grad[:9]
        tensors = (x, weight, lora_A, lora_B, magnitude, weight_norm, scaling, bias, x_adapter)
        y, inner, h = forward(*tensors, number, path, eager, delta, needs_m, group)
        dropped = x_adapter is not None
        needs_h = needs_a or (needs_x_adapter if dropped else needs_x)
        ctx.x_shape = x.shape
        ctx.save_for_backward(
            x if needs_weight or (needs_a and not dropped) else None,
            weight if needs_x or needs_x_adapter else None,
            lora_A if needs_x or needs_x_adapter else None,
            lora_B if needs_h else None,
            magnitude,
            weight_norm,
            scaling,
            h if needs_b else None,
            inner if needs_m else None,
            x_adapter if needs_a or (needs_weight and delta) else None,
        )
        ctx.set_materialize_grads(False)
        ctx.dtypes = x.dtype, lora_A.dtype, None if bias is None else bias.dtype
        ctx.number, ctx.path, ctx.eager, ctx.dropped, ctx.delta = number, path, eager, dropped, delta
        return y, inner if needs_m else None, h if needs_b else None

    @staticmethod
    def backward(ctx, dy, d_inner_again, d_h_again):
        grads = gradients(
            ctx.saved_tensors,
            ctx.needs_input_grad[:5] + ctx.needs_input_grad[7:9],
            ctx.dtypes,
            (dy, d_inner_again, d_h_again),
            number=ctx.number,
            path=ctx.path,
            eager=ctx.eager,
            dropped=ctx.dropped,
            delta=ctx.delta,
        )
        dx, *others, d_bias, dx_adapter, _ = grads
        dx, dx_adapter = (None if t is None else t.view(ctx.x_shape) for t in (dx, dx_adapter))
        return dx, *others, None, None, d_bias, dx_adapter, None, None, None, None, None


def gradients(saved, needs, dtypes, grads, *, number, path, eager, dropped=False, delta=False, over=False):
    """The gradients of x (its rows), weight, lora_A, lora_B, magnitude, bias and x_adapter's rows, as ``needs`` says.

    Then that of the product ``x W^T``, for callers that did not make it here: see ``ops/over.py``, which has no weight.

    Args:
        saved: x, weight, lora_A, lora_B, magnitude, weight_norm, scaling, h, inner and x_adapter, each None where no
            gradient needs it.
        dtypes: of x, the factors and the bias.
        grads: of y, and of inner and h, given when a first derivative that used these is differentiated.
        dropped: whether there is an x_adapter. delta: whether the whole change sees it.
        over: whether the product's gradient is needed for its own sake.
    """
    x, weight, lora_A, lora_B, magnitude, weight_norm, scaling, h, inner, x_adapter = saved
    x, x_adapter = (None if t is None else rows_of(t) for t in (x, x_adapter))
    needs_x, needs_weight, needs_a, needs_b, needs_m, needs_bias, needs_x_adapter = needs
    needs_h = needs_a or (needs_x_adapter if dropped else needs_x)
    dy, d_inner_again, d_h_again = grads
    needs_inner = needs_x or needs_weight or needs_h or needs_b or needs_m or over
    x_dtype, lora_dtype, bias_dtype = dtypes
    # Leaf ops can be neither differentiated again nor batched.
    leaf_ops = path != "separate" and not torch.is_grad_enabled() and not front.under_transform()
    along = leaf_ops and x_dtype is lora_dtype and x_dtype.itemsize == 2 and needs_m and needs_b
    along = along and d_inner_again is None and h.shape[1] <= LORA_B_RANK
    number = number if leaf_ops else None
    h_is_scaled = path == "accumulate"
    # Under the compiler in aten, which fuses it into what made dy.
    times_g = scale if leaf_ops and eager else functools.partial(scale_aten, as_buffer=leaf_ops)
    # d_inner is g * dy; d_base is what the base product of what the change sees has, the same without delta.
    d_inner = d_base = d_h = dx = d_weight = d_a = d_b = d_m = d_bias = dx_adapter = None

    def d_rows(d_product, d_h):
        """The gradient of rows that went into a product with W, one with lora_A, or both."""
        if d_product is not None and d_h is not None and leaf_ops and x_dtype is lora_dtype:
            return low_rank_linear(d_product, weight.t(), d_h, lora_A.t())
        low = None if d_h is None else (d_h @ lora_A).to(x_dtype)
        return low if d_product is None else added(d_product @ weight, low)

    with front.autocast_off(weight_norm):
        if dy is not None and needs_bias:
            d_bias = dy.sum(0, dtype=accumulate_dtype(dy)).to(bias_dtype)
        if dy is not None and along:
            unread = weight_norm if h_is_scaled else scaling  # saves compiled code a tensor
            d_base, d_m, d_b = lora_b_backward(dy, inner, magnitude, weight_norm, h, unread, h_is_scaled, delta)
            if not delta:
                d_inner = d_base
            elif needs_h:
                g_B = times_g(lora_B.t(), magnitude, weight_norm, None).t()
                d_h = scaled_product(dy, g_B, scaling, number, eager)
        elif dy is not None and needs_m:
            of_scale = scale_backward if leaf_ops else scale_backward_aten
            d_inner, d_m = of_scale(dy, inner, magnitude, weight_norm)
        elif dy is not None and needs_inner:
            d_inner = times_g(dy, magnitude, weight_norm, None)
        if delta and dy is not None and d_base is None:
            d_base = scale_delta(dy, magnitude, weight_norm)
        d_lora = None
        if d_inner is not None and lora_dtype.itemsize > x_dtype.itemsize:
            # Not rounded to the activation's dtype on its way to wider factors.
            d_lora = scale_aten(dy.to(lora_dtype), magnitude, weight_norm, None)
        d_inner = added(d_inner, d_inner_again)
        if d_inner is not None:
            d_lora = d_inner.to(lora_dtype) if d_lora is None else added(d_lora, d_inner_again)
            if needs_b and d_b is None:
                d_b = d_lora.t() @ h if h_is_scaled else scaled_product(d_lora.t(), h, scaling, number, eager)
            if d_h is None and needs_h:
                d_h = scaled_product(d_lora, lora_B, scaling, number, eager)
        d_base = added(d_base, d_inner_again) if delta else d_inner
        d_frozen = dy if delta else d_inner  # of x W^T
        if needs_weight:
            d_weight = None if d_frozen is None else d_frozen.t() @ x
            if delta and d_base is not None:
                d_weight = added(d_weight, d_base.t() @ x_adapter)
        if d_h_again is not None and needs_h:
            d_h = added(d_h, scaled(scaling, d_h_again) if h_is_scaled else d_h_again)
        if needs_a and d_h is not None:
            d_a = d_h.t() @ (x_adapter if dropped else x).to(lora_dtype)
        if needs_x:
            dx = d_rows(None if weight is None else d_frozen, None if dropped else d_h)
        if needs_x_adapter:
            dx_adapter = d_rows(d_base if delta else None, d_h)
    return dx, d_weight, d_a, d_b, d_m, d_bias, dx_adapter, d_frozen


def added(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    """The sum of what there is."""
    if left is None or right is None:
        return right if left is None else left
    return left + right
