"""``dorac::mixed_linear``: ``y[i] = g_k * (x[i] W^T + s_k x[i] A_k^T B_k^T) + b`` with ``k = index[i]``, -1 for none.

Registration. As ``dorac::compose``: a CompositeImplicitAutograd op that picks per call.

- On GPUs that have the kernels: without gradients the leaf ``mixed_value``, the base product and two launches; with
  gradients of the adapters, the bias and x an ``autograd.Function`` over ``mixed_forward`` and ``mixed_backward``,
  which keeps h and ``inner``, what g is multiplied with. A second derivative takes the next way.
- Elsewhere two ``mixed_product`` in the place of LoRA's products, whose ``autograd.Function`` runs over the leaves
  ``mixed_product`` and ``mixed_outer``, each other's derivatives, so that every order of derivative is made of them.
  They sort the rows by adapter, and no factor is copied.
- Under ``torch.func``, export and for tensor subclasses, where a leaf would be wrong, every row gets copies of its
  adapter's factors.

A row that names no adapter there is raises IndexError on the CPU, an assertion on the device on CUDA.

Legend: N rows of the batch, L tokens of each, K adapters, I in_features, O out_features.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dorac.numerics import ZERO_ROW_NORM
from dorac.ops import front, grouped
from dorac.ops.compose import compose_aten, finite_part, magnitude_scale, takes_bias
from dorac.ops.library import lib, register_composite, register_leaf
from dorac.ops.linear_function import rows_of, rows_of_each
from dorac.ops.take import sum_by_index, take, take_aten

LONG = 16  # tokens of a row, from which on the CPU has a product for each

lib.define("mixed_product(Tensor x, Tensor stack, Tensor index) -> Tensor")
lib.define("mixed_outer(Tensor left, Tensor right, Tensor index, SymInt length) -> Tensor")
lib.define(
    "mixed_value(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor magnitude, Tensor? weight_norm, "
    "Tensor scaling, Tensor? bias, Tensor index, Tensor? ranks, bool rounds) -> Tensor"
)

lib.define(
    "mixed_forward(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor magnitude, Tensor weight_norm, "
    "Tensor scaling, Tensor? bias, Tensor index, Tensor? ranks) -> (Tensor, Tensor, Tensor)"
)
lib.define(
    "mixed_backward(Tensor dy, Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor magnitude, "
    "Tensor weight_norm, Tensor scaling, Tensor h, Tensor inner, Tensor index, bool needs_x) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
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


@torch.library.register_fake("dorac::mixed_forward", lib=lib)
def _mixed_forward_fake(x, weight, lora_A, lora_B, magnitude, weight_norm, scaling, bias, index, ranks):
    tokens = math.prod(x.shape[:-1])
    return (
        x.new_empty(*x.shape[:-1], weight.shape[0]),
        lora_B.new_empty(tokens, lora_A.shape[1]),
        x.new_empty(tokens, weight.shape[0]),
    )


@torch.library.register_fake("dorac::mixed_backward", lib=lib)
def _mixed_backward_fake(dy, x, weight, lora_A, lora_B, magnitude, weight_norm, scaling, h, inner, index, needs_x):
    factors = (t.new_empty(t.shape) for t in (lora_A, lora_B, magnitude))
    return x.new_empty(x.shape if needs_x else (0,)), *factors


def in_range(index: Tensor, length: int) -> Tensor:
    """The index as torch takes it: -2 is no adapter, but would be the last but one."""
    return torch.where(index < -1, length, index.clamp(min=0))


def _pieces(index: Tensor, length: int, tokens: int) -> list[tuple[int, slice | Tensor]]:
    """Each adapter that is named with its rows, from an index on the CPU: where these are neighbours as a slice.

    Rows of many tokens are a slice each, or else copied together.
    """
    rows: dict[int, list[int]] = {}
    for row, adapter in enumerate(index.tolist()):
        rows.setdefault(adapter, []).append(row)
    for wrong in rows:
        if not -1 <= wrong < length:
            raise IndexError(f"adapter_index holds {wrong}, out of bounds for dimension 0 with size {length}")
    rows.pop(-1, None)
    pieces: list[tuple[int, slice | Tensor]] = []
    for adapter, own in rows.items():
        if own[-1] - own[0] + 1 == len(own):
            pieces.append((adapter, slice(own[0], own[-1] + 1)))
        elif tokens >= LONG:
            pieces += ((adapter, slice(row, row + 1)) for row in own)
        else:
            pieces.append((adapter, torch.tensor(own)))
    return pieces


def _mixed_product(x: Tensor, stack: Tensor, index: Tensor) -> Tensor:
    """``[N, L, I], [K, O, I] -> [N, L, O]``; zero for rows with -1."""
    if x.is_cuda:
        return _sorted_product(x, stack, index)
    y = x.new_zeros(*x.shape[:2], stack.shape[1])
    for adapter, rows in _pieces(index, len(stack), x.shape[1]):
        part = x[rows].flatten(0, 1)
        if isinstance(rows, slice):
            torch.mm(part, stack[adapter].t(), out=y[rows].flatten(0, 1))
        else:
            y[rows] = (part @ stack[adapter].t()).view(len(rows), *y.shape[1:])
    return y


def _mixed_outer(left: Tensor, right: Tensor, index: Tensor, length: int) -> Tensor:
    """``[N, L, O], [N, L, I] -> [K, O, I]``: the sum of ``left[i] right[i]^T`` over the rows of each adapter."""
    if left.is_cuda:
        return _sorted_outer(left, right, index, length)
    total = left.new_zeros(length, left.shape[2], right.shape[2])
    for adapter, rows in _pieces(index, length, left.shape[1]):
        total[adapter].addmm_(left[rows].flatten(0, 1).t(), right[rows].flatten(0, 1))
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
    return y.view(*x.shape[:2], stack.shape[1])


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

    rows = rows_of(x)
    base = F.linear(rows, weight)
    others = lora_A, lora_B, magnitude, weight_norm, scaling, bias, index, ranks
    return mixed(base, rows, *others, rounds=rounds)[0].view(*x.shape[:-1], weight.shape[0])


def _value(x, weight, lora_A, lora_B, magnitude, weight_norm, scaling, bias, index, ranks, rounds):
    if rounds:
        lora_A, lora_B = lora_A.to(x.dtype), lora_B.to(x.dtype)
    return _by_products(x, weight, lora_A, lora_B, magnitude, weight_norm, scaling, bias, index, mixed_product)


def _forward_cuda(x, weight, lora_A, lora_B, magnitude, weight_norm, scaling, bias, index, ranks):
    from dorac.kernels.mixed import mixed

    rows = rows_of(x)
    others = lora_A, lora_B, magnitude, weight_norm, scaling, bias, index, ranks
    y, h, inner = mixed(F.linear(rows, weight), rows, *others, want_inner=True)
    return y.view(*x.shape[:-1], weight.shape[0]), h, inner


def _forward(x, weight, lora_A, lora_B, magnitude, weight_norm, scaling, bias, index, ranks):
    rows, (g, s) = rows_of_each(x), _of_rows_scales(magnitude, weight_norm, scaling, index)
    h = mixed_product(rows.to(lora_A.dtype), lora_A, index)
    inner = F.linear(rows, weight) + s * mixed_product(h, lora_B, index)
    y = g.unsqueeze(1) * inner if bias is None else g.unsqueeze(1) * inner + bias
    y, inner = y.to(x.dtype), inner.to(x.dtype)
    return y.view(*x.shape[:-1], weight.shape[0]), rows_of(h), rows_of(inner)


def _backward_cuda(dy, x, weight, lora_A, lora_B, magnitude, weight_norm, scaling, h, inner, index, needs_x):
    from dorac.kernels.segments import segment_backward, segment_compose, segment_product

    rows, dy, scaling = rows_of(x), rows_of(dy), scaling.contiguous()
    order, offsets, _ = _sorted(index, rows.shape[0] // max(1, len(index)), len(lora_A))
    of_rows = offsets, order
    d_base, d_m, d_b, _ = segment_backward(dy, inner, magnitude, weight_norm, h, scaling, *of_rows, plain_tail=True)
    d_h = segment_product(dy, lora_B.mT, *of_rows, magnitude=magnitude, weight_norm=weight_norm, scaling=scaling)
    d_a = torch.empty_like(lora_A, memory_format=torch.contiguous_format)
    segment_backward(rows, None, None, None, d_h, 1.0, *of_rows, d_lora_B=d_a.mT)
    if not needs_x:
        return x.new_empty(0), d_a, d_b, d_m
    dx, _ = segment_compose(d_base @ weight, d_h, lora_A.mT, None, None, 1.0, None, *of_rows, plain_tail=True)
    return dx.view(x.shape), d_a, d_b, d_m


def _backward(dy, x, weight, lora_A, lora_B, magnitude, weight_norm, scaling, h, inner, index, needs_x):
    rows, (g, s), length = rows_of_each(x), _of_rows_scales(magnitude, weight_norm, scaling, index), len(lora_A)
    dy, h, inner = (t.reshape(*rows.shape[:2], t.shape[-1]) for t in (dy, h, inner))
    d_base = g.unsqueeze(1) * dy
    d_lora = (s * d_base).to(lora_B.dtype)
    d_h = mixed_product(d_lora, lora_B.mT, index)
    d_a, d_b = mixed_outer(d_h, rows.to(d_h.dtype), index, length), mixed_outer(d_lora, h, index, length)
    d_g = (dy.to(g.dtype) * inner.to(g.dtype)).sum(1)
    d_g = sum_by_index(torch.where((index == -1)[:, None], 0.0, d_g), in_range(index, length), length)
    norm = weight_norm.to(d_g.dtype)
    d_m = torch.where(norm <= ZERO_ROW_NORM, 0.0, d_g / torch.where(norm <= ZERO_ROW_NORM, 1.0, norm))
    dx = x.new_empty(0)
    if needs_x:
        dx = (d_base.to(x.dtype) @ weight + mixed_product(d_h, lora_A.mT, index)).to(x.dtype).view(x.shape)
    return dx, d_a, d_b, d_m.to(magnitude.dtype)


def _of_rows_scales(magnitude, weight_norm, scaling, index):
    """g ``[N, O]`` and s ``[N, 1, 1]`` of each row, 1 and 0 of a plain one."""
    chosen, plain = in_range(index, len(magnitude)), index == -1
    g, s = magnitude_scale(magnitude[chosen], weight_norm[chosen]), scaling[chosen]
    return torch.where(plain[:, None], 1.0, g), torch.where(plain, 0.0, s).view(-1, 1, 1)


mixed_value = register_leaf("mixed_value", _value, _value_cuda)
mixed_forward = register_leaf("mixed_forward", _forward, _forward_cuda)
mixed_backward = register_leaf("mixed_backward", _backward, _backward_cuda)


class _MixedLinear(torch.autograd.Function):
    """The layer over a frozen weight with a constant norm."""

    @staticmethod
    def forward(ctx, x, weight, lora_A, lora_B, magnitude, weight_norm, scaling, bias, index, ranks):
        arguments = x, weight, lora_A, lora_B, magnitude, weight_norm, scaling
        y, h, inner = mixed_forward(*arguments, bias, index, ranks)
        ctx.save_for_backward(*arguments, h, inner, bias, index)
        return y

    @staticmethod
    def backward(ctx, dy):
        *arguments, h, inner, bias, index = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled():  # differentiated again
            y = _by_products(*arguments, bias, index, _MixedProduct.apply)
            wanted = [i for i in (0, 2, 3, 4, 7) if needs[i]]
            inputs = [(*arguments, bias)[i] for i in wanted]
            found = dict(zip(wanted, torch.autograd.grad(y, inputs, dy, create_graph=True), strict=True))
            return *(found.get(i) for i in range(8)), None, None
        dx, d_a, d_b, d_m = mixed_backward(dy, *arguments, h, inner, index, needs[0])
        d_bias = dy.sum([*range(dy.ndim - 1)]).to(bias.dtype) if needs[7] else None
        return dx if needs[0] else None, None, d_a, d_b, d_m, None, None, d_bias, None, None


def _by_products(x, weight, lora_A, lora_B, magnitude, weight_norm, scaling, bias, index, product):
    """The layer of two products ``(x, stack, index)``, all else in aten."""
    chosen, plain = in_range(index, lora_A.shape[0]), index == -1

    def of_rows(stack: Tensor, plain_value: float) -> Tensor:
        """An entry per row; a plain row sees no entry, whatever it holds, and sends it no gradient."""
        entries = take(stack, chosen)
        return torch.where(plain.view(-1, *[1] * (entries.ndim - 1)), plain_value, entries)

    rows = rows_of_each(x)
    lora = product(product(rows.to(lora_A.dtype), lora_A, index), lora_B, index)
    g = of_rows(magnitude, 1.0)
    if weight_norm is not None:
        g = magnitude_scale(g, of_rows(weight_norm, 1.0))
    s = of_rows(scaling, 0.0).view(-1, 1, 1)
    g, held = g.unsqueeze(1), None
    if front.autocast_dtype(x) is None and takes_bias(x, bias):
        # g = 1 has the frozen layer's bits then. Further off, g times what was rounded with a large bias is lost.
        near = ((g >= 0.5) & (g <= 2)).all(0)
        held = torch.where(near, finite_part(bias), 0.0).flatten()
        bias = torch.where(near, bias - g * held, bias)
    base = F.linear(x, weight, held)
    return compose_aten(base.reshape(lora.shape), lora, g, s, bias, False).view(base.shape)


def _mixed_linear(x, weight, lora_A, lora_B, magnitude, weight_norm, scaling, bias, index, ranks=None):
    differentiable = (x, weight, lora_A, lora_B, magnitude, weight_norm, scaling, bias)
    if front.under_transform() or front.exporting() or not front.all_plain(*differentiable, index, ranks):
        stacks = x, weight, lora_A, lora_B, magnitude, weight_norm, scaling, bias, index
        return _by_products(*stacks, _gathered_product)
    trained = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in differentiable)
    dtype = front.autocast_dtype(x)
    if front.has_kernels(*differentiable) and (not trained or _is_usual(dtype or x.dtype, *differentiable)):
        if dtype is not None:
            x, weight = x.to(dtype), weight.to(dtype)
            if trained:
                lora_A, lora_B = lora_A.to(dtype), lora_B.to(dtype)
        with front.autocast_off(x):
            arguments = x, weight, lora_A, lora_B, magnitude, weight_norm, scaling, bias, index, ranks
            return _MixedLinear.apply(*arguments) if trained else mixed_value(*arguments, dtype is not None)
    stacks = x, weight, lora_A, lora_B, magnitude, weight_norm, scaling, bias, index
    return _by_products(*stacks, _sorted_under_autocast)


def _is_usual(dtype, x, weight, lora_A, lora_B, magnitude, weight_norm, scaling, bias) -> bool:
    """Whether the kernels train this: adapters over a frozen weight, factors in the products' dtype or float32."""
    constants = weight_norm is not None and not any(t.requires_grad for t in (weight, weight_norm, scaling))
    return constants and lora_A.dtype in (dtype, torch.float32)


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
