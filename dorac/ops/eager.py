"""The linear layer in eager on a GPU with kernels: one ``autograd.Function`` that launches, and no op of dorac's own.

``functional.dora_linear`` asks here first. Where tensors are plain, activations and factors (under autocast what it
makes of them) half precision, adapters trained whole or not at all, and nobody looks on, the layer is computed here, in
the form "fused" of ``ops/linear.py``, which has the formulas; anything else goes there.

Where a mode over ops is active in training, the same Function goes through the ops, and saves the same tensors: such a
mode may be over a checkpoint's forward alone, or over its recomputation.

- What the tensors' metadata settle is settled once for each combination, in a :class:`Plan`: the checks, the launches.
  A plan holds no tensors.
- ``x W^T`` turns into ``inner = x W^T + s h lora_B^T`` where it lies, which is kept for backward.
- With ``save_output`` and no bias, which might cancel, y is kept in its place, at no cost where the layer's consumer
  keeps it: ``d_m = colsum(dy * y) / m``; the kernel handles rows whose m is too small for that. Autograd refuses a
  tensor that was kept and then written to in place, as ``relu(y, inplace=True)`` does, which is fine after a linear
  layer. So y is kept through an alias with a version of its own, and a probe without memory tells whether y's has
  changed; inner is then computed again. Nothing tells of a kernel's write behind autograd's back: the caller has to.
- With dropout, x itself is kept, which several layers may share, and the mask at one bit an element: backward makes x'
  of these again. In PEFT's meaning ``x' W^T`` turns into inner where it lies, and ``x W^T`` is accumulated onto the
  change in y. The gradient of x is that of x', dropped where it lies, onto which the undropped part is accumulated.

Legend: T tokens, I in_features, O out_features, R rank.
"""

import dataclasses
import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dorac import checks
from dorac.ops import front, linear_function
from dorac.ops.eager_plan import make_plan, metadata
from dorac.ops.eager_seen import seen_gradients, unchanged
from dorac.ops.norm import norm_factored

PLANS = 4096  # kept; beyond, all are dropped
plans: dict[tuple, object] = {}  # by all that they depend on; None where tensors are not computed here


def dora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    bias: Tensor | None,
    weight_norm: Tensor | None,
    scaling: float,
    dropout_p: float = 0.0,
    dropout_on: str = "adapter",
    save_output: bool = False,
    apply: Callable | None = None,
    together: bool = False,
) -> Tensor | None:
    """The layer for a finite ``scaling``, or None if it is not to be computed here; errors are ``check_linear``'s.

    Args:
        apply: of whoever trains the adapter under other names (``eager_parts.py``), in the place of ``Linear.apply``.
        together: whether that sums the gradients of lora_B and the magnitude, which backward leaves in ``ctx.summed``.
    """
    in_ops = not front.unobserved()
    if in_ops and not front.seen_by_modes_alone():
        return None
    try:
        training = torch.is_grad_enabled() and (
            apply is not None
            or lora_B.requires_grad
            or magnitude.requires_grad
            or lora_A.requires_grad
            or x.requires_grad
            or weight.requires_grad
            or (bias is not None and bias.requires_grad)
            or (weight_norm is not None and weight_norm.requires_grad)
        )
        dropped = dropout_on if dropout_p else None
        key = training, dropped, save_output, *metadata(x, weight, lora_A, lora_B, magnitude, bias, weight_norm)
        if together:
            key = "together", *key
        plan = plans.get(key, False)
        bits = weight.data_ptr() | lora_A.data_ptr() | lora_B.data_ptr() | magnitude.data_ptr()
        if bias is not None:
            bits |= bias.data_ptr()
        if weight_norm is not None:
            bits |= weight_norm.data_ptr()
        x.data_ptr()
    except (AttributeError, RuntimeError, TypeError):  # no tensor, or one of no strides, symbolic sizes or no memory
        return None
    if plan is False:
        checks.check_linear(x, weight, lora_A, lora_B, magnitude, bias, weight_norm)
        tensors = x, weight, lora_A, lora_B, magnitude, bias, weight_norm
        with torch._C._DisableTorchDispatch():  # a mode would see it in the first call alone
            plan = make_plan(*tensors, training, dropped, save_output)
            if together and plan is not None:
                plan = dataclasses.replace(plan, together=True)
            keep_plan(key, plan)
    if plan is None or (in_ops and not training):
        return None
    if bits & 15:  # plans are for tensors aligned to 16 bytes
        return None
    if training:
        usual = magnitude.requires_grad and lora_A.requires_grad and lora_B.requires_grad
        usual = (usual or apply is not None) and not weight.requires_grad
        if not usual or (weight_norm is not None and weight_norm.requires_grad):
            return None
    x_adapter, bits = _dropout(plan, x, dropout_p, training) if dropped else (None, None)
    if x.dtype is not plan.dtype:
        x, x_adapter = x.to(plan.dtype), x_adapter if x_adapter is None else x_adapter.to(plan.dtype)
    tensors = x, weight, lora_A, lora_B, magnitude, bias, weight_norm, x_adapter
    if not training:
        return _without_autocast(plan, *tensors, scaling, False)[0]
    if in_ops:
        plan = dataclasses.replace(plan, in_ops=True)
    return (apply or _apply)(*tensors, bits, dropout_p, scaling, plan)


def _dropout(plan, x, p, training) -> tuple[Tensor, Tensor | None]:
    """x' as ``F.dropout`` draws it, of x as PEFT drops it, without a gradient; in training the mask's bits."""
    x_adapter, mask = torch.native_dropout(x.detach(), p, True)  # what F.dropout calls on CUDA
    if not training:
        return x_adapter, None
    bits = x.new_empty(-(-x.numel() // 8), dtype=torch.uint8)
    plan.pack(mask.contiguous().view(torch.uint8), bits)
    return x_adapter, bits


def keep_plan(key: tuple, plan: object) -> object:
    if len(plans) >= PLANS:
        plans.clear()
    plans[key] = plan
    return plan


def forget_plans() -> None:
    """For code that changes what plans are made from: :func:`dorac.ops.linear.route`, the configs of kernels."""
    plans.clear()


def without_autocast(forward: Callable) -> Callable:
    """``forward(plan, ...)``, whose norms would not be float32's under autocast, and which makes the casts itself."""

    def call(plan, *arguments):
        if plan.autocast is None:
            return forward(plan, *arguments)
        torch.set_autocast_enabled(plan.autocast, False)
        try:
            return forward(plan, *arguments)
        finally:
            torch.set_autocast_enabled(plan.autocast, True)

    return call


def _forward(plan, x, weight, lora_A, lora_B, magnitude, bias, norm, x_adapter, scaling, training):
    """``(y, lora_A and lora_B for the products, norm, h, inner)``; inner in training alone, unless y is kept."""
    if norm is None:
        norm = computed_norm(plan, weight, lora_A, lora_B, scaling)
    if plan.casts_factors:
        lora_A, lora_B = cast_factors(plan, lora_A, lora_B)
    delta = plan.dropout_on == "adapter"
    h, base = F.linear(x if x_adapter is None else x_adapter, lora_A), F.linear(x_adapter if delta else x, weight)
    inner = base if training and not plan.keeps_y else None
    y = base if inner is None else torch.empty_like(base)
    plan.compose(base, h, lora_B, magnitude, norm, scaling, bias, y, inner)
    if delta:
        y.view(-1, y.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]), weight.t())
    return y, lora_A, lora_B, norm, h, inner


def cast_factors(plan, lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
    """The factors in the dtype of the products."""
    if plan.cast is None:
        return lora_A.to(plan.dtype), lora_B.to(plan.dtype)
    a, b = torch.empty_like(lora_A, dtype=plan.dtype), torch.empty_like(lora_B, dtype=plan.dtype)
    plan.cast(lora_A, lora_B, a, b)
    return a, b


def computed_norm(plan, weight, lora_A, lora_B, scaling) -> Tensor:
    """n, of factors as they are given, with autocast off."""
    split, splits, launch, finish = plan.norm
    factors = (lora_A, lora_B) if split is None else split(lora_A, lora_B)
    norm = weight.new_empty(weight.shape[0], dtype=torch.float32)
    parts = norm if splits == 1 else norm.new_empty(splits, weight.shape[0])
    launch(weight, *factors, scaling, None, parts)
    if splits > 1:
        finish(parts, norm)
    return norm


_without_autocast = without_autocast(_forward)


def _forward_in_ops(plan, x, weight, lora_A, lora_B, magnitude, bias, norm, x_adapter, scaling, training):
    """:func:`_forward`, but inner is there if y is kept, too."""
    with front.autocast_off(x):
        s = torch.full((), scaling, dtype=torch.float32, device=x.device)
        if norm is None:
            norm = norm_factored(weight, lora_A, lora_B, s)
        lora_A, lora_B = lora_A.to(plan.dtype), lora_B.to(plan.dtype)
        tensors = x, weight, lora_A, lora_B, magnitude, norm, s, bias, x_adapter
        rows = linear_function.forward(*tensors, scaling, "fused", True, plan.dropout_on == "adapter", training)
    # Nobody has these, so that y is no view, which autograd would not let a consumer write to.
    y, inner, h = (torch.ops.aten._unsafe_view(t, (*x.shape[:-1], t.shape[1])) for t in rows)
    return y, lora_A, lora_B, norm, h, inner


@functools.cache
def scalar(dtype: torch.dtype, device: torch.device) -> Tensor:
    """What a product is not added to: with beta = 0 torch reads nothing of it."""
    with torch._C._DisableTorchDispatch():
        return torch.empty((), dtype=dtype, device=device)


@functools.cache
def nothing(dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch._C._DisableTorchDispatch():
        return torch.empty(0, dtype=dtype, device=device)


class Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, x, weight, lora_A, lora_B, magnitude, bias, weight_norm, x_adapter, bits, dropout_p, scaling, plan
    ):
        forward = _forward_in_ops if plan.in_ops else _without_autocast
        y, a, b, norm, h, inner = forward(
            plan, x, weight, lora_A, lora_B, magnitude, bias, weight_norm, x_adapter, scaling, True
        )
        if not plan.casts_factors:
            a = b = None
        kept, ctx.shape = inner, x.shape
        if plan.keeps_y:
            kept = y.data
            probe = y.detach()
            probe.data = nothing(y.dtype, y.device)
            ctx.probe, ctx.version = probe, probe._version
        trained = lora_A, lora_B, magnitude
        ctx.trained = None
        if lora_A.is_leaf and lora_B.is_leaf and magnitude.is_leaf:  # the graph holds them in any case
            ctx.trained, ctx.versions = trained, [t._version for t in trained]
            trained = ()
        ctx.save_for_backward(x, weight, a, b, norm, h, kept, bits, *trained)
        ctx.set_materialize_grads(False)
        ctx.scaling, ctx.plan, ctx.kept_scale = scaling, plan, 1 / (1 - dropout_p)
        ctx.bias_dtype, ctx.summed = None if bias is None else bias.dtype, None
        return y

    @staticmethod
    def backward(ctx, dy):
        if dy is None:
            return (None,) * 12
        if torch.is_grad_enabled() or type(dy) is not Tensor or not front.unobserved():
            return seen_gradients(ctx, dy)
        if torch.is_autocast_enabled(dy.device.type):  # backward inside autocast: products stay in the layer's dtype
            with front.autocast_off(dy):
                return Linear.backward(ctx, dy)
        x, weight, a, b, norm, h, kept, bits, *trained = ctx.saved_tensors
        lora_A, lora_B, magnitude = trained or unchanged(ctx)
        plan, scaling, of_y, given = ctx.plan, ctx.scaling, ctx.plan.keeps_y, x
        delta = plan.dropout_on == "adapter"
        needs_x, _, _, _, _, needs_bias, *_ = ctx.needs_input_grad
        if a is None:
            a, b = lora_A, lora_B
        if dy.dim() != 2:
            dy, x = dy.reshape(-1, dy.shape[-1]), x.reshape(-1, x.shape[-1])  # of h kernels read its memory alone
        if dy.data_ptr() % 16:
            dy = dy.clone(memory_format=torch.contiguous_format)
        if of_y and (ctx.probe._version != ctx.version or share_memory(dy, kept)):  # y is not y any more
            h = h.reshape(-1, h.shape[-1])
            kept, of_y = torch.addmm(torch.mm(x, weight.t()), h, b.t(), alpha=scaling), False
        if (of_y or bits is not None) and (x.data_ptr() % 16 or not x.is_contiguous()):
            x = x.clone(memory_format=torch.contiguous_format)
        # A hook on saved tensors may give back other strides.
        launches = plan.backward(dy.stride(), (weight.stride(), b.stride()) if of_y else ())
        others = (x, weight, b) if of_y else (None, None, None)
        if plan.together:
            ctx.summed = dy.new_empty(lora_B.numel() + magnitude.numel(), dtype=torch.float32)
        d_base, d_m, d_b = scaled_gradients(
            launches, dy, kept, magnitude, norm, h, scaling, others, lora_B, summed=ctx.summed
        )
        unread = scalar(d_base.dtype, d_base.device)
        if delta:
            d_h = torch.addmm(unread, dy, scaled_b(plan, b, magnitude, norm), beta=0, alpha=scaling)
        else:
            d_h = torch.addmm(unread, d_base, b, beta=0, alpha=scaling)
        if bits is None:
            d_a = wide_mm(d_h.t(), x, lora_A.dtype)
        else:
            x_adapter = torch.empty_like(x)
            plan.drop(x, bits, ctx.kept_scale, x_adapter)
            d_a = wide_mm(d_h.t(), x_adapter, lora_A.dtype)
            del x_adapter
        dx = None
        if needs_x:
            dx = torch.mm(d_h, a)
            if plan.dropout_on != "low_rank":
                dx.addmm_(d_base, weight)
            if bits is not None:
                plan.drop(dx, bits, ctx.kept_scale, dx)
                dx.addmm_(dy if delta else d_base, weight)
            dx = dx.view_as(given)  # a shape would be read into C++ at the price of another op
        d_bias = dy.sum(0, dtype=torch.float32).to(ctx.bias_dtype) if needs_bias else None
        return dx, None, d_a, d_b, d_m, d_bias, *(None,) * 6


def scaled_gradients(
    launches,
    dy,
    kept,
    magnitude,
    norm,
    h,
    scaling,
    others,
    lora_B,
    at_the_end=None,
    overwrites: bool = False,
    summed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``g * dy``, of a change ``(g - 1) * dy``, and the gradients of magnitude and lora_B.

    ``others``: x, weight and lora_B of the products, or three None; ``at_the_end`` is what the last launch gets in
    their place. With ``overwrites`` the first result lies where ``kept`` is, and the last and the second in ``summed``.
    """
    strips, launch, add = launches
    d_base = kept if overwrites else _rows_like(dy)
    if summed is None:
        d_m, d_b = _rows_like(magnitude), _rows_like(lora_B)
    else:
        d_b, d_m = summed.split_with_sizes((lora_B.numel(), magnitude.numel()))
        d_b = d_b.view_as(lora_B)
    parts_m, parts_b = d_m, d_b
    if strips > 1:
        parts_m = norm.new_empty(strips, lora_B.shape[0], dtype=torch.float32)
        parts_b = norm.new_empty(strips, *lora_B.shape, dtype=torch.float32)
    launch(dy, dy, kept, magnitude, norm, h, scaling, *others, d_base, parts_m, parts_b)
    if add is not None:
        add(parts_m, parts_b, dy, magnitude, norm, h, scaling, *(at_the_end or others), d_m, d_b)
    return d_base, d_m, d_b


_rows_like = functools.partial(torch.empty_like, memory_format=torch.contiguous_format)


def scaled_b(plan, b, magnitude, norm) -> Tensor:
    """``g * lora_B``."""
    g_b = b.new_empty(b.shape[1], b.shape[0])
    plan.scale_b(b.stride())(b.t(), None, None, magnitude, norm, None, None, g_b, None)
    return g_b.t()


# ``Linear.apply`` without its questions for transforms, of which there are none, nor tensors that outlived theirs.
_apply = super(torch.autograd.Function, Linear).apply


def share_memory(left: Tensor, right: Tensor) -> bool:
    return left.untyped_storage().data_ptr() == right.untyped_storage().data_ptr()


def wide_mm(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """``left @ right`` in ``dtype``, which may be float32."""
    if dtype is left.dtype:
        return torch.mm(left, right)
    return torch.mm(left, right, out_dtype=dtype) if left.is_cuda else torch.mm(left, right).to(dtype)
