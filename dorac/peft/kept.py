"""What a kept norm was taken of, so that it is used for nothing else (PEFT's ``DoraCaching``, in eval mode)."""

import dataclasses
from typing import Self

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from dorac import packed
from dorac.ops import front
from dorac.peft.weights import is_plain

_SAMPLES = 32  # per dimension, of a base weight


@dataclasses.dataclass(frozen=True)
class Origin:
    """Which tensors, in which state, and which scaling.

    Noticed are another tensor or memory, dtype or device, and writes in place, other than through ``data`` or another
    alias, which have a version counter of their own. On the CPU those are noticed, too: the factors are read (256 KB
    are read in 0.1 ms), of the base weight a grid of elements. On a GPU reading would wait for the device in every
    layer: there only ``eval()`` and ``train()``, which forget all norms, help after a write to ``data``.
    """

    tensors: tuple
    content: tuple[int, ...]
    scaling: float
    groups: int

    @classmethod
    def of(
        cls, base_layer: nn.Module | None, weight: object, factors: tuple[Tensor, Tensor], scaling: float, groups: int
    ) -> Self | None:
        """None for what cannot be told again: wrapped, sharded and inference tensors, a scaling that is a tensor.

        Args:
            base_layer: the one that ``weight`` is of; of a packed weight its pieces are looked at.
            weight: dense, packed, or a dense copy of a packed one.
        """
        if front.under_transform() or front.traced_by_jit() or not isinstance(scaling, (int, float)):
            return None
        held = getattr(base_layer, "weight", None)
        if held is None or is_plain(held):
            pieces, own = [weight], ()
        elif packed.of(base_layer) is None or held.is_inference():
            return None
        else:  # some of which are other objects each time
            pieces, own = packed.stored(base_layer), (id(held), held._version)
        if not (own or is_plain(weight)) or not all(map(is_plain, factors)):
            return None
        if any(t.is_inference() or t.is_meta for t in (*pieces, *factors)):
            return None
        content = tuple(_content(t) for t in (*map(_grid, pieces), *factors) if t.device.type == "cpu")
        which = (*own, *map(_memory, pieces), *map(_memory, factors), *map(id, factors if own else (*pieces, *factors)))
        return cls(which, content, scaling, groups)


def _memory(tensor: Tensor) -> tuple:
    # The reference keeps the storage's address from being used again, not its memory, and unlike one to the tensor it
    # does not keep torch.utils.swap_tensors from working.
    storage = StorageWeakRef(tensor.untyped_storage())
    return tensor._version, storage, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _grid(weight: Tensor) -> Tensor:
    """Up to 1024 elements of a matrix, or of what lies in one line."""
    weight = weight.detach()
    samples = _SAMPLES if sum(size > 1 for size in weight.shape) > 1 else _SAMPLES**2
    return weight[tuple(slice(None, None, max(1, size // samples)) for size in weight.shape)]


def _content(tensor: Tensor) -> int:
    return hash(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
