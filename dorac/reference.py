"""DoRA as the paper writes it (arXiv 2402.09353): dense, readable, any float dtype. The oracle of every test.

Every function computes in the dtype of its inputs: pass float64 for the truth, another dtype for what dense arithmetic
of that dtype gives. With experts, every tensor starts with their number E.

``dorac/docs/derivations.md`` derives what the fast paths compute in place of this: the factored norm, its gradient, the
backward of the layer, what is saved and why, zero rows and the delta form.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def adapted_weight(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """``V = W + s * B A``, ``[out, in]``."""
    return weight + scaling * (lora_B @ lora_A)


def row_norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """``n = ||V||_row``, ``[out]``; differentiable, callers detach it where the paper does (section 4.3)."""
    return torch.linalg.vector_norm(adapted_weight(weight, lora_A, lora_B, scaling), dim=-1)


def magnitude_scale(magnitude: Tensor, weight_norm: Tensor) -> Tensor:
    """``g = m / n``, and 1 for a row with ``n <= 1e-12``."""
    zero_row = weight_norm <= 1e-12
    return torch.where(zero_row, torch.ones_like(magnitude), magnitude / weight_norm.masked_fill(zero_row, 1))


def compose(base: Tensor, lora: Tensor, mag_scale: Tensor, scaling: float, bias: Tensor | None = None) -> Tensor:
    """``g * (base + s * lora) + b``."""
    y = mag_scale * (base + scaling * lora)
    return y if bias is None else y + bias


def compose_delta(base: Tensor, lora: Tensor, mag_scale: Tensor, scaling: float) -> Tensor:
    """``(g - 1) * base + g * s * lora``."""
    return (mag_scale - 1) * base + mag_scale * scaling * lora


def dora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    bias: Tensor | None = None,
    *,
    scaling: float,
    weight_norm: Tensor | None = None,
    norm_grad: bool = False,
    dropped: Tensor | None = None,
    dropout_on: str = "adapter",
) -> Tensor:
    """``y = x (g V)^T + b``, n constant in backprop unless ``norm_grad``; with experts, x is ``[E, tokens, in]``.

    With dropout, ``x' = dropped * x`` is what the change to the frozen layer sees, ``(g - 1) x' W^T + g s x' (BA)^T``,
    or with ``dropout_on="low_rank"`` the low-rank branch alone, ``g * (x W^T + s x' (BA)^T)``.
    """
    if weight_norm is None:
        norm = row_norm(weight, lora_A, lora_B, scaling)
        weight_norm = norm if norm_grad else norm.detach()
    if dropped is None:
        y = x @ merge_weight(weight, lora_A, lora_B, magnitude, scaling=scaling, weight_norm=weight_norm).mT
    else:
        g, x_adapter = magnitude_scale(magnitude, weight_norm), dropped.to(x.dtype) * x
        g = g.unsqueeze(1) if weight.ndim == 3 else g
        lora = x_adapter @ (lora_B @ lora_A).mT
        if dropout_on == "adapter":
            y = x @ weight.mT + compose_delta(x_adapter @ weight.mT, lora, g, scaling)
        else:
            y = compose(x @ weight.mT, lora, g, scaling)
    if bias is not None and weight.ndim == 3:
        bias = bias.unsqueeze(1)
    return y if bias is None else y + bias


def projection(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    magnitude: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    scaling: float = 1.0,
    weight_norm: Tensor | None = None,
    dropped: Tensor | None = None,
    dropout_on: str = "adapter",
) -> Tensor:
    """One layer of a block: :func:`dora_linear`, without a magnitude plain LoRA, without factors the frozen layer."""
    if lora_A is None:
        y = x @ weight.T
        return y if bias is None else y + bias
    if magnitude is None:  # g = 1
        magnitude = weight_norm = torch.ones_like(weight[:, 0])
        dropout_on = "low_rank"
    options = {"scaling": scaling, "weight_norm": weight_norm, "dropped": dropped, "dropout_on": dropout_on}
    return dora_linear(x, weight, lora_A, lora_B, magnitude, bias, **options)


def dora_linears(x: Tensor, projections: list[tuple[tuple[Tensor | None, ...], dict]]) -> tuple[Tensor, ...]:
    """Several layers of one x, each the tensors and the options of :func:`projection`."""
    return tuple(projection(x, *tensors, **options) for tensors, options in projections)


ACTIVATIONS = {
    "silu": lambda t: t * torch.sigmoid(t),
    "gelu": lambda t: t * (1 + torch.erf(t / 2**0.5)) / 2,
    "gelu_tanh": lambda t: t * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (t + 0.044715 * t**3))) / 2,
    "relu": lambda t: t.clamp(min=0),
}


def gated(
    y: Tensor,
    activation: str = "silu",
    interleaved: bool = False,
    limit: float | None = None,
    alpha: float = 1.0,
    shift: float = 0.0,
) -> Tensor:
    """``act(gate) * (up + shift)`` of the halves of y, or its even and odd columns, within limits; alpha is silu's."""
    half = y.shape[-1] // 2
    pairs = y.unflatten(-1, (half, 2)) if interleaved else y.unflatten(-1, (2, half)).mT
    gate, up = pairs.unbind(-1)
    if limit is not None:
        gate, up = gate.minimum(torch.full_like(gate, limit)), up.clamp(-limit, limit)
    act = ACTIVATIONS[activation](gate) if alpha == 1 else gate * torch.sigmoid(alpha * gate)
    return act * (up + shift)


def dora_mlp(
    x: Tensor,
    gate: tuple[tuple[Tensor | None, ...], dict] | None,
    up: tuple[tuple[Tensor | None, ...], dict],
    down: tuple[tuple[Tensor | None, ...], dict],
    activation: str,
) -> Tensor:
    """``down(act(gate(x)) * up(x))``, without a gate ``down(act(up(x)))``; layers as in :func:`dora_linears`."""
    act = ACTIVATIONS[activation]
    inner = act(*dora_linears(x, [up]))
    if gate is not None:
        gated, inner = dora_linears(x, [gate, up])
        inner = act(gated) * inner
    return dora_linears(inner, [down])[0]


def dora_embedding(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    *,
    scaling: float,
    weight_norm: Tensor | None = None,
    norm_grad: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """Rows x of ``(g V)^T``, where V adapts ``weight^T``; what padding looks up is held constant in backprop, and n
    unless ``norm_grad``."""
    if weight_norm is None:
        norm = row_norm(weight.T, lora_A, lora_B, scaling)
        weight_norm = norm if norm_grad else norm.detach()
    if padding_idx is not None:
        padding = torch.arange(len(weight), device=weight.device) == padding_idx
        weight = torch.where(padding[:, None], weight.detach(), weight)
        lora_A = torch.where(padding, lora_A.detach(), lora_A)
    adapted = merge_weight(weight.T, lora_A, lora_B, magnitude, scaling=scaling, weight_norm=weight_norm)
    return F.embedding(x, adapted.T)


def column_norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
    """The norm of each column of V, ``[in]``."""
    return torch.linalg.vector_norm(adapted_weight(weight, lora_A, lora_B, scaling), dim=-2)


def merge_columns(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor, *, scaling: float, weight_norm: Tensor
) -> Tensor:
    """``W' = V * g``, g scaling the columns, ``[out, in]``."""
    return adapted_weight(weight, lora_A, lora_B, scaling) * magnitude_scale(magnitude, weight_norm)


def dora_linear_columns(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    bias: Tensor | None = None,
    *,
    scaling: float,
    norm_grad: bool = False,
) -> Tensor:
    """``y = x (V g)^T + b``, n constant in backprop unless ``norm_grad``."""
    norm = column_norm(weight, lora_A, lora_B, scaling)
    merged = merge_columns(
        weight, lora_A, lora_B, magnitude, scaling=scaling, weight_norm=norm if norm_grad else norm.detach()
    )
    return F.linear(x, merged, bias)


def dora_embedding_columns(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    *,
    scaling: float,
    norm_grad: bool = False,
) -> Tensor:
    """Rows x of ``(V g)^T``, where V adapts ``weight^T``: a magnitude per token."""
    norm = column_norm(weight.T, lora_A, lora_B, scaling)
    merged = merge_columns(
        weight.T, lora_A, lora_B, magnitude, scaling=scaling, weight_norm=norm if norm_grad else norm.detach()
    )
    return F.embedding(x, merged.T)


def merge_weight(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor, *, scaling: float, weight_norm: Tensor
) -> Tensor:
    """``W' = g * V``, ``[out, in]``."""
    return magnitude_scale(magnitude, weight_norm)[..., None] * adapted_weight(weight, lora_A, lora_B, scaling)


def unmerge_weight(
    merged: Tensor, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor, *, scaling: float, weight_norm: Tensor
) -> Tensor:
    """``W = W' / g - s * B A``, ``[out, in]``."""
    return merged / magnitude_scale(magnitude, weight_norm)[..., None] - scaling * (lora_B @ lora_A)


def ungrouped(weight: Tensor, groups: int) -> Tensor:
    """A grouped convolution's weight ``[out, in/G, k...]`` as a plain one's, ``[out, in, k...]``: block-diagonal."""
    group = torch.arange(groups, device=weight.device)
    member = group.repeat_interleave(weight.shape[0] // groups)[:, None] == group
    return (member.view(*member.shape, *[1] * (weight.ndim - 1)) * weight[:, None]).flatten(1, 2)


def adapted_filters(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, groups: int = 1) -> Tensor:
    """``V = W + s * B A`` of a convolution as a plain one's, ``[out, in, k...]``.

    A ``lora_A [r, in/G, k...]`` is grouped as the weight is, a ``lora_A [r, in, k...]`` sees every channel.
    """
    if lora_A.shape[1] == weight.shape[1]:
        lora_A = ungrouped(lora_A, groups)
    product = ungrouped(lora_B, groups).flatten(1) @ lora_A.flatten(1)
    return ungrouped(weight, groups) + scaling * product.view(-1, *lora_A.shape[1:])


def filter_norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, groups: int = 1) -> Tensor:
    """The L2 norm of each output channel of V, ``[out]``."""
    return torch.linalg.vector_norm(adapted_filters(weight, lora_A, lora_B, scaling, groups).flatten(1), dim=1)


def dora_conv(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    bias: Tensor | None = None,
    *,
    scaling: float,
    stride: int = 1,
    padding: int | str = 0,
    dilation: int = 1,
    groups: int = 1,
    padding_mode: str = "zeros",
    weight_norm: Tensor | None = None,
    norm_grad: bool = False,
) -> Tensor:
    """``y = conv(x, g V) + b``, one plain convolution with the dense adapted filters; n held constant unless
    ``norm_grad``."""
    if weight_norm is None:
        norm = filter_norm(weight, lora_A, lora_B, scaling, groups)
        weight_norm = norm if norm_grad else norm.detach()
    v = adapted_filters(weight, lora_A, lora_B, scaling, groups)
    g = magnitude_scale(magnitude, weight_norm).view(-1, *[1] * (v.ndim - 1))
    conv = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[v.ndim]
    if padding_mode != "zeros" or padding == "same":
        dimensions = v.ndim - 2
        dilations = (dilation,) * dimensions if isinstance(dilation, int) else dilation
        amounts = []
        for i in reversed(range(dimensions)):
            if isinstance(padding, str):
                total = dilations[i] * (v.shape[2 + i] - 1) if padding == "same" else 0
                amounts += [total // 2, total - total // 2]
            else:
                amounts += [padding if isinstance(padding, int) else padding[i]] * 2
        x, padding = F.pad(x, amounts, mode="constant" if padding_mode == "zeros" else padding_mode), 0
    return conv(x, g * v, bias, stride, padding, dilation)
