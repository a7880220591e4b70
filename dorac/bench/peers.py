"""Who is compared: plain LoRA, stock PEFT, dense DoRA and dorac, as modules around one shared set of tensors."""

import argparse
import dataclasses
import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dorac
from dorac import functional, packed, quantise
from dorac.nn import shared

SCALING = 2.0


@dataclasses.dataclass(frozen=True)
class Layer:
    """The tensors of one adapted linear layer: weight ``[out, in]``, factors, float32 magnitude ``[out]``.

    ``dropout``: with what probability the adapter's input is dropped in training, by everyone but dense DoRA.
    ``base``: the quantised layer that holds the weight, which is then a packed one.
    """

    weight: Tensor | packed.Packed
    lora_A: Tensor
    lora_B: Tensor
    magnitude: Tensor
    dropout: float = 0.0
    base: nn.Module | None = None

    @property
    def rank(self) -> int:
        return self.lora_A.shape[0]

    def with_own_adapter(self) -> "Layer":
        """The same with an adapter that no other one holds: a kept norm sees what others write to it."""
        adapter = {name: getattr(self, name).clone() for name in ("lora_A", "lora_B", "magnitude")}
        return dataclasses.replace(self, **adapter)


def draw_weight(out_features: int, in_features: int, args: argparse.Namespace) -> Tensor:
    """A random base weight that keeps the variance of its input."""
    return torch.randn(out_features, in_features, dtype=args.dtype, device=args.device) * in_features**-0.5


def draw_layer(weight: Tensor | nn.Module, rank: int, args: argparse.Namespace) -> Layer:
    """Random factors, a fifth of the weight's size as a product, and a magnitude up to 3 % off the norm.

    ``weight``: or the quantised layer that holds it.
    """
    base = weight if isinstance(weight, nn.Module) else None
    weight = weight if base is None else packed.of(base)
    out_features, in_features = weight.shape
    options = {"dtype": args.adapter_dtype, "device": weight.device}
    lora_A = torch.randn(rank, in_features, **options) * in_features**-0.5
    lora_B = torch.randn(out_features, rank, **options) * 0.1 * rank**-0.5
    norm = functional.norm_factored(weight, lora_A, lora_B, SCALING)
    magnitude = norm * (0.97 + 0.06 * torch.rand_like(norm))
    return Layer(weight, lora_A, lora_B, magnitude, getattr(args, "dropout", 0.0), base)


class _Adapted(nn.Module):
    """Holds a layer's tensors, without copying them: the weight frozen (or packed), the rest trained."""

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        is_dense = isinstance(layer.weight, Tensor)
        self.weight = nn.Parameter(layer.weight, requires_grad=False) if is_dense else layer.weight
        self.lora_A = nn.Parameter(layer.lora_A)
        self.lora_B = nn.Parameter(layer.lora_B)
        self.dropout = nn.Dropout(layer.dropout) if layer.dropout else nn.Identity()

    def factor_input(self, x: Tensor) -> Tensor:
        """The adapter's input in the factors' dtype; as it is under autocast, which casts itself."""
        x = self.dropout(x)
        return x if torch.is_autocast_enabled(x.device.type) else x.to(self.lora_A.dtype)

    def low_rank(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(self.factor_input(x), self.lora_A), self.lora_B)


class LoraSum(_Adapted):
    """Plain LoRA as a sum: ``x W^T + s * (x lora_A^T) lora_B^T``."""

    def forward(self, x: Tensor) -> Tensor:
        return (F.linear(x, self.weight) + SCALING * self.low_rank(x)).to(x.dtype)


class LoraAlone(_Adapted):
    """:class:`LoraSum` without a cast of its own: for factors of the activation's dtype, or under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight) + SCALING * F.linear(F.linear(self.dropout(x), self.lora_A), self.lora_B)


class LoraAddmm(_Adapted):
    """Plain LoRA with the second product added in place of the sum: ``addmm(x W^T, s * x lora_A^T, lora_B^T)``.

    Factors of another dtype than the activation's are cast to it for this product.
    """

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        down = (SCALING * F.linear(self.factor_input(rows), self.lora_A)).to(x.dtype)
        y = torch.addmm(F.linear(rows, self.weight), down, self.lora_B.T.to(x.dtype))
        return y.view(*x.shape[:-1], -1)


@shared.fusable
class LoraProjection(_Adapted):
    """Plain LoRA through :func:`dorac.functional.dora_linears`, which ``dorac.fuse`` makes blocks of, as of DoRA."""

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer)
        self.base = layer.base  # whose packed weight it is
        self.out_features, self.in_features = layer.weight.shape
        self.dropout_p = layer.dropout

    def projection(self, x: Tensor) -> tuple[functional.Projection, str]:
        dropout_p = self.dropout_p if self.training else 0.0
        factors = self.lora_A, self.lora_B
        return functional.Projection(self.weight, *factors, scaling=SCALING, dropout_p=dropout_p), "low_rank"

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_dynamo_compiling() and shared.here.together is not None:
            y = shared.here.together.take(self, x)
            if y is not None:
                return y
        return functional.dora_linears(x, self.projection(x)[:1], dropout_on="low_rank")[0]


class _AdaptedWithMagnitude(_Adapted):
    def __init__(self, layer: Layer) -> None:
        super().__init__(layer)
        self.magnitude = nn.Parameter(layer.magnitude)


class DenseDora(_AdaptedWithMagnitude):
    """Textbook DoRA: ``m / ||V|| * (x V^T)`` with ``V = W + s * lora_B @ lora_A`` in memory."""

    def forward(self, x: Tensor) -> Tensor:
        adapted = dense_weight(self.weight, self.lora_A, self.lora_B)
        return (self.magnitude / dense_norm(adapted) * F.linear(x, adapted)).to(x.dtype)


class DenseNormDora(_AdaptedWithMagnitude):
    """V in memory for the norm alone: ``m / ||V|| * (x W^T + s * (x lora_A^T) lora_B^T)``, as PEFT does it."""

    def forward(self, x: Tensor) -> Tensor:
        norm = dense_norm(dense_weight(self.weight, self.lora_A, self.lora_B))
        return (self.magnitude / norm * (F.linear(x, self.weight) + SCALING * self.low_rank(x))).to(x.dtype)


class DoracOnce(_AdaptedWithMagnitude):
    """``functional.dora_linear`` with a norm that was computed once, as between two optimiser steps."""

    save_output = False  # see dorac.save_outputs

    def __init__(self, layer: Layer) -> None:
        super().__init__(layer)
        norm = functional.norm_factored(layer.weight, layer.lora_A, layer.lora_B, SCALING)
        self.register_buffer("weight_norm", norm)
        self.dropout_p = layer.dropout

    def forward(self, x: Tensor) -> Tensor:
        return functional.dora_linear(
            x,
            self.weight,
            self.lora_A,
            self.lora_B,
            self.magnitude,
            scaling=SCALING,
            weight_norm=self.weight_norm,
            dropout_p=self.dropout_p if self.training else 0.0,
            save_output=self.save_output,
        )


def dense_weight(weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
    return weight + (SCALING * lora_B @ lora_A).to(weight.dtype)


def dense_norm(adapted: Tensor) -> Tensor:
    return torch.linalg.vector_norm(adapted, dim=1, dtype=torch.float32).detach()


def _base_linear(layer: Layer) -> nn.Module:
    if layer.base is not None:
        return quantise.for_one(layer.base)
    out_features, in_features = layer.weight.shape
    linear = nn.Linear(in_features, out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(layer.weight, requires_grad=False)
    return linear


def dorac_every(layer: Layer, dropout_on: str = "adapter") -> nn.Module:
    """dorac's layer, made by ``apply_dora`` and taken out of its holder, with the norm computed in every forward."""
    holder = nn.Module()
    holder.linear = _base_linear(layer)
    dorac.apply_dora(
        holder,
        ["linear"],
        layer.rank,
        SCALING * layer.rank,
        lora_dropout=layer.dropout,
        dropout_on=dropout_on,
        adapter_dtype=layer.lora_A.dtype,
    )
    adapted = holder.linear
    adapted.lora_A = nn.Parameter(layer.lora_A)
    adapted.lora_B = nn.Parameter(layer.lora_B)
    adapted.lora_magnitude_vector = nn.Parameter(layer.magnitude)
    return adapted


def peft_linear(layer: Layer, *, use_dora: bool) -> nn.Module:
    """Stock PEFT's layer, made by ``get_peft_model`` and taken out of its wrapper, with the values of ``layer``.

    The magnitude is rounded to the dtype that PEFT keeps it in. Over a quantised layer PEFT makes float32 factors;
    those of another dtype are as a trainer's cast leaves them.
    """
    import peft

    holder = nn.Module()
    holder.linear = _base_linear(layer)
    for bits in ("4bit", "8bit"):  # PEFT chooses its layers by what transformers sets
        setattr(holder, f"is_loaded_in_{bits}", type(holder.linear).__name__.startswith(f"Linear{bits}"))
    config = peft.LoraConfig(
        r=layer.rank,
        lora_alpha=SCALING * layer.rank,
        lora_dropout=layer.dropout,
        target_modules=["linear"],
        use_dora=use_dora,
    )
    peft.get_peft_model(holder, config, autocast_adapter_dtype=layer.lora_A.dtype != layer.weight.dtype)
    adapted = holder.linear
    for modules, values in ((adapted.lora_A, layer.lora_A), (adapted.lora_B, layer.lora_B)):
        if layer.base is None and modules["default"].weight.dtype != values.dtype:
            raise RuntimeError(f"PEFT holds its factors in {modules['default'].weight.dtype}, not in {values.dtype}")
        modules["default"].weight = nn.Parameter(values)
    if use_dora:
        magnitude = adapted.lora_magnitude_vector["default"]
        magnitude.weight = nn.Parameter(layer.magnitude.to(magnitude.weight.dtype))
    return adapted


def dorac_peft(layer: Layer, dropout_on: str = "adapter") -> nn.Module:
    """Stock PEFT's layer with ``dorac.peft.enable`` on it, and the magnitude in full precision."""
    import dorac.peft

    adapted = peft_linear(layer, use_dora=True)
    dorac.peft.enable(adapted, dropout_on=dropout_on)
    adapted.lora_magnitude_vector["default"].weight = nn.Parameter(layer.magnitude)
    return adapted


def peft_norm(layer: Layer) -> Callable[[], Tensor]:
    """The norm as stock PEFT's forward computes it: lora_weight through an identity matrix, then a dense sum."""
    adapted = peft_linear(layer, use_dora=True)
    dora, lora_A, lora_B = (m["default"] for m in (adapted.lora_magnitude_vector, adapted.lora_A, adapted.lora_B))

    @torch.no_grad()
    def norm() -> Tensor:
        lora_weight = dora.get_lora_weight(lora_A=lora_A, lora_B=lora_B).to(layer.weight.dtype)
        return dora.get_weight_norm(weight=layer.weight, lora_weight=lora_weight, scaling=SCALING)

    return norm


@dataclasses.dataclass(frozen=True)
class Variant:
    """How to build a layer, and with what arguments ``torch.compile`` gets it; None runs it eagerly."""

    build: Callable[[Layer], nn.Module]
    compile_args: dict[str, object] | None


def _peft_lora(layer: Layer) -> nn.Module:
    return peft_linear(layer, use_dora=False)


def _peft_dora(layer: Layer) -> nn.Module:
    return peft_linear(layer, use_dora=True)


_WHOLE = {"fullgraph": True, "dynamic": False}
_BROKEN = {"fullgraph": False, "dynamic": False}  # stock PEFT's forward breaks the graph

# Compiled plain LoRA comes first: the others are related to it.
VARIANTS = {
    "lora-sum-compiled": Variant(LoraSum, _WHOLE),
    "lora-addmm-compiled": Variant(LoraAddmm, _WHOLE),
    "lora-sum-eager": Variant(LoraSum, None),
    "lora-addmm-eager": Variant(LoraAddmm, None),
    "peft-lora-compiled": Variant(_peft_lora, _BROKEN),
    "peft-lora-eager": Variant(_peft_lora, None),
    "peft-dora-compiled": Variant(_peft_dora, _BROKEN),
    "peft-dora-eager": Variant(_peft_dora, None),
    "dense-dora-compiled": Variant(DenseDora, _WHOLE),
    "dense-norm-dora-compiled": Variant(DenseNormDora, _WHOLE),
    "dorac-every-compiled": Variant(dorac_every, _WHOLE),
    "dorac-once-compiled": Variant(DoracOnce, _WHOLE),
    "dorac-peft-compiled": Variant(dorac_peft, _WHOLE),
    "dorac-every-eager": Variant(dorac_every, None),
    "dorac-once-eager": Variant(DoracOnce, None),
    "dorac-peft-eager": Variant(dorac_peft, None),
}
# With dropout on the low-rank branch alone; without dropout they are the same as the others.
VARIANTS |= {
    f"dorac-{name}-low-rank-{mode}": Variant(functools.partial(build, dropout_on="low_rank"), compile_args)
    for mode, compile_args in (("compiled", _WHOLE), ("eager", None))
    for name, build in (("every", dorac_every), ("peft", dorac_peft))
}
