"""The one place that knows formats by the modules and tensors that hold them, without importing a library."""

import torch
from torch import Tensor, nn

from dorac.packed.bnb_4bit import Bnb4bit, Bnb4bitCpu
from dorac.packed.bnb_int8 import BnbInt8


def of(source: nn.Module | Tensor) -> tuple | None:
    """The packed weight of a module or of a tensor; None where it is dense or of a format that is not known here.

    Only looks: nothing is moved, copied or converted. bitsandbytes' 4-bit layers and parameters (nf4, fp4, packed
    for the CPU or not) and its 8-bit ones.

    Raises:
        ValueError: a bitsandbytes weight that is not quantised yet, or one whose statistics are missing.
    """
    weight = getattr(source, "weight", None) if isinstance(source, nn.Module) else source
    read = _READERS.get(type(weight).__name__)
    return None if read is None else read(weight, source)


def _bnb_4bit(weight: Tensor, source: nn.Module | Tensor) -> Bnb4bit | Bnb4bitCpu:
    state = getattr(weight, "quant_state", None)
    if state is None:  # the parameter was converted, by FSDP for one; the layer keeps the state too
        state = getattr(source, "quant_state", None)
    if state is None:
        raise ValueError(_unquantised("4-bit", source))
    codes = weight.data
    shape = tuple(state.shape)
    if getattr(state, "packing_format_for_cpu", False):
        return Bnb4bitCpu(codes, state.absmax, state.code, shape, torch.float32, state.blocksize)
    nested = state.state2 if state.nested else None
    if nested is None:
        return Bnb4bit(codes, state.absmax, state.code, None, None, None, shape, state.dtype, state.blocksize, 0)
    return Bnb4bit(
        codes,
        state.absmax,
        state.code,
        nested.code,
        nested.absmax,
        state.offset,
        shape,
        state.dtype,
        state.blocksize,
        nested.blocksize,
    )


def _bnb_int8(weight: Tensor, source: nn.Module | Tensor) -> BnbInt8 | None:
    if weight.dtype is not torch.int8:
        if getattr(weight, "has_fp16_weights", False):
            return None  # a dense weight, which the layer quantises anew in every forward
        raise ValueError(_unquantised("8-bit", source))
    scale = getattr(weight, "SCB", None)
    if scale is None:  # the layer took it over in its first forward
        scale = getattr(getattr(source, "state", None), "SCB", None)
    if scale is None:
        raise ValueError(
            f"{BnbInt8.NAME}: its scales (SCB) are neither with the parameter nor with the layer's state: give the "
            "layer, not its weight"
        )
    codes = weight.data
    return BnbInt8(codes, scale, tuple(codes.shape), torch.float32)


def _unquantised(kind: str, source: nn.Module | Tensor) -> str:
    return (
        f"the {kind} weight of this {type(source).__name__} (bitsandbytes) is not quantised yet: move the layer to "
        "its device first, .to('cuda') or .to('cpu')"
    )


_READERS = {"Params4bit": _bnb_4bit, "Int8Params": _bnb_int8}
