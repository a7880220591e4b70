"""``decode``: the same stack at one token, in CUDA graphs, relative to compiled plain LoRA."""

import argparse
import functools
from collections.abc import Iterator

import torch

from dorac.bench import against_lora, model, options, peers

REPLAYS = 20  # between two readings of the clock
REDUCE_OVERHEAD = model.COMPILE | {"mode": "reduce-overhead"}
VARIANTS = {
    f"{name}-compiled": peers.VARIANTS[f"{name}-compiled"].build for name in (*against_lora.PLAIN_LORA, "dorac-once")
}
DEFAULTS = {
    "cuda": {name: model.DEFAULTS["cuda"][name] for name in ("layers", "hidden", "intermediate", "heads", "kv_heads")}
    | {"ranks": [16], "batches": [1, 2, 4, 8], "variants": list(VARIANTS)},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    model.add_stack_arguments(parser)
    parser.add_argument("--ranks", nargs="+", type=options.positive, metavar="R", help="of the adapters")
    parser.add_argument("--batches", nargs="+", type=options.positive, metavar="N", help="sequences of one token")
    options.add_variants(parser, VARIANTS)


def run(args: argparse.Namespace) -> Iterator[dict[str, object]]:
    """One record per rank, batch and variant: inference at one token, the norm passed in."""
    stack = model.build_stack(args)
    weights = model.linear_weights(stack)
    for rank in args.ranks:
        layers = model.draw_layers(weights, rank, args)
        for batch in args.batches:
            x = torch.randn(batch, 1, args.hidden, dtype=args.dtype, device=args.device)
            steps = {
                name: (functools.partial(model.adapt, stack, layers, VARIANTS[name]), REDUCE_OVERHEAD)
                for name in args.variants
            }
            kernels = args.variants if args.profile else ()
            case = f"r{rank} batch {batch}"
            records = against_lora.measure_steps(case, steps, x, None, calls=REPLAYS, kernels=kernels)
            size = {"layers": args.layers, "hidden": args.hidden, "rank": rank, "batch": batch}
            yield from against_lora.related_to_lora([record | size for record in records])
