"""``compose``: the up-projection with everything after it, beside plain LoRA's addmm; and its backward pass."""

import argparse
import dataclasses
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from dorac.bench import measure, options, peers, report

Call = Callable[[], object]


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What the leaf ops take: ``T`` tokens, ``O`` out_features, ``R`` rank.

    base, dy, inner ``[T, O]`` in the base dtype; h ``[T, R]``, lora_B ``[O, R]`` in the adapter's; magnitude ``[O]``,
    weight_norm ``[O]``, scaling ``[]`` in float32. base is what ``x W^T`` gave, h what ``x lora_A^T`` gave.
    """

    base: Tensor
    h: Tensor
    lora_B: Tensor
    magnitude: Tensor
    weight_norm: Tensor
    scaling: Tensor
    dy: Tensor
    inner: Tensor


# ---- The leaf ops are called here and nowhere else in this package. ----


def up_compose(inputs: Inputs) -> Tensor:
    """``y = m / n * (base + s * h lora_B^T)``."""
    return torch.ops.dorac.up_compose(*_forward_arguments(inputs))


def up_compose_forward(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The same y, and ``inner = base + s * h lora_B^T`` for the backward pass."""
    return torch.ops.dorac.up_compose_forward(*_forward_arguments(inputs))


def scale_backward(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """``d_inner = m / n * dy`` and ``d_magnitude = colsum(dy * inner) / n``, in one pass over dy and inner."""
    return torch.ops.dorac.scale_backward(inputs.dy, inputs.inner, inputs.magnitude, inputs.weight_norm)


def compose_forward(inputs: Inputs) -> tuple[Tensor, Tensor]:
    """``y = m / n * (base + s * lora)`` and inner, of a product that is there: here ``lora`` is ``dy``."""
    mag_scale = inputs.magnitude / inputs.weight_norm
    return torch.ops.dorac.compose_forward(inputs.base, inputs.dy, mag_scale, inputs.scaling, None, False, False)


def lora_b_backward(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`scale_backward` with lora_B's gradient."""
    tensors = inputs.dy, inputs.inner, inputs.magnitude, inputs.weight_norm, inputs.h, inputs.scaling
    return torch.ops.dorac.lora_b_backward(*tensors, False, False)


def _forward_arguments(inputs: Inputs) -> tuple[object, ...]:
    tensors = (inputs.base, inputs.h, inputs.lora_B, inputs.magnitude, inputs.weight_norm, inputs.scaling)
    bias, delta = None, False
    return *tensors, bias, delta


# -------------------------------------------------------------------------


def _addmm(inputs: Inputs) -> Call:
    """Plain LoRA's step, which casts factors of another dtype, as :class:`dorac.bench.peers.LoraAddmm` does."""
    dtype = inputs.base.dtype
    return lambda: torch.addmm(inputs.base, inputs.h.to(dtype), inputs.lora_B.T.to(dtype))


def _compiled_forward(inputs: Inputs) -> Call:
    @torch.compile(fullgraph=True, dynamic=False)
    def forward(base, h, lora_B, magnitude, weight_norm, scaling):
        return (magnitude / weight_norm * (base + scaling * (h @ lora_B.T))).to(base.dtype)

    return lambda: forward(inputs.base, inputs.h, inputs.lora_B, inputs.magnitude, inputs.weight_norm, inputs.scaling)


def _compiled_backward(inputs: Inputs) -> Call:
    @torch.compile(fullgraph=True, dynamic=False)
    def backward(dy, inner, magnitude, weight_norm):
        d_magnitude = (dy.float() * inner.float()).sum(0) / weight_norm
        return (magnitude / weight_norm * dy).to(dy.dtype), d_magnitude

    return lambda: backward(inputs.dy, inputs.inner, inputs.magnitude, inputs.weight_norm)


# Per direction: who is measured, and how many tensors of the size of base are read and written.
FORWARD: dict[str, tuple[Callable[[Inputs], Call], int]] = {
    "addmm": (_addmm, 2),
    "compiled-formula": (_compiled_forward, 2),
    "dorac-y": (lambda inputs: lambda: up_compose(inputs), 2),
    "dorac-y-and-inner": (lambda inputs: lambda: up_compose_forward(inputs), 3),
}
BACKWARD: dict[str, tuple[Callable[[Inputs], Call], int]] = {
    "compiled-backward": (_compiled_backward, 3),
    "dorac-backward": (lambda inputs: lambda: scale_backward(inputs), 3),
}
VARIANTS = (*FORWARD, *BACKWARD)
DEFAULTS = {
    "cuda": {
        "tokens": 4096,
        "sizes": [(4096, 16), (14336, 16), (14336, 384), (8192, 16), (8192, 384)],
        "grad_sizes": [(8192, 8192), (4096, 14336)],
        "variants": list(VARIANTS),
    },
    "cpu": {"tokens": 64, "sizes": [(256, 8)], "grad_sizes": [(128, 256)], "variants": list(VARIANTS)},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tokens", type=options.positive, metavar="T", help="rows of the forward's activations")
    parser.add_argument("--sizes", nargs="+", type=options.pair, metavar="OUTxR", help="of lora_B")
    parser.add_argument("--grad-sizes", nargs="+", type=options.pair, metavar="TxOUT", help="of the backward's dy")
    options.add_variants(parser, VARIANTS)


def run(args: argparse.Namespace) -> Iterator[dict[str, object]]:
    """One record per size and variant.

    bytes: each activation-sized input once, each output once, h and lora_B once; vectors are not counted. flops:
    ``2 * T * out * r`` in the forward. ``addmm_ratio`` is the time relative to plain LoRA's addmm of the same case.
    ``gb_per_s`` and ``fraction_of_copy`` compare the bytes alone with the device's copy.
    """
    for out_features, rank in args.sizes:
        inputs = draw_inputs(args.tokens, out_features, rank, args)
        flops = 2 * args.tokens * out_features * rank
        case = f"forward {args.tokens}x{out_features} r{rank}"
        records = [_record(case, name, FORWARD[name], inputs, flops, args) for name in _chosen(FORWARD, args)]
        addmm = next((measure.work_us(record) for record in records if record["variant"] == "addmm"), None)
        for record in records:
            us = measure.work_us(record)
            yield record | {"addmm_ratio": us / addmm if us and addmm else None}
    for tokens, out_features in args.grad_sizes if _chosen(BACKWARD, args) else ():
        inputs = draw_inputs(tokens, out_features, 1, args)
        case = f"backward {tokens}x{out_features}"
        for name in _chosen(BACKWARD, args):
            yield _record(case, name, BACKWARD[name], inputs, 0, args)


def _chosen(variants: dict, args: argparse.Namespace) -> list[str]:
    return [name for name in variants if name in args.variants]


def _record(case: str, name: str, variant, inputs: Inputs, flops: int, args: argparse.Namespace) -> dict[str, object]:
    make, activations = variant
    moved = activations * inputs.base.nbytes
    if flops:
        moved += inputs.h.nbytes + inputs.lora_B.nbytes
    measured = measure.attempt(lambda: make(inputs), args.device, flush=True, kernels=args.profile)
    limit = args.ceilings.limit_us(flops=flops, copied=moved)
    us = measure.work_us(measured)
    rate = moved / us * 1e-3 if us else None
    share = rate / args.ceilings.copy_gb_per_s if rate else None
    record = {"case": case, "variant": name, "bytes": moved, "flops": flops} | measured
    record |= measure.against_limit(measured, limit) | {"gb_per_s": rate, "fraction_of_copy": share}
    report.progress(record)
    return record


def draw_inputs(tokens: int, out_features: int, rank: int, args: argparse.Namespace) -> Inputs:
    """Random tensors, the magnitude up to 3 % off the norm."""
    base, dy, inner = (torch.randn(tokens, out_features, dtype=args.dtype, device=args.device) for _ in range(3))
    h = torch.randn(tokens, rank, dtype=args.adapter_dtype, device=args.device)
    lora_B = torch.randn(out_features, rank, dtype=args.adapter_dtype, device=args.device) * 0.1 * rank**-0.5
    norm = torch.rand(out_features, device=args.device) + 0.5
    magnitude = norm * (0.97 + 0.06 * torch.rand_like(norm))
    scaling = torch.full((), peers.SCALING, device=args.device)
    return Inputs(base, h, lora_B, magnitude, norm, scaling, dy, inner)
