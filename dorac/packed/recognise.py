"""The one place that knows packed weights by the modules and tensors that hold them, without importing a library."""

import torch
from torch import Tensor, nn

from dorac.packed.float4 import Mxfp4
from dorac.packed.formats import HOLDERS
from dorac.packed.holder import Holder
from dorac.packed.hqq import HOLDER as HQQ
from dorac.packed.scaled_8bit import FP8_LINEAR

IN_PARTS = (
    "its quantised weight is in parts (a DTensor), and a merge would gather it on every rank and quantise it anew: "
    "save the adapter, load it into the model in one process, and merge there"
)
TORCHAO = Holder("torchao weight", differentiable=False)  # of any other class: its norm takes a dense copy
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


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
    known = HOLDERS.get(kind_of(weight, source))
    if known is not None:
        return known.read(weight, source)
    if weight is None:
        blocks, scales = getattr(source, f"{name}_blocks", None), getattr(source, f"{name}_scales", None)
        return None if blocks is None or scales is None else Mxfp4.of_blocks(blocks, scales)
    if type(source).__name__ == "FP8Linear" and getattr(source, f"{name}_scale_inv", None) is not None:
        return FP8_LINEAR.read(weight, source)
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


def holder(module: nn.Module) -> Holder | None:
    """How ``module`` holds its packed weight, quantised already or not; None if it is no linear layer with one."""
    if type(module).__name__ == "HQQLinear" and hasattr(module, "W_q"):
        return HQQ
    if not isinstance(module, nn.Linear):
        return None
    weight = module._parameters.get("weight")
    if getattr(weight, "has_fp16_weights", False):
        return None  # dense
    if type(module).__name__ == "FP8Linear" and weight.dtype in FLOAT8:  # int8 are pairs of 4-bit numbers
        return FP8_LINEAR
    kind = type(weight)
    if kind.__module__.partition(".")[0] == "torchao" and kind.dequantize is not Tensor.dequantize:
        return HOLDERS.get(kind.__name__, TORCHAO)
    return HOLDERS.get(kind_of(weight, module))


def weight_of(module: nn.Module) -> tuple | Tensor:
    """The weight that a holder multiplies with: a packed value, or a dense copy where its format has none here.

    Raises:
        ValueError: see :func:`dorac.packed.of`.
    """
    value = of(module)
    if value is not None:
        return value
    return (module if holder(module) is HQQ else module.weight).dequantize()


def restore(module: nn.Module) -> None:
    """Gives the parameter that FSDP has put in the place of bitsandbytes' the statistics that the layer keeps.

    The layer's forward does so, too, but by another parameter each time.
    """
    weight, state = module._parameters.get("weight"), vars(module).get("quant_state")
    if type(weight) is nn.Parameter and state is not None and getattr(weight, "quant_state", None) is None:
        weight.quant_state = state


def unreadable(module: nn.Module) -> str | None:
    """Why the weight of a holder cannot be read or its product not be differentiated now, or None if both can."""
    kind, name = type(module).__name__, holder(module).attribute
    weight = getattr(module, name)
    if weight.is_meta:
        return f"the {name} of {kind} is on the meta device and has no values: load the weights first"
    quantises_input = getattr(weight, "act_quant_kwargs", None) is not None
    if quantises_input or getattr(weight, "activation_dtype", torch.bfloat16) is not torch.bfloat16:
        return f"the weight of {kind} quantises its input too, which then gets no gradient: quantise the weight alone"
    if getattr(weight, "act_pre_scale", None) is not None:
        return f"the weight of {kind} scales its input (act_pre_scale), as no norm of a row can"
    try:
        value = of(module)
        if value is not None:
            value.check()
    except (TypeError, ValueError) as error:
        return str(error)
    return None
