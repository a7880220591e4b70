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


def looked_up(packed: Tensor, table: Tensor, *, high_first: bool) -> Tensor:
    """What the two numbers in each byte stand for, one after the other in the last dimension, float32.

    ``table``: ``[16]`` float32. Both numbers take one lookup, in a table of 256 pairs.
    """
    byte = torch.arange(256, dtype=torch.int32, device=packed.device)
    low, high = table.index_select(0, byte & 15), table.index_select(0, byte >> 4)
    pairs = torch.stack((high, low) if high_first else (low, high), dim=-1).view(torch.int64).view(256)
    values = pairs.index_select(0, packed.reshape(-1).int()).view(torch.float32)
    return values.view(*packed.shape[:-1], 2 * packed.shape[-1])


def repeated(blocks: Tensor, size: int, length: int | None = None) -> Tensor:
    """Each element of the last dimension ``size`` times in a row, the first ``length`` of these."""
    values = blocks[..., None].expand(*blocks.shape, size).flatten(-2)
    return values if length is None else values[..., :length]


def scaled(values: Tensor, scales: Tensor, size: int) -> Tensor:
    """Each ``size`` values of the last dimension times a scale of their own; the last block may be shorter."""
    if values.shape[-1] % size:
        return values * repeated(scales, size, values.shape[-1])
    return (values.unflatten(-1, (-1, size)) * scales[..., None]).flatten(-2)
