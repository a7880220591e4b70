"""Whether a tensor is what it looks like: values of its dtype, each in its place in memory.

Some have a float dtype and are something else: sparse, nested and MKL-DNN tensors, and subclasses that answer for
quantised, masked or otherwise encoded data (torchao's ``Int8Tensor`` calls itself bfloat16).
"""

import sys

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

PLAIN = (Tensor, torch.nn.Parameter)
_QUANTISED = ("quant_state", "SCB")  # of bitsandbytes, whose packed values may have any dtype


def not_dense(tensor: Tensor) -> str | None:
    """Why ``tensor`` cannot be computed with as its dtype and shape say, and what to do; None if it can.

    A subclass that sees operations (``__torch_dispatch__``) passes if it consists of tensors of its own dtype, as
    DTensors and those that wait for a collective do: then it is left to it what aten operations do.
    """
    if tensor.is_nested:
        return "is nested: pad it (torch.nested.to_padded_tensor), or give its parts one by one"
    if tensor.layout is not torch.strided:
        return f"has the layout {tensor.layout}: make it dense with to_dense()"
    if type(tensor) in PLAIN:
        return None
    return _unlike_its_dtype(tensor)


def _unlike_its_dtype(tensor: Tensor) -> str | None:
    kind = type(tensor)
    if isinstance(tensor, torch.nn.parameter.UninitializedTensorMixin):
        return f"is an {kind.__name__}, which has no values yet: run one batch first"
    if any(getattr(tensor, name, None) is not None for name in _QUANTISED):
        return f"is quantised ({kind.__name__}): dequantise it first"
    sees_nothing = kind.__torch_dispatch__ is Tensor.__torch_dispatch__
    if sees_nothing or isinstance(tensor, (FakeTensor, FunctionalTensor)) or _is_sharded(tensor):
        return None
    return _encoded(tensor)


def _is_sharded(tensor: Tensor) -> bool:
    distributed = sys.modules.get("torch.distributed.tensor")  # whoever made a DTensor has imported it
    return distributed is not None and isinstance(tensor, distributed.DTensor)


def _encoded(tensor: Tensor) -> str | None:
    kind = type(tensor).__name__
    if not hasattr(tensor, "__tensor_flatten__"):
        return f"is a {kind}, which decides by itself what operations do: give the plain tensor that it stands for"
    parts = {name: getattr(tensor, name).dtype for name in tensor.__tensor_flatten__()[0]}
    other = [f"{name}: {dtype}" for name, dtype in parts.items() if dtype != tensor.dtype]
    if other:
        return f"is a {kind}, which holds something else than {tensor.dtype} ({', '.join(other)}): dequantise it first"
    return None


# Dynamo does not trace into what a subclass is made of. It is torch.compiler.assume_constant_result that sets this, but
# imports Dynamo, and with it Triton.
_encoded._dynamo_marked_constant = True
