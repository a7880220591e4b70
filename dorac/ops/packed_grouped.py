"""``dorac::packed_grouped_linear``: :mod:`dorac.ops.grouped`'s product with experts whose weights are packed.

Registered as ``grouped_linear`` is. The leaf makes one chunk of rows of all experts dense after the other, so that the
host never reads the offsets, and multiplies as ``grouped_product`` does. It is its own derivative in x, the other way
round: of the weight, backward keeps the packed pieces alone.
"""

import torch
from torch import Tensor

from dorac import packed
from dorac.numerics import accumulate_dtype
from dorac.ops import front
from dorac.ops.grouped import grouped_linear, grouped_product
from dorac.ops.library import lib, register_composite, register_leaf
from dorac.ops.packed import row_chunks

ALIGNED = 64  # rows of a chunk: what torch's grouped GEMM takes

_WEIGHT = "str kind, Tensor?[] pieces, SymInt[] shape, ScalarType dtype, SymInt[] sizes, int budget"
lib.define(f"packed_grouped_product(Tensor x, Tensor offsets, {_WEIGHT}, bool transposed) -> Tensor")


@torch.library.register_fake("dorac::packed_grouped_product", lib=lib)
def _packed_grouped_product_fake(x, offsets, kind, pieces, shape, dtype, sizes, budget, transposed):
    return x.new_empty(x.shape[0], shape[-1] if transposed else shape[-2])


def _packed_grouped_product(
    x: Tensor,
    offsets: Tensor,
    kind: str,
    pieces: list[Tensor | None],
    shape: list[int],
    dtype: torch.dtype,
    sizes: list[int],
    budget: int,
    transposed: bool,
) -> Tensor:
    """``W[e(s)] x[s]``, or ``W[e(s)]^T x[s]``; zero for rows past the last offset."""
    weight = packed.unflatten(kind, pieces, shape, dtype, sizes)
    rows = weight.shape[-2]
    _, first_stop = row_chunks(weight, budget)[0] if rows else (0, 0)
    size = max(ALIGNED, first_stop // ALIGNED * ALIGNED)
    if transposed:  # a sum over chunks
        y = x.new_zeros(x.shape[0], weight.shape[-1], dtype=accumulate_dtype(x))
    else:
        y = x.new_empty(x.shape[0], rows)
    for start in range(0, rows, size):
        stop = min(start + size, rows)
        dense = _dense(weight, x.dtype, start, stop)
        if transposed:
            y += grouped_product(x[:, start:stop], dense.mT, offsets)
        else:
            y[:, start:stop] = grouped_product(x, dense, offsets)
        del dense  # before the next
    return y.to(x.dtype)


def _dense(weight: packed.Packed, dtype: torch.dtype, start: int, stop: int) -> Tensor:
    """Rows of every expert."""
    if dtype.itemsize <= 4 and front.has_packed_kernels(*weight[: weight.PIECES]) and weight.form() is not None:
        from dorac.kernels.packed_dense import packed_dense

        return packed_dense(weight, dtype, start, stop)
    return weight.rows(start, stop).to(dtype)


packed_grouped_product = register_leaf("packed_grouped_product", _packed_grouped_product, _packed_grouped_product)


class _PackedGroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, offsets, kind, shape, dtype, sizes, budget, transposed, *pieces):
        ctx.save_for_backward(offsets, *pieces)
        ctx.layout = kind, shape, dtype, sizes, budget, transposed
        return packed_grouped_product(x, offsets, kind, list(pieces), shape, dtype, sizes, budget, transposed)

    @staticmethod
    def backward(ctx, dy):
        (offsets, *pieces), (*layout, transposed) = ctx.saved_tensors, ctx.layout
        dx = _PackedGroupedLinear.apply(dy, offsets, *layout, not transposed, *pieces)
        return dx, *(None for _ in range(7 + len(pieces)))


def _packed_grouped_linear(x, offsets, kind, pieces, shape, dtype, sizes, budget):
    if (to := front.autocast_dtype(x)) is not None and x.dtype is not torch.float64:
        x = x.to(to)
    with front.autocast_off(x):
        if front.under_transform() or front.exporting() or not front.all_plain(x, offsets, *pieces):
            weight = packed.unflatten(kind, pieces, shape, dtype, sizes)
            return grouped_linear(x, weight.rows(0, weight.shape[-2]).to(x.dtype), offsets)
        return _PackedGroupedLinear.apply(x, offsets, kind, shape, dtype, sizes, budget, False, *pieces)


packed_grouped_linear = register_composite(
    f"packed_grouped_linear(Tensor x, Tensor offsets, {_WEIGHT}) -> Tensor", _packed_grouped_linear
)
