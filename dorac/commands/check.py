"""Says whether a DoRA adapter fits a base model: names, shapes, axis. Exit code 1 if it does not.

Without --base, whether the file can be read, and what it is.
"""

import argparse
import collections
import sys

from dorac.commands import source
from dorac.files.base import Checkpoint


def add(parser: argparse.ArgumentParser) -> None:
    source.add_source(parser, base_help="without it the file alone is checked")


def run(args: argparse.Namespace) -> int:
    contents = source.read_adapter(args)  # what cannot be read is bad input
    count = collections.Counter((layer.kind, layer.norm_axis, layer.magnitude is None) for layer in contents.layers)
    print(f"{contents.format}: {len(contents.layers)} layers")
    for (kind, axis, plain), number in sorted(count.items()):
        what = "plain LoRA" if plain else f"a magnitude per {'output' if axis == 'out' else 'input'}"
        print(f"  {number} {kind}, {what}")
    if args.base is None:
        return 0
    base = Checkpoint(args.base)
    try:
        source.placed(contents, base, args)
    except ValueError as error:
        print(f"does not fit {args.base}: {error}", file=sys.stderr)
        return 1
    print(f"fits {args.base}")
    return 0
