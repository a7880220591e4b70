"""``dorac::norm_factored``: the row norm of ``W + s * lora_B @ lora_A``, without the product.

Registration. ``norm_factored`` is a CompositeImplicitAutograd op whose body detaches its inputs (the norm is a constant
in backprop) and calls the opaque leaf op ``row_norm``, or plain aten where an opaque op would be wrong: under
``torch.func`` (a leaf has no vmap rule), in ``torch.export`` (an opaque node cannot run without Python) and for tensor
subclasses (a leaf knows nothing of them). Of DTensors ``ops/sharded.py`` takes the norm shard by shard. The same body
under FuncTorchBatchedDecomposition keeps vmap off its slow per-sample loop. The leaf carries no autograd, so nothing
can drop a gradient or a tangent silently: ``detach`` in front of it, unlike ``no_grad``, also stops forward-mode
tangents. It is opaque to the compiler because its chunked loop, on CUDA its Triton kernel, is what bounds memory.

With ``norm_grad`` the same value carries its gradient: where the leaf runs, through an ``autograd.Function`` that keeps
nothing but its inputs and the norm and goes over the columns of W once more in backward (the leaf
``row_norm_backward``); elsewhere through :func:`differentiable_norm`, whose plain aten every transform sees.

A row that is not finite has the norm inf on every route: some multiply an infinite factor by zero or add another
infinity where others do not, and NaN would depend on the route. float32 squares overflow from norms of 1.8e19 on: there
the norm is computed again of the row times 2^-64, which is exact.

Legend: O out_features, I in_features, R rank, C columns of one chunk; any of them may follow a dimension of experts.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dorac.numerics import ZERO_ROW_NORM, accumulate_dtype
from dorac.ops import front, sharded
from dorac.ops.library import lib, register_composite, register_leaf

DEFAULT_BUDGET = 256 * 2**20
SHRINK = 2.0**-64  # the squares of what is at most float32's largest number, shrunk, can be added up in float32


def column_chunks(weight: Tensor, lora_A: Tensor, lora_B: Tensor, expanded: bool, budget: int) -> list[slice]:
    """Chunks of the weight's columns, each so wide that every live buffer fits in ``budget`` bytes, at least one.

    ``expanded``: V is not formed, only ``W A^T``, ``A A^T`` and what else has a rank for a side.
    """
    experts = math.prod(weight.shape[:-2])
    out_features, in_features = experts * weight.shape[-2], weight.shape[-1]
    rank = lora_A.shape[-2]
    acc = accumulate_dtype(weight, lora_A, lora_B)
    # The converted chunks. No bool as a factor: with a symbolic size torch 2.11 has no product for it.
    per_column = (out_features if weight.dtype != acc else 0) + (experts * rank if lora_A.dtype != acc else 0)
    if not expanded:
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


def lengths(rows: Tensor, *, read: bool = False) -> Tensor:
    """The norm over the last dimension, inf where that is not finite. Overwrites ``rows`` that need no gradient.

    ``read``: reads the values, which is no wait on the CPU, and skips the second pass where it can.
    """
    norm = torch.linalg.vector_norm(rows, dim=-1)
    if rows.dtype is torch.float32 and not (read and bool(norm.isfinite().all())):
        shrunk = rows * SHRINK if rows.requires_grad else rows.mul_(SHRINK)
        norm = torch.where(norm.isfinite(), norm, torch.linalg.vector_norm(shrunk, dim=-1) / SHRINK)
    return _inf_for_nan(norm)


def _inf_for_nan(norm: Tensor) -> Tensor:
    return torch.where(norm.isnan(), math.inf, norm)


def row_norm_aten(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    scaling: Tensor,
    weight_sq: Tensor | None,
    budget: int,
    read: bool = False,
) -> Tensor:
    """The chunked norm in plain aten: ``V = W + s*BA`` is formed and squared one chunk of columns at a time.

    ``scaling``: 0-d, or one for each of a stack of layers.

    With ``weight_sq = ||W||^2`` given, the expansion ``||W||^2 + 2 s <W, BA> + s^2 ||BA||^2`` is used instead, which
    reads W in one matmul but cancels where a row of V is much shorter than that row of W. ``read``: see
    :func:`lengths`.
    """
    acc = accumulate_dtype(weight, lora_A, lora_B)
    addmm = torch.addmm if weight.ndim == 2 else torch.baddbmm
    # One element, not none: a 0-d factor would not promote lora_B.
    scaled_b_OR = lora_B * (scaling.to(acc).reshape(-1, 1, 1) if scaling.ndim else scaling.to(acc).reshape(1))
    chunks = column_chunks(weight, lora_A, lora_B, weight_sq is not None, budget)
    if weight_sq is None:
        # Summed in float64, so that many small chunks are as exact as one large one.
        square_O = scaled_b_OR.new_zeros(weight.shape[:-1], dtype=torch.float64)
        for chunk in chunks:  # nested, so that no chunk outlives its turn
            norm_O = lengths(addmm(weight[..., chunk].to(acc), scaled_b_OR, lora_A[..., chunk].to(acc)), read=read)
            square_O = square_O + norm_O.to(torch.float64).square()
        return square_O.sqrt().to(acc)
    u_OR = torch.zeros_like(scaled_b_OR)
    gram_RR = scaled_b_OR.new_zeros(*weight.shape[:-2], lora_A.shape[-2], lora_A.shape[-2])
    for chunk in chunks:
        u_OR = addmm(u_OR, weight[..., chunk].to(acc), lora_A[..., chunk].to(acc).mT)
        gram_RR = addmm(gram_RR, lora_A[..., chunk].to(acc), lora_A[..., chunk].to(acc).mT)
    largest_O1 = scaled_b_OR.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(acc).tiny)  # its square may overflow
    scaled_b_OR = scaled_b_OR / largest_O1
    cross_O = (scaled_b_OR * u_OR).sum(-1).double()
    product_O = ((scaled_b_OR @ gram_RR) * scaled_b_OR).sum(-1).double()
    largest_O = largest_O1.squeeze(-1).double()
    square_O = weight_sq.double() + largest_O * (2 * cross_O + largest_O * product_O)
    return _inf_for_nan(square_O.clamp_min(0).sqrt().to(acc))


def row_norm_backward_aten(
    row_scale: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: Tensor, budget: int
) -> tuple[Tensor, Tensor]:
    """``s (c B)^T V`` and ``(c V) A^T`` in chunks of columns, for ``c = d_norm / n``, in the accumulate dtype.

    The first is the gradient of lora_A, s times the second that of lora_B. V stays expanded: ``V A^T = U + s B G``,
    ``U = W A^T``, ``G = A A^T``. Differentiable in plain aten.
    """
    acc = accumulate_dtype(weight, lora_A, lora_B)
    b_OR = lora_B.to(acc)
    scaled_RO = scaling * (row_scale[..., None] * b_OR).mT
    product_RR = scaling * (scaled_RO @ b_OR)

    def products(chunk: slice) -> tuple[Tensor, Tensor, Tensor]:  # a function, so that no chunk outlives its turn
        w_OC, a_RC = weight[..., chunk].to(acc), lora_A[..., chunk].to(acc)
        return w_OC @ a_RC.mT, a_RC @ a_RC.mT, scaled_RO @ w_OC + product_RR @ a_RC

    u_OR, gram_RR, d_a_chunks = torch.zeros_like(b_OR), torch.zeros_like(product_RR), []
    for u_part, gram_part, d_a_RC in map(products, column_chunks(weight, lora_A, lora_B, True, budget)):
        u_OR, gram_RR = u_OR + u_part, gram_RR + gram_part
        d_a_chunks.append(d_a_RC)
    return torch.cat(d_a_chunks, -1), row_scale[..., None] * (u_OR + scaling * (b_OR @ gram_RR))


def differentiable_norm(norm: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: Tensor) -> Tensor:
    """``norm``, a constant, with the derivatives of every order of ``||W + s*BA||_row``, in plain aten.

    It is ``norm * sqrt(1 + (q - q.detach()))`` for ``q = ||V / norm||^2``: q is expanded, so its value would cancel
    where a row of V is short, but the difference is zero and has q's derivatives. A row that is zero or not finite
    stays constant: its norm has no derivative.
    """
    acc = norm.dtype
    zero_row = norm <= ZERO_ROW_NORM
    per_norm_O1 = torch.where(zero_row, 1.0, 1 / norm)[..., None]  # before squaring, which might overflow
    w_OI, a_RI, b_OR = weight.to(acc) * per_norm_O1, lora_A.to(acc), scaling * (lora_B.to(acc) * per_norm_O1)
    q_O = w_OI.square().sum(-1) + (b_OR * (2 * (w_OI @ a_RI.mT) + b_OR @ (a_RI @ a_RI.mT))).sum(-1)
    constant = zero_row | norm.isinf() | ~q_O.isfinite()
    return torch.where(constant, norm, torch.where(constant, 1.0, norm) * (1 + (q_O - q_O.detach())).sqrt())


lib.define(
    "row_norm(Tensor weight, Tensor lora_A, Tensor lora_B, Tensor scaling, Tensor? weight_sq, int budget) -> Tensor"
)
lib.define(
    "row_norm_backward(Tensor row_scale, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor scaling, int budget) "
    "-> (Tensor, Tensor)"
)


def _row_norm_cuda(weight, lora_A, lora_B, scaling, weight_sq, budget):
    from dorac.kernels import norm, stack_norm

    # These read W once in any case: neither square nor budget helps.
    if stack_norm.takes(weight, lora_A):
        return stack_norm.stack_norm(weight[0], lora_A, lora_B, scaling)
    return norm.row_norm(weight, lora_A, lora_B, scaling)


def _row_norm(weight, lora_A, lora_B, scaling, weight_sq, budget):
    return row_norm_aten(weight, lora_A, lora_B, scaling, weight_sq, budget, read=weight.device.type == "cpu")


row_norm = register_leaf("row_norm", _row_norm, _row_norm_cuda, inline=True)
row_norm_backward = register_leaf("row_norm_backward", row_norm_backward_aten, row_norm_backward_aten)


@torch.library.register_fake("dorac::row_norm", lib=lib)
def _row_norm_fake(weight, lora_A, lora_B, scaling, weight_sq, budget):
    return weight.new_empty(weight.shape[:-1], dtype=accumulate_dtype(weight, lora_A, lora_B))


@torch.library.register_fake("dorac::row_norm_backward", lib=lib)
def _row_norm_backward_fake(row_scale, weight, lora_A, lora_B, scaling, budget):
    acc = accumulate_dtype(weight, lora_A, lora_B)
    return lora_A.new_empty(lora_A.shape, dtype=acc), lora_B.new_empty(lora_B.shape, dtype=acc)


class _RowNorm(torch.autograd.Function):
    """The leaf with its gradient ``d_V = c V``, ``c = d_norm / n``. Saving its own output keeps n connected when the
    gradient is differentiated again."""

    @staticmethod
    def forward(ctx, weight, lora_A, lora_B, scaling, weight_sq, budget):
        norm = row_norm(weight, lora_A, lora_B, scaling, weight_sq, budget)
        ctx.save_for_backward(weight, lora_A, lora_B, scaling, norm)
        ctx.budget = budget
        return norm

    @staticmethod
    def backward(ctx, d_norm):
        weight, lora_A, lora_B, scaling, norm = ctx.saved_tensors
        needs_weight, needs_a, needs_b, needs_scaling = ctx.needs_input_grad[:4]
        # A leaf op can be neither differentiated again nor batched.
        leaf_op = not torch.is_grad_enabled() and not front.under_transform()
        d_weight = d_a = d_b = d_scaling = None
        with front.autocast_off(weight):
            zero_row = norm <= ZERO_ROW_NORM
            row_scale = torch.where(zero_row, 0.0, d_norm / torch.where(zero_row, 1.0, norm))
            if needs_a or needs_b or needs_scaling:
                backward = row_norm_backward if leaf_op else row_norm_backward_aten
                d_a, unscaled_d_b = backward(row_scale, weight, lora_A, lora_B, scaling, ctx.budget)
                d_a, d_b = d_a.to(lora_A.dtype), (scaling * unscaled_d_b).to(lora_B.dtype)
                d_scaling = (lora_B * unscaled_d_b).sum() if needs_scaling else None
            if needs_weight:
                acc = norm.dtype
                b_OR = scaling * row_scale[..., None] * lora_B.to(acc)
                chunks = column_chunks(weight, lora_A, lora_B, False, ctx.budget)
                d_weight = torch.cat(
                    [
                        (row_scale[..., None] * weight[..., c] + b_OR @ lora_A[..., c].to(acc)).to(weight.dtype)
                        for c in chunks
                    ],
                    -1,
                )
        return d_weight, d_a if needs_a else None, d_b if needs_b else None, d_scaling, None, None


def row_norms(
    layers: Sequence[tuple[Tensor, Tensor, Tensor] | None], scalings: Sequence[float], budgets: Sequence[int]
) -> list[Tensor | None]:
    """The norms of the layers ``(weight, lora_A, lora_B)`` that are computed faster together, without gradient.

    They have the bits of ``norm_factored``. Those that differ in nothing but their values take one launch of the
    kernel; on the CPU, where Python is the cost, each takes two ops. None stands for the others, which are to be taken
    alone: in traced code and while a CUDA graph is captured all of them, since the table of their addresses is made by
    the CPU. The caller has checked them and switched gradients off.
    """
    norms: list[Tensor | None] = [None] * len(layers)
    if torch.compiler.is_compiling() or front.under_transform() or front.capturing():
        return norms
    alike: dict[tuple, list[int]] = {}
    on_cpu: list[int] = []
    for i, tensors in enumerate(layers):
        if tensors is not None and front.all_eager(*tensors):
            if front.has_kernels(*tensors):
                if tensors[1].dtype.itemsize > tensors[0].dtype.itemsize:  # these are split first, each for itself
                    continue
                alike.setdefault(_layout(tensors), []).append(i)
            elif tensors[0].is_cpu:
                on_cpu.append(i)
    _cpu_row_norms(norms, on_cpu, layers, scalings, budgets)
    for members in alike.values():
        if len(members) > 1:
            from dorac.kernels.norm import row_norms

            taken = row_norms([layers[i] for i in members], [scalings[i] for i in members])
            for i, norm in zip(members, taken.unbind(), strict=True):
                norms[i] = norm
    return norms


def _cpu_row_norms(
    norms: list[Tensor | None],
    chosen: Sequence[int],
    layers: Sequence[tuple[Tensor, Tensor, Tensor] | None],
    scalings: Sequence[float],
    budgets: Sequence[int],
) -> None:
    """Sets those of the chosen norms that are float32 and taken of all columns at once.

    Then the squares, which are exact in float64, and their root give back what went in.
    """
    if torch.is_autocast_enabled("cpu"):
        return
    in_one: dict[tuple, bool] = {}
    factors: dict[float, Tensor] = {}
    for i in chosen:
        (weight, lora_A, lora_B), scaling, budget = layers[i], scalings[i], budgets[i]
        key = weight.shape, weight.dtype, lora_A.shape[0], lora_A.dtype, budget
        if key not in in_one:
            float32 = accumulate_dtype(weight, lora_A, lora_B) is torch.float32
            chunks = column_chunks(weight, lora_A, lora_B, False, budget)
            in_one[key] = weight.ndim == 2 and float32 and len(chunks) == 1
        if in_one[key]:
            if scaling not in factors:
                factors[scaling] = torch.full((1,), scaling, dtype=torch.float32, device="cpu")
            v_OI = torch.addmm(weight.float(), lora_B * factors[scaling], lora_A.float())
            norms[i] = torch.linalg.vector_norm(v_OI, dim=-1)
    taken = [norm for norm in norms if norm is not None]
    if taken and not torch.cat(taken).isfinite().all():  # norm_factored knows what to do
        norms[:] = [norm if norm is None or norm.isfinite().all() else None for norm in norms]


def _layout(tensors: Sequence[Tensor]) -> tuple:
    """Equal for layers that one launch can take: the kernel finds each by an offset of so many times 64 bytes."""
    return tuple((t.shape, t.stride(), t.dtype, t.device, t.data_ptr() % 64) for t in tensors)


def _norm_factored(weight, lora_A, lora_B, scaling, weight_sq=None, budget=DEFAULT_BUDGET, norm_grad=False):
    inputs = (weight, lora_A, lora_B, scaling)
    constants = [t if t is None else t.detach() for t in (*inputs, weight_sq)]
    transformed = front.under_transform()
    opaque = front.all_plain(*constants) and not transformed and not front.exporting()
    differentiable = norm_grad and (transformed or (torch.is_grad_enabled() and any(t.requires_grad for t in inputs)))
    with front.autocast_off(weight):
        if differentiable and opaque:
            return _RowNorm.apply(*inputs, constants[-1], budget)
        if sharded.any_sharded(*constants):  # the norms of the shards make no use of the weight's square
            norm = sharded.row_norm(*constants[:4], budget)
        else:
            norm = (row_norm if opaque else row_norm_aten)(*constants, budget)
        return differentiable_norm(norm, *inputs) if differentiable else norm


norm_factored = register_composite(
    "norm_factored(Tensor weight, Tensor lora_A, Tensor lora_B, Tensor scaling, Tensor? weight_sq=None, "
    f"int budget={DEFAULT_BUDGET}, bool norm_grad=False) -> Tensor",
    _norm_factored,
)
