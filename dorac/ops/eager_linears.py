"""Several adapted layers of one x in eager on a GPU with kernels, as ``ops/eager.py`` computes one: one Function.

With DoRA each layer is what it is there. Without a magnitude it is plain LoRA, of which nothing of y's size is kept,
and without factors a frozen layer. What the layers have in common is done once:

- The factors A follow one another in one matrix, and so do ``h = x A^T``, its gradient, and A's: one product each.
  Factors in another dtype are cast into one buffer, by one launch; it is kept for backward.
- x is kept once, with dropout beside one mask at a bit an element: the layers of one x share the probability.
- The gradient of x is accumulated inside the products with the weights.

It takes adapters that are trained whole over frozen weights, all of them, or no training at all. Where a mode over ops
looks on in training, the same Function goes through the ops, and saves the same tensors.

Packed weights are made dense for each product; backward has the same copy for rows with a faint g where y is kept.

Legend: T tokens, I in_features, O out_features, R the ranks of all layers. A layer's tensors are, in this order,
``weight, lora_A, lora_B, magnitude, bias, weight_norm``.
"""

import dataclasses
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dorac.numerics import LARGEST_SCALING
from dorac.ops import eager, front, linear_function
from dorac.ops.eager_linears_plan import BIAS, LORA_A, LORA_B, MAGNITUDE, TENSORS, WEIGHT, Plan, make_plan
from dorac.ops.eager_linears_seen import saved_of, seen_gradients
from dorac.ops.norm import norm_factored
from dorac.ops.packed_product import Held, backward_dense, forward_dense


def dora_linears(
    x: Tensor,
    projections: Sequence[tuple],
    dropout_on: str,
    check: Callable[[], object],
    apply: Callable | None = None,
) -> tuple[Tensor, ...] | None:
    """The layers, or None if they are not to be computed here.

    Args:
        projections: each the layer's tensors, its scaling, probability of dropout, and whether y is saved.
        check: raises the error of tensors that cannot work; called once for each combination of metadata.
        apply: of whoever trains the adapters under other names (``eager_parts.py``), in the place of ``Linears.apply``.
    """
    in_ops = not front.unobserved()
    if in_ops and not front.seen_by_modes_alone():
        return None
    tensors, scalings, dropped, bits = [], [], 0.0, 0
    try:
        device = x.device
        autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
        key = [dropout_on, torch.is_grad_enabled(), autocast, type(x), x.shape, x.dtype, device, x.requires_grad]
        for projection in projections:
            *of_layer, scaling, dropout_p, save_output = projection
            if type(scaling) is not float:
                if type(scaling) is not int:
                    return None
                scaling = float(scaling)
            if not abs(scaling) <= LARGEST_SCALING or type(dropout_p) not in (float, int) or not 0 <= dropout_p < 1:
                return None
            if isinstance(of_layer[WEIGHT], tuple):  # a packed one
                of_layer[WEIGHT] = Held(of_layer[WEIGHT])
            for t in of_layer:
                if t is None:
                    key.append(None)
                elif type(t) is Held:
                    key.append(t.key)
                else:
                    key += type(t), t.shape, t.dtype, t.device, t.stride(), t.requires_grad
                    bits |= t.data_ptr()
            key += bool(save_output), bool(dropout_p)
            if dropout_p and of_layer[LORA_A] is not None:
                if dropped and dropout_p != dropped:
                    return None
                dropped = float(dropout_p)
            tensors += of_layer
            scalings.append(scaling)
        key = tuple(key)
        plan = eager.plans.get(key, False)
        x.data_ptr()
    except (AttributeError, RuntimeError, TypeError):  # no tensor, or one of no strides, symbolic sizes or no memory
        return None
    if plan is False:
        check()
        with torch._C._DisableTorchDispatch():  # a mode would see it in the first call alone
            layers = [tensors[i : i + TENSORS] for i in range(0, len(tensors), TENSORS)]
            plan = eager.keep_plan(key, make_plan(x, layers, projections, dropout_on))
    if plan is None or (in_ops and not plan.training):
        return None
    if bits & 15:  # plans are for tensors aligned to 16 bytes
        return None
    x_adapter, mask = eager._dropout(plan, x, dropped, plan.training) if dropped else (None, None)
    if x.dtype is not plan.dtype:
        x, x_adapter = x.to(plan.dtype), x_adapter if x_adapter is None else x_adapter.to(plan.dtype)
    if not plan.training:
        return _without_autocast(plan, x, x_adapter, scalings, tensors)[0]
    if in_ops:
        plan = dataclasses.replace(plan, in_ops=True)
    return (apply or _apply)(x, x_adapter, mask, 1 / (1 - dropped), scalings, plan, *tensors)


def _factors(plan: Plan, tensors: Sequence[Tensor | None]) -> tuple[list[Tensor], list[Tensor]]:
    """A and B of the adapted layers."""
    return [tensors[i * TENSORS + LORA_A] for i in plan.adapted], [tensors[i * TENSORS + LORA_B] for i in plan.adapted]


def _for_products(
    plan: Plan, factors: tuple[list[Tensor], list[Tensor]], cast: Tensor | None
) -> tuple[Tensor, Sequence[Tensor], Tensor | None]:
    """A ``[R, I]`` of all layers and B of each, in the dtype of the products; where they are cast, what holds them all.

    ``cast``: that, if it is there already.
    """
    a, b = factors
    if not plan.casts:
        return a[0] if len(a) == 1 else torch.cat(a), b, None
    there = cast is not None
    if not there and plan.in_ops:  # where a mode may keep what it saw made, nothing is written to
        cast, there = torch.cat([t.to(plan.dtype).reshape(-1) for t in (*a, *b)]), True
    elif not there:
        cast = a[0].new_empty(sum(plan.sizes), dtype=plan.dtype)
    of_a, *of_b = cast.split(plan.sizes)
    of_a = of_a.view(-1, a[0].shape[1])
    of_b = [cast_b.view(t.shape) for cast_b, t in zip(of_b, b, strict=True)]
    if not there:
        torch._foreach_copy_([*of_a.split(plan.ranks), *of_b], [*a, *b])
    return of_a, of_b, cast


def _forward(plan, x, x_adapter, scalings, tensors):
    """Every y; what holds the cast factors; h of all layers; the norms; inner in training alone, unless y is kept."""
    factors = _factors(plan, tensors)
    a, b, cast = _for_products(plan, factors, None)
    seen = x if x_adapter is None else x_adapter
    h = F.linear(seen, a)
    h_of = h.view(-1, h.shape[-1]).split(plan.ranks, 1)
    ys, norms, inners = [], [], []
    for i, layer in enumerate(plan.layers):
        weight, lora_A, lora_B, magnitude, bias, norm = tensors[i * TENSORS : (i + 1) * TENSORS]
        inner, weight = None, forward_dense(weight, plan.dtype)
        if layer.dora is None:
            y = _product(x, weight, bias)
            if layer.adapter is not None:
                y.view(-1, y.shape[-1]).addmm_(h_of[layer.adapter], b[layer.adapter].t(), alpha=scalings[i])
        else:
            if norm is None:
                norm = eager.computed_norm(layer.dora, weight, lora_A, lora_B, scalings[i])
            delta = plan.dropout_on == "adapter"
            base = F.linear(seen if delta else x, weight)
            if plan.training and not layer.keeps_y:
                inner = base
            y = base if inner is None else torch.empty_like(base)
            layer.dora.compose(
                base, h_of[layer.adapter], b[layer.adapter], magnitude, norm, scalings[i], bias, y, inner
            )
            if delta:
                y.view(-1, y.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]), weight.t())
        ys.append(y)
        norms.append(norm)
        inners.append(inner)
    return tuple(ys), cast, h, norms, inners


_without_autocast = eager.without_autocast(_forward)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x W^T + b``, no view, which autograd would not let a consumer write to."""
    if bias is None or x.dim() == 2:
        return F.linear(x, weight, bias)
    rows = torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight.t())
    return _unsafe_view(rows, (*x.shape[:-1], rows.shape[1]))


def _forward_in_ops(plan, x, x_adapter, scalings, tensors):
    """:func:`_forward`, but inner is there if y is kept, too."""
    with front.autocast_off(x):
        factors = _factors(plan, tensors)
        a, b, cast = _for_products(plan, factors, None)
        a_of = a.split(plan.ranks)
        seen = x if x_adapter is None else x_adapter
        rows, hs, norms, inners = [], [], [], []
        for i, layer in enumerate(plan.layers):
            weight, lora_A, lora_B, magnitude, bias, norm = tensors[i * TENSORS : (i + 1) * TENSORS]
            inner, h, weight = None, None, forward_dense(weight, plan.dtype)
            if layer.dora is not None:
                s = torch.full((), scalings[i], dtype=torch.float32, device=x.device)
                if norm is None:
                    norm = norm_factored(weight, lora_A, lora_B, s)
                adapter = a_of[layer.adapter], b[layer.adapter], magnitude, norm, s, bias, x_adapter
                delta = plan.dropout_on == "adapter"
                y, inner, h = linear_function.forward(x, weight, *adapter, scalings[i], "fused", True, delta, True)
            else:
                y = linear_function.rows_of(F.linear(x, weight, bias))
                if layer.adapter is not None:
                    h = linear_function.rows_of(seen) @ a_of[layer.adapter].t()
                    y = torch.addmm(y, h, b[layer.adapter].t(), alpha=scalings[i])
            rows.append(y)
            norms.append(norm)
            inners.append(inner)
            if h is not None:
                hs.append(h)
        # Nobody has these, so that y is no view, which autograd would not let a consumer write to.
        *ys, h = (_unsafe_view(t, (*x.shape[:-1], t.shape[1])) for t in (*rows, torch.cat(hs, 1)))
        inners = [t if t is None else _unsafe_view(t, (*x.shape[:-1], t.shape[1])) for t in inners]
    return tuple(ys), cast, h, norms, inners


_unsafe_view = torch.ops.aten._unsafe_view


class Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, x_adapter, mask, kept_scale, scalings, plan, *tensors):
        forward = _forward_in_ops if plan.in_ops else _without_autocast
        ys, cast, h, norms, inners = forward(plan, x, x_adapter, scalings, tensors)
        kept, ctx.probes, ctx.held = [], [], []
        for i, (layer, y) in enumerate(zip(plan.layers, ys, strict=True)):
            probe = None
            if layer.keeps_y:  # as in ops/eager.py
                probe = y.detach()
                probe.data = eager.nothing(y.dtype, y.device)
                probe = probe, probe._version
            ctx.probes.append(probe)
            weight = tensors[i * TENSORS + WEIGHT]
            held, weight = (weight, None) if type(weight) is Held else (None, weight)
            ctx.held.append(held)
            kept += weight, norms[i], y.data if layer.keeps_y else inners[i]
        trained = [
            t for i in range(0, len(tensors), TENSORS) for t in tensors[i + LORA_A : i + MAGNITUDE + 1] if t is not None
        ]
        ctx.trained = None
        if all(t.is_leaf for t in trained):  # the graph holds them in any case
            ctx.trained, ctx.versions = trained, [t._version for t in trained]
            trained = ()
        ctx.save_for_backward(x, cast, h, mask, *kept, *trained)
        ctx.set_materialize_grads(False)
        ctx.kept_scale, ctx.scalings, ctx.plan, ctx.shape = kept_scale, scalings, plan, x.shape
        ctx.bias_dtypes = [t if t is None else t.dtype for t in tensors[BIAS::TENSORS]]
        return ys

    @staticmethod
    def backward(ctx, *d_ys):
        given = next((dy for dy in d_ys if dy is not None), None)
        if given is None:
            return (None,) * len(ctx.needs_input_grad)
        if torch.is_grad_enabled() or type(given) is not Tensor or not front.unobserved():
            return seen_gradients(ctx, given, d_ys)
        if front.autocast_dtype(given) is not None:  # backward inside autocast: products stay in the layers' dtype
            with front.autocast_off(given):
                return Linears.backward(ctx, *d_ys)
        return _gradients(ctx, d_ys)


def _gradients(ctx, d_ys) -> tuple[Tensor | None, ...]:
    plan, scalings = ctx.plan, ctx.scalings
    x, cast, h, mask, kept_of, trained = saved_of(ctx)
    factors = [trained[i][0] for i in plan.adapted], [trained[i][1] for i in plan.adapted]
    a, b_of, _ = _for_products(plan, factors, cast)
    if x.dim() != 2:
        x, h = (t.reshape(-1, t.shape[-1]) for t in (x, h))
    if (mask is not None or any(ctx.probes)) and (x.data_ptr() % 16 or not x.is_contiguous()):
        x = x.clone(memory_format=torch.contiguous_format)
    h_of, d_h = h.split(plan.ranks, 1), torch.empty_like(h, memory_format=torch.contiguous_format)
    d_h_of, unread = d_h.split(plan.ranks, 1), eager.scalar(h.dtype, h.device)
    needs_x, delta, dx, later = ctx.needs_input_grad[0], plan.dropout_on == "adapter", None, []
    grads: list[Tensor | None] = [None] * (TENSORS * len(plan.layers))
    for i, (layer, dy) in enumerate(zip(plan.layers, d_ys, strict=True)):
        if dy is None:
            if layer.adapter is not None:
                d_h_of[layer.adapter].zero_()
            continue
        weight, norm, kept = kept_of[i]
        _, lora_B, magnitude = trained[i]
        adds = needs_x and (plan.dropout_on is None or (delta and layer.dora is not None))
        dense = backward_dense(weight, plan.dtype) if adds or layer.keeps_y else None
        if dy.dim() != 2:
            dy = dy.reshape(-1, dy.shape[-1])
        if ctx.bias_dtypes[i] is not None and ctx.needs_input_grad[6 + i * TENSORS + BIAS]:
            grads[i * TENSORS + BIAS] = dy.sum(0, dtype=torch.float32).to(ctx.bias_dtypes[i])
        d_base = dy
        if layer.adapter is not None:
            h_i, d_h_i, b, s = h_of[layer.adapter], d_h_of[layer.adapter], b_of[layer.adapter], scalings[i]
            if layer.dora is None:
                torch.addmm(unread, dy, b, beta=0, alpha=s, out=d_h_i)
                grads[i * TENSORS + LORA_B] = eager.wide_mm(dy.t(), h_i, lora_B.dtype).mul_(s)
            else:
                if dy.data_ptr() % 16:
                    dy = dy.clone(memory_format=torch.contiguous_format)
                of_y = layer.keeps_y
                if of_y:
                    probe, version = ctx.probes[i]
                    if probe._version != version or eager.share_memory(dy, kept):  # y is not y any more
                        kept, of_y = torch.addmm(torch.mm(x, dense.t()), h_i, b.t(), alpha=s), False
                launches = layer.dora.backward(dy.stride(), (dense.stride(), b.stride()) if of_y else ())
                others = (x, dense, b) if of_y else (None, None, None)
                d_base, d_m, d_b = eager.scaled_gradients(launches, dy, kept, magnitude, norm, h_i, s, others, lora_B)
                grads[i * TENSORS + MAGNITUDE], grads[i * TENSORS + LORA_B] = d_m, d_b
                if delta:
                    g_b = eager.scaled_b(layer.dora, b, magnitude, norm)
                    torch.addmm(unread, dy, g_b, beta=0, alpha=s, out=d_h_i)
                else:
                    torch.addmm(unread, d_base, b, beta=0, alpha=s, out=d_h_i)
        if not needs_x:
            continue
        if adds:
            dx = torch.mm(d_base, dense) if dx is None else dx.addmm_(d_base, dense)
        del dense
        if plan.dropout_on is not None:  # onto what has been dropped
            later.append((dy if delta else d_base, weight))
        del d_base, kept
    seen = x
    if mask is not None:
        seen = torch.empty_like(x)
        plan.drop(x, mask, ctx.kept_scale, seen)
    wide = max((t.dtype for t in factors[0]), key=lambda dtype: dtype.itemsize)
    for i, d_a in zip(plan.adapted, eager.wide_mm(d_h.t(), seen, wide).split(plan.ranks), strict=True):
        if d_ys[i] is not None:
            grads[i * TENSORS + LORA_A] = d_a.to(trained[i][0].dtype)
    del seen
    if needs_x:
        dx = torch.mm(d_h, a) if dx is None else dx.addmm_(d_h, a)
        if mask is not None:
            plan.drop(dx, mask, ctx.kept_scale, dx)
            for d_base, weight in later:
                dx.addmm_(d_base, backward_dense(weight, plan.dtype))
        dx = dx.view(ctx.shape)
    return dx, *(None,) * 5, *grads


# ``Linears.apply`` without its questions; see ops/eager.py.
_apply = super(torch.autograd.Function, Linears).apply
