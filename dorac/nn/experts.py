"""``DoraExperts``: the frozen experts of a mixture-of-experts block with an adapter for every expert."""

import functools
import sys
from typing import ClassVar

import torch
from torch import Tensor, nn

from dorac import functional, offload, ops, packed
from dorac.hooks import unhooked
from dorac.nn import offloaded
from dorac.nn.hyperparameters import DEFAULT_ALPHA, DEFAULT_R
from dorac.nn.layer import DoraLayer
from dorac.nn.recorded import known_activation
from dorac.nn.stock import not_stock
from dorac.ops import front

PROJECTIONS = ("gate_up_proj", "up_proj", "down_proj")  # what transformers calls the 3-D parameters of experts
_MOE = "transformers.integrations.moe"
_GPT_OSS = "transformers.models.gpt_oss.modeling_gpt_oss"
_LLAMA4 = "transformers.models.llama4.modeling_llama4"
ADAPTER = ("lora_A", "lora_B", "lora_magnitude_vector")


def _is_routed(module: nn.Module) -> bool:
    """Whether the module is one of transformers' experts that take the router's choice: Mixtral's, GPT-OSS', ...

    Their forward, made by ``use_experts_implementation``, is one function of their parameters, flags and gate.
    """
    moe = sys.modules.get(_MOE)  # whoever built such a module has imported it
    return moe is not None and getattr(type(module).forward, "__globals__", None) is vars(moe)


def _is_sorted(module: nn.Module) -> bool:
    """Whether the module is Llama 4's experts, which take as many tokens for each expert, sorted by expert."""
    llama4 = sys.modules.get(_LLAMA4)
    return llama4 is not None and isinstance(module, llama4.Llama4TextExperts)


def _is_swizzled(module: nn.Module) -> bool:
    """Whether the module is GPT-OSS' experts as transformers loads them in mxfp4 onto a GPU."""
    return type(module).__name__ == "Mxfp4GptOssExperts"


def _projections(module: nn.Module) -> list[str]:
    return [
        name
        for name in PROJECTIONS
        if isinstance(getattr(module, name, None), nn.Parameter) or _packed(module, name) is not None
    ]


def _packed(module: nn.Module, projection: str) -> packed.Mxfp4 | None:
    """The mxfp4 weight of a projection, if the module has that."""
    return packed.of(module, projection) if hasattr(module, f"{projection}_blocks") else None


def _weight(module: nn.Module, projection: str) -> nn.Parameter:
    """The parameter of a projection: its weight, or the packed numbers of that."""
    weight = getattr(module, projection, None)
    return getattr(module, f"{projection}_blocks") if weight is None else weight


def _transposed(module: nn.Module) -> bool:
    """Whether the parameters are ``[E, in, out]`` (GPT-OSS, Llama 4), not ``[E, out, in]`` (Mixtral, Qwen3-MoE)."""
    return _is_sorted(module) or module.is_transposed


def _is_defined(function: object, name: str, module: str) -> bool:
    """Whether it is what an imported module has defined under this name; not what was put there later."""
    of_module = vars(sys.modules[module]) if module in sys.modules else None
    defined = of_module is not None and getattr(function, "__globals__", None) is of_module
    return defined and function.__qualname__ == name


_known_gate = functools.lru_cache(maxsize=64)(functional.Gate)


class DoraExperts(DoraLayer):
    """Adapts transformers' experts with DoRA, each projection of each expert for itself: ``V_e = W_e + s B_e A_e``.

    The forward is the module's own with every expert's weight replaced by ``m_e / ||V_e||_row * V_e``; the norm is
    taken per output of an expert in either layout of the parameters. No adapted weight is ever made: rows are sorted by
    expert and go through :func:`dorac.functional.dora_linear_grouped` (in Llama 4, which sends every token to every
    expert, through the batched :func:`dorac.functional.dora_linear`), whatever ``config._experts_implementation``
    says. In eager on a GPU a gate that :class:`dorac.functional.Gate` describes, the default one or GPT-OSS', is in the
    kernels of the projection in front of it. Merged, the module itself runs.

    A weight may be mxfp4, as GPT-OSS' checkpoint holds it: the module then has frozen parameters
    ``P_blocks [E, out, in / 32, 16]`` and ``P_scales [E, out, in / 32]``, uint8, and no P. Norms are read from there.
    The products, forward and backward, make one chunk of all experts' rows dense after the other, in the dtype of the
    hidden states. Such experts are not merged. The experts of a model that transformers has loaded onto a GPU with its
    ``Mxfp4Config`` lie in an order of their own, of which there are kernels for inference alone; they are refused.

    For each projection P of the module (``gate_up_proj`` and ``down_proj``, or ``up_proj`` and ``down_proj``) there are
    ``P_lora_A [E, r, in]``, ``P_lora_B [E, out, r]`` and ``P_lora_magnitude_vector [E, out]``; the parameters and
    biases of the module are frozen. PEFT refuses DoRA on experts (its ``target_parameters`` are for LoRA), so that the
    adapter's keys ``P.lora_A``, ``P.lora_B``, ``P.lora_magnitude_vector`` are dorac's own.

    Args:
        base_layer, r, lora_alpha, lora_dropout, dropout_on, use_rslora, init_lora_weights, adapter_dtype, norm_grad:
            see :class:`dorac.nn.DoraLayer`. Dropout is drawn for each projection and each pair of token and expert;
            norm_grad needs dense weights.

    Raises:
        TypeError, ValueError: see :class:`dorac.nn.DoraLayer`.

    Source: arXiv 2402.09353, section 4.1, per expert.
    """

    PEFT_KEYS: ClassVar = {f"{p}_{name}": f"{p}.{name}" for p in PROJECTIONS for name in ADAPTER}

    def __init__(self, base_layer: nn.Module, r: int = DEFAULT_R, lora_alpha: float = DEFAULT_ALPHA, **options) -> None:
        packed_names = [name for name in PROJECTIONS if _packed(base_layer, name) is not None]
        if options.get("norm_grad") is True and packed_names:
            raise ValueError(
                f"norm_grad needs a dense weight, {packed_names[0]} of {type(base_layer).__name__} is mxfp4"
            )
        super().__init__(base_layer, r, lora_alpha, **options)

    @classmethod
    def adapts(cls, module: nn.Module) -> bool:
        return _is_routed(module) or _is_sorted(module) or _is_swizzled(module)

    @classmethod
    def unwrappable(cls, module: nn.Module) -> str | None:
        kind = type(module).__name__
        if not cls.adapts(module):
            return f"{kind} is not supported, only transformers' experts with 3-D parameters are"
        if _is_swizzled(module):
            return (
                f"{kind} holds mxfp4 weights in the order of triton_kernels, which only inference takes: load the "
                "model with Mxfp4Config(dequantize=True), or let GptOssExperts hold the checkpoint's blocks and "
                "scales (see dorac.nn.DoraExperts)"
            )
        names = _projections(module)
        if twice := [name for name in names if hasattr(module, f"{name}_blocks") and hasattr(module, name)]:
            return f"{kind} holds {twice[0]} twice, dense and as {twice[0]}_blocks"
        values = {name: value for name in names if (value := _packed(module, name)) is not None}
        for name, value in values.items():
            if _is_sorted(module):
                return f"{kind} holds {name} as mxfp4, which is not supported for experts that take sorted tokens"
            pieces = [getattr(module, f"{name}_{piece}") for piece in ("blocks", "scales")]
            if not all(isinstance(piece, nn.Parameter) for piece in pieces):
                return f"{kind} holds {name}_blocks and {name}_scales as other than parameters"
            if any(piece.is_meta for piece in pieces):
                return f"the {name} of {kind} is on the meta device and has no values: load the weights first"
            try:
                value.check()
            except (TypeError, ValueError) as error:
                return f"{name}: {error}"
        dense = [name for name in names if name not in values]
        shapes = [value.shape for value in values.values()] + [getattr(module, name).shape for name in dense]
        if len(names) != 2 or any(len(shape) != 3 for shape in shapes):
            return f"{kind} does not hold gate_up_proj or up_proj, and down_proj, as 3-D parameters"
        if getattr(module, "_is_expert_parallel", False):
            return f"{kind} is spread over processes (expert parallelism)"
        stock = type(module) if _is_routed(module) else sys.modules[_LLAMA4].Llama4TextExperts
        return not_stock(module, stock, dense)

    @classmethod
    def adapter_shapes(cls, base_layer: nn.Module, r: int) -> dict[str, torch.Size]:
        shapes = {}
        for projection in _projections(base_layer):
            value = _packed(base_layer, projection)
            experts, out_features, in_features = (value or getattr(base_layer, projection)).shape
            if value is None and _transposed(base_layer):
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
        """One of the base layer's weights, or its packed numbers, for code that asks for a dtype or device."""
        return _weight(self.base_layer, "down_proj")

    def base_weights(self) -> list[nn.Parameter]:
        return [_weight(self.base_layer, projection) for projection in self.projections]

    def _weight_dtype(self) -> torch.dtype:
        return self.weight.dtype if self.weight.is_floating_point() else torch.float32

    def packed_base(self) -> nn.Module | None:
        return self.base_layer if self._packed_projections() else None

    def _packed_projections(self) -> list[str]:
        return [projection for projection in self.projections if packed.is_packed(self._matrices(projection))]

    def cannot_merge(self) -> str | None:
        if names := self._packed_projections():
            return (
                f"{names[0]} of {type(self.base_layer).__name__} is mxfp4, which cannot be quantised again here: keep "
                "the adapter beside it, or dequantise the experts before they are adapted"
            )
        return super().cannot_merge()

    def _magnitudes(self) -> list[nn.Parameter]:
        return [getattr(self, f"{projection}_lora_magnitude_vector") for projection in self.projections]

    def _matrices(self, projection: str) -> Tensor | packed.Packed:
        """The weights of a projection as ``[E, out, in]``, a view or a packed value."""
        value = _packed(self.base_layer, projection)
        if value is not None:
            return value
        weight = getattr(self.base_layer, projection)
        return weight.mT if self.transposed else weight

    def _adapter(self, projection: str) -> tuple[Tensor, Tensor, Tensor]:
        return tuple(getattr(self, f"{projection}_{name}") for name in ADAPTER)

    def base_tensors(self, projection: str) -> tuple[nn.Parameter, nn.Parameter | None]:
        """The weight and the bias of a dense projection, as the base layer has them."""
        return getattr(self.base_layer, projection), getattr(self.base_layer, f"{projection}_bias", None)

    def tensors(self, projection: str) -> tuple[Tensor | packed.Packed | None, ...]:
        """The weights ``[E, out, in]``, lora_A, lora_B, the magnitude and the bias of a projection."""
        bias = getattr(self.base_layer, f"{projection}_bias", None)
        return self._matrices(projection), *self._adapter(projection), bias

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
        if offload.is_hooked(self.base_layer):
            return offloaded.forward(self, (self,), hidden_states, *routing)
        if (self.merged or self.runs_base) and self.shards is None:
            return self.base_layer(hidden_states, *routing)
        if self.training:
            self._widen_magnitudes()
        return self._forward_routed(hidden_states, *routing) if self.routed else self._forward_sorted(hidden_states)

    def _gate(self, hidden_states: Tensor) -> functional.Gate | None:
        """The base layer's gate, if it is one that kernels take along with the projection in front of it."""
        base = self.base_layer
        if torch.compiler.is_compiling() or front.under_transform() or not front.has_kernels(hidden_states):
            return None
        if self.merged or self.runs_base or "_apply_gate" in vars(base):
            return None
        apply = getattr(type(base), "_apply_gate", None)
        if _is_defined(apply, "GptOssExperts._apply_gate", _GPT_OSS):
            limit, alpha = base.limit, base.alpha
            numbers = type(limit) in (int, float) and type(alpha) in (int, float)
            return _known_gate("silu", True, limit, alpha, 1.0) if numbers and limit > 0 else None
        act = getattr(base, "act_fn", None)
        if not _is_defined(apply, "_default_apply_gate", _MOE) or not isinstance(act, nn.Module) or not unhooked(act):
            return None
        activation = known_activation(act)
        return None if activation is None else _known_gate(activation)

    def _project(
        self, projection: str, tensors: tuple, x: Tensor, gate: functional.Gate | None = None, **offsets: Tensor
    ) -> Tensor:
        """One adapted projection of rows ``[S, in]`` with offsets, or of ``[E, tokens, in]`` without.

        ``tensors``: see :meth:`tensors`; of experts that are spread this rank's. ``gate``: with offsets alone.
        """
        matrices, lora_A, lora_B, magnitude, bias = tensors
        x = x if packed.is_packed(matrices) else x.to(matrices.dtype)
        if self.merged or self.runs_base:  # of spread experts, which the base layer itself does not run
            return _base_product(x, matrices, bias, **offsets)
        norms = self._known_norm()
        norm = None if norms is None else self.parted_norms(norms)[self.projections.index(projection)]
        if self._strength is not None:
            if norm is None:
                norm = functional.norm_factored(matrices, lora_A, lora_B, self.scaling, norm_grad=self.norm_grad)
            lora_B, magnitude, norm = self._at_strength(lora_B, magnitude, norm)
        layer = functools.partial(functional.dora_linear_grouped, gate=gate) if offsets else functional.dora_linear
        return layer(
            x,
            matrices,
            lora_A,
            lora_B,
            magnitude,
            bias,
            scaling=self.scaling,
            weight_norm=norm,
            norm_grad=self.norm_grad and norm is None,
            dropout_p=self.lora_dropout if self.training else 0.0,
            dropout_on=self.dropout_on,
            **offsets,
        )

    def _forward_routed(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        base, shards = self.base_layer, self.shards
        tokens, k = top_k_index.shape
        experts, device = self.weight.shape[0], top_k_index.device
        if shards is None:
            numbers, tensors = torch.arange(experts, device=device), {p: self.tensors(p) for p in self.projections}
        else:
            (numbers, experts), tensors = shards.numbers(experts, device), shards.enter(self)
            hidden_states, top_k_weights = shards.shared(hidden_states, top_k_weights)
        # Looked up, a number that is no expert's raises: rows that no expert takes would get zeros. An expert's rows
        # come by rank, then by token, as in the base layer: some CPUs' products round a row by its place.
        chosen, order = numbers.index_select(0, top_k_index.T.flatten()).sort(stable=True)
        offsets = torch.searchsorted(chosen, torch.arange(experts, device=device), right=True, out_int32=True)
        rows = hidden_states.expand(k, -1, -1).flatten(0, 1)[order]

        first, last = self.projections
        has_gate = getattr(base, "has_gate", True)  # as all had in transformers 5.0
        gate = self._gate(hidden_states) if has_gate else None
        h = self._project(first, tensors[first], rows, gate, offsets=offsets)
        if gate is None:
            h = base._apply_gate(h) if has_gate else base.act_fn(h)
        y = self._project(last, tensors[last], h, offsets=offsets)
        if getattr(base, "has_post_expert_norm", False):
            y = base.post_expert_norm(y)
            if shards is not None:  # which may make something of the zeros of others' rows
                y = torch.where((chosen < experts).unsqueeze(-1), y, 0)
        y = y * top_k_weights.T.flatten()[order].unsqueeze(-1)
        y = y[order.argsort()].view(k, tokens, y.shape[-1]).sum(0).to(hidden_states.dtype)
        return y if shards is None else shards.summed(y)

    def _forward_sorted(self, hidden_states: Tensor) -> Tensor:
        shards, hidden = self.shards, hidden_states.shape[-1]
        rows = hidden_states.view(self.weight.shape[0], -1, hidden)
        if shards is None:
            tensors = {p: self.tensors(p) for p in self.projections}
        else:
            tensors, rows = shards.enter(self), shards.own_rows(rows)
        gate, up = self._project("gate_up_proj", tensors["gate_up_proj"], rows).chunk(2, dim=-1)
        y = self._project("down_proj", tensors["down_proj"], up * self.base_layer.act_fn(gate))
        return (y if shards is None else shards.all_rows(y)).view(-1, hidden)


def _base_product(x: Tensor, matrices: Tensor, bias: Tensor | None, offsets: Tensor | None = None) -> Tensor:
    """The projection without an adapter; of rows with offsets zero where these are no expert's."""
    if offsets is None:
        return x @ matrices.mT if bias is None else torch.baddbmm(bias.unsqueeze(1), x, matrices.mT)
    y = ops.grouped.grouped_linear(x, matrices, offsets)
    if bias is None:
        return y
    index, taken = ops.grouped.rows_by_expert(offsets, x.shape[0])
    return y + torch.where(taken.unsqueeze(-1), bias[index], 0)
