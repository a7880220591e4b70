"""``dorac::dora_linear``: the adapted layer ``y = g * (x W^T + s (x lora_A^T) lora_B^T) + b``, ``g = m / n``, n given.

Registration. As ``dorac::compose``: a CompositeImplicitAutograd op whose body applies an ``autograd.Function`` over
leaf ops in eager and under the compiler, and the plain formula under ``torch.func``, forward-mode AD, export and for
tensor subclasses. The whole layer is one Function, because its cheapest form crosses the borders between its parts:

- the product that makes ``inner = x W^T + s h lora_B^T`` starts from the low-rank part and accumulates the large
  product onto it inside the GEMM (``low_rank_linear``): no pass over the activations of its own. The gradient of x is
  the same op on ``g * dy``;
- g is applied in aten under the compiler, which fuses it into the consumer of y, keeps ``inner`` alone for backward
  and recomputes y; in eager it is one kernel (``scale``);
- backward makes ``d_inner = g * dy`` and the magnitude's gradient in one pass (``scale_backward``), together with
  lora_B's gradient (``lora_b_backward``); d_inner serves base and low-rank branch both.

Dropout comes as a second activation, ``x_adapter = dropout(x)``, of which the op knows no more: masks are torch's.
With ``low_rank`` it is what the low-rank branch sees, ``h = x_adapter lora_A^T``, and nothing else changes. Without,
it is what the whole change sees that DoRA makes to the frozen layer (PEFT's meaning): ``y = x W^T + b + (g - 1)
x_adapter W^T + g s h lora_B^T``. That takes a second product with W in either direction. One kernel makes the change,
and the other product is accumulated onto it (``delta_linear``). In backward ``d_h = s dy (g lora_B)``, so that g * dy
is not written beside (g - 1) * dy.

The first form rounds to the activation's dtype three times (the low-rank product, inner, y) where the others round
inner for backward alone; the mean error of the layer stays at two thirds to nine tenths of stock PEFT's.

:func:`route` is the table of which form is taken where, from the benchmarks of layers and stacks at ranks 16 and 384
in ``dorac/bench/results``; ``python -m dorac.bench tune --kernels form stack-form`` prints the forms side by side.

Of DTensors each rank takes its shards through the same body (``ops/sharded.py``).

A layer of experts (every tensor with a leading E) is the formula in aten: batched products, and g per expert and row.

Legend: T tokens, I in_features, O out_features, R rank. x is [*, I], the leaves' [T, I].
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dorac.numerics import ZERO_ROW_NORM, accumulate_dtype
from dorac.ops import front, sharded
from dorac.ops.compose import (
    DECODE,
    buffer_of,
    compose_aten,
    compose_parts,
    finite_part,
    magnitude_scale,
    reshaped,
    takes_bias,
)
from dorac.ops.library import lib, register_composite, register_leaf

# Up to which rank the backward pass takes lora_B's gradient along, of which a program holds all columns.
LORA_B_RANK = 384


def linear_aten(x, weight, lora_A, lora_B, magnitude, weight_norm, scaling, bias, x_adapter=None, low_rank=False):
    """The formula in plain differentiable aten."""
    seen = x if x_adapter is None else x_adapter
    lora = F.linear(F.linear(seen.to(lora_A.dtype), lora_A), lora_B)
    g = magnitude_scale(magnitude, weight_norm)
    if x_adapter is not None and not low_rank:
        change = compose_aten(F.linear(x_adapter, weight), lora, g, scaling, None, True)
        return F.linear(x, weight, bias) + change
    holds_bias = takes_bias(x, bias) and not sharded.any_sharded(x, weight)
    base = F.linear(x, weight, finite_part(bias) if holds_bias else None)
    return compose_aten(base, lora, g, scaling, bias, False, holds_bias)


def _rows(x):
    """``[*, I] -> [T, I]``."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _per_expert(x):
    """``[E, *, I] -> [E, T, I]``."""
    return x.reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1])


def experts_aten(x, weight, lora_A, lora_B, magnitude, weight_norm, scaling, bias, x_adapter=None, low_rank=False):
    """The formula with a leading dimension of experts on every tensor."""
    rows = _per_expert(x)
    adapter_rows = rows if x_adapter is None else _per_expert(x_adapter)
    g = magnitude_scale(magnitude, weight_norm).unsqueeze(1)
    bias = None if bias is None else bias.unsqueeze(1)
    lora = adapter_rows.to(lora_A.dtype) @ lora_A.mT @ lora_B.mT
    base = rows @ weight.mT
    if x_adapter is None or low_rank:
        y = compose_aten(base, lora, g, scaling, bias, False)
    else:
        y = base if bias is None else base + bias
        y = y + compose_aten(adapter_rows @ weight.mT, lora, g, scaling, None, True)
    return y.reshape(*x.shape[:-1], weight.shape[1])


lib.define("low_rank_linear(Tensor x, Tensor weight, Tensor h, Tensor lora_B) -> Tensor")
lib.define("scale(Tensor inner, Tensor magnitude, Tensor weight_norm, Tensor? bias) -> Tensor")
lib.define("scale_backward(Tensor dy, Tensor inner, Tensor magnitude, Tensor weight_norm) -> (Tensor, Tensor)")
lib.define(
    "lora_b_backward(Tensor dy, Tensor inner, Tensor magnitude, Tensor weight_norm, Tensor h, Tensor scaling, "
    "bool h_is_scaled, bool delta) -> (Tensor, Tensor, Tensor)"
)
lib.define(
    "delta_linear(Tensor x, Tensor x_adapter, Tensor weight, Tensor h, Tensor lora_B, Tensor magnitude, "
    "Tensor weight_norm, Tensor scaling, Tensor? bias) -> (Tensor, Tensor)"
)
lib.define(
    "up_compose(Tensor base, Tensor h, Tensor lora_B, Tensor magnitude, Tensor weight_norm, Tensor scaling, "
    "Tensor? bias, bool delta, bool holds_bias=False) -> Tensor"
)
lib.define(
    "up_compose_forward(Tensor base, Tensor h, Tensor lora_B, Tensor magnitude, Tensor weight_norm, Tensor scaling, "
    "Tensor? bias, bool delta, bool holds_bias=False) -> (Tensor, Tensor)"
)


@torch.library.register_fake("dorac::low_rank_linear", lib=lib)
def _low_rank_linear_fake(x, weight, h, lora_B):
    return x.new_empty(x.shape[0], weight.shape[0])


@torch.library.register_fake("dorac::scale", lib=lib)
def _scale_fake(inner, magnitude, weight_norm, bias):
    return inner.new_empty(inner.shape)


@torch.library.register_fake("dorac::scale_backward", lib=lib)
def _scale_backward_fake(dy, inner, magnitude, weight_norm):
    return inner.new_empty(inner.shape), magnitude.new_empty(magnitude.shape)


@torch.library.register_fake("dorac::lora_b_backward", lib=lib)
def _lora_b_backward_fake(dy, inner, magnitude, weight_norm, h, scaling, h_is_scaled, delta):
    return (
        inner.new_empty(inner.shape),
        magnitude.new_empty(magnitude.shape),
        h.new_empty(inner.shape[1], h.shape[1]),
    )


@torch.library.register_fake("dorac::delta_linear", lib=lib)
def _delta_linear_fake(x, x_adapter, weight, h, lora_B, magnitude, weight_norm, scaling, bias):
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], weight.shape[0])


@torch.library.register_fake("dorac::up_compose", lib=lib)
def _up_compose_fake(base, h, lora_B, magnitude, weight_norm, scaling, bias, delta, holds_bias=False):
    return base.new_empty(base.shape)


@torch.library.register_fake("dorac::up_compose_forward", lib=lib)
def _up_compose_forward_fake(base, h, lora_B, magnitude, weight_norm, scaling, bias, delta, holds_bias=False):
    return base.new_empty(base.shape), base.new_empty(base.shape)


def _low_rank_linear(x, weight, h, lora_B):
    """``x W^T + h lora_B^T``. ``addmm_`` accumulates onto the small product in place, inside the large one's GEMM."""
    return torch.mm(h, lora_B.t()).addmm_(x, weight.t())


def _scale(inner, magnitude, weight_norm, bias, as_buffer=False):
    """``g * inner + b``, rounded once."""
    acc = accumulate_dtype(inner, magnitude, weight_norm)
    g = magnitude_scale(magnitude, weight_norm).to(acc)
    y = (buffer_of(g) if as_buffer else g) * inner.to(acc)
    return (y if bias is None else y + bias.to(acc)).to(inner.dtype)


def _scale_backward(dy, inner, magnitude, weight_norm):
    """``g * dy``, and the magnitude's gradient; none reaches it on zero rows, whose g is the constant 1."""
    acc = accumulate_dtype(dy, inner, magnitude, weight_norm)
    d_g = (dy.to(acc) * inner.to(acc)).sum(0)
    d_magnitude = torch.where(weight_norm <= ZERO_ROW_NORM, 0.0, magnitude_scale(d_g, weight_norm))
    return _scale(dy, magnitude, weight_norm, None), d_magnitude.to(magnitude.dtype)


def _scale_delta(dy, magnitude, weight_norm):
    """``(g - 1) * dy``, rounded once."""
    acc = accumulate_dtype(dy, magnitude, weight_norm)
    return ((magnitude_scale(magnitude, weight_norm).to(acc) - 1) * dy.to(acc)).to(dy.dtype)


def _lora_b_backward(dy, inner, magnitude, weight_norm, h, scaling, h_is_scaled, delta):
    """:func:`_scale_backward` with d_lora_B; with delta, d_base in place of d_inner."""
    d_inner, d_magnitude = _scale_backward(dy, inner, magnitude, weight_norm)
    d_b = d_inner.to(h.dtype).t() @ h
    d_base = _scale_delta(dy, magnitude, weight_norm) if delta else d_inner
    return d_base, d_magnitude, d_b if h_is_scaled else _scaled(scaling, d_b)


def _delta_linear(x, x_adapter, weight, h, lora_B, magnitude, weight_norm, scaling, bias):
    """y of PEFT's dropout, and ``inner = x_adapter W^T + s h lora_B^T`` for backward."""
    base = x_adapter @ weight.t()
    tensors = (base, h, lora_B, magnitude, weight_norm, scaling, bias, True)
    change, inner = _up_compose_forward(*tensors)
    return change + x @ weight.t(), inner


def _up_compose(base, h, lora_B, magnitude, weight_norm, scaling, bias, delta, holds_bias=False):
    g = magnitude_scale(magnitude, weight_norm)
    return compose_aten(base, F.linear(h, lora_B), g, scaling, bias, delta, holds_bias)


def _up_compose_forward(base, h, lora_B, magnitude, weight_norm, scaling, bias, delta, holds_bias=False):
    g = magnitude_scale(magnitude, weight_norm)
    tensors = (base, F.linear(h, lora_B), g, scaling, bias, delta, holds_bias)
    return compose_parts(*tensors, eager=False, needs_inner=True)


def _scale_cuda(inner, magnitude, weight_norm, bias):
    from dorac.kernels.compose import compose

    return compose(inner, None, None, magnitude, weight_norm, None, bias)[0]


def _scale_backward_cuda(dy, inner, magnitude, weight_norm):
    from dorac.kernels.backward import compose_backward

    d_inner, _, d_magnitude = compose_backward(dy, inner, magnitude, weight_norm)
    return d_inner, d_magnitude


def _lora_b_backward_cuda(dy, inner, magnitude, weight_norm, h, scaling, h_is_scaled, delta):
    from dorac.kernels.backward import lora_b_backward

    return lora_b_backward(dy, inner, magnitude, weight_norm, h, scaling, h_is_scaled=h_is_scaled, delta=delta)


def _delta_linear_cuda(x, x_adapter, weight, h, lora_B, magnitude, weight_norm, scaling, bias):
    from dorac.kernels.compose import compose

    base = x_adapter @ weight.t()
    tensors = (base, h, lora_B, magnitude, weight_norm, scaling, bias)
    change, inner = compose(*tensors, delta=True, want_inner=True, over_base=True)
    return change.addmm_(x, weight.t()), inner


def _up_compose_cuda(base, h, lora_B, magnitude, weight_norm, scaling, bias, delta, holds_bias=False):
    from dorac.kernels.compose import compose

    tensors = (base, h, lora_B, magnitude, weight_norm, scaling, bias)
    return compose(*tensors, delta=delta, holds_bias=holds_bias)[0]


def _up_compose_forward_cuda(base, h, lora_B, magnitude, weight_norm, scaling, bias, delta, holds_bias=False):
    from dorac.kernels.compose import compose

    tensors = (base, h, lora_B, magnitude, weight_norm, scaling, bias)
    return compose(*tensors, delta=delta, holds_bias=holds_bias, want_inner=True)


low_rank_linear, scale, scale_backward, lora_b_backward, up_compose, up_compose_forward = (
    register_leaf(name, in_aten, cuda, inline=cuda is not in_aten)
    for name, in_aten, cuda in (
        ("low_rank_linear", _low_rank_linear, _low_rank_linear),
        ("scale", _scale, _scale_cuda),
        ("scale_backward", _scale_backward, _scale_backward_cuda),
        ("lora_b_backward", _lora_b_backward, _lora_b_backward_cuda),
        ("up_compose", _up_compose, _up_compose_cuda),
        ("up_compose_forward", _up_compose_forward, _up_compose_forward_cuda),
    )
)


delta_linear = register_leaf("delta_linear", _delta_linear, _delta_linear_cuda)


def route(x: Tensor, lora_A: Tensor, *, training: bool, traced: bool, delta: bool = False) -> str:
    """Which form the layer takes.

    - "accumulate": the low-rank part first, the large product accumulated onto it, then g;
    - "fused": the large product first, then up-projection and g in one kernel;
    - "separate": three products and compose: where there are no kernels, or none for these dtypes, and at decode.

    With dropout in PEFT's meaning (``delta``), "fused" is ``delta_linear``, and nothing can be accumulated.

    In eager, and in a compiled layer by itself, "fused" is the cheapest, 1 to 7 percent below "accumulate" (ranks 8 to
    384, 256 and 4096 tokens). In a compiled stack the consumer of y applies g, and "accumulate" is (ranks 16 to 384);
    of few tokens launches are the price, of which "fused" has two less.
    """
    if not front.has_kernels(x, lora_A):
        return "separate"
    if delta or x.dtype is not lora_A.dtype:
        # Half-precision activations: the kernel keeps the precision of wider factors. It has no float32 activations.
        return "fused" if x.dtype.itemsize == 2 else "separate"
    if x.dtype is torch.float32:
        return "accumulate"  # without tensor cores the kernel's product is no match for cuBLAS
    tokens = math.prod(x.shape[:-1])
    few = front.at_most(tokens, 64)
    if traced and not few:
        return "accumulate"
    if traced and not training and front.at_most(tokens, DECODE):
        return "separate"
    return "fused"


def _scaled(scaling, product):
    """``s * product``. Beside a half-precision tensor torch rounds a 0-d one to half precision first."""
    acc = accumulate_dtype(product)
    return (scaling.to(acc) * product.to(acc)).to(product.dtype)


def _scaled_product(left, right, scaling, number, eager):
    """``s * (left @ right)``; where s is known as a number, it is the GEMM's alpha."""
    if number is None:
        return _scaled(scaling, left @ right)
    # With beta = 0 torch reads nothing of what is added, but the compiler's own product multiplies it by zero. A row of
    # the right factor costs no launch, and it is finite where the product is.
    rows = right.shape[0]
    if eager:
        unread = left.new_empty(())
    elif isinstance(rows, int) and rows:
        unread = right[0]
    else:
        unread = left.new_zeros(right.shape[1])
    return torch.addmm(unread, left, right, beta=0, alpha=number)


def forward(
    x, weight, lora_A, lora_B, magnitude, weight_norm, scaling, bias, x_adapter, number, path, eager, delta, needs_inner
):
    """``(y, inner, h)`` in the form ``path``: no inner where it is not needed and costs, ``s * h`` if accumulated."""
    seen = x if x_adapter is None else x_adapter  # by the low-rank branch
    if path == "separate":
        # With the bias, and of x in its own shape and strides: the bits of the frozen layer.
        holds_bias = not delta and takes_bias(x, bias)
        if delta and bias is not None:
            base = F.linear(x, weight, bias.to(x.dtype))  # as autocast casts the frozen layer's
        else:
            base = F.linear(x, weight, finite_part(bias) if holds_bias else None)
        g, rows = magnitude_scale(magnitude, weight_norm), _rows(seen)
        h = rows.to(lora_A.dtype) @ lora_A.t()
        if delta:
            tensors = (_rows(F.linear(seen, weight)), h @ lora_B.t(), g, scaling, None, True)
            change, inner = compose_parts(*tensors, eager=eager, needs_inner=needs_inner)
            return _rows(base) + change, inner, h
        tensors = (_rows(base), h @ lora_B.t(), g, scaling, bias, False, holds_bias)
        return *compose_parts(*tensors, eager=eager, needs_inner=needs_inner), h
    x, seen = _rows(x), _rows(seen)
    if path == "accumulate":
        h = _scaled_product(seen, lora_A.t(), scaling, number, eager)
        inner = low_rank_linear(x, weight, h, lora_B)
        times_g = scale if eager else functools.partial(_scale, as_buffer=True)
        return times_g(inner, magnitude, weight_norm, bias), inner, h
    h = seen.to(lora_A.dtype) @ lora_A.t()
    if delta:
        return *delta_linear(x, seen, weight, h, lora_B, magnitude, weight_norm, scaling, bias), h
    base = x @ weight.t()
    tensors = (base, h, lora_B, magnitude, weight_norm, scaling, bias, False)
    if needs_inner:
        return *up_compose_forward(*tensors), h
    return up_compose(*tensors), None, h


class _DoraLinear(torch.autograd.Function):
    """Returns (y, inner, h): as outputs, what backward saved keeps a second derivative connected.

    On the path "accumulate" h stands for ``s * h`` (``h_is_scaled``); d_h is always the gradient of the unscaled h.
    """

    @staticmethod
    def forward(
        ctx, x, weight, lora_A, lora_B, magnitude, weight_norm, scaling, bias, x_adapter, number, path, eager, delta
    ):
        needs_x, needs_weight, needs_a, needs_b, needs_m, *_, needs_x_adapter = ctx.needs_input_grad[:9]
        tensors = (x, weight, lora_A, lora_B, magnitude, weight_norm, scaling, bias, x_adapter)
        y, inner, h = forward(*tensors, number, path, eager, delta, needs_m)
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
        return dx, *others, None, None, d_bias, dx_adapter, None, None, None, None


def gradients(saved, needs, dtypes, grads, *, number, path, eager, dropped=False, delta=False, over=False):
    """The gradients of x (its rows), weight, lora_A, lora_B, magnitude, bias and x_adapter's rows, as ``needs`` says.

    Then that of the product ``x W^T``, for whoever did not make it here: see ``ops/over.py``, which has no weight.

    Args:
        saved: x, weight, lora_A, lora_B, magnitude, weight_norm, scaling, h, inner and x_adapter, each None where no
            gradient needs it.
        dtypes: of x, the factors and the bias.
        grads: of y, and of inner and h, given when a first derivative that used these is differentiated.
        dropped: whether there is an x_adapter. delta: whether the whole change sees it.
        over: whether the product's gradient is needed for its own sake.
    """
    x, weight, lora_A, lora_B, magnitude, weight_norm, scaling, h, inner, x_adapter = saved
    x, x_adapter = (None if t is None else _rows(t) for t in (x, x_adapter))
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
    times_g = scale if leaf_ops and eager else functools.partial(_scale, as_buffer=leaf_ops)
    # d_inner is g * dy; d_base is what the base product of what the change sees has, the same without delta.
    d_inner = d_base = d_h = dx = d_weight = d_a = d_b = d_m = d_bias = dx_adapter = None

    def d_rows(d_product, d_h):
        """The gradient of rows that went into a product with W, one with lora_A, or both."""
        if d_product is not None and d_h is not None and leaf_ops and x_dtype is lora_dtype:
            return low_rank_linear(d_product, weight.t(), d_h, lora_A.t())
        low = None if d_h is None else (d_h @ lora_A).to(x_dtype)
        return low if d_product is None else _sum(d_product @ weight, low)

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
                d_h = _scaled_product(dy, g_B, scaling, number, eager)
        elif dy is not None and needs_m:
            of_scale = scale_backward if leaf_ops else _scale_backward
            d_inner, d_m = of_scale(dy, inner, magnitude, weight_norm)
        elif dy is not None and needs_inner:
            d_inner = times_g(dy, magnitude, weight_norm, None)
        if delta and dy is not None and d_base is None:
            d_base = _scale_delta(dy, magnitude, weight_norm)
        d_lora = None
        if d_inner is not None and lora_dtype.itemsize > x_dtype.itemsize:
            # Not rounded to the activation's dtype on its way to wider factors.
            d_lora = _scale(dy.to(lora_dtype), magnitude, weight_norm, None)
        d_inner = _sum(d_inner, d_inner_again)
        if d_inner is not None:
            d_lora = d_inner.to(lora_dtype) if d_lora is None else _sum(d_lora, d_inner_again)
            if needs_b and d_b is None:
                d_b = d_lora.t() @ h if h_is_scaled else _scaled_product(d_lora.t(), h, scaling, number, eager)
            if d_h is None and needs_h:
                d_h = _scaled_product(d_lora, lora_B, scaling, number, eager)
        d_base = _sum(d_base, d_inner_again) if delta else d_inner
        d_frozen = dy if delta else d_inner  # of x W^T
        if needs_weight:
            d_weight = None if d_frozen is None else d_frozen.t() @ x
            if delta and d_base is not None:
                d_weight = _sum(d_weight, d_base.t() @ x_adapter)
        if d_h_again is not None and needs_h:
            d_h = _sum(d_h, _scaled(scaling, d_h_again) if h_is_scaled else d_h_again)
        if needs_a and d_h is not None:
            d_a = d_h.t() @ (x_adapter if dropped else x).to(lora_dtype)
        if needs_x:
            dx = d_rows(None if weight is None else d_frozen, None if dropped else d_h)
        if needs_x_adapter:
            dx_adapter = d_rows(d_base if delta else None, d_h)
    return dx, d_weight, d_a, d_b, d_m, d_bias, dx_adapter, d_frozen


def _sum(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    if left is None or right is None:
        return right if left is None else left
    return left + right


def _on_shards(x, weight, lora_A, lora_B, magnitude, weight_norm, scaling, bias, x_adapter, low_rank, number):
    """The layer of each rank's shards of DTensors; aten on the DTensors where that is not all a rank needs."""
    layout = sharded.linear_layout(x, weight)
    if layout is None:
        return linear_aten(x, weight, lora_A, lora_B, magnitude, weight_norm, scaling, bias, x_adapter, low_rank)
    added_once = None
    if bias is not None and any(p.is_partial() for p in layout.y):
        bias, added_once = None, bias  # to the sum of what the ranks compute
    of_lora_A, of_rows = sharded.layouts(weight)
    lora_B, magnitude, weight_norm, bias = (
        None if t is None else sharded.to_shard(t, of_rows, layout.d_rows)
        for t in (lora_B, magnitude, weight_norm, bias)
    )
    y = _dora_linear(
        sharded.to_shard(x, x.placements, layout.d_x),
        sharded.to_shard(weight, weight.placements, layout.d_weight),
        sharded.to_shard(lora_A, of_lora_A, layout.d_lora_A),
        lora_B,
        magnitude,
        weight_norm,
        sharded.whole(scaling),
        bias,
        number,
        None if x_adapter is None else sharded.to_shard(x_adapter, x.placements, layout.d_x),
        low_rank,
    )
    shape = torch.Size((*x.shape[:-1], weight.shape[0]))
    y = sharded.from_shard(y, weight.device_mesh, layout.y, shape)
    return y if added_once is None else y + added_once.to(y.dtype)


def _dora_linear(
    x,
    weight,
    lora_A,
    lora_B,
    magnitude,
    weight_norm,
    scaling,
    bias=None,
    number=None,
    x_adapter=None,
    low_rank=False,
):
    """``number``: the scaling again where it is known as one (not in a graph for every scaling)."""
    if sharded.any_sharded(x, weight, lora_A, lora_B, magnitude, weight_norm, bias):
        vectors = {"magnitude": magnitude, "weight_norm": weight_norm, "bias": bias}
        sharded.check_sharded(x=x, weight=weight, lora_A=lora_A, lora_B=lora_B, **vectors)
    if (dtype := front.autocast_dtype(x)) is not None:  # which leaves float64 alone
        x, weight, lora_A, lora_B, x_adapter = (
            t if t is None or t.dtype is torch.float64 else t.to(dtype) for t in (x, weight, lora_A, lora_B, x_adapter)
        )
    with front.autocast_off(x):
        tensors = (x, weight, lora_A, lora_B, magnitude, weight_norm, scaling, bias, x_adapter)
        if weight.ndim == 3:
            return experts_aten(*tensors, low_rank)
        on_shards = sharded.any_sharded(weight)
        in_aten = front.under_transform() or front.exporting() or scaling.requires_grad
        if in_aten or not (on_shards or front.all_plain(*tensors)):
            return linear_aten(*tensors, low_rank)
        if weight_norm.requires_grad and torch.is_grad_enabled():
            # g = m / n = (m * n0 / n) / n0 for the constant n0 = n: the gradient of m * n0 / n reaches n, too.
            constant = weight_norm.detach()
            wide = magnitude.to(accumulate_dtype(magnitude, weight_norm))
            magnitude, weight_norm = wide * magnitude_scale(constant, weight_norm), constant
            tensors = (x, weight, lora_A, lora_B, magnitude, weight_norm, scaling, bias, x_adapter)
        if on_shards:
            return _on_shards(*tensors, low_rank, number)
        eager = front.all_eager(*tensors)
        training = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
        delta = x_adapter is not None and not low_rank
        path = route(x, lora_A, training=training, traced=not eager, delta=delta)
        arguments = (*tensors, number, path, eager, delta)
        y = _DoraLinear.apply(*arguments)[0] if training else forward(*arguments, False)[0]
        return reshaped(y, (*x.shape[:-1], weight.shape[0]))


dora_linear = register_composite(
    "dora_linear(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor magnitude, Tensor weight_norm, "
    "Tensor scaling, Tensor? bias=None, float? number=None, Tensor? x_adapter=None, bool low_rank=False) -> Tensor",
    _dora_linear,
)
