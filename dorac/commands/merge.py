"""Merges a DoRA adapter into its base model on disk.

Writes a copy of the base with W' = m (W + s BA) / ||W + s BA|| in the place of each adapted weight, in the base's
files and dtypes. One weight is in memory at a time. Adapters with a norm per input column merge as well as any.
"""

import argparse
from pathlib import Path

from dorac.cli import BadInput
from dorac.commands import source
from dorac.files.merging import merge_checkpoint


def add(parser: argparse.ArgumentParser) -> None:
    source.add_source(parser, base_required=True, base_help="it stays as it is")
    parser.add_argument(
        "out", type=Path, metavar="OUT", help="the merged model: a directory, or of one file a .safetensors file"
    )


def run(args: argparse.Namespace) -> int:
    if args.base.endswith(".safetensors") and Path(args.base).is_file() and args.out.suffix != ".safetensors":
        raise BadInput(f"--base is one file, and so is OUT: it must end in .safetensors, got {args.out}")
    source.refuse_existing(args.out)
    source.check_out(args.out)
    contents, base = source.read(args)
    merge_checkpoint(base, contents.layers, args.out, source.progress)
    print(f"{args.out}: {len(contents.layers)} layers of a {contents.format} adapter merged into {args.base}")
    return 0
