"""Gradients of the eager linear layer where they are differentiated again, or a mode is active: in ops of their own."""

import contextlib

import torch
from torch import Tensor

from dorac.ops import front, linear_function


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


def dropout_mask(bits: Tensor, shape: torch.Size) -> Tensor:
    """Dropout's mask of its bits, as zeros and ones, in aten."""
    places = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (bits.unsqueeze(1) >> places).bitwise_and(1).flatten()[: shape.numel()].view(shape)


def seen_gradients(ctx, dy):
    """The gradients where they are differentiated again, or a mode is active.

    Where they are differentiated, h and inner are computed again, in aten: then every tensor is connected to what it
    was computed of.
    """
    if front.autocast_dtype(dy) is not None:
        with front.autocast_off(dy):
            return seen_gradients(ctx, dy)
    x, weight, _, _, norm, h, inner, bits, *trained = ctx.saved_tensors
    lora_A, lora_B, magnitude = trained or unchanged(ctx)
    dtype, acc, delta = ctx.plan.dtype, torch.float32, ctx.plan.dropout_on == "adapter"
    x, h, inner = (t.reshape(-1, t.shape[-1]) for t in (x, h, inner))
    if bits is not None:
        mask = dropout_mask(bits, x.shape)

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
    dx, _, d_a, d_b, d_m, d_bias, dx_adapter, _ = linear_function.gradients(
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
