"""``DoraConv1d``, ``DoraConv2d`` and ``DoraConv3d``: a frozen convolution, its factors and its magnitude."""

import numbers
from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from dorac import functional, offload
from dorac.functional.conv import spans_groups
from dorac.magnitudes import HALF, widen
from dorac.nn import offloaded
from dorac.nn.layer import DoraLayer
from dorac.nn.stock import not_stock
from dorac.ops import sharded


class _DoraConvNd(DoraLayer):
    """Adapts a convolution: what the three classes share. A subclass names the stock layer and the function."""

    PEFT_KEYS: ClassVar = {
        "lora_A": "lora_A.weight",
        "lora_B": "lora_B.weight",
        "lora_magnitude_vector": "lora_magnitude_vector",
    }
    STOCK: ClassVar[type[nn.Module]]
    FUNCTION: ClassVar[Callable[..., Tensor]]

    @classmethod
    def adapts(cls, module: nn.Module) -> bool:
        return isinstance(module, cls.STOCK)

    @classmethod
    def unwrappable(cls, module: nn.Module) -> str | None:
        if not cls.adapts(module):
            return f"{type(module).__name__} is not supported, only nn.{cls.STOCK.__name__} is"
        if type(module)._conv_forward is not cls.STOCK._conv_forward or "_conv_forward" in vars(module):
            return f"{type(module).__name__} has a _conv_forward of its own, which the adapted layer would not run"
        return not_stock(module, cls.STOCK)

    @classmethod
    def unfit_rank(cls, base_layer: nn.Module, r: int) -> str | None:
        if isinstance(r, numbers.Integral) and r % base_layer.groups:
            return f"r must be divisible by the groups of {type(base_layer).__name__}, {base_layer.groups}, got {r}"
        return None

    @classmethod
    def layout_of(cls, base_layer: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, object]:
        lora_A = tensors.get("lora_A")
        grouped = lora_A is not None and lora_A.shape[1:2] == base_layer.weight.shape[1:2]
        return {"grouped_lora_A": True} if grouped else {}

    @classmethod
    def adapter_shapes(cls, base_layer: nn.Module, r: int, *, grouped_lora_A: bool = False) -> dict[str, torch.Size]:
        out_channels, channels, *kernel = base_layer.weight.shape
        ones = [1] * len(kernel)
        shapes = {
            "lora_A": (r, channels if grouped_lora_A else channels * base_layer.groups, *kernel),
            "lora_B": (out_channels, r // base_layer.groups, *ones),
            "lora_magnitude_vector": (1, out_channels, *ones),
        }
        return {name: torch.Size(shape) for name, shape in shapes.items()}

    @property
    def grouped_lora_A(self) -> bool:
        """Whether lora_A is applied with the groups of the base layer; it always is where there is one group."""
        return not spans_groups(self.base_layer.weight, self.lora_A)

    @property
    def bias(self) -> nn.Parameter | None:
        """The base layer's bias."""
        return self.base_layer.bias

    def _matrices(self) -> tuple[Tensor, Tensor, Tensor]:
        base = self.base_layer
        return functional.conv_matrices(base.weight, self.lora_A, self.lora_B, base.groups)

    def _matrix(self) -> Tensor:
        return self._matrices()[0]

    def _factors(self) -> tuple[Tensor, Tensor]:
        return self._matrices()[1:]

    def _magnitude(self) -> Tensor:
        groups = self.base_layer.groups
        magnitude = sharded.replicated(self.lora_magnitude_vector)  # FSDP2 shards its first dimension, of size 1
        return magnitude.flatten() if groups == 1 else magnitude.view(groups, -1)

    def write_part(self, name: str, matrix: Tensor) -> None:
        weight = self.base_layer.weight
        if weight.is_contiguous():
            weight.copy_(matrix.view_as(weight))
        else:  # the rows of the matrix are [k..., in]
            rows = weight.movedim(1, -1)
            rows.copy_(matrix.view_as(rows))

    def norm_operands(self) -> None:
        return None

    def _norm(self) -> Tensor:
        base = self.base_layer
        tensors = base.weight, self.lora_A, self.lora_B, self.scaling
        return functional.norm_factored_conv(*tensors, groups=base.groups, norm_grad=self.norm_grad)

    def cannot_merge(self) -> str | None:
        if self.grouped_lora_A:
            return super().cannot_merge()
        return (
            f"cannot merge into {type(self.base_layer).__name__} with groups={self.base_layer.groups}: its lora_A sees "
            "all input channels, so the adapted filters reach beyond their group and have no grouped form; wrap it "
            "with grouped_lora_A=True to merge it"
        )

    def forward(self, x: Tensor) -> Tensor:
        base = self._modules["base_layer"]
        if offload.is_hooked(base):
            return offloaded.forward(self, (self,), x)
        if self.merged_norm is not None or self.runs_base:
            return base(x)
        weight, lora_A, lora_B, magnitude = base.weight, *self._own_parameters()
        if magnitude.dtype in HALF and self.training:
            widen(magnitude)
        magnitude, norm = magnitude.flatten(), self._known_norm()
        if self._strength is not None:
            lora_B, magnitude, norm = self._at_strength(lora_B, magnitude, norm)
        return self.FUNCTION(
            x,
            weight,
            lora_A,
            lora_B,
            magnitude,
            base.bias,
            scaling=self._scaling,
            weight_norm=norm,
            norm_grad=self.norm_grad and norm is None,
            stride=base.stride,
            padding=base.padding,
            dilation=base.dilation,
            groups=base.groups,
            padding_mode=base.padding_mode,
            dropout_p=self.lora_dropout if self.training else 0.0,
            dropout_on=self.dropout_on,
        )

    def extra_repr(self) -> str:
        return (
            f"in_channels={self.in_channels}, out_channels={self.out_channels}, "
            f"grouped_lora_A={self.grouped_lora_A}, {super().extra_repr()}"
        )


class DoraConv1d(_DoraConvNd):
    """Adapts an ``nn.Conv1d`` with DoRA; everything as in :class:`DoraConv2d`, with one kernel dimension."""

    STOCK = nn.Conv1d
    FUNCTION = staticmethod(functional.dora_conv1d)


class DoraConv2d(_DoraConvNd):
    """Adapts an ``nn.Conv2d`` with DoRA: ``y = g * (conv(x, W) + s * conv_1x1(conv(x, lora_A), lora_B)) + b``.

    The base layer's parameters are frozen; lora_A ``[r, in, kH, kW]``, lora_B ``[out, r/groups, 1, 1]`` and
    lora_magnitude_vector ``[1, out, 1, 1]`` are trained, in the shapes and under the state-dict keys that PEFT maps to.
    lora_A runs with the base layer's stride, padding, dilation and padding mode, lora_B with its groups.

    With groups, an adapter that PEFT has trained computes something else here: PEFT takes the norm of filters that the
    layer does not have. So does one for a layer with a dilation or a padding mode, which PEFT's lora_A ignores.

    Args:
        base_layer, r, lora_alpha, lora_dropout, dropout_on, use_rslora, init_lora_weights, adapter_dtype: see
            :class:`dorac.nn.DoraLayer`; ``r`` must be divisible by the groups.
        grouped_lora_A: apply lora_A with groups too, ``[r, in/groups, kH, kW]``: fewer parameters, and the layer can be
            merged. PEFT has no such layout, and cannot merge a grouped convolution.

    Raises:
        TypeError, ValueError: see :class:`dorac.nn.DoraLayer`; a rank that the groups do not divide.

    Source: arXiv 2402.09353, section 4.1; the norm is a constant in backprop (section 4.3).
    """

    STOCK = nn.Conv2d
    FUNCTION = staticmethod(functional.dora_conv2d)


class DoraConv3d(_DoraConvNd):
    """Adapts an ``nn.Conv3d`` with DoRA; everything as in :class:`DoraConv2d`, with three kernel dimensions."""

    STOCK = nn.Conv3d
    FUNCTION = staticmethod(functional.dora_conv3d)
