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

Legend: T tokens, O out_features. Activations are [T, O] here; the functional layer accepts any leading shape.
"""

import math

import torch
from torch import Tensor

from dorac.numerics import ZERO_ROW_NORM, accumulate_dtype
from dorac.ops import front
from dorac.ops.library import REVISION, lib, register_composite, register_leaf

BLOCK_ELEMENTS = 2**18  # elements per row block of the CPU loops: the fp32 temporaries stay in cache


def _inner(base_TO, lora_TO, scaling, acc):
    return base_TO.to(acc) + scaling.to(acc) * lora_TO.to(acc)


def _output(base_TO, lora_TO, inner_TO, g_O, scaling, bias_O, delta, acc):
    """The result in the accumulate dtype, before its one rounding."""
    g_O = g_O.to(acc)
    if delta:
        return (g_O - 1) * base_TO.to(acc) + (g_O * scaling.to(acc)) * lora_TO.to(acc)
    y_TO = g_O * inner_TO
    return y_TO if bias_O is None else y_TO + bias_O.to(acc)


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


def compose_aten(base, lora, mag_scale, scaling, bias, delta):
    """The formula in plain differentiable aten."""
    acc = accumulate_dtype(base, lora, mag_scale)
    inner_TO = None if delta else _inner(base, lora, scaling, acc)
    return _output(base, lora, inner_TO, mag_scale, scaling, bias, delta, acc).to(base.dtype)


def _blocks(activation_TO: Tensor) -> list[slice]:
    """Row blocks for the loops below: small on the CPU, one block elsewhere (a launch costs more than it saves)."""
    tokens, out_features = activation_TO.shape
    rows = BLOCK_ELEMENTS // max(1, out_features) if activation_TO.device.type == "cpu" else tokens
    return [slice(i, i + max(1, rows)) for i in range(0, tokens, max(1, rows))]


lib.define(
    "compose_value(Tensor base, Tensor lora, Tensor mag_scale, Tensor scaling, Tensor? bias, bool delta) -> Tensor"
)
lib.define(
    "compose_forward(Tensor base, Tensor lora, Tensor mag_scale, Tensor scaling, Tensor? bias, bool delta) "
    "-> (Tensor, Tensor)"
)
lib.define(
    "compose_backward(Tensor dy, Tensor inner, Tensor mag_scale, Tensor scaling, ScalarType lora_dtype, bool delta) "
    "-> (Tensor, Tensor, Tensor)"
)


@torch.library.register_fake("dorac::compose_value", lib=lib)
def _compose_value_fake(base, lora, mag_scale, scaling, bias, delta):
    return base.new_empty(base.shape)


@torch.library.register_fake("dorac::compose_forward", lib=lib)
def _compose_forward_fake(base, lora, mag_scale, scaling, bias, delta):
    return base.new_empty(base.shape), base.new_empty(base.shape)


@torch.library.register_fake("dorac::compose_backward", lib=lib)
def _compose_backward_fake(dy, inner, mag_scale, scaling, lora_dtype, delta):
    return (
        inner.new_empty(inner.shape),
        inner.new_empty(inner.shape, dtype=lora_dtype),
        mag_scale.new_empty(mag_scale.shape),
    )


def _compose_value(base, lora, mag_scale, scaling, bias, delta):
    y = base.new_empty(base.shape)
    for rows in _blocks(base):
        y[rows] = compose_aten(base[rows], lora[rows], mag_scale, scaling, bias, delta)
    return y


def _compose_forward(base, lora, mag_scale, scaling, bias, delta):
    acc = accumulate_dtype(base, lora, mag_scale)
    y, inner = base.new_empty(base.shape), base.new_empty(base.shape)
    for rows in _blocks(base):
        inner_TO = _inner(base[rows], lora[rows], scaling, acc)
        inner[rows] = inner_TO
        y[rows] = _output(base[rows], lora[rows], inner_TO, mag_scale, scaling, bias, delta, acc)
    return y, inner


def _compose_backward(dy, inner, mag_scale, scaling, lora_dtype, delta):
    acc = accumulate_dtype(dy, inner, mag_scale)
    d_base, d_lora = inner.new_empty(inner.shape), inner.new_empty(inner.shape, dtype=lora_dtype)
    d_mag = mag_scale.new_zeros(mag_scale.shape, dtype=acc)
    for rows in _blocks(inner):
        d_base[rows], d_lora[rows] = _grads(dy[rows], mag_scale, scaling, delta, acc)
        d_mag += (dy[rows].to(acc) * inner[rows].to(acc)).sum(0)
    return d_base, d_lora, d_mag.to(mag_scale.dtype)


def _compose_value_cuda(base, lora, mag_scale, scaling, bias, delta):
    from dorac.kernels.compose import compose

    return compose(base, lora, None, mag_scale, None, scaling, bias, delta=delta)[0]


def _compose_forward_cuda(base, lora, mag_scale, scaling, bias, delta):
    from dorac.kernels.compose import compose

    return compose(base, lora, None, mag_scale, None, scaling, bias, delta=delta, want_inner=True)


def _compose_backward_cuda(dy, inner, mag_scale, scaling, lora_dtype, delta):
    from dorac.kernels.backward import compose_backward

    return compose_backward(dy, inner, mag_scale, None, scaling, delta=delta, lora_dtype=lora_dtype)


for _name, _aten, _cuda in (
    ("compose_value", _compose_value, _compose_value_cuda),
    ("compose_forward", _compose_forward, _compose_forward_cuda),
    ("compose_backward", _compose_backward, _compose_backward_cuda),
):
    register_leaf(_name, _aten, _cuda)


def compose_parts(base, lora, mag_scale, scaling, bias, delta, *, eager, needs_inner):
    """``(y, inner)``, the second None unless needed: over the leaves in eager, in aten under the compiler."""
    if not needs_inner:
        compute = torch.ops.dorac.compose_value if eager else compose_aten
        return compute(base, lora, mag_scale, scaling, bias, delta), None
    if eager:
        return torch.ops.dorac.compose_forward(base, lora, mag_scale, scaling, bias, delta)
    acc = accumulate_dtype(base, lora, mag_scale)
    inner_TO = _inner(base, lora, scaling, acc)
    y = _output(base, lora, inner_TO, mag_scale, scaling, bias, delta, acc).to(base.dtype)
    return y, inner_TO.to(base.dtype)


class _Compose(torch.autograd.Function):
    """Returns (y, inner): with inner an output, a second derivative stays connected through what backward saved."""

    @staticmethod
    def forward(ctx, base, lora, mag_scale, scaling, bias, delta, eager):
        y, inner = compose_parts(
            base, lora, mag_scale, scaling, bias, delta, eager=eager, needs_inner=ctx.needs_input_grad[2]
        )
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
                d_base, d_lora, d_mag = torch.ops.dorac.compose_backward(
                    dy, inner, mag_scale, scaling, lora_dtype, ctx.delta
                )
            else:  # traced, or differentiated again
                d_base, d_lora = _grads(dy, mag_scale, scaling, ctx.delta, acc)
                d_base, d_lora = d_base.to(base_dtype), d_lora.to(lora_dtype)
                if needs_mag:
                    d_mag = (dy.to(acc) * inner.to(acc)).sum(0).to(mag_dtype)
            if needs_bias:
                d_bias = dy.sum(0, dtype=acc).to(bias_dtype)
        if d_inner is not None:  # the second derivative reaches inner through d_mag
            d_base = d_inner if d_base is None else d_base + d_inner
            scaled = (scaling.to(acc) * d_inner.to(acc)).to(lora_dtype)
            d_lora = scaled if d_lora is None else d_lora + scaled
        return d_base, d_lora, d_mag, None, d_bias, None, None


def _compose(base, lora, mag_scale, scaling, bias=None, delta=False, revision=REVISION):
    tensors = (base, lora, mag_scale, scaling, bias)
    if front.under_transform() or front.exporting() or not front.all_plain(*tensors) or scaling.requires_grad:
        return compose_aten(*tensors, delta)
    eager = front.all_eager(*tensors)
    shape = base.shape
    base, lora = (t.reshape(math.prod(shape[:-1]), shape[-1]) for t in (base, lora))
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        y = _Compose.apply(base, lora, mag_scale, scaling, bias, delta, eager)[0]
    else:
        y = (torch.ops.dorac.compose_value if eager else compose_aten)(base, lora, mag_scale, scaling, bias, delta)
    return y.view(shape)


register_composite(
    "compose(Tensor base, Tensor lora, Tensor mag_scale, Tensor scaling, Tensor? bias=None, bool delta=False, "
    f"int revision={REVISION}) -> Tensor",
    _compose,
)
