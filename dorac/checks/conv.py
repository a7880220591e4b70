"""The tensors and the geometry of convolutions."""

import torch
from torch import Tensor

from dorac.checks.linear import check_activation_dtype, check_pair, check_rank
from dorac.checks.shapes import check_device, check_float, fit, layouts

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")  # of nn.Conv
_CHANNELS = layouts(magnitude="out", weight_norm="out?", bias="out?")


def check_conv_factors(weight: Tensor, lora_A: Tensor, lora_B: Tensor, groups: int) -> None:
    """``weight [out, in/G, k...]``, ``lora_A [r, in/G or in, k...]``, ``lora_B [out, r/G, 1...]`` of a convolution."""
    check_float("weight", weight)
    if not 3 <= weight.ndim <= 5:
        raise ValueError(f"weight must be [out, in/groups, k...] with 1 to 3 k, got shape {list(weight.shape)}")
    check_pair(weight, lora_A, lora_B)
    if isinstance(groups, bool) or not isinstance(groups, (int, torch.SymInt)):
        raise TypeError(f"groups must be an integer, got {type(groups).__name__}")
    out_channels, channels, *kernel = weight.shape
    if groups < 1 or out_channels % groups:
        raise ValueError(f"groups must be at least 1 and divide the {out_channels} output channels, got {groups}")
    rank = lora_A.shape[0]
    check_rank(rank, lora_A)
    if rank % groups:
        raise ValueError(f"lora_A must have a rank that groups={groups} divides, got a rank of {rank}")
    fits = lora_A.shape[1] == channels or lora_A.shape[1] == channels * groups  # symbolic sizes are in no tuple
    if list(lora_A.shape[2:]) != kernel or not fits:
        expected = f"[r, in, k...] = {[rank, channels * groups, *kernel]}"
        expected += f" or [r, in/groups, k...] = {[rank, channels, *kernel]}" if groups > 1 else ""
        raise ValueError(f"lora_A must be {expected} for weight {list(weight.shape)}, got {list(lora_A.shape)}")
    if list(lora_B.shape) != [out_channels, rank // groups, *[1] * len(kernel)]:
        expected = f"[out, r/groups, 1...] = {[out_channels, rank // groups, *[1] * len(kernel)]}"
        raise ValueError(f"lora_B must be {expected} for this weight and lora_A, got {list(lora_B.shape)}")


def check_conv(dimensions, x, weight, lora_A, lora_B, magnitude, bias, weight_norm, groups) -> None:
    """All tensors of ``dora_conv1d``, ``2d`` or ``3d``."""
    check_float("weight", weight)
    if weight.ndim != dimensions + 2:
        raise ValueError(f"weight must have {dimensions + 2} dimensions, got shape {list(weight.shape)}")
    check_conv_factors(weight, lora_A, lora_B, groups)
    fit(_CHANNELS, {"out": weight.shape[0]}, weight, magnitude=magnitude, weight_norm=weight_norm, bias=bias)
    check_float("x", x)
    in_channels = weight.shape[1] * groups
    if x.ndim not in (dimensions + 1, dimensions + 2) or x.shape[-1 - dimensions] != in_channels:
        sizes = ", ".join("DHW"[-dimensions:]) if dimensions > 1 else "L"
        expected = f"[N, in, {sizes}] or [in, {sizes}] with in = {in_channels}"
        raise ValueError(f"x must be {expected}, got shape {list(x.shape)}")
    check_device("x", x, weight)
    check_activation_dtype(x, weight)


def check_geometry(dimensions: int, stride: object, padding: object, dilation: object, padding_mode: object) -> None:
    """What ``nn.Conv`` takes as stride, padding, dilation and padding mode."""
    for name, value, least in (("stride", stride, 1), ("padding", padding, 0), ("dilation", dilation, 1)):
        if name == "padding" and isinstance(value, str):
            if value not in ("same", "valid"):
                raise ValueError(f"padding must be numbers, 'same' or 'valid', got {value!r}")
            continue
        values = (value,) * dimensions if isinstance(value, int) else value
        if not isinstance(values, (tuple, list)) or not all(isinstance(v, (int, torch.SymInt)) for v in values):
            raise TypeError(f"{name} must be an integer or {dimensions} of them, got {value!r}")
        if len(values) != dimensions or any(v < least for v in values):
            raise ValueError(f"{name} must be one integer or {dimensions} of them, at least {least}, got {value!r}")
    strides = (stride,) if isinstance(stride, int) else stride
    if padding == "same" and any(v != 1 for v in strides):
        raise ValueError(f"padding must not be 'same' with a stride other than 1, got stride {stride!r}")
    if padding_mode not in PADDING_MODES:
        raise ValueError(f"padding_mode must be one of {', '.join(map(repr, PADDING_MODES))}, got {padding_mode!r}")


def check_extent(
    x: Tensor, weight: Tensor, border: list[tuple[int, int]], dilation: tuple[int, ...], padding_mode: str
) -> None:
    """Whether the padding can be taken from x, and the kernel fits into the two."""
    sizes = x.shape[-len(border) :]
    for size, kernel, (before, after), step in zip(sizes, weight.shape[2:], border, dilation, strict=True):
        most = {"reflect": size - 1, "circular": size}.get(padding_mode)
        if most is not None and max(before, after) > most:
            raise ValueError(
                f"padding must be at most {most} with padding_mode {padding_mode!r} for x {list(x.shape)}, "
                f"got {max(before, after)}"
            )
        reach = step * (kernel - 1) + 1
        if size + before + after < reach:
            raise ValueError(
                f"x must be at least as large as the kernel, which reaches over {reach}, got shape {list(x.shape)} "
                f"and a padding of {before + after}"
            )
