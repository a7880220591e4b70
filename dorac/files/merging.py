"""An adapter merged into a model on disk, one weight in memory at a time."""

import ctypes
import functools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from torch import Tensor

from dorac.files.base import Checkpoint
from dorac.files.layers import Layer, merged

# What of a model's directory is not copied: weights that are not merged into.
_LEFT_OUT = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack")


def merge_checkpoint(
    base: Checkpoint,
    layers: Sequence[Layer],
    out: Path,
    progress: Callable[[Iterable, str], Iterable] = lambda items, _: items,
) -> None:
    """Writes the base with the layers merged into its weights, in its dtypes and files; ``out`` is whole or absent.

    Args:
        layers: under the base's names, see :func:`dorac.files.places.place`.
        out: a directory that is not there or empty; where the base is one file, a file.
        progress: what long loops go through, with a word for each.

    Raises:
        ValueError: an ``out`` that is there, quantised weights, values that the weight's dtype cannot hold, an
            embedding whose table the head shares. OSError: it cannot be written.
    """
    if out.exists() and (out.is_file() or base.path.is_file() or any(out.iterdir())):
        raise ValueError(f"{out} is there already: name a place that is not, so that nothing is overwritten")
    _refuse_tied(base, layers)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".merging-") as scratch:
        copy = Path(scratch, out.name)
        places = functools.cache(_places)  # a header holds all keys
        for file, target in progress(_copied(base, copy), "copying"):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
        for layer in progress(layers, "merging"):
            file, key = base.place(layer.name)
            with base.weight(layer.name) as weight:
                result = merged(layer, weight)
                if not result.isfinite().all():
                    raise ValueError(f"{layer.name}: the merged weight is not finite in {result.dtype}")
                stored = result.t() if base.modules[layer.name].transposed else result
                target = copy if base.path.is_file() else copy / file.relative_to(base.path)
                _overwrite(target, places(target)[key], stored.contiguous())
        os.replace(copy, out)


def _copied(base: Checkpoint, copy: Path) -> list[tuple[Path, Path]]:
    """The files of the base that have a copy, and their places."""
    if base.path.is_file():
        return [(base.path, copy)]
    found = [file for file in base.path.rglob("*") if file.is_file()]
    inside = [(file, file.relative_to(base.path)) for file in found]
    return [
        (file, copy / name)
        for file, name in inside
        if file in base.files or (file.suffix not in _LEFT_OUT and not any(p.startswith(".") for p in name.parts))
    ]


def _refuse_tied(base: Checkpoint, layers: Sequence[Layer]) -> None:
    if not base.is_tied():
        return
    if layer := next((own for own in layers if own.kind == "embedding" and own.norm_axis == "out"), None):
        raise ValueError(f"{layer.name}: the head shares its table and would be changed with it; untie them first")


def _places(path: Path) -> dict[str, tuple[int, int]]:
    """Where each tensor of a safetensors file begins and ends."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    offsets = {key: entry["data_offsets"] for key, entry in header.items() if key != "__metadata__"}
    return {key: (8 + length + start, 8 + length + end) for key, (start, end) in offsets.items()}


def _overwrite(path: Path, place: tuple[int, int], tensor: Tensor) -> None:
    """Puts a tensor's bytes in the place of those of one of the same shape and dtype."""
    start, end = place
    assert end - start == tensor.nbytes
    with path.open("r+b") as file:
        file.seek(start)
        file.write((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()))
