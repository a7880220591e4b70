"""``dorac::dora_linear``: the adapted layer ``y = g * (x W^T + s (x lora_A^T) lora_B^T) + b``, ``g = m / n``, n given.

Registration. As ``dorac::compose``: a CompositeImplicitAutograd op whose body applies an ``autograd.Function`` over
leaf ops in eager and under the compiler, and the plain formula under ``torch.func``, forward-mode AD, export and for
tensor subclasses. The whole layer is one Function, because its cheapest form crosses the borders between its parts:

- the product that makes ``inner = x W^T + s h lora_B^T`` starts from the low-rank part and accumulates the large
  product onto it inside the GEMM (``low_rank_linear``): no pass over the activations of its own. The gradient of x is
  the same op on ``g * dy``;
- g is applied in aten under the compiler, which fuses it into the consumer of y, keeps ``inner`` alone for backward
  and recomputes y; in eager it is one kernel (``scale``);
- backward makes ``d_inner = g * dy`` and the magnitude's gradient in one pass (``scale_backward``), together with
  lora_B's gradient (``lora_b_backward``); d_inner serves base and low-rank branch both.

Dropout comes as a second activation, ``x_adapter = dropout(x)``, of which the op knows no more: masks are torch's.
With ``low_rank`` it is what the low-rank branch sees, ``h = x_adapter lora_A^T``, and nothing else changes. Without,
it is what the whole change sees that DoRA makes to the frozen layer (PEFT's meaning): ``y = x W^T + b + (g - 1)
x_adapter W^T + g s h lora_B^T``. That takes a second product with W in either direction. One kernel makes the change,
and the other product is accumulated onto it (``delta_linear``). In backward ``d_h = s dy (g lora_B)``, so that g * dy
is not written beside (g - 1) * dy.

The first form rounds to the activation's dtype three times (the low-rank product, inner, y) where the others round
inner for backward alone; the mean error of the layer stays at two thirds to nine tenths of stock PEFT's.

:func:`route` is the table of which form is taken where, from the benchmarks of layers and stacks at ranks 16 and 384
in ``dorac/bench/results``; ``python -m dorac.bench tune --kernels form stack-form`` prints the forms side by side.

Of DTensors each rank takes its shards through the same body (``ops/sharded.py``).

A layer of experts (every tensor with a leading E) is the formula in aten: batched products, and g per expert and row.

Legend: T tokens, I in_features, O out_features, R rank. x is [*, I], the leaves' [T, I].
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dorac.numerics import accumulate_dtype
from dorac.ops import front, sharded
from dorac.ops.compose import (
    DECODE,
    compose_aten,
    finite_part,
    magnitude_scale,
    reshaped,
    takes_bias,
)
from dorac.ops.horizontal import cast
from dorac.ops.library import register_composite
from dorac.ops.linear_function import DoraLinear, forward, rows_of_each


def linear_aten(x, weight, lora_A, lora_B, magnitude, weight_norm, scaling, bias, x_adapter=None, low_rank=False):
    """The formula in plain differentiable aten."""
    seen = x if x_adapter is None else x_adapter
    lora = F.linear(F.linear(seen.to(lora_A.dtype), lora_A), lora_B)
    g = magnitude_scale(magnitude, weight_norm)
    if x_adapter is not None and not low_rank:
        change = compose_aten(F.linear(x_adapter, weight), lora, g, scaling, None, True)
        return F.linear(x, weight, bias) + change
    holds_bias = takes_bias(x, bias) and not sharded.any_sharded(x, weight)
    base = F.linear(x, weight, finite_part(bias) if holds_bias else None)
    return compose_aten(base, lora, g, scaling, bias, False, holds_bias)


def experts_aten(x, weight, lora_A, lora_B, magnitude, weight_norm, scaling, bias, x_adapter=None, low_rank=False):
    """The formula with a leading dimension of experts on every tensor."""
    rows = rows_of_each(x)
    adapter_rows = rows if x_adapter is None else rows_of_each(x_adapter)
    g = magnitude_scale(magnitude, weight_norm).unsqueeze(1)
    bias = None if bias is None else bias.unsqueeze(1)
    lora = adapter_rows.to(lora_A.dtype) @ lora_A.mT @ lora_B.mT
    base = rows @ weight.mT
    if x_adapter is None or low_rank:
        y = compose_aten(base, lora, g, scaling, bias, False)
    else:
        y = base if bias is None else base + bias
        y = y + compose_aten(adapter_rows @ weight.mT, lora, g, scaling, None, True)
    return y.reshape(*x.shape[:-1], weight.shape[1])


def route(x: Tensor, lora_A: Tensor, *, training: bool, traced: bool, delta: bool = False) -> str:
    """Which form the layer takes.

    - "accumulate": the low-rank part first, the large product accumulated onto it, then g;
    - "fused": the large product first, then up-projection and g in one kernel;
    - "separate": three products and compose: where there are no kernels, or none for these dtypes, and at decode.

    With dropout in PEFT's meaning (``delta``), "fused" is ``delta_linear``, and nothing can be accumulated.

    In eager, and in a compiled layer by itself, "fused" is the cheapest, 1 to 7 percent below "accumulate" (ranks 8 to
    384, 256 and 4096 tokens). In a compiled stack the consumer of y applies g, and "accumulate" is (ranks 16 to 384);
    of few tokens launches are the price, of which "fused" has two less.
    """
    if not front.has_kernels(x, lora_A):
        return "separate"
    if delta or x.dtype is not lora_A.dtype:
        # Half-precision activations: the kernel keeps the precision of wider factors. It has no float32 activations.
        return "fused" if x.dtype.itemsize == 2 else "separate"
    if x.dtype is torch.float32:
        return "accumulate"  # without tensor cores the kernel's product is no match for cuBLAS
    tokens = math.prod(x.shape[:-1])
    few = front.at_most(tokens, 64)
    if traced and not few:
        return "accumulate"
    if traced and not training and front.at_most(tokens, DECODE):
        return "separate"
    return "fused"


def _on_shards(x, weight, lora_A, lora_B, magnitude, weight_norm, scaling, bias, x_adapter, low_rank, number):
    """The layer of each rank's shards of DTensors; aten on the DTensors where that is not all a rank needs."""
    layout = sharded.linear_layout(x, weight)
    if layout is None:
        return linear_aten(x, weight, lora_A, lora_B, magnitude, weight_norm, scaling, bias, x_adapter, low_rank)
    added_once = None
    if bias is not None and any(p.is_partial() for p in layout.y):
        bias, added_once = None, bias  # to the sum of what the ranks compute
    of_lora_A, of_rows = sharded.layouts(weight)
    lora_B, magnitude, weight_norm, bias = (
        None if t is None else sharded.to_shard(t, of_rows, layout.d_rows)
        for t in (lora_B, magnitude, weight_norm, bias)
    )
    y = _dora_linear(
        sharded.to_shard(x, x.placements, layout.d_x),
        sharded.to_shard(weight, weight.placements, layout.d_weight),
        sharded.to_shard(lora_A, of_lora_A, layout.d_lora_A),
        lora_B,
        magnitude,
        weight_norm,
        sharded.whole(scaling),
        bias,
        number,
        None if x_adapter is None else sharded.to_shard(x_adapter, x.placements, layout.d_x),
        low_rank,
    )
    shape = torch.Size((*x.shape[:-1], weight.shape[0]))
    y = sharded.from_shard(y, weight.device_mesh, layout.y, shape)
    return y if added_once is None else y + added_once.to(y.dtype)


def _dora_linear(
    x,
    weight,
    lora_A,
    lora_B,
    magnitude,
    weight_norm,
    scaling,
    bias=None,
    number=None,
    x_adapter=None,
    low_rank=False,
    group=None,
):
    """``number``: the scaling again where it is known as one (not in a graph for every scaling).

    ``group``: see ``nn/behind_sum.py``, which knows when that may be given.
    """
    if sharded.any_sharded(x, weight, lora_A, lora_B, magnitude, weight_norm, bias):
        vectors = {"magnitude": magnitude, "weight_norm": weight_norm, "bias": bias}
        sharded.check_sharded(x=x, weight=weight, lora_A=lora_A, lora_B=lora_B, **vectors)
    if (dtype := front.autocast_dtype(x)) is not None:  # which leaves float64 alone
        x, weight, x_adapter = (
            t if t is None or t.dtype is torch.float64 else t.to(dtype) for t in (x, weight, x_adapter)
        )
        lora_A, lora_B = (t if t.dtype is torch.float64 else cast(t, dtype) for t in (lora_A, lora_B))
    with front.autocast_off(x):
        tensors = (x, weight, lora_A, lora_B, magnitude, weight_norm, scaling, bias, x_adapter)
        if weight.ndim == 3:
            return experts_aten(*tensors, low_rank)
        on_shards = sharded.any_sharded(weight)
        in_aten = front.under_transform() or front.exporting() or scaling.requires_grad
        if in_aten or not (on_shards or front.all_plain(*tensors)):
            assert group is None, "aten has no sum over ranks"
            return linear_aten(*tensors, low_rank)
        if weight_norm.requires_grad and torch.is_grad_enabled():
            # g = m / n = (m * n0 / n) / n0 for the constant n0 = n: the gradient of m * n0 / n reaches n, too.
            constant = weight_norm.detach()
            wide = magnitude.to(accumulate_dtype(magnitude, weight_norm))
            magnitude, weight_norm = wide * magnitude_scale(constant, weight_norm), constant
            tensors = (x, weight, lora_A, lora_B, magnitude, weight_norm, scaling, bias, x_adapter)
        if on_shards:
            return _on_shards(*tensors, low_rank, number)
        eager = front.all_eager(*tensors)
        training = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
        delta = x_adapter is not None and not low_rank
        path = route(x, lora_A, training=training, traced=not eager, delta=delta) if group is None else "accumulate"
        arguments = (*tensors, number, path, eager, delta)
        y = DoraLinear.apply(*arguments, group)[0] if training else forward(*arguments, False, group)[0]
        return reshaped(y, (*x.shape[:-1], weight.shape[0]))


dora_linear = register_composite(
    "dora_linear(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor magnitude, Tensor weight_norm, "
    "Tensor scaling, Tensor? bias=None, float? number=None, Tensor? x_adapter=None, bool low_rank=False, "
    "str? group=None) -> Tensor",
    _dora_linear,
)
