"""What the command lines of the demo and the benchmark share."""

import argparse
import importlib.util
from collections.abc import Iterable

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class BadInput(Exception):
    """One sentence for the user: what was given, and what to do about it."""


class Parser(argparse.ArgumentParser):
    """Raises :class:`BadInput` instead of ending the process."""

    def error(self, message: str) -> None:
        raise BadInput(message)


def add_device(parser: argparse.ArgumentParser) -> None:
    """``--device``, whose value :func:`device` reads."""
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda or cuda:N (default here: %(default)s)",
    )


def device(name: str) -> torch.device:
    """The device of that name; a :class:`BadInput` if there is none."""
    try:
        found = torch.device(name)
    except RuntimeError:
        raise BadInput(f"--device must be cpu, cuda or cuda:N, got {name!r}") from None
    if found.type not in ("cpu", "cuda"):
        raise BadInput(f"--device must be cpu, cuda or cuda:N, got {name!r}")
    if found.type == "cpu":
        return found
    found = torch.device("cuda", found.index or 0)
    if found.index >= torch.cuda.device_count():
        raise BadInput(f"--device {name}: this torch sees {torch.cuda.device_count()} CUDA devices; use --device cpu")
    return found


def require_packages(who: str, names: Iterable[str], extra: str | None = None) -> None:
    """A :class:`BadInput` that names the packages that are not installed and the extra, if any, that brings them."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        wanted = " ".join(missing) if extra is None else f'"dorac[{extra}]"'
        raise BadInput(f"{who} needs {', '.join(missing)}: pip install {wanted}")
