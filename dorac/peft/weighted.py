"""``add_weighted_adapter`` for DoRA: one adapter that changes the weight as several do, weighted.

An adapter i changes the base weight by ``W_i - W``, where ``W_i = g_i * (W + s_i * B_i A_i)``. Their combination is

    W' = W + sum_i w_i * (W_i - W)
       = c * W + sum_i w_i * g_i * s_i * B_i A_i       c = 1 + sum_i w_i * (g_i - 1), one value per row

which is the DoRA adapter with the direction ``V = W + D``, ``D = sum_i (w_i g_i s_i / c) * B_i A_i``, and the magnitude
``c * ||V||_row``. So one adapter with weight 1 gives itself back.

- "cat" keeps all ranks: ``A = [A_1; A_2; ...]``, ``B = [(w_1 g_1 s_1 / c) * B_1, ...]``. Exact.
- "svd" keeps the ``svd_rank`` largest singular values of D, computed from the factors without their product.
- "linear" adds factors of one rank as PEFT does for LoRA: ``A = sum_i sign(w_i s_i) sqrt(|w_i s_i|) * A_i`` and
  ``B = sum_i sqrt(|w_i s_i|) * (g_i / c) * B_i``. Exact for one adapter, a rough approximation for more.

The other types of PEFT prune or elect elements of a plain LoRA weight change; beside a magnitude that has no meaning,
and they are refused.
"""

import dataclasses
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dorac import stock_peft
from dorac.nn.hyperparameters import scaling_factor
from dorac.numerics import accumulate_dtype
from dorac.peft.variants import OnDorac, factors
from dorac.stock_peft import LoraLayer, freeze_adapter

COMBINATIONS = ("linear", "cat", "svd")

_add_weighted_adapter_stock = stock_peft.LoraModel.add_weighted_adapter


@torch.no_grad()
def add_weighted_adapter(
    self,
    adapters: list[str],
    weights: list[float],
    adapter_name: str,
    combination_type: str = "svd",
    svd_rank: int | None = None,
    svd_clamp: float | None = None,
    **options: Any,
) -> None:
    """PEFT's ``LoraModel.add_weighted_adapter``; DoRA adapters are combined as this module says.

    Raises:
        ValueError: DoRA and other adapters mixed; a combination without a meaning for DoRA; a layer that dorac does not
            cover; a row that the combination leaves without its base weight (c = 0); and what PEFT refuses. The model
            is left as it was.
    """
    dora = [name for name in adapters if name in self.peft_config and self.peft_config[name].use_dora]
    if not dora or adapter_name in self.peft_config:
        return _add_weighted_adapter_stock(
            self, adapters, weights, adapter_name, combination_type, svd_rank, svd_clamp, **options
        )
    kind, rank, target_modules = self._check_add_weighted_adapter(adapters, combination_type, svd_rank)
    if len(dora) != len(adapters):
        others = ", ".join(name for name in adapters if name not in dora)
        raise ValueError(f"adapters must all be DoRA's to be combined, and {others} are not")
    if kind not in COMBINATIONS:
        raise ValueError(f"combination_type must be one of {', '.join(COMBINATIONS)} for DoRA adapters, got {kind!r}")
    if len(weights) != len(adapters):
        raise ValueError(f"weights must be one for each of the {len(adapters)} adapters, got {len(weights)}")

    config = dataclasses.replace(
        self.peft_config[adapters[0]],
        r=rank,
        lora_alpha=rank,
        target_modules=target_modules,
        alpha_pattern={},
        rank_pattern={},
    )
    scaling = scaling_factor(rank, rank, config.use_rslora)
    combined = {}
    for name, layer in self.model.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        present = [(a, w) for a, w in zip(adapters, weights, strict=True) if a in layer.lora_variant]
        if not present:
            continue
        if not all(isinstance(layer.lora_variant[a], OnDorac) for a, _ in present):
            raise ValueError(f"{name} is a {type(layer).__name__}, whose DoRA adapters dorac cannot combine")
        if rank % _groups(layer):
            raise ValueError(f"svd_rank must be divisible by the groups of {name}, {_groups(layer)}, got {rank}")
        combined[layer] = _combine(name, layer, present, kind, rank, svd_clamp, options.get("svd_driver"))

    self.peft_config[adapter_name] = config
    self.inject_adapter(self.model, adapter_name)
    freeze_adapter(self.model, adapter_name)
    for layer, (lora_A, lora_B, base_scale) in combined.items():
        new_A, new_B = factors(layer, adapter_name)
        new_A.copy_(lora_A.reshape(new_A.shape))
        new_B.copy_((lora_B / scaling).reshape(new_B.shape))
        magnitude = layer.lora_magnitude_vector[adapter_name]
        norm = adapter_norm(layer, adapter_name)
        magnitude.weight.copy_(norm * base_scale.to(norm.device).view(norm.shape))


def _groups(layer: LoraLayer) -> int:
    return getattr(layer.get_base_layer(), "groups", 1)


def adapter_norm(layer: LoraLayer, adapter: str) -> Tensor:
    """The norm that the adapter has by itself, whatever is merged into the base weight now."""
    magnitude = layer.lora_magnitude_vector[adapter]
    with layer._unmerged_base_weight() as weight:
        pair = (factor.to(weight.device) for factor in factors(layer, adapter))
        return magnitude.factored_norm(weight, *pair, magnitude.split(layer.scaling[adapter])[0], groups=_groups(layer))


def _combine(
    name: str,
    layer: LoraLayer,
    present: list[tuple[str, float]],
    kind: str,
    rank: int,
    clamp: float | None,
    driver: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """``A [G, rank/G, in]``, ``B [G, out/G, rank/G]`` of D for scaling 1, and c ``[out]``; G groups, 1 but for conv."""
    groups = _groups(layer)
    split = {a: layer.lora_magnitude_vector[a].split(layer.scaling[a]) for a, _ in present}
    present = [(a, w if split[a][1] is None else w * split[a][1]) for a, w in present]  # at the strengths they have now
    scales, As, Bs = [], [], []
    for adapter, _ in present:
        lora_A, lora_B = factors(layer, adapter)
        acc = accumulate_dtype(lora_A)
        As.append(lora_A.to(acc).unflatten(0, (groups, -1)).flatten(2))
        Bs.append(lora_B.to(acc).unflatten(0, (groups, -1)).flatten(2))
        scales.append(layer.lora_magnitude_vector[adapter].mag_scale(adapter_norm(layer, adapter)).flatten())
    base_scale = 1 + sum(weight * (g - 1) for (_, weight), g in zip(present, scales, strict=True))
    lost = (base_scale == 0).nonzero().flatten().tolist()
    if lost:
        raise ValueError(
            f"the combination leaves row {lost[0]} of {name} without its base weight, which no DoRA adapter does"
        )
    rows = [(g / base_scale).to(b).view(groups, -1, 1) for g, b in zip(scales, Bs, strict=True)]
    shares = [weight * split[adapter][0] for adapter, weight in present]
    if kind == "linear":
        roots = [math.sqrt(abs(s)) for s in shares]
        lora_A = sum(math.copysign(q, s) * a for q, s, a in zip(roots, shares, As, strict=True))
        lora_B = sum(q * row * b for q, row, b in zip(roots, rows, Bs, strict=True))
    else:
        lora_A = torch.cat(As, dim=1)
        lora_B = torch.cat([s * row * b for s, row, b in zip(shares, rows, Bs, strict=True)], dim=2)
    if kind == "svd":
        lora_A, lora_B = _truncated(lora_A, lora_B, rank // groups, clamp, driver)
    missing = rank // groups - lora_A.shape[1]  # of a layer that not all adapters adapt, or with a rank of its own
    lora_A = F.pad(lora_A, (0, 0, 0, missing))
    return lora_A, F.pad(lora_B, (0, missing)), base_scale


def _truncated(
    lora_A: Tensor, lora_B: Tensor, rank: int, clamp: float | None, driver: str | None
) -> tuple[Tensor, Tensor]:
    """Factors of the best approximation of ``lora_B @ lora_A`` of this rank, the singular values in B as in PEFT.

    From the QR decompositions of both factors: the product itself is never formed. ``clamp`` is PEFT's ``svd_clamp``.
    """
    q_out, r_out = torch.linalg.qr(lora_B)
    q_in, r_in = torch.linalg.qr(lora_A.mT)
    u, s, vh = torch.linalg.svd(r_out @ r_in.mT, full_matrices=False, driver=driver)
    lora_B = q_out @ u[..., :rank] * s[..., None, :rank]
    lora_A = vh[..., :rank, :] @ q_in.mT
    if clamp is not None:
        high = torch.quantile(torch.cat([lora_B.flatten(), lora_A.flatten()]), clamp)
        lora_A, lora_B = lora_A.clamp(-high, high), lora_B.clamp(-high, high)
    return lora_A, lora_B
