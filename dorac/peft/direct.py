"""What a layer asks of PEFT's modules in every forward, in their dictionaries: whether their tensors can be used."""

from torch import Tensor, nn

from dorac.hooks import unhooked
from dorac.peft.weights import is_fsdp_unit, is_plain, whole


def parameter(module: nn.Module, name: str) -> Tensor | None:
    """``getattr(module, name)`` without the call of ``nn.Module.__getattr__``; FSDP1 puts tensors into ``__dict__``."""
    attributes = module.__dict__
    return attributes[name] if name in attributes else attributes["_parameters"].get(name)


def plain_weight(module: nn.Module | None, kind: type[nn.Module]) -> Tensor | None:
    """The weight of an unhooked module of this very class, if it can be used as it lies there.

    Raises:
        RuntimeError: FSDP1 holds it in parts now.
    """
    if type(module) is not kind or not unhooked(module):  # an FSDP unit has a class of its own
        return None
    weight = parameter(module, "weight")
    return whole(weight) if is_plain(weight) else None


def dropout_p(dropout: nn.Module, training: bool) -> float | None:
    """The probability with which PEFT drops elements of the adapter's input now; None if it must be called for that."""
    kind = type(dropout)
    if not unhooked(dropout):
        return None
    if kind is nn.Identity:
        return 0.0
    if not training or not dropout.training:
        return 0.0 if kind is nn.Dropout or not is_fsdp_unit(dropout) else None
    return dropout.p if kind is nn.Dropout and dropout.p < 1 else None
