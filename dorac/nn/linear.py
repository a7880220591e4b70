"""``DoraLinear``: a frozen linear layer, its factors and its magnitude."""

import sys
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from dorac import functional, packed
from dorac.magnitudes import HALF, widen
from dorac.nn import offloaded, shared
from dorac.nn.hyperparameters import DEFAULT_ALPHA, DEFAULT_R
from dorac.nn.layer import DoraLayer, parameter
from dorac.nn.norm_cache import known_norm
from dorac.nn.stock import not_stock


def is_conv1d(module: nn.Module) -> bool:
    """Whether ``module`` is transformers' GPT-2 ``Conv1D``, a linear layer that keeps its weight as ``[in, out]``."""
    transformers = sys.modules.get("transformers.pytorch_utils")  # whoever built a Conv1D has imported it
    return transformers is not None and isinstance(module, transformers.Conv1D)


@shared.fusable
class DoraLinear(DoraLayer):
    """Adapts an ``nn.Linear`` (or GPT-2 ``Conv1D``) with DoRA: ``y = g * (x W^T + s (x lora_A^T) lora_B^T) + b``.

    The base layer's parameters are frozen, lora_A ``[r, in]``, lora_B ``[out, r]`` and lora_magnitude_vector ``[out]``
    are trained. The magnitude is float32 (float64 for a float64 layer) and stays so under ``.to(torch.bfloat16)``.
    State-dict keys are ``base_layer.*``, ``lora_A``, ``lora_B`` and ``lora_magnitude_vector``, which map one to one to
    PEFT's. They do not tell whether the adapter is merged: save the state of an unmerged layer, or unload it.

    Args:
        base_layer, r, lora_alpha, lora_dropout, dropout_on, use_rslora, adapter_dtype, norm_grad: see
            :class:`dorac.nn.DoraLayer`.
        init_lora_weights: True: lora_A Kaiming-uniform, lora_B zero, as PEFT; "gaussian": lora_A normal with deviation
            1/r, lora_B zero; False: both Kaiming-uniform, so that the adapter does something from the start.
        fan_in_fan_out: whether the base weight is stored ``[in, out]``; None reads it off the layer.

    Raises:
        TypeError, ValueError: see :class:`dorac.nn.DoraLayer`; a ``fan_in_fan_out`` that contradicts the layer.

    Source: arXiv 2402.09353, section 4.1; the norm is a constant in backprop (section 4.3).
    """

    PEFT_KEYS: ClassVar = {
        "lora_A": "lora_A.weight",
        "lora_B": "lora_B.weight",
        "lora_magnitude_vector": "lora_magnitude_vector",
    }

    save_output = False  # see dorac.save_outputs

    def __init__(
        self,
        base_layer: nn.Module,
        r: int = DEFAULT_R,
        lora_alpha: float = DEFAULT_ALPHA,
        *,
        fan_in_fan_out: bool | None = None,
        **options,
    ) -> None:
        transposed = is_conv1d(base_layer)
        if fan_in_fan_out is not None and fan_in_fan_out != transposed and not self.unwrappable(base_layer):
            stored = "[in, out]" if transposed else "[out, in]"
            raise ValueError(
                f"fan_in_fan_out={fan_in_fan_out} contradicts {type(base_layer).__name__}, whose weight is {stored}"
            )
        super().__init__(base_layer, r, lora_alpha, **options)

    @classmethod
    def adapts(cls, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear) or is_conv1d(module)

    @classmethod
    def unwrappable(cls, module: nn.Module) -> str | None:
        if packed.holder(module) is not None:
            return f"{type(module).__name__} is quantised: dorac.nn.DoraQuantLinear adapts it, as dorac.apply_dora does"
        if isinstance(module, nn.Linear):
            return not_stock(module, nn.Linear)
        if is_conv1d(module):
            return not_stock(module, sys.modules["transformers.pytorch_utils"].Conv1D)
        return f"{type(module).__name__} is not supported, only nn.Linear and transformers' Conv1D are"

    @classmethod
    def adapter_shapes(cls, base_layer: nn.Module, r: int) -> dict[str, torch.Size]:
        shape = base_layer.weight.shape
        out_features, in_features = reversed(shape) if is_conv1d(base_layer) else shape
        shapes = {"lora_A": (r, in_features), "lora_B": (out_features, r), "lora_magnitude_vector": (out_features,)}
        return {name: torch.Size(shape) for name, shape in shapes.items()}

    def _adopt(self, base_layer: nn.Module) -> None:
        super()._adopt(base_layer)
        self.fan_in_fan_out = is_conv1d(base_layer)

    @property
    def out_features(self) -> int:
        return self.lora_B.shape[0]

    @property
    def in_features(self) -> int:
        return self.lora_A.shape[1]

    def _matrix(self) -> Tensor:
        return self.base_layer.weight.t() if self.fan_in_fan_out else self.base_layer.weight

    @property
    def bias(self) -> nn.Parameter | None:
        """The base layer's bias."""
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        base = self._modules["base_layer"]
        if "_hf_hook" in base.__dict__:
            return offloaded.forward(self, (self,), x)
        if not is_dynamo_compiling() and shared.here.together is not None:
            y = shared.here.together.take(self, x)
            if y is not None:
                return y
        if self.shards is not None:
            return self.shards.linear(self, x)
        if self.merged_norm is not None or self.runs_base:
            return base(x)
        weight, lora_A, lora_B, magnitude, bias, norm = self._operands(base)
        return functional.dora_linear(
            x,
            weight,
            lora_A,
            lora_B,
            magnitude,
            bias,
            scaling=self._scaling,
            weight_norm=norm,
            norm_grad=self.norm_grad and norm is None,
            dropout_p=self.lora_dropout if self.training else 0.0,
            dropout_on=self.dropout_on,
            save_output=self.save_output,
        )

    def _operands(self, base: nn.Module) -> tuple[Tensor | None, ...]:
        """The matrix, the factors, the magnitude, the bias and, if it is known, the norm for a forward."""
        weight = parameter(base, "weight")
        lora_A, lora_B, magnitude = self._own_parameters()
        if magnitude.dtype in HALF and self.training:
            widen(magnitude)
        norm = known_norm(self, (weight, lora_A, lora_B))
        if self._strength is not None:
            lora_B, magnitude, norm = self._at_strength(lora_B, magnitude, norm)
        weight = weight.t() if self.fan_in_fan_out else weight
        return weight, lora_A, lora_B, magnitude, parameter(base, "bias"), norm

    def projection(self, x: Tensor) -> tuple[functional.Projection, str] | None:
        """See :class:`dorac.nn.shared.Fusable`."""
        base = self._modules["base_layer"]
        if self.merged_norm is not None or self.runs_base or self.norm_grad or "_hf_hook" in base.__dict__:
            return None
        if not shared.fits(x, parameter(base, "weight")) or not all(map(shared.is_plain, self._own_parameters())):
            return None
        dropout_p = self.lora_dropout if self.training else 0.0
        operands = self._operands(base)
        return functional.Projection(*operands, self._scaling, dropout_p, self.save_output), self.dropout_on

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {super().extra_repr()}"
