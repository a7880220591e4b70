"""``layer``: one adapted linear layer, a training step and inference, relative to compiled plain LoRA."""

import argparse
import functools
import itertools
from collections.abc import Iterator

import torch

from dorac.bench import against_lora, measure, options, peers

DEFAULTS = {
    "cuda": {
        "shapes": [(8192, 8192), (14336, 4096)],
        "ranks": [16, 384],
        "tokens": 4096,
        "phases": list(options.PHASES),
        "dropout": 0.0,
        "variants": [name for name in peers.VARIANTS if not (name.startswith("peft-lora") or "low-rank" in name)],
    },
    "cpu": {
        "shapes": [(256, 128)],
        "ranks": [8],
        "tokens": 64,
        "phases": list(options.PHASES),
        "dropout": 0.0,
        "variants": [
            *("lora-sum-compiled", "lora-addmm-compiled", "lora-addmm-eager", "peft-dora-eager"),
            *("dorac-every-compiled", "dorac-once-compiled", "dorac-every-eager", "dorac-once-eager"),
        ],
    },
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shapes", nargs="+", type=options.pair, metavar="OUTxIN", help="of the weight")
    parser.add_argument("--ranks", nargs="+", type=options.positive, metavar="R", help="of the adapters")
    parser.add_argument("--tokens", type=options.positive, metavar="T", help="rows of the activation")
    parser.add_argument("--phases", nargs="+", choices=options.PHASES, help="what to measure (default: both)")
    options.add_dropout(parser)
    options.add_variants(parser, peers.VARIANTS)


def run(args: argparse.Namespace) -> Iterator[dict[str, object]]:
    """One record per shape, rank, phase and variant, against the limit of plain LoRA (see :func:`lora_work`)."""
    for (out_features, in_features), rank, phase in itertools.product(args.shapes, args.ranks, args.phases):
        layer = peers.draw_layer(peers.draw_weight(out_features, in_features, args), rank, args)
        x = torch.randn(args.tokens, in_features, dtype=args.dtype, device=args.device)
        dy = torch.randn(args.tokens, out_features, dtype=args.dtype, device=args.device) if phase == "train" else None
        case = f"{out_features}x{in_features} r{rank} {phase}"
        moved, flops = lora_work(args.tokens, layer, train=phase == "train")
        size = {"out": out_features, "in": in_features, "rank": rank, "tokens": args.tokens, "phase": phase}
        limit = args.ceilings.limit_us(flops=flops, copied=moved)
        variants = {name: peers.VARIANTS[name] for name in args.variants}
        compiled = [name for name, variant in variants.items() if variant.compile_args is not None]
        steps = {name: (functools.partial(v.build, layer), v.compile_args) for name, v in variants.items()}
        records = against_lora.measure_steps(
            case,
            steps,
            x,
            dy,
            kernels=compiled if args.profile else (),
            beside=against_lora.beside([layer.weight], x, args, phase),
        )
        size |= {"bytes": moved, "flops": flops}
        records = [record | size | measure.against_limit(record, limit) for record in records]
        yield from against_lora.related_to_lora(records)


def lora_work(tokens: int, layer: peers.Layer, *, train: bool) -> tuple[int, int]:
    """Fewest bytes and operations of plain LoRA on one layer.

    Forward: ``2 T (in out + r (in + out))`` operations; reads x, W and the factors, writes y. The backward pass does
    the same for dx and ``2 T r (in + out)`` more for the factors; it reads dy, x, W and the factors and writes dx and
    the factors' gradients. Tensors of ``[T, r]`` are not counted.
    """
    out_features, in_features = layer.weight.shape
    low_rank = layer.rank * (in_features + out_features)
    flops = 2 * tokens * (in_features * out_features + low_rank)
    factors = layer.lora_A.nbytes + layer.lora_B.nbytes
    rows_in, rows_out = (tokens * features * layer.weight.itemsize for features in (in_features, out_features))
    moved = rows_in + layer.weight.nbytes + factors + rows_out
    if train:
        flops += flops + 2 * tokens * low_rank
        moved += rows_out + rows_in + layer.weight.nbytes + factors + rows_in + factors
    return moved, flops
