"""``norm``: the row norm of W + s * lora_B @ lora_A, beside compiled dense torch and stock PEFT."""

import argparse
import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from dorac import functional
from dorac.bench import measure, options, peers, report

TRUTH_BYTES = 2**29  # of one float64 chunk


def _dorac(layer: peers.Layer) -> Callable[[], Tensor]:
    return lambda: functional.norm_factored(layer.weight, layer.lora_A, layer.lora_B, peers.SCALING)


def _dense_compiled(layer: peers.Layer) -> Callable[[], Tensor]:
    @torch.compile(fullgraph=True, dynamic=False)
    def norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:
        return peers.dense_norm(peers.dense_weight(weight, lora_A, lora_B))

    return lambda: norm(layer.weight, layer.lora_A, layer.lora_B)


VARIANTS = {"dorac": _dorac, "dense-compiled": _dense_compiled, "peft": peers.peft_norm}
DEFAULTS = {
    "cuda": {
        "shapes": [(4096, 4096), (8192, 8192), (28672, 8192), (4096, 14336)],
        "ranks": [16, 64, 384],
        "variants": list(VARIANTS),
    },
    "cpu": {"shapes": [(256, 256), (128, 512)], "ranks": [8], "variants": list(VARIANTS)},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shapes", nargs="+", type=options.pair, metavar="OUTxIN", help="of the weight")
    parser.add_argument("--ranks", nargs="+", type=options.positive, metavar="R", help="of the factors")
    options.add_variants(parser, VARIANTS)


def run(args: argparse.Namespace) -> Iterator[dict[str, object]]:
    """One record per shape, rank and variant.

    bytes: one read of the weight. flops: ``2 * out * in * r`` of the low-rank product. Factors, result and the squares
    are not counted. Every variant runs without gradients, from a flushed L2 cache.
    """
    for (out_features, in_features), rank in itertools.product(args.shapes, args.ranks):
        layer = peers.draw_layer(peers.draw_weight(out_features, in_features, args), rank, args)
        truth = true_norm(layer)
        case = f"{out_features}x{in_features} r{rank}"
        moved, flops = layer.weight.nbytes, 2 * out_features * in_features * rank
        records = []
        for name in args.variants:
            measured = _measure(name, layer, truth, args)
            size = {"out": out_features, "in": in_features, "rank": rank, "bytes": moved, "flops": flops}
            limit = args.ceilings.limit_us(flops=flops, read=moved)
            record = {"case": case, "variant": name} | size | measured | measure.against_limit(measured, limit)
            fraction = record["fraction_of_limit"]
            record["times_limit"] = 1 / fraction if fraction else None
            report.progress(record)
            records.append(record)
        yield from _with_speedups(records)


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
            for other in ("dense-compiled", "peft"):
                if times.get(other) and times["dorac"]:
                    record[f"speedup_over_{other.partition('-')[0]}"] = times[other] / times["dorac"]
        yield record


def true_norm(layer: peers.Layer) -> Tensor:
    """The norm in float64, over chunks of rows."""
    lora_A = layer.lora_A.double()
    rows = max(1, TRUTH_BYTES // (8 * layer.weight.shape[1]))
    chunks = zip(layer.weight.split(rows), layer.lora_B.split(rows), strict=True)
    return torch.cat(
        [(weight.double() + peers.SCALING * lora_B.double() @ lora_A).norm(dim=1) for weight, lora_B in chunks]
    )


def relative_error(norm: Tensor, truth: Tensor) -> float:
    """The largest error of a row, relative to that row's norm."""
    return ((norm.double() - truth).abs() / truth).max().item()
