"""An adapter read from files into a model, all of it or nothing."""

import dataclasses
import os
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from dorac import adapter_config, checks, hub, named, offload, packed, ranks
from dorac.adapter_config import CONFIG_NAME
from dorac.apply import wrap
from dorac.bounded import Bounded
from dorac.checkpoint.fitting import OTHER_BASE, differs, overflow, refuse, unfit_values
from dorac.checkpoint.original import refuse_to_take_out, take_out
from dorac.checkpoint.tensors import (
    adapter_tensors,
    embedding_tensors,
    key_of,
    over_residuals,
    refuse_root,
    saved_parts,
    saved_tensors,
)
from dorac.files import into_model, storage
from dorac.files.into_model import AdapterFile
from dorac.files.parts import Given
from dorac.names import ModuleNames, Pattern, plain_name
from dorac.nn import DoraLayer, layer_class, norm_cache, residual, starts
from dorac.nn.shelf import Shelved
from dorac.ops import sharded
from dorac.places import dora_layers
from dorac.targets import Target, find_targets
from dorac.undo import Undo
from dorac.wrapped import bare, find_saved, refuse_ddp, refuse_offloaded_as_parts, reshard, saved_modules


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
    refuse_root(layers)
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
        keys = {own: key_of(name, key) for own, key in layer.PEFT_KEYS.items()}
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
        expected = {key: t.shape for key, t in adapter_tensors(model, layers).items()}
        for _, layer, keys in over_residuals(layers):
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
            expected |= {key_of(target.name, cls.PEFT_KEYS[name]): shape for name, shape in shapes.items()}
        expected |= {key: t.shape for key, t in saved_tensors(model, saved).items()}

    others = beside_others or any(len(layer.adapters) > 1 for layer in layers.values())
    if start := adapter_config.taken_out(config):
        if others:
            raise ValueError(
                f"the adapter in {directory} is over what init_lora_weights={start!r} leaves of the original base "
                "weights, which the model's other adapters rest on: load it into the plain model"
            )
        refuse_to_take_out(start, directory, layers, bases)
    ends = _embeddings(model, bases)
    base_tensors = {key: p for key, p in embedding_tensors(ends).items() if key in tensors}
    expected |= {key: p.shape for key, p in base_tensors.items()}
    problems += [f"missing: {key}" for key in expected if key not in tensors]
    problems += [f"unexpected: {key}" for key in tensors if key not in expected]
    problems += [
        f"shape of {key}: the model has {list(shape)}, the file {list(tensors[key].shape)}"
        for key, shape in expected.items()
        if key in tensors and tensors[key].shape != shape
    ]
    problems += unfit_values(tensors, saved_tensors(model, saved) | base_tensors)
    refuse(directory, problems)
    if others:
        with offload.onloaded(*ends.values()):
            present = embedding_tensors(ends)
            refuse(directory, [OTHER_BASE.format(key) for key in base_tensors if differs(tensors[key], present[key])])
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
            )
            layers = dora_layers(model)
        for layer in layers.values():
            layer.keep_norm(log)
        residuals = {layer: keys for _, layer, keys in over_residuals(layers)}
        if start:
            take_out(start, model, layers, log)
        written = *saved_parts(model, layers), *(layer.base_layer for layer in residuals)
        with offload.written(log, *written, *(ends.values() if base_tensors else ())):
            goals = adapter_tensors(model, layers)
            goals |= {key: p for key, p in embedding_tensors(ends).items() if key in base_tensors}
            refuse(directory, [problem for key, t in goals.items() if (problem := overflow(key, tensors[key], t))])
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


def _laid_out(target: Target, tensors: dict[str, Tensor]) -> Target:
    """The target with the layout that the file's tensors for it have."""
    cls = layer_class(target.module)
    keys = {name: key_of(target.name, key) for name, key in cls.PEFT_KEYS.items()}
    present = {name: tensors[key] for name, key in keys.items() if key in tensors}
    return dataclasses.replace(target, layout=cls.layout_of(target.module, present))


def _find_places(model: nn.Module, config: dict) -> tuple[list[str], list[Target]]:
    """The modules of a plain model that are saved whole, and those that are adapted."""
    # PEFT names every usual classifier head in modules_to_save; what is saved too little shows in the keys.
    saved = find_saved(model, config.get("modules_to_save") or [], all_needed=False)
    names = ("exclude_modules", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern")
    options = {name: config.get(name) for name in ("r", "lora_alpha", *names)}
    options |= {"saved": saved, "compile": Bounded().compile, "warned_of": ()}  # the tensors tell what is missing
    return saved, find_targets(model, config["target_modules"], **options)


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
