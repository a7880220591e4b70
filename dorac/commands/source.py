"""What all commands read: an adapter, and the base model where it is named."""

import argparse
import importlib.util
import tempfile
from collections.abc import Iterable
from pathlib import Path

from dorac import files, hub
from dorac.cli import BadInput
from dorac.files import registry, storage
from dorac.files.base import Checkpoint
from dorac.files.layers import Contents
from dorac.files.places import place

# Formats whose layers have the names that transformers' modules have.
_OWN_NAMES = ("PEFT", "NVlabs/DoRA", "mlx-lm", "fsdp_qlora")


def add_source(parser: argparse.ArgumentParser, *, base_required: bool = False, base_help: str) -> None:
    """The adapter, and what its file leaves out."""
    add = parser.add_argument
    add("adapter", metavar="IN", help="a file or directory with a DoRA adapter, or the id of a repository on the Hub")
    add(
        "--base",
        metavar="MODEL",
        required=base_required,
        help=f"the base model: a directory with safetensors files, one such file, or a hub id; {base_help}",
    )
    add("--alpha", type=float, metavar="A", help="alpha, where the file does not say it (the scaling is alpha / rank)")
    add("--scaling", type=float, metavar="S", help="the scaling itself, in place of --alpha")
    add(
        "--axis",
        choices=("out", "in"),
        help="of the norm, where a LyCORIS file fits both: per output row or input column",
    )
    add("--eps", type=float, metavar="E", help="what the trainer added to the norm (default: LyCORIS 2^-23, others 0)")
    add(
        "--component",
        metavar="NAME",
        help="the part of a pipeline that --base is, where the file is for several: unet, transformer, ...",
    )


def read(args: argparse.Namespace) -> tuple[Contents, Checkpoint | None]:
    """The adapter, under the base's names where a base is named, and the base.

    Raises:
        OSError, ValueError, TypeError: see :func:`dorac.files.read` and :func:`dorac.files.places.place`.
    """
    contents = read_adapter(args)
    base = None if args.base is None else Checkpoint(args.base)
    return contents if base is None else placed(contents, base, args), base


def read_adapter(args: argparse.Namespace) -> Contents:
    """The adapter, under the file's own names."""
    if args.base is None and args.component is not None:
        raise BadInput("--component needs --base, whose part it is")
    path = hub.local(args.adapter, (storage.CONFIG_NAME, *storage.WEIGHTS_NAMES))
    contents = files.read(path, lora_alpha=args.alpha, scaling=args.scaling, norm_axis=args.axis, eps=args.eps)
    registry.refuse_others(contents)
    return contents


def placed(contents: Contents, base: Checkpoint, args: argparse.Namespace) -> Contents:
    """The adapter under the base's names; a ``ValueError`` where it does not fit."""
    layers = place(contents, base.modules, base.config, component=args.component)
    return contents._replace(layers=layers, names_of="model", meta_rows=frozenset())


def require_names(contents: Contents, base: Checkpoint | None) -> None:
    """A :class:`BadInput` where the file alone does not tell which modules its layers are."""
    if base is None and (contents.format not in _OWN_NAMES or contents.meta_rows):
        raise BadInput(
            f"a {contents.format} file does not say which modules its layers are: name the model with --base"
        )


def progress(items: Iterable, description: str) -> Iterable:
    """The items, with a bar on a terminal where tqdm is installed."""
    if importlib.util.find_spec("tqdm") is None:
        return items
    from tqdm import tqdm

    return tqdm(items, desc=description, disable=None)


def refuse_existing(path: Path) -> None:
    """A :class:`BadInput` for a file or a directory that is not empty."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise BadInput(f"{path} is there already: name a place that is not, so that nothing is overwritten")


def check_out(path: Path) -> None:
    """A :class:`BadInput` for a place that cannot be written, before any slow work."""
    parent = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    try:
        if parent.is_dir():
            with tempfile.NamedTemporaryFile(dir=parent):
                pass
    except OSError as error:
        raise BadInput(f"{path} cannot be written: {error.strerror or error}") from None
    if parent.is_file() and parent != path:
        raise BadInput(f"{path} cannot be written: {parent} is a file")
