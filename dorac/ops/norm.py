"""``dorac::norm_factored``: the row norm of ``W + s * lora_B @ lora_A``, without the product.

Registration. ``norm_factored`` is a CompositeImplicitAutograd op whose body detaches its inputs (the norm is a constant
in backprop) and calls the opaque leaf op ``row_norm``, or plain aten where an opaque op would be wrong: under
``torch.func`` (a leaf has no vmap rule), in ``torch.export`` (an opaque node cannot run without Python) and for tensor
subclasses (a leaf knows nothing of them). DTensors go through ``ops/sharded.py``, which takes the norm shard by shard. The same body under FuncTorchBatchedDecomposition keeps vmap
off its slow per-sample loop. The leaf carries no autograd, so nothing can drop a gradient or a tangent silently:
``detach`` in front of it, unlike ``no_grad``, also stops forward-mode tangents. It is opaque to the compiler because
its chunked loop, on CUDA its Triton kernel, is what bounds memory.

Legend: O out_features, I in_features, R rank, C columns of one chunk; any of them may follow a dimension of experts.
"""

import math

import torch
from torch import Tensor

from dorac.numerics import accumulate_dtype
from dorac.ops import front, sharded
from dorac.ops.library import REVISION, lib, register_composite, register_leaf

DEFAULT_BUDGET = 256 * 2**20


def column_chunks(weight: Tensor, lora_A: Tensor, lora_B: Tensor, weight_sq: Tensor | None, budget: int) -> list[slice]:
    """Chunks of the weight's columns, each so wide that every live buffer fits in ``budget`` bytes, at least one."""
    experts = math.prod(weight.shape[:-2])
    out_features, in_features = experts * weight.shape[-2], weight.shape[-1]
    rank = lora_A.shape[-2]
    acc = accumulate_dtype(weight, lora_A, lora_B)
    per_column = (weight.dtype != acc) * out_features + (lora_A.dtype != acc) * experts * rank  # the converted chunks
    if weight_sq is None:
        fixed = out_features * (rank + 8)  # scaled lora_B, the float64 sum of squares and its temporaries
        per_column += out_features  # the adapted chunk
    else:
        # Scaled lora_B, U old and new, one product; Gram old and new.
        fixed = out_features * (4 * rank + 4) + 2 * experts * rank * rank
    columns = (budget // acc.itemsize - fixed) // max(per_column, 1)
    if weight.is_cuda and columns >= 64:
        columns = columns // 64 * 64
    columns = max(1, min(columns, in_features))
    return [slice(i, i + columns) for i in range(0, max(in_features, 1), columns)]


def row_norm_aten(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: Tensor, weight_sq: Tensor | None, budget: int
) -> Tensor:
    """The chunked norm in plain aten: ``V = W + s*BA`` is formed and squared one chunk of columns at a time.

    With ``weight_sq = ||W||^2`` given, the expansion ``||W||^2 + 2 s <W, BA> + s^2 ||BA||^2`` is used instead, which
    reads W in one matmul but cancels where a row of V is much shorter than that row of W.
    """
    acc = accumulate_dtype(weight, lora_A, lora_B)
    addmm = torch.addmm if weight.ndim == 2 else torch.baddbmm
    scaled_b_OR = lora_B * scaling.to(acc).reshape(1)  # one element, not none: a 0-d factor would not promote lora_B
    chunks = column_chunks(weight, lora_A, lora_B, weight_sq, budget)
    if weight_sq is None:
        # Summed in float64, so that many small chunks are as exact as one large one.
        square_O = scaled_b_OR.new_zeros(weight.shape[:-1], dtype=torch.float64)
        for chunk in chunks:  # nested, so that no chunk outlives its turn
            norm_O = torch.linalg.vector_norm(
                addmm(weight[..., chunk].to(acc), scaled_b_OR, lora_A[..., chunk].to(acc)), dim=-1
            )
            square_O = square_O + norm_O.to(torch.float64).square()
        return square_O.sqrt().to(acc)
    u_OR = torch.zeros_like(scaled_b_OR)
    gram_RR = scaled_b_OR.new_zeros(*weight.shape[:-2], lora_A.shape[-2], lora_A.shape[-2])
    for chunk in chunks:
        u_OR = addmm(u_OR, weight[..., chunk].to(acc), lora_A[..., chunk].to(acc).mT)
        gram_RR = addmm(gram_RR, lora_A[..., chunk].to(acc), lora_A[..., chunk].to(acc).mT)
    cross_O = 2 * (scaled_b_OR * u_OR).sum(-1)
    product_O = ((scaled_b_OR @ gram_RR) * scaled_b_OR).sum(-1)
    return (weight_sq.to(acc) + cross_O + product_O).clamp_min(0).sqrt()


lib.define(
    "row_norm(Tensor weight, Tensor lora_A, Tensor lora_B, Tensor scaling, Tensor? weight_sq, int budget) -> Tensor"
)


def _row_norm_cuda(weight, lora_A, lora_B, scaling, weight_sq, budget):
    from dorac.kernels.norm import row_norm

    return row_norm(weight, lora_A, lora_B, scaling)  # reads W once at any rate: neither square nor budget help


register_leaf("row_norm", row_norm_aten, _row_norm_cuda)


@torch.library.register_fake("dorac::row_norm", lib=lib)
def _row_norm_fake(weight, lora_A, lora_B, scaling, weight_sq, budget):
    return weight.new_empty(weight.shape[:-1], dtype=accumulate_dtype(weight, lora_A, lora_B))


def _norm_factored(weight, lora_A, lora_B, scaling, weight_sq=None, budget=DEFAULT_BUDGET, revision=REVISION):
    tensors = [t if t is None else t.detach() for t in (weight, lora_A, lora_B, scaling, weight_sq)]
    if sharded.any_sharded(*tensors):  # the norm of the shards makes no use of the weight's square
        return sharded.row_norm(*tensors[:4], budget)
    opaque = front.all_plain(*tensors) and not front.under_transform() and not front.exporting()
    with front.autocast_off(weight):
        return (torch.ops.dorac.row_norm if opaque else row_norm_aten)(*tensors, budget)


register_composite(
    "norm_factored(Tensor weight, Tensor lora_A, Tensor lora_B, Tensor scaling, Tensor? weight_sq=None, "
    f"int budget={DEFAULT_BUDGET}, int revision={REVISION}) -> Tensor",
    _norm_factored,
)
