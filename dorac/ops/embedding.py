"""``dorac::sparse_columns``: columns of a matrix as rows, with a sparse gradient for the matrix.

``F.embedding(index, matrix.T, sparse=True)`` looks up the same, but its gradient has one sparse and one dense
dimension, which autograd cannot transpose back to the matrix. Here both are sparse, as optimisers of sparse gradients
take them. ``gather(..., sparse_grad=True)`` gives such a gradient too, but not through Inductor.

Registration. As ``dorac::compose``: an ``autograd.Function`` in eager and under the compiler. Under ``torch.func``,
forward-mode AD and export and for tensor subclasses it is the lookup of ``dorac::take``, whose gradient is dense: vmap
knows no sparse tensors.

Legend: R rows of the matrix, V its columns, T indices.
"""

import torch

from dorac.ops import front
from dorac.ops.library import register_composite
from dorac.ops.take import take_aten


class _SparseColumns(torch.autograd.Function):
    @staticmethod
    def forward(ctx, matrix_RV, index_T):
        ctx.save_for_backward(index_T)
        ctx.shape = matrix_RV.shape
        return matrix_RV.index_select(1, index_T).t()

    @staticmethod
    def backward(ctx, d_TR):
        (index_T,) = ctx.saved_tensors
        rows = torch.arange(ctx.shape[0], device=index_T.device)
        grid = torch.broadcast_tensors(rows[:, None], index_T[None])
        indices = torch.stack([coordinate.reshape(-1) for coordinate in grid])
        # As torch builds such a gradient: the lookup has checked the indices, and 2.11 warns of the public constructor.
        return torch.ops.aten._sparse_coo_tensor_unsafe(indices, d_TR.t().reshape(-1), ctx.shape), None


def _sparse_columns(matrix, index):
    tensors = (matrix, index)
    plain = front.under_transform() or front.exporting() or not front.all_plain(*tensors)
    if plain or not (torch.is_grad_enabled() and matrix.requires_grad):
        return take_aten(matrix.t(), index)
    return _SparseColumns.apply(*tensors)


sparse_columns = register_composite("sparse_columns(Tensor matrix, Tensor index) -> Tensor", _sparse_columns)
