"""The one place that knows formats by the modules and tensors that hold them, without importing a library."""

import torch
from torch import Tensor, nn

from dorac.packed.bnb_4bit import Bnb4bit, Bnb4bitCpu
from dorac.packed.bnb_int8 import BnbInt8
from dorac.packed.float4 import Mxfp4, Nvfp4
from dorac.packed.scaled_8bit import Scaled8bit
from dorac.packed.torchao_int4 import TorchaoInt4


def of(source: nn.Module | Tensor, name: str = "weight") -> tuple | None:
    """The packed weight of a module or of a tensor; None where it is dense or of a format that is not known here.

    Only looks: nothing is moved, copied or converted. Known are bitsandbytes' 4-bit layers and parameters (nf4, fp4,
    packed for the CPU or not) and its 8-bit ones; torchao's ``Int4Tensor``, ``Int8Tensor``, ``Float8Tensor`` and
    ``NVFP4Tensor``, but for those that scale their input; transformers' ``FP8Linear``; and GPT-OSS's mxfp4 as it lies
    in the checkpoint, ``NAME_blocks`` and ``NAME_scales`` of a module.

    Args:
        source: a module, or its weight.
        name: of the weight in the module.

    Raises:
        ValueError: a bitsandbytes weight that is not quantised yet, or one whose statistics are missing.
    """
    if not isinstance(source, nn.Module):
        weight = source
    elif (weight := source._parameters.get(name)) is None:  # __getattr__ takes ten times as long
        weight = getattr(source, name, None)
    read = _READERS.get(kind_of(weight, source))
    if read is not None:
        return read(weight, source)
    if weight is None:
        blocks, scales = getattr(source, f"{name}_blocks", None), getattr(source, f"{name}_scales", None)
        return None if blocks is None or scales is None else _mxfp4(blocks, scales)
    if type(source).__name__ == "FP8Linear" and getattr(source, f"{name}_scale_inv", None) is not None:
        return _fp8_linear(weight, source)
    return None


def stored(source: nn.Module) -> list[Tensor]:
    """The tensors that :func:`of` reads the packed weight of a module from, as they lie there and in a fixed order.

    Whoever keeps something that was taken of the weight watches them, and the version of the weight itself. What is
    written to a tensor of torchao's as a whole counts in that version alone, since its pieces are written below
    autograd, which counts; what is written to a piece, to a view of one, or put in the place of one is seen there. As
    of dense weights nobody sees writes through ``.data``, of the weight or of a piece, or to memory that another
    library was given (``numpy()``, a kernel), nor other numbers beside the tensors (``block_size``).

    Raises:
        ValueError: as :func:`of`.
    """
    parameters = source._parameters
    weight = parameters.get("weight")  # through __getattr__ it takes ten times as long
    state = vars(weight).get("quant_state") if type(weight).__name__ == "Params4bit" else None
    if state is not None:  # what every forward asks for; the codes are the weight's own memory
        nested = getattr(state, "state2", None)  # a weight packed for the CPU has none
        if nested is None:
            return [state.absmax, state.code]
        return [state.absmax, state.code, state.offset, nested.absmax, nested.code]
    experts = [name.removesuffix("_blocks") for name in parameters if name.endswith("_blocks")]
    if experts:
        return [piece for name in experts for piece in of(source, name)[: Mxfp4.PIECES]]
    if weight is None:
        weight = source.weight
    if hasattr(type(weight), "__tensor_flatten__"):  # of which of() may have copies in another dtype
        pieces = [getattr(weight, name) for name in weight.__tensor_flatten__()[0]]
    else:
        value = of(source)
        pieces = value[: value.PIECES]
    return [piece for piece in pieces if piece is not None]


def kind_of(weight: Tensor | None, source: nn.Module | Tensor) -> str:
    """The name of the weight's class; bitsandbytes' parameters come out of a pickle as plain ones with attributes."""
    kind = type(weight)
    if kind is nn.Parameter:
        if getattr(weight, "quant_state", None) is not None:
            return "Params4bit"
        if getattr(weight, "has_fp16_weights", None) is False:
            return "Int8Params"
    return kind.__name__


def _bnb_4bit(weight: Tensor, source: nn.Module | Tensor) -> Bnb4bit | Bnb4bitCpu:
    state = getattr(weight, "quant_state", None)
    if state is None:  # the parameter was converted, by FSDP for one; the layer keeps the state too
        state = getattr(source, "quant_state", None)
    if state is None:
        raise ValueError(_unquantised("4-bit", source))
    with torch._C.DisableTorchFunctionSubclass():  # through which it answers slowly
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


def _torchao_int4(weight: Tensor, _: object) -> TorchaoInt4 | None:
    if weight.act_pre_scale is not None:
        return None
    return TorchaoInt4(
        weight.qdata, weight.scale, weight.zero_point, tuple(weight.shape), weight.dtype, weight.block_size[-1]
    )


def _torchao_8bit(weight: Tensor, _: object) -> Scaled8bit | None:
    if getattr(weight, "act_pre_scale", None) is not None:
        return None
    shape, scale = tuple(weight.qdata.shape), weight.scale
    if weight.block_size:
        block_rows, block_columns = weight.block_size[-2:]
    else:
        block_rows, block_columns = shape[-2:]
    if scale.dtype is not torch.float32:
        scale = scale.float()
    scale = scale.reshape(*shape[:-2], -(-shape[-2] // block_rows), -(-shape[-1] // block_columns))
    grouped = weight.qdata.dtype is torch.int8 and block_columns < shape[-1]
    zero = weight.zero_point.reshape(scale.shape) if grouped and weight.zero_point is not None else None
    dtype = weight.dtype if grouped else torch.float32
    return Scaled8bit(weight.qdata, scale, zero, shape, dtype, block_rows, block_columns)


def _torchao_nvfp4(weight: Tensor, _: object) -> Nvfp4 | None:
    codes = weight.qdata
    if codes.stride(-2) < codes.stride(-1):  # transposed
        return None
    shape = (*codes.shape[:-1], 2 * codes.shape[-1])
    return Nvfp4(
        codes, weight.scale, weight.per_tensor_scale, shape, weight.orig_dtype, int(bool(weight.is_swizzled_scales))
    )


def _fp8_linear(weight: Tensor, source: nn.Module) -> Scaled8bit | None:
    if weight.element_size() > 1:
        return None  # dense
    shape = tuple(weight.shape)
    block_rows, block_columns = source.block_size or shape
    scale = source.weight_scale_inv.detach().float()
    scale = scale.reshape(-(-shape[0] // block_rows), -(-shape[1] // block_columns))
    return Scaled8bit(weight.detach(), scale, None, shape, torch.float32, block_rows, block_columns)


def _mxfp4(blocks: Tensor, scales: Tensor) -> Mxfp4:
    codes = blocks.detach().flatten(-2)  # [.., in / 32, 16]
    return Mxfp4(codes, scales.detach(), (*codes.shape[:-1], 2 * codes.shape[-1]), torch.bfloat16)


_READERS = {
    "Params4bit": _bnb_4bit,
    "Int8Params": _bnb_int8,
    "Int4Tensor": _torchao_int4,
    "Int8Tensor": _torchao_8bit,
    "Float8Tensor": _torchao_8bit,
    "NVFP4Tensor": _torchao_nvfp4,
}
