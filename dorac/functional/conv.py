"""Convolutions of one, two and three dimensions: one implementation, on matrix views of the filters.

Legend: ``in``, ``out`` channels, ``r`` the rank, ``G`` groups, ``k...`` the kernel's dimensions, one, two or three.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dorac import checks, ops
from dorac.functional.linear import compose
from dorac.functional.norm import magnitude_scale, norm_factored, scaling_tensor
from dorac.numerics import ZERO_ROW_NORM, accumulate_dtype
from dorac.ops import front
from dorac.ops.compose import finite_part, takes_bias
from dorac.ops.norm import DEFAULT_BUDGET

_CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


def spans_groups(weight: Tensor, lora_A: Tensor) -> bool:
    """Whether lora_A sees all input channels of a grouped convolution (PEFT's layout), not those of a group alone."""
    return lora_A.shape[1] != weight.shape[1]


def conv_matrices(weight: Tensor, lora_A: Tensor, lora_B: Tensor, groups: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """The filters as the matrices that :func:`norm_factored`, :func:`merge_weight` and :func:`unmerge_weight` take.

    Views of the arguments, also of channels-last ones: the rows of a weight that is not contiguous are ``[k..., in]``,
    those of lora_A then too.

    Args: as in :func:`norm_factored_conv`.

    Returns:
        ``[out, in * k]``, ``[r, in * k]`` and ``[out, r]``; with G groups a batch of matrices ``[G, out/G, in/G * k]``,
        ``[G, r/G, in/G * k]`` and ``[G, out/G, r/G]``. Of a lora_A that sees all input channels, the part that meets
        the channels of its own group.

    Raises:
        TypeError, ValueError: as in :func:`norm_factored_conv`.
    """
    checks.check_conv_factors(weight, lora_A, lora_B, groups)
    channels_last = not weight.is_contiguous()

    def grouped(tensor: Tensor) -> Tensor:
        tensor = tensor.movedim(1, -1) if channels_last else tensor
        return tensor.flatten(1) if groups == 1 else tensor.unflatten(0, (groups, -1)).flatten(2)

    if groups > 1 and spans_groups(weight, lora_A):
        # Ranks of group i by channels of group j: those with i = j.
        blocks = lora_A.unflatten(1, (groups, -1)).unflatten(0, (groups, -1)).diagonal(dim1=0, dim2=2)
        lora_A = blocks.movedim(-1, 0).flatten(0, 1)
    return grouped(weight), grouped(lora_A), grouped(lora_B)


def _square_outside(lora_A: Tensor, lora_B: Tensor, scaling: Tensor, groups: int, budget: int) -> Tensor:
    """``s^2 ||(BA)_o||^2`` over the channels outside of the group of output o, ``[out]`` in float64.

    From the Gram matrix of each group's rows of lora_A, [r/G, r/G]. Where the products of the factors nearly cancel, a
    square root keeps half of the digits of the sum under it: in float64, as many as float32 products have.
    """
    a = lora_A.unflatten(0, (groups, -1)).unflatten(2, (groups, -1)).flatten(3)  # [G, r/G, G, in/G * k]
    own = torch.eye(groups, dtype=torch.bool, device=a.device)[:, None, :, None]
    step = max(1, budget // (2 * 8 * (a.numel() // groups)))
    grams = []
    for i in range(0, groups, step):
        rows = a[i : i + step].double().masked_fill(own[i : i + step], 0).flatten(2)
        grams.append(rows @ rows.mT)
    b = scaling * lora_B.double().flatten(1).unflatten(0, (groups, -1))
    return ((b @ torch.cat(grams)) * b).sum(-1).clamp_min(0).flatten()


def norm_factored_conv(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: float | Tensor,
    *,
    groups: int = 1,
    norm_grad: bool = False,
    budget: int = DEFAULT_BUDGET,
) -> Tensor:
    """The L2 norm of each output channel's adapted filter, without the product of the factors.

    Output channel o of group j has, among all input channels, the filter

        V_o = W_o + s * sum_rho B[o, rho] A_rho        W_o is zero but on I_j, the channels of group j

    where rho runs over the r/G ranks of group j, because lora_B is applied with groups. With lora_A in the grouped
    layout, A_rho is zero outside of I_j as well: V is block-diagonal as W is, and its norm that of G matrices. In
    PEFT's layout A_rho sees every channel, and so does V_o. I_j and the rest are disjoint, hence

        n_o^2 = ||W_o + s (BA)_o||^2 on I_j  +  s^2 ||(BA)_o||^2 on the rest

    The first term is :func:`norm_factored`'s. The second is ``s^2 B_o C_j B_o^T`` with the Gram matrix
    ``C_j = A A^T`` of the group's ranks over the rest of the channels: positive semidefinite, summed over those
    channels alone instead of as a difference, so that nothing of W or of I_j cancels in it.

    Args:
        weight: ``[out, in/G, k...]``, float16 / bfloat16 / float32 / float64, any memory format; a contiguous or
            channels-last one is not copied.
        lora_A: ``[r, in/G, k...]`` (grouped) or ``[r, in, k...]`` (as PEFT has it); the same if there is one group.
        lora_B: ``[out, r/G, 1...]``, the dtype of ``lora_A``.
        scaling: s, a finite number or a 0-d tensor.
        groups: G, of the base layer.
        norm_grad: whether the norm carries its gradient, see :func:`norm_factored`. In PEFT's layout a filter that is
            zero on its own group alone has a constant first term: its first derivatives are right, later ones not.
        budget: bytes for the buffers, see :func:`norm_factored`; PEFT's layout takes the rows of one group of lora_A
            in float64, however small the budget.

    Returns:
        ``[out]``, float32 (float64 if any input is float64). No gradient flows through it (paper, section 4.3) unless
        ``norm_grad`` asks for it.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit; channels or a rank that ``groups`` does not
            divide; a ``norm_grad`` that is not a bool.
    """
    scaling = checks.check_scaling(scaling)
    budget = checks.check_budget(budget)
    matrices = conv_matrices(weight, lora_A, lora_B, groups)
    norm = norm_factored(*matrices, scaling, norm_grad=norm_grad, budget=budget).flatten()
    if groups == 1 or not spans_groups(weight, lora_A):
        return norm
    factors = lora_A, lora_B, scaling_tensor(scaling, weight, torch.float64)
    outside = _square_outside(*(factors if norm_grad else (t.detach() for t in factors)), groups, budget)
    square = norm.double().square() + outside
    square = torch.where(square.isnan(), torch.inf, square)
    zero_row = square <= ZERO_ROW_NORM**2  # without a derivative
    return torch.where(zero_row, square.detach(), torch.where(zero_row, 1.0, square)).sqrt().to(norm.dtype)


def _per_dimension(value: int | Sequence[int], dimensions: int) -> tuple[int, ...]:
    return (value,) * dimensions if isinstance(value, int) else tuple(value)


def _border(
    padding: int | Sequence[int] | str, kernel: Sequence[int], dilation: Sequence[int]
) -> list[tuple[int, int]]:
    """What ``padding`` adds before and after each dimension, as ``nn.Conv`` counts it."""
    if padding == "valid":
        return [(0, 0)] * len(kernel)
    if padding == "same":
        totals = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
        return [(total // 2, total - total // 2) for total in totals]
    return [(p, p) for p in _per_dimension(padding, len(kernel))]


def _layer(dimensions: int, doc: str):
    """``dora_conv1d``, ``2d`` or ``3d``, whose signature is stated here, once."""
    axes = "DHW"[-dimensions:]

    def dora_conv(
        x: Tensor,
        weight: Tensor,
        lora_A: Tensor,
        lora_B: Tensor,
        magnitude: Tensor,
        bias: Tensor | None = None,
        *,
        scaling: float | Tensor,
        stride: int | Sequence[int] = 1,
        padding: int | Sequence[int] | str = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        padding_mode: str = "zeros",
        weight_norm: Tensor | None = None,
        norm_grad: bool = False,
        dropout_p: float = 0.0,
        dropout_on: str = "adapter",
        budget: int = DEFAULT_BUDGET,
    ) -> Tensor:
        dimensions = len(axes)  # a number of the closure would be symbolic under dynamic=True
        checks.check_conv(dimensions, x, weight, lora_A, lora_B, magnitude, bias, weight_norm, groups)
        checks.check_geometry(dimensions, stride, padding, dilation, padding_mode)
        stride, dilation = _per_dimension(stride, dimensions), _per_dimension(dilation, dimensions)
        border = _border(padding, weight.shape[2:], dilation)
        checks.check_extent(x, weight, border, dilation, padding_mode)
        scaling = checks.check_scaling(scaling)
        dropout_p = checks.check_dropout(dropout_p)
        checks.check_dropout_on(dropout_on)
        budget = checks.check_budget(budget)
        checks.check_norm_grad(norm_grad, weight_norm)

        conv = _CONV[dimensions]
        s = scaling_tensor(scaling, weight, accumulate_dtype(weight, lora_A, lora_B))
        if weight_norm is None:
            weight_norm = norm_factored_conv(
                weight, lora_A, lora_B, s, groups=groups, norm_grad=norm_grad, budget=budget
            )
        g = magnitude_scale(magnitude, weight_norm)
        if (dtype := front.autocast_dtype(x)) is not None:  # which leaves float64 alone, and would cast x twice
            x, weight, lora_A, lora_B = (
                t if t.dtype is torch.float64 else t.to(dtype) for t in (x, weight, lora_A, lora_B)
            )
        unbatched = x.ndim == dimensions + 1
        x = x.unsqueeze(0) if unbatched else x
        x_adapter = F.dropout(x, dropout_p) if dropout_p else x
        # A convolution with unequal zeros before and after would copy its input by itself, each of them: here once.
        padding = [min(pair) if padding_mode == "zeros" else 0 for pair in border]
        beyond = [(before - own, after - own) for (before, after), own in zip(border, padding, strict=True)]
        if any(map(any, beyond)):
            amounts = [amount for pair in reversed(beyond) for amount in pair]
            mode = "constant" if padding_mode == "zeros" else padding_mode
            padded = F.pad(x, amounts, mode=mode)
            x_adapter = F.pad(x_adapter, amounts, mode=mode) if dropout_p else padded
            x = padded

        def filtered(input: Tensor, filters: Tensor, groups: int, bias: Tensor | None = None) -> Tensor:
            return conv(input, filters, bias, stride, padding, dilation, groups)

        # Not for the compiler: torch 2.11's convolution takes no bias whose tangent is an expanded zero.
        delta = dropout_p and dropout_on == "adapter"
        holds_bias = not (delta or torch.compiler.is_compiling()) and takes_bias(x, bias)
        base = filtered(x_adapter if delta else x, weight, groups, finite_part(bias) if holds_bias else None)
        h = filtered(x_adapter.to(lora_A.dtype), lora_A, 1 if spans_groups(weight, lora_A) else groups)
        lora = conv(h, lora_B, groups=groups)
        if delta:
            y = filtered(x, weight, groups, bias) + compose(base, lora, g, s, delta=True, dim=1)
        else:
            s = s.to(accumulate_dtype(base, lora, g))
            y = ops.compose.compose(base, lora, g, s, bias, False, 1, holds_bias)
        return y.squeeze(0) if unbatched else y

    dora_conv.__name__ = dora_conv.__qualname__ = f"dora_conv{dimensions}d"
    dora_conv.__doc__ = doc
    return dora_conv


dora_conv1d = _layer(
    1, ":func:`dora_conv2d` in one dimension: x ``[N, in, L]`` or ``[in, L]``, weight ``[out, in/G, k]``."
)

dora_conv2d = _layer(
    2,
    """A convolution with DoRA: ``y = g * (conv(x, W) + s * conv_1x1(conv(x, lora_A), lora_B)) + b``.

    ``g = m / n`` per output channel, n from :func:`norm_factored_conv`. lora_A runs with the stride, padding, dilation
    and padding mode of the layer, so that its adapted filter is ``W + s * BA`` (PEFT's lora_A takes the stride and
    padding only: with a dilation or a padding mode other than zeros it does not compute that).

    Args:
        x: ``[N, in, H, W]`` or ``[in, H, W]``, the dtype of ``weight`` (under autocast any float dtype).
        weight: ``[out, in/G, kH, kW]``, any memory format; usually frozen, receives its gradient (with n held constant)
            if it requires one.
        lora_A: ``[r, in/G, kH, kW]``, applied with groups, or ``[r, in, kH, kW]``, which sees all channels, as PEFT has
            it; the shape tells. lora_B: ``[out, r/G, 1, 1]``, applied with groups. One dtype, which may differ from the
            weight's; the low-rank branch runs in it.
        magnitude: m, ``[out]``, any float dtype; best kept in float32.
        bias: ``[out]``, never scaled by g.
        scaling: s, a finite number or a 0-d tensor.
        stride, padding, dilation, groups, padding_mode: as in ``nn.Conv2d``; ``padding`` also "same" or "valid",
            ``padding_mode`` "zeros", "reflect", "replicate" or "circular".
        weight_norm: n, ``[out]``, if it is known.
        norm_grad, dropout_p, dropout_on, budget: as in :func:`dora_linear`; x' is ``dropout(x)`` before any padding.

    Returns:
        ``[N, out, H', W']`` (``[out, H', W']``) in the dtype and the memory format of ``conv(x, W)``. Gradients flow to
        x, lora_A, lora_B, magnitude, bias and weight, through the norm only if ``norm_grad`` says so.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit; channels or a rank that ``groups`` does not
            divide; a kernel larger than the padded x; padding "same" with a stride; an unknown padding mode; a scaling
            that is not finite; a dropout outside [0, 1), another ``dropout_on``.
    """,
)

dora_conv3d = _layer(
    3, ":func:`dora_conv2d` in three dimensions: x ``[N, in, D, H, W]``, weight ``[out, in/G, kD, kH, kW]``."
)
