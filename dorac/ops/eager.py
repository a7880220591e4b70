"""The linear layer in eager on a GPU with kernels: one ``autograd.Function`` that launches, and no op of dorac's own.

``functional.dora_linear`` asks here first. Where tensors are plain, activations and factors (under autocast what it
makes of them) half precision, adapters trained whole or not at all, and nobody looks on, the layer is computed here, in
the form "fused" of ``ops/linear.py``, which has the formulas; anything else is left to that.

Where a mode over ops looks on in training, the same Function goes through the ops, and saves the same tensors: such a
mode may be over a checkpoint's forward alone, or over its recomputation.

- What the tensors' metadata settle is settled once for each combination, in a :class:`Plan`: the checks, the launches.
  A plan holds no tensors.
- ``x W^T`` turns into ``inner = x W^T + s h lora_B^T`` where it lies, which is kept for backward.
- With ``save_output`` and no bias, which might cancel, y is kept in its place, at no cost where the layer's consumer
  keeps it: ``d_m = colsum(dy * y) / m``; the kernel sees to rows whose m is too small for that. Autograd refuses a
  tensor that was kept and then written to in place, as ``relu(y, inplace=True)`` does, which is fine after a linear
  layer. So y is kept through an alias with a version of its own, and a probe without memory tells whether y's has
  changed; inner is then computed again. What a kernel writes behind autograd's back nothing tells: the caller has to.
- With dropout, x itself is kept, which several layers may share, and the mask at one bit an element: backward makes x'
  of these again. In PEFT's meaning ``x' W^T`` turns into inner where it lies, and ``x W^T`` is accumulated onto the
  change in y. The gradient of x is that of x', dropped where it lies, onto which the undropped part is accumulated.

Legend: T tokens, I in_features, O out_features, R rank.
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dorac import checks
from dorac.ops import front, linear
from dorac.ops.norm import norm_factored

PLANS = 4096  # kept; beyond, all are dropped
plans: dict[tuple, object] = {}  # by all that they depend on; None where tensors are not computed here


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """How layers of certain metadata are computed."""

    dtype: torch.dtype  # of the products
    casts_factors: bool
    cast: Callable | None  # of the factors and what they become in the dtype of the products; None: torch casts them
    dropout_on: str | None  # None without dropout
    keeps_y: bool  # for backward, in place of inner
    autocast: str | None  # the device type for which it is on
    norm: tuple | None  # what splits the factors, column splits, launch, finish; None where the norm is given
    compose: Callable  # of base, h, lora_B, magnitude, norm, scaling, bias, y and inner, which it writes
    backward: Callable[[tuple, tuple], tuple]  # of dy's strides, and for y those of weight and lora_B: strips, launches
    scale_b: Callable  # of lora_B's strides: (g lora_B)^T of compose's arguments, for PEFT's meaning of dropout
    pack: Callable | None  # of dropout's mask, a byte an element, and its bits, which it writes
    drop: Callable | None  # of rows, bits, 1 / (1 - p) and the result, which may be the rows
    together: bool = False  # the gradients of lora_B and the magnitude lie in one float32 tensor, in this order
    in_ops: bool = False  # which modes see


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
    """For whoever changes what plans are made by: :func:`dorac.ops.linear.route`, the configs of kernels."""
    plans.clear()


def metadata(x, weight, lora_A, lora_B, magnitude, bias, weight_norm) -> tuple:
    """All that the checks and a plan look at."""
    device = x.device
    kind = device.type
    return (
        type(x),
        x.shape,
        x.dtype,
        device,
        type(weight),
        weight.shape,
        weight.dtype,
        weight.device,
        weight.stride(),
        type(lora_A),
        lora_A.shape,
        lora_A.dtype,
        lora_A.device,
        lora_A.stride(),
        type(lora_B),
        lora_B.shape,
        lora_B.dtype,
        lora_B.device,
        lora_B.stride(),
        type(magnitude),
        magnitude.shape,
        magnitude.dtype,
        magnitude.device,
        magnitude.stride(),
        bias if bias is None else (type(bias), bias.shape, bias.dtype, bias.device, bias.stride()),
        weight_norm
        if weight_norm is None
        else (type(weight_norm), weight_norm.shape, weight_norm.dtype, weight_norm.device, weight_norm.stride()),
        torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind),
    )


def bound(launch):
    from dorac.kernels.launch import Bound

    return None if launch is None else Bound(launch)


def make_plan(
    x,
    weight,
    lora_A,
    lora_B,
    magnitude,
    bias,
    weight_norm,
    training: bool,
    dropout_on: str | None,
    save_output: bool,
    of_h: tuple[int, int] | None = None,
    of_b: tuple[int, int] | None = None,
) -> Plan | None:
    """The plan for tensors that passed the checks; None if they are not computed here.

    Args:
        of_h, of_b: strides of h and of lora_B in the dtype of the products, where whoever asks makes these.
    """
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

    from dorac.kernels import backward, configs, target
    from dorac.kernels.compose import compose_launch, composer
    from dorac.kernels.dropout import drop_launch, pack_launch
    from dorac.kernels.norm import needs_split, norm_launches, split_factors

    (out_features, in_features), rank, tokens = weight.shape, lora_A.shape[0], math.prod(x.shape[:-1])
    activation, h, b = (out_features, 1), of_h or (rank, 1), of_b or torch.empty_like(lora_B, dtype=dtype).stride()
    card = target.of(x)
    config = configs.tile_config(tokens, out_features, rank, dtype, dtype, card)
    delta = dropout_on == "adapter"
    keeps_y = training and save_output and bias is None and not delta
    flags = {"has_norm": True, "has_bias": bias is not None, "delta": delta, "split": False}
    flags |= {"want_inner": training and not keeps_y}
    launch = functools.partial(compose_launch, tokens, out_features, (activation, h, b), rank, config, **flags)
    norm = None
    if weight_norm is None:
        split, of_norm, strides = None, rank, (lora_A.stride(), lora_B.stride())
        if needs_split(weight.dtype, lora_A.dtype):
            split, of_norm, strides = split_factors, 3 * rank, ((in_features, 1), (3 * rank, 1))
        sizes = 1, out_features, in_features, of_norm
        strides = tuple((0, *pair) for pair in (weight.stride(), *strides))
        splits, *launches = norm_launches(*sizes, strides, configs.norm_config(*sizes, weight.dtype, card))
        norm = split, splits, *map(bound, launches)

    @functools.lru_cache(maxsize=16)
    def backward_launches(strides: tuple[int, int], of_y: tuple[tuple[int, int], ...]) -> tuple:
        strips, *launches = backward.lora_b_backward_launches(
            tokens,
            out_features,
            rank,
            (strides, activation, h, *(((in_features, 1), *of_y) if of_y else ())),
            configs.lora_b_config(tokens, out_features, rank, card),
            scale_b=True,
            delta=delta,
            in_features=in_features if of_y else None,
        )
        return strips, *map(bound, launches)

    @functools.lru_cache(maxsize=16)
    def scale_b_launch(strides: tuple[int, int]) -> Callable:
        flags = {"has_norm": True, "has_bias": False, "delta": False, "split": False, "want_inner": False}
        strides, config = (strides[::-1], None, None), configs.pointwise_config(rank)
        return bound(compose_launch(rank, out_features, strides, None, config, **flags, descriptors=False))

    return Plan(
        dtype=dtype,
        casts_factors=casts_factors,
        cast=cast_of(lora_A, lora_B) if casts_factors else None,
        dropout_on=dropout_on,
        keeps_y=keeps_y,
        autocast=None if autocast is None else x.device.type,
        norm=norm,
        compose=composer(config, launch) if config.descriptors else bound(launch(descriptors=False)),
        backward=backward_launches,
        scale_b=scale_b_launch,
        pack=bound(pack_launch(x.numel()) if dropout_on else None),
        drop=bound(drop_launch(x.numel()) if dropout_on else None),
    )


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


def cast_of(lora_A: Tensor, lora_B: Tensor) -> Callable | None:
    from dorac.kernels.cast import cast_launch

    contiguous = lora_A.is_contiguous() and lora_B.is_contiguous()
    return bound(cast_launch(lora_A.numel(), lora_B.numel())) if contiguous else None


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
        rows = linear.forward(*tensors, scaling, "fused", True, plan.dropout_on == "adapter", training)
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
        if lora_A.is_leaf and lora_B.is_leaf and magnitude.is_leaf:  # the graph holds them at any rate
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
            return _seen_gradients(ctx, dy)
        if front.autocast_dtype(dy) is not None:  # backward called inside autocast: products stay in the layer's dtype
            with front.autocast_off(dy):
                return Linear.backward(ctx, dy)
        x, weight, a, b, norm, h, kept, bits, *trained = ctx.saved_tensors
        lora_A, lora_B, magnitude = trained or unchanged(ctx)
        plan, scaling, of_y = ctx.plan, ctx.scaling, ctx.plan.keeps_y
        delta = plan.dropout_on == "adapter"
        needs_x, _, _, _, _, needs_bias, *_ = ctx.needs_input_grad
        if a is None:
            a, b = lora_A, lora_B
        if dy.dim() != 2:
            dy, h, x = (t.reshape(-1, t.shape[-1]) for t in (dy, h, x))
        if dy.data_ptr() % 16:
            dy = dy.clone(memory_format=torch.contiguous_format)
        if of_y and (ctx.probe._version != ctx.version or share_memory(dy, kept)):  # y is not y any more
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
            dx = dx.view(ctx.shape)
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
    d_base = kept if overwrites else dy.new_empty(dy.shape)
    if summed is None:
        d_m, d_b = magnitude.new_empty(magnitude.shape), lora_B.new_empty(lora_B.shape)
    else:
        d_b, d_m = summed.split_with_sizes((lora_B.numel(), magnitude.numel()))
        d_b = d_b.view(lora_B.shape)
    parts_m, parts_b = d_m, d_b
    if strips > 1:
        parts_m = norm.new_empty(strips, lora_B.shape[0], dtype=torch.float32)
        parts_b = norm.new_empty(strips, *lora_B.shape, dtype=torch.float32)
    launch(dy, dy, kept, magnitude, norm, h, scaling, *others, d_base, parts_m, parts_b)
    if add is not None:
        add(parts_m, parts_b, dy, magnitude, norm, h, scaling, *(at_the_end or others), d_m, d_b)
    return d_base, d_m, d_b


def scaled_b(plan, b, magnitude, norm) -> Tensor:
    """``g * lora_B``."""
    g_b = b.new_empty(b.shape[1], b.shape[0])
    plan.scale_b(b.stride())(b.t(), None, None, magnitude, norm, None, None, g_b, None)
    return g_b.t()


# ``Linear.apply`` without its questions for transforms, of which there are none, nor tensors that outlived theirs.
_apply = super(torch.autograd.Function, Linear).apply


def unchanged(ctx) -> tuple[Tensor, Tensor, Tensor]:
    """The trained parameters, which are not saved: each saved tensor costs time, most of all under a checkpoint."""
    trained, versions = ctx.trained, ctx.versions
    if [t._version for t in trained] != versions:
        tensor, version = next(pair for pair in zip(trained, versions, strict=True) if pair[0]._version != pair[1])
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: a "
            f"parameter {list(tensor.shape)} of a DoRA layer is at version {tensor._version}; expected {version}"
        )
    return trained


def share_memory(left: Tensor, right: Tensor) -> bool:
    return left.untyped_storage().data_ptr() == right.untyped_storage().data_ptr()


def wide_mm(left: Tensor, right: Tensor, dtype: torch.dtype) -> Tensor:
    """``left @ right`` in ``dtype``, which may be float32."""
    if dtype is left.dtype:
        return torch.mm(left, right)
    return torch.mm(left, right, out_dtype=dtype) if left.is_cuda else torch.mm(left, right).to(dtype)


def _mask(bits: Tensor, shape: torch.Size) -> Tensor:
    """Dropout's mask of its bits, as zeros and ones, in aten."""
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (bits.unsqueeze(1) >> places).bitwise_and(1).flatten()[: shape.numel()].view(shape)


def _seen_gradients(ctx, dy):
    """The gradients where they are differentiated again, or a mode looks on.

    Where they are differentiated, h and inner are computed again, in aten: then every tensor is connected to what it
    was computed of.
    """
    if front.autocast_dtype(dy) is not None:
        with front.autocast_off(dy):
            return _seen_gradients(ctx, dy)
    x, weight, _, _, norm, h, inner, bits, *trained = ctx.saved_tensors
    lora_A, lora_B, magnitude = trained or unchanged(ctx)
    dtype, acc, delta = ctx.plan.dtype, torch.float32, ctx.plan.dropout_on == "adapter"
    x, h, inner = (t.reshape(-1, t.shape[-1]) for t in (x, h, inner))
    if bits is not None:
        mask = _mask(bits, x.shape)

    def dropped(rows):
        return (rows.to(acc) * mask * ctx.kept_scale).to(dtype)

    x_adapter = None if bits is None else dropped(x)
    seen = x if bits is None else x_adapter
    a, b = lora_A.to(dtype), lora_B.to(dtype)
    scaling = torch.full((), ctx.scaling, dtype=acc, device=x.device)
    again, of_y = torch.is_grad_enabled(), ctx.plan.keeps_y
    if again:
        h = seen @ a.t()
    if again or of_y:
        # Where y is kept, the kernel takes no product for inner: a counter of operations is not to count one.
        hides = of_y and not again and front.seen_by_modes_alone()
        with torch._C._DisableTorchDispatch() if hides else contextlib.nullcontext():
            base = (seen if delta else x) @ weight.t()
            inner = (base.to(acc) + scaling * (h @ b.t()).to(acc)).to(dtype)
    needs_x, _, _, _, _, needs_bias, *_ = ctx.needs_input_grad
    dx, _, d_a, d_b, d_m, d_bias, dx_adapter, _ = linear.gradients(
        (x, weight, a, b, magnitude, norm, scaling, h, inner, x_adapter),
        (needs_x, False, True, True, True, needs_bias, needs_x and bits is not None),
        (dtype, dtype, ctx.bias_dtype),
        (dy.reshape(-1, weight.shape[0]), None, None),
        number=ctx.scaling,
        path="fused",
        eager=True,
        dropped=bits is not None,
        delta=delta,
    )
    if dx_adapter is not None:
        dx = dx + dropped(dx_adapter)
    dx = None if dx is None else dx.view(ctx.shape)
    d_a, d_b = (None if d is None else d.to(t.dtype) for d, t in ((d_a, lora_A), (d_b, lora_B)))
    return dx, None, d_a, d_b, d_m, d_bias, *(None,) * 6
