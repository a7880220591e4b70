"""``dorac::grouped_linear``: ``y[s] = W[e(s)] x[s]`` for rows sorted by expert, the product of mixtures of experts.

Rows past the last offset belong to no expert: they give zeros, and have no gradient.

Registration. As ``dorac::compose``: a CompositeImplicitAutograd op whose body applies an ``autograd.Function`` over
leaf ops. ``grouped_product`` and ``grouped_outer`` are each other's derivatives, so that every order of derivative is
made of them. Under ``torch.func``, export and for tensor subclasses, where a leaf would be wrong, every row gets a copy
of its expert's matrix: right, but with memory for ``S * O * I`` elements.

The leaves multiply expert by expert, which reads the offsets. On CUDA that would wait for the device, so that torch's
grouped GEMM takes what is bfloat16 with rows of whole multiples of 16 bytes, and the kernels of
``kernels/segments.py`` any product with few columns, such as a factor's. What is left waits; while a CUDA graph is
captured nothing can be read: there the kernels take all, and of float64 every expert multiplies all rows, those of
others masked.

Legend: S rows of all experts, E experts, I in_features, O out_features. offsets [E] are the ends of the experts' rows.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from dorac.ops import front
from dorac.ops.library import lib, register_composite, register_leaf
from dorac.ops.take import take_aten

THIN = 256  # columns, at most, of a product that the kernels take in any dtype of theirs

lib.define("grouped_product(Tensor x, Tensor weight, Tensor offsets) -> Tensor")
lib.define("grouped_outer(Tensor left, Tensor right, Tensor offsets) -> Tensor")


@torch.library.register_fake("dorac::grouped_product", lib=lib)
def _grouped_product_fake(x, weight, offsets):
    return x.new_empty(x.shape[0], weight.shape[1])


@torch.library.register_fake("dorac::grouped_outer", lib=lib)
def _grouped_outer_fake(left, right, offsets):
    return left.new_empty(offsets.shape[0], left.shape[1], right.shape[1])


def groups(offsets: Tensor, rows: int) -> list[tuple[int, slice]]:
    """The experts that have rows, with these."""
    ends = offsets.tolist()
    starts = [0, *ends][:-1]
    if any(start > end for start, end in zip(starts, ends, strict=True)) or (ends and ends[-1] > rows):
        raise ValueError(f"offsets must not decrease nor exceed the {rows} rows of x, got {ends}")
    return [(e, slice(*bounds)) for e, bounds in enumerate(zip(starts, ends, strict=True)) if bounds[0] < bounds[1]]


def product_by_group(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """``[S, I], [E, O, I] -> [S, O]``; zero for rows past the last offset."""
    y = x.new_zeros(x.shape[0], weight.shape[1])
    for expert, rows in groups(offsets, x.shape[0]):
        torch.mm(x[rows], weight[expert].t(), out=y[rows])
    return y


def outer_by_group(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    """``[S, O], [S, I] -> [E, O, I]``: the sum of ``left[s] right[s]^T`` over each expert's rows."""
    total = left.new_zeros(offsets.shape[0], left.shape[1], right.shape[1])
    for expert, rows in groups(offsets, left.shape[0]):
        torch.mm(left[rows].t(), right[rows], out=total[expert])
    return total


def _masks(offsets: Tensor, rows: int) -> Tensor:
    """``[E, rows, 1]``: which rows are each expert's."""
    index = torch.searchsorted(offsets, torch.arange(rows, device=offsets.device, dtype=offsets.dtype), right=True)
    return (index == torch.arange(len(offsets), device=offsets.device)[:, None]).unsqueeze(-1)


def masked_product(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """:func:`product_by_group` without reading the offsets."""
    y = x.new_zeros(x.shape[0], weight.shape[1])
    for mask, matrix in zip(_masks(offsets, x.shape[0]), weight, strict=True):
        y = torch.where(mask, x @ matrix.t(), y)
    return y


def masked_outer(left: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    """:func:`outer_by_group` without reading the offsets. Both sides are masked: zero times infinity is not zero."""
    masks = _masks(offsets, left.shape[0])
    return torch.stack([torch.where(m, left, 0).t() @ torch.where(m, right, 0) for m in masks])


def rows_by_expert(offsets: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """The expert of each row, and whether it has one; where it has none, the last's number."""
    numbers = torch.arange(rows, device=offsets.device, dtype=offsets.dtype)
    index = torch.searchsorted(offsets, numbers, right=True)
    return index.clamp(max=offsets.shape[0] - 1), index < offsets.shape[0]


def has_grouped_gemm(dtype: torch.dtype, *matrices: Tensor) -> bool:
    """Whether torch's grouped GEMM takes these: of the dtype, every row or column at another multiple of 16 bytes."""
    even = 16 // dtype.itemsize
    return all(
        t.dtype is dtype
        and t.numel() > 0
        and t.data_ptr() % 16 == 0
        and 1 in t.stride()[-2:]
        and 0 not in t.stride()
        and sum(stride % even != 0 for stride in t.stride()) == 1
        for t in matrices
    )


def _zero_tail(y: Tensor, offsets: Tensor) -> Tensor:
    from dorac.kernels.segments import zero_tail

    zero_tail(y, offsets)  # torch's grouped GEMM leaves it as it was
    return y


def _grouped_product_cuda(x, weight, offsets):
    if has_grouped_gemm(torch.bfloat16, x, weight) and weight.shape[1] % 8 == 0:
        return _zero_tail(F.grouped_mm(x, weight.mT, offs=offsets.to(torch.int32)), offsets)
    capturing = front.capturing()
    _, columns, length = weight.shape
    if front.has_kernels(x, weight) and x.dtype is weight.dtype and weight.numel():
        from dorac.kernels.segments import segment_compose, segment_product

        if columns <= THIN or (capturing and length > THIN):
            return segment_product(x, weight, offsets)
        if length <= THIN:
            return segment_compose(None, x, weight, None, None, 1.0, None, offsets)[0]
    return (masked_product if capturing else product_by_group)(x, weight, offsets)


def _grouped_outer_cuda(left, right, offsets):
    if has_grouped_gemm(torch.bfloat16, left, right):
        return F.grouped_mm(left.t(), right, offs=offsets.to(torch.int32))
    capturing = front.capturing()
    columns, rows = left.shape[1], right.shape[1]
    if front.has_kernels(left, right) and left.dtype is right.dtype and columns and rows and len(offsets):
        from dorac.kernels.segments import segment_backward

        if rows <= THIN or (capturing and columns > THIN):
            return segment_backward(left, None, None, None, right, 1.0, offsets)[2]
        if columns <= THIN:
            total = left.new_empty(len(offsets), columns, rows)
            segment_backward(right, None, None, None, left, 1.0, offsets, d_lora_B=total.mT)
            return total
    return (masked_outer if capturing else outer_by_group)(left, right, offsets)


grouped_product = register_leaf("grouped_product", product_by_group, _grouped_product_cuda)
grouped_outer = register_leaf("grouped_outer", outer_by_group, _grouped_outer_cuda)


class GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, offsets):
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None, offsets)
        return grouped_product(x, weight, offsets)

    @staticmethod
    def backward(ctx, dy):
        x, weight, offsets = ctx.saved_tensors
        dx = None if weight is None else GroupedLinear.apply(dy, weight.mT, offsets)
        d_weight = None if x is None else GroupedOuter.apply(dy, x, offsets)
        return dx, d_weight, None


class GroupedOuter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, left, right, offsets):
        needs_left, needs_right = ctx.needs_input_grad[:2]
        ctx.save_for_backward(left if needs_right else None, right if needs_left else None, offsets)
        return grouped_outer(left, right, offsets)

    @staticmethod
    def backward(ctx, d_total):
        left, right, offsets = ctx.saved_tensors
        d_left = None if right is None else GroupedLinear.apply(right, d_total, offsets)
        d_right = None if left is None else GroupedLinear.apply(left, d_total.mT, offsets)
        return d_left, d_right, None


def grouped_linear_aten(x, weight, offsets):
    """:func:`product_by_group` in plain differentiable aten."""
    index, taken = rows_by_expert(offsets, x.shape[0])
    return torch.where(taken.unsqueeze(-1), (take_aten(weight, index) @ x.unsqueeze(-1)).squeeze(-1), 0)


def _grouped_linear(x, weight, offsets):
    if (dtype := front.autocast_dtype(x)) is not None:
        x, weight = (t if t.dtype is torch.float64 else t.to(dtype) for t in (x, weight))
    with front.autocast_off(x):
        if front.under_transform() or front.exporting() or not front.all_plain(x, weight, offsets):
            return grouped_linear_aten(x, weight, offsets)
        return GroupedLinear.apply(x, weight, offsets)


grouped_linear = register_composite(
    "grouped_linear(Tensor x, Tensor weight, Tensor offsets) -> Tensor", _grouped_linear
)
