"""Rows by expert on the CPU: slices of rows, each expert's products where their results belong, nothing in between.

What a layer costs beside plain LoRA's is one pass over ``inner`` for y, and over dy one for ``g * dy`` and one for the
magnitude's gradient, slice by slice and so mostly in cache. For float32 and float64 tensors of one dtype; the others'
sums are wider than they are, which ``ops/grouped_compose.py`` sees to.

Legend: S rows, E experts, I in_features, O out_features, R rank.
"""

import torch
from torch import Tensor

from dorac.numerics import ZERO_ROW_NORM
from dorac.ops.grouped import groups


def takes(x: Tensor, *others: Tensor | None) -> bool:
    """Whether tensors on the CPU are computed here."""
    one_dtype = all(t is None or t.dtype is x.dtype for t in others)
    return x.device.type == "cpu" and one_dtype and x.dtype in (torch.float32, torch.float64)


def _scalings(scaling: float | Tensor, experts: int) -> list[float]:
    if isinstance(scaling, Tensor):
        scaling = scaling.tolist()
    return scaling if isinstance(scaling, list) else [scaling] * experts


def forward(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    bias: Tensor | None,
    norm: Tensor,
    offsets: Tensor,
    scaling: float | Tensor,
    training: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``(y, h, inner)``; without ``training`` y lies where inner did."""
    counts, s = _counts(offsets, x.shape[0]), _scalings(scaling, len(offsets))
    inner, h = x.new_empty(x.shape[0], weight.shape[1]), x.new_empty(x.shape[0], lora_A.shape[1])
    y = torch.empty_like(inner) if training else inner
    experts = weight, lora_A, lora_B, _per_norm(magnitude, norm, 1.0)
    slices = zip(*(t.split_with_sizes(counts) for t in (x, h, inner, y)), strict=True)
    layers = zip(*(t.unbind() for t in experts), s, [None] * len(s) if bias is None else bias.unbind(), strict=True)
    for (x_e, h_e, inner_e, y_e), (w, a, b, g, s_e, bias_e) in zip(slices, layers, strict=False):  # the tail is left
        if not len(x_e):
            continue
        torch.mm(x_e, w.t(), out=inner_e)
        torch.mm(x_e, a.t(), out=h_e)
        inner_e.addmm_(h_e, b.t(), alpha=s_e)
        if bias_e is None:
            torch.mul(inner_e, g, out=y_e)
        else:
            torch.addcmul(bias_e, inner_e, g, out=y_e)
    _zero_tail(counts, y, inner, h)
    return y, h, inner if training else None


def _per_norm(vectors: Tensor, norm: Tensor, of_zero_rows: float) -> Tensor:
    return (vectors / norm).masked_fill_(norm <= ZERO_ROW_NORM, of_zero_rows)


def _counts(offsets: Tensor, rows: int) -> list[int]:
    """How many rows each expert has, and the tail."""
    counts, end = [0] * (len(offsets) + 1), 0
    for e, of_e in groups(offsets, rows):
        counts[e], end = of_e.stop - of_e.start, of_e.stop
    counts[-1] = rows - end
    return counts


def _zero_tail(counts: list[int], *tensors: Tensor) -> None:
    if counts[-1]:
        for t in tensors:
            t[-counts[-1] :].zero_()


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    norm: Tensor,
    offsets: Tensor,
    h: Tensor,
    inner: Tensor,
    scaling: float | Tensor,
    *,
    needs_x: bool,
    needs_bias: bool,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor, Tensor | None]:
    """The gradients of x, lora_A, lora_B, magnitude and bias."""
    counts, s = _counts(offsets, x.shape[0]), _scalings(scaling, len(offsets))
    g = _per_norm(magnitude, norm, 1.0)
    dx = torch.empty_like(x, memory_format=torch.contiguous_format) if needs_x else None
    d_a, d_b, d_g = torch.zeros_like(lora_A), torch.zeros_like(lora_B), torch.zeros_like(g)
    d_bias = torch.zeros_like(g) if needs_bias else None
    unread = x.new_empty(())
    slices = zip(*(t.split_with_sizes(counts) for t in (x, h, dy, inner, x if dx is None else dx)), strict=True)
    layers = zip(*(t.unbind() for t in (weight, lora_A, lora_B, g, d_a, d_b, d_g)), s, strict=True)
    of_rows = zip(slices, layers, strict=False)  # the tail is left
    for e, ((x_e, h_e, dy_e, inner_e, dx_e), (w, a, b, g_e, d_a_e, d_b_e, d_g_e, s_e)) in enumerate(of_rows):
        if not len(x_e):
            continue
        torch.sum(dy_e * inner_e, 0, out=d_g_e)
        d_inner = g_e * dy_e
        d_h = torch.addmm(unread, d_inner, b, beta=0, alpha=s_e)
        torch.addmm(unread, d_inner.t(), h_e, beta=0, alpha=s_e, out=d_b_e)
        torch.mm(d_h.t(), x_e, out=d_a_e)
        if dx is not None:
            torch.mm(d_inner, w, out=dx_e).addmm_(d_h, a)
        if d_bias is not None:
            torch.sum(dy_e, 0, out=d_bias[e])
    if dx is not None:
        _zero_tail(counts, dx)
    return dx, d_a, d_b, _per_norm(d_g, norm, 0.0), d_bias  # none reaches m of zero rows, whose g is the constant 1
