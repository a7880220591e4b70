"""``norm``: the row norm of W + s * lora_B @ lora_A, beside dense torch and PEFT, of a packed W beside a dense copy."""

import argparse
import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from dorac import functional, packed, quantise
from dorac.bench import bases, measure, options, peers, report

TRUTH_BYTES = 2**29  # of one float64 chunk


def _dorac(layer: peers.Layer) -> Callable[[], Tensor]:
    return lambda: functional.norm_factored(layer.weight, layer.lora_A, layer.lora_B, peers.SCALING)


def _dense_compiled(layer: peers.Layer) -> Callable[[], Tensor]:
    @torch.compile(fullgraph=True, dynamic=False)
    def norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        return peers.dense_norm(peers.dense_weight(weight, lora_A, lora_B))

    return lambda: norm(layer.weight, layer.lora_A, layer.lora_B)


def _dequantised(layer: peers.Layer) -> Callable[[], Tensor]:
    """Their library's dense copy, and dorac's norm of that."""

    def norm() -> Tensor:
        weight = quantise.dequantise(layer.base)
        return functional.norm_factored(weight, layer.lora_A, layer.lora_B, peers.SCALING)

    return norm


OVER_DENSE = ("dorac", "dense-compiled", "peft")
OVER_QUANTISED = ("dorac", "dequantised")
VARIANTS = {
    "dorac": _dorac,
    "dense-compiled": _dense_compiled,
    "peft": peers.peft_norm,
    "dequantised": _dequantised,
}
DEFAULTS = {
    "cuda": {
        "shapes": [(4096, 4096), (8192, 8192), (28672, 8192), (4096, 14336)],
        "ranks": [16, 64, 384],
        "variants": list(OVER_DENSE),
    },
    "cpu": {"shapes": [(256, 256), (128, 512)], "ranks": [8], "variants": list(OVER_DENSE)},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shapes", nargs="+", type=options.pair, metavar="OUTxIN", help="of the weight")
    parser.add_argument("--ranks", nargs="+", type=options.positive, metavar="R", help="of the factors")
    bases.add_base(parser)
    options.add_variants(parser, VARIANTS)


def check(args: argparse.Namespace) -> None:
    # torchao dequantises no int4.
    bases.check_base(args, OVER_DENSE, ("dorac",) if args.base == "int4" else OVER_QUANTISED)


def run(args: argparse.Namespace) -> Iterator[dict[str, object]]:
    """One record per shape, rank and variant.

    bytes: one read of the weight, packed as it lies with its statistics. flops: ``2 * out * in * r`` of the low-rank
    product. Factors, result and the squares are not counted. Every variant runs without gradients, from a flushed L2
    cache. ``peak_mib`` is what it takes above its inputs, ``fraction_of_read`` that of reading a packed weight's bytes.
    """
    for (out_features, in_features), rank in itertools.product(args.shapes, args.ranks):
        layer = peers.draw_layer(_draw_base(out_features, in_features, args), rank, args)
        truth = true_norm(layer)
        case = f"{out_features}x{in_features} r{rank}{bases.setting(args)}"
        moved, flops = _nbytes(layer.weight), 2 * out_features * in_features * rank
        records = []
        for name in args.variants:
            measured = _measure(name, layer, truth, args)
            size = {"out": out_features, "in": in_features, "rank": rank, "bytes": moved, "flops": flops}
            limit = args.ceilings.limit_us(flops=flops, read=moved)
            record = {"case": case, "variant": name} | size | measured | measure.against_limit(measured, limit)
            fraction = record["fraction_of_limit"]
            record["times_limit"] = 1 / fraction if fraction else None
            if args.base != bases.DENSE:
                reading = args.ceilings.limit_us(flops=0, read=moved)
                record["fraction_of_read"] = measure.against_limit(measured, reading)["fraction_of_limit"]
            report.progress(record)
            records.append(record)
        yield from _with_speedups(records)


def _draw_base(out_features: int, in_features: int, args: argparse.Namespace) -> Tensor | nn.Module:
    weight = peers.draw_weight(out_features, in_features, args)
    if args.base == bases.DENSE:
        return weight
    linear = nn.Linear(in_features, out_features, bias=False, device="meta")
    linear.weight = nn.Parameter(weight)
    return quantise.quantise(linear, args.base)


def _nbytes(weight: Tensor | packed.Packed) -> int:
    pieces = weight if packed.is_packed(weight) else (weight,)
    return sum(piece.nbytes for piece in pieces if isinstance(piece, Tensor))


def _measure(name: str, layer: peers.Layer, truth: Tensor, args: argparse.Namespace) -> dict[str, object]:
    errors = {}

    def make() -> measure.Callback:
        norm = VARIANTS[name](layer)
        errors["relative_error"] = relative_error(norm(), truth)
        return norm

    return measure.attempt(make, args.device, flush=True, kernels=args.profile) | errors


def _with_speedups(records: list[dict[str, object]]) -> Iterator[dict[str, object]]:
    """How many times as long the others take, on dorac's record."""
    times = {record["variant"]: measure.work_us(record) for record in records}
    for record in records:
        if record["variant"] == "dorac":
            for other in ("dense-compiled", "peft", "dequantised"):
                if times.get(other) and times["dorac"]:
                    record[f"speedup_over_{other.partition('-')[0]}"] = times[other] / times["dorac"]
        yield record


def true_norm(layer: peers.Layer) -> Tensor:
    """The norm in float64, over chunks of rows."""
    weight, lora_A = layer.weight, layer.lora_A.double()
    count, step = weight.shape[0], max(1, TRUTH_BYTES // (8 * weight.shape[1]))
    norms = []
    for start in range(0, count, step):
        stop = min(start + step, count)
        rows = weight.rows(start, stop) if packed.is_packed(weight) else weight[start:stop]
        norms.append((rows.double() + peers.SCALING * layer.lora_B[start:stop].double() @ lora_A).norm(dim=1))
    return torch.cat(norms)


def relative_error(norm: Tensor, truth: Tensor) -> float:
    """The largest error of a row, relative to that row's norm."""
    return ((norm.double() - truth).abs() / truth).max().item()
