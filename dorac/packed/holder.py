"""How layers of other libraries hold a packed weight, and what the formats need to quantise another one.

As everywhere in ``dorac.packed`` no library is imported: whoever built such a layer has imported it.
"""

import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

LEAST = 1e-30  # that a scale of torchao's floats is taken of: it makes NaN of a row of zeros else


class Holder(NamedTuple):
    """How a kind of layer holds its weight.

    Attributes:
        name: of the format, for messages.
        attribute: the layer's parameter with the packed values.
        read: makes the packed value of the weight and of the layer (or again the weight) that it was found in, without
            a copy; it returns None for a weight that no such value stands for. None where dorac has no value for it.
        requantised: the layer's attributes over another dense ``[out, in]`` weight, in the same format; it changes
            nothing. None where there is no way to quantise anew.
        differentiable: whether the layer's output has a derivative in its input, in every version of the library.
    """

    name: str
    attribute: str = "weight"
    read: Callable[[Tensor, nn.Module | Tensor], tuple | None] | None = None
    requantised: Callable[[nn.Module, Tensor], dict[str, object]] | None = None
    differentiable: bool = True

    def cannot_requantise(self, module: nn.Module) -> str:
        """Why nothing can be merged into ``module``, for a holder without ``requantised``."""
        return (
            f"a {self.name} ({type(module).__name__}) cannot be quantised again here: keep the adapter beside it, or "
            "put nn.Linear layers with the dequantised weights in place of such layers before they are adapted"
        )


def class_beside(module: nn.Module, parent: str, name: str) -> type:
    """The class ``name`` of the library's module in which the layer's class ``parent`` is."""
    home = next(kind.__module__ for kind in type(module).__mro__ if kind.__name__ == parent)
    return getattr(sys.modules[home], name)


def finite(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """``weight`` in the dtype that it is quantised from."""
    weight = weight.to(dtype)
    if not weight.isfinite().all():
        raise ValueError(f"the weight is not finite in {dtype}, which it would be quantised from")
    return weight


def frozen(weight: Tensor) -> dict[str, object]:
    """What a layer holds whose weight is this."""
    return {"weight": nn.Parameter(weight, requires_grad=False)}


def unquantised(kind: str, source: nn.Module | Tensor) -> str:
    """Why a weight of bitsandbytes cannot be read."""
    return (
        f"the {kind} weight of this {type(source).__name__} (bitsandbytes) is not quantised yet: move the layer to "
        "its device first, .to('cuda') or .to('cpu')"
    )
