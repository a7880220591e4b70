"""The dtype law and the zero-row rule, written once (DESIGN.md section 1)."""

import torch
from torch import Tensor

# Rows of W + s*BA whose norm is at or below this are treated as zero rows: their g is 1.
ZERO_ROW_NORM = 1e-12

# Scalings are float32 in the kernels and in the tensors that the ops take.
LARGEST_SCALING = torch.finfo(torch.float32).max

# What the norm can be computed in. float8 and integer weights are dequantised by their owner first.
FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def accumulate_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype in which norm, g and compose are computed: float64 if any input is float64, else float32."""
    for tensor in tensors:
        if tensor is not None and tensor.dtype is torch.float64:
            return torch.float64
    return torch.float32
