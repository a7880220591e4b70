"""Quantised base layers of other libraries: made of a dense layer, and dequantised by their library."""

import argparse
import importlib.util
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from dorac import cli

DENSE = "bf16"
GROUP = 128  # columns of a scale of int4, torchao's default


def _bnb_4bit(linear: nn.Linear, quant_type: str) -> nn.Module:
    from bitsandbytes.nn import Linear4bit, Params4bit

    weight = linear.weight
    options = {"compress_statistics": True, "quant_type": quant_type}
    with torch.device("meta"):
        layer = Linear4bit(*weight.shape[::-1], bias=False, compute_dtype=weight.dtype, **options)
    layer.weight = Params4bit(weight.detach(), requires_grad=False, module=layer, **options)
    return layer.to(weight.device)  # which quantises


def _bnb_8bit(linear: nn.Linear) -> nn.Module:
    # It quantises what comes from the CPU.
    return _linear_8bit(linear.weight.detach().cpu()).to(linear.weight.device)


def _linear_8bit(weight: Tensor, **statistics: Tensor) -> nn.Module:
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    with torch.device("meta"):
        layer = Linear8bitLt(*weight.shape[::-1], bias=False, has_fp16_weights=False)
    layer.weight = Int8Params(weight, requires_grad=False, has_fp16_weights=False, **statistics)
    return layer


def _torchao_float8(linear: nn.Linear) -> nn.Module:
    from torchao.quantization import Float8WeightOnlyConfig, quantize_

    quantize_(linear, Float8WeightOnlyConfig(set_inductor_config=False))  # the process's, everybody's
    return linear


def _torchao_int4(linear: nn.Linear) -> nn.Module:
    """The pieces are made here, since torchao's own way to them needs mslk, as its product does."""
    from torchao.quantization.quantize_.workflows.int4.int4_tensor import Int4Tensor

    weight = linear.weight.detach()
    out_features, in_features = weight.shape
    group = GROUP if in_features % GROUP == 0 else in_features
    groups = weight.float().view(out_features, -1, group)
    least, most = groups.aminmax(dim=-1, keepdim=True)
    scale = ((most - least) / 15).clamp_min(1e-6).to(weight.dtype)
    zero = (least.to(weight.dtype) + 8 * scale).to(weight.dtype)
    numbers = ((groups - zero.float()) / scale.float()).round().clamp(-8, 7).to(torch.int8).view(weight.shape)
    codes = (numbers[:, ::2] & 15) | (numbers[:, 1::2] << 4)
    pieces = (codes.contiguous(), *(t.squeeze(-1).T.contiguous() for t in (scale, zero)))
    linear.weight = nn.Parameter(Int4Tensor(*pieces, [1, group], weight.shape), requires_grad=False)
    return linear


_QUANTISE: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "nf4": lambda linear: _bnb_4bit(linear, "nf4"),
    "fp4": lambda linear: _bnb_4bit(linear, "fp4"),
    "int8": _bnb_8bit,
    "fp8": _torchao_float8,
    "int4": _torchao_int4,
}
NAMES = (DENSE, *_QUANTISE)
PACKAGES = {"nf4": "bitsandbytes", "fp4": "bitsandbytes", "int8": "bitsandbytes", "fp8": "torchao", "int4": "torchao"}


def add_base(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--base",
        choices=NAMES,
        default=DENSE,
        help="of the frozen weights: bf16, dense in --dtype; bitsandbytes' nf4 or fp4 with nested statistics, or int8; "
        "torchao's fp8 or int4, weights alone (default: %(default)s)",
    )


def check_base(args: argparse.Namespace, over_dense: Iterable[str], over_quantised: Iterable[str]) -> None:
    """Refuses a base whose package is missing, and variants that do not run over it.

    Over a quantised one, ``--variants`` left out are those that do, without another meaning of dropout.
    """
    names = over_dense if args.base == DENSE else over_quantised
    if args.base != DENSE:
        cli.require_packages(f"--base {args.base}", [PACKAGES[args.base]])
        if "variants" in args.left_out:
            args.variants = [name for name in names if "low-rank" not in name]
    wrong = [name for name in args.variants if name not in names]
    if wrong:
        raise cli.BadInput(f"--base {args.base} is not for {', '.join(wrong)}, only for {', '.join(names)}")


def setting(args: argparse.Namespace) -> str:
    """What a case is called beside its sizes."""
    return "" if args.base == DENSE else f", {args.base}"


def has_product(base: str) -> bool:
    """Whether the library can multiply with it here."""
    return base != "int4" or importlib.util.find_spec("mslk") is not None


def quantise(linear: nn.Linear, base: str) -> nn.Module:
    """A layer with the weight of ``linear``, which may be it, on the same device; its products are in that dtype."""
    return _QUANTISE[base](linear.requires_grad_(False))


def quantise_stack(stack: nn.Module, base: str) -> None:
    """:func:`quantise` of every linear layer, in place."""
    for name, module in list(stack.named_modules()):
        if isinstance(module, nn.Linear):
            stack.set_submodule(name, quantise(module, base))


def for_one(layer: nn.Module) -> nn.Module:
    """``layer`` for one model, over the same tensors.

    In its first forward bitsandbytes' 8-bit layer takes the scales from its weight, without which PEFT wraps none.
    """
    if type(layer).__name__ != "Linear8bitLt":
        return layer
    return _linear_8bit(layer.weight.data, CB=layer.weight.CB, SCB=layer.weight.SCB)


def dequantise(layer: nn.Module) -> Tensor:
    """The dense weight, as the library itself gives it; torchao has none of int4."""
    weight = layer.weight
    if type(weight).__module__.startswith("torchao"):
        return weight.dequantize()
    from bitsandbytes import functional

    if weight.dtype is torch.int8:
        return functional.int8_vectorwise_dequant(weight.data, weight.SCB)
    return functional.dequantize_4bit(weight.data, weight.quant_state)
