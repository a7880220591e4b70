"""``dorac::take``: ``stack[index]``, entries of a stack chosen by number, with a gradient that sums in a fixed order.

Registration. As ``dorac::compose``: a CompositeImplicitAutograd op over a leaf. The gradient of plain indexing is an
accumulating ``index_put``, which Inductor turns into float atomics on CUDA; the leaf ``sum_by_index`` keeps one order,
whether eager or compiled. Under ``torch.func``, export and for tensor subclasses it is an embedding lookup: Inductor
compiles the Hessian of plain indexing to wrong numbers (torch 2.11 and 2.13), and crashes on that of ``index_select``.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dorac.numerics import accumulate_dtype
from dorac.ops import front
from dorac.ops.library import lib, register_composite, register_leaf


def take_aten(stack: Tensor, index: Tensor) -> Tensor:
    """``stack[index]`` for a vector of numbers, in differentiable aten."""
    length, *entry = stack.shape
    return F.embedding(index, stack.reshape(length, math.prod(entry))).view(index.shape[0], *entry)


lib.define("sum_by_index(Tensor entries, Tensor index, SymInt length) -> Tensor")


@torch.library.register_fake("dorac::sum_by_index", lib=lib)
def _sum_by_index_fake(entries, index, length):
    return entries.new_empty(length, *entries.shape[1:])


def _sum_by_index(entries: Tensor, index: Tensor, length: int) -> Tensor:
    acc = accumulate_dtype(entries)
    total = entries.new_zeros(length, *entries.shape[1:], dtype=acc)
    if entries.is_cuda:  # sorts; index_add adds atomically there, index_put does so on the CPU
        total.index_put_((index,), entries.to(acc), accumulate=True)
    else:
        total.index_add_(0, index, entries.to(acc))
    return total.to(entries.dtype)


sum_by_index = register_leaf("sum_by_index", _sum_by_index, _sum_by_index)


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx, stack, index):
        ctx.save_for_backward(index)
        ctx.length = stack.shape[0]
        return stack[index]

    @staticmethod
    def backward(ctx, d_entries):
        return SumByIndex.apply(d_entries, *ctx.saved_tensors, ctx.length), None


class SumByIndex(torch.autograd.Function):
    @staticmethod
    def forward(ctx, entries, index, length):
        ctx.save_for_backward(index)
        return sum_by_index(entries, index, length)

    @staticmethod
    def backward(ctx, d_total):
        return _Take.apply(d_total, *ctx.saved_tensors), None, None


def _take(stack, index):
    if front.under_transform() or front.exporting() or not front.all_plain(stack, index):
        return take_aten(stack, index)
    return _Take.apply(stack, index)


take = register_composite("take(Tensor stack, Tensor index) -> Tensor", _take)
