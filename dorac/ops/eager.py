"""The linear layer in eager on a GPU with kernels: one ``autograd.Function`` that launches, and no op of dorac's own.

``functional.dora_linear`` asks here first. Where tensors are plain, activations and factors (under autocast what it
makes of them) half precision, adapters trained whole or not at all, and nobody looks on, the layer is computed here, in
the form "fused" of ``ops/linear.py``, which has the formulas; anything else is left to that.

- What the tensors' metadata settle is settled once for each combination, in a :class:`Plan`: the checks, the launches.
  A plan holds no tensors.
- ``x W^T`` is where y is written, too. For backward y itself is kept where there is no bias, which costs nothing where
  the layer's consumer keeps it: ``d_m = colsum(dy * y) / m``; the kernel sees to rows whose m is too small for that.
  With a bias, which might cancel, ``inner = x W^T + s h lora_B^T`` is kept.
- Autograd refuses a tensor that was kept and then written to in place, as ``relu(y, inplace=True)`` does, which is fine
  after a linear layer. So y is kept through an alias with a version of its own, and a probe without memory tells
  whether y's has changed; inner is then computed again.

Legend: T tokens, I in_features, O out_features, R rank.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
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
    norm: tuple | None  # what splits the factors, column splits, launch, finish; None where the norm is given
    compose: Callable  # of base, h, lora_B, magnitude, norm, scaling, bias, y and inner, which it writes
    backward: Callable  # of the strides of dy, and of weight and lora_B where y was kept: strips, launch, sums


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
    try:
        training = torch.is_grad_enabled() and (
            lora_B.requires_grad
            or magnitude.requires_grad
            or lora_A.requires_grad
            or x.requires_grad
            or weight.requires_grad
            or (bias is not None and bias.requires_grad)
            or (weight_norm is not None and weight_norm.requires_grad)
        )
        key = training, *_metadata(x, weight, lora_A, lora_B, magnitude, bias, weight_norm)
        plan = _plans.get(key, False)
    except (AttributeError, RuntimeError, TypeError):  # no tensor, or one of no strides or of symbolic sizes
        return None
    if plan is False:
        checks.check_linear(x, weight, lora_A, lora_B, magnitude, bias, weight_norm)
        if len(_plans) >= _PLANS:
            _plans.clear()
        plan = _plans[key] = make_plan(x, weight, lora_A, lora_B, magnitude, bias, weight_norm, training=training)
    if plan is None:
        return None
    bits = weight.data_ptr() | lora_A.data_ptr() | lora_B.data_ptr() | magnitude.data_ptr()
    if bias is not None:
        bits |= bias.data_ptr()
    if weight_norm is not None:
        bits |= weight_norm.data_ptr()
    if bits & 15:  # plans are for tensors aligned to 16 bytes
        return None
    if x.dtype is not plan.dtype:
        x = x.to(plan.dtype)
    if not training:
        return _without_autocast(plan, x, weight, lora_A, lora_B, magnitude, bias, weight_norm, scaling, False)[0]
    usual = magnitude.requires_grad and lora_A.requires_grad and lora_B.requires_grad and not weight.requires_grad
    if not usual or (weight_norm is not None and weight_norm.requires_grad):
        return None
    return _Linear.apply(x, weight, lora_A, lora_B, magnitude, bias, weight_norm, scaling, plan)


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


def _bound(launch):
    from dorac.kernels.launch import Bound

    return None if launch is None else Bound(launch)


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
    from dorac.kernels.compose import compose_launch, composer
    from dorac.kernels.norm import needs_split, norm_launches, split_factors

    (out_features, in_features), rank, tokens = weight.shape, lora_A.shape[0], math.prod(x.shape[:-1])
    activation, h, b = (out_features, 1), (rank, 1), torch.empty_like(lora_B, dtype=dtype).stride()
    config = configs.tile_config(tokens, out_features, rank, dtype, dtype)
    flags = {"has_norm": True, "has_bias": bias is not None, "delta": False, "split": False}
    flags |= {"want_inner": training and bias is not None}
    launch = functools.partial(compose_launch, tokens, out_features, (activation, h, b), rank, config, **flags)
    norm = None
    if weight_norm is None:
        split = split_factors if needs_split(weight.dtype, lora_A.dtype) else None
        factors = (lora_A, lora_B) if split is None else split(lora_A, lora_B)
        sizes = 1, out_features, in_features, factors[0].shape[0]
        strides = tuple((0, *t.stride()) for t in (weight, *factors))
        splits, *launches = norm_launches(*sizes, strides, configs.norm_config(*sizes, weight.dtype))
        norm = split, splits, *map(_bound, launches)

    @functools.lru_cache(maxsize=16)
    def backward_launches(dy: tuple[int, int], others: tuple[tuple[int, int], ...]) -> tuple:
        strips, *launches = backward.lora_b_backward_launches(
            tokens,
            out_features,
            rank,
            (dy, activation, h, *(((in_features, 1), *others) if others else ())),
            configs.lora_b_config(tokens, out_features, rank),
            scale_b=True,
            in_features=in_features if others else None,
        )
        return strips, *map(_bound, launches)

    return Plan(
        dtype=dtype,
        casts_factors=casts_factors,
        autocast=None if autocast is None else x.device.type,
        norm=norm,
        compose=composer(config, launch) if config.descriptors else _bound(launch(descriptors=False)),
        backward=backward_launches,
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


def _forward(plan, x, weight, lora_A, lora_B, magnitude, bias, norm, scaling, training):
    """``(y, lora_A and lora_B for the products, norm, h, inner)``; inner in training with a bias alone."""
    if norm is None:
        split, splits, launch, finish = plan.norm
        factors = (lora_A, lora_B) if split is None else split(lora_A, lora_B)
        norm = magnitude.new_empty(weight.shape[0], dtype=torch.float32)
        parts = norm if splits == 1 else norm.new_empty(splits, weight.shape[0])
        launch(weight, *factors, scaling, None, parts)
        if splits > 1:
            finish(parts, norm)
    if plan.casts_factors:
        lora_A, lora_B = lora_A.to(plan.dtype), lora_B.to(plan.dtype)
    h, base = F.linear(x, lora_A), F.linear(x, weight)
    inner = base if training and bias is not None else None
    y = base if inner is None else torch.empty_like(base)
    plan.compose(base, h, lora_B, magnitude, norm, scaling, bias, y, inner)
    return y, lora_A, lora_B, norm, h, inner


@functools.cache
def _nothing(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.empty(0, dtype=dtype, device=device)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, lora_A, lora_B, magnitude, bias, weight_norm, scaling, plan):
        y, a, b, norm, h, inner = _without_autocast(
            plan, x, weight, lora_A, lora_B, magnitude, bias, weight_norm, scaling, True
        )
        if not plan.casts_factors:
            a = b = None
        ctx.of_y = inner is None
        if ctx.of_y:
            inner = y.data
            probe = y.detach()
            probe.data = _nothing(y.dtype, y.device)
            ctx.probe, ctx.version = probe, probe._version
        ctx.trained = trained = lora_A, lora_B, magnitude
        if lora_A.is_leaf and lora_B.is_leaf and magnitude.is_leaf:  # the graph holds them at any rate
            ctx.versions = [t._version for t in trained]
            trained = ()
        else:
            ctx.trained = None
        ctx.save_for_backward(x, weight, a, b, norm, h, inner, *trained)
        ctx.set_materialize_grads(False)
        ctx.scaling, ctx.plan = scaling, plan
        ctx.bias_dtype = None if bias is None else bias.dtype
        return y

    @staticmethod
    def backward(ctx, dy):
        if dy is None:
            return (None,) * 9
        if torch.is_grad_enabled() or type(dy) is not Tensor or not front.unobserved():
            return _seen_gradients(ctx, dy)
        if front.autocast_dtype(dy) is not None:  # backward called inside autocast: products stay in the layer's dtype
            with front.autocast_off(dy):
                return _Linear.backward(ctx, dy)
        x, weight, a, b, norm, h, kept, *trained = ctx.saved_tensors
        lora_A, lora_B, magnitude = trained or _unchanged(ctx)
        plan, scaling, of_y = ctx.plan, ctx.scaling, ctx.of_y
        needs_x, _, _, _, _, needs_bias, _, _, _ = ctx.needs_input_grad
        if a is None:
            a, b = lora_A, lora_B
        rows = x
        if dy.dim() != 2:
            dy, h, rows = dy.reshape(-1, dy.shape[-1]), h.view(-1, h.shape[-1]), x.reshape(-1, x.shape[-1])
        if dy.data_ptr() % 16:
            dy = dy.clone(memory_format=torch.contiguous_format)
        if of_y and (ctx.probe._version != ctx.version or _share_memory(dy, kept)):  # y is not y any more
            kept, of_y = torch.addmm(torch.mm(rows, weight.t()), h, b.t(), alpha=scaling), False
        if of_y and (rows.data_ptr() % 16 or not rows.is_contiguous()):
            rows = rows.clone(memory_format=torch.contiguous_format)
        # A hook on saved tensors may give back other strides.
        strips, launch, add = plan.backward(dy.stride(), (weight.stride(), b.stride()) if of_y else ())
        d_inner = dy.new_empty(dy.shape)
        d_m, d_b = magnitude.new_empty(magnitude.shape), lora_B.new_empty(lora_B.shape)
        others = (rows, weight, b) if of_y else (None, None, None)
        if add is None:
            launch(dy, dy, kept, magnitude, norm, h, scaling, *others, d_inner, d_m, d_b)
        else:
            parts_m = norm.new_empty(strips, dy.shape[1], dtype=torch.float32)
            parts_b = norm.new_empty(strips, *lora_B.shape, dtype=torch.float32)
            launch(dy, dy, kept, magnitude, norm, h, scaling, *others, d_inner, parts_m, parts_b)
            add(parts_m, parts_b, dy, magnitude, norm, h, scaling, *others, d_m, d_b)
        d_h = torch.addmm(d_inner.new_empty(()), d_inner, b, beta=0, alpha=scaling)
        d_a = _wide_mm(d_h.t(), rows, lora_A.dtype)
        dx = torch.mm(d_h, a).addmm_(d_inner, weight).view(x.shape) if needs_x else None
        d_bias = dy.sum(0, dtype=torch.float32).to(ctx.bias_dtype) if needs_bias else None
        return dx, None, d_a, d_b, d_m, d_bias, None, None, None


def _unchanged(ctx) -> tuple[Tensor, Tensor, Tensor]:
    """The trained parameters, which are not saved: each saved tensor costs time, most of all under a checkpoint."""
    for tensor, version in zip(ctx.trained, ctx.versions, strict=True):
        if tensor._version != version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: a "
                f"parameter {list(tensor.shape)} of a DoRA layer is at version {tensor._version}; expected {version}"
            )
    return ctx.trained


def _share_memory(left: Tensor, right: Tensor) -> bool:
    return left.untyped_storage().data_ptr() == right.untyped_storage().data_ptr()


def _wide_mm(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """``left @ right`` in ``dtype``, which may be float32."""
    if dtype is left.dtype:
        return torch.mm(left, right)
    return torch.mm(left, right, out_dtype=dtype) if left.is_cuda else torch.mm(left, right).to(dtype)


def _seen_gradients(ctx, dy):
    """The gradients where they are differentiated again, or a mode looks on: h and inner are computed again, in aten.

    Then every tensor is connected to what it was computed of.
    """
    if front.autocast_dtype(dy) is not None:
        with front.autocast_off(dy):
            return _seen_gradients(ctx, dy)
    x, weight, _, _, norm, _, _, *trained = ctx.saved_tensors
    lora_A, lora_B, magnitude = trained or _unchanged(ctx)
    dtype, acc = ctx.plan.dtype, torch.float32
    rows, a, b = x.reshape(-1, x.shape[-1]), lora_A.to(dtype), lora_B.to(dtype)
    scaling = torch.full((), ctx.scaling, dtype=acc, device=x.device)
    h = rows @ a.t()
    inner = ((rows @ weight.t()).to(acc) + scaling * (h @ b.t()).to(acc)).to(dtype)
    needs_x, _, _, _, _, needs_bias, _, _, _ = ctx.needs_input_grad
    dx, _, d_a, d_b, d_m, d_bias = linear.gradients(
        (rows, weight, a, b, magnitude, norm, scaling, h, inner),
        (needs_x, False, True, True, True, needs_bias),
        (dtype, dtype, ctx.bias_dtype),
        (dy.reshape(inner.shape), None, None),
        number=ctx.scaling,
        path="fused",
        eager=True,
    )
    dx = None if dx is None else dx.view(x.shape)
    return dx, None, d_a.to(lora_A.dtype), d_b.to(lora_B.dtype), d_m, d_bias, None, None, None
