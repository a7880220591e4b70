"""Adapters on disk in PEFT's format: ``adapter_model.safetensors`` and ``adapter_config.json``."""

import contextlib
import dataclasses
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dorac import adapter_config, checks, hub, named, notices, offload, packed, ranks
from dorac.adapter_config import CONFIG_NAME, DIGESTS_KEY
from dorac.apply import (
    bare,
    dora_layers,
    find_saved,
    refuse_ddp,
    refuse_offloaded_as_parts,
    refuse_tied,
    require_layers,
    reshard,
    saved_modules,
    wrap,
)
from dorac.bounded import Bounded
from dorac.files import into_model, storage
from dorac.files.into_model import AdapterFile
from dorac.files.parts import Given
from dorac.files.storage import WEIGHTS_NAME
from dorac.names import ModuleNames, Pattern, plain_name
from dorac.nn import DoraLayer, DoraLinear, layer_class, norm_cache, residual, starts
from dorac.nn.kinds import KINDS
from dorac.nn.shelf import Shelved
from dorac.ops import sharded
from dorac.targets import Target, find_targets
from dorac.undo import Undo

_PREFIX = "base_model.model."
_ENDINGS = tuple({key for kind in KINDS for key in kind.PEFT_KEYS.values()})


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
    writes.

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
        OSError: the directory cannot be made or written.
    """
    model = bare(model)
    layers = require_layers(model)
    if adapter_name is not None and adapter_name != named.active_of(layers, adapter_name):
        if state_dict is not None:
            raise ValueError(f"a state dict holds the active adapter, not {adapter_name!r}: make that one active first")
        with named.shown(model, layers, adapter_name):
            save_adapter(model, directory)
        return
    _refuse_root(layers)
    refuse_offloaded_as_parts(model, layers)
    config = adapter_config.describe(model, layers)
    if state_dict is None:
        reshard(model)
        with offload.onloaded(*_saved_parts(model, layers)):
            _refuse_without_values(layers)
            notices.warn_untrained(layers, stacklevel=2)
            parameters = _adapter_tensors(model, layers)
    else:
        parameters = _gathered_tensors(model, layers, state_dict)
    tensors = {key: sharded.whole(t.detach()).clone().contiguous() for key, t in parameters.items()}
    for name, layer, keys in _over_residuals(layers):
        initial = (t.to(tensors[keys[0]].device) for t in _initial_factors(name, layer, state_dict))
        tensors |= zip(keys, residual.over_original(*(tensors[key] for key in keys), *initial), strict=True)
    if sharded.any_sharded(*parameters.values()) and torch.distributed.get_rank() != 0:
        return
    directory = Path(directory)
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
    names = {_key(name, key): f"{name}.{own}" for name, layer in layers.items() for own, key in layer.PEFT_KEYS.items()}
    names |= {key: key.removeprefix(_PREFIX) for key in _saved_tensors(model, saved_modules(model))}
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
        if key.endswith(_ENDINGS) and not state[name].isfinite().all():
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


def load_adapter(
    model: nn.Module,
    directory: str | os.PathLike,
    *,
    adapter_name: str | None = None,
    revision: str | None = None,
    dropout_on: str = "adapter",
    lora_alpha: float | None = None,
    scaling: float | None = None,
    norm_axis: str | None = None,
    eps: float | None = None,
    component: str | None = None,
) -> list[str]:
    """Reads an adapter written by :func:`save_adapter`, by PEFT or by another trainer into ``model``.

    A plain model is wrapped first, as the config says; a wrapped model must hold the same layers, ranks and scalings.
    With an ``adapter_name`` a wrapped model gets the adapter beside those that it has, of any ranks and scalings but
    for the same layers, and goes on with the active one: :func:`dorac.set_adapter` switches.
    Values are cast to the dtype of the parameters they go to. The base weight that PEFT adds to the file for an adapted
    token embedding or language-model head is read too, as PEFT does. Parameters on ``meta`` are replaced by new ones on
    the CPU, as ``load_state_dict(assign=True)`` does; the base weights, which the file does not hold, stay there.

    A file may come from anybody: its regexes are matched in a bounded number of steps and may be plain ones only
    (groups, alternatives, classes, repeats, look-ahead).

    What PEFT has not converted of an adapter that began as a part of its base weight (init_lora_weights "pissa",
    "pissa_niter_[number]", "olora", and "corda" after ``preprocess_corda``) is read as PEFT reads it, by its code: the
    same part is taken out of the base weights again. So the model must have the weights that the adapter began with.
    PEFT's own conversion leaves out the magnitudes; :func:`save_adapter` of the model writes a converted adapter.

    Files of the other formats in :data:`dorac.files.FORMATS` are known by what is in them. Their layers are matched
    with the model's modules, by the names of diffusers', kohya's, Black Forest Labs', Stability's, torchtune's and
    Megatron's models too; rows that another library keeps in another order, or for several layers in one, are put where
    they belong. Plain LoRA among the layers gets the magnitudes that leave it as it is. Magnitudes per input column are
    refused, since no layer of dorac's computes with them: :func:`dorac.files.merge_into` merges such files.

    Args:
        directory: where the files are, or one file of weights; or the id of a repository on the Hugging Face Hub, such
            as "user/adapter", if there is no such directory and huggingface_hub is installed.
        adapter_name: the name of the adapter, new to the model; of a plain model's first one "default" if it is None.
        revision: a branch, tag or commit of the repository.
        dropout_on: for a plain model, what the config's dropout is on (the file does not say: PEFT's config has no word
            for it); a wrapped model keeps its own. See :func:`dorac.functional.dora_linear`.
        lora_alpha, scaling, norm_axis, eps: what files of other formats leave out, see :func:`dorac.files.read`; a file
            that has an alpha of its own takes these in its place. PEFT's pair of files takes none.
        component: of a file for several parts of a pipeline, the one that ``model`` is: "unet", "transformer",
            "text_encoder", "text_encoder_2".

    Returns:
        The names of the modules that the adapter went to.

    Raises:
        ImportError: an adapter over a part of the base weights, and no PEFT. OSError: a missing file, or one that
            cannot be read. ValueError: a file that is damaged; a config that is not
            DoRA, asks for what dorac does not have, or is not the one that the weights were saved with; keys, shapes,
            dtypes, ranks or scalings that do not fit and values that are not finite in the dtype they go to, all of
            them listed, other ranks first. The path is in the sentence. Also an adapter that accelerate offloads to
            disk, an ``adapter_name`` that is there, and with one what :func:`dorac.add_adapter` refuses; of a sharded
            model, which every rank calls this for, a file or an adapter that is another one on another rank. Then, and
            whatever else is raised, the model is what it was.
    """
    checks.check_dropout_on(dropout_on)
    if adapter_name is not None:
        named.check_name(adapter_name)
    root, model = model, bare(model)
    reshard(model)
    layers = dora_layers(model)
    _refuse_root(layers)
    active = named.check_new(model, layers, adapter_name) if layers and adapter_name is not None else None

    def read() -> AdapterFile:
        path = hub.local(directory, (CONFIG_NAME, *storage.WEIGHTS_NAMES), revision)
        return into_model.read(model, path, Given(lora_alpha, scaling, norm_axis, eps), component)

    file = _read_alike(layers, read)
    if active is None:
        return _load(root, file, dropout_on=dropout_on, adapter_name=adapter_name or "default")
    with Undo() as log:
        try:
            named.put_on_shelves(model, layers, adapter_name, _like(file, layers, dropout_on), log)
        except (TypeError, ValueError) as error:
            raise ValueError(f"the adapter in {file.path} does not fit the model: {error}") from None
        named.exchange(model, layers, adapter_name, log)  # whose norms are taken when it has values
        names = _load(root, file, beside_others=True)
        norm_cache.refresh(named.exchange(model, layers, active, log))
        return names


def _read_alike(layers: Mapping[str, DoraLayer], read: Callable[[], AdapterFile]) -> AdapterFile:
    """What the files hold; of a sharded model the same on every rank, or an error on every rank."""
    mesh = ranks.mesh_of(p for layer in layers.values() for p in layer.parameters(recurse=False))
    if mesh is None:
        return read()
    file = error = None
    try:
        file = read()
        found = f"adapter {ranks.digest(file.tensors, adapter_config.digests(file.config))}"
    except (OSError, TypeError, ValueError) as raised:
        error, found = raised, f"an error ({raised})"
    ranks.refuse_others({"what load_adapter reads": found}, mesh, "give every rank the same directory")
    if error is not None:
        raise error
    ranks.refuse_other_adapters(layers, mesh)
    return file


def _like(file: AdapterFile, layers: Mapping[str, DoraLayer], dropout_on: str) -> Callable[[str, DoraLayer], Shelved]:
    """What makes an adapter without values for a layer, of the rank and the settings that the file has."""
    config, compile = file.config, Bounded().compile
    ranks = Pattern("rank_pattern", config.get("rank_pattern"), compile)
    alphas = Pattern("alpha_pattern", config.get("alpha_pattern"), compile)
    settings = {
        "lora_dropout": config.get("lora_dropout") or 0.0,
        "dropout_on": dropout_on,
        "use_rslora": bool(config.get("use_rslora")),
        "init_lora_weights": True,
    }

    def build(name: str, layer: DoraLayer) -> Shelved:
        plain = plain_name(name)
        keys = {own: _key(name, key) for own, key in layer.PEFT_KEYS.items()}
        tensors = {own: file.tensors[key] for own, key in keys.items() if key in file.tensors}
        r, lora_alpha = ranks.value(plain, config["r"]), alphas.value(plain, config["lora_alpha"])
        return named.empty_adapter(name, layer, r, lora_alpha, tensors, settings)

    return build


def _load(
    root: nn.Module,
    file: AdapterFile,
    *,
    dropout_on: str = "adapter",
    adapter_name: str = "default",
    beside_others: bool = False,
) -> list[str]:
    """Reads an adapter into the active one of a model, or into a plain model under a name.

    ``beside_others``: the model holds others, which have its base weights.
    """
    model, (directory, config, tensors) = bare(root), file
    layers = dora_layers(model)
    refuse_offloaded_as_parts(model, layers)
    merged = [name for name, layer in layers.items() if layer.merged]
    if merged:
        raise ValueError(f"the model's adapter is merged ({merged[0]}, ...); unmerge it before loading another")

    if layers:
        targets, saved, problems = [], saved_modules(model), adapter_config.setting_mismatches(layers, config)
        bases = {name: layer.base_layer for name, layer in layers.items()}
        expected = {key: t.shape for key, t in _adapter_tensors(model, layers).items()}
        for _, layer, keys in _over_residuals(layers):
            shapes = layer.adapter_shapes(layer.base_layer, residual.saved_rank(layer))
            expected |= {key: shapes[name] for key, name in zip(keys, residual.INITIAL, strict=True)}
    else:
        refuse_ddp(root)
        problems = []
        try:
            saved, targets = _find_places(model, config)
        except (TypeError, ValueError) as error:
            raise ValueError(f"the adapter in {directory} does not fit the model: {error}") from None
        targets = [_laid_out(target, tensors) for target in targets]
        bases = {target.name: target.module for target in targets}
        expected = {}
        for target in targets:
            cls = layer_class(target.module)
            shapes = cls.adapter_shapes(target.module, target.r, **target.layout)
            expected |= {_key(target.name, cls.PEFT_KEYS[name]): shape for name, shape in shapes.items()}
        expected |= {key: t.shape for key, t in _saved_tensors(model, saved).items()}

    others = beside_others or any(len(layer.adapters) > 1 for layer in layers.values())
    if start := adapter_config.taken_out(config):
        if others:
            raise ValueError(
                f"the adapter in {directory} is over what init_lora_weights={start!r} leaves of the original base "
                "weights, which the model's other adapters rest on: load it into the plain model"
            )
        _refuse_to_take_out(start, directory, layers, bases)
    ends = _embeddings(model, bases)
    base_tensors = {key: p for key, p in _embedding_tensors(ends).items() if key in tensors}
    expected |= {key: p.shape for key, p in base_tensors.items()}
    problems += [f"missing: {key}" for key in expected if key not in tensors]
    problems += [f"unexpected: {key}" for key in tensors if key not in expected]
    problems += [
        f"shape of {key}: the model has {list(shape)}, the file {list(tensors[key].shape)}"
        for key, shape in expected.items()
        if key in tensors and tensors[key].shape != shape
    ]
    problems += _unfit_values(tensors, _saved_tensors(model, saved) | base_tensors)
    _refuse(directory, problems)
    if others:
        with offload.onloaded(*ends.values()):
            present = _embedding_tensors(ends)
            _refuse(
                directory, [_OTHER_BASE.format(key) for key in base_tensors if _differs(tensors[key], present[key])]
            )
        base_tensors = {}

    with Undo() as log:
        if targets:
            wrap(
                model,
                targets,
                saved,
                log,
                lora_dropout=config.get("lora_dropout") or 0.0,
                dropout_on=dropout_on,
                use_rslora=bool(config.get("use_rslora")),
                adapter_name=adapter_name,
                stacklevel=4,
            )
            layers = dora_layers(model)
        for layer in layers.values():
            layer.keep_norm(log)
        residuals = {layer: keys for _, layer, keys in _over_residuals(layers)}
        if start:
            _take_out(start, model, layers, log)
        written = *_saved_parts(model, layers), *(layer.base_layer for layer in residuals)
        with offload.written(log, *written, *(ends.values() if base_tensors else ())):
            goals = _adapter_tensors(model, layers)
            goals |= {key: p for key, p in _embedding_tensors(ends).items() if key in base_tensors}
            _refuse(directory, [problem for key, t in goals.items() if (problem := _overflow(key, tensors[key], t))])
            for layer, keys in residuals.items():
                tensors |= zip(keys, residual.adopt(layer, *(tensors[key] for key in keys), log), strict=True)
            with torch.no_grad():
                for key, parameter in goals.items():
                    log.keep(parameter)
                    parameter.copy_(sharded.like(tensors[key], parameter))
            _replace_meta(model, {key: t for key, t in goals.items() if t.is_meta}, tensors, log)
        for layer in layers.values():
            starts.has_values(layer, loaded=True)
        norm_cache.refresh(layers.values())
    return ModuleNames(layers)


_OTHER_BASE = "values of {}: not those of the model's base weight, which its other adapters rest on"


def _differs(value: Tensor, present: Tensor) -> bool:
    """Whether reading ``value`` into ``present`` would change that."""
    return not present.is_meta and not torch.equal(value.to(present.dtype), sharded.whole(present.detach()).cpu())


def _key(module: str, name: str) -> str:
    """PEFT's key of a tensor of a module, whether that is compiled or not."""
    return _PREFIX + plain_name(f"{module}.{name}")


def _over_residuals(layers: Mapping[str, DoraLayer]) -> list[tuple[str, DoraLayer, list[str]]]:
    """The layers that began as a part of their base weights, with their names and PEFT's keys of lora_A and lora_B."""
    return [
        (name, layer, [_key(name, layer.PEFT_KEYS[factor]) for factor in residual.INITIAL])
        for name, layer in layers.items()
        if residual.has_residual(layer)
    ]


def _refuse_to_take_out(
    start: str, directory: Path, layers: Mapping[str, DoraLayer], bases: Mapping[str, nn.Module]
) -> None:
    """Refuses an adapter over a part of the base weights that cannot be had in this model."""
    from dorac.peft import inits  # imported only for a start of PEFT's

    begun = next((name for name, layer in layers.items() if residual.has_residual(layer)), None)
    if begun is not None:
        raise ValueError(
            f"the adapter in {directory} is over what init_lora_weights={start!r} leaves of the original base weights; "
            f"here a part of them is taken out already ({begun}, ...): load it into the plain model"
        )
    try:
        inits.check_again(start, bases)
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from None


def _take_out(start: str, model: nn.Module, layers: Mapping[str, DoraLayer], log: Undo) -> None:
    """Takes out of the base weights what was taken out when the adapter was made, as PEFT does when it loads it."""
    from dorac.peft import inits

    linear = {name: layer for name, layer in layers.items() if isinstance(layer, DoraLinear)}
    refuse_tied(model, linear.values(), f"init_lora_weights={start!r}")
    with offload.written(log, *linear.values(), *(layer.base_layer for layer in linear.values())):
        inits.begin_again(start, linear, log)
    if "niter" in start:
        warnings.warn(
            f"the adapter is over what init_lora_weights={start!r} left of the base weights, a decomposition with "
            "random numbers: what is left now is that as far as the decomposition converges",
            RuntimeWarning,
            stacklevel=4,
        )


def _laid_out(target: Target, tensors: dict[str, Tensor]) -> Target:
    """The target with the layout that the file's tensors for it have."""
    cls = layer_class(target.module)
    keys = {name: _key(target.name, key) for name, key in cls.PEFT_KEYS.items()}
    present = {name: tensors[key] for name, key in keys.items() if key in tensors}
    return dataclasses.replace(target, layout=cls.layout_of(target.module, present))


def _adapter_tensors(model: nn.Module, layers: dict[str, DoraLayer]) -> dict[str, Tensor]:
    """The model's own tensors under PEFT's keys."""
    adapters = {
        _key(name, key): getattr(layer, attribute)
        for name, layer in layers.items()
        for attribute, key in layer.PEFT_KEYS.items()
    }
    return adapters | _saved_tensors(model, saved_modules(model))


def _saved_parts(model: nn.Module, layers: Mapping[str, DoraLayer]) -> list[nn.Module]:
    """The modules that hold what an adapter's file does."""
    return [*layers.values(), *(part for name in saved_modules(model) for part in model.get_submodule(name).modules())]


def _saved_tensors(model: nn.Module, saved: list[str]) -> dict[str, Tensor]:
    return {
        _key(name, key): tensor
        for name in saved
        for key, tensor in model.get_submodule(name).state_dict(keep_vars=True).items()
    }


def _refuse_root(layers: dict[str, DoraLayer]) -> None:
    if "" in layers:
        kind = type(layers[""]).__name__
        raise ValueError(f"the model is itself a {kind}, which PEFT's keys cannot name; pass a model that holds it")


def _find_places(model: nn.Module, config: dict) -> tuple[list[str], list[Target]]:
    """The modules of a plain model that are saved whole, and those that are adapted."""
    # PEFT names every usual classifier head in modules_to_save; what is saved too little shows in the keys.
    saved = find_saved(model, config.get("modules_to_save") or [], all_needed=False)
    names = ("exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern")
    options = {name: config.get(name) for name in ("r", "lora_alpha", *names)}
    return saved, find_targets(model, config["target_modules"], saved=saved, compile=Bounded().compile, **options)


def _embeddings(model: nn.Module, bases: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The token embeddings and language-model heads among ``bases``, of which PEFT saves the base weights, too.

    Not quantised ones, which have no dense weights.
    """
    ends = {
        getattr(module, "base_layer", module)
        for getter in ("get_input_embeddings", "get_output_embeddings")
        if hasattr(model, getter) and (module := getattr(model, getter)()) is not None
    }
    return {name: module for name, module in bases.items() if module in ends and packed.holder(module) is None}


def _embedding_tensors(ends: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """Their parameters under the keys that PEFT saves them with."""
    return {
        _key(name, f"base_layer.{key}"): parameter
        for name, module in ends.items()
        for key, parameter in module.named_parameters()
    }


def _unfit_values(tensors: dict[str, Tensor], others: dict[str, Tensor]) -> list[str]:
    """Tensors of another dtype than those of the model can take, and values that are no numbers.

    A buffer may hold infinities, as a mask does.
    """
    problems = []
    for key, tensor in tensors.items():
        goal = others.get(key)
        if goal is None and not key.endswith(_ENDINGS):
            continue
        exact = goal is not None and not goal.is_floating_point()
        if tensor.dtype != goal.dtype if exact else not tensor.is_floating_point():
            problems.append(f"dtype of {key}: {tensor.dtype}")
        elif not exact and (goal is None or isinstance(goal, nn.Parameter)) and not tensor.isfinite().all():
            problems.append(f"values of {key}: not all are finite")
    return problems


def _overflow(key: str, tensor: Tensor, goal: Tensor) -> str | None:
    """What is wrong if finite values are infinite in the dtype that they go to."""
    if not goal.is_floating_point() or torch.promote_types(tensor.dtype, goal.dtype) == goal.dtype:
        return None
    lost = tensor.isfinite() & ~tensor.to(goal.dtype).isfinite()
    return f"values of {key}: not all are finite in {goal.dtype}" if lost.any() else None


def _refuse(directory: Path, problems: list[str]) -> None:
    if problems:
        more = [f"... and {len(problems) - 50} more"] if len(problems) > 50 else []
        raise ValueError(f"the adapter in {directory} does not fit the model:\n  " + "\n  ".join(problems[:50] + more))


def _replace_meta(model: nn.Module, goals: dict[str, Tensor], tensors: dict[str, Tensor], log: Undo) -> None:
    """Puts new tensors in the place of those on ``meta``, wherever the model holds them."""
    new = {}
    for key, old in goals.items():
        value = tensors[key].to(old.dtype, copy=True)
        new[id(old)] = nn.Parameter(value, old.requires_grad) if isinstance(old, nn.Parameter) else value
    for module in model.modules() if new else ():
        for registry in (module._parameters, module._buffers):
            names = [name for name, tensor in registry.items() if id(tensor) in new]
            if names:
                log.keep_module(module)
                registry.update({name: new[id(registry[name])] for name in names})
