"""``functional.dora_over`` in eager on a GPU with kernels, as ``ops/eager.py`` computes the whole layer.

The product is an argument, and so is its gradient. It stays as it is: inner has memory of its own. It takes bases of
the dtype that the low-rank branch runs in; anything else is left to ``ops/over.py``, which has the formula.

With a ``weight``, packed or dense, and no bias, y is kept in place of inner, as there; of the weight inner is computed
again for rows with a faint g, and for all where y has been written to. A second derivative then finds no base. A dense
weight is saved; a packed one is held as it is (its layer does the same).

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

from dorac import checks, packed
from dorac.dense import PLAIN
from dorac.ops import eager, eager_plan, eager_seen, front, linear_function, over
from dorac.ops.linear_leaves import LORA_B_RANK
from dorac.ops.packed_product import MODIFIED, Held, Reading, version


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """How layers of certain metadata are computed."""

    dtype: torch.dtype  # of the products
    device: str  # its type
    casts_factors: bool
    cast: Callable | None  # as in ops/eager.py
    holds_bias: bool
    keeps_y: bool  # for backward, in place of inner
    compose: Callable  # of base, h, lora_B, magnitude, norm, scaling, bias, y and inner, which it writes
    backward: Callable[[tuple, tuple, bool], tuple]  # of dy's and lora_B's strides, and whether y is: strips, launches
    in_ops: bool = False  # which modes see


def dora_over(
    base: Tensor,
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    bias: Tensor | None,
    weight_norm: Tensor,
    scaling: float,
    holds_bias: bool,
    weight: Tensor | packed.Packed | Held | None = None,
) -> Tensor | None:
    """The layer for a finite ``scaling``, or None if it is not to be computed here; errors are ``check_over``'s."""
    in_ops = not front.unobserved()
    if in_ops and not front.seen_by_modes_alone():
        return None
    try:
        training = torch.is_grad_enabled() and (
            lora_B.requires_grad
            or magnitude.requires_grad
            or lora_A.requires_grad
            or x.requires_grad
            or base.requires_grad
            or (bias is not None and bias.requires_grad)
            or weight_norm.requires_grad
        )
        kept = of_kept = None
        if training and weight is not None and bias is None:
            kept = _kept(weight, base)
        held = kept if type(kept) is Held else None
        if kept is not None:
            of_kept = (kept.shape, kept.device) if held is None else held.reading().key
        metadata = eager.metadata(x, base, lora_A, lora_B, magnitude, bias, weight_norm)
        key = "over", training, holds_bias, of_kept, metadata
        plan = eager.plans.get(key, False)
        bits = base.data_ptr() | lora_A.data_ptr() | lora_B.data_ptr() | magnitude.data_ptr() | weight_norm.data_ptr()
        if bias is not None:
            bits |= bias.data_ptr()
        x.data_ptr()
    except (AttributeError, RuntimeError, TypeError):  # no tensor, or one of no strides, symbolic sizes or no memory
        return None
    if plan is False:
        checks.check_over(base, x, lora_A, lora_B, magnitude, bias, weight_norm)
        if kept is not None:
            checks.check_weight_over(kept if held is None else held.weight, base, x)
        tensors = base, x, lora_A, lora_B, magnitude, bias, weight_norm
        with torch._C._DisableTorchDispatch():  # a mode would see it in the first call alone
            reading = None if held is None else held.reading()
            plan = make_plan(*tensors, training, bias is not None and holds_bias, kept is not None, reading)
        eager.keep_plan(key, plan)
    if plan is None or (in_ops and not training):
        return None
    if bits & 15:  # plans are for tensors aligned to 16 bytes
        return None
    if training:
        usual = magnitude.requires_grad and lora_A.requires_grad and lora_B.requires_grad
        if not usual or weight_norm.requires_grad or (bias is not None and bias.requires_grad):
            return None
    if x.dtype is not plan.dtype:
        x = x.to(plan.dtype)
    if not training:
        return _forward(plan, base, x, lora_A, lora_B, magnitude, bias, weight_norm, scaling, False)[0]
    if in_ops:
        plan = dataclasses.replace(plan, in_ops=True)
    return _apply(base, x, lora_A, lora_B, magnitude, bias, weight_norm, scaling, plan, kept)[0]


def _kept(weight: Tensor | packed.Packed | Held, base: Tensor) -> Tensor | Held | None:
    """The weight where y is kept: a dense one is saved, a packed one held. None: no kernel reads it."""
    if type(weight) is Held or packed.is_packed(weight):
        held = weight if type(weight) is Held else Held(weight)
        return None if held.reading() is None else held
    plain = type(weight) in PLAIN and weight.is_contiguous() and weight.data_ptr() % 16 == 0
    return weight if plain and weight.dtype is base.dtype and front.has_kernels(base) else None


def make_plan(
    base,
    x,
    lora_A,
    lora_B,
    magnitude,
    bias,
    weight_norm,
    training: bool,
    holds_bias: bool,
    keeps_y: bool,
    reading: Reading | None,
) -> Plan | None:
    """The plan for tensors that passed the checks; None if they are not computed here.

    ``reading``: of the packed weight where y is kept.
    """
    given = [t for t in (x, base, lora_A, lora_B, magnitude, bias, weight_norm) if t is not None]
    if not x.numel() or not base.numel() or not front.all_eager(*given) or not front.has_kernels(*given):
        return None
    autocast = front.autocast_dtype(x)
    dtype = autocast or lora_A.dtype
    if dtype.itemsize != 2 or base.dtype is not dtype or lora_A.shape[0] > LORA_B_RANK:
        return None
    if not all(t.is_contiguous() for t in (base, magnitude, bias, weight_norm) if t is not None):
        return None

    from dorac.kernels import configs, lora_b, target
    from dorac.kernels.compose import compose_launch, composer
    from dorac.kernels.faint import finish_launch

    (rank, in_features), out_features, tokens = lora_A.shape, base.shape[-1], math.prod(base.shape[:-1])
    activation, h, b = (out_features, 1), (rank, 1), torch.empty_like(lora_B, dtype=dtype).stride()
    card = target.of(x)
    config = configs.tile_config(tokens, out_features, rank, dtype, dtype, card)
    flags = {"has_norm": True, "has_bias": bias is not None, "holds_bias": holds_bias, "delta": False, "split": False}
    flags |= {"want_inner": training and not keeps_y}
    launch = functools.partial(compose_launch, tokens, out_features, (activation, h, b), rank, config, **flags)

    # A plan holds no tensors.
    form, aligned = (None, True) if reading is None else (reading.form, reading.aligned)

    @functools.lru_cache(maxsize=16)
    def backward_launches(strides: tuple[int, int], of_b: tuple[int, int], of_y: bool) -> tuple:
        tensors, read = (strides, activation, h), None
        if of_y:
            read = in_features if form is None else 0
            tensors += ((in_features, 1), (in_features, 1), of_b) if read else ()
        config = configs.lora_b_config(tokens, out_features, rank, card)
        strips, launch, add = lora_b.lora_b_backward_launches(
            tokens, out_features, rank, tensors, config, scale_b=True, in_features=read
        )
        if of_y and not read:
            add = finish_launch(tokens, out_features, in_features, rank, strips, form, strides, of_b)
            return strips, eager_plan.bound(launch), eager_plan.bound(add) if aligned else add
        return strips, eager_plan.bound(launch), eager_plan.bound(add)

    return Plan(
        dtype=dtype,
        device=x.device.type,
        casts_factors=lora_A.dtype is not dtype,
        cast=None if lora_A.dtype is dtype else eager_plan.cast_of(lora_A, lora_B),
        holds_bias=holds_bias,
        keeps_y=keeps_y,
        compose=composer(config, launch) if config.descriptors else eager_plan.bound(launch(descriptors=False)),
        backward=backward_launches,
    )


def _forward(plan, base, x, lora_A, lora_B, magnitude, bias, norm, scaling, training):
    """``(y, inner, lora_A and lora_B for the products, h)``; inner in training alone, unless y is kept.

    Autocast, where it is on, makes the same casts.
    """
    if plan.casts_factors:
        lora_A, lora_B = eager.cast_factors(plan, lora_A, lora_B)
    h, y = F.linear(x, lora_A), torch.empty_like(base)
    inner = torch.empty_like(base) if training and not plan.keeps_y else None
    plan.compose(base, h, lora_B, magnitude, norm, scaling, bias, y, inner)
    return y, inner, lora_A, lora_B, h


def _forward_in_ops(plan, base, x, lora_A, lora_B, magnitude, bias, norm, scaling, training):
    with front.autocast_off(x):
        s = torch.full((), scaling, dtype=torch.float32, device=x.device)
        lora_A, lora_B = lora_A.to(plan.dtype), lora_B.to(plan.dtype)
        rows = (t.reshape(-1, t.shape[-1]) for t in (base, x))
        tensors = *rows, lora_A, lora_B, magnitude, norm, s, bias
        rows = over.forward(*tensors, plan.holds_bias, "fused", True, training)
    # Nobody has these, so that y is no view, which autograd would not let a consumer write to.
    y, inner, h = (torch.ops.aten._unsafe_view(t, (*base.shape[:-1], t.shape[1])) for t in rows)
    return y, None if plan.keeps_y else inner, lora_A, lora_B, h


class _Over(torch.autograd.Function):
    """Returns (y, inner): with inner an output, a second derivative stays connected through what backward saved.

    ``weight``: where y is kept.
    """

    @staticmethod
    def forward(ctx, base, x, lora_A, lora_B, magnitude, bias, weight_norm, scaling, plan, weight):
        forward = _forward_in_ops if plan.in_ops else _forward
        y, inner, a, b, h = forward(plan, base, x, lora_A, lora_B, magnitude, bias, weight_norm, scaling, True)
        if not plan.casts_factors:
            a = b = None
        kept = inner
        if plan.keeps_y:  # as in ops/eager.py
            kept, probe = y.data, y.detach()
            probe.data = eager.nothing(y.dtype, y.device)
            ctx.probe, ctx.version = probe, probe._version
        trained = lora_A, lora_B, magnitude
        ctx.trained = None
        if lora_A.is_leaf and lora_B.is_leaf and magnitude.is_leaf:  # the graph holds them in any case
            ctx.trained, ctx.versions = trained, [t._version for t in trained]
            trained = ()
        ctx.held, weight = (weight, None) if type(weight) is Held else (None, weight)
        ctx.norm, ctx.norm_version = weight_norm, version(weight_norm)  # held, as a packed weight is
        ctx.save_for_backward(x, a, b, h, kept, weight, *trained)
        ctx.set_materialize_grads(False)
        ctx.scaling, ctx.plan, ctx.shapes = scaling, plan, (base.shape, x.shape)
        return y, inner

    @staticmethod
    def backward(ctx, dy, d_inner):
        if dy is None and d_inner is None:
            return (None,) * 10
        if d_inner is not None or torch.is_grad_enabled() or type(dy) is not Tensor or not front.unobserved():
            return _seen_gradients(ctx, dy, d_inner)
        plan, scaling, held = ctx.plan, ctx.scaling, ctx.held
        if torch.is_autocast_enabled(plan.device):  # backward called inside it: products stay in the layer's dtype
            with front.autocast_off(dy):
                return _Over.backward(ctx, dy, None)
        x, a, b, h, kept, weight, *trained = ctx.saved_tensors
        lora_A, lora_B, magnitude = trained or eager_seen.unchanged(ctx)
        norm, (base_shape, x_shape) = _norm(ctx), ctx.shapes
        needs_base, needs_x, *_ = ctx.needs_input_grad
        if a is None:
            a, b = lora_A, lora_B
        if dy.data_ptr() % 16:
            dy = dy.clone(memory_format=torch.contiguous_format)
        if dy.is_contiguous():  # for the kernel, which is given strides, it is a matrix in any case
            strides = dy.shape[-1], 1
        else:
            dy = _rows(dy)
            strides = dy.stride()
        x, of_y = _rows(x), plan.keeps_y
        if of_y and (ctx.probe._version != ctx.version or eager.share_memory(dy, kept)):  # y is not y any more
            kept, of_y = _inner(held, weight, x, _rows(h), b, scaling), False
        if of_y and ((x.data_ptr() | h.data_ptr()) & 15 or not (x.is_contiguous() and h.is_contiguous())):
            x, h = (t.clone(memory_format=torch.contiguous_format) for t in (x, h))
        others = (x, weight, b) if of_y and held is None else (None, None, None)
        at_the_end = (x, b, *held.read()) if of_y and held is not None else None
        launches = plan.backward(strides, b.stride(), of_y)
        d_base, d_m, d_b = eager.scaled_gradients(
            launches, dy, kept, magnitude, norm, h, scaling, others, lora_B, at_the_end
        )
        unread = eager.scalar(d_base.dtype, d_base.device)
        d_h = torch.addmm(unread, _rows(d_base), b, beta=0, alpha=scaling)
        d_a = eager.wide_mm(d_h.t(), x, lora_A.dtype)
        dx = None
        if needs_x:
            dx = torch.mm(d_h, a)
            dx = dx if len(x_shape) == 2 else dx.view(x_shape)
        if not needs_base:
            d_base = None
        elif d_base.dim() != len(base_shape):
            d_base = d_base.view(base_shape)
        return d_base, dx, d_a, d_b, d_m, *(None,) * 5


def _rows(tensor: Tensor) -> Tensor:
    return tensor if tensor.dim() == 2 else tensor.reshape(-1, tensor.shape[-1])


def _norm(ctx) -> Tensor:
    if version(ctx.norm) != ctx.norm_version:
        raise RuntimeError(MODIFIED.format("norm", list(ctx.norm.shape)))
    return ctx.norm


def _inner(held: Held | None, weight: Tensor | None, x, h, b, scaling) -> Tensor:
    """inner of rows, of a dense weight."""
    if held is not None:
        weight = held.dense(x.dtype)
    return torch.addmm(torch.mm(x, weight.t()), h, b.t(), alpha=scaling)


_apply = super(torch.autograd.Function, _Over).apply  # see ops/eager.py


def _seen_gradients(ctx, dy, d_inner):
    """The gradients where they are differentiated again, or a mode is active."""
    given = d_inner if dy is None else dy
    if front.autocast_dtype(given) is not None:
        with front.autocast_off(given):
            return _seen_gradients(ctx, dy, d_inner)
    if ctx.plan.keeps_y and torch.is_grad_enabled():
        raise RuntimeError("dora_over with save_output saves no base, which a second derivative needs: leave it out")
    x, _, _, h, inner, weight, *trained = ctx.saved_tensors
    lora_A, lora_B, magnitude = trained or eager_seen.unchanged(ctx)
    norm = _norm(ctx)
    dtype, base_shape, x_shape = ctx.plan.dtype, *ctx.shapes
    x, h, inner, dy, d_inner = (None if t is None else t.reshape(-1, t.shape[-1]) for t in (x, h, inner, dy, d_inner))
    a, b = lora_A.to(dtype), lora_B.to(dtype)
    if torch.is_grad_enabled():
        h = x @ a.t()
    if ctx.plan.keeps_y:  # the kernel makes no product for it: a counter of operations is not to count one
        hides = front.seen_by_modes_alone()
        with torch._C._DisableTorchDispatch() if hides else contextlib.nullcontext():
            inner = _inner(ctx.held, weight, x, h, b, ctx.scaling)
    needs_base, needs_x, *_ = ctx.needs_input_grad
    scaling = torch.full((), ctx.scaling, dtype=torch.float32, device=x.device)
    dx, _, d_a, d_b, d_m, _, _, d_base = linear_function.gradients(
        (x, None, a, b, magnitude, norm, scaling, h, inner, None),
        (needs_x, False, True, True, True, False, False),
        (dtype, dtype, None),
        (dy, d_inner, None),
        number=ctx.scaling,
        path="fused",
        eager=True,
        over=needs_base,
    )
    dx = None if dx is None else dx.view(x_shape)
    d_base = d_base.view(base_shape) if needs_base else None
    return d_base, dx, d_a.to(lora_A.dtype), d_b.to(lora_B.dtype), d_m, *(None,) * 5
