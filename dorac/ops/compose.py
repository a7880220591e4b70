"""``dorac::compose``: ``y = g * (base + s * lora) + b``, or PEFT's delta form ``(g - 1) * base + g * s * lora``.

Registration. ``compose`` is a CompositeImplicitAutograd op, so that Dynamo shows it as one node while every transform
sees what is inside. Its body applies an ``autograd.Function`` that saves ``inner = base + s * lora`` once, in the
activation's dtype, and nothing else of that size: in eager over the leaf ops ``compose_value`` / ``compose_forward`` /
``compose_backward``, under the compiler over plain aten, which Inductor fuses with its neighbours. Under
``torch.func``, forward-mode AD, export and for tensor subclasses it is the plain formula. A ``register_autograd`` op
instead would drop forward-mode tangents without an error and raise under ``torch.func.grad``; an Autograd-key kernel
would not vmap.

The leaves are Triton kernels on the GPUs that have them; on the CPU they bound the float32 temporaries of
half-precision activations to one block of rows.

Where the outputs are not the last dimension but channels, the memory format of the activations decides. Channels-last
ones are rows of outputs: the same view, the same kernels. Others are computed as they are, [N, O, *], in aten.

``holds_bias`` says that base has the bias b in it already, as the frozen layer's own product adds it; then
``y = g * (base + s * lora) + (1 - g) * b``. Where g = 1 and lora = 0 that is base, bit for bit, which a bias added to
the finished product is not. What is saved is inner without b. Only the finite part of b is handled so.

Legend: T tokens, O out_features, N samples. Activations are [T, O] here, those of channels [N, O, *] (the outputs are
dimension 1 either way, g and bias [O]); the functional layer accepts any leading shape.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dorac.numerics import ZERO_ROW_NORM, accumulate_dtype
from dorac.ops import front
from dorac.ops.library import lib, register_composite, register_leaf

# Up to how many tokens a launch costs more than it saves: at 1 to 8 tokens compiled inference leaves the whole layer to
# the compiler, which fuses its elementwise end into the next layer's beginning.
DECODE = 16
BLOCK_ELEMENTS = 2**18  # elements per row block of the CPU loops: the fp32 temporaries stay in cache


def _along_outputs(vector_O, activation):
    """The vector, to be broadcast over every dimension of an activation but its outputs, dimension 1."""
    return vector_O if vector_O is None or activation.ndim == 2 else vector_O.view(-1, *[1] * (activation.ndim - 2))


def _sum_outputs(activation, dtype):
    """The sum over every dimension but that of the outputs, [O]."""
    return activation.sum([d for d in range(activation.ndim) if d != 1], dtype=dtype)


def _inner(base_TO, lora_TO, scaling, acc):
    return base_TO.to(acc) + scaling.to(acc) * lora_TO.to(acc)


def takes_bias(activation: Tensor, bias: Tensor | None) -> bool:
    """Whether the base product is to add the bias: single and double precision, but not on CUDA, where g is a kernel's.

    In half precision it would be rounded with the product, and again with y.
    """
    wide = bias is not None and bias.dtype is activation.dtype and bias.dtype.itemsize >= 4
    return wide and not activation.is_cuda


def finite_part(bias: Tensor) -> Tensor:
    """What base holds of the bias, a constant: ``(1 - g) * b`` is NaN for the infinite rest."""
    bias = bias.detach()
    return torch.where(bias.isfinite(), bias, 0.0)


def _output(base_TO, lora_TO, inner_TO, g_O, scaling, bias_O, delta, holds_bias, acc):
    """The result in the accumulate dtype, before its one rounding."""
    g_O = g_O.to(acc)
    if delta:
        change_TO = (g_O - 1) * base_TO.to(acc) + (g_O * scaling.to(acc)) * lora_TO.to(acc)
        return change_TO if bias_O is None else change_TO + bias_O.to(acc)
    y_TO = g_O * inner_TO
    if lora_TO.dtype.itemsize > base_TO.dtype.itemsize:
        # Under wider adapters (bfloat16 under float32, PEFT's default) the bits of stock PEFT, which adds up in this
        # order. From 1/2 to 2 g - 1 is exact; further off the order loses digits.
        base_TO = base_TO.to(acc)
        change_TO = (g_O - 1) * base_TO + g_O * lora_TO.to(acc) * scaling.to(acc)
        # An infinite base would meet itself with the other sign.
        y_TO = torch.where((g_O >= 0.5) & (g_O <= 2) & (base_TO.abs() < math.inf), base_TO + change_TO, y_TO)
    if bias_O is None:
        return y_TO
    bias_O = bias_O.to(acc)
    if holds_bias:
        held_O = finite_part(bias_O)
        bias_O = (1 - g_O) * held_O + (bias_O - held_O)
    return y_TO + bias_O


def _grads(dy_TO, g_O, scaling, delta, acc):
    """The gradients of base and lora in the accumulate dtype."""
    g_O, dy_TO = g_O.to(acc), dy_TO.to(acc)
    return (g_O - 1 if delta else g_O) * dy_TO, (g_O * scaling.to(acc)) * dy_TO


def magnitude_scale(magnitude: Tensor, weight_norm: Tensor) -> Tensor:
    """``g = m / n``, and 1 where ``n <= 1e-12``, in plain differentiable aten."""
    acc = accumulate_dtype(magnitude, weight_norm)
    norm = weight_norm.to(acc)
    zero_row = norm <= ZERO_ROW_NORM
    return torch.where(zero_row, 1.0, magnitude.to(acc) / torch.where(zero_row, 1.0, norm))


def buffer_of(mag_scale: Tensor) -> Tensor:
    """g as Inductor's kernels read it, not as they compute it.

    Inlined into what uses y, the division by the norm runs for every element of y, and on an H100 it can take longer
    than the traffic of the fused kernel. A view by strides has to be one of a buffer, so that g gets one.
    """
    return mag_scale.as_strided(mag_scale.shape, mag_scale.stride())


def _without(inner_TO, bias_O, holds_bias):
    """inner as it is saved: what g multiplies. Where base holds the bias, the bias is taken off."""
    return inner_TO - finite_part(bias_O.to(inner_TO.dtype)) if holds_bias else inner_TO


def compose_aten(base, lora, mag_scale, scaling, bias, delta, holds_bias=False):
    """The formula in plain differentiable aten."""
    acc = accumulate_dtype(base, lora, mag_scale)
    inner_TO = None if delta else _inner(base, lora, scaling, acc)
    return _output(base, lora, inner_TO, mag_scale, scaling, bias, delta, holds_bias, acc).to(base.dtype)


def _blocks(activation_TO: Tensor) -> list[slice]:
    """Row blocks for the loops below: small on the CPU, one block elsewhere (a launch costs more than it saves)."""
    tokens, *row = activation_TO.shape
    rows = BLOCK_ELEMENTS // max(1, math.prod(row)) if activation_TO.device.type == "cpu" else tokens
    return [slice(i, i + max(1, rows)) for i in range(0, tokens, max(1, rows))]


lib.define(
    "compose_value(Tensor base, Tensor lora, Tensor mag_scale, Tensor scaling, Tensor? bias, bool delta, "
    "bool holds_bias) -> Tensor"
)
lib.define(
    "compose_forward(Tensor base, Tensor lora, Tensor mag_scale, Tensor scaling, Tensor? bias, bool delta, "
    "bool holds_bias) -> (Tensor, Tensor)"
)
lib.define(
    "compose_backward(Tensor dy, Tensor inner, Tensor mag_scale, Tensor scaling, ScalarType lora_dtype, bool delta) "
    "-> (Tensor, Tensor, Tensor)"
)


@torch.library.register_fake("dorac::compose_value", lib=lib)
def _compose_value_fake(base, lora, mag_scale, scaling, bias, delta, holds_bias):
    return base.new_empty(base.shape)


@torch.library.register_fake("dorac::compose_forward", lib=lib)
def _compose_forward_fake(base, lora, mag_scale, scaling, bias, delta, holds_bias):
    return base.new_empty(base.shape), base.new_empty(base.shape)


@torch.library.register_fake("dorac::compose_backward", lib=lib)
def _compose_backward_fake(dy, inner, mag_scale, scaling, lora_dtype, delta):
    return (
        inner.new_empty(inner.shape),
        inner.new_empty(inner.shape, dtype=lora_dtype),
        mag_scale.new_empty(mag_scale.shape),
    )


def _compose_value(base, lora, mag_scale, scaling, bias, delta, holds_bias):
    y = base.new_empty(base.shape)
    mag_scale, bias = _along_outputs(mag_scale, base), _along_outputs(bias, base)
    for rows in _blocks(base):
        y[rows] = compose_aten(base[rows], lora[rows], mag_scale, scaling, bias, delta, holds_bias)
    return y


def _compose_forward(base, lora, mag_scale, scaling, bias, delta, holds_bias):
    acc = accumulate_dtype(base, lora, mag_scale)
    y, inner = base.new_empty(base.shape), base.new_empty(base.shape)
    mag_scale, bias = _along_outputs(mag_scale, base), _along_outputs(bias, base)
    for rows in _blocks(base):
        inner_TO = _inner(base[rows], lora[rows], scaling, acc)
        inner[rows] = _without(inner_TO, bias, holds_bias)
        y[rows] = _output(base[rows], lora[rows], inner_TO, mag_scale, scaling, bias, delta, holds_bias, acc)
    return y, inner


def _compose_backward(dy, inner, mag_scale, scaling, lora_dtype, delta):
    acc = accumulate_dtype(dy, inner, mag_scale)
    d_base, d_lora = inner.new_empty(inner.shape), inner.new_empty(inner.shape, dtype=lora_dtype)
    d_mag = mag_scale.new_zeros(mag_scale.shape, dtype=acc)
    along = _along_outputs(mag_scale, inner)
    for rows in _blocks(inner):
        d_base[rows], d_lora[rows] = _grads(dy[rows], along, scaling, delta, acc)
        d_mag += _sum_outputs(dy[rows].to(acc) * inner[rows].to(acc), acc)
    return d_base, d_lora, d_mag.to(mag_scale.dtype)


def _rows_alone(cuda, in_aten):
    """The kernel for rows of outputs, aten for channels."""
    return lambda activation, *args: (cuda if activation.ndim == 2 else in_aten)(activation, *args)


def _compose_value_cuda(base, lora, mag_scale, scaling, bias, delta, holds_bias):
    from dorac.kernels.compose import compose

    return compose(base, lora, None, mag_scale, None, scaling, bias, delta=delta, holds_bias=holds_bias)[0]


def _compose_forward_cuda(base, lora, mag_scale, scaling, bias, delta, holds_bias):
    from dorac.kernels.compose import compose

    tensors = (base, lora, None, mag_scale, None, scaling, bias)
    return compose(*tensors, delta=delta, holds_bias=holds_bias, want_inner=True)


def _compose_backward_cuda(dy, inner, mag_scale, scaling, lora_dtype, delta):
    from dorac.kernels.backward import compose_backward

    return compose_backward(dy, inner, mag_scale, None, scaling, delta=delta, lora_dtype=lora_dtype)


compose_value, compose_forward, compose_backward = (
    register_leaf(name, in_aten, _rows_alone(cuda, in_aten))
    for name, in_aten, cuda in (
        ("compose_value", _compose_value, _compose_value_cuda),
        ("compose_forward", _compose_forward, _compose_forward_cuda),
        ("compose_backward", _compose_backward, _compose_backward_cuda),
    )
)


def compose_parts(base, lora, mag_scale, scaling, bias, delta, holds_bias=False, *, eager, needs_inner):
    """``(y, inner)``, the second None unless needed: over the leaves in eager, in aten under the compiler."""
    if eager:
        if needs_inner:
            return compose_forward(base, lora, mag_scale, scaling, bias, delta, holds_bias)
        return compose_value(base, lora, mag_scale, scaling, bias, delta, holds_bias), None
    if base.is_cuda and not front.at_most(base.numel(), DECODE * mag_scale.numel()):
        mag_scale = buffer_of(mag_scale)
    mag_scale, bias = _along_outputs(mag_scale, base), _along_outputs(bias, base)
    if not needs_inner:
        return compose_aten(base, lora, mag_scale, scaling, bias, delta, holds_bias), None
    acc = accumulate_dtype(base, lora, mag_scale)
    inner_TO = _inner(base, lora, scaling, acc)
    y = _output(base, lora, inner_TO, mag_scale, scaling, bias, delta, holds_bias, acc).to(base.dtype)
    return y, _without(inner_TO, bias, holds_bias).to(base.dtype)


class _Compose(torch.autograd.Function):
    """Returns (y, inner): with inner an output, a second derivative stays connected through what backward saved."""

    @staticmethod
    def forward(ctx, base, lora, mag_scale, scaling, bias, delta, holds_bias, eager):
        arguments = (base, lora, mag_scale, scaling, bias, delta, holds_bias)
        y, inner = compose_parts(*arguments, eager=eager, needs_inner=ctx.needs_input_grad[2])
        ctx.save_for_backward(inner, mag_scale, scaling)
        ctx.set_materialize_grads(False)
        ctx.dtypes = base.dtype, lora.dtype, mag_scale.dtype, None if bias is None else bias.dtype
        ctx.delta, ctx.eager = delta, eager
        return y, inner

    @staticmethod
    def backward(ctx, dy, d_inner):
        inner, mag_scale, scaling = ctx.saved_tensors
        base_dtype, lora_dtype, mag_dtype, bias_dtype = ctx.dtypes
        needs_mag, needs_bias = ctx.needs_input_grad[2], ctx.needs_input_grad[4]
        acc = torch.float64 if torch.float64 in ctx.dtypes else torch.float32
        d_base = d_lora = d_mag = d_bias = None
        if dy is not None:
            if ctx.eager and needs_mag and not torch.is_grad_enabled():
                d_base, d_lora, d_mag = compose_backward(dy, inner, mag_scale, scaling, lora_dtype, ctx.delta)
            else:  # traced, or differentiated again
                d_base, d_lora = _grads(dy, _along_outputs(mag_scale, dy), scaling, ctx.delta, acc)
                d_base, d_lora = d_base.to(base_dtype), d_lora.to(lora_dtype)
                if needs_mag:
                    d_mag = _sum_outputs(dy.to(acc) * inner.to(acc), acc).to(mag_dtype)
            if needs_bias:
                d_bias = _sum_outputs(dy, acc).to(bias_dtype)
        if d_inner is not None:  # the second derivative reaches inner through d_mag
            d_base = d_inner if d_base is None else d_base + d_inner
            scaled = (scaling.to(acc) * d_inner.to(acc)).to(lora_dtype)
            d_lora = scaled if d_lora is None else d_lora + scaled
        return d_base, d_lora, d_mag, None, d_bias, None, None, None


def reshaped(y: Tensor, shape: Sequence[int]) -> Tensor:
    """A tensor that nothing else refers to, in another shape; in eager not a view.

    A consumer's write in place to a view would make FSDP2 lose the hook that it puts on a layer's output.
    """
    return torch.ops.aten._unsafe_view(y, shape) if front.all_eager(y) else y.view(shape)


def _channels_last(activation: Tensor, dim: int) -> bool:
    """Whether the activation lies in memory as rows of the outputs ``dim``, as torch allocates channels-last."""
    rows = activation.movedim(dim, -1)
    return rows.stride(-1) == 1 and rows.stride(-2) == rows.shape[-1] and rows.is_contiguous()


def _compose(base, lora, mag_scale, scaling, bias=None, delta=False, dim=-1, holds_bias=False):
    tensors = (base, lora, mag_scale, scaling, bias)
    dim %= base.ndim
    trailing = base.ndim - 1 - dim
    if front.under_transform() or front.exporting() or not front.all_plain(*tensors) or scaling.requires_grad:
        if trailing:
            mag_scale, bias = (t if t is None else t.reshape(-1, *[1] * trailing) for t in (mag_scale, bias))
        return compose_aten(base, lora, mag_scale, scaling, bias, delta, holds_bias)
    eager = front.all_eager(*tensors)
    if trailing and eager and _channels_last(base, dim):
        base, lora = base.movedim(dim, -1), lora.movedim(dim, -1)
        return _compose(base, lora, mag_scale, scaling, bias, delta, holds_bias=holds_bias).movedim(-1, dim)
    shape = base.shape
    if not trailing or dim != 1:
        base, lora = (t.reshape(math.prod(shape[:dim]), *shape[dim:]) for t in (base, lora))
    if trailing and base.is_cuda:  # the kernels take rows of outputs
        eager = False
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        y = _Compose.apply(base, lora, mag_scale, scaling, bias, delta, holds_bias, eager)[0]
    else:
        arguments = (base, lora, mag_scale, scaling, bias, delta, holds_bias)
        y = compose_parts(*arguments, eager=eager, needs_inner=False)[0]
    return reshaped(y, shape)


compose = register_composite(
    "compose(Tensor base, Tensor lora, Tensor mag_scale, Tensor scaling, Tensor? bias=None, bool delta=False, "
    "int dim=-1, bool holds_bias=False) -> Tensor",
    _compose,
)
