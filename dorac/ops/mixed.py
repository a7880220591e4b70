"""``dorac::mixed_linear``: ``y[i] = g_k * (x[i] W^T + s_k x[i] A_k^T B_k^T) + b`` with ``k = index[i]``, -1 for none.

Registration. As ``dorac::compose``: a CompositeImplicitAutograd op that picks per call.

- Without gradients, on GPUs that have the kernels: the leaf ``mixed_value``, the base product and two launches.
- With them, and on the CPU: two ``mixed_product`` in the place of LoRA's products, whose ``autograd.Function`` runs
  over the leaves ``mixed_product`` and ``mixed_outer``, each other's derivatives, so that every order of derivative is
  made of them. They sort the rows by adapter, and no factor is copied.
- Under ``torch.func``, export and for tensor subclasses, where a leaf would be wrong, every row gets copies of its
  adapter's factors.

A row that names no adapter there is raises IndexError on the CPU, an assertion on the device on CUDA.

Legend: N rows of the batch, L tokens of each, K adapters, I in_features, O out_features.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dorac.ops import front, grouped
from dorac.ops.compose import compose_aten, finite_part, magnitude_scale, takes_bias
from dorac.ops.library import lib, register_composite, register_leaf
from dorac.ops.take import take, take_aten

lib.define("mixed_product(Tensor x, Tensor stack, Tensor index) -> Tensor")
lib.define("mixed_outer(Tensor left, Tensor right, Tensor index, SymInt length) -> Tensor")
lib.define(
    "mixed_value(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor magnitude, Tensor? weight_norm, "
    "Tensor scaling, Tensor? bias, Tensor index, Tensor? ranks, bool rounds) -> Tensor"
)


@torch.library.register_fake("dorac::mixed_product", lib=lib)
def _mixed_product_fake(x, stack, index):
    return x.new_empty(*x.shape[:2], stack.shape[1])


@torch.library.register_fake("dorac::mixed_outer", lib=lib)
def _mixed_outer_fake(left, right, index, length):
    return left.new_empty(length, left.shape[2], right.shape[2])


@torch.library.register_fake("dorac::mixed_value", lib=lib)
def _mixed_value_fake(x, weight, lora_A, lora_B, magnitude, weight_norm, scaling, bias, index, ranks, rounds):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def in_range(index: Tensor, length: int) -> Tensor:
    """The index as torch takes it: -2 is no adapter, but would be the last but one."""
    return torch.where(index < -1, length, index.clamp(min=0))


def _rows_of(index: Tensor, length: int) -> dict[int, Tensor]:
    """The rows of each adapter that is named, from an index on the CPU."""
    index = index.to(torch.int64)
    if index.numel():
        for wrong in (index.min().item(), index.max().item()):
            if not -1 <= wrong < length:
                raise IndexError(f"index {wrong} is out of bounds for dimension 0 with size {length}")
    ordered, order = index.sort(stable=True)
    adapters, counts = ordered.unique_consecutive(return_counts=True)
    groups = zip(adapters.tolist(), order.split(counts.tolist()), strict=True)
    return {adapter: rows for adapter, rows in groups if adapter >= 0}


def _of_rows(t: Tensor, rows: Tensor) -> Tensor:
    """Their tokens, not copied where these are all rows."""
    return (t if len(rows) == len(t) else t[rows]).flatten(0, 1)


def _mixed_product(x: Tensor, stack: Tensor, index: Tensor) -> Tensor:
    """``[N, L, I], [K, O, I] -> [N, L, O]``; zero for rows with -1."""
    if x.is_cuda:
        return _sorted_product(x, stack, index)
    y = x.new_zeros(*x.shape[:2], stack.shape[1])
    for adapter, rows in _rows_of(index, len(stack)).items():
        y[rows] = (_of_rows(x, rows) @ stack[adapter].t()).view(len(rows), x.shape[1], -1)
    return y


def _mixed_outer(left: Tensor, right: Tensor, index: Tensor, length: int) -> Tensor:
    """``[N, L, O], [N, L, I] -> [K, O, I]``: the sum of ``left[i] right[i]^T`` over the rows of each adapter."""
    if left.is_cuda:
        return _sorted_outer(left, right, index, length)
    total = left.new_zeros(length, left.shape[2], right.shape[2])
    for adapter, rows in _rows_of(index, length).items():
        torch.mm(_of_rows(left, rows).t(), _of_rows(right, rows), out=total[adapter])
    return total


def _sorted(index: Tensor, tokens: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens' order by adapter, plain ones last, where each adapter's end, and which of the sorted have one."""
    numbers = torch.arange(length, device=index.device)
    known = numbers[in_range(index, length)]  # asserts what is out of range
    key = torch.where(index == -1, length, known)
    ordered, order = key.repeat_interleave(tokens, output_size=len(index) * tokens).sort(stable=True)
    return order, torch.searchsorted(ordered, numbers, right=True), ordered < length


def _sorted_product(x, stack, index):
    order, offsets, named = _sorted(index, x.shape[1], len(stack))
    rows = grouped.grouped_product(x.flatten(0, 1)[order], stack, offsets)
    y = torch.empty_like(rows)
    y[order] = torch.where(named[:, None], rows, 0)
    return y.view(*x.shape[:2], -1)


def _sorted_outer(left, right, index, length):
    order, offsets, _ = _sorted(index, left.shape[1], length)
    return grouped.grouped_outer(left.flatten(0, 1)[order], right.flatten(0, 1)[order], offsets)


mixed_product = register_leaf("mixed_product", _mixed_product, _mixed_product)
mixed_outer = register_leaf("mixed_outer", _mixed_outer, _mixed_outer)


class _MixedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, stack, index):
        needs_x, needs_stack = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if needs_stack else None, stack if needs_x else None, index)
        ctx.length = stack.shape[0]
        return mixed_product(x, stack, index)

    @staticmethod
    def backward(ctx, dy):
        x, stack, index = ctx.saved_tensors
        dx = None if stack is None else _MixedProduct.apply(dy, stack.mT, index)
        d_stack = None if x is None else _MixedOuter.apply(dy, x, index, ctx.length)
        return dx, d_stack, None


class _MixedOuter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, left, right, index, length):
        needs_left, needs_right = ctx.needs_input_grad[:2]
        ctx.save_for_backward(left if needs_right else None, right if needs_left else None, index)
        return mixed_outer(left, right, index, length)

    @staticmethod
    def backward(ctx, d_total):
        left, right, index = ctx.saved_tensors
        d_left = None if right is None else _MixedProduct.apply(right, d_total, index)
        d_right = None if left is None else _MixedProduct.apply(left, d_total.mT, index)
        return d_left, d_right, None, None


def _value_cuda(x, weight, lora_A, lora_B, magnitude, weight_norm, scaling, bias, index, ranks, rounds):
    from dorac.kernels.mixed import mixed

    rows = x.reshape(-1, x.shape[-1]) if x.numel() else x.new_empty(math.prod(x.shape[:-1]), x.shape[-1])
    base = F.linear(rows, weight)
    others = lora_A, lora_B, magnitude, weight_norm, scaling, bias, index, ranks
    return mixed(base, rows, *others, rounds=rounds)[0].view(*x.shape[:-1], -1)


def _value(x, weight, lora_A, lora_B, magnitude, weight_norm, scaling, bias, index, ranks, rounds):
    if rounds:
        lora_A, lora_B = lora_A.to(x.dtype), lora_B.to(x.dtype)
    return _by_products(x, weight, lora_A, lora_B, magnitude, weight_norm, scaling, bias, index, mixed_product)


mixed_value = register_leaf("mixed_value", _value, _value_cuda)


def _by_products(x, weight, lora_A, lora_B, magnitude, weight_norm, scaling, bias, index, product):
    """The layer of two products ``(x, stack, index)``, all else in aten."""
    chosen, plain = in_range(index, lora_A.shape[0]), index == -1

    def of_rows(stack: Tensor, plain_value: float) -> Tensor:
        """An entry per row; a plain row sees no entry, whatever it holds, and sends it no gradient."""
        entries = take(stack, chosen)
        return torch.where(plain.view(-1, *[1] * (entries.ndim - 1)), plain_value, entries)

    rows = x.reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1])
    lora = product(product(rows.to(lora_A.dtype), lora_A, index), lora_B, index)
    g = of_rows(magnitude, 1.0)
    if weight_norm is not None:
        g = magnitude_scale(g, of_rows(weight_norm, 1.0))
    s = of_rows(scaling, 0.0).view(-1, 1, 1)
    holds_bias = front.autocast_dtype(x) is None and takes_bias(x, bias)
    base = F.linear(x, weight, finite_part(bias) if holds_bias else None)
    return compose_aten(base.reshape(lora.shape), lora, g.unsqueeze(1), s, bias, False, holds_bias).view(base.shape)


def _mixed_linear(x, weight, lora_A, lora_B, magnitude, weight_norm, scaling, bias, index, ranks=None):
    differentiable = (x, weight, lora_A, lora_B, magnitude, weight_norm, scaling, bias)
    if front.under_transform() or front.exporting() or not front.all_plain(*differentiable, index, ranks):
        stacks = x, weight, lora_A, lora_B, magnitude, weight_norm, scaling, bias, index
        return _by_products(*stacks, _gathered_product)
    trained = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in differentiable)
    if not trained and front.has_kernels(*differentiable):
        dtype = front.autocast_dtype(x)
        if dtype is not None:
            x, weight = x.to(dtype), weight.to(dtype)
        with front.autocast_off(x):
            arguments = x, weight, lora_A, lora_B, magnitude, weight_norm, scaling, bias, index, ranks
            return mixed_value(*arguments, dtype is not None)
    stacks = x, weight, lora_A, lora_B, magnitude, weight_norm, scaling, bias, index
    return _by_products(*stacks, _sorted_under_autocast)


def _gathered_product(x, stack, index):
    """Where leaves would be wrong."""
    entries = take_aten(stack, in_range(index, stack.shape[0]))
    return x @ torch.where((index == -1).view(-1, 1, 1), 0.0, entries).mT


def _sorted_under_autocast(x, stack, index):
    if (dtype := front.autocast_dtype(x)) is not None:
        x, stack = (t if t.dtype is torch.float64 else t.to(dtype) for t in (x, stack))
    with front.autocast_off(x):
        return _MixedProduct.apply(x, stack, index)


mixed_linear = register_composite(
    "mixed_linear(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor magnitude, Tensor? weight_norm, "
    "Tensor scaling, Tensor? bias, Tensor index, Tensor? ranks=None) -> Tensor",
    _mixed_linear,
)
