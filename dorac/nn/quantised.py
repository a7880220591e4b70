"""``DoraQuantLinear``: DoRA over a quantised linear layer, which computes its own product."""

from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from dorac import functional, offload, packed
from dorac.nn import linear4bit, offloaded, shared
from dorac.nn.base_product import product
from dorac.nn.hyperparameters import DEFAULT_ALPHA, DEFAULT_R
from dorac.nn.layer import parameter
from dorac.nn.linear import DoraLinear
from dorac.nn.norm_cache import known_norm, packed_weight
from dorac.numerics import accumulate_dtype
from dorac.ops import sharded
from dorac.ops.packed_product import Held
from dorac.undo import Undo


@shared.fusable
class DoraQuantLinear(DoraLinear):
    """Adapts a quantised linear layer: ``y = g * (base + s (x lora_A^T) lora_B^T) + b``, ``base = x W^T`` its own.

    The layers of bitsandbytes (``Linear4bit``, ``Linear8bitLt``), those with a weight of torchao's, transformers'
    ``FP8Linear`` and ``HQQLinear``. The norm is read from the packed weight, which stays as it is
    (:func:`dorac.functional.norm_factored`); that of HQQ, and of torchao's formats that :func:`dorac.packed.of` does
    not know, takes a dense copy. The base layer's forward, its hooks too, runs in every call, but for that of a
    ``Linear4bit`` which does no more than multiply: on a GPU with kernels its product is ours. y has the dtype that the
    base layer returns. Where its library may give it no derivative (torchao's int4 and formats that ``of`` does not
    know, ``FP8Linear``) that in x is ``dy W``, of a weight that is dense in backward for as long as this product takes.
    With dropout on the adapter it runs a second time, on ``x' = dropout(x)``:
    ``y = x W^T + b + (g - 1) x' W^T + g s x' lora_A^T lora_B^T``.

    Merging quantises ``g * (W + s * lora_B @ lora_A)`` anew, in the same format and with the same settings. Each
    element is then off by up to half the distance of two neighbours of the format, as it was when W was quantised (nf4:
    up to 0.152 times the largest of its block; int8: 1/254 of the largest of its row), beside the rounding to the dtype
    that the library quantises from (int8 of bitsandbytes: float16). The packed weight that was there is kept, and
    unmerging puts it back bit for bit, whatever g is; while merged, both take memory.

    bitsandbytes on a CPU with bf16 instructions packs a 4-bit weight again, with scales in bf16, in the first forward
    of eval mode: from then on the norm is that of those numbers, and g differs from that before by up to 2^-9.

    Args:
        base_layer: quantised already (bitsandbytes quantises in ``.to(device)``).
        adapter_dtype: of the factors; None takes float32, as over half precision: packed values have no dtype of their
            own to follow. The magnitude is float32, or float64 with float64 factors.
        r, lora_alpha, lora_dropout, dropout_on, use_rslora, init_lora_weights: see :class:`dorac.nn.DoraLinear`.
        norm_grad: only False; a packed weight's norm carries no gradient.

    Raises:
        TypeError, ValueError: see :class:`dorac.nn.DoraLayer`; a weight that is not quantised yet, or of which a piece
            is missing or does not fit; one that quantises or scales its input as well.
    """

    PEFT_KEYS: ClassVar = DoraLinear.PEFT_KEYS

    def __init__(self, base_layer: nn.Module, r: int = DEFAULT_R, lora_alpha: float = DEFAULT_ALPHA, **options) -> None:
        if options.get("norm_grad") is True:
            raise ValueError(f"norm_grad needs a dense weight, that of {type(base_layer).__name__} is quantised")
        super().__init__(base_layer, r, lora_alpha, **options)

    @classmethod
    def adapts(cls, module: nn.Module) -> bool:
        return packed.holder(module) is not None

    @classmethod
    def unwrappable(cls, module: nn.Module) -> str | None:
        if not cls.adapts(module):
            return f"{type(module).__name__} is no quantised linear layer that is known here"
        if offload.is_offloaded(module):
            return (
                f"{type(module).__name__} is quantised and offloaded by accelerate: give it a place in the device_map "
                "where it computes"
            )
        return packed.unreadable(module)

    @classmethod
    def adapter_shapes(cls, base_layer: nn.Module, r: int) -> dict[str, torch.Size]:
        out_features, in_features = base_layer.out_features, base_layer.in_features
        shapes = {"lora_A": (r, in_features), "lora_B": (out_features, r), "lora_magnitude_vector": (out_features,)}
        return {name: torch.Size(shape) for name, shape in shapes.items()}

    def _adopt(self, base_layer: nn.Module) -> None:
        super()._adopt(base_layer)
        self.holder = packed.holder(base_layer)

    @property
    def weight(self) -> nn.Parameter:
        """The base layer's packed values, for code that asks a layer for its device."""
        return parameter(self._modules["base_layer"], self.holder.attribute)

    def base_weights(self) -> list[nn.Parameter]:
        return [self.weight]

    def _weight_dtype(self) -> torch.dtype:
        return torch.float32

    def _matrix(self) -> packed.Packed | Tensor:
        return packed.weight_of(self._modules["base_layer"])

    def norm_operands(self) -> None:
        return None

    def packed_base(self) -> nn.Module | None:
        base = self._modules["base_layer"]
        return None if packed.of(base) is None else base

    def _norm(self, weight: Held | None = None) -> Tensor:
        matrix = self._matrix() if weight is None else weight
        return functional.norm_factored(
            matrix, *self._factors(), self._scaling, norm_grad=self.norm_grad, budget=self.norm_budget
        )

    def forward(self, x: Tensor) -> Tensor:
        base_layer = self._modules["base_layer"]
        if "_hf_hook" in base_layer.__dict__:
            return offloaded.forward(self, (self,), x)
        if not is_dynamo_compiling():
            y = None if shared.here.together is None else shared.here.together.take(self, x)
            if y is None:
                y = linear4bit.alone(self, x)
            if y is not None:
                return y
        base = product(base_layer, self.holder, x)  # before the norm: it may pack its weight anew
        if self.merged_norm is not None or self.runs_base:
            return base
        lora_A, lora_B, magnitude = self._own_parameters()
        norm = known_norm(self, (self.weight, lora_A, lora_B))
        if norm is None:
            norm = self._norm()
        if self._strength is not None:
            lora_B, magnitude, norm = self._at_strength(lora_B, magnitude, norm)
        if self.training and self.lora_dropout:
            x = F.dropout(x, self.lora_dropout)
            if self.dropout_on == "adapter":
                return self._with_adapter_of(x, base, lora_A, lora_B, functional.magnitude_scale(magnitude, norm))
        bias = base_layer.bias
        keeps = self.save_output and bias is None and torch.is_grad_enabled()
        weight = packed_weight(self, base_layer, norm) if keeps else None
        return functional.dora_over(
            base,
            x,
            lora_A,
            lora_B,
            magnitude,
            bias,
            weight_norm=norm,
            scaling=self._scaling,
            base_has_bias=bias is not None,
            save_output=weight is not None,
            weight=weight,
        )

    def in_blocks(self) -> bool:
        """Whether the base layer's product can be that of a block."""
        return linear4bit.is_stock(self._modules["base_layer"])

    def projection(self, x: Tensor) -> tuple[functional.Projection, str] | None:
        """See :class:`dorac.nn.shared.Fusable`."""
        base = self._modules["base_layer"]
        if self.merged_norm is not None or self.runs_base or self.norm_grad or not linear4bit.takes(base, x):
            return None
        lora_A, lora_B, magnitude = own = self._own_parameters()
        if not all(map(shared.is_plain, own)):
            return None
        norm = known_norm(self, (self.weight, lora_A, lora_B))
        weight = linear4bit.weight_for(base, x, self, norm)
        if weight is None:
            return None
        if norm is None:
            norm = self._norm(weight)
        if self._strength is not None:
            lora_B, magnitude, norm = self._at_strength(lora_B, magnitude, norm)
        operands = weight, lora_A, lora_B, magnitude, base._parameters["bias"], norm
        dropout_p = self.lora_dropout if self.training else 0.0
        return functional.Projection(*operands, self._scaling, dropout_p, self.save_output), self.dropout_on

    def _with_adapter_of(self, x: Tensor, base: Tensor, lora_A: Tensor, lora_B: Tensor, g: Tensor) -> Tensor:
        """``base`` and what DoRA changes for the x that dropout left."""
        lora = F.linear(F.linear(x.to(lora_A.dtype), lora_A), lora_B)
        other = product(self.base_layer, self.holder, x)
        acc = accumulate_dtype(other, lora, g)
        other = other.to(acc)
        if (bias := self.base_layer.bias) is not None:
            other = other - bias.to(acc)
        delta = functional.compose(other, lora, g, self._scaling, delta=True)
        return (base.to(acc) + delta).to(base.dtype)

    def cannot_merge(self) -> str | None:
        if offload.is_offloaded(self.base_layer):
            return "it is quantised and offloaded: take accelerate's hooks off first"
        if sharded.any_sharded(self.weight):
            return packed.IN_PARTS
        if self.holder.requantised is None:
            return self.holder.cannot_requantise(self.base_layer)
        return super().cannot_merge()

    def keep_base(self, log: Undo) -> None:
        log.keep_module(self, self.base_layer)

    def write_part(self, name: str, matrix: Tensor) -> None:
        """Quantises the merged weight, and keeps what it replaces in the base layer."""
        base, replaced = self.base_layer, nn.Module()
        with torch.inference_mode(False):
            new = self.holder.requantised(base, matrix.clone())
        for key, value in new.items():
            setattr(replaced, key, getattr(base, key))
            setattr(base, key, value)
        replaced.attributes = tuple(new)
        vars(self)["replaced_base"] = replaced  # no child: its tensors are in no state dict

    def take_back_base(self) -> None:
        """Puts back what the merged weight has replaced."""
        for key in self.replaced_base.attributes:
            setattr(self.base_layer, key, getattr(self.replaced_base, key))
        vars(self)["replaced_base"] = None

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        if self.replaced_base is not None:
            self.replaced_base._apply(fn)
        return self
