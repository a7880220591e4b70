"""The linear layer over parts of a weight's columns, in traced code: g is applied behind the ranks' sum.

A rank has a summand of ``inner = x W^T + s (x lora_A^T) lora_B^T``. In front of the sum ``y = g * inner`` is a pass of
its own, and backward needs the summand, which nobody else does. Behind it the compiler applies g in whatever consumes
y; backward needs the sum, in y's place where the consumer saves y (the norm of a residual stream does); and the
magnitude's gradient is that of all ranks, no summand.

In eager the layer is a kernel and a Function of its own, and stays in front.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dorac import checks
from dorac.functional.norm import scaling_number, scaling_tensor
from dorac.numerics import accumulate_dtype
from dorac.ops import front
from dorac.ops.collectives import Group
from dorac.ops.linear import dora_linear

if TYPE_CHECKING:
    from dorac.nn.linear import DoraLinear


def fits(layer: "DoraLinear", x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> bool:
    """Whether this is traced code that trains no more than the adapter, in one dtype, with a norm that is a constant.

    The tensors may be DTensors.
    """
    return (
        torch.compiler.is_compiling()
        and torch.is_grad_enabled()
        and not front.exporting_module()
        and not _under_transform()
        and not layer.norm_grad
        and layer._strength is None
        and not isinstance(layer._scaling, Tensor)
        and not (layer.training and layer.lora_dropout)
        and x.dtype is weight.dtype is lora_A.dtype is lora_B.dtype
        and front.autocast_dtype(x) is None
        and not weight.requires_grad
    )


def _under_transform() -> bool:
    """Whether a transform is traced: the op is plain aten there, which has no sum."""
    return front.under_transform()


_under_transform._dynamo_marked_constant = True  # Dynamo asks while it traces, see dorac/dense.py


def linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    weight_norm: Tensor,
    scaling: float,
    group: Group,
) -> Tensor:
    """y, of all ranks, without its bias. The gradient of lora_B is due, as those of lora_A and x are not."""
    checks.check_linear(x, weight, lora_A, lora_B, magnitude, None, weight_norm)
    s = scaling_tensor(scaling, weight, accumulate_dtype(weight, lora_A, lora_B))
    tensors = x, weight, lora_A, lora_B, magnitude, weight_norm, s, None
    return dora_linear(*tensors, scaling_number(scaling), None, False, group.group_name)
