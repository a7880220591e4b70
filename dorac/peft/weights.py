"""The base weight and the factors as the norm and the products can read them: gathered, dequantised, on one device."""

import contextlib
import copy
import math
import sys
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dorac import packed
from dorac.numerics import FLOAT_DTYPES
from dorac.ops.norm import DEFAULT_BUDGET
from dorac.stock_peft import dequantize_bnb_weight, dequantize_module_weight


def is_partitioned(tensor: Tensor | None) -> bool:
    """Whether DeepSpeed ZeRO-3 holds ``tensor`` in parts, of which this process may have none at the moment."""
    return hasattr(tensor, "ds_id")


def is_plain(weight: Tensor | None) -> bool:
    """Whether ``weight`` can be used as it lies there: dense, float, whole.

    Not bitsandbytes' 4-bit numbers, which FSDP gathers into a plain parameter of a float dtype.
    """
    kind = type(weight)
    if (kind is not nn.Parameter and kind is not Tensor) or weight.dtype not in FLOAT_DTYPES:
        return False
    return not hasattr(weight, "ds_id") and not hasattr(weight, "quant_state")


def is_fsdp_unit(module: nn.Module) -> bool:
    """Whether FSDP1 wraps ``module`` by itself: its parameters are whole during its forward only."""
    fsdp = sys.modules.get("torch.distributed.fsdp")  # whoever wrapped it has imported it
    return fsdp is not None and isinstance(module, fsdp.FullyShardedDataParallel)


def whole(tensor: Tensor, numel: int | None = None) -> Tensor:
    """``tensor`` itself, a weight or a factor; or a magnitude that has ``numel`` elements.

    Raises:
        RuntimeError: FSDP1 holds it in parts now.
    """
    # A parameter in parts is what this process has of it, flattened. With use_orig_params=False, which does not compile
    # in any case, it keeps its shape, but is a view of a storage that is empty, and reading it crashes.
    flattened = tensor.ndim < 2 if numel is None else tensor.numel() != numel
    if not flattened and (torch.compiler.is_compiling() or tensor._base is None):
        return tensor
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None or is_partitioned(tensor):
        return tensor
    in_parts = flattened or (isinstance(tensor._base, fsdp.FlatParameter) and tensor.untyped_storage().size() == 0)
    if in_parts:
        raise RuntimeError(
            "FSDP holds a parameter of this DoRA layer in parts here. Inside forward: give base_layer no FSDP unit of "
            "its own, but one together with its LoRA layer or block. Outside: use "
            "FullyShardedDataParallel.summon_full_params(model)."
        )
    return tensor


def call_unit(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """``module(x)`` and the weight that it used: a copy if ``module`` is an FSDP unit, which frees its own."""
    if not is_fsdp_unit(module):
        return module(x), module.weight
    weights = []
    hook = module.module.register_forward_pre_hook(lambda inner, _: weights.append(inner.weight.detach().clone()))
    try:
        return module(x), weights[0]
    finally:
        hook.remove()


def own_weight(base_layer: nn.Module) -> Tensor | None:
    """The layer's ``weight``; None for HQQ's, to which transformers 4 gives an empty one."""
    return None if hasattr(base_layer, "W_q") else getattr(base_layer, "weight", None)


def dense_weight(base_layer: nn.Module) -> Tensor:
    """The base layer's weight: itself if it is plain, a dequantised copy if PEFT knows how to make one.

    Raises:
        RuntimeError: FSDP1 holds it in parts now.
    """
    weight = own_weight(base_layer)
    if is_plain(weight):
        return whole(weight)
    # For bitsandbytes dequantize_module_weight also puts a new parameter into a layer on the CPU; an 8-bit layer then
    # takes its scales from that one, which has none, and fails.
    if type(weight).__name__ == "Int8Params":
        return dequantize_bnb_weight(weight, state=base_layer.state)
    if type(weight).__name__ == "Params4bit":
        return _dequantize_4bit(weight)
    if type(base_layer).__name__ == "FP8Linear" and (value := packed.of(base_layer)) is not None:
        return value.rows(0, value.shape[0])  # PEFT has its numbers without their scales
    return dequantize_module_weight(base_layer)


def _dequantize_4bit(weight: Tensor) -> Tensor:
    from bitsandbytes import functional

    data, state = weight.data, weight.quant_state
    if getattr(state, "packing_format_for_cpu", False):
        # In eval mode the layer repacks its weight for the CPU's bf16 instructions, which dequantize_4bit misreads.
        data, state = functional._convert_weight_packed_for_cpu_inverse(data, copy.copy(state))
    return functional.dequantize_4bit(data, state)


@contextlib.contextmanager
def written_in_place(base_layer: nn.Module) -> Iterator[None]:
    """What the block assigns as the base layer's ``weight.data`` is written to the memory that the weight has.

    FSDP1's ``summon_full_params`` keeps at its end what was written there; an assignment it would lose. It counts as a
    write in place, for whoever keeps something that was taken of the weight.

    Raises:
        RuntimeError: FSDP1 holds the weight in parts now.
    """
    weight = getattr(base_layer, "weight", None)
    if not is_plain(weight):
        yield
        return
    memory = whole(weight).data
    try:
        yield
    finally:
        if weight.data_ptr() != memory.data_ptr():
            written, weight.data = weight.data, memory
            with torch.no_grad():
                weight.copy_(written)


def partitioned_base(view: Tensor) -> Tensor:
    """The partitioned parameter that ``view`` was taken of, which holds nothing until it is gathered; or ``view``."""
    return view._base if is_partitioned(view._base) else view


def _is_gathered(tensor: Tensor) -> bool:
    return tensor.numel() == math.prod(tensor.ds_shape)


@contextlib.contextmanager
def gathered(tensors: Iterable[Tensor]) -> Iterator[bool]:
    """The partitioned ones of ``tensors`` made whole for the block; yields whether there are any.

    What the block computes from them must not refer to their storage afterwards.

    Raises:
        RuntimeError: DeepSpeed left one of them in parts; a norm of it would be wrong.
    """
    partitioned = [t for t in tensors if is_partitioned(t)]
    if not partitioned:
        yield False
        return
    # Of one that is whole already, for a module that runs or in a block around this one, DeepSpeed takes no second
    # gathering. PEFT's gather_params_ctx would do nothing where transformers does not know of DeepSpeed's config.
    others = [t for t in partitioned if not _is_gathered(t)]
    zero = sys.modules["deepspeed"].zero
    with zero.GatheredParameters(others, modifier_rank=None):  # only read: nothing to broadcast at the end
        for tensor in partitioned:
            if not _is_gathered(tensor):
                raise RuntimeError(
                    f"DeepSpeed did not gather a parameter of shape {list(tensor.ds_shape)}: "
                    f"this process holds {tensor.numel()} of its elements"
                )
        yield True


def linear_from_copy(x: Tensor, weight: Tensor, budget: int = DEFAULT_BUDGET) -> Tensor:
    """``x W^T`` in the dtype of x; a weight of another dtype is converted in chunks of rows of ``budget`` bytes."""
    if weight.dtype == x.dtype:
        return F.linear(x, weight)
    rows = max(1, budget // max(1, weight.shape[1] * x.dtype.itemsize))
    return torch.cat([F.linear(x, chunk.to(x.dtype)) for chunk in weight.split(rows)], dim=-1)
