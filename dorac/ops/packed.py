"""``dorac::packed_norm_factored``: the row norm of ``W + s * lora_B @ lora_A`` over a packed weight.

Registered as ``norm_factored`` is: a composite whose body detaches its inputs and calls the opaque leaf, or plain aten
under transforms, in export and for subclasses. The value (``dorac/packed``) travels as its pieces and sizes. Where no
kernel reads the format, :func:`dorac.ops.norm.row_norm_aten` takes the norm of one chunk of dense rows after the other:
there is no second definition of it.
"""

import torch
from torch import Tensor

from dorac import packed
from dorac.numerics import accumulate_dtype
from dorac.ops import front
from dorac.ops.library import lib, register_composite, register_leaf
from dorac.ops.norm import row_norm_aten

CPU_CHUNK = 8 * 2**20


def row_chunks(weight: packed.Packed, budget: int) -> list[tuple[int, int]]:
    """Ranges of rows, each so short that making it dense takes at most half of ``budget`` bytes, or of one row.

    On the CPU no more than what its caches hold of it, whose memory is also found again by the next chunk.
    """
    *experts, out_features, in_features = weight.shape
    per_row = weight.SCRATCH * in_features
    for count in experts:
        per_row = per_row * count
    most = budget // 2 if weight.device.type != "cpu" else min(budget // 2, CPU_CHUNK)
    rows = max(1, most // max(1, per_row))
    return [(start, min(start + rows, out_features)) for start in range(0, out_features, rows)]


def dense_rows(weight: packed.Packed, dtype: torch.dtype, budget: int) -> Tensor:
    """The whole weight in ``dtype``; ``budget``: bytes for what making it takes beside that."""
    dense = torch.empty(weight.shape, dtype=dtype, device=weight.device)
    for start, stop in row_chunks(weight, budget):
        dense[..., start:stop, :] = weight.rows(start, stop)
    return dense


def packed_row_norm_aten(
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: Tensor,
    weight_sq: Tensor | None,
    kind: str,
    pieces: list[Tensor | None],
    shape: list[int],
    dtype: torch.dtype,
    sizes: list[int],
    budget: int,
    read: bool = False,
) -> Tensor:
    """The norm of chunk after chunk of dense rows; each takes half of the budget, and its norm the other half."""
    weight = packed.unflatten(kind, pieces, shape, dtype, sizes)
    norms = [lora_B.new_zeros(*shape[:-2], 0, dtype=accumulate_dtype(lora_A, lora_B))]
    for start, stop in row_chunks(weight, budget):
        square = None if weight_sq is None else weight_sq[..., start:stop]
        rows = weight.rows(start, stop)
        factors = lora_A, lora_B[..., start:stop, :]
        norms.append(row_norm_aten(rows, *factors, scaling, square, max(1, budget // 2), read))
        del rows  # before the next
    return torch.cat(norms, -1)


lib.define(
    "packed_row_norm(Tensor lora_A, Tensor lora_B, Tensor scaling, Tensor? weight_sq, str kind, Tensor?[] pieces, "
    "SymInt[] shape, ScalarType dtype, SymInt[] sizes, int budget) -> Tensor"
)


def _packed_row_norm(lora_A, *args):
    return packed_row_norm_aten(lora_A, *args, read=lora_A.device.type == "cpu")


def _packed_row_norm_cuda(lora_A, lora_B, scaling, weight_sq, kind, pieces, shape, dtype, sizes, budget):
    from dorac.kernels.packed_norm import packed_row_norm

    weight = packed.unflatten(kind, pieces, shape, dtype, sizes)
    if front.has_packed_kernels(*weight[: weight.PIECES]) and weight.form() is not None:
        return packed_row_norm(weight, lora_A, lora_B, scaling)
    return packed_row_norm_aten(lora_A, lora_B, scaling, weight_sq, kind, pieces, shape, dtype, sizes, budget)


packed_row_norm = register_leaf("packed_row_norm", _packed_row_norm, _packed_row_norm_cuda)


@torch.library.register_fake("dorac::packed_row_norm", lib=lib)
def _packed_row_norm_fake(lora_A, lora_B, *_):
    return lora_B.new_empty(lora_B.shape[:-1], dtype=accumulate_dtype(lora_A, lora_B))


def _packed_norm_factored(lora_A, lora_B, scaling, weight_sq, kind, pieces, shape, dtype, sizes, budget):
    tensors = [None if t is None else t.detach() for t in (lora_A, lora_B, scaling, weight_sq, *pieces)]
    opaque = front.all_plain(*tensors) and not front.under_transform() and not front.exporting()
    with front.autocast_off(lora_A):
        row_norm = packed_row_norm if opaque else packed_row_norm_aten
        return row_norm(*tensors[:4], kind, tensors[4:], shape, dtype, sizes, budget)


packed_norm_factored = register_composite(
    "packed_norm_factored(Tensor lora_A, Tensor lora_B, Tensor scaling, Tensor? weight_sq, str kind, "
    "Tensor?[] pieces, SymInt[] shape, ScalarType dtype, SymInt[] sizes, int budget) -> Tensor",
    _packed_norm_factored,
)
