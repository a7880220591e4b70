"""What a kept norm was taken of, so that it is used for nothing else (PEFT's ``DoraCaching``, in eval mode)."""

import dataclasses
from typing import Self

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

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
    def of(cls, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, groups: int) -> Self | None:
        """None for what cannot be told again: wrapped, sharded and inference tensors, a scaling that is a tensor."""
        tensors = weight, lora_A, lora_B
        if front.under_transform() or not isinstance(scaling, (int, float)):
            return None
        if not all(is_plain(t) and not t.is_inference() and not t.is_meta for t in tensors):
            return None
        content = tuple(_content(t) for t in (_grid(weight), lora_A, lora_B) if t.device.type == "cpu")
        return cls(tuple(map(_identity, tensors)), content, scaling, groups)


def _identity(tensor: Tensor) -> tuple:
    # The reference keeps the storage's address from being used again, not its memory, and unlike one to the tensor it
    # does not keep torch.utils.swap_tensors from working.
    storage = StorageWeakRef(tensor.untyped_storage())
    return id(tensor), tensor._version, storage, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()


def _grid(weight: Tensor) -> Tensor:
    weight = weight.detach()
    return weight[tuple(slice(None, None, max(1, size // _SAMPLES)) for size in weight.shape)]


def _content(tensor: Tensor) -> int:
    return hash(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
