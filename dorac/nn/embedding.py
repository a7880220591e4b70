"""``DoraEmbedding``: a frozen embedding, its factors and its magnitude."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dorac import functional, offload
from dorac.functional.embedding import EMBEDDING_BUDGET
from dorac.magnitudes import HALF, widen
from dorac.nn import offloaded
from dorac.nn.layer import DoraLayer
from dorac.nn.stock import not_stock


def is_scaled(module: nn.Embedding) -> bool:
    """Whether ``module`` is one of transformers' scaled word embeddings: ``super().forward(x) * self.embed_scale``.

    That is a forward of its own, which only rows can show: some of the table, since the first may be padding, which is
    zero times anything. A class with more parameters (as T5Gemma2's, which replaces one row) is not one of them.
    """
    scale = getattr(module, "embed_scale", None)
    if type(module).forward is nn.Embedding.forward or [name for name, _ in module.named_parameters()] != ["weight"]:
        return False
    if not (isinstance(scale, (int, float)) or (isinstance(scale, Tensor) and scale.numel() == 1)):
        return False
    if not module.num_embeddings:
        return True
    with torch.no_grad(), offload.onloaded(module):
        if module.weight.is_meta:
            return True
        last = module.num_embeddings - 1
        rows = torch.tensor([last * i // 7 for i in range(8)], device=module.weight.device)
        return torch.equal(module(rows), scaled(F.embedding(rows, module.weight), scale))


def scaled(y: Tensor, scale: float | Tensor | None) -> Tensor:
    """``y * scale`` with the roundings of transformers' scaled word embeddings."""
    if scale is None:
        return y
    return y * (scale.to(y.dtype) if isinstance(scale, Tensor) else scale)


class DoraEmbedding(DoraLayer):
    """Adapts an ``nn.Embedding`` with DoRA: ``y = g * (weight[x] + s * lora_A^T[x] lora_B^T)``.

    The base layer is frozen; lora_embedding_A ``[r, num_embeddings]``, lora_embedding_B ``[embedding_dim, r]`` and
    lora_magnitude_vector ``[embedding_dim]`` are trained. State-dict keys are ``base_layer.*`` and these names, which
    are PEFT's. ``padding_idx``, ``scale_grad_by_freq`` and ``sparse`` of the base layer are honoured as
    :func:`dorac.functional.dora_embedding` says. transformers' scaled word embeddings are wrapped too: their
    ``embed_scale`` multiplies the result, after the norm, as in PEFT.

    Args:
        base_layer, r, lora_alpha, use_rslora, adapter_dtype, norm_grad: see :class:`dorac.nn.DoraLayer`.
        lora_dropout, dropout_on: kept, the first for the adapter's config, without effect: an index cannot be dropped,
            and PEFT does not drop it either.
        init_lora_weights: True or "gaussian": lora_embedding_A zero, lora_embedding_B standard normal, as PEFT; False:
            both standard normal.

    Raises:
        TypeError, ValueError: see :class:`dorac.nn.DoraLayer`; a base layer with ``max_norm``.

    Source: arXiv 2402.09353, section 4.1; the norm is a constant in backprop (section 4.3).
    """

    PEFT_KEYS: ClassVar = {
        "lora_embedding_A": "lora_embedding_A",
        "lora_embedding_B": "lora_embedding_B",
        "lora_magnitude_vector": "lora_magnitude_vector",
    }
    norm_budget = EMBEDDING_BUDGET

    @classmethod
    def adapts(cls, module: nn.Module) -> bool:
        return isinstance(module, nn.Embedding)

    @classmethod
    def unwrappable(cls, module: nn.Module) -> str | None:
        kind = type(module).__name__
        if not cls.adapts(module):
            return f"{kind} is not supported, only nn.Embedding is"
        if module.max_norm is not None:
            return (
                f"{kind} has max_norm={module.max_norm}, which rewrites rows of the weight in every forward and with "
                "them the norm; renormalise the weight once and set max_norm to None"
            )
        if module.sparse and module.scale_grad_by_freq:
            return f"{kind} has sparse and scale_grad_by_freq set: torch does not scale sparse gradients"
        if reason := not_stock(module, type(module)):  # all but the forward, which a scaled one may have
            return reason
        return None if is_scaled(module) else not_stock(module, nn.Embedding)

    @classmethod
    def adapter_shapes(cls, base_layer: nn.Module, r: int) -> dict[str, torch.Size]:
        vocab, dim = base_layer.weight.shape
        shapes = ((r, vocab), (dim, r), (dim,))
        return {name: torch.Size(shape) for name, shape in zip(cls.PEFT_KEYS, shapes, strict=True)}

    def _adopt(self, base_layer: nn.Module) -> None:
        super()._adopt(base_layer)
        self.is_scaled = is_scaled(base_layer)

    def _draw_factors(self) -> None:
        nn.init.normal_(self.lora_embedding_B)
        if self.init_lora_weights is False:
            nn.init.normal_(self.lora_embedding_A)
        else:
            nn.init.zeros_(self.lora_embedding_A)

    def _matrix(self) -> Tensor:
        return self.base_layer.weight.t()

    def _factors(self) -> tuple[Tensor, Tensor]:
        return self.lora_embedding_A, self.lora_embedding_B

    @property
    def num_embeddings(self) -> int:
        return self.lora_embedding_A.shape[1]

    @property
    def embedding_dim(self) -> int:
        return self.lora_embedding_B.shape[0]

    @property
    def embed_scale(self) -> float | Tensor | None:
        """What a scaled word embedding multiplies its result by."""
        return self.base_layer.embed_scale if self.is_scaled else None

    def forward(self, x: Tensor) -> Tensor:
        if self.shards is not None:
            return self.shards.embedding(self, x)
        base = self._modules["base_layer"]
        if offload.is_hooked(base):
            return offloaded.forward(self, (self,), x)
        if self.merged_norm is not None or self.runs_base:
            return base(x)
        weight, lora_A, lora_B, magnitude = base.weight, *self._own_parameters()
        if magnitude.dtype in HALF and self.training:
            widen(magnitude)
        norm = self._known_norm()
        if self._strength is not None:
            lora_B, magnitude, norm = self._at_strength(lora_B, magnitude, norm)
        y = functional.dora_embedding(
            x,
            weight,
            lora_A,
            lora_B,
            magnitude,
            scaling=self._scaling,
            weight_norm=norm,
            norm_grad=self.norm_grad and norm is None,
            padding_idx=base.padding_idx,
            scale_grad_by_freq=base.scale_grad_by_freq,
            sparse=base.sparse,
            budget=self.norm_budget,
        )
        return scaled(y, base.embed_scale) if self.is_scaled else y

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f"padding_idx={self.padding_idx}, "
        return f"{self.num_embeddings}, {self.embedding_dim}, {padding}{super().extra_repr()}"
