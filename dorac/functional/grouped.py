"""The linear layers of a mixture of experts, over rows that are sorted by expert."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dorac import checks, ops, packed
from dorac.functional.norm import norm_factored, scaling_tensor
from dorac.numerics import accumulate_dtype
from dorac.ops import eager_grouped
from dorac.ops.gate import Gate
from dorac.ops.norm import DEFAULT_BUDGET


def dora_linear_grouped(
    x: Tensor,
    weight: Tensor | packed.Packed,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    bias: Tensor | None = None,
    *,
    offsets: Tensor,
    scaling: float | Tensor,
    weight_norm: Tensor | None = None,
    norm_grad: bool = False,
    dropout_p: float = 0.0,
    dropout_on: str = "adapter",
    gate: Gate | None = None,
    budget: int = DEFAULT_BUDGET,
) -> Tensor:
    """:func:`dora_linear` with one of E layers per row: rows ``offsets[e - 1] : offsets[e]`` of x go through expert e.

    This is ``torch.nn.functional.grouped_mm`` with an adapter: as many rows per expert as the router sends it, no
    padding, no expert computed for rows that are not its own, and no dense ``[E, out, in]`` product of the factors.

    Args:
        x: ``[S, in]``, sorted by expert.
        weight: ``[E, out, in]``, any strides (a view of ``[E, in, out]`` is not copied). Or packed (mxfp4, ...; see
            :func:`dorac.packed.of`): chunks of its rows are made dense in the dtype of x, in forward and in backward.
        lora_A: ``[E, r, in]``. lora_B: ``[E, out, r]``. magnitude: ``[E, out]``. bias: ``[E, out]``.
        offsets: ``[E]``, int32 or int64: where each expert's rows end, not decreasing, the last at most S. Rows past it
            are no expert's.
        scaling: s, a finite number or a 0-d tensor for all experts, or ``[E]``, one each.
        gate: of a projection that is gate and up in one, what joins them: ``z = gate(y)``, a :class:`Gate`.
        weight_norm ``[E, out]``, norm_grad, dropout_p, dropout_on, budget, dtypes: as in :func:`dora_linear`.

    Returns:
        ``[S, out]``, zero in rows that are no expert's; with a gate ``[S, out / 2]``. Gradients as in
        :func:`dora_linear`; those of an expert without rows are zero.

        On CUDA the base product runs in torch's grouped GEMM where it is bfloat16 with sizes that are multiples of 8;
        others run expert by expert, which waits for the offsets. All else, factors of any rank and of float32 too, runs
        in kernels that find the experts' rows on the device. Under ``torch.func`` every row gets a copy of its expert's
        weight. In eager a gate is in these kernels, too: neither y nor its gradient is ever written or kept.

    Raises:
        TypeError, ValueError: as :func:`dora_linear`; offsets of another shape or dtype; a gate of an odd number
            of outputs. Offsets that decrease or exceed S, where they are read, on the CPU; on CUDA they are not, and
            rows may stay unwritten.
    """
    each = isinstance(scaling, Tensor) and scaling.ndim == 1
    if not each:
        scaling = checks.check_scaling(scaling)
    dropout_p = checks.check_dropout(dropout_p)
    checks.check_dropout_on(dropout_on)
    if gate is not None and type(gate) is not Gate:  # kernels know what a Gate computes, not a subclass
        raise TypeError(f"gate must be a Gate, got {type(gate).__name__}")
    plain = not dropout_p and norm_grad is False and budget == DEFAULT_BUDGET and not packed.is_packed(weight)
    plain = plain and not torch.compiler.is_compiling()

    def in_eager(norm: Tensor) -> Tensor | None:
        s = scaling if isinstance(scaling, Tensor) else float(scaling)
        return eager_grouped.dora_linear_grouped(x, weight, lora_A, lora_B, magnitude, bias, norm, offsets, s, gate)

    if plain and weight_norm is not None and (y := in_eager(weight_norm)) is not None:
        return y
    checks.check_grouped(x, weight, lora_A, lora_B, magnitude, bias, weight_norm, offsets)
    checks.check_norm_grad(norm_grad, weight_norm)
    budget = checks.check_budget(budget)
    dense = () if packed.is_packed(weight) else (weight,)
    acc = accumulate_dtype(*dense, lora_A, lora_B)
    if each:
        checks.check_scalings(scaling, lora_A.shape[0], lora_A, "E")
    offsets = offsets.contiguous()  # as kernels read it, and the scalings
    s = scaling.to(acc).contiguous() if each else scaling_tensor(scaling, lora_A, acc)
    if weight_norm is None:
        factors = (lora_A.to(acc), lora_B.to(acc) * s.view(-1, 1, 1), 1.0) if each else (lora_A, lora_B, s)
        weight_norm = norm_factored(weight, *factors, norm_grad=norm_grad, budget=budget)
        if plain and (y := in_eager(weight_norm)) is not None:
            return y

    def product(rows: Tensor, matrices: Tensor | packed.Packed) -> Tensor:
        if packed.is_packed(matrices):
            return ops.packed_grouped.packed_grouped_linear(rows, offsets, *packed.flatten(matrices), budget)
        return ops.grouped.grouped_linear(rows, matrices, offsets)

    def gated(y: Tensor) -> Tensor:
        return y if gate is None else gate(y)

    x_adapter = F.dropout(x, dropout_p) if dropout_p else x
    h = product(x_adapter.to(lora_A.dtype), lora_A)
    of_layer = lora_B, magnitude, weight_norm, s
    base = product(x, weight)
    if not dropout_p or dropout_on == "low_rank":
        return gated(ops.grouped_compose.grouped_compose(base, h, *of_layer, bias, offsets, False))
    change = ops.grouped_compose.grouped_compose(product(x_adapter, weight), h, *of_layer, None, offsets, True)
    if bias is not None:
        index, taken = ops.grouped.rows_by_expert(offsets, x.shape[0])
        base = base + torch.where(taken.unsqueeze(-1), ops.take.take(bias, index), 0)
    return gated(base + change)
