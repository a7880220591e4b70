"""Writes a DoRA adapter in another format, or as plain LoRA.

"peft" and "mlx" are directories of two files, "lycoris" is one .safetensors file. "lora" is PEFT's plain LoRA for
servers that have no DoRA: of each layer's change to its weight the nearest of rank R, with the relative error of each
layer and of all. Files that have no names of modules, or lack what the target needs, ask for --base.
"""

import argparse
from pathlib import Path

from dorac import files
from dorac.cli import BadInput
from dorac.commands import source
from dorac.files import registry
from dorac.files.base import Checkpoint
from dorac.files.layers import Contents
from dorac.files.low_rank import Approximation, low_rank


def add(parser: argparse.ArgumentParser) -> None:
    source.add_source(parser, base_help="needed for --to lora, and where the file does not say enough")
    parser.add_argument(
        "out",
        type=Path,
        metavar="OUT",
        help="a directory that is not there yet or empty; for lycoris a new .safetensors file",
    )
    parser.add_argument("--to", required=True, choices=registry.TARGETS, help="the format")
    parser.add_argument("--rank", metavar="R", help="of --to lora: a number, or full (default: the adapter's largest)")
    parser.add_argument(
        "--prefix", default="lycoris", help="of LyCORIS' keys: lora_unet, lora_te, ... (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    rank = _rank(args)
    if args.to == "lycoris" and args.out.suffix != ".safetensors":
        raise BadInput(f"--to lycoris writes one file: OUT must end in .safetensors, got {args.out}")
    source.refuse_existing(args.out)
    source.check_out(args.out)
    contents, base = source.read(args)
    if args.to != "lycoris":
        source.require_names(contents, base)
    if args.to == "lora":
        if base is None:
            raise BadInput("--to lora needs --base: what DoRA changes depends on the weights")
        contents = _plain(contents, base, rank)
    elif base is not None and args.to != "lycoris":
        contents = contents._replace(layers=tuple(base.completed(layer) for layer in contents.layers))
    files.write(contents, args.out, args.to, prefix=args.prefix)
    print(f"{args.out}: {len(contents.layers)} layers, from {contents.format} to {args.to}")
    if base is None and args.to != "lycoris" and any(layer.eps for layer in contents.layers):
        print("the epsilon that LyCORIS adds to norms is left out; --base would bring it into the magnitudes")
    return 0


def _rank(args: argparse.Namespace) -> int | str | None:
    if args.rank is None:
        return None
    if args.to != "lora":
        raise BadInput("--rank is for --to lora: the other formats keep the adapter's own")
    if args.rank == "full":
        return "full"
    if not args.rank.isdecimal() or int(args.rank) < 1:
        raise BadInput(f"--rank must be a number of at least 1, or full, got {args.rank}")
    return int(args.rank)


def _plain(contents: Contents, base: Checkpoint, rank: int | str | None) -> Contents:
    """Plain LoRA; prints the relative error of each layer."""
    rank = max(layer.rank for layer in contents.layers) if rank is None else rank
    found: list[Approximation] = []
    for layer in source.progress(contents.layers, "decomposing"):
        with base.weight(layer.name) as weight:
            found.append(low_rank(layer, weight, None if rank == "full" else max(rank, 1)))
    width = max(len(one.layer.name) for one in found)
    print(f"{'layer':<{width}}   rank  relative error of W' - W")
    for one in found:
        print(f"{one.layer.name:<{width}}  {one.layer.rank:5}  {one.error:.3e}")
    total = sum(one.size**2 for one in found)
    lost = sum((one.error * one.size) ** 2 for one in found)
    print(f"{'all':<{width}}  {rank!s:>5}  {(lost / total) ** 0.5 if total else 0.0:.3e}")
    return contents._replace(layers=tuple(one.layer for one in found))
