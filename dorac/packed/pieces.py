"""What the formats share: the check of a piece, and rows of values stored one after the other."""

import torch
from torch import Tensor


def check_piece(
    name: str, piece: str, tensor: Tensor | None, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...], like: Tensor
) -> None:
    """One piece of a packed weight: there, of one of ``dtypes``, of ``shape``, on the device of ``like``, with values.

    Raises:
        TypeError, ValueError: with the format's name.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: {piece} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name}: {piece} must be {' or '.join(map(str, dtypes))}, got {tensor.dtype}")
    if tensor.device.type == "meta":
        raise ValueError(f"{name}: {piece} is on the meta device and has no values: load the weight first")
    if tensor.device != like.device:
        raise ValueError(f"{name}: {piece} must be on {like.device} like the packed values, got {tensor.device}")
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name}: {piece} must have the shape {list(shape)}, got {list(tensor.shape)}")


def check_size(name: str, piece: str, tensor: Tensor, numel: int) -> None:
    """A piece whose elements lie one after the other, in whatever shape."""
    if tensor.numel() != numel or not tensor.is_contiguous():
        raise ValueError(
            f"{name}: {piece} must hold {numel} elements, contiguous, got {tensor.numel()} of shape "
            f"{list(tensor.shape)} and strides {list(tensor.stride())}"
        )


def nibbles(packed: Tensor, *, high_first: bool) -> Tensor:
    """The two numbers in each byte, one after the other in the last dimension, as what can index a table."""
    low, high = (packed & 15).int(), (packed >> 4).int()
    return torch.stack((high, low) if high_first else (low, high), dim=-1).flatten(-2)


def repeated(scales: Tensor, times: int) -> Tensor:
    """Each element of the last dimension ``times`` in a row."""
    return scales[..., None].expand(*scales.shape, times).flatten(-2)
