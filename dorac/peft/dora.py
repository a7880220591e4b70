"""PEFT's DoRA layers (``peft.tuners.lora.dora``) on dorac's functions, with their names, signatures and attributes.

A layer holds the magnitude, ``weight``, and computes what DoRA adds to the base layer's output,
``(g - 1) * base + g * s * lora``. They subclass PEFT's, so that ``isinstance`` keeps its meaning; what they inherit is
the constructor.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from dorac import stock_peft
from dorac.functional.embedding import EMBEDDING_BUDGET
from dorac.peft.dora_linear import DoraLinearLayer, without_bias
from dorac.peft.weights import (
    dense_weight,
    gathered,
    is_fsdp_unit,
    partitioned_base,
)

__all__ = [
    "DoraConv1dLayer",
    "DoraConv2dLayer",
    "DoraConv3dLayer",
    "DoraEmbeddingLayer",
    "DoraLinearLayer",
    "_DoraConvNdLayer",
]


class DoraEmbeddingLayer(DoraLinearLayer, stock_peft.DoraEmbeddingLayer):
    """The magnitude of an embedding, ``weight [dim]``, whose norm is taken over the vocabulary."""

    get_lora_weight = stock_peft.embedding_lora_weight

    norm_budget = EMBEDDING_BUDGET

    def forward(
        self,
        x: Tensor,
        *,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        base_layer: nn.Module,
        embed_fn,
        base_result: Tensor | None = None,
        adapter_name: str = "default",
    ) -> tuple[Tensor, Tensor]:
        """``(g, g * s * lora)``, or with ``base_result`` ``(g, (g - 1) * base_result + g * s * lora)``.

        Args:
            x: indices ``[*]``.
            lora_A: ``[vocab, r]``, lora_B: ``[r, dim]``, the transposes of what PEFT stores.
            embed_fn: looks x up in lora_A.
        """
        scaling, strength = self.split(scaling)
        stored_A, stored_B = partitioned_base(lora_A), partitioned_base(lora_B)
        with gathered([*self.parameters(), *base_layer.parameters(), stored_A, stored_B]):
            if stored_A is not lora_A:
                lora_A = stored_A.t()
            if stored_B is not lora_B:
                lora_B = stored_B.t()
            norm = self.factored_norm(
                dense_weight(base_layer), lora_A.t(), lora_B.t(), scaling, adapter_name=adapter_name
            )
            g = self.mag_scale(norm)
            lora = embed_fn(x, lora_A) @ lora_B
        g = g.to(lora.device)
        if base_result is None:
            change = (g * scaling) * lora.to(g.dtype)
            if strength is not None:
                g, change = (1 - strength) + strength * g, strength * change
            return g, change
        return g, self._delta(base_result, lora, g, scaling, strength)


_PLACEMENT = ("stride", "padding", "dilation", "padding_mode")  # of a convolution's windows


class _DoraConvNdLayer(DoraLinearLayer, stock_peft._DoraConvNdLayer):
    """The magnitude of a convolution, ``weight [1, out, 1, ...]``, and what DoRA adds to the layer's output."""

    get_lora_weight = stock_peft.conv_lora_weight

    def forward(
        self,
        x: Tensor,
        *,
        lora_A: nn.Module,
        lora_B: nn.Module,
        scaling: float,
        base_layer: nn.Module,
        base_result: Tensor | None = None,
        adapter_name: str = "default",
    ) -> Tensor:
        """As :meth:`DoraLinearLayer.forward`, over channels: x ``[N, in, *]``.

        The weight of lora_A is applied with the stride, padding, dilation and padding mode of the base layer.
        """
        groups = base_layer.groups
        scaling, strength = self.split(scaling)
        with self._gathered(base_layer, lora_A, lora_B) as will_be_released:
            weight = dense_weight(base_layer)
            known = self.known_norm(base_layer, lora_A.weight, lora_B.weight, scaling)

            def norm_of(lora_A: Tensor, lora_B: Tensor) -> Tensor:
                if known is not None:
                    return known
                return self.factored_norm(weight, lora_A, lora_B, scaling, groups=groups, adapter_name=adapter_name)

            if all(getattr(lora_A, name, None) == getattr(base_layer, name) for name in _PLACEMENT):
                # Calls the modules: DeepSpeed and FSDP gather for a backward what was called in forward.
                lora, norm = self._lora_and_norm(x, lora_A, lora_B, norm_of)
            elif is_fsdp_unit(lora_A) or is_fsdp_unit(lora_B):
                raise RuntimeError(
                    "the factors of a convolution with dilation or another padding_mode than zeros are FSDP units of "
                    "their own, whose weights are not there for dorac: wrap the LoRA layer as a whole"
                )
            else:
                norm = norm_of(lora_A.weight, lora_B.weight)
                lora_groups = groups if lora_A.weight.shape[1] == weight.shape[1] else 1
                lora = lora_B(self._filter(x, lora_A.weight, base_layer, lora_groups))
            g, ndim = self.mag_scale(norm), weight.ndim
            if base_result is None:
                kept = weight.clone() if will_be_released else weight
                base = self._filter(x, kept.to(x.dtype), base_layer, groups)
            else:
                base = without_bias(base_result, base_layer.bias, trailing=weight.ndim - 2)
        return self._delta(base, lora, g, scaling, strength, dim=base.ndim + 1 - ndim)

    def _filter(self, x: Tensor, weight: Tensor, base_layer: nn.Module, groups: int) -> Tensor:
        padding = base_layer.padding
        if base_layer.padding_mode != "zeros":
            x = F.pad(x, base_layer._reversed_padding_repeated_twice, mode=base_layer.padding_mode)
            padding = 0
        return self.conv_fn(x, weight, None, base_layer.stride, padding, base_layer.dilation, groups)


class DoraConv1dLayer(_DoraConvNdLayer, stock_peft.DoraConv1dLayer):
    """As :class:`DoraConv2dLayer`, with one kernel dimension."""


class DoraConv2dLayer(_DoraConvNdLayer, stock_peft.DoraConv2dLayer):
    """The magnitude of an ``nn.Conv2d``, ``weight [1, out, 1, 1]``."""


class DoraConv3dLayer(_DoraConvNdLayer, stock_peft.DoraConv3dLayer):
    """As :class:`DoraConv2dLayer`, with three kernel dimensions."""
