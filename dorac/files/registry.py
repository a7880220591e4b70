"""The formats: one table of readers, in the order in which they are asked, and of writers."""

import os
from pathlib import Path
from types import ModuleType

from dorac.files import (
    ai_toolkit,
    diffusers,
    fsdp_qlora,
    lycoris,
    megatron,
    mlx,
    nvlabs,
    peft,
    storage,
    torchtune,
)
from dorac.files.layers import Contents
from dorac.files.parts import Given
from dorac.files.storage import Raw

# A format is a module with NAME, recognise(raw) and read(raw, given). The first that recognises a file reads it: those
# with keys of their own come before those whose keys others share.
_READERS: tuple[ModuleType, ...] = (nvlabs, fsdp_qlora, megatron, torchtune, mlx, ai_toolkit, lycoris, peft, diffusers)
FORMATS = tuple(sorted(format.NAME for format in _READERS))
# What besides a scaling can be given for which format: others have one axis, and add nothing to their norms.
_TAKES = {lycoris: ("norm_axis", "eps"), mlx: ("norm_axis",)}
TARGETS = ("peft", "lycoris", "mlx", "lora")


def recognise(raw: Raw) -> ModuleType | None:
    """The format of a file, or None."""
    return next((format for format in _READERS if format.recognise(raw)), None)


def read(
    path: str | os.PathLike,
    *,
    lora_alpha: float | None = None,
    scaling: float | None = None,
    norm_axis: str | None = None,
    eps: float | None = None,
) -> Contents:
    """Reads a DoRA adapter of any format in :data:`FORMATS`, without a model.

    Args:
        path: a file (``.safetensors``, ``.bin``, ``.pt``, ``.pth``, ``.ckpt``), or a directory that holds one. Pickles
            are read as tensors only.
        lora_alpha: alpha, where the file does not say it, or in place of what it says; the scaling is ``alpha / r``.
        scaling: s, in its place.
        norm_axis: "out" or "in", where a LyCORIS file fits both: whether a magnitude is an output row's or an input
            column's.
        eps: what the trainer added to the norm, which no file says. LyCORIS adds the epsilon of the dtype that it
            trains in; for its files 2^-23 is taken, that of float32. OneTrainer adds it only when asked (else 0).

    Returns:
        A :class:`Contents`, whose layers have PEFT's layouts and the file's dtypes.

    Raises:
        OSError: a missing file, or one that cannot be read. ValueError: a file that is damaged, is a pickle of more
            than tensors, is of no known format or holds no DoRA; keys that a format should have and this file has not,
            shapes that do not go together, values that are not finite; what the file leaves out and no argument gives.
            TypeError: an argument that is no number.
    """
    given = Given(lora_alpha, scaling, norm_axis, eps)
    given.check()
    return read_raw(storage.read(Path(path)), given)


def read_raw(raw: Raw, given: Given) -> Contents:
    """The contents of a file that is read already."""
    format = recognise(raw)
    if format is None:
        keys = ", ".join(list(raw.tensors)[:3]) or "none"
        raise ValueError(
            f"{raw.path} is no adapter in a format that dorac knows ({', '.join(FORMATS)}); its keys: {keys}"
        )
    for name in ("norm_axis", "eps"):
        if getattr(given, name) is not None and name not in _TAKES.get(format, ()):
            raise ValueError(f"{raw.path}: {name} is settled for a {format.NAME} file: leave it out")
    try:
        contents = format.read(raw, given)
    except (TypeError, ValueError) as error:
        text = str(error)
        raise ValueError(text if str(raw.path.parent) in text else f"{raw.path}: {text}") from None
    if not any(layer.magnitude is not None for layer in contents.layers):
        raise ValueError(
            f"{raw.path}: {format.NAME}: none of its {len(contents.layers)} layers has a magnitude: it is no DoRA"
        )
    return contents


def refuse_others(contents: Contents) -> None:
    """Raises a ``ValueError`` that names tensors beside the adapters."""
    if contents.others:
        names = ", ".join(list(contents.others)[:3])
        remedy = ""
        if contents.config.get("modules_to_save"):
            remedy = (
                "; what modules_to_save trains is read by dorac.load_adapter into a model, which dorac.merge(model, "
                "unload=True) makes a plain one"
            )
        raise ValueError(
            f"{contents.format}: {len(contents.others)} tensors of the file belong to no DoRA layer: {names}{remedy}"
        )


def write(contents: Contents, path: str | os.PathLike, to: str, *, prefix: str = "lycoris") -> None:
    """Writes an adapter in another format, whole or not at all.

    Args:
        path: the directory, made if it is not there; of "lycoris" a ``.safetensors`` file.
        to: "peft", "lycoris", "mlx", or "lora": PEFT's files of plain LoRA, for layers without magnitudes, as
            :func:`dorac.files.low_rank.low_rank` gives them.
        prefix: of LyCORIS' keys: "lycoris" for any model, "lora_unet" and such for kohya's.

    Raises:
        ValueError: another format, or layers that the format has nothing for. OSError: it cannot be written.
    """
    path = Path(path)
    if to not in TARGETS:
        raise ValueError(f"{to!r} is no format that dorac writes, only {', '.join(TARGETS)} are")
    if to == "lycoris":
        if path.suffix != ".safetensors" or path.is_dir():
            raise ValueError(f"a LyCORIS adapter is one .safetensors file, got {path}")
        tensors = lycoris.file_tensors(contents, prefix)
        storage.write(path.parent, {path.name: tensors}, {"ss_network_module": "lycoris.kohya"})
        return
    if to == "lora" and (layer := next((own for own in contents.layers if own.magnitude is not None), None)):
        raise ValueError(f"{layer.name} has a magnitude, which plain LoRA has not: approximate it first")
    files, metadata = mlx.files(contents) if to == "mlx" else peft.files(contents, plain=to == "lora")
    storage.write(path, files, metadata)
