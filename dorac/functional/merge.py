"""The adapter written into the weight, and taken out again."""

from collections.abc import Iterator

import torch
from torch import Tensor

from dorac import checks, packed
from dorac.functional.norm import magnitude_scale, norm_factored, scaling_tensor
from dorac.numerics import accumulate_dtype
from dorac.ops import front, sharded
from dorac.ops.norm import DEFAULT_BUDGET, column_chunks


def _low_rank_chunks(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float | Tensor, budget: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Chunks of the weight's columns and of ``s * lora_B @ lora_A``, both in the accumulate dtype.

    Merging and unmerging both take the product from here: computed alike, its own rounding errors cancel exactly.
    """
    acc = accumulate_dtype(weight, lora_A, lora_B)
    scaled_b = lora_B.to(acc) * scaling_tensor(scaling, weight, acc)
    for columns in column_chunks(weight, lora_A, lora_B, False, budget):
        with front.autocast_off(weight):
            product = scaled_b @ lora_A[..., columns].to(acc)
        yield weight[..., columns].to(acc), product


@torch.no_grad()
def merge_weight(
    weight: Tensor | packed.Packed,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    *,
    scaling: float | Tensor,
    weight_norm: Tensor | None = None,
    budget: int = DEFAULT_BUDGET,
) -> tuple[Tensor, Tensor]:
    """``W' = g * (W + s * lora_B @ lora_A)``: the plain weight of the adapted layer (paper, section 4.1).

    Args: as in :func:`dora_linear`; a packed weight (:func:`dorac.packed.of`) is made dense. Not differentiable: the
        results are constants, in forward mode too.

    Returns:
        ``(W', n)``: ``[out, in]`` in the weight's dtype, rounded once, and the norm ``[out]`` that
        :func:`unmerge_weight` needs.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit, a scaling that is not finite.
    """
    if weight_norm is None:
        weight_norm = norm_factored(weight, lora_A, lora_B, scaling, budget=budget)
    if packed.is_packed(weight):
        weight.check()
        weight = weight.rows(0, weight.shape[-2])
    checks.check_adapter(weight, lora_A, lora_B, magnitude, weight_norm)
    scaling, budget = checks.check_scaling(scaling), checks.check_budget(budget)
    if sharded.any_sharded(weight, lora_A, lora_B, magnitude, weight_norm):
        shards = _shards(weight, lora_A, lora_B, magnitude, weight_norm)
        merged = merge_weight(*shards[:4], scaling=scaling, weight_norm=shards[4], budget=budget)[0]
        return sharded.from_shard(merged, weight.device_mesh, weight.placements, weight.shape), weight_norm
    g = magnitude_scale(magnitude, weight_norm)[..., None]
    chunks = _low_rank_chunks(weight, lora_A, lora_B, scaling, budget)
    merged = torch.cat([(g * (w + product)).to(weight.dtype) for w, product in chunks], dim=-1)
    return merged.detach(), weight_norm.detach()  # no_grad alone lets the tangents of forward mode through


def _shards(
    weight: Tensor, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor, weight_norm: Tensor
) -> tuple[Tensor, ...]:
    """This rank's shards of DTensors: what is merged or unmerged without moving the weight."""
    sharded.check_sharded(weight=weight, lora_A=lora_A, lora_B=lora_B, magnitude=magnitude, weight_norm=weight_norm)
    return sharded.local_shards(weight, lora_A, lora_B, magnitude, weight_norm)


def invertible_scale(magnitude: Tensor, weight_norm: Tensor) -> Tensor:
    """:func:`magnitude_scale`, refusing rows whose g is zero or not finite (with experts: named expert.row).

    Reads values: waits for the device. Of sharded arguments the whole scale: every rank refuses what one does.
    """
    if front.exporting_module():
        raise ValueError("unmerging cannot be exported: it reads values of g, to refuse rows that are lost")
    g = sharded.whole(magnitude_scale(magnitude, weight_norm))
    lost = ((g == 0) | ~g.isfinite()).nonzero().tolist()
    if lost:
        rows = ", ".join(".".join(map(str, place)) for place in lost[:8]) + (", ..." if len(lost) > 8 else "")
        raise ValueError(
            f"cannot unmerge rows {rows}: their g is 0 or not finite, so the merged rows no longer hold the base weight"
        )
    return g


@torch.no_grad()
def unmerge_weight(
    merged_weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    magnitude: Tensor,
    *,
    scaling: float | Tensor,
    weight_norm: Tensor,
    budget: int = DEFAULT_BUDGET,
) -> Tensor:
    """``W = W' / g - s * lora_B @ lora_A``: undoes :func:`merge_weight` to ``2 eps * max(|V|, |W|)``.

    eps is that of the weight's dtype; the bound holds where ``g * V`` is a normal number of that dtype (float16
    loses digits below 6e-5 and has none above 65504) and for the ``budget`` that the weight was merged with.

    Args: as in :func:`merge_weight`, with the same factors and magnitude, and ``weight_norm`` the norm that it returned
        (it cannot be recomputed from W'). Reads values of g, so it waits for the device.

    Returns:
        ``[out, in]`` in the dtype of ``merged_weight``.

    Raises:
        ValueError: rows whose g is zero or not finite: their merged rows no longer hold the weight; and what
            :func:`merge_weight` refuses.
    """
    checks.check_adapter(merged_weight, lora_A, lora_B, magnitude, weight_norm)
    scaling, budget = checks.check_scaling(scaling), checks.check_budget(budget)
    g = invertible_scale(magnitude, weight_norm)[..., None]
    if sharded.any_sharded(merged_weight, lora_A, lora_B, magnitude, weight_norm):
        shards = _shards(merged_weight, lora_A, lora_B, magnitude, weight_norm)
        weight = unmerge_weight(*shards[:4], scaling=scaling, weight_norm=shards[4], budget=budget)
        return sharded.from_shard(weight, merged_weight.device_mesh, merged_weight.placements, merged_weight.shape)
    chunks = _low_rank_chunks(merged_weight, lora_A, lora_B, scaling, budget)
    return torch.cat([(w / g - product).to(merged_weight.dtype) for w, product in chunks], dim=-1).detach()
