"""The leaf ops of the linear layer, of rows ``[T, I]``: kernels where there are some, else aten.

``ops/linear.py`` says what they are for. Their bodies in aten also serve where a leaf cannot be differentiated again.

Legend: T tokens, I in_features, O out_features, R rank.
"""

import torch
import torch.nn.functional as F

from dorac.numerics import ZERO_ROW_NORM, accumulate_dtype
from dorac.ops.compose import compose_aten, compose_parts, magnitude_scale
from dorac.ops.horizontal import mag_scale
from dorac.ops.library import lib, register_leaf

# Up to which rank the backward pass takes lora_B's gradient along, of which a program holds all columns.
LORA_B_RANK = 384

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


def scaled(scaling, product):
    """``s * product``. Beside a half-precision tensor torch rounds a 0-d one to half precision first."""
    acc = accumulate_dtype(product)
    return (scaling.to(acc) * product.to(acc)).to(product.dtype)


def _low_rank_linear(x, weight, h, lora_B):
    """``x W^T + h lora_B^T``. ``addmm_`` accumulates onto the small product in place, inside the large one's GEMM."""
    return torch.mm(h, lora_B.t()).addmm_(x, weight.t())


def scale_aten(inner, magnitude, weight_norm, bias, as_buffer=False):
    """``g * inner + b``, rounded once."""
    acc = accumulate_dtype(inner, magnitude, weight_norm)
    y = (mag_scale if as_buffer else magnitude_scale)(magnitude, weight_norm).to(acc) * inner.to(acc)
    return (y if bias is None else y + bias.to(acc)).to(inner.dtype)


def scale_backward_aten(dy, inner, magnitude, weight_norm):
    """``g * dy``, and the magnitude's gradient; none reaches it on zero rows, whose g is the constant 1."""
    acc = accumulate_dtype(dy, inner, magnitude, weight_norm)
    d_g = (dy.to(acc) * inner.to(acc)).sum(0)
    d_magnitude = torch.where(weight_norm <= ZERO_ROW_NORM, 0.0, magnitude_scale(d_g, weight_norm))
    return scale_aten(dy, magnitude, weight_norm, None), d_magnitude.to(magnitude.dtype)


def scale_delta(dy, magnitude, weight_norm):
    """``(g - 1) * dy``, rounded once."""
    acc = accumulate_dtype(dy, magnitude, weight_norm)
    return ((magnitude_scale(magnitude, weight_norm).to(acc) - 1) * dy.to(acc)).to(dy.dtype)


def _lora_b_backward(dy, inner, magnitude, weight_norm, h, scaling, h_is_scaled, delta):
    """:func:`scale_backward_aten` with d_lora_B; with delta, d_base in place of d_inner."""
    d_inner, d_magnitude = scale_backward_aten(dy, inner, magnitude, weight_norm)
    d_b = d_inner.to(h.dtype).t() @ h
    d_base = scale_delta(dy, magnitude, weight_norm) if delta else d_inner
    return d_base, d_magnitude, d_b if h_is_scaled else scaled(scaling, d_b)


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
    from dorac.kernels.lora_b import lora_b_backward

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
        ("scale", scale_aten, _scale_cuda),
        ("scale_backward", scale_backward_aten, _scale_backward_cuda),
        ("lora_b_backward", _lora_b_backward, _lora_b_backward_cuda),
        ("up_compose", _up_compose, _up_compose_cuda),
        ("up_compose_forward", _up_compose_forward, _up_compose_forward_cuda),
    )
)


delta_linear = register_leaf("delta_linear", _delta_linear, _delta_linear_cuda)
