"""An adapter written to disk, both files or neither."""

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import safetensors
from safetensors.torch import save_file
from torch import Tensor, nn

from dorac import adapter_config, named, notices, offload, ranks
from dorac.adapter_config import CONFIG_NAME, DIGESTS_KEY
from dorac.checkpoint.tensors import (
    ENDINGS,
    PREFIX,
    adapter_tensors,
    key_of,
    over_residuals,
    refuse_root,
    saved_parts,
    saved_tensors,
)
from dorac.files.storage import WEIGHTS_NAME
from dorac.names import plain_name
from dorac.nn import DoraLayer, residual, starts
from dorac.ops import sharded
from dorac.wrapped import bare, refuse_offloaded_as_parts, require_layers, reshard, saved_modules


def save_adapter(
    model: nn.Module,
    directory: str | os.PathLike,
    *,
    adapter_name: str | None = None,
    state_dict: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes an adapter of ``model`` so that :func:`load_adapter` and stock PEFT read it.

    ``adapter_model.safetensors`` holds ``base_model.model.<module>.lora_A.weight`` and ``.lora_B.weight`` (of an
    embedding ``.lora_embedding_A`` and ``.lora_embedding_B``) and ``.lora_magnitude_vector`` in their own dtypes (and
    the modules in ``modules_to_save``), ``adapter_config.json`` the ``LoraConfig`` with ``use_dora``. Both files are
    written beside their places, flushed to the disk and then moved there: an interruption leaves the previous pair or
    the new one. Should the machine stop between the two moves, :func:`load_adapter` refuses the pair: the metadata of
    the weights hold a digest of the config. Whether the adapter is merged makes no difference. PEFT has no convolutions
    with a grouped lora_A: only :func:`load_adapter` reads those. Of a sharded model every rank calls this and rank 0
    writes; the others go on when it has written.

    PEFT has no DoRA on experts: their keys ``<module>.<projection>.lora_A``, ``.lora_B`` and
    ``.lora_magnitude_vector`` are dorac's own, and only :func:`load_adapter` reads them. What a dropout is on
    (``dropout_on``) is not in the file, PEFT's config having no word for it: training may go on with
    ``load_adapter(..., dropout_on=...)``, and nothing else depends on it.

    An adapter that began as a part of its base weight (PiSSA, OLoRA, CorDA, LoRA-GA) is saved as one of twice the rank
    over the weight that was there before: ``lora_A`` is ``[lora_A; lora_A0]``, ``lora_B`` ``[lora_B, -lora_B0]``. A
    model that began in such a way takes it back into its own rank; for every other it is an adapter of that rank.

    A ``RuntimeWarning`` names adapters that were never trained while others were, see :func:`dorac.find_idle`.

    Args:
        adapter_name: which one, of a model that holds several; None takes the active one. The file does not say it.
        state_dict: the values, where the model's own are in parts: a state dict that a trainer has gathered, of the
            whole model or of what is trained. The process that calls this writes then, and no other need call it.

    Raises:
        ValueError: no adapter in the model, or none of this name; layers that one config cannot describe (different
            dropout or rsLoRA settings); an adapter without values or with values that are not finite; a ``state_dict``
            without them or with parts of them; a model that PEFT has adapted.
        OSError: the directory cannot be made or written; of a sharded model on every rank.
    """
    model = bare(model)
    layers = require_layers(model)
    if adapter_name is not None and adapter_name != named.active_of(layers, adapter_name):
        if state_dict is not None:
            raise ValueError(f"a state dict holds the active adapter, not {adapter_name!r}: make that one active first")
        with named.shown(model, layers, adapter_name):
            save_adapter(model, directory)
        return
    refuse_root(layers)
    refuse_offloaded_as_parts(model, layers)
    config = adapter_config.describe(model, layers)
    if state_dict is None:
        reshard(model)
        with offload.onloaded(*saved_parts(model, layers)):
            _refuse_without_values(layers)
            notices.warn_untrained(layers)
            parameters = adapter_tensors(model, layers)
    else:
        parameters = _gathered_tensors(model, layers, state_dict)
    tensors = {key: sharded.whole(t.detach()).clone().contiguous() for key, t in parameters.items()}
    for name, layer, keys in over_residuals(layers):
        initial = (t.to(tensors[keys[0]].device) for t in _initial_factors(name, layer, state_dict))
        tensors |= zip(keys, residual.over_original(*(tensors[key] for key in keys), *initial), strict=True)
    mesh = ranks.mesh_of(parameters.values())
    if mesh is None:
        _write(tensors, config, Path(directory))
    else:
        ranks.by_first(lambda: _write(tensors, config, Path(directory)), mesh)


def _write(tensors: Mapping[str, Tensor], config: Mapping[str, object], directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt", DIGESTS_KEY: json.dumps(adapter_config.digests(config), sort_keys=True)}
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    with tempfile.TemporaryDirectory(dir=directory, prefix=".saving-") as scratch:
        weights, settings = Path(scratch, WEIGHTS_NAME), Path(scratch, CONFIG_NAME)
        try:
            save_file(tensors, weights, metadata=metadata)
        except safetensors.SafetensorError as error:
            raise OSError(f"cannot write {directory / WEIGHTS_NAME}: {error}") from None
        _sort_metadata(weights)
        settings.write_text(text, encoding="utf-8")
        for path in (weights, settings):
            _flush(path)
        _move_both(weights, settings, directory)
    _flush(directory)


def _refuse_without_values(layers: dict[str, DoraLayer]) -> None:
    """An adapter on ``meta``, or one that is not finite, could not be loaded again."""
    for name, layer in layers.items():
        starts.settle(layer)
        for key, parameter in layer.named_parameters(recurse=False):
            if parameter.is_meta:
                raise ValueError(
                    f"{name}.{key} is on meta and has no values: load the base weights or an adapter first"
                )
            if hasattr(parameter, "ds_id") and not parameter.numel():
                raise ValueError(
                    f"{name}.{key} is in parts (DeepSpeed ZeRO-3): call this within deepspeed.zero.GatheredParameters, "
                    "or give the state_dict that the trainer has gathered"
                )
            if not sharded.all_finite(parameter):
                raise ValueError(f"{name}.{key} is not finite: the adapter is not saved")


def _gathered_tensors(
    model: nn.Module, layers: Mapping[str, DoraLayer], state_dict: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors of a state dict of the model under PEFT's keys."""
    state = {plain_name(key): tensor for key, tensor in state_dict.items()}
    names = {
        key_of(name, key): f"{name}.{own}" for name, layer in layers.items() for own, key in layer.PEFT_KEYS.items()
    }
    names |= {key: key.removeprefix(PREFIX) for key in saved_tensors(model, saved_modules(model))}
    names = {key: plain_name(name) for key, name in names.items()}
    absent = [name for name in names.values() if name not in state]
    if absent:
        raise ValueError(
            f"the state dict holds no {absent[0]} ({len(absent)} of {len(names)} tensors of the adapter are not in "
            "it): gather it from the whole model"
        )
    parts = [name for name in names.values() if sharded.any_sharded(state[name])]
    if parts:  # one process alone would wait for the others for ever
        raise ValueError(
            f"the state dict holds {parts[0]} in parts (a DTensor): gather it with full_state_dict=True, or leave "
            "state_dict out and call this on every rank"
        )
    for key, name in names.items():
        if key.endswith(ENDINGS) and not state[name].isfinite().all():
            raise ValueError(f"{name} is not finite: the adapter is not saved")
    return {key: state[name] for key, name in names.items()}


def _initial_factors(name: str, layer: DoraLayer, state_dict: Mapping[str, Tensor] | None) -> list[Tensor]:
    """What the layer began with: of a state dict, if it has that, since the layer's own may be in parts."""
    own = {plain_name(f"{name}.{initial}"): getattr(layer, initial).detach() for initial in residual.INITIAL.values()}
    if state_dict is None:
        return [sharded.whole(t) for t in own.values()]
    state = {plain_name(key): tensor for key, tensor in state_dict.items()}
    tensors = {key: state.get(key, t) for key, t in own.items()}
    if parts := [key for key, t in tensors.items() if sharded.any_sharded(t)]:
        raise ValueError(f"the state dict does not hold {parts[0]} whole: gather it from the whole model")
    return list(tensors.values())


def _sort_metadata(path: Path) -> None:
    """Puts the metadata of a file in order: safetensors does not, and the same adapter is to give the same file."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        ordered = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
        if len(ordered) == size:
            file.seek(8)
            file.write(ordered)


def _move_both(weights: Path, settings: Path, directory: Path) -> None:
    """Puts both files in their places; of what interrupts it in between, nothing keeps it from the second."""
    for path in (directory / WEIGHTS_NAME, directory / CONFIG_NAME):
        if path.is_dir():
            raise IsADirectoryError(f"cannot write {path}: it is a directory")
    try:
        os.replace(weights, directory / WEIGHTS_NAME)
    finally:
        if not weights.exists():
            _insist(lambda: os.replace(settings, directory / CONFIG_NAME))


def _insist(move: Callable[[], None]) -> None:
    try:
        move()
    except BaseException:
        with contextlib.suppress(FileNotFoundError):  # it was made already
            move()
        raise


def _flush(path: Path) -> None:
    """Has the disk hold what was written to a file, or which files a directory has; where systems can."""
    if path.is_dir() and not hasattr(os, "O_DIRECTORY"):
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
