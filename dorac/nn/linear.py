"""``DoraLinear``: a frozen linear layer, its factors and its magnitude."""

import math
import sys

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dorac import functional
from dorac.numerics import FLOAT_DTYPES, accumulate_dtype


def is_conv1d(module: nn.Module) -> bool:
    """Whether ``module`` is transformers' GPT-2 ``Conv1D``, a linear layer that keeps its weight as ``[in, out]``."""
    transformers = sys.modules.get("transformers.pytorch_utils")  # whoever built a Conv1D has imported it
    return transformers is not None and isinstance(module, transformers.Conv1D)


def unwrappable(module: nn.Module) -> str | None:
    """Why :class:`DoraLinear` cannot wrap ``module``, or None if it can."""
    kind = type(module).__name__
    if isinstance(module, nn.Linear):
        stock = nn.Linear
    elif is_conv1d(module):
        stock = sys.modules["transformers.pytorch_utils"].Conv1D
    else:
        return f"{kind} is not supported, only nn.Linear and transformers' Conv1D are"
    if type(module).forward is not stock.forward or "forward" in vars(module):
        return f"{kind} has a forward of its own, which the adapted layer would not run"
    if isinstance(module.weight, nn.parameter.UninitializedParameter):
        return f"{kind} is lazy and has no weight yet: run one batch first"
    if module.weight.dtype not in FLOAT_DTYPES:
        return f"{kind} has a weight of {module.weight.dtype}, dequantise it first"
    if parametrize.is_parametrized(module, "weight"):
        return f"the weight of {kind} is parametrised (torch.nn.utils.parametrize)"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return f"{kind} has hooks, which the adapted layer would not run: put them on the DoraLinear afterwards"
    return None


def scaling_factor(r: int, lora_alpha: float, use_rslora: bool) -> float:
    """s: ``lora_alpha / r``, or ``lora_alpha / sqrt(r)`` rank-stabilised (arXiv 2312.03732)."""
    return lora_alpha / (math.sqrt(r) if use_rslora else r)


class DoraLinear(nn.Module):
    """Adapts an ``nn.Linear`` (or GPT-2 ``Conv1D``) with DoRA: ``y = g * (x W^T + s (x lora_A^T) lora_B^T) + b``.

    The base layer's parameters are frozen, lora_A ``[r, in]``, lora_B ``[out, r]`` and lora_magnitude_vector ``[out]``
    are trained. The magnitude is float32 (float64 for a float64 layer) and stays so under ``.to(torch.bfloat16)``.
    State-dict keys are ``base_layer.*``, ``lora_A``, ``lora_B`` and ``lora_magnitude_vector``, which map one to one to
    PEFT's. They do not tell whether the adapter is merged: save the state of an unmerged layer, or unload it.

    Args:
        base_layer: the layer to adapt; kept, not copied.
        r: rank, at least 1.
        lora_alpha: the scaling is ``lora_alpha / r``, or ``lora_alpha / sqrt(r)`` with ``use_rslora``.
        lora_dropout: probability in [0, 1); in training mode the frozen layer sees x and the adapter ``dropout(x)``, as
            in PEFT.
        use_rslora: rank-stabilised scaling (arXiv 2312.03732).
        init_lora_weights: True: lora_A Kaiming-uniform, lora_B zero, as PEFT; "gaussian": lora_A normal with deviation
            1/r, lora_B zero; False: both Kaiming-uniform, so that the adapter does something from the start.
        adapter_dtype: of lora_A and lora_B; None takes float32 for a half-precision layer, as PEFT, and the layer's
            dtype otherwise.
        fan_in_fan_out: whether the base weight is stored ``[in, out]``; None reads it off the layer.

    Raises:
        TypeError: a layer that cannot be wrapped, with the reason; an adapter dtype that is not float16, bfloat16,
            float32 or float64.
        ValueError: a rank below 1, a scaling that is not finite, a dropout outside [0, 1), a ``fan_in_fan_out`` that
            contradicts the layer.

    Source: arXiv 2402.09353, section 4.1; the norm is a constant in backprop (section 4.3).
    """

    def __init__(
        self,
        base_layer: nn.Module,
        r: int = 8,
        lora_alpha: float = 8,
        *,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init_lora_weights: bool | str = True,
        adapter_dtype: torch.dtype | None = None,
        fan_in_fan_out: bool | None = None,
    ) -> None:
        super().__init__()
        if reason := unwrappable(base_layer):
            raise TypeError(f"base_layer cannot be wrapped: {reason}")
        check_hyperparameters(r, lora_alpha, lora_dropout, init_lora_weights, adapter_dtype)
        transposed = is_conv1d(base_layer)
        if fan_in_fan_out is not None and fan_in_fan_out != transposed:
            stored = "[in, out]" if transposed else "[out, in]"
            raise ValueError(
                f"fan_in_fan_out={fan_in_fan_out} contradicts {type(base_layer).__name__}, whose weight is {stored}"
            )
        self.base_layer = base_layer
        self.fan_in_fan_out = transposed
        self.r = r
        self.lora_alpha = lora_alpha
        self.use_rslora = use_rslora
        self.lora_dropout = float(lora_dropout)
        self.init_lora_weights = init_lora_weights
        self.scaling = scaling_factor(r, lora_alpha, use_rslora)
        self.out_features, self.in_features = self._weight().shape

        weight = base_layer.weight
        if adapter_dtype is None:
            adapter_dtype = torch.promote_types(weight.dtype, torch.float32)
        options = {"dtype": adapter_dtype, "device": weight.device}
        self.lora_A = nn.Parameter(torch.empty(r, self.in_features, **options))
        self.lora_B = nn.Parameter(torch.empty(self.out_features, r, **options))
        options["dtype"] = accumulate_dtype(weight, self.lora_A)
        self.lora_magnitude_vector = nn.Parameter(torch.empty(self.out_features, **options))
        # The norm before the merge while the base weight holds the merged one: what unmerging needs.
        self.register_buffer("merged_norm", None, persistent=False)
        self.reset_parameters()
        base_layer.requires_grad_(False)

    @staticmethod
    def adapter_shapes(base_layer: nn.Module, r: int) -> dict[str, torch.Size]:
        """The shapes that the adapter's parameters would have around ``base_layer``."""
        out_features, in_features = (
            reversed(base_layer.weight.shape) if is_conv1d(base_layer) else base_layer.weight.shape
        )
        shapes = {"lora_A": (r, in_features), "lora_B": (out_features, r), "lora_magnitude_vector": (out_features,)}
        return {name: torch.Size(shape) for name, shape in shapes.items()}

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws new factors and sets the magnitude to the norm, so that g = 1; refused while merged."""
        if self.merged:
            raise ValueError("the adapter is merged; unmerge it before resetting its parameters")
        if self.init_lora_weights == "gaussian":
            nn.init.normal_(self.lora_A, std=1 / self.r)
        else:
            nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        if self.init_lora_weights is False:
            nn.init.kaiming_uniform_(self.lora_B, a=math.sqrt(5))
        else:
            nn.init.zeros_(self.lora_B)
        self.lora_magnitude_vector.copy_(
            functional.init_magnitude(self._weight(), self.lora_A, self.lora_B, self.scaling)
        )

    def _weight(self) -> Tensor:
        """The base weight as ``[out, in]``: a view, never a copy."""
        return self.base_layer.weight.t() if self.fan_in_fan_out else self.base_layer.weight

    @property
    def weight(self) -> nn.Parameter:
        """The base layer's weight, for code that asks a layer for its dtype or device."""
        return self.base_layer.weight

    @property
    def bias(self) -> nn.Parameter | None:
        """The base layer's bias."""
        return self.base_layer.bias

    @property
    def merged(self) -> bool:
        """Whether the base weight holds ``g * (W + s * lora_B @ lora_A)``."""
        return self.merged_norm is not None

    def forward(self, x: Tensor) -> Tensor:
        if self.merged:
            return self.base_layer(x)
        return functional.dora_linear(
            x,
            self._weight(),
            self.lora_A,
            self.lora_B,
            self.lora_magnitude_vector,
            self.base_layer.bias,
            scaling=self.scaling,
            dropout_p=self.lora_dropout if self.training else 0.0,
        )

    @torch.no_grad()
    def merge(self) -> None:
        """Writes the adapted weight into the base layer; a second call does nothing.

        Raises:
            ValueError: the merged weight would not be finite in its dtype; the layer stays unmerged.
        """
        if self.merged:
            return
        weight = self._weight()
        merged, norm = functional.merge_weight(
            weight, self.lora_A, self.lora_B, self.lora_magnitude_vector, scaling=self.scaling
        )
        if not merged.is_meta and not merged.isfinite().all():
            raise ValueError(
                f"the merged weight is not finite in {weight.dtype}: the adapter is not, or g is too large"
            )
        weight.copy_(merged)
        self.merged_norm = norm

    @torch.no_grad()
    def unmerge(self) -> None:
        """Takes the adapter out of the base weight again, to ``2 eps * max(|V|, |W|)``; nothing if it is not merged.

        Raises:
            ValueError: rows whose g is zero cannot be restored; the layer stays merged.
        """
        if not self.merged:
            return
        weight = self._weight()
        weight.copy_(
            functional.unmerge_weight(
                weight,
                self.lora_A,
                self.lora_B,
                self.lora_magnitude_vector,
                scaling=self.scaling,
                weight_norm=self.merged_norm,
            )
        )
        self.merged_norm = None

    def _apply(self, fn, recurse=True):
        """Moves and casts as any module, but never casts the magnitude (or a kept norm) below float32."""
        wide = (self.lora_magnitude_vector, self.lora_magnitude_vector.grad, self.merged_norm)

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            keep = moved.dtype.itemsize < 4 and any(tensor is t for t in wide)
            return tensor.to(moved.device) if keep else moved

        return super()._apply(move, recurse)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        if self.merged:
            raise ValueError(f"{prefix.rstrip('.') or 'DoraLinear'} is merged; unmerge it before loading a state dict")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, r={self.r}, scaling={self.scaling:g}, "
            f"lora_dropout={self.lora_dropout:g}, merged={self.merged}"
        )


def check_hyperparameters(
    r: int, lora_alpha: float, lora_dropout: float, init_lora_weights: bool | str, adapter_dtype: torch.dtype | None
) -> None:
    """Refuses what :class:`DoraLinear` cannot be built with."""
    if isinstance(r, bool) or not isinstance(r, int):
        raise TypeError(f"r must be an integer, got {r!r}")
    if r < 1:
        raise ValueError(f"r must be at least 1, got {r}")
    if isinstance(lora_alpha, bool) or not isinstance(lora_alpha, (int, float)):
        raise TypeError(f"lora_alpha must be a number, got {lora_alpha!r}")
    if not math.isfinite(lora_alpha):
        raise ValueError(f"lora_alpha must be finite, got {lora_alpha}")
    if isinstance(lora_dropout, bool) or not isinstance(lora_dropout, (int, float)):
        raise TypeError(f"lora_dropout must be a number, got {lora_dropout!r}")
    if not 0 <= lora_dropout < 1:
        raise ValueError(f"lora_dropout must be in [0, 1), got {lora_dropout}")
    if init_lora_weights not in (True, False, "gaussian"):
        raise ValueError(f"init_lora_weights must be True, False or 'gaussian', got {init_lora_weights!r}")
    if adapter_dtype is not None and adapter_dtype not in FLOAT_DTYPES:
        raise TypeError(f"adapter_dtype must be float64, float32, bfloat16 or float16, got {adapter_dtype}")
