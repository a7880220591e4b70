"""Prints a table of a DoRA adapter's layers; with --plot a picture of them.

Without --base: kind, axis, rank, scaling, spread of the magnitudes. With it also the spread of g = m / ||W + s BA||,
the change of magnitude, of direction and of the weight. --plot FILE draws the change of magnitude against that of
direction, a point per layer and a colour per kind, as the DoRA paper does (section 3).
"""

import argparse
from pathlib import Path

from dorac import cli
from dorac.cli import BadInput
from dorac.commands import source
from dorac.files.base import Checkpoint
from dorac.files.changes import Change, change
from dorac.files.layers import Contents, Layer


def add(parser: argparse.ArgumentParser) -> None:
    source.add_source(parser, base_help="needed for g, the changes and --plot")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="a .png, .svg or .pdf file to draw into")


def run(args: argparse.Namespace) -> int:
    if args.plot is not None:
        if args.base is None:
            raise BadInput("--plot needs --base: what an adapter changes depends on the weights")
        if args.plot.suffix not in (".png", ".svg", ".pdf"):
            raise BadInput(f"--plot must end in .png, .svg or .pdf, got {args.plot}")
        if args.plot.is_dir():
            raise BadInput(f"--plot must be a file, {args.plot} is a directory")
        cli.require_packages("--plot", ["matplotlib"])
        source.check_out(args.plot)
    contents, base = source.read(args)
    print(f"{contents.format}: {len(contents.layers)} layers")
    changes = None if base is None else _changes(contents, base)
    rows = [_HEADS[: 6 if base is None else None]]
    for number, layer in enumerate(contents.layers):
        rows.append(_row(layer, None if changes is None else changes[number]))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print(
            "  ".join(
                f"{cell:<{w}}" if i < 3 else f"{cell:>{w}}" for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
        )
    if args.plot is not None:
        from dorac.commands.plot import save_changes

        save_changes(args.plot, {layer.name: one for layer, one in zip(contents.layers, changes, strict=True)})
        print(f"picture: {args.plot}")
    return 0


_HEADS = ("layer", "kind", "norm per", "rank", "scaling", "magnitude", "g", "|m' - m|", "1 - cos", "|W' - W| / |W|")


def _changes(contents: Contents, base: Checkpoint) -> list[Change]:
    changes = []
    for layer in source.progress(contents.layers, "reading"):
        with base.weight(layer.name) as weight:
            changes.append(change(layer, weight))
    return changes


def _row(layer: Layer, one: Change | None) -> tuple[str, ...]:
    axis = "-" if layer.magnitude is None else {"out": "output", "in": "input"}[layer.norm_axis]
    row = (layer.name, layer.kind, axis, str(layer.rank), f"{layer.scaling:.4g}", _spread(layer.magnitude))
    if one is None:
        return row
    return (*row, _spread(one.g), f"{one.magnitude:.3g}", f"{one.direction:.3g}", f"{one.size:.3g}")


def _spread(values) -> str:
    return "-" if values is None else f"{values.min().item():.4g} .. {values.max().item():.4g}"
