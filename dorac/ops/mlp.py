"""The parts of ``ops/eager_mlp.py`` in ops that modes see, and that can be differentiated again.

Legend: as there.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dorac.numerics import ZERO_ROW_NORM
from dorac.ops import linear, linear_function
from dorac.ops.compose import magnitude_scale
from dorac.ops.norm import norm_factored

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda t: F.gelu(t, approximate="tanh"),
    "relu": F.relu,
}


def scaled(inner: Tensor, magnitude: Tensor | None, norm: Tensor | None, bias: Tensor | None) -> Tensor:
    """``g * inner + b`` in float32."""
    y = inner.to(torch.float32)
    if magnitude is not None:
        y = magnitude_scale(magnitude, norm) * y
    return y if bias is None else y + bias.to(torch.float32)


def joined(activation: str, gated: Tensor | None, up: Tensor) -> Tensor:
    """``z = act(gate) * up``, without a gate ``act(up)``."""
    act = ACTIVATIONS[activation]
    return act(up) if gated is None else act(gated) * up


def layer_forward(rows, layer, a, b, scaling):
    """y, norm, h and inner of a layer, which may not be there."""
    weight, lora_A, lora_B, magnitude, bias, norm = layer
    if weight is None:
        return None, None, None, None
    if magnitude is None:
        inner, h = rows @ weight.t(), None
        if a is not None and a.numel():
            h = rows @ a.t()
            inner = torch.addmm(inner, h, b.t(), alpha=scaling)
        return inner if bias is None else inner + bias.to(inner.dtype), None, h, inner
    s = torch.full((), scaling, dtype=torch.float32, device=rows.device)
    if norm is None:
        norm = norm_factored(weight, lora_A, lora_B, s)
    y, inner, h = linear_function.forward(
        rows, weight, a, b, magnitude, norm, s, bias, None, scaling, "fused", True, False, True
    )
    return y, norm, h, inner


def join_backward(
    activation: str,
    layers: Sequence[Sequence[Tensor | None]],
    inners: Sequence[Tensor | None],
    dz: Tensor,
    needs_bias: Sequence[bool],
) -> tuple[Tensor, list[tuple[Tensor | None, ...]]]:
    """z; of gate and up the gradients of the product, the magnitude and the bias."""
    gated, up = leaves = [
        None if inner is None else scaled(inner, magnitude, norm, bias).detach().requires_grad_()
        for inner, (_, _, _, magnitude, bias, norm) in zip(inners, layers, strict=True)
    ]
    with torch.enable_grad():
        z = joined(activation, gated, up)
    d_of = iter(torch.autograd.grad(z, [t for t in leaves if t is not None], dz.to(torch.float32)))
    result = []
    for inner, (_, _, _, magnitude, bias, norm), needed in zip(inners, layers, needs_bias, strict=True):
        d_base = d_m = d_bias = None
        if inner is not None:
            d = next(d_of)
            d_bias = d.sum(0).to(bias.dtype) if needed else None
            if magnitude is not None:
                d_m = magnitude_scale((d * inner.to(torch.float32)).sum(0), norm)
                d_m = torch.where(norm <= ZERO_ROW_NORM, 0.0, d_m).to(magnitude.dtype)
                d = magnitude_scale(magnitude, norm) * d
            d_base = d.to(inner.dtype)
        result.append((d_base, d_m, d_bias))
    return z.detach().to(dz.dtype), result


def layer(dtype: torch.dtype, x: Tensor, tensors: Sequence[Tensor | None], scaling: float) -> Tensor:
    """A layer, connected to all that it is made of."""
    weight, lora_A, lora_B, magnitude, bias, norm = tensors
    if magnitude is None:
        y = F.linear(x, weight, None if bias is None else bias.to(dtype))
        if lora_A is None:
            return y
        return y + scaling * F.linear(F.linear(x, lora_A.to(dtype)), lora_B.to(dtype))
    s = torch.full((), scaling, dtype=torch.float32, device=x.device)
    factors = lora_A.to(dtype), lora_B.to(dtype)
    return linear.dora_linear(x, weight, *factors, magnitude, norm, s, bias, scaling)
