"""``DoraExperts``: the frozen experts of a mixture-of-experts block with an adapter for every expert."""

import sys
from typing import ClassVar

import torch
from torch import Tensor, nn

from dorac import functional
from dorac.nn.layer import DoraLayer, not_stock

PROJECTIONS = ("gate_up_proj", "up_proj", "down_proj")  # what transformers calls the 3-D parameters of experts
_LLAMA4 = "transformers.models.llama4.modeling_llama4"
ADAPTER = ("lora_A", "lora_B", "lora_magnitude_vector")


def _is_routed(module: nn.Module) -> bool:
    """Whether the module is one of transformers' experts that take the router's choice: Mixtral's, GPT-OSS', ...

    Their forward, made by ``use_experts_implementation``, is one function of their parameters, flags and gate.
    """
    moe = sys.modules.get("transformers.integrations.moe")  # whoever built such a module has imported it
    return moe is not None and getattr(type(module).forward, "__globals__", None) is vars(moe)


def _is_sorted(module: nn.Module) -> bool:
    """Whether the module is Llama 4's experts, which take as many tokens for each expert, sorted by expert."""
    llama4 = sys.modules.get(_LLAMA4)
    return llama4 is not None and isinstance(module, llama4.Llama4TextExperts)


def is_experts(module: nn.Module) -> bool:
    """Whether ``module`` holds the experts of a mixture-of-experts block of transformers as 3-D parameters."""
    return _is_routed(module) or _is_sorted(module)


def _projections(module: nn.Module) -> list[str]:
    return [name for name in PROJECTIONS if isinstance(getattr(module, name, None), nn.Parameter)]


def _transposed(module: nn.Module) -> bool:
    """Whether the parameters are ``[E, in, out]`` (GPT-OSS, Llama 4), not ``[E, out, in]`` (Mixtral, Qwen3-MoE)."""
    return _is_sorted(module) or module.is_transposed


class DoraExperts(DoraLayer):
    """Adapts transformers' experts with DoRA, each projection of each expert for itself: ``V_e = W_e + s B_e A_e``.

    The forward is the module's own with every expert's weight replaced by ``m_e / ||V_e||_row * V_e``; the norm is
    taken per output of an expert in either layout of the parameters. No adapted weight is ever made: rows are sorted by
    expert and go through :func:`dorac.functional.dora_linear_grouped` (in Llama 4, which sends every token to every
    expert, through the batched :func:`dorac.functional.dora_linear`), whatever ``config._experts_implementation``
    says. Merged, the module itself runs.

    For each projection P of the module (``gate_up_proj`` and ``down_proj``, or ``up_proj`` and ``down_proj``) there are
    ``P_lora_A [E, r, in]``, ``P_lora_B [E, out, r]`` and ``P_lora_magnitude_vector [E, out]``; the parameters and
    biases of the module are frozen. PEFT refuses DoRA on experts (its ``target_parameters`` are for LoRA), so that the
    adapter's keys ``P.lora_A``, ``P.lora_B``, ``P.lora_magnitude_vector`` are dorac's own.

    Args:
        base_layer, r, lora_alpha, lora_dropout, dropout_on, use_rslora, init_lora_weights, adapter_dtype, norm_grad:
            see :class:`dorac.nn.DoraLayer`. Dropout is drawn for each projection and each pair of token and expert.

    Raises:
        TypeError, ValueError: see :class:`dorac.nn.DoraLayer`.

    Source: arXiv 2402.09353, section 4.1, per expert.
    """

    PEFT_KEYS: ClassVar = {f"{p}_{name}": f"{p}.{name}" for p in PROJECTIONS for name in ADAPTER}

    @classmethod
    def unwrappable(cls, module: nn.Module) -> str | None:
        kind = type(module).__name__
        if not is_experts(module):
            return f"{kind} is not supported, only transformers' experts with 3-D parameters are"
        names = _projections(module)
        if len(names) != 2 or any(getattr(module, name).ndim != 3 for name in names):
            return f"{kind} does not hold gate_up_proj or up_proj, and down_proj, as 3-D parameters"
        if getattr(module, "_is_expert_parallel", False):
            return f"{kind} is spread over processes (expert parallelism)"
        stock = type(module) if _is_routed(module) else sys.modules[_LLAMA4].Llama4TextExperts
        return not_stock(module, stock, names)

    @classmethod
    def adapter_shapes(cls, base_layer: nn.Module, r: int) -> dict[str, torch.Size]:
        shapes = {}
        for projection in _projections(base_layer):
            experts, out_features, in_features = getattr(base_layer, projection).shape
            if _transposed(base_layer):
                out_features, in_features = in_features, out_features
            sizes = ((r, in_features), (out_features, r), (out_features,))
            shapes |= {
                f"{projection}_{name}": torch.Size((experts, *s)) for name, s in zip(ADAPTER, sizes, strict=True)
            }
        return shapes

    def _adopt(self, base_layer: nn.Module) -> None:
        super()._adopt(base_layer)
        self.projections = _projections(base_layer)
        self.transposed = _transposed(base_layer)
        self.routed = _is_routed(base_layer)
        self.PEFT_KEYS = {f"{p}_{name}": f"{p}.{name}" for p in self.projections for name in ADAPTER}

    @property
    def weight(self) -> nn.Parameter:
        """One of the base layer's weights, for code that asks a layer for its dtype or device."""
        return self.base_layer.down_proj

    def base_weights(self) -> list[nn.Parameter]:
        return [getattr(self.base_layer, projection) for projection in self.projections]

    def _magnitudes(self) -> list[nn.Parameter]:
        return [getattr(self, f"{projection}_lora_magnitude_vector") for projection in self.projections]

    def _matrices(self, projection: str) -> Tensor:
        """The weights of a projection as ``[E, out, in]``, a view."""
        weight = getattr(self.base_layer, projection)
        return weight.mT if self.transposed else weight

    def _adapter(self, projection: str) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(getattr(self, f"{projection}_{name}") for name in ADAPTER)

    def _draw_factors(self) -> None:
        for projection in self.projections:
            lora_A, lora_B, magnitude = self._adapter(projection)
            for expert in range(len(magnitude)):
                self._draw(lora_A[expert], lora_B[expert])

    def _reset_magnitudes(self) -> None:
        for magnitude, norm in zip(self._magnitudes(), self.parted_norms(self._norm()), strict=True):
            magnitude.copy_(norm)

    def parts(self) -> dict[str, tuple[Tensor, Tensor, Tensor, Tensor]]:
        return {p: (self._matrices(p), *self._adapter(p)) for p in self.projections}

    def write_part(self, name: str, matrix: Tensor) -> None:
        self._matrices(name).copy_(matrix)

    def joined_norms(self, norms: list[Tensor]) -> Tensor:
        return torch.cat(norms, dim=1)

    def parted_norms(self, norm: Tensor) -> list[Tensor]:
        return list(norm.split([magnitude.shape[1] for magnitude in self._magnitudes()], dim=1))

    def norm_operands(self) -> None:
        return None

    def _norm(self) -> Tensor:
        """The norms of all projections side by side."""
        return self.joined_norms([self._norm_of(projection) for projection in self.projections])

    def _norm_of(self, projection: str) -> Tensor:
        tensors = self._matrices(projection), *self._adapter(projection)[:2], self.scaling
        return functional.norm_factored(*tensors, norm_grad=self.norm_grad)

    def forward(self, hidden_states: Tensor, *routing: Tensor) -> Tensor:
        """As the base layer: hidden states ``[tokens, hidden]``, then the router's indices and weights ``[tokens, k]``.

        Llama 4 gives hidden states ``[E * tokens, hidden]`` alone.

        Raises:
            IndexError: an expert's number out of range, as torch raises it.
        """
        if self.merged or self.runs_base:
            return self.base_layer(hidden_states, *routing)
        if self.training:
            self._widen_magnitudes()
        return self._forward_routed(hidden_states, *routing) if self.routed else self._forward_sorted(hidden_states)

    def _project(self, projection: str, x: Tensor, **offsets: Tensor) -> Tensor:
        """One adapted projection of rows ``[S, in]`` with offsets, or of ``[E, tokens, in]`` without."""
        matrices, norms = self._matrices(projection), self._known_norm()
        lora_A, lora_B, magnitude = self._adapter(projection)
        norm = None if norms is None else self.parted_norms(norms)[self.projections.index(projection)]
        if self._strength is not None:
            norm = self._norm_of(projection) if norm is None else norm
            lora_B, magnitude, norm = self._at_strength(lora_B, magnitude, norm)
        layer = functional.dora_linear_grouped if offsets else functional.dora_linear
        return layer(
            x.to(matrices.dtype),
            matrices,
            lora_A,
            lora_B,
            magnitude,
            getattr(self.base_layer, f"{projection}_bias", None),
            scaling=self.scaling,
            weight_norm=norm,
            norm_grad=self.norm_grad and norm is None,
            dropout_p=self.lora_dropout if self.training else 0.0,
            dropout_on=self.dropout_on,
            **offsets,
        )

    def _forward_routed(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        base = self.base_layer
        tokens, k = top_k_index.shape
        experts = self.weight.shape[0]
        # Sorted, a negative number would pass for the first expert.
        chosen, order = torch.where(top_k_index < 0, experts, top_k_index).flatten().sort(stable=True)
        offsets = torch.searchsorted(chosen, torch.arange(experts, device=chosen.device), right=True, out_int32=True)
        rows = hidden_states.unsqueeze(1).expand(-1, k, -1).flatten(0, 1)[order]

        h = self._project(self.projections[0], rows, offsets=offsets)
        h = base._apply_gate(h) if base.has_gate else base.act_fn(h)
        y = self._project("down_proj", h, offsets=offsets)
        if getattr(base, "has_post_expert_norm", False):  # newer than the other attributes
            y = base.post_expert_norm(y)
        y = y * top_k_weights.flatten()[order].unsqueeze(-1)
        return y[order.argsort()].view(tokens, k, -1).sum(1).to(hidden_states.dtype)

    def _forward_sorted(self, hidden_states: Tensor) -> Tensor:
        experts, hidden = self.weight.shape[0], hidden_states.shape[-1]
        gate, up = self._project("gate_up_proj", hidden_states.view(experts, -1, hidden)).chunk(2, dim=-1)
        return self._project("down_proj", up * self.base_layer.act_fn(gate)).view(-1, hidden)
