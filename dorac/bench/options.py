"""The command line, checked before anything is measured."""

import argparse
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import ModuleType

import torch

from dorac import cli
from dorac.cli import DTYPES, BadInput

PHASES = ("train", "inference")
PICTURES = (".png", ".pdf", ".svg")


def positive(text: str) -> int:
    """A whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def natural(text: str) -> int:
    """A whole number of at least 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {value}")
    return value


def pair(text: str) -> tuple[int, int]:
    """``AxB``, two whole numbers of at least 1."""
    sides = text.lower().split("x")
    if len(sides) != 2 or not all(side.isdecimal() and int(side) for side in sides):
        raise argparse.ArgumentTypeError(f"must look like 4096x8192, got {text!r}")
    return int(sides[0]), int(sides[1])


def probability(text: str) -> float:
    """A number in [0, 1)."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"must be in [0, 1), got {text}")
    return value


def add_dropout(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dropout", type=probability, metavar="P", help="on the adapters' input in training (default: 0)"
    )


def add_variants(parser: argparse.ArgumentParser, names: Iterable[str]) -> None:
    parser.add_argument("--variants", nargs="+", choices=list(names), metavar="NAME", help=f"of: {', '.join(names)}")


def parse(argv: list[str], subcommands: Mapping[str, ModuleType]) -> argparse.Namespace:
    """Reads and checks the command line, and fills in the subcommand's defaults for the device.

    Raises:
        BadInput: whatever cannot work, as far as it can be told without measuring.
    """
    args = _parser(subcommands).parse_args(argv)
    args.device = cli.device(args.device)
    defaults = subcommands[args.command].DEFAULTS
    if args.device.type not in defaults:
        raise BadInput(f"{args.command} runs on {' and '.join(defaults)} only, --device is {args.device}")
    args.left_out = {name for name in defaults[args.device.type] if getattr(args, name) is None}
    for name in args.left_out:
        setattr(args, name, defaults[args.device.type][name])
    args.dtype = DTYPES[args.dtype]
    args.adapter_dtype = args.dtype if args.adapter_dtype is None else DTYPES[args.adapter_dtype]
    if args.adapter_dtype not in (args.dtype, torch.float32):
        raise BadInput("--adapter-dtype must be float32 or the dtype of the base weight: stock PEFT knows no other")
    if not 0 <= args.seed < 2**63:
        raise BadInput(f"--seed must be at least 0 and below 2**63, got {args.seed}")
    if args.profile and args.device.type != "cuda":
        raise BadInput("--profile shows the kernels of a GPU, so it needs --device cuda")
    if hasattr(subcommands[args.command], "check"):
        subcommands[args.command].check(args)
    _check_packages(args)
    _check_files(args)
    return args


def _parser(subcommands: Mapping[str, ModuleType]) -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="python -m dorac.bench",
        description="Measures dorac beside plain LoRA, stock PEFT and compiled dense DoRA, in one run.",
        epilog="`python -m dorac.bench picture` draws README's picture from the records; it measures nothing.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in subcommands.items():
        summary = module.__doc__.partition("\n")[0].partition(": ")[2]
        command = commands.add_parser(name, help=summary, description=summary, allow_abbrev=False)
        module.add_arguments(command)
        _add_shared(command)
    return parser


def _add_shared(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    cli.add_device(parser)
    add("--dtype", choices=list(DTYPES), default="bfloat16", help="of weights and activations (default: %(default)s)")
    add("--adapter-dtype", choices=list(DTYPES), help="of lora_A and lora_B (default: that of --dtype)")
    add("--seed", type=int, default=0, help="of every random input (default: %(default)s)")
    add(
        "--profile",
        action="store_true",
        help="also list the GPU kernels of an iteration, of layers and stacks where they are compiled",
    )
    add("--json", type=Path, metavar="FILE", help="write records, device, versions and ceilings here")
    add("--plot", type=Path, metavar="FILE", help="draw bars of the ratio to LoRA, or of the fraction of the limit")


def _check_packages(args: argparse.Namespace) -> None:
    wanted = {
        "peft": any("peft" in name for name in getattr(args, "variants", ())),
        "transformers": args.command in ("model", "decode", "memory") or "stack-form" in getattr(args, "kernels", ()),
        "triton": args.command in ("tune", "card") or getattr(args, "stub_kernels", False),
        "matplotlib": args.plot is not None,
    }
    cli.require_packages("this", [name for name, needed in wanted.items() if needed], "bench")


def _check_files(args: argparse.Namespace) -> None:
    if args.plot is not None and args.plot.suffix not in PICTURES:
        raise BadInput(f"--plot {args.plot} must end in {', '.join(PICTURES)}")
    for name, path in (("--json", args.json), ("--plot", args.plot)):
        if path is None:
            continue
        existed = path.exists()
        try:
            path.open("a").close()
        except OSError as error:
            raise BadInput(f"{name} {path} cannot be written: {error.strerror or error}") from None
        if not existed:
            path.unlink()
