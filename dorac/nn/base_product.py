"""The product of a quantised base layer, with a derivative where its library may have none."""

import torch
from torch import Tensor, nn

from dorac import packed
from dorac.ops.norm import DEFAULT_BUDGET
from dorac.ops.packed import dense_rows


class _WithDerivative(torch.autograd.Function):
    """``base``, as what it is: ``x W^T + b``; the derivative in x is ``dy W``.

    W travels as the pieces of a packed value, which :func:`dorac.packed.unflatten` puts together by ``layout``, or as a
    tensor that dequantises itself, with ``layout`` None. It is made dense in backward, for this product alone.
    """

    @staticmethod
    def forward(
        ctx, x: Tensor, bias: Tensor | None, base: Tensor, layout: tuple | None, *pieces: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(*pieces)
        ctx.layout, ctx.dtypes = layout, (x.dtype, None if bias is None else bias.dtype)
        return base.view_as(base)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple:
        pieces, dx, d_bias = ctx.saved_tensors, None, None
        of_x, of_bias = ctx.dtypes
        if ctx.needs_input_grad[0]:
            if ctx.layout is None:
                weight = pieces[0].dequantize().to(dy.dtype)
            else:
                kind, *rest = ctx.layout
                weight = dense_rows(packed.unflatten(kind, list(pieces), *rest), dy.dtype, DEFAULT_BUDGET)
            dx = (dy @ weight).to(of_x)
        if ctx.needs_input_grad[1]:
            d_bias = dy.flatten(0, -2).sum(0).to(of_bias) if dy.ndim > 1 else dy.to(of_bias)
        return dx, d_bias, None, None, *(None for _ in pieces)


def product(layer: nn.Module, holder: packed.Holder, x: Tensor) -> Tensor:
    """``layer(x)``, differentiable in x and in the layer's bias."""
    bias = layer.bias
    needed = x.requires_grad or (bias is not None and bias.requires_grad)
    if holder.differentiable or not (needed and torch.is_grad_enabled()):
        return layer(x)
    with torch.no_grad():
        base = layer(x)
    value = packed.of(layer)
    if value is None:
        return _WithDerivative.apply(x, bias, base, None, layer.weight.detach())
    kind, pieces, *rest = packed.flatten(value)
    return _WithDerivative.apply(x, bias, base, (kind, *rest), *pieces)
