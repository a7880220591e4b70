"""Gradients of several layers of one x in eager where they are differentiated again, or a mode is active."""

import contextlib

import torch
from torch import Tensor

from dorac.ops import eager_seen, front, linear_function, linear_leaves
from dorac.ops.eager_linears_plan import BIAS, TENSORS
from dorac.ops.packed_product import backward_dense


def saved_of(ctx) -> tuple:
    """x, what holds the cast factors, h, the mask's bits; per layer weight, norm, inner or y; its trained tensors."""
    plan, (x, cast, h, mask, *kept) = ctx.plan, ctx.saved_tensors
    kept, saved = kept[: 3 * len(plan.layers)], kept[3 * len(plan.layers) :]
    rest = iter(saved or eager_seen.unchanged(ctx))
    trained = []
    for layer in plan.layers:
        a, b = (None, None) if layer.adapter is None else (next(rest), next(rest))
        trained.append((a, b, None if layer.dora is None else next(rest)))
    kept_of = [(held or kept[3 * i], *kept[3 * i + 1 : 3 * i + 3]) for i, held in enumerate(ctx.held)]
    return x, cast, h, mask, kept_of, trained


def seen_gradients(ctx, given, d_ys) -> tuple[Tensor | None, ...]:
    """The gradients where they are differentiated again, or a mode is active; see ops/eager.py."""
    if front.autocast_dtype(given) is not None:
        with front.autocast_off(given):
            return seen_gradients(ctx, given, d_ys)
    plan, acc = ctx.plan, torch.float32
    dtype, delta, again = plan.dtype, plan.dropout_on == "adapter", torch.is_grad_enabled()
    x, _, h, mask, kept_of, trained = saved_of(ctx)
    x, h = (t.reshape(-1, t.shape[-1]) for t in (x, h))
    h_of, needs_x, dx = h.split(plan.ranks, 1), ctx.needs_input_grad[0], None
    dropped = None if mask is None else eager_seen.dropout_mask(mask, x.shape)

    def drop(rows):
        return (rows.to(acc) * dropped * ctx.kept_scale).to(dtype)

    x_adapter = None if mask is None else drop(x)
    seen = x if mask is None else x_adapter
    grads: list[Tensor | None] = []
    for i, (layer, dy) in enumerate(zip(plan.layers, d_ys, strict=True)):
        weight, norm, inner = kept_of[i]
        lora_A, lora_B, magnitude = trained[i]
        if dy is None:
            grads += (None,) * TENSORS
            continue
        weight = backward_dense(weight, dtype)
        dy = dy.reshape(-1, weight.shape[0])
        d_a = d_b = d_m = d_bias = dx_adapter = None
        needs_bias = ctx.needs_input_grad[6 + i * TENSORS + BIAS]
        if layer.adapter is not None:
            a, b, h_i = lora_A.to(dtype), lora_B.to(dtype), h_of[layer.adapter]
            scaling = torch.full((), ctx.scalings[i], dtype=acc, device=x.device)
            if again:
                h_i = seen @ a.t()
        if layer.dora is None:
            d_bias = dy.sum(0, dtype=acc).to(ctx.bias_dtypes[i]) if needs_bias else None
            d_x = dy @ weight if needs_x else None
            if layer.adapter is not None:
                d_h = linear_leaves.scaled(scaling, dy @ b)
                d_b = linear_leaves.scaled(scaling, dy.t() @ h_i)
                d_a = d_h.t() @ seen
                if needs_x:
                    low = d_h @ a
                    d_x = d_x + low if mask is None else d_x + drop(low)
        else:
            if again or layer.keeps_y:
                hides = layer.keeps_y and not again and front.seen_by_modes_alone()
                with torch._C._DisableTorchDispatch() if hides else contextlib.nullcontext():
                    base = (seen if delta else x) @ weight.t()
                    inner = (base.to(acc) + scaling * (h_i @ b.t()).to(acc)).to(dtype)
            d_x, _, d_a, d_b, d_m, d_bias, dx_adapter, _ = linear_function.gradients(
                (x, weight, a, b, magnitude, norm, scaling, h_i, inner.reshape(-1, weight.shape[0]), x_adapter),
                (needs_x, False, True, True, True, needs_bias, needs_x and mask is not None),
                (dtype, dtype, ctx.bias_dtypes[i]),
                (dy, None, None),
                number=ctx.scalings[i],
                path="fused",
                eager=True,
                dropped=mask is not None,
                delta=delta,
            )
            if dx_adapter is not None:
                d_x = d_x + drop(dx_adapter)
        dx = linear_function.added(dx, d_x)
        d_a, d_b = (None if d is None else d.to(t.dtype) for d, t in ((d_a, lora_A), (d_b, lora_B)))
        grads += None, d_a, d_b, d_m, d_bias, None
    return None if dx is None else dx.view(ctx.shape), *(None,) * 5, *grads
