"""Layers of other libraries that hold a packed weight: which they are, and what of them another weight replaces.

As everywhere in ``dorac.packed`` no library is imported: whoever built such a layer has imported it.
"""

import copy
import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dorac.packed.recognise import kind_of, of

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
IN_PARTS = (
    "its quantised weight is in parts (a DTensor), and a merge would gather it on every rank and quantise it anew: "
    "save the adapter, load it into the model in one process, and merge there"
)
LEAST = 1e-30  # that a scale of torchao's floats is taken of: it makes NaN of a row of zeros else


class Holder(NamedTuple):
    """How a kind of layer holds its weight.

    Attributes:
        name: of the format, for messages.
        attribute: the layer's parameter with the packed values.
        requantised: the layer's attributes over another dense ``[out, in]`` weight, in the same format; it changes
            nothing. None where there is no way to quantise anew.
        differentiable: whether the layer's output has a derivative in its input, in every version of the library.
    """

    name: str
    attribute: str = "weight"
    requantised: Callable[[nn.Module, Tensor], dict[str, object]] | None = None
    differentiable: bool = True

    def cannot_requantise(self, module: nn.Module) -> str:
        """Why nothing can be merged into ``module``, for a holder without ``requantised``."""
        return (
            f"a {self.name} ({type(module).__name__}) cannot be quantised again here: keep the adapter beside it, or "
            "put nn.Linear layers with the dequantised weights in place of such layers before they are adapted"
        )


def holder(module: nn.Module) -> Holder | None:
    """How ``module`` holds its packed weight, quantised already or not; None if it is no linear layer with one."""
    if type(module).__name__ == "HQQLinear" and hasattr(module, "W_q"):
        return _HQQ
    if not isinstance(module, nn.Linear):
        return None
    weight = module._parameters.get("weight")
    if getattr(weight, "has_fp16_weights", False):
        return None  # dense
    if type(module).__name__ == "FP8Linear" and weight.dtype in FLOAT8:  # int8 are pairs of 4-bit numbers
        return _FP8_LINEAR
    kind = type(weight)
    if kind.__module__.partition(".")[0] == "torchao" and kind.dequantize is not Tensor.dequantize:
        return _HOLDERS.get(kind.__name__, _TORCHAO)
    return _HOLDERS.get(kind_of(weight, module))


def weight_of(module: nn.Module) -> tuple | Tensor:
    """The weight that a holder multiplies with: a packed value, or a dense copy where its format has none here.

    Raises:
        ValueError: see :func:`dorac.packed.of`.
    """
    value = of(module)
    if value is not None:
        return value
    return (module if holder(module) is _HQQ else module.weight).dequantize()


def restore(module: nn.Module) -> None:
    """Gives the parameter that FSDP has put in the place of bitsandbytes' the statistics that the layer keeps.

    The layer's forward does so, too, but by another parameter each time.
    """
    weight, state = module._parameters.get("weight"), getattr(module, "quant_state", None)
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


def _class_beside(module: nn.Module, parent: str, name: str) -> type:
    """The class ``name`` of the library's module in which the layer's class ``parent`` is."""
    home = next(kind.__module__ for kind in type(module).__mro__ if kind.__name__ == parent)
    return getattr(sys.modules[home], name)


def _finite(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """``weight`` in the dtype that it is quantised from."""
    weight = weight.to(dtype)
    if not weight.isfinite().all():
        raise ValueError(f"the weight is not finite in {dtype}, which it would be quantised from")
    return weight


def _bnb_4bit(module: nn.Module, dense: Tensor) -> dict[str, object]:
    old = module.weight
    state = getattr(old, "quant_state", None) or module.quant_state
    options = {name: getattr(old, name) for name in ("blocksize", "compress_statistics", "quant_type", "quant_storage")}
    new = _class_beside(module, "Linear4bit", "Params4bit")(
        _finite(dense, state.dtype), requires_grad=False, **options
    ).to(old.device)
    new.module = module  # which has the state too
    return {"weight": new, "quant_state": new.quant_state}


def _bnb_int8(module: nn.Module, dense: Tensor) -> dict[str, object]:
    # From the CPU, since only there .to() quantises. The codes and scales that forward has taken over are in the state.
    new = _class_beside(module, "Linear8bitLt", "Int8Params")(
        _finite(dense, torch.float16).cpu(), requires_grad=False, has_fp16_weights=False
    ).to(module.weight.device)
    state = copy.copy(module.state)
    state.CB = state.SCB = None
    return {"weight": new, "state": state}


def _granularity(block: list[int] | None, shape: torch.Size) -> object:
    """torchao's, of which a scale covers ``block``."""
    classes = sys.modules["torchao.quantization.granularity"]
    if not block or list(block) == list(shape):
        return classes.PerTensor()
    if block[0] > 1:
        return classes.PerBlock(list(block))
    return classes.PerRow() if block[1] == shape[1] else classes.PerGroup(block[1])


def _frozen(weight: Tensor) -> dict[str, object]:
    return {"weight": nn.Parameter(weight, requires_grad=False)}


def _torchao_int8(module: nn.Module, dense: Tensor) -> dict[str, object]:
    old = module.weight
    options = {}
    if old.zero_point is not None and old.zero_point.any():
        mapping = sys.modules["torchao.quantization.quant_primitives"].MappingType
        options["mapping_type"] = mapping.ASYMMETRIC
    granularity = _granularity(old.block_size, old.shape)
    return _frozen(type(old).from_hp(_finite(dense, old.dtype), granularity, **options))


def _torchao_float8(module: nn.Module, dense: Tensor) -> dict[str, object]:
    old = module.weight
    options = {} if old.kernel_preference.name == "MSLK" else {"hp_value_lb": LEAST}  # which MSLK's kernels do not take
    new = type(old).from_hp(
        _finite(dense, old.dtype),
        float8_dtype=old.qdata.dtype,
        granularity=_granularity(old.block_size, old.shape),
        mm_config=old.mm_config,
        kernel_preference=old.kernel_preference,
        **options,
    )
    return _frozen(new)


def _torchao_int4(module: nn.Module, dense: Tensor) -> dict[str, object]:
    old = module.weight
    try:
        new = type(old).from_hp(_finite(dense, old.dtype), list(old.block_size), activation_dtype=old.activation_dtype)
    except ImportError as error:  # of the package that has the kernels
        raise ValueError(f"torchao cannot quantise to int4 here: {error}") from None
    return _frozen(new)


def _torchao_nvfp4(module: nn.Module, dense: Tensor) -> dict[str, object]:
    old = module.weight
    dense, scale = _finite(dense, old.orig_dtype), old.per_tensor_scale
    if scale is not None:
        largest = dense.abs().amax().clamp_min(LEAST)
        scale = sys.modules[type(old).__module__].per_tensor_amax_to_scale(largest)
    options = {name: getattr(old, name) for name in ("act_per_tensor_scale", "is_swizzled_scales", "use_triton_kernel")}
    return _frozen(type(old).to_nvfp4(dense, per_tensor_scale=scale, **options))


def _hqq(module: nn.Module, dense: Tensor) -> dict[str, object]:
    config = copy.deepcopy(module.quant_config) | {"offload_meta": module.offload_meta}  # which it takes out
    new = type(module)(None, config, compute_dtype=module.compute_dtype, device=module.device)
    new.quantize(_finite(dense, module.compute_dtype), **new.quant_config)
    return {"W_q": new.W_q, "meta": new.meta}


_HQQ = Holder("HQQ weight", "W_q", _hqq)
_FP8_LINEAR = Holder("float8 weight of transformers", differentiable=False)
_TORCHAO = Holder("torchao weight", differentiable=False)
_HOLDERS = {
    "Params4bit": Holder("bitsandbytes 4-bit weight", requantised=_bnb_4bit),
    "Int8Params": Holder("bitsandbytes int8 weight", requantised=_bnb_int8),
    "Int4Tensor": Holder("torchao int4 weight", requantised=_torchao_int4, differentiable=False),
    "Int8Tensor": Holder("torchao int8 weight", requantised=_torchao_int8),
    "Float8Tensor": Holder("torchao float8 weight", requantised=_torchao_float8),
    "NVFP4Tensor": Holder("torchao NVFP4 weight", requantised=_torchao_nvfp4),
}
