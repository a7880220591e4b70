"""Several adapted linear layers as one function: projections of one input, and a whole MLP.

Each is written as the layers that it is made of. That form is traced, transformed and compiled. In eager on a GPU with
kernels ``ops/eager_linears.py`` and ``ops/eager_mlp.py`` compute each in one ``autograd.Function``.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dorac import checks, ops, packed
from dorac.functional.linear import compose, dora_over
from dorac.functional.norm import magnitude_scale, norm_factored, scaling_number, scaling_tensor
from dorac.numerics import accumulate_dtype
from dorac.ops import eager, eager_linears, eager_mlp
from dorac.ops.mlp import ACTIVATIONS
from dorac.ops.packed_product import Held, product


class Projection(NamedTuple):
    """One linear layer of a block: with DoRA, or without a magnitude plain LoRA, or without factors as it is.

    Attributes:
        weight: ``[out, in]``, frozen or not, any strides. Or packed, see :func:`dorac.packed.of`: made dense for each
            product, in forward and backward, and not kept.
        lora_A: ``[r, in]``. lora_B: ``[out, r]``. One dtype, which may differ from the weight's.
        magnitude: m, ``[out]``, any float dtype; best kept in float32. None: ``y = x W^T + s (x A^T) B^T + b``.
        bias: ``[out]``.
        weight_norm: n, ``[out]``, if it is known, from :func:`norm_factored` on the same weight, factors and scaling.
        scaling: s, a finite number or a 0-d tensor.
        dropout_p: probability with which elements of x are zeroed on the adapter's side. Projections of one x with one
            dropout_p share the mask.
        save_output: saves y for backward in place of ``x W^T + s (x A^T) B^T``, see :func:`dora_linear`.
    """

    weight: Tensor | packed.Packed
    lora_A: Tensor | None = None
    lora_B: Tensor | None = None
    magnitude: Tensor | None = None
    bias: Tensor | None = None
    weight_norm: Tensor | None = None
    scaling: float | Tensor = 1.0
    dropout_p: float = 0.0
    save_output: bool = False


def dora_linears(x: Tensor, projections: Sequence[Projection], *, dropout_on: str = "adapter") -> tuple[Tensor, ...]:
    """:func:`dora_linear` for several projections of one x, as q, k and v of attention: ``y_i = g_i * (...) + b_i``.

    Args:
        x: ``[*, in]``, the dtype of the weights (under autocast any float dtype).
        projections: at least one, each with its own rank, scaling, dtype and bias.
        dropout_on: "adapter" or "low_rank", see :func:`dora_linear`.

    Returns:
        ``[*, out_i]`` each. Gradients as :func:`dora_linear`'s; that of x is the sum over the projections.

    Raises:
        TypeError, ValueError: what :func:`dora_linear` raises, with the number of the projection; no projection.

    Source: arXiv 2402.09353, equation 5 with the norm of section 4.3, for each projection.
    """
    checks.check_dropout_on(dropout_on)
    projections = tuple(projections)
    if not projections:
        raise ValueError("projections must hold at least one, got none")

    def check() -> tuple[Projection, ...]:
        return checked_linears(x, projections)

    ys = _in_eager(x, projections, dropout_on, check)
    return _composed(x, check(), dropout_on) if ys is None else ys


def dora_mlp(
    x: Tensor,
    gate: Projection | None,
    up: Projection,
    down: Projection,
    *,
    activation: str = "silu",
    dropout_on: str = "adapter",
) -> Tensor:
    """An MLP of adapted layers: ``y = down(activation(gate(x)) * up(x))``, without a gate ``down(activation(up(x)))``.

    Args:
        x: ``[*, in]``, the dtype of the weights (under autocast any float dtype).
        gate, up: ``[inner, in]`` weights. down: ``[out, inner]``. Each as :func:`dora_linears` takes it; ``gate`` and
            ``up`` share x and a mask of dropout, down's input has its own.
        activation: "silu" (SwiGLU), "gelu" (by erf), "gelu_tanh" or "relu".
        dropout_on: "adapter" or "low_rank", see :func:`dora_linear`.

    Returns:
        ``[*, out]``. Gradients as :func:`dora_linear`'s.

    Raises:
        TypeError, ValueError: what :func:`dora_linear` raises, with the projection's name; another activation; sizes
            of gate, up and down that do not fit.

    Source: arXiv 2402.09353, equation 5 with the norm of section 4.3; gated MLPs: arXiv 2002.05202.
    """
    checks.check_dropout_on(dropout_on)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(map(repr, ACTIVATIONS))}, got {activation!r}")

    def check() -> tuple[Projection | None, Projection, Projection]:
        return checked_mlp(x, gate, up, down)

    layers = (up, down) if gate is None else (gate, up, down)
    if not torch.compiler.is_compiling() and all(type(p) is Projection for p in layers):
        y = eager_mlp.dora_mlp(x, gate, up, down, activation, check)
        if y is not None:
            return y
    gate, up, down = check()
    act = ACTIVATIONS[activation]
    if gate is None:
        inner = act(*_project(x, (up,), dropout_on))
    else:
        gated, inner = _project(x, (gate, up), dropout_on)
        inner = act(gated) * inner
    return _project(inner, (down,), dropout_on)[0]


def checked_linears(x: Tensor, projections: Sequence[Projection]) -> tuple[Projection, ...]:
    return tuple(_checked(x, p, f"projections[{i}]") for i, p in enumerate(projections))


def checked_mlp(
    x: Tensor, gate: Projection | None, up: Projection, down: Projection
) -> tuple[Projection | None, Projection, Projection]:
    up = _checked(x, up, "up")
    features = up.weight.shape[0]
    if gate is not None:
        gate = _checked(x, gate, "gate")
        if gate.weight.shape[0] != features:
            raise ValueError(
                f"gate and up must have as many outputs as each other, got {gate.weight.shape[0]} and {features}"
            )
    # Stands for down's input, of which the checks read metadata only: no memory, and no op that a mode would save.
    between = x[..., :1] if x.shape[-1] else x.new_zeros(*x.shape[:-1], 1)
    return gate, up, _checked(between.expand(*x.shape[:-1], features), down, "down")


def _checked(x: Tensor, projection: Projection, name: str) -> Projection:
    """The projection as the formula takes it; errors carry its name, but those of x by itself."""
    checks.check_float("x", x)
    if not isinstance(projection, Projection):
        raise TypeError(f"{name} must be a Projection, got {type(projection).__name__}")
    if type(projection.weight) is Held:
        projection = projection._replace(weight=projection.weight.weight)
    try:
        scaling = checks.check_scaling(projection.scaling)
        dropout_p = checks.check_dropout(projection.dropout_p)
        checks.check_projection(x, *projection[:6])
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error.args[0]}") from None
    return projection._replace(scaling=scaling, dropout_p=dropout_p)


def _in_eager(
    x: Tensor, projections: tuple[Projection, ...], dropout_on: str, check: Callable[[], object]
) -> tuple[Tensor, ...] | None:
    if torch.compiler.is_compiling() or not all(type(p) is Projection for p in projections):
        return None
    return eager_linears.dora_linears(x, projections, dropout_on, check)


def _project(x: Tensor, projections: tuple[Projection, ...], dropout_on: str) -> tuple[Tensor, ...]:
    """Projections that have been checked."""
    ys = _in_eager(x, projections, dropout_on, lambda: None)
    return _composed(x, projections, dropout_on) if ys is None else ys


def _composed(x: Tensor, projections: tuple[Projection, ...], dropout_on: str) -> tuple[Tensor, ...]:
    dropped: dict[float, Tensor] = {}
    for p in projections:
        if p.dropout_p and p.lora_A is not None and p.dropout_p not in dropped:
            dropped[p.dropout_p] = F.dropout(x, p.dropout_p)
    return tuple(_projected(x, p, dropped.get(p.dropout_p), dropout_on) for p in projections)


def _projected(x: Tensor, p: Projection, x_adapter: Tensor | None, dropout_on: str) -> Tensor:
    if packed.is_packed(p.weight):
        return _over_packed(x, p, x_adapter, dropout_on)
    if p.lora_A is None:
        return F.linear(x, p.weight, p.bias)
    in_eager = not torch.compiler.is_compiling() and not isinstance(p.scaling, Tensor)
    if in_eager and x_adapter is None and p.magnitude is not None:  # one layer's own path
        y = eager.dora_linear(x, *p[:6], float(p.scaling), save_output=bool(p.save_output))
        if y is not None:
            return y
    dtype = accumulate_dtype(p.weight, p.lora_A, p.lora_B)
    s = scaling_tensor(p.scaling, p.weight, dtype)
    magnitude, norm = p.magnitude, p.weight_norm
    if magnitude is None:  # g = 1
        magnitude = norm = p.weight.new_ones(p.weight.shape[0], dtype=dtype)
    elif norm is None:
        norm = norm_factored(p.weight, p.lora_A, p.lora_B, s)
    tensors = x, p.weight, p.lora_A, p.lora_B, magnitude, norm, s, p.bias, scaling_number(p.scaling)
    if x_adapter is None:
        return ops.linear.dora_linear(*tensors)
    return ops.linear.dora_linear(*tensors, x_adapter, dropout_on == "low_rank" or p.magnitude is None)


def _over_packed(x: Tensor, p: Projection, x_adapter: Tensor | None, dropout_on: str) -> Tensor:
    base, magnitude, norm = product(x, p.weight), p.magnitude, p.weight_norm
    if p.lora_A is None:
        return base if p.bias is None else base + p.bias.to(base.dtype)
    if magnitude is None:  # g = 1
        magnitude = norm = base.new_ones(p.weight.shape[0], dtype=accumulate_dtype(base, p.lora_A))
    elif norm is None:
        norm = norm_factored(p.weight, p.lora_A, p.lora_B, p.scaling)
    if x_adapter is None or dropout_on == "low_rank" or p.magnitude is None:
        seen = x if x_adapter is None else x_adapter
        adapter = p.lora_A, p.lora_B, magnitude, p.bias
        return dora_over(base, seen, *adapter, weight_norm=norm, scaling=p.scaling)
    low = x_adapter if torch.is_autocast_enabled(x.device.type) else x_adapter.to(p.lora_A.dtype)
    lora = F.linear(F.linear(low, p.lora_A), p.lora_B)
    g = magnitude_scale(magnitude, norm)
    y = base + compose(product(x_adapter, p.weight), lora, g, p.scaling, delta=True)
    return y if p.bias is None else y + p.bias.to(y.dtype)
