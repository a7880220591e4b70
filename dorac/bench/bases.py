"""``--base``: what the frozen weights are."""

import argparse
import logging
from collections.abc import Iterable

from dorac import cli, quantise

DENSE = "bf16"


def add_base(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--base",
        choices=(DENSE, *quantise.PACKAGES),
        default=DENSE,
        help="of the frozen weights: bf16, dense in --dtype; bitsandbytes' nf4 or fp4 with nested statistics, or int8; "
        "torchao's torchao-int8, fp8 or int4, weights alone (default: %(default)s)",
    )


def check_base(args: argparse.Namespace, over_dense: Iterable[str], over_quantised: Iterable[str]) -> None:
    """Refuses a base whose package is missing, and variants that do not run over it.

    Over a quantised one, ``--variants`` left out are those that do, without another meaning of dropout.
    """
    names = over_dense if args.base == DENSE else over_quantised
    if args.base != DENSE:
        cli.require_packages(f"--base {args.base}", [quantise.PACKAGES[args.base]])
        logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # int8 warns of its cast to float16 in every call
        if "variants" in args.left_out:
            args.variants = [name for name in names if "low-rank" not in name]
    wrong = [name for name in args.variants if name not in names]
    if wrong:
        raise cli.BadInput(f"--base {args.base} is not for {', '.join(wrong)}, only for {', '.join(names)}")


def setting(args: argparse.Namespace) -> str:
    """What a case is called beside its sizes."""
    return "" if args.base == DENSE else f", {args.base}"
