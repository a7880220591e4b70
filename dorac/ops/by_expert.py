"""Rows by expert on the CPU: each product of all experts is one call, and so is each pass over the rows between them.

Where every row is a multiple of 16 bytes torch's grouped GEMM takes the products of float32: those of each expert's
slice, with no Python between them. Others' go slice by slice in ``ops/grouped.py``.

What a layer costs beside plain LoRA's is g of each row and one product with it, and in backward the same of dy and the
sum of ``dy * inner``; they lie where LoRA's second product lay. For float32 and float64 tensors of one dtype; the
others' sums are wider than they are, which ``ops/grouped_compose.py`` handles.

Legend: S rows, E experts, I in_features, O out_features, R rank.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from dorac.numerics import ZERO_ROW_NORM
from dorac.ops.grouped import groups, has_grouped_gemm, outer_by_group, product_by_group


def takes(x: Tensor, *others: Tensor | None) -> bool:
    """Whether tensors on the CPU are computed here."""
    one_dtype = all(t is None or t.dtype is x.dtype for t in others)
    return x.device.type == "cpu" and one_dtype and x.dtype in (torch.float32, torch.float64)


def even(x: Tensor, *stacks: Tensor) -> bool:
    """Whether torch's grouped GEMM takes all products with these."""
    sizes = [size for stack in stacks for size in stack.shape[1:]]
    return has_grouped_gemm(torch.float32, x, *stacks) and not any(size % 4 for size in sizes)


def _products(offsets: Tensor, by_torch: bool) -> tuple[Callable, Callable]:
    """Rows times an expert's ``[in, out]``, and the sums of rows' outer products, which are an expert's."""
    if by_torch:  # leaves rows that are no expert's as they were
        ends = offsets.to(torch.int32)
        return lambda x, m: F.grouped_mm(x, m, offs=ends), lambda left, right: F.grouped_mm(left.t(), right, offs=ends)
    return lambda x, m: product_by_group(x, m.mT, offsets), lambda left, right: outer_by_group(left, right, offsets)


def _index(offsets: Tensor, rows: int) -> Tensor:
    """The expert of each row that has one."""
    of_groups = groups(offsets, rows)  # which looks at the offsets
    taken = torch.arange(of_groups[-1][1].stop if of_groups else 0, dtype=offsets.dtype)
    return torch.searchsorted(offsets, taken, right=True)


def _rows(scaling: float | Tensor, like: Tensor, index: Tensor) -> float | Tensor:
    """A scaling as rows take it; the rest of them take any."""
    if not isinstance(scaling, Tensor):
        return scaling
    if not scaling.ndim:
        return scaling.item()
    of_rows = like.new_ones(len(like), 1)
    of_rows[: len(index), 0] = scaling[index]
    return of_rows


def _per_norm(vectors: Tensor, norm: Tensor, of_zero_rows: float) -> Tensor:
    return (vectors / norm).masked_fill_(norm <= ZERO_ROW_NORM, of_zero_rows)


def forward(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    bias: Tensor | None,
    norm: Tensor,
    offsets: Tensor,
    scaling: float | Tensor,
    training: bool,
    by_torch: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """``(y, h, inner)``, inner in training alone."""
    index, (product, _) = _index(offsets, len(x)), _products(offsets, by_torch)
    inner, h = product(x, weight.mT), product(x, lora_A.mT)
    y = product(h * _rows(scaling, h, index), lora_B.mT)
    inner += y
    to = y[: len(index)]
    torch.index_select(_per_norm(magnitude, norm, 1.0), 0, index, out=to)
    if bias is None:
        to *= inner[: len(index)]
    else:
        torch.addcmul(bias.index_select(0, index), to, inner[: len(index)], out=to)
    y[len(index) :] = 0
    return y, h, inner if training else None


def backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    norm: Tensor,
    offsets: Tensor,
    h: Tensor,
    inner: Tensor,
    scaling: float | Tensor,
    *,
    by_torch: bool,
    needs_x: bool,
    needs_bias: bool,
) -> tuple[Tensor | None, Tensor, Tensor, Tensor, Tensor | None]:
    """The gradients of x, lora_A, lora_B, magnitude and bias."""
    index, (product, outer) = _index(offsets, len(x)), _products(offsets, by_torch)
    s, g, d_inner = _rows(scaling, h, index), _per_norm(magnitude, norm, 1.0), torch.empty_like(inner)
    dy, to = dy[: len(index)], d_inner[: len(index)]
    d_g = torch.zeros_like(g).index_add_(0, index, torch.mul(dy, inner[: len(index)], out=to))
    d_bias = torch.zeros_like(g).index_add_(0, index, dy) if needs_bias else None
    torch.index_select(g, 0, index, out=to).mul_(dy)
    d_h = product(d_inner, lora_B).mul_(s)
    d_a, d_b = outer(d_h, x), outer(h * s, d_inner).mT.contiguous()  # the other way round takes twice as long
    dx = None
    if needs_x:
        dx = product(d_inner, weight)
        dx += product(d_h, lora_A)
        dx[len(index) :] = 0
    return dx, d_a, d_b, _per_norm(d_g, norm, 0.0), d_bias  # none reaches m of zero rows, whose g is the constant 1
