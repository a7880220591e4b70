"""From the command line to the exit code."""

import os
import sys
from types import ModuleType

import torch

from dorac import cli
from dorac.cli import BadInput
from dorac.commands import check, convert, inspect, merge

COMMANDS: dict[str, ModuleType] = {"convert": convert, "merge": merge, "inspect": inspect, "check": check}


def main(argv: list[str] | None = None) -> int:
    """Runs one command: 0 if it is done, 1 if a check failed, 2 for bad input, 130 after Ctrl-C."""
    try:
        args = _parser().parse_args(argv)
        with torch.no_grad():
            return COMMANDS[args.command].run(args)
    except BrokenPipeError:  # whatever reads the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (BadInput, OSError, TypeError, ValueError, MemoryError) as error:
        print(f"python -m dorac: error: {error or type(error).__name__}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; nothing is half written", file=sys.stderr)
        return 130


def _parser() -> cli.Parser:
    parser = cli.Parser(
        prog="python -m dorac",
        description="DoRA adapters on disk, of PEFT, diffusers, kohya / LyCORIS, ai-toolkit, NVlabs, torchtune, "
        "mlx-lm, fsdp_qlora and Megatron-Bridge: which it is, is told by what is in the file.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, module in COMMANDS.items():
        first_line = module.__doc__.strip().splitlines()[0]
        one = commands.add_parser(name, help=first_line, description=module.__doc__, allow_abbrev=False)
        module.add(one)
    return parser
